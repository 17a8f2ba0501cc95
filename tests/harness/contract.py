"""What every operator does whichever implementation computes it: each behaviour once, as a test for all of them.

A test module imports the tests that its implementation promises and names its cases in ``CONTRACT``. The fixture
``trial`` gives the trial of a case's operator, and ``place`` the device of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fastlenet
from harness import modes
from harness.bounds import BoundsError, bounds_checked
from harness.cases import DTYPES, AddmmCase, ConvCase, conv_case
from harness.judge import assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import ADDMM, CONV, Trial, far_apart, fp32_precision, run, upstream
from harness.strides import awkward, kinds_for

Case = ConvCase | AddmmCase
special = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)


@dataclass(frozen=True)
class Contract:
    """The cases of an implementation.

    Attributes:
        grid: every kind of call.
        plain: small calls.
        covered: calls in which every cell of the convolution lies in a window and none in the padding, so that NaN and
            infinities go where stock's go.
        dtypes: what it computes.
        shipped: calls of several tiles that ship, partial in every dimension.
        far: a call whose tensors can lie far apart.
        launches: how many kernels a step of the first plain case launches.
    """

    grid: Sequence[Case]
    plain: Sequence[Case]
    covered: Sequence[Case]
    dtypes: Sequence[torch.dtype] = DTYPES
    shipped: Sequence[Case] = ()
    far: Sequence[Case] = ()
    launches: int = 0


def trial_of(case: Case) -> Trial:
    """The trial of a case's operator by the public function."""
    return CONV if isinstance(case, ConvCase) else ADDMM


def over(cases: str, rows: Callable[[Case], Iterator[tuple]] | None = None) -> Callable[[Any], Any]:
    """Run a test for each of the contract's cases of that name, and for each row that `rows` makes of a case."""

    def mark(test: Any) -> Any:
        test.over = cases, rows
        return test

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test of this module the cases of the module that imports it."""
    cases, rows = getattr(metafunc.function, "over", (None, None))
    if cases is None:
        return
    contract = metafunc.module.CONTRACT
    found = [(case, *row) for case in getattr(contract, cases) for row in (rows(case) if rows else [()])]
    given = [name for name in ("case", "operand", "kind", "dim") if name in metafunc.fixturenames]
    metafunc.parametrize(given, found, ids=["-".join([row[0].name, *map(str, row[1:])]) for row in found])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", contract.dtypes, ids=[str(d).removeprefix("torch.") for d in contract.dtypes])


def _addend(case: Case) -> str:
    return "bias" if isinstance(case, ConvCase) else "input"


def _layouts(case: Case) -> Iterator[tuple[str, str]]:
    grad = (1, 1, 1, 1) if isinstance(case, ConvCase) else (1, 1)
    for operand, shape in [*case.shapes.items(), ("grad", grad)]:
        for kind in kinds_for(torch.empty([1] * len(shape))):
            yield operand, kind


def _not_the_weight(case: Case) -> Iterator[tuple[str]]:
    """Operands whose NaN and infinities go where stock's go in every implementation."""
    yield from ((operand,) for operand in case.shapes if operand != "weight")


def _ends(case: Case) -> Iterator[tuple[str, int]]:
    operands = ("input", "grad") if isinstance(case, ConvCase) else (*case.shapes, "grad")
    for operand in operands:
        for dim in (0,) if isinstance(case, ConvCase) else (0, 1):
            yield operand, dim


# --- every implementation ---------------------------------------------------------------------------------------------


@over("grid")
def test_as_accurate_as_stock(case, dtype, trial, place):
    trial(case).random(case, case.random(dtype, device=place))


@over("grid")
def test_equal_to_stock_where_arithmetic_is_exact(case, dtype, trial, place):
    """Equality in every value: a wrong tie rule, window or mask cannot hide behind a tolerance."""
    trial(case).exact(case, case.exact(dtype, device=place))


@over("plain", _layouts)
def test_awkward_layouts(case, operand, kind, trial, place):
    """One tensor at a time in each layout, so that a swapped stride of any of them shows."""
    tensors = case.random(torch.float32, device=place)
    if operand != "grad":
        tensors[operand] = awkward(tensors[operand], kind)
    trial(case).random(case, tensors, kind if operand == "grad" else "contiguous")


