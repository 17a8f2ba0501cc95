"""conv2d + relu + max-pool as PyTorch sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlenet import checks, reference
from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format, output_format
from fastlenet.ops.registration import (
    Operator,
    Registered,
    composed_backward,
    define,
    gradients,
    operators,
    or_empty,
)
from fastlenet.private import runs_eagerly

_NAME = "conv2d_relu_max_pool2d"
_GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool ceil_mode"
)


# --- the operators: schemas, shapes, cost ---------------------------------------------------------------------------


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *fields, return_argmax = args
    geometry = ConvPoolGeometry(*fields)
    output = empty_output(input, weight, geometry)
    like = output if return_argmax else output.new_empty(0)
    return output, torch.empty_like(like, dtype=geometry.argmax_dtype)


def empty_output(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Make the pooled output of a batched input, without values."""
    shape, layout = geometry.output_shape(input, weight), output_format(input, weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    layout = memory_format(input, weight)
    need_input, need_weight, need_bias = args[-1]
    grads = (
        input.new_empty(input.shape).contiguous(memory_format=layout) if need_input else None,
        input.new_empty(weight.shape).contiguous(memory_format=layout) if need_weight else None,
        input.new_empty(weight.shape[0]) if need_bias else None,
    )
    return or_empty(input, grads)


define(
    f"{_NAME}(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, bool return_argmax)"
    " -> (Tensor output, Tensor argmax)",
    _fake,
)
define(
    f"{_NAME}_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor argmax, {_GEOMETRY},"
    " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


def geometry_of(fields: Sequence[Any]) -> ConvPoolGeometry:
    """Make a geometry from an operator's arguments, which have lists for pairs."""
    return ConvPoolGeometry(*(tuple(field) if isinstance(field, (list, tuple)) else field for field in fields))


# --- autograd -------------------------------------------------------------------------------------------------------


class ConvReLUMaxPool2dFunction(torch.autograd.Function):
    """``max_pool2d(relu(conv2d(input, weight, bias)))``.

    Saves the input, the weight and the argmax. The argmax is `ConvPoolGeometry.no_winner` where relu was closed. It
    saves nothing of the convolution's size. It does not save the output, so the output may be modified in place.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], known: Any
    ) -> Tensor:
        """Take an input, batched or not, and the fields of a `ConvPoolGeometry`."""
        images = input if input.dim() == 4 else input.unsqueeze(0)
        if known is None:
            output, argmax = operators.conv2d_relu_max_pool2d(images, weight, bias, *geometry, True)
        else:
            output, argmax = known.forward(images, weight, bias, geometry, True)
        ctx.save_for_backward(input, weight, argmax)
        ctx.geometry, ctx.known = geometry, known
        return output if input.dim() == 4 else output.squeeze_(0).contiguous()  # plain, as stock's pool has it

    @staticmethod
    @runs_eagerly
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        input, weight, argmax = ctx.saved_tensors
        batched, grad_output = input.dim() == 4, grad_output.resolve_neg()
        operands = (grad_output, input) if batched else (grad_output.unsqueeze(0), input.unsqueeze(0))
        saved, geometry = (*operands, weight, argmax), ctx.geometry
        grad_input, *grads = gradients(
            ctx.known,
            grad_output,
            lambda: ctx.known.backward(*saved, geometry, needs),
            lambda: reference.requested(operators.conv2d_relu_max_pool2d_backward(*saved, *geometry, needs), needs),
            lambda: reference.conv2d_relu_max_pool2d_backward(*saved, ConvPoolGeometry(*geometry), needs),
        )
        if not batched and grad_input is not None:
            grad_input = grad_input.squeeze(0) if composed_backward(grad_output) else grad_input.squeeze_(0)
        return grad_input, *grads, None, None


# --- what `fastlenet.selection` must know ---------------------------------------------------------------------------


class _Operator(Operator):
    name = _NAME

    def operands(self, *tensors: Any) -> tuple[Any, ...]:
        input, weight, bias = tensors
        return input if input.dim() == 4 else input.unsqueeze(0), weight, bias

    def check(self, settings: ConvPoolGeometry, *tensors: Any) -> None:
        input, weight, bias = tensors
        checks.same_type(_NAME, ("input", input), weight=weight, bias=bias)
        compose = functools.partial(self.composition, settings)
        small = checks.without_images(compose, (settings,))
        checks.by_stock(_NAME, small, compose, settings, input=input, weight=weight, bias=bias)

    def composition(self, settings: ConvPoolGeometry, *tensors: Any, run: Any = None) -> Tensor:
        input, weight, bias = tensors
        return reference.conv2d_relu_max_pool2d(input, weight, bias, settings)

    def quick(self, settings: ConvPoolGeometry, *tensors: Any) -> Tensor:
        input, weight, bias = tensors
        return reference.conv2d_relu_max_pool2d(input, weight, bias, settings, quick=True)

    def fused(self, settings: ConvPoolGeometry, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        input, weight, bias = tensors
        if differentiable:
            return ConvReLUMaxPool2dFunction.apply(
                input, weight, bias, tuple(settings) if known is None else settings, known
            )
        images = input if input.dim() == 4 else input.unsqueeze(0)
        if known is None:
            output, _ = operators.conv2d_relu_max_pool2d(images, weight, bias, *settings, False)
            return output if input.dim() == 4 else output.squeeze(0).contiguous()
        output, _ = known.forward(images, weight, bias, settings, False)
        return output if input.dim() == 4 else output.squeeze_(0).contiguous()

    def uncovered(self, implementation: str, settings: ConvPoolGeometry, *tensors: Any) -> str | None:
        input, weight, _ = tensors
        if implementation == "triton":
            cells = settings.window_size
            return f"the Triton kernels cover pooling windows of up to 255 cells, not {cells}" if cells > 255 else None
        from fastlenet import cpu

        return cpu.covers(input.dtype, (1, *input.shape)[-4:], weight, settings)

    def slower(self, settings: ConvPoolGeometry, differentiable: bool, *tensors: Any) -> str | None:
        from fastlenet import cpu

        input, weight, _ = tensors
        return cpu.rejects(input if input.dim() == 4 else input.unsqueeze(0), weight, settings, differentiable)

    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if name == "triton":
            from fastlenet.kernels import conv2d_relu_max_pool2d as launchers
            from fastlenet.kernels.plans import Kind, Kinds

            return Kind(launchers.conv2d_relu_max_pool2d), Kinds(launchers.conv2d_relu_max_pool2d_backward)
        if name == "cpu":
            from fastlenet import cpu

            return cpu.conv2d_relu_max_pool2d, cpu.conv2d_relu_max_pool2d_backward
        return _reference_forward, _reference_backward

    def registered(self) -> dict[str, Registered]:
        return {_NAME: Registered(_call, _run), f"{_NAME}_backward": Registered(_backward_call, _run_backward)}


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    return geometry_of(args[:-1]), (input, weight, bias), args[-1]


def _run(known: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *fields, return_argmax = args
    geometry = geometry_of(fields)
    output, argmax = known.forward(input, weight, bias, geometry, return_argmax)
    return output, input.new_empty(0, dtype=geometry.argmax_dtype) if argmax is None else argmax


def _backward_call(grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, *args: Any) -> Any:
    return geometry_of(args[:-1]), (input, weight, None), True


def _run_backward(known: Any, grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, argmax, *fields, output_mask = args
    grads = known.backward(grad_output, input, weight, argmax, geometry_of(fields), tuple(output_mask))
    return or_empty(input, grads)


def _reference_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    layout = output_format(input, weight)
    if not return_argmax:
        return reference.conv2d_relu_max_pool2d(input, weight, bias, geometry).contiguous(memory_format=layout), None
    output, argmax = reference.conv2d_relu_max_pool2d_with_argmax(input, weight, bias, geometry)
    return output.contiguous(memory_format=layout), argmax.contiguous(memory_format=layout)


def _reference_backward(grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any) -> reference.Grads:
    *grads, grad_bias = reference.conv2d_relu_max_pool2d_backward(grad_output, input, weight, *args)
    # Stock's convolutions choose other layouts. The shape function promises these.
    layout = memory_format(input, weight)
    return *(None if grad is None else grad.contiguous(memory_format=layout) for grad in grads), grad_bias


CONV2D_RELU_MAX_POOL2D = _Operator()
