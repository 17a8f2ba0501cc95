"""The operators as stock's own, and their Functions around a stand-in for kernels: the same judge, the same grid."""

from __future__ import annotations

import pytest
import torch
from harness.cases import (
    ADDMM_CASES,
    CONV_CASES,
    TOO_BIG_WINDOW,
    AddmmCase,
    addmm_cases,
    conv_case,
    conv_cases,
    parametrize_dtypes,
)
from harness.contract import (  # noqa: F401
    Contract,
    pytest_generate_tests,
    test_a_window_without_a_cell,
    test_as_accurate_as_stock,
    test_awkward_layouts,
    test_bitwise_reproducible_from_run_to_run,
    test_empty_batch,
    test_equal_to_stock_where_arithmetic_is_exact,
    test_nan_and_infinities_in_the_upstream_gradient,
    test_nan_and_infinities_travel_as_in_stock,
    test_no_gradient_where_relu_is_off,
    test_nothing_is_modified,
    test_ties_go_to_the_first_cell_in_scan_order,
)
from harness.draw import addmm_calls, conv_calls
from harness.fuzz import assume, examples, given, settings
from harness.judge import assert_same_values, exact_grid
from harness.operators import (
    ADDMM,
    CONV,
    run,
    saved_for_backward,
    stock_conv2d_relu_max_pool2d,
    stock_linear_relu,
)
from harness.strides import awkward

from fastlenet.functional import addmm_relu, conv2d_relu_max_pool2d, linear_relu

pytestmark = pytest.mark.usefixtures("either")

