"""Launches that go past Triton's binder: which kernel they take, and who still sees them."""

from __future__ import annotations

import pytest
import torch
import triton
from fastlenet.kernels import addmm_relu, runtime, tiles
from fastlenet.kernels.runtime import launch
from harness import toy
from harness.fake_driver import compiling_for
from harness.operators import fp32_precision
from triton.runtime.jit import JITFunction


@pytest.fixture
def bound(monkeypatch):
    """The launches that Triton binds, one entry each."""
    log = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **rest: (log.append(self), run(self, *args, **rest))[1])
    return log


def add(x, n=None, first=0, **constants):
    n = len(x) if n is None else n
    launch(toy.add_kernel, (triton.cdiv(n, 64),), x, x, torch.empty_like(x), n, n, first, BLOCK=64, **constants)


def of(record):
    """What a kernel was specialised on."""
    aligned = {name for name, found in record.attributes.items() if ["tt.divisibility", 16] in found}
    return record.signature["x_ptr"], "x_ptr" in aligned, "n" in aligned, record.constexprs.get("n"), record.num_warps


def test_a_known_launch_is_not_bound_again(bound):
    with compiling_for("sm_90") as records:
        tensors = [torch.ones(1000) for _ in range(3)]
        for x in tensors:
            add(x)
    assert len(bound) == 1
    (record,) = records
    assert record.launches == [(16, 1, 1)] * 3
    # Each with its own arguments, in the kernel's order.
    assert [call.arguments[0].value for call in record.calls] == [x.data_ptr() for x in tensors]
    names = ["x_ptr", "y_ptr", "out_ptr", "n", "limit", "first"]
    assert all([argument.name for argument in call.arguments] == names for call in record.calls)


CALLS = {
    "aligned": lambda base: add(base[:1024]),
    "unaligned": lambda base: add(base[1:1025]),
    "no multiple of 16": lambda base: add(base[:1023]),
    "one": lambda base: add(base[:1]),
    "beyond 32 bits": lambda base: add(base[:1024], first=2**31),
    "float16": lambda base: add(base.half()[:1024]),
    "eight warps": lambda base: add(base[:1024], num_warps=8),
}


def test_equal_launches_share_a_kernel_and_no_others_do(bound):
    """Each kind of call takes the kernel that Triton itself takes for it, the second time round too."""
    base = torch.ones(1040)
    with compiling_for("sm_90") as records:
        for call in CALLS.values():
            call(base)
        assert len(bound) == len(CALLS)
        for call in CALLS.values():
            call(base)
        assert len(bound) == len(CALLS)
    assert [len(record.calls) for record in records] == [2] * len(CALLS)
    aligned, unaligned, odd, one, long, half, warps = records
    assert of(aligned) == ("*fp32", True, True, None, 4)
    assert of(unaligned) == ("*fp32", False, True, None, 4)
    assert of(odd) == ("*fp32", True, False, None, 4)
    assert of(one)[3] == 1
    assert (aligned.constexprs.get("first"), long.signature["first"]) == (None, "i64")
    assert of(half) == ("*fp16", True, True, None, 4)
    assert of(warps) == ("*fp32", True, True, None, 8)


def test_numbers_that_are_equal_but_of_other_types_are_told_apart():
    with compiling_for("sm_90") as records:
        for first in (2, 2.0, 2, 2.0):
            launch(toy.add_kernel, (1,), *[torch.ones(64)] * 3, 64, 64, first, BLOCK=64)
    assert [record.signature["first"] for record in records] == ["i32", "fp32"]
    assert [len(record.calls) for record in records] == [2, 2]


def test_a_kernel_stays_with_its_driver():
    x = torch.ones(1000)
    for name in ("sm_90", "sm_80", "sm_90"):
        with compiling_for(name) as records:
            add(x)
            add(x)
        assert [len(record.calls) for record in records] == [2]


def test_amds_kernels_are_bound_each_time(bound):
    """Its backend also specialises on the size of a tensor's memory."""
    with compiling_for("gfx942"):
        add(torch.ones(1000))
        add(torch.ones(1000))
    assert len(bound) == 2


def test_whoever_watches_launches_gets_them_from_triton(bound):
    """The fake launcher calls no hooks: what is seen here is that Triton, which hands them over, does the launch."""
    x, before = torch.ones(1000), []
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    with compiling_for("sm_90") as records:
        add(x)
        add(x)
        assert len(bound) == 1
        for times, hook in enumerate(hooks, 2):
            hook.add(print)
            try:
                add(x)
            finally:
                hook.remove(print)
            add(x)
            assert len(bound) == times
        toy.add_kernel.add_pre_run_hook(lambda *args, **_: before.append(args))
        try:
            add(x)
        finally:
            toy.add_kernel.pre_run_hooks.clear()
    assert len(before) == 1
    assert [len(record.calls) for record in records] == [7]


MATRICES = {
    "rows of 16 bytes": (lambda base: base[:320].view(8, 40), True),
    "columns of 16 bytes": (lambda base: base[:320].view(8, 40).t(), True),
    "rows of 12 bytes": (lambda base: base[:24].view(8, 3), False),
    "unaligned": (lambda base: base[1:321].view(8, 40), False),
    "padded rows": (lambda base: base[:320].view(8, 40)[:, :36], True),
    "one row": (lambda base: base[:40].view(1, 40), True),
    "expanded rows": (lambda base: base[:40].expand(8, 40), False),
    "rows that overlap": (lambda base: base.as_strided((8, 40), (4, 1)), False),
    "every second column": (lambda base: base[:640].view(8, 80)[:, ::2], False),
    "empty": (lambda base: base[:0].view(0, 40), False),
}


@pytest.mark.parametrize("name", MATRICES)
def test_which_matrices_have_descriptors(name):
    """As cuTensorMapEncodeTiled takes them, and with strides that a row does not outgrow."""
    make, expected = MATRICES[name]
    matrix = make(torch.zeros(1024))
    assert matrix.data_ptr() % 4 == 0
    assert runtime.describable(matrix) == expected
    if expected:
        found = runtime.box(matrix, 4, 20, False)
        dense_rows = matrix.stride(1) == 1
        assert found.block == ((4, 20) if dense_rows else (20, 4))
        assert found.shape == tuple(matrix.shape if dense_rows else matrix.t().shape)
        assert found.strides[1] == 1
        assert found.strides[0] * 4 % 16 == 0


@pytest.mark.skipif(not runtime.DESCRIPTORS_ROUND, reason="descriptors round from Triton 3.7 on")
def test_the_sign_that_masks_is_not_rounded():
    """Rounded to tf32 the least positive numbers are 0, and their gradients would be too."""
    with compiling_for("sm_90"), fp32_precision("tf32"):
        tile = tiles.product(torch.float32, 64, 64, 64)
        boxes = addmm_relu._boxes(torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64), tile)
        assert {place: box.rounded for place, box in boxes.items()} == {0: True, 1: True, 2: False}
    with compiling_for("sm_80"), fp32_precision("tf32"):
        assert addmm_relu._boxes(torch.zeros(64, 64), torch.zeros(64, 64), None, tile) == {}
