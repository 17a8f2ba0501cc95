"""The operators as stock's own, and their Functions around a stand-in for kernels: the same judge, the same grid."""

from __future__ import annotations

import pytest
import torch
from harness.cases import (
    CONV_CASES,
    TOO_BIG_WINDOW,
    AddmmCase,
    addmm_cases,
    conv_case,
    conv_cases,
    dtypes,
    parametrize_dtypes,
)
from harness.draw import addmm_calls, conv_calls
from harness.fuzz import assume, examples, given, settings
from harness.judge import assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import (
    ADDMM,
    CONV,
    run,
    saved_for_backward,
    stock_conv2d_relu_max_pool2d,
    stock_linear_relu,
    upstream,
)
from harness.strides import awkward, kinds_for

from fastlenet import reference
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

special = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@conv_cases([*CONV_CASES, TOO_BIG_WINDOW])
@dtypes
def test_conv_grid(case, dtype):
    """As accurate as stock on random numbers, and equal to it where arithmetic is exact."""
    CONV.random(case, case.random(dtype))
    CONV.exact(case, case.exact(dtype))


@addmm_cases()
@dtypes
def test_addmm_grid(case, dtype):
    """As accurate as stock on random numbers, and equal to it where arithmetic is exact."""
    ADDMM.random(case, case.random(dtype))
    ADDMM.exact(case, case.exact(dtype))


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("input", "weight", "grad") for kind in kinds_for(torch.empty(1, 1, 1, 1))]
    + [("bias", kind) for kind in kinds_for(torch.empty(1))],
)
@conv_cases([SMALL, COVERED, ALL_ELSE])
def test_awkward_layouts_of_a_convolution(case, name, kind):
    """One tensor at a time in each layout."""
    tensors = case.random(torch.float32)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    CONV.random(case, tensors, kind if name == "grad" else "contiguous")


@pytest.mark.parametrize("kind", kinds_for(torch.empty(2, 2)))
@pytest.mark.parametrize("name", [*ADDMM_NAMES, "grad"])
@addmm_cases([FULL, AddmmCase("bias", 7, 19, 11, (11,), beta=0.5, alpha=-2)])
def test_awkward_layouts_of_a_product(case, name, kind):
    """One tensor at a time in each layout."""
    tensors = case.random(torch.float32)
    if name != "grad" and kind in kinds_for(tensors[name]):
        tensors[name] = awkward(tensors[name], kind)
    ADDMM.random(case, tensors, kind if name == "grad" else "contiguous")


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


@dtypes
@special
@pytest.mark.parametrize("name", ["input", "bias"])
@conv_cases([COVERED])
def test_nan_and_infinities_in_a_convolution(case, name, value, dtype):
    """They travel as in stock, forward and backward; shifted kernels' zeros must not turn infinity into NaN."""
    tensors = case.exact(dtype)
    flat = tensors[name].view(-1)
    flat[[0, flat.numel() // 2, flat.numel() // 2 + 1]] = value
    result = CONV.exact(case, tensors)
    assert not result.output.isfinite().all() or value < 0


@special
def test_nan_and_infinities_in_the_weight(value):
    """As in stock."""
    for case in (COVERED,):
        tensors = case.exact(torch.float32)
        tensors["weight"][1, 0, 1, 1] = value
        CONV.exact(case, tensors)


@special
def test_nan_and_infinities_in_the_upstream_gradient(value):
    """They reach what their cell reaches, and nothing where relu was off."""
    for case in (COVERED, SMALL):
        tensors = case.exact(torch.float32)
        tensors["bias"][0] = -100
        output = CONV.stock(**tensors, **case.keywords)
        grad = exact_grid(output.shape, output.dtype, terms=case.terms)
        closed = int((output == 0).flatten().nonzero()[0])
        for position in (closed, int(output.argmax())):
            spoiled = grad.clone()
            spoiled.view(-1)[position] = value
            result = CONV.equal(case, tensors, spoiled)
            assert result.grads["bias"].isfinite().all() == (position == closed)


@dtypes
@special
@pytest.mark.parametrize("name", [*ADDMM_NAMES, "grad"])
def test_nan_and_infinities_in_a_product(name, value, dtype):
    """They travel as in stock, forward and backward."""
    tensors = FULL.exact(dtype)
    grad = exact_grid((FULL.m, FULL.n), dtype, terms=FULL.terms)
    (grad if name == "grad" else tensors[name])[3, 2] = value
    ADDMM.equal(FULL, tensors, grad)


@conv_cases([SMALL, GROUPS])
def test_no_gradient_where_every_cell_is_closed(case):
    """All-negative windows: zero output and exactly zero gradients; cells at exactly zero are closed too."""
    tensors = case.exact(torch.float32)
    for bias in (-1000.0, 0.0):
        tensors["bias"] = torch.full_like(tensors["bias"], bias)
        if bias == 0:
            tensors["weight"] = torch.zeros_like(tensors["weight"])
        for _, tensor in CONV.exact(case, tensors).tensors():
            assert_same_values(tensor, torch.zeros_like(tensor))


def test_ties_go_to_the_first_cell_in_scan_order():
    """A constant image: every cell of every window ties; and so do NaN, of which the last counts."""
    case = conv_case("ties", (1, 1, 6, 6), (2, 1, 1, 1), pool_size=3, pool_stride=2, pool_padding=1)
    tensors = {name: torch.ones(shape) for name, shape in case.shapes.items()}
    first = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], dtype=torch.uint8)

    def argmax():
        return reference.conv2d_relu_max_pool2d_with_argmax(tensors["input"], tensors["weight"], None, case.geometry)[1]

    CONV.equal(case, tensors, None)
    assert_same_values(argmax()[0, 0], first)
    tensors["input"].fill_(float("nan"))
    CONV.equal(case, tensors, None)
    assert (argmax() == 8).all()


