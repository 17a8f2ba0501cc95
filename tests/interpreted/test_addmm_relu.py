"""The product's kernels, forward and backward, against stock PyTorch in float64."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
import torch
from fastlenet.kernels import addmm_relu as kernels
from fastlenet.kernels import tiles
from harness.bounds import sanitized
from harness.cases import ADDMM_CASES, SHIPPED_ADDMM, AddmmCase, dtypes, wide_and_narrow
from harness.contract import (  # noqa: F401
    Contract,
    pytest_generate_tests,
    test_a_gradient_that_is_negated_lazily,
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
)
from harness.draw import addmm_calls
from harness.fuzz import examples, given, settings
from harness.judge import assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import ADDMM, run, stock_linear_relu, upstream
from harness.strides import awkward
from torch._subclasses import FakeTensorMode

import fastlenet
from fastlenet.functional import linear_relu

NAMES = ("input", "mat1", "mat2")
SMALL = AddmmCase("small", 7, 19, 11, (11,), beta=0.5, alpha=-2)
FULL = AddmmCase("small, full addend", 7, 19, 11, (7, 11))
FC = AddmmCase("LeNet fc2", 8, 120, 84, (84,))
CONTRACT = Contract(
    grid=ADDMM_CASES,
    plain=[SMALL, FULL],
    covered=[FULL],
    shipped=SHIPPED_ADDMM,
    far=[AddmmCase("far", 4, 3, 5, (4, 5))],
    launches=3,  # forward and two gradients
)


@pytest.fixture
def addmm(watched):
    return ADDMM.under(watched)


# --- accuracy ------------------------------------------------------------------------------------------------------


@dtypes
def test_results_are_rounded_to_nearest(dtype, device):
    """One product an element is exact in float32, so only its rounding can differ: truncation would pass the judge."""
    tensors = AddmmCase("one product an element", 32, 1, 32, None).random(dtype, device=device)
    expected = (tensors["mat1"].double() * tensors["mat2"].double()).relu().to(dtype)
    assert_same_values(ADDMM.fused(**tensors), expected)


@pytest.mark.wide
@settings(max_examples=examples(60))
@given(call=addmm_calls())
def test_drawn_calls(call, addmm, device):
    """Any shape, factors, dtype and layout: equal to stock on the exact grid, as accurate elsewhere."""
    if call.exact:
        addmm.exact(call.case, call.tensors(device), call.grad_kind(2))
    else:
        addmm.random(call.case, call.tensors(device), call.grad_kind(2), allow_zero=True)


def test_several_parts_do_occur(shipped_tiles, device, launches, monkeypatch):
    """Guards the test above: its shapes must give the two-stage sum more than two parts."""
    case = next(case for case in SHIPPED_ADDMM if case.name == "several parts")
    sum_partials, parts = kernels.sum_partials, []

    def counted(*sums, later):
        sums = list(sums)
        parts.append([len(partials) for partials, _, _ in sums])
        sum_partials(*sums, later=later)

    monkeypatch.setattr(kernels, "sum_partials", counted)
    run(ADDMM.fused, case.random(torch.float32, device=device), case.keywords)
    # The parts of mat2's gradient and the bias's are added up by one launch.
    assert [len(sums) for sums in parts] == [2]
    assert min(parts[0]) > 2
    assert {(c["BLOCK_M"], c["BLOCK_K"]) for _, c in launches if "BLOCK_M" in c} == {(64, 16)}


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("weight", "bias"), [((5, 7), None), ((5, 7), (5,)), ((5, 7), (1,)), ((7,), None)], ids=str)
def test_linear_relu(leading, weight, bias, watched, device):
    """Any leading dimensions, a weight without output dimension, and biases that broadcast."""
    tensors = {
        "input": exact_grid((*leading, 7), torch.float32, device=device),
        "weight": exact_grid(weight, torch.float32, device=device),
        "bias": None if bias is None else exact_grid(bias, torch.float32, device=device),
    }
    stock = run(stock_linear_relu, tensors, {})
    result = watched(linear_relu, tensors, {})
    for (name, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
        assert_same_values(actual, expected, allow_empty=True, name=name)


# --- variants ------------------------------------------------------------------------------------------------------

LAYOUTS = ("rows of 16 bytes", "rows of 8 bytes", "rows", "columns of 16 bytes", "columns", "any strides", "expanded")


def laid_out(layout, shape, dtype, device):
    """Random numbers in one of the layouts that the kernels tell apart; some need sizes that are multiples of 8."""
    rows, columns = shape
    numbers = torch.randn(shape, device=device).to(dtype)
    if layout == "expanded":
        return torch.full((1, 1), 0.5, device=device, dtype=dtype).expand(shape)  # sums of it are exact in any order
    # Elements between neighbours, between rows, and before the first.
    wide = 16 // dtype.itemsize
    step, pitch, first = {"16": (1, wide, 0), "8 ": (1, wide // 2, 0), "": (1, 1, 1), "any": (2, 1, 1)}[
        next((key for key in ("16", "8 ", "any") if key in layout), "")
    ]
    inner, outer = (columns, rows) if "columns" not in layout else (rows, columns)
    stride = -(-inner * step // pitch) * pitch + (pitch if layout != "rows of 16 bytes" else 0)
    strides = (stride, step) if "columns" not in layout else (step, stride)
    memory = torch.zeros(first + stride * max(1, outer) + inner * step, device=device, dtype=dtype)
    return memory[first:].as_strided(shape, strides).copy_(numbers)


@wide_and_narrow
def test_drawn_layouts_reach_every_variant(dtype, addmm, launches, device, shipped_tiles):
    """Each operand in each layout over ten draws: as accurate as stock, and every kind of load is reached."""
    for seed in range(max(10, examples(10))):
        drawn_layouts(seed, dtype, addmm, device)
    widths = defaultdict(set)
    for name, constants in launches:
        for operand in {"LEFT", "RIGHT"} & constants.keys():
            widths[name, operand].add(constants[operand])
    wide = 16 // dtype.itemsize
    assert len(widths) == 6
    for (name, operand), seen in widths.items():
        # Loads of 16 bytes along both axes.
        assert {wide, -wide} <= seen, (name, operand, seen)
        if dtype == torch.float32:
            # Single elements, and any strides: FMA units take every layout.
            assert 0 in seen, (name, operand, seen)
            assert {1, -1} & seen, (name, operand, seen)
        else:
            assert min(abs(width) for width in seen) >= wide // 2, (name, operand, seen)
    boxed = {(name, constants["BOXED"]) for name, constants in launches if "BOXED" in constants}
    if dtype == torch.float32:
        assert {how for _, how in boxed} == {False}
    else:
        # Matrix units take operands by descriptors and by pointers, copies of others, and a result by its descriptor.
        assert len(boxed) == 6
        assert {c["GRAD"] for name, c in launches if name == "_lay_out_kernel" and not c["MASKED"]} >= {0, 1}
        assert any(constants.get("BOXED_RESULT") for _, constants in launches)


def drawn_layouts(seed, dtype, addmm, device):
    """One call, forward and backward, on drawn sizes."""
    generator = torch.Generator().manual_seed(seed)
    m, k, n = (int(torch.randint(1, top, (), generator=generator)) for top in (90, 60, 80))
    # Every draw takes the next layout for each operand, so that ten reach all.
    first, second, third = (LAYOUTS[(seed + shift) % len(LAYOUTS)] for shift in (0, 2, 4))
    if any("bytes" in layout for layout in (first, second, third)):
        m, k, n = (-(-size // 8) * 8 for size in (m, k, n))
    tensors = {
        "input": torch.randn(n, device=device).to(dtype),
        "mat1": laid_out(first, (m, k), dtype, device),
        "mat2": laid_out(second, (k, n), dtype, device),
    }
    case = AddmmCase("drawn", m, k, n, (n,))
    grad_output = laid_out(third, (m, n), dtype, device)
    addmm.judge(case, tensors, grad_output, addmm.run(ADDMM.fused, tensors, case.keywords, grad_output))


@wide_and_narrow
def test_few_rows_split_the_depth(dtype, addmm, launches, device, shipped_tiles, monkeypatch):
    """Chunks of a sum by programs of their own: as accurate as stock, with each kind of addend."""
    monkeypatch.setattr(kernels, "_CHUNK", 64)
    for addend in ((20,), (5, 20), (5, 1), None):
        case = AddmmCase("deep", 5, 200, 20, addend, *((0.5, -2) if addend else ()))
        addmm.random(case, case.random(dtype, device=device))
    names = Counter(name for name, _ in launches)
    assert names["_forward_parts_kernel"] == names["_finish_kernel"] == 4
    assert names["_forward_kernel"] == 0


@wide_and_narrow
@pytest.mark.parametrize("addend", [(20,), (5, 20), None], ids=str)
def test_chunks_of_a_sum_come_to_the_same_bits(
    addend, dtype, launches, device, shipped_tiles, monkeypatch, sums_in_order
):
    """One program for all chunks or one for each: a row must not depend on how many travel with it."""
    monkeypatch.setattr(kernels, "_CHUNK", 64)
    case = AddmmCase("deep", 5, 200, 20, addend, *((0.7, 1.3) if addend else ()))
    tensors = case.random(dtype, device=device)
    few = run(ADDMM.fused, tensors, case.keywords).output
    monkeypatch.setattr(kernels, "_FEW_PROGRAMS", 0)
    many = run(ADDMM.fused, tensors, case.keywords).output
    assert Counter(name for name, _ in launches)["_forward_kernel"] == 1
    assert {c["CHUNK"] for name, c in launches if name.startswith("_forward")} == {64}
    assert_bitwise_equal(few, many)


@wide_and_narrow
@pytest.mark.parametrize("case", [SMALL, FULL, FC], ids=["bias", "full addend", "LeNet fc2"])
def test_masked_once_for_both_products(case, dtype, addmm, launches, device, monkeypatch):
    """Where tiles are many the gradient is masked by a kernel of its own: the same gradients, bit for bit."""
    tensors = case.random(dtype, device=device)
    grad = upstream(ADDMM.stock(**tensors, **case.keywords))
    by_tiles = run(ADDMM.fused, tensors, case.keywords, grad)
    launches.clear()
    monkeypatch.setattr(tiles, "_MASK_ONCE_FROM_ELSEWHERE", 1)
    once = addmm.random(case, tensors)
    masked = Counter((name, c["MASKED"]) for name, c in launches if "MASKED" in c)
    assert masked["_grad_mat1_kernel", True] == masked["_grad_mat2_kernel", True] == 0
    # The gradient of an input of the output's size is masked too; its odd rows serve exact float32 alone.
    assert masked["_lay_out_kernel", True] == 1 + (case is FULL and dtype != torch.float32)
    result = run(ADDMM.fused, tensors, case.keywords, grad)
    for name in NAMES:
        assert_bitwise_equal(result.grads[name], by_tiles.grads[name], name=name)
    assert once.output is not None


# --- special values ------------------------------------------------------------------------------------------------


def test_nan_is_not_read_where_beta_is_zero(addmm, device):
    """As in torch.addmm, an addend that does not count may hold anything."""
    case = AddmmCase("beta 0", 5, 6, 7, (5, 7), beta=0)
    tensors = case.exact(torch.float32, device=device)
    tensors["input"].fill_(float("nan"))
    assert addmm.exact(case, tensors).output.isfinite().all()


# --- what is computed, and what is not -----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)], ids="+".join)
@pytest.mark.parametrize("case", [SMALL, FULL], ids=["bias", "full addend"])
def test_only_requested_gradients_are_computed(case, wanted, launches, monkeypatch, watched, device):
    """What nobody asked for is not launched, and what was asked for does not depend on the rest."""
    tensors = case.exact(torch.float32, device=device)
    grad = upstream(ADDMM.stock(**tensors, **case.keywords))
    complete = run(ADDMM.fused, tensors, case.keywords, grad)
    launches.clear()
    grids, launch = [], kernels.launch

    def noted(kernel, grid, *args, **constants):
        grids.append((kernel.fn.__name__, grid))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(kernels, "launch", noted)
    result = watched(ADDMM.fused, tensors, case.keywords, grad, wanted)
    bias = "input" in wanted and case is SMALL
    expected = {"_forward_kernel": 1, "_grad_mat1_kernel": int("mat1" in wanted)}
    expected |= {"_grad_mat2_kernel": int("mat2" in wanted or bias)}
    expected |= {"_lay_out_kernel": int("input" in wanted and not bias)}
    assert Counter(name for name, _ in launches) == Counter(expected)
    # A tile of mat2's gradient has a program, 64 columns of the bias's have one.
    found = [grid for name, grid in grids if name == "_grad_mat2_kernel"]
    assert found == ([(int("mat2" in wanted) + bias, 1)] if "mat2" in wanted or bias else [])
    for name in NAMES:
        if name in wanted:
            assert_bitwise_equal(result.grads[name], complete.grads[name])
        else:
            assert result.grads[name] is None


def test_without_gradients_nothing_but_the_output_is_made(launches, device):
    tensors = SMALL.random(torch.float32, device=device)
    with sanitized() as (poison, _):
        output = ADDMM.fused(**tensors, **SMALL.keywords)
        poison.assert_all_written()
        assert len(poison.tensors) == 1
    assert [name for name, _ in launches] == ["_forward_kernel"]
    assert_bitwise_equal(output, run(ADDMM.fused, tensors, SMALL.keywords).output)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("case", [SMALL, FULL], ids=["bias", "full addend"])
def test_layouts_are_as_the_shape_functions_promise(case, kind, device):
    """A compiled graph relies on the strides that the shape functions give; nn.Linear's weight arrives transposed."""
    tensors = case.random(torch.float32, device=device)
    tensors["mat2"] = awkward(tensors["mat2"], kind)
    forward, backward = torch.ops.fastlenet.addmm_relu, torch.ops.fastlenet.addmm_relu_backward

    def call(input, mat1, mat2):
        output = forward(input, mat1, mat2, case.beta, case.alpha)
        return output, *backward(output, output, mat1, mat2, case.addend, case.beta, case.alpha, [True] * 3)

    with FakeTensorMode() as mode:
        promised = call(*(mode.from_tensor(tensor) for tensor in tensors.values()))
    for actual, fake in zip(call(*tensors.values()), promised, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


# --- reproducibility -----------------------------------------------------------------------------------------------


@wide_and_narrow
def test_bitwise_reproducible_from_run_to_run(dtype, device, shipped_tiles):
    case = next(case for case in SHIPPED_ADDMM if case.name == "several parts")
    tensors = case.random(dtype, device=device)
    grad = upstream(ADDMM.stock(**tensors, **case.keywords))
    first, second = (run(ADDMM.fused, tensors, case.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@dtypes
def test_a_row_does_not_depend_on_its_batch(dtype, device, shipped_tiles, sums_in_order):
    """Alone, with another and in the middle of seven or 64: the same bits."""
    tensors = AddmmCase("batch", 64, 50, 20, (20,)).random(dtype, device=device)
    rows = tensors.pop("mat1")
    whole = ADDMM.fused(mat1=rows, **tensors)
    for batch, first in ((1, 0), (1, 63), (2, 62), (7, 5), (7, 57)):
        part = ADDMM.fused(mat1=rows[first : first + batch], **tensors)
        assert_bitwise_equal(part, whole[first : first + batch], name=f"{batch} from row {first}")


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "all"])
@pytest.mark.parametrize("modified", ["input", "weight", "bias"])
def test_a_backward_raises_after_a_modification_if_stocks_does(wanted, modified, device):
    """Stock saves a factor of a product for the other's gradient alone."""
    raised = []
    for function in (linear_relu, stock_linear_relu):
        tensors = {
            "input": torch.ones(3, 4, device=device),
            "weight": torch.ones(5, 4, device=device),
            "bias": torch.ones(5, device=device),
        }
        leaves = [tensor.requires_grad_() for name, tensor in tensors.items() if wanted in (name, "all")]
        with fastlenet.use_backend("triton"):
            output = function(*tensors.values())
        with torch.no_grad():
            tensors[modified].mul_(1.0)
        try:
            torch.autograd.grad(output.sum(), leaves)
            raised.append(None)
        except RuntimeError as error:
            raised.append("modified by an inplace operation" in str(error))
    assert raised[0] == raised[1]
