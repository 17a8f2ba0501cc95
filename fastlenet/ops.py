"""The raw operators, ``torch.ops.fastlenet.*``: schemas, shape functions, and the choice of implementation.

They know nothing of autograd; `fastlenet.autograd` wraps them. Each is opaque to torch.compile, so that a Triton
kernel is launched by its own launcher whatever surrounds it.

``conv2d_relu_max_pool2d`` returns the pooled output and its argmax codes (an empty tensor unless `return_code`).
A backward operator returns one gradient per differentiable input, an empty tensor where `output_mask` asks for none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlenet import aten
from fastlenet.backend import logger, why_aten
from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

Size = Sequence[int]
Implementation = TypeVar("Implementation", bound=Callable[..., Any])

# The fields of ConvPoolGeometry, in its order.
_GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool ceil_mode"
)

library = torch.library.Library("fastlenet", "DEF")
library.define(
    f"conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, bool return_code)"
    " -> (Tensor output, Tensor code)"
)
library.define(
    f"conv2d_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor code, {_GEOMETRY},"
    " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
library.define("addmm_relu(Tensor? input, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha) -> Tensor")
library.define(
    "addmm_relu_backward(Tensor grad_output, Tensor output, Tensor mat1, Tensor mat2, SymInt[] input_size,"
    " Scalar beta, Scalar alpha, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_mat1, Tensor grad_mat2)"
)


def _implements(name: str) -> Callable[[Implementation], Implementation]:
    """Register a function as the operator `name` on every device, with autograd and autocast off inside.

    Both have acted before: autograd is `fastlenet.autograd`'s, and `fastlenet.functional` has cast; a second cast
    inside would change a backward's dtype.
    """

    def register(function: Implementation) -> Implementation:
        @functools.wraps(function)
        def below_autograd(*args: Any) -> Any:
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            with torch._C._AutoDispatchBelowAutograd():
                if torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return function(*args)
                return function(*args)

        library.impl(name, below_autograd, "CompositeExplicitAutograd")
        return function

    return register


def _implementation(operator: str, input: Tensor, cells: int = 1) -> ModuleType:
    """Return the module that implements `operator` for this call: its Triton launchers, or `fastlenet.aten`."""
    reason = why_aten(input, cells)
    if reason is None:
        # Imported here so that triton is imported only when a kernel is first needed.
        if operator == "addmm_relu":
            from fastlenet.kernels import addmm_relu

            return addmm_relu
        from fastlenet.kernels import conv2d_relu_max_pool2d

        return conv2d_relu_max_pool2d
    logger.debug("%s of %s %s runs on ATen: %s", operator, tuple(input.shape), input.dtype, reason)
    return aten


def _or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Stand an empty tensor in for each None: an operator must return tensors."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


@_implements("conv2d_relu_max_pool2d")
def _conv2d_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *fields, return_code = args
    geometry = ConvPoolGeometry(*fields)
    module = _implementation("conv2d_relu_max_pool2d", input, geometry.cells)
    output, code = module.conv2d_relu_max_pool2d(input, weight, bias, geometry, return_code)
    return output, input.new_empty(0, dtype=geometry.code_dtype) if code is None else code


@torch.library.register_fake("fastlenet::conv2d_relu_max_pool2d", lib=library)
def _conv2d_relu_max_pool2d_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    *fields, return_code = args
    geometry = ConvPoolGeometry(*fields)
    output = torch.empty(
        geometry.output_shape(input, weight),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    )
    return output, torch.empty_like(output, dtype=geometry.code_dtype) if return_code else output.new_empty(
        0, dtype=geometry.code_dtype
    )


@_implements("conv2d_relu_max_pool2d_backward")
def _conv2d_relu_max_pool2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *fields, output_mask = args
    geometry = ConvPoolGeometry(*fields)
    module = _implementation("conv2d_relu_max_pool2d", input, geometry.cells)
    grads = module.conv2d_relu_max_pool2d_backward(grad_output, input, weight, code, geometry, output_mask)
    return _or_empty(input, *grads)


@torch.library.register_fake("fastlenet::conv2d_relu_max_pool2d_backward", lib=library)
def _conv2d_relu_max_pool2d_backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    layout = memory_format(input, weight)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(
        (input.new_empty(shape).contiguous(memory_format=layout) if len(shape) == 4 else input.new_empty(shape))
        if needed
        else input.new_empty(0)
        for needed, shape in zip(args[-1], shapes, strict=True)
    )


@_implements("addmm_relu")
def _addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    return _implementation("addmm_relu", mat1).addmm_relu(input, mat1, mat2, beta, alpha)


@torch.library.register_fake("fastlenet::addmm_relu", lib=library)
def _addmm_relu_fake(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    return mat1.new_empty(mat1.shape[0], mat2.shape[1])


@_implements("addmm_relu_backward")
def _addmm_relu_backward(
    grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    grads = _implementation("addmm_relu", mat1).addmm_relu_backward(grad_output, output, mat1, mat2, *args)
    return _or_empty(mat1, *grads)


@torch.library.register_fake("fastlenet::addmm_relu_backward", lib=library)
def _addmm_relu_backward_fake(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Size,
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    need_input, need_mat1, need_mat2 = output_mask
    transposed = aten.column_major(mat2)
    return _or_empty(
        mat1,
        mat1.new_empty(input_size) if need_input else None,
        mat1.new_empty(mat1.shape) if need_mat1 else None,
        (mat1.new_empty(mat2.shape[::-1]).t() if transposed else mat1.new_empty(mat2.shape)) if need_mat2 else None,
    )
