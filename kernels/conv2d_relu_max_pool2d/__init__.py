"""conv2d + relu + max-pool in one kernel, and its gradients.

One operator, three designs, a file each:

- `general`: every geometry that PyTorch allows, sizes at run time.
- `patch_dot`: small non-overlapping 2x2 pools on matrix units (tf32, float16, bfloat16).
- `patch_fma`: the same pools in exact float32, on the FMA units.

`configurations` lists where a design other than the general one runs, and with which tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import configurations
from ..geometry import ConvPoolGeometry, memory_format
from ..plans import planned
from ..runtime import contiguous, dot_precision
from . import general, patch_dot, patch_fma

DESIGNS = {"general": general, "patch_dot": patch_dot, "patch_fma": patch_fma}


def _configured(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor
) -> tuple[ModuleType, Mapping[str, int]]:
    """Return the design and the configuration listed for this call; else the general kernels with tiles of their own.

    A listed design compiles for the shape of the images, never for their number.
    """
    precision = dot_precision(input.dtype, torch.backends.cudnn.conv.fp32_precision)
    known = configurations.remembered()
    key = "design", direction, geometry, input.dtype, precision, input.shape, weight.shape
    if key not in known:
        known[key] = _listed(f"conv2d_relu_max_pool2d.{direction}", geometry, input, weight, precision)
    design, options = known[key]
    # What remains is the tensors' places in memory. A patch kernel's loads take neighbours in pairs.
    if design is not general and (memory_format(input, weight) != torch.contiguous_format or input.data_ptr() % 16):
        return general, {}
    return design, options


def _listed(
    kernel: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, precision: str
) -> tuple[ModuleType, Mapping[str, int]]:
    """Look the design and the configuration up by types, shapes and geometry."""
    entry = configurations.find(kernel, input.dtype, precision, geometry.key(input, weight))
    # The library may be listed where Triton is forced.
    design = None if entry is None else DESIGNS.get(entry.design)
    if entry is None or design is None:
        return general, {}
    if design is not general and (0 in input.shape or not design.covers(geometry, input, weight)):
        return general, {}
    return design, entry.options


@planned(torch.backends.cudnn.conv)
def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        input: (N, G * C, H, W), any strides.
        weight: (G * O, C, KH, KW).
        bias: (G * O,) or None.
        geometry: of the convolution and the pool; windows of up to 255 cells.
        return_argmax: whether to return what a backward needs.

    Returns:
        The pooled output (N, G * O, PH, PW), channels_last if input or weight is, and its argmax or None.
    """
    design, options = _configured("forward", geometry, input, weight)
    if design is general:
        return general.forward(input, weight, bias, geometry, return_argmax, options)
    bias = None if bias is None else contiguous(bias)
    return design.forward(contiguous(input), contiguous(weight), bias, return_argmax, options)


@planned(torch.backends.cudnn.conv)
def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch those kernels of the backward that `output_mask` asks for.

    Args:
        grad_output: (N, G * O, PH, PW), any strides.
        input: the forward's.
        weight: the forward's.
        argmax: the forward's argmax.
        geometry: the forward's.
        output_mask: whether to compute grad_input, grad_weight and grad_bias.

    Returns:
        The three gradients in the layout of their tensors, None where not asked for.
    """
    need_input, need_weight, need_bias = output_mask
    grad_input = grad_weight = grad_bias = None
    if need_input:
        design, options = _configured("grad_input", geometry, input, weight)
        if design is general:
            grad_input = general.grad_input(grad_output, input, weight, argmax, geometry, options)
        else:
            tensors = (contiguous(tensor) for tensor in (grad_output, input, weight, argmax))
            grad_input = design.grad_input(*tensors, options)
    if need_weight or need_bias:
        design, options = _configured("grad_weight", geometry, input, weight)
        if design is general:
            operands = grad_output, input, weight, argmax, geometry, options
            return grad_input, *general.grad_weight(*operands, need_weight, need_bias)
        tensors = (contiguous(tensor) for tensor in (grad_output, input, weight, argmax))
        grad_weight, grad_bias = design.grad_weight(*tensors, options)
    return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None
