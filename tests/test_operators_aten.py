"""The ATen path, which CPU tensors and float64 take, before the same judge and on the same grid as the kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from harness.cases import (
    ADDMM_CASES,
    BIG_WINDOW,
    CONV_CASES,
    TOO_BIG_WINDOW,
    AddmmCase,
    addmm_cases,
    conv_case,
    conv_cases,
    dtypes,
    parametrize_dtypes,
    wide_and_narrow,
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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastlenet
from fastlenet import aten, ops
from fastlenet.functional import addmm_relu, conv2d_relu_max_pool2d, linear_relu

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
PHASED = [
    conv_case("LeNet conv1", (5, 1, 32, 32), (6, 1, 5, 5)),
    conv_case("covered", (2, 2, 10, 12), (3, 2, 5, 5)),
    conv_case("padding", (3, 2, 9, 12), (5, 2, 5, 5), padding=(2, 1)),
    conv_case("overlapping windows", (3, 2, 9, 11), (5, 2, 5, 5), pool_stride=1),
    conv_case("windows apart", (3, 2, 14, 13), (5, 2, 5, 5), pool_stride=(3, 4)),
    conv_case("long window", (3, 2, 9, 12), (5, 2, 2, 7), pool_size=(1, 3), pool_stride=(2, 3)),
    conv_case("no bias, unbatched", (2, 9, 9), (5, 2, 5, 5), bias=False),
]
FULL = AddmmCase("full addend", 7, 19, 11, (7, 11))

special = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)


def plan_of(case, dtype: torch.dtype = torch.float32):
    """How the ATen path computes a case of contiguous tensors."""
    size = case.input if len(case.input) == 4 else (1, *case.input)
    return aten._plan(torch.Size(size), torch.Size(case.weight), dtype, "cpu", torch.contiguous_format, case.geometry)


def assert_exact_gradients(case, tensors, wanted):
    """Ask for some gradients on the exact grid: these equal stock's, no other is there; return both runs."""
    stock = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(stock.shape, stock.dtype, terms=case.terms)
    expected = run(CONV.stock, tensors, case.keywords, grad, wanted)
    result = run(CONV.fused, tensors, case.keywords, grad, wanted)
    for name in CONV_NAMES:
        if name in wanted:
            assert_same_values(result.grads[name], expected.grads[name], name=name)
        else:
            assert result.grads[name] is None
    return result, expected


def subsets(names: tuple[str, ...]) -> pytest.MarkDecorator:
    chosen = [c for n in range(1, 1 + len(names)) for c in itertools.combinations(names, n)]
    return pytest.mark.parametrize("wanted", chosen, ids="+".join)


@pytest.fixture(autouse=True)
def _aten() -> Iterator[None]:
    with fastlenet.use_backend("aten"):
        yield


@pytest.fixture(params=["here", "small"])
def either(request) -> Iterator[None]:
    """The formulations here, and stock's own operators, which small calls take where nothing is forced."""
    with fastlenet.use_backend("aten" if request.param == "here" else "auto"):
        yield


either_way = pytest.mark.usefixtures("either")


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Cut batches into slices of so many images."""

    def cut(images: int, case, dtype: torch.dtype) -> None:
        weight = torch.empty(case.weight)
        geometry = case.geometry
        height, width = geometry.conv_size(case.input[-2:], tuple(weight.shape[2:]))
        monkeypatch.setattr(aten, "_SLICE_BYTES", images * len(weight) * height * width * dtype.itemsize)
        aten._plan.cache_clear()

    yield cut
    aten._plan.cache_clear()


@pytest.fixture(params=["whole batch", "single images"])
def slices(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the batch in one slice, and cut into as many as there are images."""
    if request.param == "single images":
        monkeypatch.setattr(aten, "_SLICE_BYTES", 1)
    aten._plan.cache_clear()
    yield
    aten._plan.cache_clear()


# --- accuracy ------------------------------------------------------------------------------------------------------


@either_way
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
def test_conv_grid_in_float64(case, slices):
    """What no kernel covers runs here under the default backend."""
    with fastlenet.use_backend("auto"):
        CONV.exact(case, case.exact(torch.float64))


