"""The compiled CPU kernels of BatchNorm in training mode, relu and max-pool: stock's numbers, whatever the batch."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.fuzz import examples, given, settings, st
from harness.judge import assert_as_accurate, assert_bitwise_equal, assert_same_values, exact_grid
from harness.poison import assert_fully_written, poisoned_outputs

import fastlenet
from fastlenet import cpu, ops, selection
from fastlenet.ops.batch_norm_relu_max_pool2d import Settings

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def pooling(size=2, stride=None, padding=0, dilation=1, ceil_mode=False):
    pairs = [(value, value) if isinstance(value, int) else value for value in (size, stride or size, padding, dilation)]
    return ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, *pairs, ceil_mode)


CELL = pooling(1)
OVERLAP = pooling((3, 2), (2, 1), (1, 0), ceil_mode=True)


@pytest.fixture(autouse=True)
def _forced():
    """Not within `fused`: the setting is the process's, and threads would restore what another one has set."""
    with fastlenet.use_backend("cpu"):
        yield


def fused(given, *tensors):
    return selection.run(ops.BATCH_NORM_RELU_MAX_POOL2D, given, *tensors)


def stock(given, input, *tensors):
    # The comparison is with the plain layout, in which stock adds in float64.
    output = F.batch_norm(input.contiguous(), *tensors, True, given.momentum, given.eps)
    return F.max_pool2d(F.relu(output), *given.geometry[4:])


def operands(input, seed=1, bias=0.0):
    """Running statistics, weight and bias for an input; the bias around a value that may keep relu open."""
    random, channels = torch.Generator().manual_seed(seed), input.shape[1]
    mean, shift = torch.randn(2, channels, generator=random)
    variance, scale = torch.rand(2, channels, generator=random) + 0.5
    return input, mean, variance, scale * mean.sign(), shift + bias


def outcome(compute, given, tensors, upstream=None, dtype=torch.float32):
    """Output, running statistics and gradients."""
    input, mean, variance, *parameters = (
        None if each is None else each.detach().clone(memory_format=torch.preserve_format).to(dtype) for each in tensors
    )
    parameters = [None if each is None else each.requires_grad_() for each in parameters]
    wanted = [input.requires_grad_(), *(each for each in parameters if each is not None)]
    output = compute(given, input, mean, variance, *parameters)
    if upstream is None:
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(output, wanted, upstream.to(dtype))
    return [output.detach(), *(each for each in (mean, variance) if each is not None), *grads]


def judge(given, tensors, upstream=None):
    actual, expected = (outcome(compute, given, tensors, upstream) for compute in (fused, stock))
    exact = outcome(stock, given, tensors, upstream, torch.float64)
    for number, (one, other, reference) in enumerate(zip(actual, expected, exact, strict=True)):
        assert_as_accurate(one, other, reference, dtype=torch.float32, allow_zero=True, name=str(number))


SHAPES = {
    "one vector": (4, 16, 9, 8),
    "one channel": (4, 1, 9, 8),
    "a vector and one channel": (3, 17, 7, 5),
    "one image": (1, 33, 9, 8),
    "one pixel": (19, 5, 3, 2),
    "longer than a chain": (2, 3, 40, 33),
}


