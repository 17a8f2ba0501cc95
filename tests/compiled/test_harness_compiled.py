"""The fake driver on toy kernels: what compiles is recorded truly, what spills or does not fit is caught."""

from __future__ import annotations

import gc

import pytest
import torch
import triton
import triton.language as tl
from harness import toy
from harness.fake_driver import (
    TARGETS,
    OutOfResources,
    assert_no_spills,
    assert_shipped_without_spills,
    compiling_for,
    opcodes,
    pinned_triton,
    sass,
    table,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

every_target = pytest.mark.parametrize("name", TARGETS)
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@every_target
def test_a_launcher_compiles_and_is_recorded(name):
    x = torch.ones(1000)
    with compiling_for(name) as records:
        assert driver.active.get_current_target() == TARGETS[name]
        toy.add(x, x)
        toy.add(x, x)
        toy.add(x.half(), x.half())
    assert len(records) == 2
    first, second = records
    assert (first.name, first.target, first.num_warps) == ("add_kernel", TARGETS[name], 4)
    assert first.launches == [(16, 1, 1)] * 2
    assert first.signature["x_ptr"] == "*fp32"
    assert second.signature["x_ptr"] == "*fp16"
    assert first.constexprs == {"BLOCK": 64}
    assert first.registers > 0
    assert first.shared == 0
    assert "add_kernel" in first.assembly
    assert isinstance(first.asm["ttgir"], str)
    assert_no_spills(records)
    assert "add_kernel" in table(records)
    if name.startswith("sm"):
        counts = opcodes(first)
        assert sum(n for op, n in counts.items() if op.startswith("FADD")) > 0
        assert sum(n for op, n in counts.items() if op.startswith("STG")) > 0
        assert "add_kernel" in sass(first)
    else:
        assert first.count(r"v_(pk_)?add_f32") > 0
        with pytest.raises(ValueError, match="not compiled for NVIDIA"):
            sass(first)


@every_target
def test_arguments_are_specialised_as_on_the_device(name):
    base = torch.ones(1025)
    with compiling_for(name) as records:
        toy.add(base[:1024], base[:1024])
        toy.add(base[1:], base[1:])
        toy.add(base[:1023], base[:1023])
        toy.add(base[:1], base[:1])
    aligned, unaligned, odd, single = records
    assert {"x_ptr", "n"} <= set(aligned.attributes)
    assert "x_ptr" not in {k for k, v in unaligned.attributes.items() if ["tt.divisibility", 16] in v}
    assert ["tt.divisibility", 16] in unaligned.attributes["out_ptr"]
    assert "n" not in odd.attributes
    assert single.constexprs["n"] == 1


@every_target
def test_a_spilling_kernel_is_caught(name):
    with compiling_for(name) as records:
        toy.product(256 if name == "gfx942" else 128, 32, num_warps=1)
    assert records[0].spill_bytes > 0
    with pytest.raises(AssertionError, match=r"1 of 1 kernels spill(.|\n)*product_kernel"):
        assert_no_spills(records)
    with pytest.raises(AssertionError, match="no kernel was launched"):
        assert_no_spills([])


def test_what_ships_must_not_spill_with_the_pinned_triton(monkeypatch):
    with compiling_for("sm_90") as records:
        toy.product(128, 32, num_warps=1)
    monkeypatch.setattr(triton, "__version__", pinned_triton())
    with pytest.raises(AssertionError, match="1 of 1 kernels spill"):
        assert_shipped_without_spills(records)
    monkeypatch.setattr(triton, "__version__", "0.0")
    with pytest.warns(UserWarning, match="triton 0.0 is not the pinned one"):
        assert_shipped_without_spills(records)
    with pytest.raises(AssertionError, match="no kernel was launched"):
        assert_shipped_without_spills([])


@every_target
def test_too_much_shared_memory_is_refused(name):
    with compiling_for(name) as records:
        toy.product(64, 32, num_warps=4, num_stages=2)
        with pytest.raises(OutOfResources, match="shared memory") as caught:
            toy.product(128, 256, num_warps=8, num_stages=4)
    assert caught.value.limit == SHARED_LIMIT[name]
    assert caught.value.required > caught.value.limit
    assert len(records) == 1
    assert 0 < records[0].shared <= SHARED_LIMIT[name]


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_ptx_tells_whether_nan_is_propagated(name):
    with compiling_for(name) as records:
        toy.relu(torch.ones(64), nan=True)
        toy.relu(torch.ones(64), nan=False)
    right, wrong = records
    assert right.count(r"max\.NaN\.f32") > 0
    assert wrong.count(r"max\.NaN\.f32") == 0
    assert wrong.count(r"max\.f32") > 0


def test_empty_grids_and_tensors_are_harmless():
    with compiling_for("sm_90") as records:
        toy.add(torch.ones(0), torch.ones(0))
    assert records[0].launches == [(0, 1, 1)]


def test_the_autotuner_compiles_every_configuration():
    tuned = triton.autotune([triton.Config({"BLOCK": b}) for b in (64, 128, 256)], key=["n"])(
        triton.jit(toy.add_kernel.fn)
    )
    x = torch.ones(1000)
    with compiling_for("sm_90") as records:
        tuned[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, x, torch.empty(1000), 1000, 1000, 0)
    assert [r.constexprs["BLOCK"] for r in records] == [64, 128, 256]


@triton.jit
def _illegal_kernel(x_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + offset[:, None] * BLOCK + offset[None, :])
    tl.store(x_ptr + offset, tl.sum(tl.dot(tile, tile), 1))


def test_code_that_only_the_interpreter_accepts_is_refused():
    with compiling_for("sm_90") as records, pytest.raises(triton.CompilationError):
        _illegal_kernel[(1,)](torch.ones(16), BLOCK=4)
    assert records == []


def test_contexts_are_independent_and_leave_nothing_behind(monkeypatch):
    x = torch.ones(100)
    before = getattr(driver, "_active", None)
    with compiling_for("sm_90") as outer:
        toy.add(x, x)
        with compiling_for("sm_80") as inner:
            toy.add(x, x)
        toy.add(x, x)
    assert [len(outer), len(inner)] == [1, 1]
    assert len(outer[0].launches) == 2
    complaints: list = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    gc.collect()
    assert complaints == []
    assert getattr(driver, "_active", None) is before
    assert not [d for d in toy.add_kernel.device_caches if isinstance(d, int) and d >= 1_000_000]
    with pytest.raises(ValueError, match="no device limits"), compiling_for(GPUTarget("cuda", 70, 32)):
        pass