@special
@over("covered", _not_the_weight)
def test_nan_and_infinities_travel_as_in_stock(case, operand, value, dtype, trial, place):
    """Relu and max-pool propagate NaN, and a gradient goes to the last NaN of a window, in all results."""
    tensors = case.exact(dtype, device=place)
    flat = tensors[operand].view(-1)
    flat[[0, flat.numel() // 2, flat.numel() // 2 + 1]] = value
    result = trial(case).exact(case, tensors)
    assert not result.output.isfinite().all() or value < 0


@special
@over("covered")
def test_nan_and_infinities_in_the_upstream_gradient(case, value, trial, place):
    """They reach what their cell reaches, and nothing where relu was off."""
    tensors = case.exact(torch.float32, device=place)
    tensors[_addend(case)][0] = -100
    output = trial(case).stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=place)
    closed = int((output == 0).flatten().nonzero()[0])
    for position in (closed, int(output.argmax())):
        spoiled = grad.clone()
        spoiled.view(-1)[position] = value
        result = trial(case).equal(case, tensors, spoiled)
        assert result.grads[_addend(case)].isfinite().all() == (position == closed)


@over("plain")
def test_no_gradient_where_relu_is_off(case, trial, place):
    """All-negative sums: zero output and exactly zero gradients; sums of exactly zero count as off too."""
    tensors = case.exact(torch.float32, device=place)
    for value in (-1000.0, 0.0):
        tensors[_addend(case)].fill_(value)
        if value == 0:
            tensors["weight" if isinstance(case, ConvCase) else "mat2"].zero_()
        result = trial(case).exact(case, tensors)
        for _, tensor in result.tensors():
            assert_same_values(tensor, torch.zeros_like(tensor))
        if result.argmax is not None:
            assert (result.argmax == case.geometry.no_winner).all()


def test_ties_go_to_the_first_cell_in_scan_order(trial, place):
    """A constant image: every cell of every window ties; and so do NaN, of which the last counts."""
    case = conv_case("ties", (1, 1, 6, 6), (2, 1, 1, 1), bias=False, pool_size=3, pool_stride=2, pool_padding=1)
    first = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], dtype=torch.uint8)
    for value, cells in ((1.0, first), (float("nan"), torch.full_like(first, 8))):
        tensors = {"input": torch.full((1, 1, 6, 6), value, device=place), "weight": torch.ones(2, 1, 1, 1).to(place)}
        result = trial(case).equal(case, tensors, None)
        if result.argmax is not None:
            assert_same_values(result.argmax[0, 0], cells)


def test_a_window_without_a_cell(trial, place):
    """Padding and dilation together can put every cell of a window into the padding: stock gives -inf there.

    Its gradients are zero. Stock's own backward writes beyond its memory, so it does not run here.
    """
    keywords = {"pool_size": 2, "pool_padding": 1, "pool_dilation": 2}
    case = conv_case("no cell", (1, 4, 14, 14), (32, 4, 14, 5), bias=False, **keywords)
    tensors = {name: torch.ones(case.shapes[name], device=place) for name in ("input", "weight")}
    stock = CONV.stock(**tensors, **keywords)
    assert stock.isneginf().all()
    result = trial(case).run(trial(case).fused, tensors, keywords, torch.ones_like(stock))
    assert_same_values(result.output, stock)
    for name, grad in result.grads.items():
        if grad is not None:
            assert_same_values(grad, torch.zeros_like(grad), name=name)
    if result.argmax is not None:
        assert (result.argmax == case.geometry.no_winner).all()


