"""BatchNorm with the batch's own statistics + relu + max-pool, which `fastlenet.fuse` puts behind a convolution.

No graph has it as an operator of its own: compilers and exporters see the stock operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlenet import reference
from fastlenet.kernels.geometry import ConvPoolGeometry
from fastlenet.ops.registration import Operator, gradients
from fastlenet.private import runs_eagerly


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


# --- autograd -------------------------------------------------------------------------------------------------------


class BatchNormReLUMaxPool2dFunction(torch.autograd.Function):
    """``max_pool2d(relu(batch_norm(input, ...)))``.

    Saves the input, the weight, the argmax, and four numbers for each channel. It does not save the output, so the
    output may be modified in place.
    """

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
        """Take the operands of the reference, the other arguments, and the entry of this kind of call."""
        output, argmax, factors = known.forward(input, running_mean, running_var, weight, bias, *settings)
        ctx.save_for_backward(input, weight, argmax, factors)
        ctx.geometry, ctx.known = settings.geometry, known
        return output

    @staticmethod
    @runs_eagerly
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        input, weight, argmax, factors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[place] for place in (0, 3, 4)]

        def composed() -> reference.Grads:
            channels = input.shape[1]
            winners, (minus_mean, inverse) = argmax[..., :channels].permute(0, 3, 1, 2), factors[:2, :channels]
            return reference.batch_norm_relu_max_pool2d_backward(
                grad_output, input, weight, winners, -minus_mean, inverse, ctx.geometry, needs
            )

        grad_input, grad_weight, grad_bias = gradients(
            ctx.known,
            grad_output,
            lambda: ctx.known.backward(grad_output.resolve_neg(), input, argmax, factors, ctx.geometry, needs),
            composed,  # No graph has the operator.
            composed,
        )
        return grad_input, None, None, grad_weight, grad_bias, None, None


# --- what `fastlenet.selection` must know ---------------------------------------------------------------------------


class _Operator(Operator):
    name = "batch_norm_relu_max_pool2d"

    def check(self, settings: Settings, *tensors: Any) -> None:
        """Do nothing: TorchDynamo has run stock's checks on what `fuse` replaces."""

    def composition(self, settings: Settings, *tensors: Any, run: Any = None) -> Tensor:
        return reference.batch_norm_relu_max_pool2d(*tensors, **settings._asdict())

    def fused(self, settings: Settings, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        if known is None:
            return self.composition(settings, *tensors)
        if differentiable:
            return BatchNormReLUMaxPool2dFunction.apply(*tensors, settings, known)
        output: Tensor = known.forward(*tensors, *settings)[0]
        return output

    def uncovered(self, implementation: str, settings: Settings, *tensors: Any) -> str | None:
        if implementation == "triton":
            return "no Triton kernel computes BatchNorm"
        from fastlenet import cpu

        return cpu.batch_norm_relu_max_pool2d_covers(settings.geometry, *tensors)

    def slower(self, settings: Settings, differentiable: bool, *tensors: Any) -> str | None:
        from fastlenet import cpu

        return cpu.batch_norm_relu_max_pool2d_rejects(tensors[0])

    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if name == "cpu":
            from fastlenet import cpu

            return cpu.batch_norm_relu_max_pool2d, cpu.batch_norm_relu_max_pool2d_backward
        return reference.batch_norm_relu_max_pool2d, reference.batch_norm_relu_max_pool2d_backward


BATCH_NORM_RELU_MAX_POOL2D = _Operator()
