"""The convolution's kernels, forward and backward, against stock PyTorch in float64."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from fastlenet.kernels.conv2d_relu_max_pool2d import general as kernels
from harness import modes
from harness.bounds import BoundsError, bounds_checked, sanitized
from harness.cases import BIG_WINDOW, SHIPPED_CONV, conv_case, conv_cases, dtypes, wide_and_narrow
from harness.draw import conv_calls
from harness.fuzz import examples, given, settings
from harness.judge import assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import CONV, by_definition, far_apart, fp32_precision, run, upstream
from harness.poison import assert_writes_everything
from harness.strides import awkward, kinds_for
from torch._subclasses import FakeTensorMode

import fastlenet

NAMES = ("input", "weight", "bias")
SMALL = conv_case("small", (2, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2)
LENET = conv_case("LeNet conv2, narrow", (2, 3, 14, 14), (4, 3, 5, 5))
# Every cell of its convolution lies in a window, and none in the padding: NaN and infinities go where stock's go.
COVERED = conv_case("covered", (2, 2, 8, 9), (3, 2, 3, 2), pool_size=3, pool_stride=(3, 1))
only_interpreted = pytest.mark.skipif(not modes.interpreting(), reason="only the interpreter survives a bad address")


@pytest.fixture
def conv(watched):
    return CONV.under(watched)


# --- accuracy ------------------------------------------------------------------------------------------------------


@conv_cases(without=(BIG_WINDOW.name,))
@dtypes
def test_grid_is_as_accurate_as_stock(case, dtype, conv, device):
    conv.random(case, case.random(dtype, device=device))


@conv_cases(without=(BIG_WINDOW.name,))
@wide_and_narrow
def test_grid_equals_stock_where_arithmetic_is_exact(case, dtype, conv, device):
    """Equality in every value: a wrong tie rule, window or mask cannot hide behind a tolerance."""
    conv.exact(case, case.exact(dtype, device=device))


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("input", "weight", "grad") for kind in kinds_for(torch.empty(1, 1, 1, 1))]
    + [("bias", kind) for kind in kinds_for(torch.empty(1))],
)
def test_awkward_layouts(name, kind, conv, device):
    """One tensor at a time in each layout, so that a swapped stride of any of them shows."""
    tensors = SMALL.random(torch.float32, device=device)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    conv.random(SMALL, tensors, kind if name == "grad" else "contiguous")


def test_upstream_gradient_of_a_sum(conv, device):
    """`.sum()` sends a gradient whose strides are all zero."""
    conv.equal(SMALL, SMALL.exact(torch.float32, device=device), None)


@conv_cases(SHIPPED_CONV)
@wide_and_narrow
def test_shipped_tiles(case, dtype, conv, device, shipped_tiles):
    """The compiled configuration's own tiles, several and partial in every dimension, and several parts of a sum."""
    conv.random(case, case.random(dtype, device=device))


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


def test_tf32_is_as_accurate_as_stock_in_tf32(conv, device, launches):
    """The precision switch reaches every kernel (the interpreter itself knows no tf32)."""
    with fp32_precision("tf32"):
        conv.random(LENET, LENET.random(torch.float32, device=device))
    assert {c["PRECISION"] for _, c in launches if "PRECISION" in c} == {"tf32"}


# --- special values ------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["input", "bias"])
def test_nan_and_infinities_travel_as_in_stock(name, value, dtype, conv, device):
    """Relu and max-pool propagate NaN, and a gradient goes to the last NaN of a window, in all results."""
    tensors = COVERED.exact(dtype, device=device)
    flat = tensors[name].view(-1)
    flat[[0, flat.numel() // 2, flat.numel() // 2 + 1]] = value
    result = conv.exact(COVERED, tensors)
    assert not result.output.isfinite().all() or value < 0


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinities_in_the_upstream_gradient(value, conv, device):
    """They reach what their cell reaches, and nothing where relu was off."""
    tensors = COVERED.exact(torch.float32, device=device)
    tensors["bias"][0] = -100
    output = CONV.stock(**tensors, **COVERED.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=COVERED.terms, device=device)
    closed = int((output == 0).flatten().nonzero()[0])
    for position in (closed, int(output.argmax())):
        spoiled = grad.clone()
        spoiled.view(-1)[position] = value
        result = conv.equal(COVERED, tensors, spoiled)
        assert result.grads["bias"].isfinite().all() == (position == closed)


def test_overflow_to_infinity(device):
    """A result that float16 cannot hold is infinite, as in stock."""
    tensors = COVERED.exact(torch.float16, device=device)
    tensors["input"] *= 2**14
    output = CONV.fused(**tensors, **COVERED.keywords)
    assert output.isinf().any()
    assert output.isfinite().any()
    assert_same_values(output, CONV.stock(**tensors, **COVERED.keywords))


def test_no_gradient_where_every_cell_is_closed(conv, device):
    """All-negative windows: zero output and exactly zero gradients; cells at exactly zero are closed too."""
    tensors = SMALL.exact(torch.float32, device=device)
    for bias in (-1000.0, 0.0):
        tensors["bias"] = torch.full_like(tensors["bias"], bias)
        if bias == 0:
            tensors["weight"] = torch.zeros_like(tensors["weight"])
        result = conv.exact(SMALL, tensors)
        for _, tensor in result.tensors():
            assert_bitwise_equal(tensor, torch.zeros_like(tensor))
        assert (result.argmax == 255).all()


def test_ties_go_to_the_first_cell_in_scan_order(conv, device):
    """A constant image: every cell of every window ties."""
    case = conv_case("ties", (1, 1, 6, 6), (2, 1, 1, 1), pool_size=3, pool_stride=2, pool_padding=1)
    tensors = {name: torch.ones(shape, device=device) for name, shape in case.shapes.items()}
    result = conv.equal(case, tensors, None)
    expected = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], dtype=torch.uint8)
    assert_same_values(result.argmax[0, 0], expected)


