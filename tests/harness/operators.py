"""Run an operator forward and backward on awkward tensors, and judge all that comes out of it.

Where a maximum is nearly tied, or a sum nearly zero, rounding decides which way a gradient goes: two correct
implementations may differ there without bound. So results on random numbers are judged in two steps. First the
decisions: the cell that each argmax names must hold the maximum, as exactly as stock computes it. Then the rest,
which is linear: given those decisions, every gradient must be as accurate as stock's. On the exact grid there is no
rounding, and everything must simply be equal to stock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlenet.functional as fused
from harness.cases import AddmmCase, ConvCase, Tensors
from harness.judge import assert_as_accurate, assert_same_values, exact_grid
from harness.strides import awkward

__all__ = [
    "ADDMM",
    "CONV",
    "Result",
    "Trial",
    "addmm_relu",
    "by_definition",
    "double",
    "far_apart",
    "fp32_precision",
    "judge_addmm",
    "judge_conv",
    "precision",
    "run",
    "saved_for_backward",
    "stock_addmm_relu",
    "stock_conv2d_relu_max_pool2d",
    "stock_linear_relu",
    "upstream",
]

# --- stock ---------------------------------------------------------------------------------------------------------


def stock_conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    *,
    pool_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: Any = False,
) -> Tensor:
    """The composition that the fused operator replaces."""
    conv = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    return F.max_pool2d(conv, pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


def stock_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The composition that the fused operator replaces."""
    return F.relu(F.linear(input, weight, bias))


def stock_addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """The composition that the fused operator replaces; without `input`, the product alone."""
    return F.relu(_addmm(input, mat1, mat2, beta=beta, alpha=alpha))


def _addmm(input: Tensor | None, mat1: Tensor, mat2: Tensor, *, beta: float, alpha: float) -> Tensor:
    return alpha * (mat1 @ mat2) if input is None else torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)


def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The fused operator, reached through linear_relu where there is no `input`."""
    if input is None:
        assert (beta, alpha) == (1, 1)
        return fused.linear_relu(mat1, mat2.t())
    return fused.addmm_relu(input, mat1, mat2, beta=beta, alpha=alpha)


# --- running -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one call gave: the output, the gradients by argument name, and the argmax that it saved.

    That is the argmax, or the indices of stock's max_pool2d where that computed the call.
    """

    output: Tensor
    grads: dict[str, Tensor | None]
    argmax: Tensor | None = None
    index: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The output and the gradients, with names."""
        yield "output", self.output
        for name, grad in self.grads.items():
            if grad is not None:
                yield f"gradient of {name}", grad


@contextlib.contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """List the tensors that autograd saves in this context."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def double(tensors: Tensors) -> Tensors:
    """The same tensors in float64, laid out plainly.

    Stock's float64 convolutions give wrong gradients for some strides (torch 2.13: a single image in channels_last
    between two groups).
    """
    return {name: None if tensor is None else tensor.double().contiguous() for name, tensor in tensors.items()}


def upstream(like: Tensor, kind: str = "contiguous", generator: torch.Generator | None = None) -> Tensor:
    """A random gradient in the shape of `like`, laid out awkwardly; ``scalar`` is what ``.sum()`` sends."""
    return awkward(torch.randn(like.shape, generator=generator).to(like.device, like.dtype), kind)


def run(
    function: Callable[..., Tensor],
    tensors: Tensors,
    keywords: dict[str, Any],
    grad_output: Tensor | Callable[[Tensor], Tensor] | None = None,
    wanted: Iterable[str] | None = None,
) -> Result:
    """Call `function` on leaves that share the tensors' memory and strides, then back-propagate.

    Args:
        function: the operator.
        tensors: its tensor arguments by name.
        keywords: its other arguments.
        grad_output: the upstream gradient, or what makes one of the output; ``output.sum()``'s where None.
        wanted: the arguments that require a gradient; all of them where None.
    """
    names = [name for name, tensor in tensors.items() if tensor is not None and (wanted is None or name in wanted)]
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in names)
        for name, tensor in tensors.items()
    }
    with saved_for_backward() as saved:
        output = function(**leaves, **keywords)
    if grad_output is None:
        output.sum().backward()
    elif names:
        grad = grad_output(output.detach()) if callable(grad_output) else grad_output
        output.backward(grad)
    argmax = [tensor for tensor in saved if tensor.dtype in (torch.uint8, torch.int32)]
    indices = [tensor for tensor in saved if tensor.dtype == torch.int64]
    return Result(
        output.detach(),
        {name: leaf.grad for name, leaf in leaves.items() if leaf is not None},
        argmax[0] if argmax else None,
        indices[0] if indices else None,
    )


