"""BatchNorm with the batch's own statistics + relu + max-pool, which `fastlenet.fuse` puts behind a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.errors import KernelError
from fastlenet.kernels.geometry import ConvPoolGeometry
from fastlenet.ops.registration import Operator, Registered, composed_backward, no_autocast


class Settings(NamedTuple):
    """Arguments other than tensors.

    Attributes:
        momentum: the weight of a batch in the running statistics.
        eps: is added to the variance.
        geometry: of the pool; what it says of a convolution is not used.
    """

    momentum: float
    eps: float
    geometry: ConvPoolGeometry


def composed(
    settings: Settings,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute a call with stock operators."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, True, settings.momentum, settings.eps)
    size, stride, padding, dilation, ceil_mode = settings.geometry[4:]
    return F.max_pool2d(F.relu(output), size, stride, padding, dilation, ceil_mode)


class BatchNormReLUMaxPool2dFunction(torch.autograd.Function):
    """Saves the input, one byte for each number of the output, and a few numbers for each channel."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: Settings,
        known: Any,
    ) -> Tensor:
        """Take what `composed` takes, and the entry of this kind of call."""
        output, *rest = known.forward(input, running_mean, running_var, weight, bias, *settings)
        ctx.save_for_backward(input, weight, bias, *rest)
        ctx.settings, ctx.known = settings, known
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        input, weight, bias, *rest = ctx.saved_tensors
        needs = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
        grads: tuple[Tensor | None, ...] | None = None
        if not composed_backward(grad_output):
            try:
                grads = ctx.known.backward(grad_output, input, *rest, ctx.settings.geometry, needs[0])
            except KernelError:
                ctx.known.give_up()
        if grads is None:
            wanted = [tensor for tensor, needed in zip((input, weight, bias), needs, strict=True) if needed]
            with torch.enable_grad(), no_autocast(input.device.type):
                output = composed(ctx.settings, input, None, None, weight, bias)
            found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=torch.is_grad_enabled()))
            grads = tuple(next(found) if needed else None for needed in needs)
        first, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return first, None, None, *others, None, None


class _Operator(Operator):
    name = "batch_norm_relu_max_pool2d"

    def check(self, settings: Settings, *tensors: Any) -> None:
        """Do nothing: TorchDynamo has run stock's checks on what `fuse` replaces."""

    def composition(self, settings: Settings, *tensors: Any, run: Any = None) -> Tensor:
        return composed(settings, *tensors)

    def fused(self, settings: Settings, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        if known is None:
            return composed(settings, *tensors)
        if differentiable:
            return BatchNormReLUMaxPool2dFunction.apply(*tensors, settings, known)
        output: Tensor = known.forward(*tensors, *settings)[0]
        return output

    def uncovered(self, implementation: str, settings: Settings, *tensors: Any) -> str | None:
        if implementation == "triton":
            return "no Triton kernel computes BatchNorm"
        from fastlenet import cpu

        return cpu.batch_norm_relu_max_pool2d_covers(settings.geometry, *tensors)

    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        from fastlenet import cpu

        return cpu.batch_norm_relu_max_pool2d, cpu.batch_norm_relu_max_pool2d_backward

    def registered(self) -> dict[str, Registered]:
        return {}


BATCH_NORM_RELU_MAX_POOL2D = _Operator()