CONV_NAMES = ("input", "weight", "bias")
ADDMM_NAMES = ("input", "mat1", "mat2")
SMALL = conv_case("small", (5, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2)
GROUPS = conv_case("groups", (5, 4, 9, 8), (6, 2, 3, 3), groups=2, pool_size=3, pool_stride=2, pool_padding=1)
# Every cell of its convolution lies in a window, and none in the padding: NaN and infinities go where stock's go.
COVERED = conv_case("covered", (2, 2, 8, 9), (3, 2, 3, 2), pool_size=3, pool_stride=(3, 1))
ALL_ELSE = conv_case(
    "groups, overlap and all else", (7, 4, 9, 8), (6, 2, 2, 3), groups=2, stride=(1, 2), padding=1,
    dilation=(2, 1), pool_size=3, pool_stride=(2, 1), pool_padding=1, ceil_mode=True,
)  # fmt: skip
FULL = AddmmCase("full addend", 7, 19, 11, (7, 11))

CONTRACT = Contract(
    grid=[*CONV_CASES, TOO_BIG_WINDOW, *ADDMM_CASES],
    plain=[SMALL, COVERED, ALL_ELSE, GROUPS, FULL, AddmmCase("bias", 7, 19, 11, (11,), beta=0.5, alpha=-2)],
    covered=[COVERED, FULL],
)
special = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@conv_cases([*CONV_CASES, TOO_BIG_WINDOW])
def test_conv_grid_in_float64(case):
    """What no kernel covers runs here under the default backend."""
    CONV.exact(case, case.exact(torch.float64))


@addmm_cases()
def test_addmm_grid_in_float64(case):
    """What no kernel covers runs here under the default backend."""
    ADDMM.exact(case, case.exact(torch.float64))


@settings(max_examples=examples(60))
@given(call=conv_calls(dtypes=(torch.float32, torch.float64)))
def test_drawn_convolutions(call):
    """Any shape, hyper-parameters and layout.

    Stock's own calls kill the process where oneDNN 3.12 writes beyond its memory: images one pixel wide, strided and
    padded; and on CPUs with instructions for narrow types, these with dilation.
    """
    geometry = call.case.geometry
    assume(call.case.input[-1] > 1 or geometry.stride[1] == 1 or geometry.padding[1] == 0)
    kind = call.grad_kind(len(call.case.input))
    if call.exact:
        CONV.exact(call.case, call.tensors(), kind)
    else:
        CONV.random(call.case, call.tensors(), kind, allow_zero=True)


@settings(max_examples=examples(60))
@given(call=addmm_calls())
def test_drawn_products(call):
    """Any shape, factors, dtype and layout."""
    if call.exact:
        ADDMM.exact(call.case, call.tensors(), call.grad_kind(2))
    else:
        ADDMM.random(call.case, call.tensors(), call.grad_kind(2), allow_zero=True)


def linear_relu_is_stocks(leading, weight, bias):
    tensors = {
        "input": exact_grid((*leading, 7), torch.float32),
        "weight": exact_grid(weight, torch.float32),
        "bias": None if bias is None else exact_grid(bias, torch.float32),
    }
    result, stock = run(linear_relu, tensors, {}), run(stock_linear_relu, tensors, {})
    for (name, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
        assert_same_values(actual, expected, allow_empty=True, name=name)


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    ("weight", "bias"), [((5, 7), None), ((5, 7), (5,)), ((5, 7), (1,)), ((5, 7), (1, 5)), ((7,), None)], ids=str
)
def test_linear_relu(leading, weight, bias):
    """Any leading dimensions, a weight without output dimension, and biases that broadcast."""
    linear_relu_is_stocks(leading, weight, bias)


@pytest.mark.parametrize("bias", [(3, 5), (2, 1, 5), (2, 3, 5)], ids=str)
def test_a_bias_with_rows_of_its_own(bias):
    linear_relu_is_stocks((2, 3), (5, 7), bias)


# --- special values ---------------------------------------------------------------------------------------------------


@special
def test_nan_and_infinities_in_the_weight(value):
    """As in stock."""
    for case in (COVERED,):
        tensors = case.exact(torch.float32)
        tensors["weight"][1, 0, 1, 1] = value
        CONV.exact(case, tensors)


# --- layouts, reproducibility, memory ---------------------------------------------------------------------------------


@parametrize_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("name", ["input", "weight"])
@conv_cases([SMALL, COVERED, GROUPS])
def test_channels_last_comes_out_as_it_went_in(case, name, dtype):
    """Output and gradients have stock's strides."""
    tensors = case.exact(dtype)
    tensors[name] = awkward(tensors[name], "channels_last")
    stock = run(CONV.stock, tensors, case.keywords)
    result = CONV.equal(case, tensors, None)
    assert result.output.is_contiguous(memory_format=torch.channels_last)
    for (label, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
        assert actual.stride() == expected.stride(), label


PARTS_OF_NHWC = {
    "all": lambda images, channels: torch.randn(images, 12, 11, channels),
    "some columns": lambda images, channels: torch.randn(images, 12, 14, channels)[:, :, 1:12],
    "some channels": lambda images, channels: torch.randn(images, 12, 11, channels + 2)[..., 1 : 1 + channels],
    "every second image": lambda images, channels: torch.randn(2 * images, 12, 11, channels)[::2],
}


@parametrize_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize(("channels", "features"), [(1, 5), (3, 5), (1, 1), (3, 1)])
@pytest.mark.parametrize("images", [1, 2, 70])
@pytest.mark.parametrize("part", PARTS_OF_NHWC)
def test_parts_of_channels_last_have_stocks_strides(part, images, channels, features, dtype):
    """As images come out of NumPy; few or one channel, few images or many. Compiled code relies on the strides."""
    input = PARTS_OF_NHWC[part](images, channels).to(dtype).permute(0, 3, 1, 2)
    case = conv_case("plain", input.shape, (features, channels, 3, 3), pool_size=2)
    weight = torch.randn(features, channels, 3, 3, dtype=dtype)
    forward, backward = torch.ops.fastlenet.conv2d_relu_max_pool2d, torch.ops.fastlenet.conv2d_relu_max_pool2d_backward
    output, argmax = forward(input, weight, None, *case.geometry, True)
    assert output.stride() == stock_conv2d_relu_max_pool2d(input, weight, pool_size=2).stride()
    layer = conv2d_relu_max_pool2d(input, weight.clone().requires_grad_(), pool_size=2)
    assert layer.stride() == output.stride()
    for operator, args in (
        (forward, (input, weight, None, *case.geometry, True)),
        (backward, (output, input, weight, argmax, *case.geometry, [True, True, True])),
    ):
        torch.library.opcheck(operator.default, args, test_utils="test_faketensor")


def test_integers_compute_as_in_stock():
    """Stock takes them, without gradients."""
    tensors = {"input": torch.randint(-5, 5, (2, 1, 6, 6)), "weight": torch.randint(-5, 5, (2, 1, 3, 3))}
    assert torch.equal(CONV.fused(**tensors), CONV.stock(**tensors))


@conv_cases([SMALL, COVERED])
def test_the_output_of_a_convolution_may_be_modified(case):
    """As after stock's max_pool2d: the backward does not need it."""
    tensors = case.exact(torch.float32)
    expected = run(CONV.stock, tensors, case.keywords)
    grads = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = conv2d_relu_max_pool2d(**tensors, **case.keywords)
    total = output.sum()
    output.detach().zero_()
    output.mul_(0)
    total.backward()
    for name, leaf in grads.items():
        assert_same_values(leaf.grad, expected.grads[name], name=name)


@pytest.mark.parametrize("name", ["input", "weight"])
def test_modifying_what_a_convolution_saved_is_noticed(name):
    tensors = {key: tensor.requires_grad_() for key, tensor in SMALL.random(torch.float32).items()}
    output = conv2d_relu_max_pool2d(**tensors, **SMALL.keywords)
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["output", "mat1", "mat2"])
def test_modifying_what_a_product_saved_is_noticed(name):
    tensors = {key: tensor.requires_grad_() for key, tensor in FULL.random(torch.float32).items()}
    output = addmm_relu(**tensors)
    with torch.no_grad():
        {**tensors, "output": output}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "no leaf"])
def test_without_a_gradient_no_graph_is_built(how):
    """And nothing is saved."""
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "no leaf": torch.enable_grad}[how]
    conv, product = SMALL.random(torch.float32), FULL.random(torch.float32)
    if how != "no leaf":
        conv["weight"].requires_grad_()
        product["mat2"].requires_grad_()
    with context(), saved_for_backward() as saved:
        outputs = conv2d_relu_max_pool2d(**conv, **SMALL.keywords), addmm_relu(**product)
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
    assert saved == []


def test_gradients_do_not_alias_each_other():
    """In-place work on one gradient (clipping, accumulation) must not reach another, or the upstream gradient."""
    tensors = FULL.random(torch.float32)
    tensors["mat1"].abs_()
    tensors["mat2"].abs_()
    tensors["input"].abs_()
    grad = torch.ones(FULL.m, FULL.n)
    result = run(ADDMM.fused, tensors, FULL.keywords, grad)
    pointers = [t.data_ptr() for t in (grad, result.output, *result.grads.values())]
    assert len(set(pointers)) == len(pointers)
