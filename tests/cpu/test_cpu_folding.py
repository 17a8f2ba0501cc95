"""BatchNorm in eval mode folded into convolutions: the compiled kernel's numbers, and when it is not asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness.judge import assert_as_accurate
from harness.poison import assert_fully_written, poisoned_outputs
from torch import nn

import fastlenet
from fastlenet import cpu
from fastlenet.fusion.patterns import fold

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

SHAPES = [(1, 1, 1, 1), (6, 1, 5, 5), (17, 3, 3, 3), (4, 16, 1, 1), (33, 5, 2, 7)]
EPSILONS = (1e-5, 0.1, 1e-3, 1e-5, 2.0)


def operands(shape, present=(True, True, True), seed=0):
    """Weight and bias, running mean and variance, scale and shift; `present`: of those that may be None."""
    random, filters = torch.Generator().manual_seed(seed), shape[0]
    weight, (bias, mean, scale, shift) = torch.randn(shape, generator=random), torch.randn(4, filters, generator=random)
    variance = torch.rand(filters, generator=random) * 3
    bias, scale, shift = (tensor if kept else None for tensor, kept in zip((bias, scale, shift), present, strict=True))
    return [weight, bias, mean, variance, scale, shift]


def exact(epsilons, tensors):
    """In float64, and by stock's operators: a kernel takes neither."""
    with fastlenet.use_backend("aten"):
        composed = fold(epsilons, *tensors)
        return composed, fold(epsilons, *(None if each is None else each.double() for each in tensors))


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the kernel is asked."""
    calls, original = [], cpu.fold
    monkeypatch.setattr(cpu, "fold", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("present", itertools.product([True, False], repeat=3), ids=str)
def test_as_accurate_as_the_composition(present, kernel_calls):
    """All shapes in one call, with every number of operands."""
    tensors = [each for i, shape in enumerate(SHAPES) for each in operands(shape, present, i)]
    with poisoned_outputs(allocators=("fastlenet.cpu.folding:empty",)) as poison:
        actual = fold(EPSILONS, *tensors)
        poison.assert_guards_intact()
    assert len(kernel_calls) == 1
    for one, other, reference in zip(actual, *exact(EPSILONS, tensors), strict=True):
        assert_fully_written(one)
        assert one.shape == other.shape
        assert_as_accurate(one, other, reference, dtype=torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0], ids=str)
@pytest.mark.parametrize("place", range(6))
def test_numbers_that_have_no_root_or_end(place, value, kernel_calls):
    """One operand of one filter is NaN, infinite, negative or zero: a variance of -1 has no root."""
    tensors = operands((5, 2, 3, 3))
    tensors[place][3] = value
    for one, other in zip(fold((0.0,), *tensors), exact((0.0,), tensors)[0], strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert kernel_calls


@pytest.mark.parametrize("shape", [(6, 1, 3, 3), (6, 4, 1, 1)], ids=str)
def test_both_layouts_at_once(shape, kernel_calls):
    """Of one channel, or one pixel. A weight in channels_last makes stock's result channels_last too."""
    convolution, norm = nn.Conv2d(*shape[1::-1], shape[2:]), nn.BatchNorm2d(shape[0])
    model = nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2)).eval().to(memory_format=torch.channels_last)
    images = torch.randn(5, shape[1], 9, 8)
    with torch.no_grad():
        actual, expected = fastlenet.fuse(model)(images), model(images)
    assert kernel_calls
    assert actual.stride() == expected.stride()


def test_no_filter_at_all():
    actual = fold((0.1, 0.1), *operands((0, 3, 2, 2)), *operands((3, 0, 2, 2)))
    assert [tensor.shape for tensor in actual] == [(0, 3, 2, 2), (0,), (3, 0, 2, 2), (3,)]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[4].requires_grad_(),
        lambda tensors: tensors.__setitem__(0, tensors[0].to(memory_format=torch.channels_last)),
        lambda tensors: tensors.__setitem__(2, tensors[2].repeat_interleave(2)[::2]),
        lambda tensors: tensors.__setitem__(3, torch._neg_view(-tensors[3])),
        lambda tensors: tensors.__setitem__(slice(None), [tensor.double() for tensor in tensors]),
        lambda tensors: tensors.__setitem__(slice(2, 4), [tensor.double() for tensor in tensors[2:4]]),
    ],
    ids=["gradient", "channels_last", "strided", "negative", "float64", "mixed"],
)
def test_other_operands_are_composed(change, kernel_calls):
    tensors = operands((6, 3, 3, 3))
    change(tensors)
    actual = fold((0.1,), *tensors)
    assert not kernel_calls
    for one, other in zip(actual, exact((0.1,), tensors)[0], strict=True):
        assert torch.equal(one, other)


def test_where_no_kernel_may_run(kernel_calls):
    """Another setting, a transform, and kernels that have failed."""
    tensors = operands((6, 3, 3, 3))
    expected = exact((0.1,), tensors)[0]
    mapped = torch.vmap(lambda weight: fold((0.1,), weight, *tensors[1:]))(tensors[0][None])
    assert not kernel_calls
    for one, other in zip(mapped, expected, strict=True):
        torch.testing.assert_close(one[0], other)


def test_a_kernel_that_cannot_be_compiled(monkeypatch):
    tensors = operands((6, 3, 3, 3))
    monkeypatch.setattr(cpu.compiled, "_failure", None)
    monkeypatch.setattr(cpu.compiled, "_found", lambda *args: 1 / 0)
    cpu.compiled.address.cache_clear()
    try:
        for one, other in zip(fold((0.1,), *tensors), exact((0.1,), tensors)[0], strict=True):
            assert torch.equal(one, other)
    finally:
        cpu.compiled.address.cache_clear()
