"""The differentiable operators: one ``torch.autograd.Function`` around each pair of raw operators."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlenet import ops  # noqa: F401  (registers torch.ops.fastlenet)


class ConvReLUMaxPool2dFunction(torch.autograd.Function):
    """``max_pool2d(relu(conv2d(input, weight, bias)))``.

    Saves the input, the weight and the argmax codes, of which `ConvPoolGeometry.dropped` tells where relu was off:
    nothing at the convolution's resolution, and not the output, which its user may therefore modify in place.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Take a batched input and the fields of a `ConvPoolGeometry`; return the pooled output and the codes."""
        return torch.ops.fastlenet.conv2d_relu_max_pool2d(input, weight, bias, *geometry, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward needs."""
        input, weight, _, ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        if grad_output is None or not any(needs):
            return None, None, None, None
        grads = torch.ops.fastlenet.conv2d_relu_max_pool2d_backward(
            grad_output, *ctx.saved_tensors, *ctx.geometry, needs
        )
        return *_requested(grads, needs), None


class AddmmReLUFunction(torch.autograd.Function):
    """``relu(beta * input + alpha * (mat1 @ mat2))``; saves mat1, mat2 and the output, whose sign is relu's mask."""

    @staticmethod
    def forward(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
        """Take matrices mat1 (M, K) and mat2 (K, N) and an input that broadcasts to (M, N); return (M, N)."""
        return torch.ops.fastlenet.addmm_relu(input, mat1, mat2, beta, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the backward needs."""
        input, mat1, mat2, ctx.beta, ctx.alpha = inputs
        ctx.input_size = None if input is None else input.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, mat1, mat2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        if grad_output is None or not any(needs):
            return None, None, None, None, None
        grads = torch.ops.fastlenet.addmm_relu_backward(
            grad_output, *ctx.saved_tensors, ctx.input_size or (), ctx.beta, ctx.alpha, needs
        )
        return *_requested(grads, needs), None, None


for _function in (ConvReLUMaxPool2dFunction, AddmmReLUFunction):
    # Function.apply reads forward's signature at every call; reading it once saves a fifth of a small call's overhead.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _requested(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Turn the operators' empty stand-ins back into None."""
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
