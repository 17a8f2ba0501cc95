"""The harness itself: the judge, awkward tensors, poison, the runner. Nothing here needs Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import poison as poisoning
from harness.fuzz import examples, given, multiplier, settings, st
from harness.judge import (
    JudgeError,
    assert_as_accurate,
    assert_bitwise_equal,
    assert_same_values,
    exact_grid,
    ulp,
)
from harness.poison import (
    assert_fully_written,
    assert_writes_everything,
    is_poison,
    poison_bits,
    poisoned_outputs,
)
from harness.strides import KINDS, SAME_VALUES, assert_surroundings_intact, awkward, kinds_for

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int32, torch.int64)


def products(m: int, k: int, n: int, dtype: torch.dtype, generator: torch.Generator):
    """A matrix product in `dtype`: another order of summation, stock, float64, and the accumulated magnitude."""
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    other = torch.zeros(m, n)
    for start in range(0, k, 16):
        other += a[:, start : start + 16].float() @ b[start : start + 16].float()
    a64, b64 = a.double(), b.double()
    return other.to(dtype), a @ b, a64 @ b64, a64.abs() @ b64.abs()


# --- judge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 25, 1), (3, 150, 5), (64, 400, 32)], ids=str)
@pytest.mark.parametrize("with_magnitude", [False, True], ids=["plain", "magnitude"])
def test_judge_accepts_another_order_of_summation(dtype, shape, with_magnitude, generator):
    for _ in range(20):
        actual, stock, reference, magnitude = products(*shape, dtype, generator)
        verdict = assert_as_accurate(
            actual, stock, reference, dtype=dtype, magnitude=magnitude if with_magnitude or shape[0] == 1 else None
        )
        assert verdict.ratio <= 1
        assert verdict.elements == reference.numel()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_magnitude", [False, True], ids=["plain", "magnitude"])
@pytest.mark.parametrize("bug", ["one element", "missing term", "scaled", "shifted"])
def test_judge_catches_bugs(dtype, with_magnitude, bug, generator):
    actual, stock, reference, magnitude = products(32, 100, 16, dtype, generator)
    slight = (64 if dtype == torch.float32 else 6) * torch.finfo(dtype).eps
    if bug == "one element":
        actual[3, 7] += slight * reference.abs().max()
    elif bug == "missing term":
        term = (torch.randn(32, 1, generator=generator) @ torch.randn(1, 16, generator=generator)).to(dtype)
        reference, stock = reference + term.double(), stock + term
    elif bug == "scaled":
        actual = actual * (1 + slight)
    elif bug == "shifted":
        actual = actual.roll(1, 0)
    with pytest.raises(AssertionError, match="less accurate than stock"):
        assert_as_accurate(actual, stock, reference, dtype=dtype, magnitude=magnitude if with_magnitude else None)


@pytest.mark.parametrize("with_magnitude", [False, True], ids=["plain", "magnitude"])
def test_judge_catches_a_narrower_type(with_magnitude, generator):
    actual, stock, reference, magnitude = products(32, 100, 16, torch.float32, generator)
    for narrow in (torch.float16, torch.bfloat16):
        with pytest.raises(AssertionError, match="less accurate than stock"):
            assert_as_accurate(
                actual.to(narrow).float(),
                stock,
                reference,
                dtype=torch.float32,
                magnitude=magnitude if with_magnitude else None,
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_judge_sees_small_elements_given_the_magnitude(dtype, generator):
    """A wrong row far smaller than the others hides below one rounding step of the largest element."""
    a, b = exact_grid((32, 100), dtype, generator, terms=100), exact_grid((100, 16), dtype, generator, terms=100)
    scale = torch.ones(32, 1, dtype=torch.float64)
    scale[0] = torch.finfo(dtype).eps / 8
    reference, magnitude = (a.double() * scale) @ b.double(), (a.double() * scale).abs() @ b.double().abs()
    stock = reference.to(dtype)
    actual = stock.clone()
    actual[0] *= 8
    assert_as_accurate(actual, stock, reference, dtype=dtype)
    with pytest.raises(AssertionError, match=r"less accurate(.|\n)* \(0, "):
        assert_as_accurate(actual, stock, reference, dtype=dtype, magnitude=magnitude)


def test_judge_lists_the_worst_elements(generator):
    actual, stock, reference, _ = products(4, 30, 4, torch.float32, generator)
    actual[2, 1] += 1.0
    with pytest.raises(AssertionError) as caught:
        assert_as_accurate(actual, stock, reference, dtype=torch.float32, name="grad_weight")
    text = str(caught.value)
    assert "grad_weight: (4, 4) torch.float32" in text
    assert "1 of 16 elements" in text
    assert text.splitlines()[5].split()[:2] == ["(2,", "1)"]


def test_judge_is_not_fooled_by_a_lucky_stock(generator):
    """One element, stock exact by chance: one rounding step of the sum is allowed, two are not."""
    reference = torch.tensor([1.0], dtype=torch.float64)
    magnitude = torch.tensor([64.0], dtype=torch.float64)
    stock = reference.float()
    near, far = torch.tensor([1 + 60 * 2.0**-23]), torch.tensor([1 + 130 * 2.0**-23])
    assert_as_accurate(near, stock, reference, dtype=torch.float32, magnitude=magnitude)
    with pytest.raises(AssertionError):
        assert_as_accurate(near, stock, reference, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_as_accurate(far, stock, reference, dtype=torch.float32, magnitude=magnitude)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_judge_wants_nan_and_infinity_where_the_reference_has_them(value):
    reference = torch.tensor([1.0, value, 3.0], dtype=torch.float64)
    stock = reference.float()
    assert_as_accurate(stock.clone(), stock, reference, dtype=torch.float32)
    for wrong in (0.0, -value if value == value else float("inf")):
        actual = stock.clone()
        actual[1] = wrong
        with pytest.raises(AssertionError, match="NaN or infinity"):
            assert_as_accurate(actual, stock, reference, dtype=torch.float32)
    actual = stock.clone()
    actual[0] = value
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_as_accurate(actual, stock, reference, dtype=torch.float32)


def test_judge_lets_overflow_follow_the_rounded_reference_or_stock():
    inf = float("inf")
    reference = torch.tensor([1.0, 70000.0, 65519.0, 40000.0], dtype=torch.float64)
    finite = torch.tensor([1.0, inf, 65504.0, 40000.0], dtype=torch.float16)
    early = torch.tensor([1.0, inf, inf, inf], dtype=torch.float16)
    assert_as_accurate(finite, finite, reference, dtype=torch.float16)
    assert_as_accurate(finite, early, reference, dtype=torch.float16)  # better than stock is welcome
    assert_as_accurate(early, early, reference, dtype=torch.float16)  # as bad as stock is allowed
    with pytest.raises(AssertionError, match="1 of 4"):
        assert_as_accurate(early, finite, reference, dtype=torch.float16)  # the edge is allowed, 40000 is not
    wrong = torch.tensor([1.0, inf, 1.0, 40000.0], dtype=torch.float16)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate(wrong, early, reference, dtype=torch.float16)
    saturated = torch.tensor([1.0, 65504.0, 65504.0, 40000.0], dtype=torch.float16)
    assert_as_accurate(saturated, saturated, reference.clamp_max(65530.0), dtype=torch.float16)
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_as_accurate(
            torch.tensor([1.0, 1.0, 65504.0, 40000.0]).half(), finite, reference * 1.0, dtype=torch.float16
        )


def test_judge_refuses_comparisons_that_say_nothing():
    x = torch.ones(3)
    r = x.double()
    with pytest.raises(JudgeError, match="dtype"):
        assert_as_accurate(x.half(), x, r, dtype=torch.float32)
    with pytest.raises(JudgeError, match="dtype"):
        assert_as_accurate(x, x, x, dtype=torch.float32)
    with pytest.raises(JudgeError, match="shape"):
        assert_as_accurate(torch.ones(1), x, r, dtype=torch.float32)
    with pytest.raises(JudgeError, match="shape"):
        assert_as_accurate(x, x, r, dtype=torch.float32, magnitude=torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(JudgeError, match="zero"):
        assert_as_accurate(x * 0, x * 0, r * 0, dtype=torch.float32)
    assert_as_accurate(x * 0, x * 0, r * 0, dtype=torch.float32, allow_zero=True)
    with pytest.raises(AssertionError):
        assert_as_accurate(x * 1e-30, x * 0, r * 0, dtype=torch.float32, allow_zero=True)
    with pytest.raises(JudgeError, match="nothing to compare"):
        assert_as_accurate(x[:0], x[:0], r[:0], dtype=torch.float32)
    assert_as_accurate(x[:0], x[:0], r[:0], dtype=torch.float32, allow_empty=True)
    nan = x * float("nan")
    with pytest.raises(JudgeError, match="finite"):
        assert_as_accurate(nan, nan, nan.double(), dtype=torch.float32)
    assert_as_accurate(nan, nan, nan.double(), dtype=torch.float32, allow_nonfinite=True)
    with pytest.raises(JudgeError, match="stock's own error"):
        assert_as_accurate(x, x * 3, r, dtype=torch.float32)
    with pytest.raises(JudgeError, match="floating-point"):
        assert_as_accurate(x.int(), x.int(), r, dtype=torch.int32)


def test_equality_in_two_senses():
    nan, other = torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), -0.0])
    assert_bitwise_equal(nan, nan.clone())
    assert_same_values(nan, other)
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_bitwise_equal(nan, other)
    with pytest.raises(AssertionError, match="values differ"):
        assert_same_values(nan, nan + 1)
    with pytest.raises(JudgeError):
        assert_same_values(nan, nan.double())
    with pytest.raises(JudgeError):
        assert_bitwise_equal(nan[:0], nan[:0])


@pytest.mark.parametrize("dtype", FLOATS + (torch.float64,), ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([1.0, 1.5, 2.0, 3.999, 0.5, -7.0, 0.0, info.smallest_normal], dtype=torch.float64)
    expected = info.eps * torch.tensor(
        [1, 1, 2, 2, 0.5, 4, info.smallest_normal, info.smallest_normal], dtype=torch.float64
    )
    assert torch.equal(ulp(values, dtype), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("terms", [1, 25, 400, 512, 4096, 100_000])
def test_exact_grid_sums_are_exact(dtype, terms, generator):
    columns = max(1, min(64, 2_000_000 // terms))
    a = exact_grid((columns, terms), dtype, generator, terms=terms)
    b = exact_grid((columns, terms), dtype, generator, terms=terms)
    assert a.dtype == dtype
    assert a.abs().max() <= 1
    exact = (a.double() * b.double()).sum(1)
    assert torch.equal(exact.to(dtype).double(), exact)
    assert torch.equal((a.float() * b.float()).flip(1).cumsum(1)[:, -1].double(), exact)
    if columns > 16:
        assert len(exact.unique()) > 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_grid_has_ties(dtype, generator):
    a, b = exact_grid((64, 25), dtype, generator), exact_grid((25, 64), dtype, generator)
    windows = (a.double() @ b.double()).reshape(-1, 4).sort(dim=1).values
    assert (windows[:, -1] == windows[:, -2]).double().mean() > 0.02


def test_exact_grid_wants_floats():
    with pytest.raises(JudgeError):
        exact_grid((2,), torch.int32)


# --- strides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_awkward_tensors(kind, dtype, generator):
    for shape in [(), (5,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 2, 2), (1, 1, 1, 1), (0, 3, 4, 5)]:
        values = torch.randint(0, 100, shape, generator=generator).to(dtype)
        if kind == "channels_last" and len(shape) < 4:
            assert kind not in kinds_for(values)
            with pytest.raises(ValueError, match="4 or 5 dimensions"):
                awkward(values, kind)
            continue
        if kind != "contiguous" and kind not in kinds_for(values):
            continue
        result = awkward(values, kind)
        assert result.shape == values.shape
        assert result.dtype == dtype
        assert result.numel() == 0 or result.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
        if kind in SAME_VALUES:
            assert torch.equal(result, values)
        if kind in ("sliced", "padded", "unaligned"):
            assert_surroundings_intact(result)
            assert result._base.numel() > result.numel()


def test_awkward_layouts_are_what_they_say():
    values = torch.arange(120.0).reshape(2, 3, 4, 5)
    assert awkward(values, "contiguous").is_contiguous()
    assert awkward(values, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert awkward(values, "transposed").stride() == (1, 2, 6, 24)
    assert awkward(values, "sliced").stride(-1) == 2
    assert awkward(values, "sliced").storage_offset() > 0
    padded = awkward(values, "padded")
    assert padded.stride(-1) == 1
    assert not padded.is_contiguous()
    unaligned = awkward(values, "unaligned")
    assert unaligned.is_contiguous()
    assert unaligned.data_ptr() % 16 == 4
    assert awkward(values, "expanded").stride(0) == 0
    assert torch.equal(awkward(values, "expanded", dim=1)[:, 2], values[:, 0])
    assert awkward(values, "scalar").stride() == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="unknown kind"):
        awkward(values, "flipped")


@pytest.mark.parametrize("kind", ["sliced", "padded", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_writes_around_a_view_are_seen(kind, dtype):
    view = awkward(torch.ones(3, 4).to(dtype), kind)
    view.fill_(2)
    assert_surroundings_intact(view)
    view._base.reshape(-1)[0] = 1
    with pytest.raises(AssertionError, match="1 elements around"):
        assert_surroundings_intact(view)
    with pytest.raises(ValueError, match="not a view"):
        assert_surroundings_intact(torch.ones(2))


# --- poison --------------------------------------------------------------------------------------------------------


def empty(shape, like=None, dtype=torch.float32, memory_format=torch.contiguous_format):
    """An allocation helper such as launchers use."""
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


alias_of_empty = empty
HERE = (f"{__name__}:empty",)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + (torch.float64, torch.bool), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_are_poisoned(dtype, memory_format):
    original = empty
    with poisoned_outputs(allocators=HERE) as poison:
        out = alias_of_empty((2, 3, 4, 5), dtype=dtype, memory_format=memory_format)
        assert out.is_contiguous(memory_format=memory_format)
        assert out.dtype == dtype
        assert out._base is None
        assert not out._is_view()
        assert out.data_ptr() % 16 == 0
        assert is_poison(out).all()
        if dtype.is_floating_point:
            assert out.isnan().all()
        assert poison.owns(out)
        assert not poison.owns(torch.empty(3))
        with pytest.raises(AssertionError, match="120 of 120"):
            assert_fully_written(out)
        out.fill_(0)
        assert_fully_written(out)
        poison.assert_all_written()
        if dtype in INTEGERS:
            out[1, 2, 3, 4] = poison_bits(dtype)
            with pytest.raises(AssertionError, match="1 of 120"):
                assert_fully_written(out)
    assert empty is original
    assert alias_of_empty is original


def test_a_computed_nan_is_not_poison():
    for dtype in FLOATS + (torch.float64,):
        nan = torch.full((3,), float("nan"), dtype=dtype)
        assert not is_poison(nan).any()
        assert not is_poison(torch.full((3,), float("inf"), dtype=dtype) - float("inf")).any()


@pytest.mark.parametrize(("offset", "where"), [(-1, "1 elements before"), (12, "1 after")])
def test_damaged_guards_are_seen(offset, where):
    def damage(poison):
        out = empty((3, 4))
        out.fill_(0)
        torch.as_strided(out, (1,), (1,), out.storage_offset() + offset).fill_(1.0)
        poison.assert_all_written()

    with pytest.raises(AssertionError, match=where), poisoned_outputs(allocators=HERE) as poison:
        damage(poison)
    with poisoned_outputs(allocators=HERE, check_guards=False) as poison:
        damage(poison)


def test_poison_wants_allocations():
    with poisoned_outputs(allocators=HERE) as poison, pytest.raises(AssertionError, match="nothing was allocated"):
        poison.assert_all_written()
    with pytest.raises(AssertionError, match="nothing was allocated"):
        assert_writes_everything(lambda: None, allocators=HERE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.int32], ids=str)
def test_two_runs_tell_unwritten_bytes_from_legal_ones(dtype):
    def whole():
        empty((4,), dtype=dtype).copy_(torch.tensor([0xAB, 0x54, 0, 1]))

    def part():
        empty((4,), dtype=dtype)[:3].fill_(0)

    assert_writes_everything(whole, allocators=HERE)
    with pytest.raises(AssertionError, match=r"1 of 4 .* \(3,\)"):
        assert_writes_everything(part, allocators=HERE)


def test_fake_tensors_pass_unpoisoned():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with poisoned_outputs(allocators=HERE) as poison, FakeTensorMode():
        empty((3,))
    assert poison.tensors == []
    assert [path.rpartition(".")[2] for path in poisoning.ALLOCATORS] == ["runtime:empty", "plans:empty_strided"]


# --- hypothesis, process kinds, runner -----------------------------------------------------------------------------


@settings(max_examples=examples(5))
@given(st.integers(1, 5))
def test_fuzz_draws(n):
    assert 1 <= n <= 5


def test_fuzz_multiplier(monkeypatch):
    monkeypatch.setenv("FASTLENET_FUZZ", "7")
    assert examples(3) == 21
    monkeypatch.setenv("FASTLENET_FUZZ", "0.2")
    assert [examples(n) for n in (1, 10)] == [1, 2]
    monkeypatch.setenv("FASTLENET_FUZZ", "many")
    with pytest.raises(pytest.UsageError):
        multiplier()


SAMPLE_TESTS = {
    "test_plain.py": "def test_one(): pass\n\n\ndef test_two(): pass\n",
    "interpreted/test_kernels.py": "import os\n\n\ndef test_mode():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n"
    "\n\ndef test_skipped():\n    import pytest\n    pytest.skip('why not')\n",
    "compiled/test_compiled.py": "import os\n\n\ndef test_mode():\n    assert 'TRITON_INTERPRET' not in os.environ\n",
}


@pytest.fixture
def sample(tmp_path):
    """A small project with the real runner, conftest and harness; returns a function that runs it."""
    here = Path(__file__).parent
    tests = tmp_path / "tests"
    for name in ("run.py", "conftest.py"):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text((here / name).read_text())
    (tests / "harness").symlink_to(here / "harness")
    for name, text in SAMPLE_TESTS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}

    def run(*options: str, **more: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "tests/run.py", "--interpret", *options],
            cwd=tmp_path,
            env=env | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout.rstrip().splitlines()

    run.tests = tests
    return run


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's suites need Linux")


@pytest.mark.wide
@linux_only
def test_runner_counts_over_all_processes(sample):
    (sample.tests / "test_plain.py").write_text("import os\n\n\ndef test_crash():\n    os.abort()\n")
    (sample.tests / "compiled" / "test_compiled.py").write_text(
        "import os\nimport pytest\n\n\n@pytest.fixture\ndef broken():\n    raise ValueError\n\n\n"
        "def test_error(broken): pass\n\n\ndef test_failure():\n    assert 'TRITON_INTERPRET' in os.environ\n"
    )
    code, lines = sample("--jobs", "2")
    assert (code, lines[-1]) == (1, "1 passed, 3 failed, 1 skipped"), "\n".join(lines)
    assert any("crashed while running" in line or "SIGABRT" in line for line in lines)


@pytest.mark.wide
@linux_only
def test_runner_notices_suites_without_tests(sample):
    code, lines = sample("--only", "plain", "-k", "one")
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 0 skipped"), "\n".join(lines)
    (sample.tests / "compiled" / "test_compiled.py").unlink()
    code, lines = sample("--only", "compiled", "--jobs", "1")
    assert code == 1
    assert lines[-2:] == ["no tests were collected in: compiled", "0 passed, 0 failed, 0 skipped"]


GROUPED = """
import os, pathlib, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(6))
def test_grouped(number):
    with open(pathlib.Path(__file__).with_name("processes"), "a") as file:
        file.write(f"{os.getpid()}\\n")
