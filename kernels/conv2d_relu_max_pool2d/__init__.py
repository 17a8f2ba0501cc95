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

from .. import configurations, rules
from ..geometry import ConvPoolGeometry, memory_format
from ..plans import planned
from ..runtime import contiguous, dot_precision
from . import general, patch_dot, patch_fma

DESIGNS = {"general": general, "patch_dot": patch_dot, "patch_fma": patch_fma}


def _configured(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor
) -> tuple[ModuleType, Mapping[str, int], bool]:
    """Return the design and the configuration for this call, and whether the operands lie as channels_last.

    The table decides first, then the rule, and the general kernels take what is left. Nothing depends on the number of
    images.
    """
    precision = dot_precision(input.dtype, torch.backends.cudnn.conv.fp32_precision)
    known = configurations.remembered()
    key = "design", direction, geometry, input.dtype, precision, input.shape, weight.shape
    if key not in known:
        known[key] = _chosen(direction, geometry, input, weight, precision)
    design, options = known[key]
    last = memory_format(input, weight) == torch.channels_last
    # What remains is the tensors' places in memory. Matrix units' loads take neighbours in pairs.
    if design is patch_dot and (last or input.data_ptr() % 16):
        return general, {}, last
    return design, options, last


def _chosen(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, precision: str
) -> tuple[ModuleType, Mapping[str, int]]:
    """Choose by types, shapes and geometry."""
    kernel = f"conv2d_relu_max_pool2d.{direction}"
    entry = configurations.find(kernel, input.dtype, precision, geometry.key(input, weight))
    # The library may be listed where Triton is forced.
    if entry is not None and entry.design in DESIGNS:
        found: configurations.Configuration | rules.Rule | None = entry
    elif configurations.architecture() == "interpreted":
        found = None
    else:
        (out_channels, in_channels), size = weight.shape[:2], (weight.shape[2], weight.shape[3])
        found = rules.choose(direction, geometry, in_channels, out_channels, size)
    if found is None:
        return general, {}
    design = DESIGNS[found.design]
    if design is not general and (0 in input.shape or not design.covers(geometry, input, weight)):
        return general, {}
    return design, found.options


def _laid_out(last: bool, *tensors: Tensor) -> list[Tensor]:
    """Lay operands out as a specialised kernel takes them: dense, in one layout."""
    return [contiguous(tensor, torch.channels_last if last else torch.contiguous_format) for tensor in tensors]


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
    design, options, last = _configured("forward", geometry, input, weight)
    if design is general:
        return general.forward(input, weight, bias, geometry, return_argmax, options)
    bias = None if bias is None else contiguous(bias)
    (input,) = _laid_out(last, input)
    return design.forward(input, contiguous(weight), bias, geometry, return_argmax, last, options)


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
        design, options, last = _configured("grad_input", geometry, input, weight)
        if design is general:
            grad_input = general.grad_input(grad_output, input, weight, argmax, geometry, options)
        else:
            # Of the images only the shape matters.
            grad, code = _laid_out(last, grad_output, argmax)
            grad_input = design.grad_input(grad, input, contiguous(weight), code, geometry, last, options)
    if need_weight or need_bias:
        design, options, last = _configured("grad_weight", geometry, input, weight)
        if design is general:
            operands = grad_output, input, weight, argmax, geometry, options
            return grad_input, *general.grad_weight(*operands, need_weight, need_bias)
        grad, images, code = _laid_out(last, grad_output, input, argmax)
        grad_weight, grad_bias = design.grad_weight(grad, images, contiguous(weight), code, geometry, last, options)
        grad_weight = contiguous(grad_weight, memory_format(input, weight))
    return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None
