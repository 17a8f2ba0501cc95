"""conv2d + relu + max-pool in one kernel, and its gradients.

One operator, six variants, a file each, and `shared`, which has what several of them use:

- `general`: every geometry that PyTorch allows, sizes at run time.
- `patch_fma`: few channels, on the FMA units, exactly; any stride, padding and small pool.
- `patch_dot`: non-overlapping 2x2 pools on matrix units (tf32, float16, bfloat16), image sizes compiled in.
- `block_dot`: the forward and the weight's gradient of many channels on matrix units; any stride, padding and small
  pool.
- `spread_dot`: the input's gradient of many channels on matrix units, by a workspace.
- `column_fma`: the input's gradient of small images, exactly, image sizes compiled in.

`rules` says which of them runs and with which tile; `configurations` lists where a clock, or LeNet's own figures, say
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import configurations, rules
from ..geometry import ConvPoolGeometry, memory_format
from ..joint import Later
from ..runtime import contiguous, dot_precision
from . import block_dot, column_fma, general, patch_dot, patch_fma, spread_dot

VARIANTS = {
    "block_dot": block_dot,
    "column_fma": column_fma,
    "general": general,
    "patch_dot": patch_dot,
    "patch_fma": patch_fma,
    "spread_dot": spread_dot,
}


def _configured(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor
) -> tuple[ModuleType, Mapping[str, int], bool]:
    """Return the variant and the configuration for this call, and whether the operands lie as channels_last.

    The table decides first, then the rule, and the general kernels take what is left. Nothing depends on the number of
    images.
    """
    precision = dot_precision(input.dtype, torch.backends.cudnn.conv.fp32_precision)
    known = configurations.remembered()
    key = "variant", direction, geometry, input.dtype, precision, input.shape, weight.shape
    if key not in known:
        known[key] = _chosen(direction, geometry, input, weight, precision)
    chosen, ruled = known[key]
    last = memory_format(input, weight) == torch.channels_last
    # What remains is the tensors' places in memory, for which some variants are compiled.
    dense = not last and input.data_ptr() % 16 == 0
    variant, options = chosen if dense or chosen[0] not in (patch_dot, column_fma) else ruled
    return variant, options, last


Choice = tuple[ModuleType, Mapping[str, int]]


def _chosen(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, precision: str
) -> tuple[Choice, Choice]:
    """Choose by types, shapes and geometry: what the table says, else the rule, and what the rule alone says."""
    (out_channels, in_channels), kernel = weight.shape[:2], (weight.shape[2], weight.shape[3])
    rule = None
    architecture = configurations.architecture()
    if architecture != "interpreted":
        exact = input.dtype == torch.float32 and precision == "ieee"
        rule = rules.choose(direction, geometry, in_channels, out_channels, kernel, exact, architecture)
    ruled = _usable(rule, geometry, input, weight) or (general, {})
    entry = configurations.find(
        f"conv2d_relu_max_pool2d.{direction}", input.dtype, precision, geometry.key(input, weight)
    )
    return _usable(entry, geometry, input, weight) or ruled, ruled


def _usable(
    found: configurations.Configuration | rules.Rule | None, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor
) -> Choice | None:
    """Return the variant that was found with its options, or None if it cannot compute this call."""
    # The library may be listed where Triton is forced.
    variant = None if found is None else VARIANTS.get(found.variant)
    if found is None or variant is None:
        return None
    if variant is not general and (0 in input.shape or not variant.covers(geometry, input, weight)):
        return None
    return variant, found.options


def _laid_out(last: bool, *tensors: Tensor) -> list[Tensor]:
    """Lay operands out as a specialised kernel takes them: dense, in one layout."""
    return [contiguous(tensor, torch.channels_last if last else torch.contiguous_format) for tensor in tensors]


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
    variant, options, last = _configured("forward", geometry, input, weight)
    if variant is general:
        return general.forward(input, weight, bias, geometry, return_argmax, options)
    bias = None if bias is None else contiguous(bias)
    (input,) = _laid_out(last, input)
    return variant.forward(input, contiguous(weight), bias, geometry, return_argmax, last, options)


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
    later: Later | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch those kernels of the backward that `output_mask` asks for.

    Args:
        grad_output: (N, G * O, PH, PW), any strides.
        input: the forward's.
        weight: the forward's.
        argmax: the forward's argmax.
        geometry: the forward's.
        output_mask: whether to compute grad_input, grad_weight and grad_bias.
        later: as in `joint.launch_job`; what is noted there makes the weight's and the bias' gradients whole.

    Returns:
        The three gradients in the layout of their tensors, None where not asked for.
    """
    need_input, need_weight, need_bias = output_mask
    grad_input = grad_weight = grad_bias = None
    if need_input:
        variant, options, last = _configured("grad_input", geometry, input, weight)
        if variant is general:
            grad_input = general.grad_input(grad_output, input, weight, argmax, geometry, options)
        else:
            # Of the images only the shape matters.
            grad, winners = _laid_out(last, grad_output, argmax)
            grad_input = variant.grad_input(grad, input, contiguous(weight), winners, geometry, last, options)
    if need_weight or need_bias:
        variant, options, last = _configured("grad_weight", geometry, input, weight)
        if variant is general:
            operands = grad_output, input, weight, argmax, geometry, options, need_weight, need_bias
            grad_weight, grad_bias = general.grad_weight(*operands, later)
        else:
            grad, images, winners = _laid_out(last, grad_output, input, argmax)
            operands = grad, images, contiguous(weight), winners, geometry, last, options
            grad_weight, grad_bias = variant.grad_weight(*operands, later)
        layout = memory_format(input, weight)
        if need_weight and not grad_weight.is_contiguous(memory_format=layout):
            if later is not None:  # a copy needs whole sums
                later.finish()
            grad_weight = contiguous(grad_weight, layout)
    return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None