@addmm_cases()
def test_addmm_grid_in_float64(case):
    """What no kernel covers runs here under the default backend."""
    with fastlenet.use_backend("auto"):
        ADDMM.exact(case, case.exact(torch.float64))


@pytest.mark.parametrize("backend", ["aten", "auto"])
@settings(max_examples=examples(60))
@given(call=conv_calls(dtypes=(torch.float32, torch.float64)))
def test_drawn_convolutions(call, backend):
    """Any shape, hyper-parameters and layout; small ones in float32 are stock's where nothing is forced.

    Stock's own calls kill the process where oneDNN 3.12 writes beyond its memory: images one pixel wide, strided and
    padded; and on CPUs with instructions for narrow types, these with dilation.
    """
    geometry = call.case.geometry
    assume(call.case.input[-1] > 1 or geometry.stride[1] == 1 or geometry.padding[1] == 0)
    kind = call.grad_kind(len(call.case.input))
    with fastlenet.use_backend(backend):
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


@either_way
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("input", "weight", "grad") for kind in kinds_for(torch.empty(1, 1, 1, 1))]
    + [("bias", kind) for kind in kinds_for(torch.empty(1))],
)
@conv_cases([SMALL, PHASED[1], ALL_ELSE])
def test_awkward_layouts_of_a_convolution(case, name, kind, slices):
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