def test_empty_batch(trial, place):
    """The output is empty and the gradients of the parameters are zero."""
    case = conv_case("empty", (2, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2)
    tensors = case.random(torch.float32, device=place)
    tensors["input"] = tensors["input"][:0]
    result = trial(case).equal(case, tensors, None)
    assert result.output.shape[0] == 0
    for name in ("weight", "bias"):
        assert_same_values(result.grads[name], torch.zeros_like(tensors[name]))


@over("plain")
def test_a_gradient_that_is_negated_lazily(case, trial, place):
    """PyTorch's complex numbers make such tensors: their memory holds the other sign."""
    tensors = case.exact(torch.float32, device=place)
    memory = exact_grid(trial(case).stock(**tensors, **case.keywords).shape, torch.float32, terms=case.terms)
    trial(case).equal(case, tensors, torch._neg_view(memory.to(place)))


@over("plain")
def test_bitwise_reproducible_from_run_to_run(case, dtype, trial, place):
    tensors = case.random(dtype, device=place)
    grad = upstream(trial(case).stock(**tensors, **case.keywords))
    first, second = (run(trial(case).fused, tensors, case.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@over("plain")
def test_nothing_is_modified(case, trial, place):
    """Arguments and the upstream gradient keep their values and their version counters, forward and backward."""
    tensors = {name: tensor.requires_grad_() for name, tensor in case.random(torch.float32, device=place).items()}
    output = trial(case).fused(**tensors, **case.keywords)
    watched = [*tensors.values(), output, upstream(output.detach())]
    before = [(t._version, t.detach().clone()) for t in watched]
    output.backward(watched[-1])
    for tensor, (version, values) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert_bitwise_equal(tensor, values)
    assert all(tensor._version == 0 for tensor in tensors.values())


# --- Triton's kernels -------------------------------------------------------------------------------------------------


@over("shipped")
def test_shipped_tiles(case, dtype, trial, place, shipped_tiles):
    """The compiled configuration's own tiles, several and partial in every dimension, and several parts of a sum."""
    trial(case).random(case, case.random(dtype, device=place))


@pytest.mark.parametrize(("forward", "backward"), [("triton", "aten"), ("aten", "triton")])
@over("plain")
def test_one_implementation_may_follow_the_other(case, forward, backward, place):
    """What the forward saves means the same to both backwards."""
    trial, tensors = trial_of(case), case.random(torch.float32, device=place)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with fastlenet.use_backend(forward):
        output = trial.fused(**leaves, **case.keywords)
        grad = upstream(output.detach())
        result = run(trial.fused, tensors, case.keywords, grad)
    with fastlenet.use_backend(backward):
        output.backward(grad)
    result.grads = {name: leaf.grad for name, leaf in leaves.items()}
    trial.judge(case, tensors, grad, result)


@over("far", _ends)
def test_addresses_beyond_two_to_the_31(case, operand, dim, trial, place):
    """Memory is reserved, not touched: the tensor's own elements are few."""
    tensors = case.exact(torch.float16, device=place)
    stock = trial(case).stock(**tensors, **case.keywords)
    grad = exact_grid(stock.shape, stock.dtype, terms=case.terms, device=place)
    expected = run(trial(case).stock, tensors, case.keywords, grad)
    if operand == "grad":
        grad = far_apart(grad, dim)
    else:
        tensors[operand] = far_apart(tensors[operand], dim)
    result = trial(case).run(trial(case).fused, tensors, case.keywords, grad)
    for (label, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=label)


@pytest.mark.skipif(not modes.interpreting(), reason="only the interpreter survives a bad address")
@over("far", _ends)
def test_addresses_in_32_bits_would_be_caught(case, operand, dim, monkeypatch, request, place):
    """Negative control of the test above."""
    tl = pytest.importorskip("triton.language")
    monkeypatch.setattr(request.module.kernels, "index_type", lambda *_: tl.int32)
    trial, tensors = trial_of(case), case.exact(torch.float16, device=place)
    grad = trial.stock(**tensors, **case.keywords)
    if operand == "grad":
        grad = far_apart(grad, dim)
    else:
        tensors[operand] = far_apart(tensors[operand], dim)
    with pytest.raises(BoundsError), bounds_checked():
        run(trial.fused, tensors, case.keywords, grad)


def test_kernels_are_launched_on_the_tensors_device(monkeypatch, trial, request):
    """The current device need not be the tensors'."""
    guarded, contract = [], request.module.CONTRACT
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: (guarded.append(tensor.device), device_of(tensor))[1])
    second = torch.cuda.device_count() > 1 and not modes.interpreting()
    device, case = torch.device("cuda:1" if second else modes.kernel_device()), contract.plain[0]
    for _ in range(2):
        guarded.clear()  # the first call of a kind is decided on its device, too
        trial(case).random(case, case.random(torch.float32, device=device))
    # On the current device there is nothing to do.
    assert len(guarded) == (contract.launches if second or modes.interpreting() else 0)
    assert {d.type for d in guarded} <= {device.type}
    if second:
        assert {d.index for d in guarded} == {1}


def test_tf32_is_as_accurate_as_stock_in_tf32(trial, place, launches, request):
    """The precision switch reaches every kernel (the interpreter itself knows no tf32)."""
    case = request.module.CONTRACT.plain[0]
    with fp32_precision("tf32"):
        trial(case).random(case, case.random(torch.float32, device=place))
    assert {c["PRECISION"] for _, c in launches if "PRECISION" in c} == {"tf32"}