@pytest.mark.parametrize("geometry", [pooling(), OVERLAP], ids=["pooled", "overlapping"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_stock(shape, geometry):
    input = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(0))
    judge(Settings(0.1, 1e-5, geometry), operands(input))


@pytest.mark.parametrize("given", [Settings(1.0, 1e-8, CELL), Settings(0.0, 0.5, CELL), Settings(0.25, 3.0, CELL)])
def test_momentum_and_eps(given):
    input = torch.randn(6, 5, 7, 8, generator=torch.Generator().manual_seed(0))
    judge(given, operands(input, bias=9.0))


@pytest.mark.parametrize("offset", [30.0, -1000.0, 1e5])
def test_a_large_mean_with_a_small_variance(offset):
    """The variance is not what remains of two large numbers, and the mean is exact to a part of the deviation.

    All cells are positive and alone in their windows, so that rounding decides nothing.
    """
    random = torch.Generator().manual_seed(0)
    input = offset + 1e-4 * abs(offset) * torch.randn(5, 19, 24, 25, generator=random)
    judge(Settings(0.1, 1e-5, CELL), operands(input, bias=9.0))


@pytest.mark.parametrize("eps", [1e-5, 1e-50])
def test_constant_channels(eps):
    """The variance is exactly 0, also where an eps that float32 cannot hold is all that is left of it."""
    input = torch.tensor([0.3, -7.7, 0.0, 1e4]).view(1, 4, 1, 1).expand(3, 4, 9, 11)
    given, tensors = Settings(1.0, eps, CELL), operands(input, bias=9.0)
    actual, expected = (outcome(compute, given, (input, *tensors[1:3], None, None)) for compute in (fused, stock))
    assert_same_values(actual[2], torch.zeros(4))
    assert_as_accurate(actual[1], expected[1], input[0, :, 0, 0].double(), dtype=torch.float32)
    assert_same_values(actual[0].isfinite(), expected[0].isfinite())


def test_far_apart_images():
    """The variance between images counts."""
    input = torch.randn(7, 6, 5, 4) + torch.arange(7.0).view(7, 1, 1, 1) ** 2
    judge(Settings(0.1, 1e-5, CELL), operands(input, bias=20.0))


@pytest.mark.parametrize("given_operands", [(1, 2), (3, 4), (3,), (4,), (1, 2, 3, 4)], ids=str)
def test_without_operands(given_operands):
    tensors = [
        None if number in given_operands else tensor
        for number, tensor in enumerate(operands(torch.randn(5, 20, 9, 8, generator=torch.Generator().manual_seed(5))))
    ]
    judge(Settings(0.1, 1e-5, OVERLAP), tensors)


@st.composite
def windows(draw):
    """Any pool without empty windows, and an image that it fits."""
    numbers = st.tuples(st.integers(1, 4), st.integers(1, 4))
    size, stride = draw(numbers), draw(numbers)
    dilation, padding = draw(numbers) if draw(st.booleans()) else (1, 1), (0, 0)
    if dilation == (1, 1):
        padding = tuple(draw(st.integers(0, each // 2)) for each in size)
    image = [dilation[i] * (size[i] - 1) + 1 + draw(st.integers(0, 9)) for i in (0, 1)]
    return pooling(size, stride, padding, dilation, draw(st.booleans())), image


@settings(max_examples=examples(40))
@given(window=windows(), images=st.integers(1, 4), channels=st.integers(1, 35), seed=st.integers(0, 2**16))
def test_numbers_on_a_grid(window, images, channels, seed):
    """Pixels are 1 or -1, as often, so that nothing is rounded in the output, and ties go to the first cell."""
    geometry, image = window
    random = torch.Generator().manual_seed(seed)
    half = torch.randint(0, 2, (images, channels, *image), generator=random) * 2.0 - 1
    tensors = torch.cat([half, -half]), torch.zeros(channels), torch.ones(channels)
    signs = torch.randint(-1, 2, (2, channels), generator=random).float()
    pooled = geometry.pooled_size(image)
    upstream = exact_grid((2 * images, channels, *pooled), torch.float32, random)
    given = Settings(1.0, 3.0, geometry)  # the variance is 1, so that the root is 2
    actual, expected = (outcome(compute, given, (*tensors, *signs), upstream) for compute in (fused, stock))
    for number in (0, 5):
        assert_same_values(actual[number], expected[number], name=str(number))
    for number in (1, 2, 3, 4):  # which have quotients
        torch.testing.assert_close(actual[number], expected[number], rtol=1e-5, atol=1e-5, msg=str(number))


def test_values_that_are_not_finite():
    for value, (row, column) in itertools.product((float("nan"), float("inf"), -float("inf")), ((0, 0), (3, 2))):
        input = torch.randn(2, 18, 5, 6, generator=torch.Generator().manual_seed(0))
        input[1, 4, row, column] = value
        given, tensors = Settings(0.1, 1e-5, OVERLAP), operands(input)
        results = zip(*(outcome(compute, given, tensors) for compute in (fused, stock)), strict=True)
        for number, (actual, expected) in enumerate(results):
            for kind in (torch.isnan, torch.isinf):
                assert_same_values(kind(actual), kind(expected), name=f"{number} with {value}")


def test_an_upstream_gradient_that_is_not_finite():
    """It does not reach cells that lost, nor cells where relu is closed."""
    tensors, given = (
        operands(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))),
        Settings(0.1, 1e-5, pooling(6)),
    )
    for value in (float("nan"), float("inf")):
        upstream = torch.full((2, 3, 1, 1), value)
        tensors = *tensors[:4], torch.tensor([9.0, -99.0, 9.0])
        actual, expected = (outcome(compute, given, tensors, upstream) for compute in (fused, stock))
        for one, other in zip(actual, expected, strict=True):
            assert_same_values(one.isfinite(), other.isfinite())


def test_every_element_is_written_and_no_other():
    """With guards around the operands and the running statistics too."""
    for channels in (1, 15, 16, 17):
        input = torch.randn(3, channels, 7, 6).to(memory_format=torch.channels_last)
        given, tensors = Settings(0.1, 1e-5, OVERLAP), operands(input)
        with poisoned_outputs(allocators=("fastlenet.cpu.memory:empty",)) as poison:
            guarded = [poison.poisoned_like(tensor).copy_(tensor) for tensor in tensors]
            input, *parameters = guarded[0].requires_grad_(), guarded[3].requires_grad_(), guarded[4].requires_grad_()
            output = fused(given, input, *guarded[1:3], *parameters)
            upstream = poison.poisoned_like(output.detach()).fill_(0.5)
            grads = torch.autograd.grad(output, guarded[::4] + guarded[3:4], upstream)
            poison.assert_guards_intact()
        for tensor in (output, *grads):
            assert_fully_written(tensor)
        assert_same_values(guarded[0].detach(), tensors[0])
        torch.testing.assert_close(output, stock(given, *operands(tensors[0])))


def test_threads_change_nothing():
    before, results = torch.get_num_threads(), []
    tensors = operands(torch.randn(5, 20, 9, 8, generator=torch.Generator().manual_seed(3)))
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(outcome(fused, Settings(0.1, 1e-5, OVERLAP), tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_bitwise_equal(actual, expected)


def test_several_python_threads_at_once():
    """More kinds of calls than tables are kept, so that each thread drops tables that others may be reading."""
    kinds = [operands(torch.randn(2, 3, 4 + size, 5)) for size in range(40)]
    given = Settings(0.1, 1e-5, OVERLAP)
    expected, wrong = [outcome(fused, given, tensors) for tensors in kinds], []

    def work(first):
        for number in (*range(first, 40), *range(first)):
            for actual, alone in zip(outcome(fused, given, kinds[number]), expected[number], strict=True):
                if not torch.equal(actual, alone):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 13, 26)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layouts_of_operands():
    """Sliced, transposed and expanded operands; running statistics that are every second number of others."""
    base = operands(torch.randn(4, 10, 9, 8, generator=torch.Generator().manual_seed(6)))
    given = Settings(0.1, 1e-5, OVERLAP)
    expected = outcome(fused, given, base)
    for spread in (lambda t: torch.stack([t, t + 1], -1)[..., 0], lambda t: t.flip(0).contiguous().flip(0)):
        tensors = [spread(tensor) for tensor in base]
        leaves = [tensors[0].detach().requires_grad_(), *(tensor.requires_grad_() for tensor in tensors[3:])]
        output = fused(given, leaves[0], *tensors[1:3], *leaves[1:])
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        actual = [output, *tensors[1:3], *torch.autograd.grad(output, leaves, spread(upstream))]
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise_equal(one.detach(), other)
    wide = torch.randn(1, 10, 9, 8).expand(4, -1, -1, -1)
    results = (outcome(compute, given, (wide, *base[1:])) for compute in (fused, stock))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_expanded_or_negated_lazily():
    tensors = operands(torch.randn(4, 10, 9, 8, generator=torch.Generator().manual_seed(6)))
    ones = torch.ones(4, 10, 4, 4)
    last = ones.contiguous(memory_format=torch.channels_last)  # no kernel needs a copy of it
    for upstream in (torch.ones(()).expand(4, 10, 4, 4), torch._neg_view(ones), torch._neg_view(last)):
        results = []
        for compute in (fused, stock):
            leaves = [tensor.clone().requires_grad_() for tensor in (tensors[0], *tensors[3:])]
            output = compute(Settings(0.1, 1e-5, pooling()), leaves[0], None, None, *leaves[1:])
            results.append(torch.autograd.grad(output, leaves, upstream))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_another_default_device():
    """The kernels' own memory and tables lie on the CPU."""
    tensors, given = operands(torch.randn(2, 3, 11, 5)), Settings(0.1, 1e-5, pooling((5, 2)))

    def run():
        output = fused(given, leaf := tensors[0].clone().requires_grad_(), None, None, *tensors[3:])
        return output, *torch.autograd.grad(output.square().sum(), leaf)

    with torch.device("meta"):
        actual = run()
    for one, other in zip(actual, run(), strict=True):
        assert_bitwise_equal(one.detach(), other.detach())


def test_aten_runs_no_kernel(monkeypatch):
    """The setting rules forward and backward, and an implementation is what its name says."""
    operator, given = ops.BATCH_NORM_RELU_MAX_POOL2D, Settings(0.1, 1e-5, OVERLAP)
    assert not {*operator.implementation("aten")} & {*operator.implementation("cpu")}
    monkeypatch.setattr("fastlenet.cpu.compiled.address", None)
    monkeypatch.setattr("fastlenet.cpu.threads.run", None)
    tensors = operands(torch.randn(4, 10, 9, 8))
    with fastlenet.use_backend("aten"):
        actual = outcome(lambda given, *rest: selection.run(operator, given, *rest), given, tensors)
    for one, other in zip(actual, outcome(stock, given, tensors), strict=True):
        assert_bitwise_equal(one, other)
