"""The harness on toy kernels that run: sound ones pass, planted bugs are caught.

The bounds checker needs the interpreter; poison, guards and surroundings work on a GPU just as well.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from harness import modes, toy
from harness.bounds import BoundsError, bounds_checked, sanitized
from harness.poison import assert_fully_written, assert_writes_everything, poisoned_outputs
from harness.strides import SAME_VALUES, assert_surroundings_intact, awkward

TOY = ("harness.toy:empty",)
only_interpreted = pytest.mark.skipif(not modes.interpreting(), reason="only the interpreter's pointers can be watched")


@pytest.fixture
def pair(device, generator):
    """Two vectors of 100 numbers, which no block size divides."""
    return tuple(torch.randn(100, generator=generator).to(device) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sound_kernels_pass(pair, dtype):
    x, y = (t.to(dtype) for t in pair)
    with sanitized(allocators=TOY) as (poison, report):
        torch.testing.assert_close(toy.add(x, y), x + y)
        torch.testing.assert_close(toy.average(x[:64], y[:64]), (x[:64] + y[:64]) / 2)
        whole = (x * 4).round()  # sums of small integers are exact in either type
        assert torch.equal(toy.window_sum(whole, 5), whole.float().unfold(0, 5, 1).sum(1))
        poison.assert_all_written()
    assert report.active == modes.interpreting()
    if report.active:
        assert report.launches == 3
        assert report.accesses > 10
        assert report.reads["add_kernel"] == {"x_ptr", "y_ptr"}
        assert report.writes["window_kernel"] == {"out_ptr"}


@pytest.mark.parametrize("kind", [k for k in SAME_VALUES if k not in ("channels_last", "transposed")])
def test_views_of_any_kind_pass(pair, kind):
    x = awkward(pair[0], kind)
    with sanitized(allocators=TOY) as (poison, _):
        out = toy.window_sum(x, 3)
        poison.assert_all_written()
    torch.testing.assert_close(out, x.unfold(0, 3, 1).sum(1))


@only_interpreted
@pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "with the next tensor right behind it"])
def test_an_off_by_one_mask_is_caught(pair, neighbour):
    x, y = pair
    if neighbour:  # running off x lands in y: still an access outside x
        x, y = torch.cat([x, y]).split(100)
    with (
        pytest.raises(BoundsError, match=r"'add_kernel'.*load outside argument 'x_ptr'.*1 elements past its end"),
        bounds_checked(),
    ):
        toy.add(x, y, excess=1)


@only_interpreted
def test_a_missing_mask_is_caught(pair):
    with (
        pytest.raises(BoundsError, match=r"'unmasked_kernel', program \(1, 0, 0\).*28 of 64 active lanes"),
        bounds_checked(),
    ):
        toy.average(*pair)


@only_interpreted
def test_a_store_outside_is_caught(pair):
    x, y = (torch.cat([t, t]) for t in pair)
    short = torch.empty(100)
    with pytest.raises(BoundsError, match="store outside argument 'out_ptr'"), bounds_checked():
        toy.add_kernel[(4,)](x, y, short, 100, 101, 0, BLOCK=32)


@only_interpreted
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_window_is_caught_inside_loops_and_helpers(pair, shift):
    text = "1 elements before its start" if shift < 0 else "1 elements past its end"
    with pytest.raises(BoundsError, match=text), bounds_checked():
        toy.window_sum(pair[0], 5, shift=shift)


@only_interpreted
def test_a_wrong_stride_is_caught_in_the_gaps_of_a_view(pair):
    x = awkward(pair[0], "sliced")
    out = torch.empty(96)
    with bounds_checked():
        toy.window_kernel[(1,)](x, out, 96, x.stride(0), WINDOW=5, SHIFT=0, BLOCK=32)
    with pytest.raises(BoundsError, match="in a gap of the view"), bounds_checked():
        toy.window_kernel[(1,)](x, out, 96, 1, WINDOW=5, SHIFT=0, BLOCK=32)


@only_interpreted
def test_writing_to_an_input_is_caught(pair):
    with bounds_checked():
        toy.double_in_place(pair[0][:50])
    with pytest.raises(BoundsError, match=r"'x_ptr'.*must not be modified"), sanitized(allocators=TOY):
        toy.double_in_place(pair[0][:50])


@only_interpreted
def test_reading_what_nobody_wrote_is_caught(pair):
    with pytest.raises(BoundsError, match="1 elements never written"), sanitized(allocators=TOY):
        toy.window_sum(toy.add(*pair, first=1), 5)
    nan = torch.full((100,), float("nan"))
    with sanitized(allocators=TOY):  # a NaN of one's own is no poison
        toy.window_sum(toy.add(nan, nan), 5)


@only_interpreted
def test_empty_tensors_and_launches(pair):
    x, y = pair
    with pytest.raises(BoundsError, match="the tensor is empty"), bounds_checked():
        toy.add_kernel[(1,)](x[:0], y, x, 0, 1, 0, BLOCK=64)
    with bounds_checked() as report:
        toy.add(x[:0], y[:0])
    assert report.lanes == 0
    with pytest.raises(BoundsError, match="no kernel was launched"), bounds_checked():
        pass
    with bounds_checked(require_launch=False):
        pass


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offset % 8, tl.load(x_ptr + offset, mask=offset < n, other=0.0), mask=offset < n)


@only_interpreted
def test_atomics_are_checked():
    x, out = torch.ones(20), torch.zeros(8)
    with bounds_checked() as report:
        _atomic_kernel[(1,)](x, out, 20, BLOCK=32)
    assert out.sum() == 20
    assert report.writes == {"_atomic_kernel": {"out_ptr"}}
    with pytest.raises(BoundsError, match="atomic outside argument 'out_ptr'"), bounds_checked():
        _atomic_kernel[(1,)](x, out[:7], 20, BLOCK=32)


@only_interpreted
def test_other_errors_pass_through_and_everything_is_restored(pair):
    from triton.runtime import interpreter

    before = (
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.GridExecutor.__call__,
        interpreter._implicit_cvt,
    )
    with pytest.raises(TypeError), bounds_checked():
        toy.add_kernel[(1,)](pair[0], BLOCK=64)
    with pytest.raises(BoundsError), bounds_checked():
        toy.average(*pair)
    after = (
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.GridExecutor.__call__,
        interpreter._implicit_cvt,
    )
    assert before == after
    torch.testing.assert_close(toy.add(*pair), pair[0] + pair[1])


def test_an_unwritten_output_is_caught(pair):
    with poisoned_outputs(allocators=TOY) as poison:
        assert_fully_written(toy.add(*pair))
        out = toy.add(*pair, first=2)
        with pytest.raises(AssertionError, match=r"2 of 100 elements were never written, the first at \(0,\)"):
            assert_fully_written(out)
        with pytest.raises(AssertionError, match="allocation 1"):
            poison.assert_all_written()
    small = [torch.ones(100, dtype=torch.uint8, device=t.device) for t in pair]
    assert_writes_everything(lambda: toy.add(*small), allocators=TOY)
    with pytest.raises(AssertionError, match="2 of 100"):
        assert_writes_everything(lambda: toy.add(*small, first=2), allocators=TOY)


def test_a_store_past_the_output_damages_its_guard(pair):
    x, y = (torch.cat([t, t])[:100] for t in pair)  # one more element may be read, so only the store is wrong
    with pytest.raises(AssertionError, match="1 after"), poisoned_outputs(allocators=TOY):
        toy.add(x, y, excess=1)


def test_a_store_around_a_view_is_seen(pair):
    x = awkward(pair[0], "padded")
    toy.in_place_kernel[(1,)](x, 100, BLOCK=128)
    assert_surroundings_intact(x)
    # Integers: doubling a NaN would leave it a NaN.
    x = awkward((pair[0] * 100).int(), "padded")
    toy.in_place_kernel[(1,)](x, 101, BLOCK=128)
    with pytest.raises(AssertionError, match="around"):
        assert_surroundings_intact(x)
