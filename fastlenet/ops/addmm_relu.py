"""addmm + relu as PyTorch sees it, and linear + relu, which is a call of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlenet import checks, reference
from fastlenet.ops.registration import (
    Operator,
    Registered,
    define,
    gradients,
    keep,
    kept,
    operators,
    or_empty,
    shaped,
)
from fastlenet.private import runs_eagerly

_NAME = "addmm_relu"


# --- the operators: schemas, shapes, cost ---------------------------------------------------------------------------


def _fake(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    return mat1.new_empty(mat1.shape[0], mat2.shape[1])


def _backward_fake(
    grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, input_size: Sequence[int], *args: Any
) -> tuple[Tensor, ...]:
    need_input, need_mat1, need_mat2 = args[-1]
    transposed = reference.column_major(mat2)
    grads = (
        mat1.new_empty(input_size) if need_input else None,
        mat1.new_empty(mat1.shape) if need_mat1 else None,
        (mat1.new_empty(mat2.shape[::-1]).t() if transposed else mat1.new_empty(mat2.shape)) if need_mat2 else None,
    )
    return or_empty(mat1, grads)


define(f"{_NAME}(Tensor? input, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha) -> Tensor", _fake)
define(
    f"{_NAME}_backward(Tensor grad_output, Tensor output, Tensor mat1, Tensor mat2, SymInt[] input_size,"
    " Scalar beta, Scalar alpha, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_mat1, Tensor grad_mat2)",
    _backward_fake,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class AddmmReLUFunction(torch.autograd.Function):
    """``relu(beta * input + alpha * (mat1 @ mat2))``; saves mat1, mat2 and the output, for relu's mask."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor | None,
        mat1: Tensor,
        mat2: Tensor,
        beta: float,
        alpha: float,
        shape: tuple[int, ...] | None,
        known: Any,
    ) -> Tensor:
        """Take matrices (M, K) and (K, N), and an input that broadcasts to (M, N), the output's own shape."""
        output = (operators.addmm_relu if known is None else known.forward)(input, mat1, mat2, beta, alpha)
        output = output if shape is None else shaped(output, shape, known)
        if known is None:
            ctx.save_for_backward(mat1, mat2, output)
        else:
            # Each matrix is read for the other's gradient alone.
            _, need_mat1, need_mat2, *_ = ctx.needs_input_grad
            keep(ctx, (mat1, mat2), (need_mat2, need_mat1), output)
        ctx.rest = () if input is None else tuple(input.shape), beta, alpha
        ctx.known = known
        return output

    @staticmethod
    @runs_eagerly
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        mat1, mat2, output = ctx.saved_tensors if ctx.known is None else kept(ctx)
        grad_output = grad_output.resolve_neg()
        if output.dim() != 2:
            size = mat1.shape[0], mat2.shape[1]
            output, grad_output = output.reshape(size), grad_output.reshape(size)
        args = mat1, mat2, *ctx.rest, needs
        grads = gradients(
            ctx.known,
            grad_output,
            lambda: ctx.known.backward(grad_output, output, *args),
            lambda: reference.requested(operators.addmm_relu_backward(grad_output, output, *args), needs),
            # The mask itself is not differentiated.
            lambda: reference.addmm_relu_backward(grad_output, output.detach(), *args),
        )
        return *grads, None, None, None, None


# --- what `fastlenet.selection` must know ---------------------------------------------------------------------------


class _Addmm(Operator):
    name = _NAME
    main = 1

    def check(self, settings: tuple[float, float], *tensors: Any) -> None:
        input, mat1, mat2 = tensors
        checks.same_type(_NAME, ("mat1", mat1), mat2=mat2, input=input)

        def small(input: Tensor | None, mat1: Tensor, mat2: Tensor) -> None:
            torch.mm(mat1[:0], mat2)
            if input is not None:
                input.expand(mat1.shape[0], mat2.shape[1])

        checks.by_stock(_NAME, small, functools.partial(self.composition, settings), input=input, mat1=mat1, mat2=mat2)

    def composition(self, settings: tuple[float, float], *tensors: Any, run: Any = None) -> Tensor:
        input, mat1, mat2 = tensors
        return reference.addmm_relu(input, mat1, mat2, *settings)

    def fused(self, settings: tuple[float, float], known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        input, mat1, mat2 = tensors
        if differentiable:
            return AddmmReLUFunction.apply(input, mat1, mat2, *settings, None, known)
        return (operators.addmm_relu if known is None else known.forward)(input, mat1, mat2, *settings)

    def uncovered(self, implementation: str, settings: Any, *tensors: Any) -> str | None:
        return None if implementation == "triton" else "on a CPU PyTorch's own linear layers are as fast"

    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if name == "triton":
            from fastlenet.kernels import addmm_relu as launchers
            from fastlenet.kernels.plans import Kinds

            forward, backward = Kinds(launchers.launch_forward), Kinds(launchers.launch_backward)
            return (
                functools.partial(launchers.addmm_relu, launcher=forward),
                functools.partial(launchers.addmm_relu_backward, launcher=backward),
            )
        return reference.addmm_relu, reference.addmm_relu_backward

    def registered(self) -> dict[str, Registered]:
        return {_NAME: Registered(_call, _run), f"{_NAME}_backward": Registered(_backward_call, _run_backward)}


def _call(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Any:
    return (beta, alpha), (input, mat1, mat2), False


def _run(known: Any, *args: Any) -> Tensor:
    return known.forward(*args)


def _backward_call(grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, *args: Any) -> Any:
    return tuple(args[1:3]), (None, mat1, mat2), True


def _run_backward(known: Any, grad_output: Tensor, output: Tensor, mat1: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return or_empty(mat1, known.backward(grad_output, output, mat1, *args))


class _Linear(_Addmm):
    """``relu(input @ weight^T + bias)`` of any leading dimensions, for which there are no settings."""

    def operands(self, *tensors: Any) -> tuple[Any, ...]:
        input, weight, bias = tensors
        return bias, input, weight.t() if weight.dim() == 2 else weight.unsqueeze(1)

    def check(self, settings: Any, *tensors: Any) -> None:
        input, weight, bias = tensors
        checks.same_type("linear_relu", ("input", input), weight=weight, bias=bias)

        def small(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
            torch.mm(input.reshape(-1, input.shape[-1])[:0], weight.t())
            if bias is not None:
                bias.expand(*input.shape[:-1], weight.shape[0])

        checks.by_stock("linear_relu", small, reference.linear_relu, input=input, weight=weight, bias=bias)

    def composition(self, settings: Any, *tensors: Any, run: Any = None) -> Tensor:
        return reference.linear_relu(*tensors)

    def fused(self, settings: Any, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        input, weight, bias = tensors
        leading, matrix = input.shape[:-1], weight if weight.dim() == 2 else weight.unsqueeze(0)
        rows, shape = input, None
        if input.dim() != 2 or weight.dim() != 2:
            rows = input.reshape(leading.numel(), input.shape[-1])
            shape = tuple(leading) if weight.dim() == 1 else (*leading, weight.shape[0])
            if bias is not None and bias.dim() > 1 and leading:
                bias = bias.expand(*leading, matrix.shape[0]).reshape(-1, matrix.shape[0])
        if differentiable:
            return AddmmReLUFunction.apply(bias, rows, matrix.t(), 1, 1, shape, known)
        output = (operators.addmm_relu if known is None else known.forward)(bias, rows, matrix.t(), 1, 1)
        return output if shape is None else shaped(output, shape, known)

    def registered(self) -> dict[str, Registered]:
        return {}


ADDMM_RELU, LINEAR_RELU = _Addmm(), _Linear()
