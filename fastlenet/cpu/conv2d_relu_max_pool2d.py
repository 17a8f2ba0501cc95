"""The launchers of `convolution`'s kernels: max_pool2d(relu(conv2d(...))) of whole batches on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import blocks, few, threads
from .plan import BYTES, LANES

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


THIN = 256
"""Channels times filters up to which a layer is 1.5 to 10 times as fast as stock's, and half-filled lanes suffice.

Wider layers are what oneDNN is made for: up to `few.WIDE` the forward is 1.1 to 2 times as fast, with all lanes filled.
In the plain layout a kernel of one pixel is 1.3 to 4.3 times as fast up to `DEEP`.
"""
DEEP = 1 << 14
"""The same where a backward follows: that touches winners only, and stock's all pixels. Wider layers were not tried."""
ROOMY = 1 << 19
"""Bytes of a block of images up to which a wide layer's forward wins over channels_last: it stays in a core's cache."""
LARGE = 1 << 22
"""Bytes of a block of images from which half-filled lanes no longer suffice: each pass reads it from memory."""
HEAVY = 6144
"""Weights of a thin layer from which half-filled lanes no longer suffice: stock's threads share single images.

In training that takes a full vector of input channels, too.
"""
DENSE_CHANNELS = 8
"""The same for input channels in channels_last, which oneDNN reads in vectors."""
TRAINED_WORK = 1 << 21
"""FLOP of a few images from which the gain outweighs the launchers, of which training calls two."""
MOST_BYTES = 1 << 26
"""Scratch that one thread may take."""


def rejects(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry, save: bool) -> str | None:
    """Why a call is not covered, or not expected to win; None if it is. `save`: whether a backward may follow."""
    reason = covers(input.dtype, input.shape, weight, geometry)
    if reason is not None:
        return reason
    images, _, height, width = input.shape
    filters, channels = weight.shape[0] // geometry.groups, weight.shape[1]
    last = memory_format(input, weight) == torch.channels_last
    dense, heavy = last and channels >= DENSE_CHANNELS, weight.numel() > HEAVY * geometry.groups
    if few.takes(images, (geometry,)):
        conv = geometry.conv_size((height, width), (weight.shape[2], weight.shape[3]))
        flop = 2 * weight.numel() * conv[0] * conv[1]
        if save and (images == 1 or images * flop < TRAINED_WORK):
            return f"{images} images take {flop * images >> 10} KFLOP, and a call of two kernels takes longer"
        if not save and last and (dense or heavy):
            return f"{weight.numel()} weights and {channels} channels in channels_last: the library's is as fast"
        return few.rejects(images, (weight,), (flop,), save)
    products = filters * channels
    pixelwise = not last and (weight.shape[2], weight.shape[3]) == (1, 1)
    if products > DEEP or (products >= few.WIDE and not save and not pixelwise):
        return f"{channels} to {filters} channels: the library's convolution is as fast"
    block = input.shape[1] * height * width * BYTES
    if not save and products > THIN and block > ROOMY and last:
        return f"{channels} to {filters} channels of {height}x{width} in channels_last: the library's is as fast"
    heavy = heavy and (not save or channels >= LANES)
    # Where each pixel has a window of its own, the gradients have no pixels to skip.
    everywhere = save and geometry.pool_stride == (1, 1)
    wanted = 0.9 if products > THIN or block > LARGE or heavy or dense or everywhere else 0.45
    if images and threads.fill(images, LANES) < wanted:
        return f"{images} images keep too few of the {LANES} lanes of {torch.get_num_threads()} threads busy"
    return None


def covers(dtype: torch.dtype, input: Sequence[int], weight: Tensor, geometry: ConvPoolGeometry) -> str | None:
    """Why the kernels cannot compute a call on (N, C, H, W) images; None if they can."""
    if not (dtype == weight.dtype == torch.float32):
        return "the compiled kernels compute in float32"
    if geometry.window_size > 255:
        return "the compiled kernels pool windows of at most 255 cells"
    images, channels, height, width = input
    conv = geometry.conv_size((height, width), (weight.shape[2], weight.shape[3]))
    together = 1 if few.takes(images, (geometry,)) else LANES
    if 4 * together * (3 * channels * height * width + (weight.shape[0] + 6) * conv[0] * conv[1]) > MOST_BYTES:
        return f"{together} such images take too much memory at a time"
    return None


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax (see `ConvPoolGeometry`).

    Args:
        input: (N, C, H, W), any strides.
        weight: (O, C / groups, KH, KW), any strides.
        bias: (O,) or None.
        geometry: of the convolution and the pool; windows of up to 255 cells.
        return_argmax: whether to return what a backward needs.
    """
    if few.takes(input.shape[0], (geometry,)):
        return few.layer(input, weight, bias, geometry, return_argmax)
    return blocks.forward(input, (weight, bias), (geometry,), "argmax" if return_argmax else "")


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` does not ask for one."""
    if not any(output_mask):
        return None, None, None
    grads = blocks.backward(grad_output, input, (weight, None), (geometry,), argmax, output_mask)
    return grads[0], grads[1], grads[2]