def linear_relu_is_stocks(leading, weight, bias):
    tensors = {
        "input": exact_grid((*leading, 7), torch.float32),
        "weight": exact_grid(weight, torch.float32),
        "bias": None if bias is None else exact_grid(bias, torch.float32),
    }
    result, stock = run(linear_relu, tensors, {}), run(stock_linear_relu, tensors, {})
    for (name, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
        assert_same_values(actual, expected, allow_empty=True, name=name)


# --- special values ------------------------------------------------------------------------------------------------


@either_way
@dtypes
@special
@pytest.mark.parametrize("name", ["input", "bias"])
@conv_cases([COVERED, PHASED[1]])
def test_nan_and_infinities_in_a_convolution(case, name, value, dtype, slices):
    """They travel as in stock, forward and backward; shifted kernels' zeros must not turn infinity into NaN."""
    tensors = case.exact(dtype)
    flat = tensors[name].view(-1)
    flat[[0, flat.numel() // 2, flat.numel() // 2 + 1]] = value
    result = CONV.exact(case, tensors)
    assert not result.output.isfinite().all() or value < 0


@either_way
@special
def test_nan_and_infinities_in_the_weight(value, slices):
    """As in stock."""
    for case in (COVERED, PHASED[1]):
        tensors = case.exact(torch.float32)
        tensors["weight"][1, 0, 1, 1] = value
        CONV.exact(case, tensors)


@either_way
@special
@pytest.mark.parametrize("name", CONV_NAMES)
@conv_cases([ALL_ELSE, PHASED[0], PHASED[2]])
def test_nan_and_infinities_reach_the_same_outputs(case, name, value, slices):
    """With padding and cells outside any window too, where only gradients may differ from stock's."""
    tensors = case.exact(torch.float32)
    tensors[name].view(-1)[tensors[name].numel() // 2] = value
    expected = CONV.stock(**tensors, **case.keywords)
    assert_same_values(CONV.fused(**tensors, **case.keywords), expected)
    assert_same_values(run(CONV.fused, tensors, case.keywords).output, expected)


@either_way
@special
def test_nan_and_infinities_in_the_upstream_gradient(value):
    """They reach what their cell reaches, and nothing where relu was off."""
    for case in (COVERED, PHASED[1]):
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


@either_way
@conv_cases([SMALL, PHASED[1]])
def test_no_gradient_where_every_cell_is_closed(case, slices):
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
    assert_same_values(CONV.equal(case, tensors, None).argmax[0, 0], first)
    tensors["input"].fill_(float("nan"))
    assert (CONV.equal(case, tensors, None).argmax == 8).all()


@either_way
def test_a_window_without_a_cell():
    """Padding and dilation together can put every cell of a window into the padding: stock gives -inf there."""
    keywords = {"pool_size": 2, "pool_stride": 1, "pool_padding": 1, "pool_dilation": 2}
    tensors = {"input": torch.ones(1, 1, 1, 2), "weight": torch.ones(1, 1, 1, 1)}
    stock = CONV.stock(**tensors, **keywords)
    assert stock.isinf().any()
    result = run(CONV.fused, tensors, keywords, torch.ones_like(stock))
    assert_same_values(result.output, stock)
    assert (result.argmax[stock.isinf()] == 255).all()


# --- the two ideas that make it fast -------------------------------------------------------------------------------


@conv_cases(without=("unbatched", "empty batch"))
@wide_and_narrow
def test_one_image_a_slice(case, dtype, sliced):
    """Every case of the grid with its batch cut apart."""
    sliced(1, case, dtype)
    CONV.random(case, case.random(dtype))
    CONV.exact(case, case.exact(dtype))


@subsets(CONV_NAMES)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@conv_cases([SMALL, GROUPS, PHASED[2]])
def test_slices_give_each_set_of_gradients(case, kind, wanted, sliced):
    """Two images a slice, the last one partial: what is asked for is exact, and the rest is not computed."""
    sliced(2, case, torch.float32)
    tensors = case.exact(torch.float32)
    tensors["input"] = awkward(tensors["input"], kind)
    result, stock = assert_exact_gradients(case, tensors, wanted)
    assert_same_values(result.output, stock.output)
    assert result.output.stride() == stock.output.stride()


def test_the_shipped_slice_is_a_part_of_a_large_batch():
    """A batch as in training is cut without any help, and the slices' sums are as accurate as stock's."""
    case = conv_case("1,000 images", (1000, 1, 32, 32), (6, 1, 5, 5))
    slices = plan_of(case).slices
    assert len(slices) > 1
    assert [part.start for part in slices[1:]] == [part.stop for part in slices[:-1]]
    assert (slices[0].start, slices[-1].stop) == (0, 1000)
    CONV.random(case, case.random(torch.float32))


@dtypes
@pytest.mark.parametrize("channels", [4, 16])
def test_sums_over_many_slices_do_not_lose_accuracy(channels, dtype, slices):
    """Sixty-four slices, whose sum in a narrow type would lose digits with every one."""
    case = conv_case("64 images", (64, 3, 10, 10), (channels, 3, 3, 3))
    CONV.random(case, case.random(dtype))


@pytest.mark.parametrize("case", [BIG_WINDOW, TOO_BIG_WINDOW], ids=lambda case: case.name)
def test_the_type_of_argmax_follows_the_window(case):
    """One byte up to 255 cells, more beyond."""
    result = run(CONV.fused, case.random(torch.float32), case.keywords)
    assert result.argmax.dtype == (torch.uint8 if case is BIG_WINDOW else torch.int32)


@conv_cases(PHASED)
@dtypes
def test_kernel_stack(case, dtype):
    """One convolution with the kernel once per window cell: same judge, exact grid, layouts."""
    tensors = case.random(dtype)
    assert plan_of(case, dtype).phases
    CONV.random(case, tensors)
    CONV.exact(case, case.exact(dtype))


@subsets(CONV_NAMES)
@conv_cases(PHASED[:-1])
def test_kernel_stack_gives_each_set_of_gradients(case, wanted):
    """It serves the backward only where the input needs no gradient: both ways must agree with stock."""
    assert_exact_gradients(case, case.exact(torch.float32), wanted)


@pytest.mark.parametrize(
    "case",
    [
        conv_case("16 channels", (1, 1, 9, 9), (16, 1, 5, 5)),
        conv_case("small kernel", (1, 1, 9, 9), (4, 1, 3, 3)),
        conv_case("stride", (1, 1, 9, 9), (4, 1, 5, 5), stride=2),
        conv_case("dilation", (1, 1, 12, 12), (4, 1, 5, 5), dilation=2),
        conv_case("groups", (1, 2, 9, 9), (4, 1, 5, 5), groups=2),
        conv_case("ceil mode", (1, 1, 9, 9), (4, 1, 5, 5), ceil_mode=True),
        conv_case("pool padding", (1, 1, 9, 9), (4, 1, 5, 5), pool_padding=1),
        conv_case("pool dilation", (1, 1, 9, 9), (4, 1, 5, 5), pool_dilation=2),
        conv_case("no window", (1, 2, 9, 8), (5, 2, 3, 3), pool_size=1),
    ],
    ids=lambda case: case.name,
)
def test_kernel_stack_is_kept_from_what_it_cannot_do(case):
    """Each condition by itself; the call is right nonetheless."""
    assert not plan_of(case).phases
    CONV.exact(case, case.exact(torch.float32))


SIDE_BY_SIDE = [
    conv_case("LeNet conv2", (32, 6, 14, 14), (16, 6, 5, 5)),
    conv_case("rest of rows and columns", (40, 3, 17, 16), (18, 3, 5, 5), pool_size=(3, 2)),
    conv_case("groups, stride, dilation", (64, 4, 25, 24), (16, 2, 3, 3), groups=2, stride=(2, 1), dilation=(1, 2)),
    conv_case("ceil mode, nothing over", (40, 3, 16, 16), (20, 3, 5, 5), bias=False, ceil_mode=True),
    conv_case("windows of one cell", (40, 3, 12, 16), (20, 3, 5, 5), pool_size=1),
]


@conv_cases(SIDE_BY_SIDE)
@dtypes
def test_windows_side_by_side(case, dtype):
    """The convolution is taken apart into planes: same judge, exact grid."""
    assert plan_of(case, dtype).side_by_side
    assert not plan_of(case, dtype).matrix_product
    CONV.random(case, case.random(dtype))
    CONV.exact(case, case.exact(dtype))


@subsets(CONV_NAMES)
@conv_cases(SIDE_BY_SIDE[:2])
def test_windows_side_by_side_give_each_set_of_gradients(case, wanted, sliced):
    """In slices, the last one smaller."""
    sliced(13, case, torch.float32)
    assert_exact_gradients(case, case.exact(torch.float32), wanted)


@special
@pytest.mark.parametrize("where", ["grad", "weight", "input"])
@conv_cases([*SIDE_BY_SIDE[:2], PHASED[1]])
def test_what_is_not_finite_takes_the_plain_way(case, where, value):
    """Zeros of shifted kernels and of planes never meet an infinity or a NaN: gradients are stock's."""
    tensors = case.exact(torch.float32)
    stock = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(stock.shape, stock.dtype, terms=case.terms)
    (grad if where == "grad" else tensors[where]).view(-1)[7] = value
    expected = run(CONV.stock, tensors, case.keywords, grad)
    result = run(CONV.fused, tensors, case.keywords, grad)
    for (name, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=name)


@pytest.mark.parametrize(
    "case",
    [
        conv_case("overlapping windows", (32, 6, 14, 14), (16, 6, 5, 5), pool_stride=1),
        conv_case("windows apart", (32, 6, 14, 14), (16, 6, 5, 5), pool_stride=3),
        conv_case("an overhanging window", (32, 6, 15, 14), (16, 6, 5, 5), ceil_mode=True),
        conv_case("padding", (32, 6, 14, 14), (16, 6, 5, 5), pool_padding=1),
        conv_case("dilation", (32, 6, 14, 14), (16, 6, 5, 5), pool_dilation=2),
    ],
    ids=lambda case: case.name,
)
def test_windows_that_do_not_stand_side_by_side(case):
    """Each condition by itself; the call is right nonetheless."""
    assert not plan_of(case).side_by_side
    CONV.exact(case, case.exact(torch.float32))


@special
@parametrize_dtypes(torch.float32, torch.bfloat16, torch.float64)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_tiles_are_those_by_index(layout, dtype, value):
    """To the bit, infinities and NaN where they pass, and none where they do not; in channels_last."""
    case = conv_case("tiled", (3, 4, 6, 9), (5, 4, 1, 1), pool_size=(2, 3))
    geometry, generator = case.geometry, torch.Generator().manual_seed(0)
    argmax = torch.randint(0, geometry.window_size + 1, (3, 5, 3, 3), generator=generator).to(torch.uint8)
    argmax[argmax == geometry.window_size] = geometry.no_winner
    argmax = argmax.contiguous(memory_format=layout)
    grad = torch.randn(argmax.shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    grad[0] = value
    assert aten._plan(
        torch.Size(case.input), torch.Size(case.weight), dtype, "cpu", torch.contiguous_format, geometry
    ).tiled
    expected = aten._unpool_by_index(
        aten._passing(grad, argmax, geometry), argmax, (6, 9), geometry, torch.channels_last
    )
    actual = aten._unpool_by_cells(grad, argmax, geometry)
    assert actual.stride() == expected.stride()
    assert_bitwise_equal(actual, expected)


@conv_cases(
    [
        conv_case("a row left over", (2, 4, 7, 6), (5, 4, 1, 1)),
        conv_case("overlapping windows", (2, 4, 6, 6), (5, 4, 1, 1), pool_size=2, pool_stride=1),
    ]
)
def test_windows_that_leave_cells_over_do_not_tile(case):
    assert not plan_of(case).tiled
    CONV.exact(case, case.exact(torch.float32))


FEW = [
    conv_case("LeNet conv1", (1, 1, 32, 32), (6, 1, 5, 5)),
    conv_case("LeNet conv2", (2, 6, 14, 14), (16, 6, 5, 5)),
    conv_case("stride and overlap", (3, 2, 11, 9), (5, 2, 3, 2), stride=(2, 1), pool_size=3, pool_stride=(1, 2)),
    conv_case("window's padding", (3, 2, 9, 9), (5, 2, 2, 2), pool_size=3, pool_padding=1, ceil_mode=True),
    conv_case("unbatched, no bias", (2, 9, 9), (5, 2, 3, 3), bias=False),
]


@conv_cases(FEW)
@pytest.mark.parametrize("wanted", [("input", "weight", "bias"), ("weight",), ("input",)], ids="+".join)
def test_few_images_as_matrix_products(case, wanted):
    """Both ways give stock's values, for each set of gradients, and the small one is taken."""
    tensors = case.exact(torch.float32)
    assert plan_of(case).matrix_product
    CONV.random(case, case.random(torch.float32))
    stock = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(stock.shape, stock.dtype, terms=case.terms)
    expected = run(CONV.stock, tensors, case.keywords, grad, wanted)
    result = run(CONV.fused, tensors, case.keywords, grad, wanted)
    for (name, actual), (_, value) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, value, name=name)


@pytest.mark.parametrize(
    "case",
    [
        conv_case("many images", (512, 1, 32, 32), (6, 1, 5, 5)),
        conv_case("padding", (1, 1, 9, 9), (4, 1, 3, 3), padding=1),
        conv_case("dilation", (1, 1, 9, 9), (4, 1, 3, 3), dilation=2),
        conv_case("groups", (1, 2, 9, 9), (4, 1, 3, 3), groups=2),
        conv_case("empty windows", (1, 1, 9, 9), (4, 1, 3, 3), pool_padding=1, pool_dilation=2),
        conv_case("window wider than the image", (1, 1, 9, 2), (4, 1, 3, 1), pool_size=3, pool_padding=1),
    ],
    ids=lambda case: case.name,
)
def test_matrix_products_are_kept_from_what_they_cannot_do(case):
    """Each condition by itself."""
    assert not plan_of(case).matrix_product


# --- small calls, where nothing is forced: stock's operators and derivatives -----------------------------------------


LENET1 = conv_case("LeNet conv1", (17, 1, 32, 32), (6, 1, 5, 5))


def operators_of(case, dtype: torch.dtype = torch.float32, backend: str = "auto") -> list[str]:
    """Names of the nodes of a call's graph, from its output backwards."""
    tensors = {name: None if t is None else t.requires_grad_() for name, t in case.random(dtype).items()}
    with fastlenet.use_backend(backend):
        node, names = conv2d_relu_max_pool2d(**tensors, **case.keywords).grad_fn, []
    while node is not None and type(node).__name__ != "AccumulateGrad":
        names.append(type(node).__name__.removesuffix("Backward0"))
        node = node.next_functions[0][0]
    return names


@conv_cases([SMALL, GROUPS, *FEW, LENET1])
def test_small_calls_are_stocks_in_another_order(case):
    """First pooled, then a threshold, which leaves the output to its user; the convolution as products where right."""
    conv = "SlowConv2D" if plan_of(case).matrix_product else "Convolution"
    threshold, pool, *rest = (name for name in operators_of(case) if "squeeze" not in name.lower())
    assert (threshold, pool) == ("Threshold", "MaxPool2DWithIndices")
    assert rest[0].startswith(conv)
    kept = plan_of(case).conv_size[0] * plan_of(case).conv_size[1] * case.weight[0] * case.input[0] * 4
    assert kept <= aten._LITTLE_TO_KEEP


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (conv_case("many images", (18, 1, 32, 32), (6, 1, 5, 5)), {}),
        (FEW[0], {"backend": "aten"}),
        (FEW[0], {"dtype": torch.bfloat16}),
        (FEW[0], {"dtype": torch.float64}),
        (conv_case("empty windows", (1, 1, 9, 9), (4, 1, 3, 3), pool_padding=1, pool_dilation=2), {}),
    ],
    ids=["many images", "forced", "bfloat16", "float64", "empty windows"],
)
def test_other_calls_keep_their_function(case, changes):
    """Each condition by itself."""
    assert operators_of(case, **changes)[0] == "ConvReLUMaxPool2dFunctionBackward"


def test_small_calls_in_derivatives_that_stock_lacks():
    """Forward mode and torch.func go through the Functions; a traced call keeps the operator whole."""
    case = FEW[0]
    tensors = case.exact(torch.float32)
    call = functools.partial(conv2d_relu_max_pool2d, **case.keywords)
    stock = functools.partial(stock_conv2d_relu_max_pool2d, **case.keywords)
    arguments, tangents = tuple(tensors.values()), tuple(exact_grid(t.shape, t.dtype) for t in tensors.values())
    with fastlenet.use_backend("auto"):
        for transform in (
            lambda f: torch.func.jvp(f, arguments, tangents),
            lambda f: torch.func.vmap(f)(*(t.expand(3, *t.shape) for t in arguments)),
            lambda f: torch.func.grad(lambda *args: f(*args).sum(), argnums=(0, 1, 2))(*arguments),
        ):
            torch.testing.assert_close(transform(call), transform(stock), rtol=0, atol=0)
        graph = make_fx(call)(*arguments).argmax
    assert "fastlenet.conv2d_relu_max_pool2d" in graph


@pytest.mark.parametrize(("images", "operator"), [(13, False), (14, True)])
def test_small_calls_without_gradients(images, operator, monkeypatch):
    """They skip the raw operator; from a quarter of a megabyte on its own forms are faster."""
    called = []
    raw = ops.conv2d_relu_max_pool2d
    monkeypatch.setattr(ops, "conv2d_relu_max_pool2d", lambda *args: called.append(args) or raw(*args))
    with fastlenet.use_backend("auto"):
        conv2d_relu_max_pool2d(**conv_case("", (images, 1, 32, 32), (6, 1, 5, 5)).random(torch.float32))
    assert bool(called) == operator


def test_closed_windows_in_the_padding_stay_inside_the_image():
    """Nothing passes there, but even a zero may only be added within the convolution's output."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.max_pool2d_with_indices_backward.default:
                seen.append(args[-1])
            return function(*args, **(kwargs or {}))

    geometry = conv_case("", (2, 8, 5, 5), (8, 8, 1, 1), pool_size=3, pool_stride=2, pool_padding=1).geometry
    for layout in (torch.contiguous_format, torch.channels_last):
        argmax = torch.full((2, 8, 3, 3), geometry.no_winner, dtype=torch.uint8)
        with Watch():
            passing = aten._passing(torch.ones(2, 8, 3, 3), argmax, geometry)
            grad = aten._unpool_by_index(passing, argmax, (5, 5), geometry, layout)
        assert not grad.any()
    assert len(seen) == 2
    assert all(int(index.min()) >= 0 and int(index.max()) < 25 for index in seen)


def test_the_registered_operator_takes_the_same_formulation(monkeypatch):
    """Its pairs come as lists, which must not make it miss what tuples are compared with."""
    case = conv_case("LeNet conv1", (64, 1, 32, 32), (6, 1, 5, 5))
    expected, seen = plan_of(case), []
    plan = aten._plan
    monkeypatch.setattr(aten, "_plan", lambda *args: (seen.append(plan(*args)), seen[-1])[1])
    tensors = case.random(torch.float32)
    direct = conv2d_relu_max_pool2d(**tensors)
    with torch.profiler.profile():  # whoever watches operators gets the registered one
        registered = conv2d_relu_max_pool2d(**tensors)
    assert seen == [expected] * 2
    assert expected.phases
    assert_bitwise_equal(registered, direct)


# --- derivatives in float64 ----------------------------------------------------------------------------------------

MODEST = [case for case in CONV_CASES if case not in (BIG_WINDOW,) and case.name != "empty batch"]


def leaves(case) -> list[torch.Tensor | None]:
    return [None if t is None else t.requires_grad_() for t in case.random(torch.float64).values()]


def conv_call(case):
    return lambda *tensors: conv2d_relu_max_pool2d(*tensors, **case.keywords)


def addmm_call(case):
    return lambda *tensors: ADDMM.fused(*tensors, **case.keywords)


@conv_cases(MODEST)
def test_gradcheck_of_a_convolution(case):
    """Reverse mode and forward mode against finite differences, in random directions; under the default backend."""
    with fastlenet.use_backend("auto"):
        assert torch.autograd.gradcheck(conv_call(case), leaves(case), check_forward_ad=True, fast_mode=True)


@conv_cases(MODEST)
def test_gradgradcheck_of_a_convolution(case):
    """Double backward against finite differences, in random directions."""
    assert torch.autograd.gradgradcheck(conv_call(case), leaves(case), fast_mode=True)


@conv_cases([SMALL, conv_case("two groups", (1, 4, 5, 6), (4, 2, 2, 2), groups=2)])
def test_every_entry_of_the_jacobian(case):
    """Gradcheck's slow mode looks at each entry apart."""
    with fastlenet.use_backend("auto"):
        assert torch.autograd.gradcheck(conv_call(case), leaves(case), check_forward_ad=True)


@addmm_cases([case for case in ADDMM_CASES if 0 not in (case.m, case.k, case.n)])
def test_derivatives_of_a_product(case):
    """First derivatives in both modes and second ones against finite differences."""
    with fastlenet.use_backend("auto"):
        assert torch.autograd.gradcheck(addmm_call(case), leaves(case), check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(addmm_call(case), leaves(case), fast_mode=True)


# --- layouts, reproducibility, memory ------------------------------------------------------------------------------


@either_way
@parametrize_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("name", ["input", "weight"])
@conv_cases([SMALL, PHASED[1], GROUPS])
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


@either_way
@parametrize_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("images", [2, 70])
@pytest.mark.parametrize("part", PARTS_OF_NHWC)
def test_parts_of_channels_last_have_stocks_strides(part, images, channels, dtype):
    """As images come out of NumPy; few or one channel, few images or many. Compiled code relies on the strides."""
    input = PARTS_OF_NHWC[part](images, channels).to(dtype).permute(0, 3, 1, 2)
    case = conv_case("plain", input.shape, (5, channels, 3, 3), pool_size=2)
    weight = torch.randn(5, channels, 3, 3, dtype=dtype)
    forward, backward = torch.ops.fastlenet.conv2d_relu_max_pool2d, torch.ops.fastlenet.conv2d_relu_max_pool2d_backward
    output, argmax = forward(input, weight, None, *case.geometry, True)
    assert output.stride() == stock_conv2d_relu_max_pool2d(input, weight, pool_size=2).stride()
    assert output.is_contiguous(memory_format=torch.channels_last)
    for operator, args in (
        (forward, (input, weight, None, *case.geometry, True)),
        (backward, (output, input, weight, argmax, *case.geometry, [True, True, True])),
    ):
        torch.library.opcheck(operator.default, args, test_utils="test_faketensor")


@either_way
def test_empty_batch():
    """The output is empty and the gradients of the parameters are zero."""
    for case in (SMALL, PHASED[0]):
        tensors = case.random(torch.float32)
        tensors["input"] = tensors["input"][:0]
        result = CONV.equal(case, tensors, None)
        assert result.output.shape[0] == 0
        for name in ("weight", "bias"):
            assert_same_values(result.grads[name], torch.zeros_like(tensors[name]))


@either_way
@dtypes
@conv_cases([SMALL, GROUPS, PHASED[0]])
def test_bitwise_reproducible_from_run_to_run(case, dtype, sliced):
    sliced(2, case, dtype)
    tensors = case.random(dtype)
    grad = upstream(CONV.stock(**tensors, **case.keywords))
    first, second = (run(CONV.fused, tensors, case.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@either_way
def test_any_number_of_threads(slices):
    """One thread and two: the same judge."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            CONV.random(PHASED[2], PHASED[2].random(torch.float32))
    finally:
        torch.set_num_threads(threads)


def test_integers_compute_as_in_stock():
    """Stock takes them, without gradients."""
    tensors = {"input": torch.randint(-5, 5, (2, 1, 6, 6)), "weight": torch.randint(-5, 5, (2, 1, 3, 3))}
    assert torch.equal(CONV.fused(**tensors), CONV.stock(**tensors))


@conv_cases([SMALL, PHASED[0]])
def test_a_convolution_saves_one_byte_a_pooled_cell(case):
    """Beside its own arguments: nothing at the convolution's resolution, and not the output."""
    tensors = {name: tensor.requires_grad_() for name, tensor in case.random(torch.float32).items()}
    with saved_for_backward() as saved:
        output = conv2d_relu_max_pool2d(**tensors, **case.keywords)
    own = [t for t in saved if t.data_ptr() not in {x.data_ptr() for x in tensors.values()}]
    assert [(t.dtype, t.shape) for t in own] == [(torch.uint8, output.shape)]
    assert len(saved) == 3


def test_a_product_saves_its_factors_and_its_output():
    tensors = {name: tensor.requires_grad_() for name, tensor in FULL.random(torch.float32).items()}
    with saved_for_backward() as saved:
        output = addmm_relu(**tensors)
    pointers = {t.data_ptr() for t in (output, tensors["mat1"], tensors["mat2"])}
    assert {t.data_ptr() for t in saved} == pointers


@pytest.mark.parametrize("batch", [1, 64])
def test_lenet_saves_at_most_12800_bytes_an_image(batch):
    """All that a training step keeps from forward to backward, parameters and the loss's own apart."""
    network, stock = fastlenet.LeNet(), fastlenet.StockLeNet()

    def kept(model) -> list[int]:
        with saved_for_backward() as saved:
            model(torch.randn(batch, 1, 32, 32))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        return [size // batch for size in storages.values()]

    # Input, pooled outputs as the next layer's inputs, argmax and hidden activations.
    assert sorted(kept(network)) == sorted([4096, 1176, 4704, 400, 1600, 480, 336])
    assert sum(kept(network)) <= 12_800 < sum(kept(stock))


@either_way
@conv_cases([SMALL, PHASED[0]])
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


@either_way
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


@either_way
@conv_cases([SMALL, PHASED[0], GROUPS])
def test_nothing_is_modified(case, sliced):
    """Arguments and the upstream gradient keep their values and their version counters, forward and backward."""
    sliced(2, case, torch.float32)
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


@either_way
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