def by_definition(
    stock: Callable[..., Tensor], tensors: Tensors, keywords: dict[str, Any], grad_output: Tensor | None = None
) -> Result:
    """Stock's values where its arithmetic is exact, and where NaN and infinities go: in float64, on the CPU.

    There every product that the operator is defined by is formed, zero or not, and no other. On a GPU a library chooses
    among algorithms, of which some round on the exact grid, and some multiply taps by zeros beyond the image.
    """
    exact = {name: None if tensor is None else tensor.cpu() for name, tensor in double(tensors).items()}
    grad = None if grad_output is None else grad_output.double().cpu()
    (dtype,) = {tensor.dtype for tensor in tensors.values() if tensor is not None}
    result = run(stock, exact, keywords, grad)
    grads = {name: None if tensor is None else tensor.to(dtype) for name, tensor in result.grads.items()}
    return Result(result.output.to(dtype), grads)


def far_apart(tensor: Tensor, dim: int = 0) -> Tensor:
    """The same values with more than 2^31 elements of unused memory between the first and the last along `dim`."""
    shape = tensor.shape
    stride = 2**31 // (shape[dim] - 1) + 1
    assert stride < 2**31, "a stride that needs 64 bits would widen 32-bit arithmetic by itself"
    strides = [s if axis != dim else stride for axis, s in enumerate(torch.empty(shape).stride())]
    memory = torch.empty((shape[dim] - 1) * stride + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(shape, strides).copy_(tensor)


@contextlib.contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """Set PyTorch's precision of float32 convolutions and matrix products: ``ieee`` or ``tf32``."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = name
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def precision(tensor: Tensor, switch: str) -> str:
    """The precision in which stock multiplies `tensor`, by ``conv`` or ``matmul`` switch."""
    backend = torch.backends.cudnn.conv if switch == "conv" else torch.backends.cuda.matmul
    return "tf32" if tensor.dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"


# --- judging -------------------------------------------------------------------------------------------------------


def _cells(case: ConvCase, argmax: Tensor, conv_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Flat position in the convolution's output of the cell that each argmax names, and where a gradient passes."""
    geometry, argmax = case.geometry, argmax.long()
    passes = argmax != geometry.no_winner
    cell = torch.where(passes, argmax, 0)
    assert bool((cell < geometry.window_size).all()), "an argmax names a cell beyond the window"
    steps = [torch.arange(size, device=argmax.device) for size in argmax.shape[-2:]]
    position = []
    for i, part in enumerate((cell // geometry.pool_size[1], cell % geometry.pool_size[1])):
        first = steps[i] * geometry.pool_stride[i] - geometry.pool_padding[i]
        place = (first[:, None] if i == 0 else first) + part * geometry.pool_dilation[i]
        inside = (place >= 0) & (place < conv_size[i])
        assert bool(inside[passes].all()), "an argmax names a cell outside the convolution's output"
        position.append(torch.where(passes, place, 0))
    return position[0] * conv_size[1] + position[1], passes


def judge_conv(
    case: ConvCase, tensors: Tensors, grad_output: Tensor, result: Result, *, allow_zero: bool = False
) -> None:
    """Judge an output, its argmax and its gradients, by the rule of the contract."""
    dtype = result.output.dtype
    options: dict[str, Any] = {
        "dtype": dtype,
        "precision": precision(result.output, "conv"),
        "allow_zero": allow_zero,
        "allow_empty": result.output.numel() == 0,
    }
    geometry = case.geometry
    pool = dict(  # noqa: C408
        kernel_size=geometry.pool_size,
        stride=geometry.pool_stride,
        padding=geometry.pool_padding,
        dilation=geometry.pool_dilation,
        ceil_mode=geometry.ceil_mode,
    )
    stock = stock_conv2d_relu_max_pool2d(**tensors, **case.keywords)
    exact = double(tensors)
    reference = stock_conv2d_relu_max_pool2d(**exact, **case.keywords)
    absolute = {name: None if tensor is None else tensor.abs() for name, tensor in exact.items()}
    magnitude = F.max_pool2d(F.conv2d(**absolute, **case.conv_keywords), **pool)
    assert_as_accurate(result.output, stock, reference, magnitude=magnitude, name="output", **options)

    wanted = [name for name, grad in result.grads.items() if grad is not None]
    if not wanted:
        return

    def conv_and_gradients(tensors: Tensors, routed: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
        conv = F.conv2d(**leaves, **case.conv_keywords)
        if routed is None:
            return conv.detach(), {}
        return conv.detach(), dict(
            zip(
                wanted, torch.autograd.grad(conv, [leaves[name] for name in wanted], routed.to(conv.dtype)), strict=True
            )
        )

    conv, _ = conv_and_gradients(exact, None)
    if result.argmax is None:
        assert result.index is not None
        cell, passes = result.index.view(result.output.shape), ~(result.output <= 0)
    else:
        cell, passes = _cells(case, result.argmax.view(result.output.shape), (conv.shape[-2], conv.shape[-1]))
    chosen = conv.flatten(-2).gather(-1, cell.flatten(-2)).view_as(cell)
    chosen = torch.where(passes, chosen, 0.0).to(dtype)
    assert_as_accurate(chosen, stock, reference, magnitude=magnitude, name="cell that the argmax names", **options)

    def routed(grad_output: Tensor) -> Tensor:
        cells = torch.zeros_like(conv).flatten(-2)
        cells.scatter_add_(-1, cell.flatten(-2), torch.where(passes, grad_output, 0.0).flatten(-2))
        return cells.view_as(conv)

    grad = grad_output.double()
    _, stocks = conv_and_gradients(tensors, routed(grad))
    _, references = conv_and_gradients(exact, routed(grad))
    # Several windows may choose one cell. Each of their gradients is a term of the sum, also where they cancel out.
    _, magnitudes = conv_and_gradients(absolute, routed(grad.abs()))
    for name in wanted:
        # Where an empty batch reaches a gradient it is a sum of nothing.
        assert_as_accurate(
            result.grads[name],
            stocks[name],
            references[name],
            magnitude=magnitudes[name],
            name=f"gradient of {name}",
            **{**options, "allow_zero": allow_zero or options["allow_empty"]},
        )


def judge_addmm(
    case: AddmmCase, tensors: Tensors, grad_output: Tensor, result: Result, *, allow_zero: bool = False
) -> None:
    """Judge an output and its gradients, by the rule of the contract."""
    options: dict[str, Any] = {
        "dtype": result.output.dtype,
        "precision": precision(result.output, "matmul"),
        "allow_zero": allow_zero or result.output.numel() <= 1 or 0 in (case.alpha, case.beta, case.k),
        "allow_empty": True,
    }
    absolute = {name: None if tensor is None else tensor.abs() for name, tensor in double(tensors).items()}
    absolutes = {name: abs(value) for name, value in case.keywords.items()}
    assert_as_accurate(
        result.output,
        stock_addmm_relu(**tensors, **case.keywords),
        stock_addmm_relu(**double(tensors), **case.keywords),
        magnitude=_addmm(**absolute, **absolutes),
        name="output",
        **options,
    )
    wanted = [name for name, grad in result.grads.items() if grad is not None]
    if not wanted:
        return
    masked = torch.where(result.output > 0, grad_output, 0.0)

    def gradients(tensors: Tensors, keywords: dict[str, Any], masked: Tensor) -> dict[str, Tensor]:
        leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
        product = _addmm(**leaves, **keywords)
        grads = torch.autograd.grad(product, [leaves[name] for name in wanted], masked.to(product.dtype))
        return dict(zip(wanted, grads, strict=True))

    stocks = gradients(tensors, case.keywords, masked)
    references = gradients(double(tensors), case.keywords, masked)
    magnitudes = gradients(absolute, absolutes, masked.abs())
    for name in wanted:
        assert_as_accurate(
            result.grads[name],
            stocks[name],
            references[name],
            magnitude=magnitudes[name],
            name=f"gradient of {name}",
            **options,
        )


# --- what both implementations are put through ---------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """How to put one operator through its paces.

    Attributes:
        fused: the operator on trial.
        stock: what it must equal.
        judge: the verdict on random numbers.
        run: runs the operator on trial; tests of kernels watch memory meanwhile.
    """

    fused: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    judge: Callable[..., None]
    run: Callable[..., Result] = run

    def random(self, case: Any, tensors: Tensors, grad_kind: str = "contiguous", *, allow_zero: bool = False) -> Result:
        """Run on random numbers, with an upstream gradient laid out as `grad_kind`, and judge all results."""
        grad_output = upstream(self._output_like(case, tensors), grad_kind)
        result = self.run(self.fused, tensors, case.keywords, grad_output)
        self.judge(case, tensors, grad_output, result, allow_zero=allow_zero)
        return result

    def exact(self, case: Any, tensors: Tensors, grad_kind: str = "contiguous") -> Result:
        """Run on numbers of the exact grid (or NaN and infinities) and require stock's every value."""
        like = self._output_like(case, tensors)
        grad_output = awkward(exact_grid(like.shape, like.dtype, terms=case.terms, device=like.device), grad_kind)
        return self.equal(case, tensors, grad_output)

    def equal(self, case: Any, tensors: Tensors, grad_output: Tensor | None) -> Result:
        """Run, and require stock's every value, shape and dtype."""
        stock = by_definition(self.stock, tensors, case.keywords, grad_output)
        result = self.run(self.fused, tensors, case.keywords, grad_output)
        for (name, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
            assert_same_values(actual, expected, allow_empty=True, name=name)
        return result

    def _output_like(self, case: Any, tensors: Tensors) -> Tensor:
        with torch.no_grad():
            return self.stock(**tensors, **case.keywords)

    def under(self, run: Callable[..., Result]) -> Trial:
        """This trial with another way to run."""
        return replace(self, run=run)


CONV = Trial(fused.conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d, judge_conv)
ADDMM = Trial(addmm_relu, stock_addmm_relu, judge_addmm)