def test_a_window_without_a_cell():
    """Padding and dilation together can put every cell of a window into the padding: stock gives -inf there.

    Its gradients are zero. Stock's own backward writes beside the image, so it does not run here.
    """
    keywords = {"pool_size": 2, "pool_padding": 1, "pool_dilation": 2}
    tensors = {"input": torch.ones(1, 4, 14, 14), "weight": torch.ones(32, 4, 14, 5)}
    stock = CONV.stock(**tensors, **keywords)
    assert stock.isneginf().all()
    for _ in range(20):
        result = run(CONV.fused, tensors, keywords, torch.ones_like(stock))
        for name, actual in result.tensors():
            assert_same_values(actual, stock if name == "output" else torch.zeros_like(actual), name=name)


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


def test_empty_batch():
    """The output is empty and the gradients of the parameters are zero."""
    for case in (SMALL, COVERED):
        tensors = case.random(torch.float32)
        tensors["input"] = tensors["input"][:0]
        result = CONV.equal(case, tensors, None)
        assert result.output.shape[0] == 0
        for name in ("weight", "bias"):
            assert_same_values(result.grads[name], torch.zeros_like(tensors[name]))


@dtypes
@conv_cases([SMALL, GROUPS, COVERED])
def test_bitwise_reproducible_from_run_to_run(case, dtype):
    tensors = case.random(dtype)
    grad = upstream(CONV.stock(**tensors, **case.keywords))
    first, second = (run(CONV.fused, tensors, case.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


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


@conv_cases([SMALL, COVERED, GROUPS])
def test_nothing_is_modified(case):
    """Arguments and the upstream gradient keep their values and their version counters, forward and backward."""
    tensors = {name: tensor.requires_grad_() for name, tensor in case.random(torch.float32).items()}
    output = conv2d_relu_max_pool2d(**tensors, **case.keywords)
    watched = [*tensors.values(), output, upstream(output.detach())]
    before = [(t._version, t.detach().clone()) for t in watched]
    output.backward(watched[-1])
    for tensor, (version, values) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert_bitwise_equal(tensor, values)
    assert all(tensor._version == 0 for tensor in tensors.values())


def test_a_product_modifies_nothing():
    tensors = {name: tensor.requires_grad_() for name, tensor in FULL.random(torch.float32).items()}
    output = addmm_relu(**tensors, beta=2, alpha=3)
    watched = [*tensors.values(), output, upstream(output.detach())]
    before = [(t._version, t.detach().clone()) for t in watched]
    output.backward(watched[-1])
    for tensor, (version, values) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert_bitwise_equal(tensor, values)


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