"""


@pytest.mark.wide
def test_tests_of_a_group_share_a_process(sample):
    """So that what they share is made once. pytest 9.2 and pytest-xdist 3.8 forget groups together."""
    pytest.importorskip("xdist")
    (sample.tests / "test_plain.py").write_text(GROUPED)
    code, lines = sample("--only", "plain", "--tier", "all", "--jobs", "2")
    assert (code, lines[-1]) == (0, "6 passed, 0 failed, 0 skipped"), "\n".join(lines)
    assert len(set((sample.tests / "processes").read_text().split())) == 1


TIERED = """
import pytest

@pytest.mark.parametrize("a", range(2))
@pytest.mark.parametrize("b", range(3))
def test_pairs(a, b): pass

@pytest.mark.parametrize("either", "xy")
@pytest.mark.parametrize("a", "pq")
def test_two(a, either): pass

@pytest.mark.cheap
@pytest.mark.parametrize("a", [0, pytest.param(1, marks=pytest.mark.wide)])
@pytest.mark.parametrize("b", range(2))
def test_cheap(a, b): pass

@pytest.mark.thorough
def test_long(): pass

@pytest.mark.wide
def test_wide(): pass

def test_one(): pass
"""


@pytest.mark.wide
def test_tiers_show_every_test_every_value_and_every_combination(sample):
    (sample.tests / "test_plain.py").write_text(TIERED)
    ran = []
    for tier in ([], ["quick"], ["wide", "--rest"], ["all", "--rest"], ["wide"]):
        options = ["--tier", *tier] if tier else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/test_plain.py", "--collect-only", "-q", *options],
            cwd=sample.tests.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        ran.append([line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line])
    every, quick, then, rest, wide = ran
    assert len(every) == 17
    assert quick == [
        "test_pairs[0-0]",
        "test_two[p-x]",
        "test_two[p-y]",
        "test_cheap[0-0]",
        "test_cheap[1-0]",
        "test_one",
    ]
    assert then == [
        "test_pairs[0-1]",
        "test_pairs[1-0]",
        "test_pairs[2-0]",
        "test_two[q-x]",
        "test_cheap[0-1]",
        "test_wide",
    ]
    assert rest == ["test_pairs[1-1]", "test_pairs[2-1]", "test_two[q-y]", "test_cheap[1-1]", "test_long"]
    assert set(wide) == {*quick, *then}


@pytest.mark.wide
def test_wrong_folder_for_the_process_is_explained(sample):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/compiled", "-p", "no:cacheprovider"],
        cwd=sample.tests.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stdout
    assert "not collecting tests/compiled: TRITON_INTERPRET is set" in done.stdout
