"""The convolution's kernels, forward and backward, against stock PyTorch in float64."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from fastlenet.kernels.conv2d_relu_max_pool2d import general as kernels
from harness.bounds import sanitized
from harness.cases import BIG_WINDOW, CONV_CASES, SHIPPED_CONV, conv_case, dtypes, wide_and_narrow
from harness.contract import (  # noqa: F401
    Contract,
    pytest_generate_tests,
    test_a_gradient_that_is_negated_lazily,
    test_a_window_without_a_cell,
    test_addresses_beyond_two_to_the_31,
    test_addresses_in_32_bits_would_be_caught,
    test_as_accurate_as_stock,
    test_awkward_layouts,
    test_equal_to_stock_where_arithmetic_is_exact,
    test_kernels_are_launched_on_the_tensors_device,
    test_nan_and_infinities_in_the_upstream_gradient,
    test_nan_and_infinities_travel_as_in_stock,
    test_no_gradient_where_relu_is_off,
    test_one_implementation_may_follow_the_other,
    test_shipped_tiles,
    test_tf32_is_as_accurate_as_stock_in_tf32,
    test_ties_go_to_the_first_cell_in_scan_order,
)
from harness.draw import conv_calls
from harness.fuzz import examples, given, settings
from harness.judge import assert_bitwise_equal, assert_same_values
from harness.operators import CONV, by_definition, run, upstream
from harness.poison import assert_writes_everything
from harness.strides import awkward
from torch._subclasses import FakeTensorMode

NAMES = ("input", "weight", "bias")
SMALL = conv_case("small", (2, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2)
LENET = conv_case("LeNet conv2, narrow", (2, 3, 14, 14), (4, 3, 5, 5))
# Every cell of its convolution lies in a window, and none in the padding: NaN and infinities go where stock's go.
COVERED = conv_case("covered", (2, 2, 8, 9), (3, 2, 3, 2), pool_size=3, pool_stride=(3, 1))
CONTRACT = Contract(
    grid=[case for case in CONV_CASES if case is not BIG_WINDOW],
    plain=[SMALL],
    covered=[COVERED],
    shipped=SHIPPED_CONV,
    far=[conv_case("far", (4, 2, 6, 5), (3, 2, 3, 2))],
    launches=4,  # forward, two gradients, one sum of parts
)


@pytest.fixture
def conv(watched):
    return CONV.under(watched)


# --- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_largest_window_that_a_byte_can_index(conv, device):
    conv.random(BIG_WINDOW, BIG_WINDOW.random(torch.float32, device=device))
    conv.exact(BIG_WINDOW, BIG_WINDOW.exact(torch.bfloat16, device=device))


@dtypes
def test_results_are_rounded_to_nearest(dtype, device):
    """One product a cell is exact in float32, so only its rounding can differ: truncation would pass the judge."""
    case = conv_case("one product a cell", (1, 1, 32, 32), (1, 1, 1, 1), bias=False, pool_size=1)
    tensors = case.random(dtype, device=device)
    expected = (tensors["input"].double() * tensors["weight"].double()).relu().to(dtype)
    assert_same_values(CONV.fused(**tensors, **case.keywords), expected)


@pytest.mark.wide
@settings(max_examples=examples(45))
@given(call=conv_calls())
def test_drawn_calls(call, conv, device):
    """Any shape, hyper-parameters, dtype and layout: equal to stock on the exact grid, as accurate elsewhere."""
    tensors = call.tensors(device)
    grad_kind = call.grad_kind(len(call.case.input))
    if call.exact:
        conv.exact(call.case, tensors, grad_kind)
    else:
        conv.random(call.case, tensors, grad_kind, allow_zero=True)


def test_upstream_gradient_of_a_sum(conv, device):
    """`.sum()` sends a gradient whose strides are all zero."""
    conv.equal(SMALL, SMALL.exact(torch.float32, device=device), None)


@pytest.mark.wide
def test_several_parts_do_occur(shipped_tiles, device, launches, monkeypatch):
    """Guards the test above: its shapes must give the two-stage sum more than two parts."""
    case = next(case for case in SHIPPED_CONV if case.name == "several parts")
    sum_partials, parts = kernels.sum_partials, []

    def counted(sum, later):
        parts.append(len(sum[0]))
        sum_partials(sum, later=later)

    monkeypatch.setattr(kernels, "sum_partials", counted)
    run(CONV.fused, case.random(torch.float32, device=device), case.keywords)
    assert len(parts) == 1, "the weight's and the bias' gradients are summed by one launch"
    assert min(parts) > 2
    assert {(c["BLOCK_M"], c["BLOCK_K"]) for _, c in launches if "BLOCK_M" in c} == {(32, 16), (128, 16)}


# --- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinities_in_the_weight(value, watched, device):
    """As in stock, but for one thing: the input's gradient may be NaN at the image's edge where stock's is not.

    A tap that would lie outside the convolution's output adds nothing in stock, and 0 times the weight in the kernel.
    """
    tensors = COVERED.exact(torch.float32, device=device)
    tensors["weight"][1, 0, 1, 1] = value
    stock = by_definition(CONV.stock, tensors, COVERED.keywords)
    result = watched(CONV.fused, tensors, COVERED.keywords)
    assert_same_values(result.output, stock.output)
    assert_same_values(result.grads["weight"], stock.grads["weight"])
    assert_same_values(result.grads["bias"], stock.grads["bias"])
    actual, expected = result.grads["input"], stock.grads["input"]
    assert_same_values(torch.where(actual.isnan(), actual, expected), actual)
    inner = (slice(None), slice(None), slice(2, -2), slice(1, -1))
    assert_same_values(actual[inner], expected[inner])


def test_overflow_to_infinity(device):
    """A result that float16 cannot hold is infinite, as in stock."""
    tensors = COVERED.exact(torch.float16, device=device)
    tensors["input"] *= 2**14
    output = CONV.fused(**tensors, **COVERED.keywords)
    assert output.isinf().any()
    assert output.isfinite().any()
    assert_same_values(output, CONV.stock(**tensors, **COVERED.keywords))


# --- what is computed, and what is not -----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_only_requested_gradients_are_computed(wanted, launches, watched, device):
    """What nobody asked for is not launched, and what was asked for does not depend on the rest."""
    tensors = SMALL.exact(torch.float32, device=device)
    grad = upstream(CONV.stock(**tensors, **SMALL.keywords))
    complete = run(CONV.fused, tensors, SMALL.keywords, grad)
    launches.clear()
    result = watched(CONV.fused, tensors, SMALL.keywords, grad, wanted)
    parameters = [name in wanted for name in ("weight", "bias")]
    expected = {"_forward_kernel": 1, "_grad_input_kernel": int("input" in wanted)}
    expected |= {"_grad_weight_kernel": int(any(parameters)), "_sum_partials_kernel": int(any(parameters))}
    assert Counter(name for name, _ in launches) == Counter(expected)
    needs = [[c["NEED_WEIGHT"], c["NEED_BIAS"]] for name, c in launches if name == "_grad_weight_kernel"]
    assert needs == ([parameters] if any(parameters) else [])
    for name in NAMES:
        if name in wanted:
            assert_bitwise_equal(result.grads[name], complete.grads[name])
        else:
            assert result.grads[name] is None


def test_without_gradients_no_argmax_is_written(launches, conv, device):
    """Inference skips the argmax, and gives the same bits."""
    tensors = LENET.random(torch.float32, device=device)
    with_argmax = run(CONV.fused, tensors, LENET.keywords, upstream, ["weight"])
    launches.clear()
    with sanitized() as (poison, _):
        output = CONV.fused(**tensors, **LENET.keywords)
        poison.assert_all_written()
        assert [t.dtype for t in poison.tensors] == [torch.float32]
    assert [(name, constants["RETURN_ARGMAX"]) for name, constants in launches] == [("_forward_kernel", False)]
    assert_bitwise_equal(output, with_argmax.output)


@pytest.mark.wide
def test_every_element_is_written(device):
    """The argmax included, whose poison could be taken for an argmax: `watched` sees all other windows."""
    tensors = BIG_WINDOW.random(torch.float16, device=device)
    forward = torch.ops.fastlenet.conv2d_relu_max_pool2d
    assert_writes_everything(lambda: forward(*tensors.values(), *BIG_WINDOW.geometry, True))


def test_empty_batch_launches_only_what_fills_gradients(launches, watched, device):
    """The gradients of the weight and the bias exist and are zero."""
    tensors = SMALL.random(torch.float32, device=device)
    tensors["input"] = tensors["input"][:0]
    result = watched(CONV.fused, tensors, SMALL.keywords)
    assert result.output.shape[0] == 0
    assert "_forward_kernel" not in {name for name, _ in launches}
    for name in ("weight", "bias"):
        assert_bitwise_equal(result.grads[name], torch.zeros_like(tensors[name]))


@pytest.mark.parametrize("weight_kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("input_kind", ["contiguous", "channels_last", "transposed", "sliced"])
def test_layouts_are_stocks_and_as_the_shape_functions_promise(input_kind, weight_kind, device):
    """A compiled graph relies on the strides that the shape functions give."""
    tensors = SMALL.random(torch.float32, device=device)
    tensors["input"], tensors["weight"] = awkward(tensors["input"], input_kind), awkward(tensors["weight"], weight_kind)
    forward, backward = torch.ops.fastlenet.conv2d_relu_max_pool2d, torch.ops.fastlenet.conv2d_relu_max_pool2d_backward
    output, argmax = forward(*tensors.values(), *SMALL.geometry, True)
    grads = backward(output, tensors["input"], tensors["weight"], argmax, *SMALL.geometry, [True] * 3)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        promised, fake_argmax = forward(*fakes.values(), *SMALL.geometry, True)
        fake_grads = backward(promised, fakes["input"], fakes["weight"], fake_argmax, *SMALL.geometry, [True] * 3)
    for actual, fake in zip((output, argmax, *grads), (promised, fake_argmax, *fake_grads), strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert output.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in (input_kind, weight_kind))


# --- reproducibility -----------------------------------------------------------------------------------------------


@pytest.mark.wide  # The interpreter runs programs in one order: on a GPU this can fail.
@wide_and_narrow
def test_bitwise_reproducible_from_run_to_run(dtype, device, shipped_tiles):
    case = next(case for case in SHIPPED_CONV if case.name == "several parts")
    tensors = case.random(dtype, device=device)
    grad = upstream(CONV.stock(**tensors, **case.keywords))
    first, second = (run(CONV.fused, tensors, case.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@pytest.mark.wide
@dtypes
def test_a_sample_does_not_depend_on_its_batch(dtype, device, shipped_tiles, sums_in_order):
    """Alone, with another and in the middle of seven or 64: the same bits."""
    case = conv_case("batch", (64, 2, 8, 8), (4, 2, 3, 3))
    tensors = case.random(dtype, device=device)
    images = tensors.pop("input")
    whole = CONV.fused(images, **tensors, **case.keywords)
    for batch, sample in ((1, 0), (1, 63), (2, 62), (7, 5), (7, 57)):
        part = CONV.fused(images[sample : sample + batch], **tensors, **case.keywords)
        assert_bitwise_equal(part, whole[sample : sample + batch], name=f"{batch} from sample {sample}")
