"""Three fused linear layers on ATen: stock's values and derivatives of any order, compiled, exported, refused."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness.judge import assert_as_accurate
from torch.func import grad, vmap

import fastlenet
from fastlenet.functional import mlp

pytestmark = pytest.mark.usefixtures("either")

SHAPES = ((5, 6), (4, 6), (4,), (3, 4), (3,), (2, 3), (2,))


def stock_mlp(input, weight1, bias1, weight2, bias2, weight3, bias3):
    return F.linear(F.relu(F.linear(F.relu(F.linear(input, weight1, bias1)), weight2, bias2)), weight3, bias3)


def tensors(dtype=torch.float64, requires_grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in SHAPES]


def agree(ours, theirs):
    """In float64 both compute the same; what is left is the order of sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_is_as_accurate_as_stock(dtype):
    given = tensors(dtype, requires_grad=False)
    exact = [tensor.double() for tensor in given]
    assert_as_accurate(
        mlp(*given),
        stock_mlp(*given),
        stock_mlp(*exact),
        magnitude=stock_mlp(*(tensor.abs() for tensor in exact)),
        dtype=dtype,
    )


@pytest.mark.parametrize("leading", [(), (0,), (4, 1, 3)], ids=str)
def test_any_leading_dimensions(leading):
    _, *parameters = tensors()
    input = torch.randn(*leading, 6, dtype=torch.float64)
    agree(mlp(input, *parameters), stock_mlp(input, *parameters))


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 7) for c in itertools.combinations(range(7), n)], ids=str)
def test_gradients(wanted):
    given = tensors(requires_grad=False)
    for index in wanted:
        given[index].requires_grad_()
    upstream = torch.randn(5, 2, dtype=torch.float64)
    chosen = [given[index] for index in wanted]
    agree(*(torch.autograd.grad(function(*given), chosen, upstream) for function in (mlp, stock_mlp)))


def test_gradients_to_second_order_and_forward_mode():
    assert torch.autograd.gradcheck(mlp, tensors(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(mlp, tensors(), check_fwd_over_rev=True)


@pytest.mark.parametrize("mapped", range(7))
def test_any_argument_may_be_mapped(mapped):
    given = tensors(requires_grad=False)
    given[mapped] = torch.stack([given[mapped], -2 * given[mapped]], -1)
    in_dims = [-1 if index == mapped else None for index in range(7)]

    def outputs(function):
        slope = grad(lambda *args: function(*args).square().sum(), tuple(range(7)))
        return vmap(lambda *args: (function(*args), slope(*args)), tuple(in_dims))(*given)

    agree(outputs(mlp), outputs(stock_mlp))


MASKS = [[True] * 7, *([index == chosen for index in range(7)] for chosen in range(7)), [False] * 3 + [True] * 4]


@pytest.mark.wide
def test_opcheck():
    input, *parameters = tensors(torch.float32, requires_grad=False)
    operators, spec = torch.ops.fastlenet, "['linear_relu', 'linear_relu', 'linear']"
    for save in (True, False):
        torch.library.opcheck(operators.chain.default, (input, parameters, spec, save))
    output, saved = operators.chain(input, parameters, spec, True)
    for mask in MASKS:
        args = torch.randn_like(output), output, input, parameters, saved, spec, mask
        torch.library.opcheck(operators.chain_backward.default, args)


def test_compiles_to_one_graph_with_the_operator():
    torch._dynamo.reset()
    given = tensors(torch.float32)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True)
    for rows in (5, 8):
        input = torch.randn(rows, 6, requires_grad=True)
        found = [
            torch.autograd.grad(function(input, *given[1:]).square().sum(), [input, *given[1:]])
            for function in (compiled, stock_mlp)
        ]
        torch.testing.assert_close(*found)


def test_exports_and_decomposes():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parameters_ = torch.nn.ParameterList(tensors(torch.float32)[1:])

        def forward(self, input):
            return mlp(input, *self.parameters_)

    head, input = Head().requires_grad_(False), torch.randn(5, 6)
    program = torch.export.export(head, (input,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert any("fastlenet.chain" in str(node.target) for node in program.graph.nodes)
    decomposed = program.run_decompositions(fastlenet.decompositions())
    assert not any("fastlenet" in str(node.target) for node in decomposed.graph.nodes)
    rows = torch.randn(9, 6)
    for exported in (program, decomposed):
        torch.testing.assert_close(exported.module()(rows), stock_mlp(rows, *head.parameters_))


def test_autocast_as_stock():
    given = tensors(torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mlp(*given), stock_mlp(*given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = [tensor.bfloat16().double() for tensor in given]
    magnitude = stock_mlp(*(tensor.abs() for tensor in exact))
    assert_as_accurate(ours, theirs, stock_mlp(*exact), magnitude=magnitude, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (5, 7), r"cannot be multiplied.*input of size \[5, 7\], weight1 of size \[4, 6\]"),
        (1, (6,), r"expected weight1 to be a matrix.*weight1 of size \[6\]"),
        (2, (3,), r"bias1 to have a number for each of its rows.*weight1 of size \[4, 6\] and bias1 of size \[3\]"),
        (3, (3, 5), r"cannot be multiplied.*weight2 of size \[3, 5\]"),
        (4, (1, 3), r"bias2 to have a number for each.*bias2 of size \[1, 3\]"),
        (5, (2, 4), r"cannot be multiplied.*weight3 of size \[2, 4\]"),
        (6, (), r"bias3 to have a number for each"),
        (0, (), r"at least 1D.*input of size \[\]"),
    ],
)
def test_shapes_that_do_not_fit(index, shape, message):
    given = tensors(requires_grad=False)
    given[index] = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        mlp(*given)


def test_other_arguments_that_do_not_fit():
    given = tensors(requires_grad=False)
    with pytest.raises(RuntimeError, match=r"input and weight2 to have the same dtype"):
        mlp(*given[:3], given[3].float(), *given[4:])
    with pytest.raises(TypeError, match=r"argument 'bias3' must be Tensor, not NoneType"):
        mlp(*given[:6], None)