def test_a_window_without_a_cell(watched, device):
    """Padding and dilation together can put every cell of a window into the padding: stock gives -inf there."""
    keywords = {"pool_size": 2, "pool_stride": 1, "pool_padding": 1, "pool_dilation": 2}
    tensors = {"input": torch.ones(1, 1, 1, 2, device=device), "weight": torch.ones(1, 1, 1, 1, device=device)}
    stock = CONV.stock(**tensors, **keywords)
    assert stock.isinf().any()
    result = watched(CONV.fused, tensors, keywords, torch.ones_like(stock))
    assert_same_values(result.output, stock)
    assert (result.argmax[stock.isinf()] == 255).all()


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


@pytest.mark.parametrize(("forward", "backward"), [("triton", "aten"), ("aten", "triton")])
@conv_cases([SMALL, LENET, SHIPPED_CONV[-1]])
def test_one_implementation_may_follow_the_other(case, forward, backward, device):
    """What the forward saves means the same to both backwards."""
    tensors = case.random(torch.float32, device=device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with fastlenet.use_backend(forward):
        output = CONV.fused(**leaves, **case.keywords)
    grad = upstream(output.detach())
    with fastlenet.use_backend(backward):
        output.backward(grad)
    with fastlenet.use_backend(forward):
        result = run(CONV.fused, tensors, case.keywords, grad)
    result.grads = {name: leaf.grad for name, leaf in leaves.items()}
    CONV.judge(case, tensors, grad, result)


# --- addresses and devices -----------------------------------------------------------------------------------------


FAR = conv_case("far", (4, 2, 6, 5), (3, 2, 3, 2))


@pytest.mark.parametrize("name", ["input", "grad"])
def test_addresses_beyond_two_to_the_31(name, watched, device):
    """Memory is reserved, not touched: the tensor's own elements are few."""
    tensors = FAR.exact(torch.float16, device=device)
    stock = CONV.stock(**tensors, **FAR.keywords)
    grad = exact_grid(stock.shape, stock.dtype, terms=FAR.terms, device=device)
    expected = run(CONV.stock, tensors, FAR.keywords, grad)
    if name == "grad":
        grad = far_apart(grad)
    else:
        tensors["input"] = far_apart(tensors["input"])
    result = watched(CONV.fused, tensors, FAR.keywords, grad)
    for (label, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=label)


@only_interpreted
@pytest.mark.parametrize("name", ["input", "grad"])
def test_addresses_in_32_bits_would_be_caught(name, monkeypatch, device):
    """Negative control of the test above."""
    tl = pytest.importorskip("triton.language")
    monkeypatch.setattr(kernels, "index_type", lambda *_: tl.int32)
    tensors = FAR.exact(torch.float16, device=device)
    output = CONV.stock(**tensors, **FAR.keywords)
    grad = far_apart(output) if name == "grad" else output
    if name == "input":
        tensors["input"] = far_apart(tensors["input"])
    with pytest.raises(BoundsError), bounds_checked():
        run(CONV.fused, tensors, FAR.keywords, grad)


def test_kernels_are_launched_on_the_tensors_device(monkeypatch, watched):
    """The current device need not be the tensors'."""
    guarded = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: (guarded.append(tensor.device), device_of(tensor))[1])
    second = torch.cuda.device_count() > 1 and not modes.interpreting()
    device = torch.device("cuda:1" if second else modes.kernel_device())
    run_all = CONV.under(watched)
    run_all.random(SMALL, SMALL.random(torch.float32, device=device))
    guarded.clear()  # the first call of a kind is decided on its device, too
    run_all.random(SMALL, SMALL.random(torch.float32, device=device))
    # Forward, two gradients, one sum of parts; on the current device there is nothing to do.
    assert len(guarded) == (4 if second or modes.interpreting() else 0)
    assert {d.type for d in guarded} <= {device.type}
    if second:
        assert {d.index for d in guarded} == {1}
