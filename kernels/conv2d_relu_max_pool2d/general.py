"""conv2d + relu + max-pool in one kernel, and its gradients, for every geometry that PyTorch allows.

All kernels here work alike. A convolution is computed as a matrix product, whose depth (the dimension summed over) runs
over channel, kernel row and kernel column. One program computes all cells of its pooling windows, one cell at a time,
and keeps the maximum in registers: no tensor of the convolution's size is written to memory. All sizes and strides are
run-time values, so a new shape compiles no new kernel.

Letters: N images, C input channels and O output channels of each of G groups, H x W input, KH x KW kernel, OH x OW
convolution, PH x PW pooled output, T cells of a pooling window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..geometry import ConvPoolGeometry, memory_format, output_format
from ..joint import Later
from ..runtime import (
    NO_WINNER,
    cdiv,
    contiguous,
    dot,
    empty,
    index_type,
    launch,
    load,
    relu,
    split_reduction,
    store,
    sum_partials,
    tf32,
)
from .shared import within

# The kernels take these arguments after their pointers, in this order. Triton does not specialise on them: a size of 1,
# or one that is a multiple of 16, compiles no new kernel.
_GEOMETRY = [
    *("in_channels", "out_channels", "input_h", "input_w", "kernel_h", "kernel_w"),
    *("conv_h", "conv_w", "pooled_h", "pooled_w", "rows"),
    *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("pool_h", "pool_w", "pool_stride_h", "pool_stride_w"),
    *("pool_padding_h", "pool_padding_w", "pool_dilation_h", "pool_dilation_w"),
]
_STRIDES = [f"{tensor}_stride_{axis}" for tensor in ("input", "output", "grad", "argmax") for axis in "nchw"]
_POINTERS = [f"{tensor}_ptr" for tensor in ("input", "weight", "bias", "output", "argmax", "grad", "partials")]
_GENERAL = [*_POINTERS, *_GEOMETRY, *_STRIDES, "rows_per_part"]


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    argmax_ptr,
    in_channels,
    out_channels,
    input_h,
    input_w,
    kernel_h,
    kernel_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    rows,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    pool_h,
    pool_w,
    pool_stride_h,
    pool_stride_w,
    pool_padding_h,
    pool_padding_w,
    pool_dilation_h,
    pool_dilation_w,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    output_stride_n,
    output_stride_c,
    output_stride_h,
    output_stride_w,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pooled output and argmax.

    Maths: ``output[n, o, p] = max over cells t of relu(bias[o] + sum_k patch[n, p, t, k] * weight[o, k])``, where k
    runs over (channel, kernel row, kernel column); argmax is the first t, in scan order, that attains the maximum (the
    last NaN, as in PyTorch), or `NO_WINNER` where the output is <= 0.

    Tile: BLOCK_N output channels of one group (rows) x BLOCK_M pooled cells (columns), of N * PH * PW cells in all. For
    each cell of the window, a matrix product over the depth C * KH * KW is summed in float32 and then compared with the
    maximum so far. A step of the product takes BLOCK_K entries of the depth. They stand in the weight's own order, so
    that a step is full even where there are few channels. If WIDE, the loop goes over the taps, and for each over the
    channels: then the products need no division to find a pixel.

    Shapes and strides: input (N, G * C, H, W), any strides; weight (G * O, C * KH * KW) contiguous, if WIDE
    (G * O, KH * KW * C); bias (G * O) contiguous; output and argmax (N, G * O, PH, PW), any strides, the same for both.

    Saves: one byte of argmax per pooled cell, nothing else.

    Cost per image: 2 * T * PH * PW * G * O * C * KH * KW FLOP; reads G * C * H * W input elements once from memory
    (overlapping patches come from cache), writes G * O * PH * PW outputs and as many bytes of argmax.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    row_mask = row < rows
    channel_mask = channel < out_channels
    image = row // (pooled_h * pooled_w)
    pooled_row = (row // pooled_w % pooled_h).to(tl.int32)
    pooled_column = (row % pooled_w).to(tl.int32)
    top = pooled_row * pool_stride_h - pool_padding_h
    left = pooled_column * pool_stride_w - pool_padding_w
    taps = kernel_h * kernel_w
    depth = in_channels * taps
    out_channel = (group * out_channels + channel).to(INDEX)
    input_images = input_ptr + (group * in_channels).to(INDEX) * input_stride_c + image * input_stride_n
    weight_rows = weight_ptr + out_channel * depth
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_channel, mask=channel_mask, other=0.0).to(tl.float32)

    best = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for cell in range(pool_h * pool_w):
        conv_row = top + (cell // pool_w) * pool_dilation_h
        conv_column = left + (cell % pool_w) * pool_dilation_w
        inside = within(conv_row, conv_h) & within(conv_column, conv_w) & row_mask
        first_h = conv_row * stride_h - padding_h
        first_w = conv_column * stride_w - padding_w
        conv = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if WIDE:
            for tap in range(taps):
                h = first_h + tap // kernel_w * dilation_h
                w = first_w + tap % kernel_w * dilation_w
                on_input = inside & within(h, input_h) & within(w, input_w)
                pixel = input_images + (h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w)
                for start in range(0, in_channels, BLOCK_K):
                    in_channel = start + tl.arange(0, BLOCK_K)
                    k_mask = in_channel < in_channels
                    offset = (in_channel.to(INDEX) * input_stride_c)[:, None]
                    patch = load(pixel[None, :] + offset, k_mask[:, None] & on_input[None, :])
                    offset = (tap * in_channels + in_channel)[None, :]
                    weight = load(weight_rows[:, None] + offset, channel_mask[:, None] & k_mask[None, :])
                    conv = dot(weight, patch, conv, PRECISION)
        else:
            for start in range(0, depth, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                k_mask = k < depth
                # Loaded with the depth last: a thread then divides few of its numbers.
                h = first_h[:, None] + ((k // kernel_w % kernel_h) * dilation_h)[None, :]
                w = first_w[:, None] + ((k % kernel_w) * dilation_w)[None, :]
                mask = inside[:, None] & k_mask[None, :] & within(h, input_h) & within(w, input_w)
                offset = ((k // taps).to(INDEX) * input_stride_c)[None, :]
                offset += h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
                patch = tl.trans(load(input_images[:, None] + offset, mask))
                weight = load(weight_rows[:, None] + k[None, :], channel_mask[:, None] & k_mask[None, :])
                conv = dot(weight, patch, conv, PRECISION)
        if HAS_BIAS:
            conv += bias[:, None]
        value = relu(conv)
        wins = ((value > best) | (value != value)) & inside[None, :]
        best = tl.where(wins, value, best)
        argmax = tl.where(wins, cell, argmax)

    offset = image * output_stride_n
    offset += pooled_row.to(INDEX) * output_stride_h + pooled_column.to(INDEX) * output_stride_w
    offset = (out_channel * output_stride_c)[:, None] + offset[None, :]
    mask = channel_mask[:, None] & row_mask[None, :]
    store(output_ptr + offset, best, mask)
    if RETURN_ARGMAX:
        tl.store(argmax_ptr + offset, tl.where(best <= 0, NO_WINNER, argmax).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_input_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    output_ptr,
    in_channels,
    out_channels,
    input_h,
    input_w,
    kernel_h,
    kernel_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    rows,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    pool_h,
    pool_w,
    pool_stride_h,
    pool_stride_w,
    pool_padding_h,
    pool_padding_w,
    pool_dilation_h,
    pool_dilation_w,
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    argmax_stride_n,
    argmax_stride_c,
    argmax_stride_h,
    argmax_stride_w,
    output_stride_n,
    output_stride_c,
    output_stride_h,
    output_stride_w,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the input, without atomics: each program sums all that reaches the pixels of its own tile.

    Maths: ``grad_input[n, c, h, w] = sum over (kh, kw, o) of grad_conv[n, o, oh, ow] * weight[o, c, kh, kw]``, where
    (oh, ow) is the convolution cell whose tap (kh, kw) lies on (h, w), and ``grad_conv[n, o, oh, ow]`` is the sum of
    grad_output over the windows that cover the cell and whose argmax names it.

    Tile: BLOCK_N input channels of one group (rows) x BLOCK_M input pixels (columns), of N * H * W pixels in all. The
    outer loops go over the taps: the cell and the windows that a tap gives a pixel are found once for each tap, and
    serve all products. The depth of the products is the output channels, BLOCK_K at a time. Pixels lie along the tile's
    last dimension, so that neighbouring threads read neighbouring elements of NCHW tensors.

    Shapes and strides: grad (N, G * O, PH, PW) and argmax, any strides (0 too); weight (G * O, KH * KW, C) contiguous,
    that is, channels_last; output (N, G * C, H, W), any strides.

    Cost per image: 2 * H * W * C * G * O * KH * KW FLOP, of which a stride above 1 wastes a part; reads PH * PW * G * O
    gradients and as many bytes of argmax, writes G * C * H * W elements.
    """
    position = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    position_mask = position < rows
    channel_mask = channel < in_channels
    image = position // (input_h * input_w)
    h = (position // input_w % input_h).to(tl.int32)
    w = (position % input_w).to(tl.int32)
    # How many windows can cover one cell of the convolution, along each dimension.
    cover_h = ((pool_h - 1) * pool_dilation_h + pool_stride_h) // pool_stride_h
    cover_w = ((pool_w - 1) * pool_dilation_w + pool_stride_w) // pool_stride_w

    grad_input = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tap_h in range(kernel_h):
        reach = h + padding_h - tap_h * dilation_h
        conv_row = reach // stride_h
        row_mask = position_mask & (reach >= 0) & (conv_row < conv_h) & (conv_row * stride_h == reach)
        for tap_w in range(kernel_w):
            reach = w + padding_w - tap_w * dilation_w
            conv_column = reach // stride_w
            on_conv = row_mask & (reach >= 0) & (conv_column < conv_w) & (conv_column * stride_w == reach)
            for start in range(0, out_channels, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                k_mask = k < out_channels
                out_channel = (group * out_channels + k).to(INDEX)
                grad_conv = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
                # Summed over windows before the product: a zero of one of them must not meet an infinite weight.
                for cover in range(cover_h * cover_w):
                    pooled_row = (conv_row + pool_padding_h) // pool_stride_h - cover // cover_w
                    pooled_column = (conv_column + pool_padding_w) // pool_stride_w - cover % cover_w
                    from_top = conv_row + pool_padding_h - pooled_row * pool_stride_h
                    from_left = conv_column + pool_padding_w - pooled_column * pool_stride_w
                    cell_row = from_top // pool_dilation_h
                    cell_column = from_left // pool_dilation_w
                    mask = on_conv & within(pooled_row, pooled_h) & within(pooled_column, pooled_w)
                    mask &= (cell_row < pool_h) & (cell_column < pool_w)
                    mask &= (cell_row * pool_dilation_h == from_top) & (cell_column * pool_dilation_w == from_left)
                    cell = cell_row * pool_w + cell_column
                    both = k_mask[:, None] & mask[None, :]
                    offset = image * argmax_stride_n + pooled_row.to(INDEX) * argmax_stride_h
                    offset += pooled_column.to(INDEX) * argmax_stride_w
                    pointers = argmax_ptr + ((out_channel * argmax_stride_c)[:, None] + offset[None, :])
                    argmax = tl.load(pointers, mask=both, other=NO_WINNER).to(tl.int32)
                    offset = image * grad_stride_n + pooled_row.to(INDEX) * grad_stride_h
                    offset += pooled_column.to(INDEX) * grad_stride_w
                    # Loaded whatever the argmax, so that one load does not wait for the other.
                    grad = load(grad_ptr + ((out_channel * grad_stride_c)[:, None] + offset[None, :]), both)
                    grad_conv += tl.where(argmax == cell[None, :], grad, 0.0).to(tl.float32)
                tap = (out_channel * kernel_h + tap_h) * kernel_w + tap_w
                pointers = weight_ptr + ((tap * in_channels)[None, :] + channel[:, None])
                weight = load(pointers, channel_mask[:, None] & k_mask[None, :])
                grad_input = dot(weight, grad_conv.to(weight.dtype), grad_input, PRECISION)

    offset = image * output_stride_n + h.to(INDEX) * output_stride_h + w.to(INDEX) * output_stride_w
    offset = ((group * in_channels + channel).to(INDEX) * output_stride_c)[:, None] + offset[None, :]
    store(output_ptr + offset, grad_input, channel_mask[:, None] & position_mask[None, :])


@triton.jit(do_not_specialize=_GENERAL)
def _non_overlapping_grad_input_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    output_ptr,
    in_channels,
    out_channels,
    input_h,
    input_w,
    kernel_h,
    kernel_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    rows,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    pool_h,
    pool_w,
    pool_stride_h,
    pool_stride_w,
    pool_padding_h,
    pool_padding_w,
    pool_dilation_h,
    pool_dilation_w,
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    argmax_stride_n,
    argmax_stride_c,
    argmax_stride_h,
    argmax_stride_w,
    output_stride_n,
    output_stride_c,
    output_stride_h,
    output_stride_w,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the input for a convolution of stride 1 and pooling windows of 2x2 cells that do not overlap.

    Maths: as in `_grad_input_kernel`. A window's two rows of cells reach a pixel through two neighbouring taps. Write
    the pixel's row as h + padding + pool_padding = 2 * u + parity. Then the window in row u - d, for d = 0, 1, ...,
    reaches it through the kernel rows parity + 2 * d (from its upper cells) and parity + 2 * d - 1 (from its lower
    ones). The same holds for columns.

    Tile: BLOCK_N input channels of one group (rows) x BLOCK_M input pixels (columns) whose rows have one parity, and
    whose columns have one. All of them use the same taps of a window, so a window is loaded once for its four cells.
    The depth of the products is the output channels, BLOCK_K at a time. `rows` counts the pixels of one parity, rounded
    up: N * ceil(H / 2) * ceil(W / 2).

    Shapes, strides and cost: as in `_grad_input_kernel`, with a quarter to a half of its loads.
    """
    parity_h, parity_w = tl.program_id(0) % 4 // 2, tl.program_id(0) % 2
    position = (tl.program_id(0) // 4).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    channel_mask = channel < in_channels
    half_h, half_w = (input_h + 1) // 2, (input_w + 1) // 2
    image = position // (half_h * half_w)
    before_h, before_w = padding_h + pool_padding_h, padding_w + pool_padding_w
    h = (position // half_w % half_h).to(tl.int32) * 2 + (parity_h + before_h) % 2
    w = (position % half_w).to(tl.int32) * 2 + (parity_w + before_w) % 2
    position_mask = (position < rows) & (h < input_h) & (w < input_w)
    lowest_h, lowest_w = (h + before_h) >> 1, (w + before_w) >> 1

    grad_input = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for down in range((kernel_h - parity_h) // 2 + 1):
        pooled_row = lowest_h - down
        row_mask = position_mask & within(pooled_row, pooled_h)
        for right in range((kernel_w - parity_w) // 2 + 1):
            pooled_column = lowest_w - right
            mask = row_mask & within(pooled_column, pooled_w)
            window = image * argmax_stride_n + pooled_row.to(INDEX) * argmax_stride_h
            argmaxes = argmax_ptr + (window + pooled_column.to(INDEX) * argmax_stride_w)
            window = image * grad_stride_n + pooled_row.to(INDEX) * grad_stride_h
            grads = grad_ptr + (window + pooled_column.to(INDEX) * grad_stride_w)
            for start in range(0, out_channels, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                k_mask = k < out_channels
                out_channel = (group * out_channels + k).to(INDEX)
                both = k_mask[:, None] & mask[None, :]
                pointers = argmaxes[None, :] + (out_channel * argmax_stride_c)[:, None]
                argmax = tl.load(pointers, mask=both, other=NO_WINNER).to(tl.int32)
                # Loaded whatever the argmax, so that one load does not wait for the other; rounded once for four cells.
                grad = tf32(load(grads[None, :] + (out_channel * grad_stride_c)[:, None], both), PRECISION)
                for cell in tl.static_range(4):
                    tap_h = parity_h + 2 * down - cell // 2
                    tap_w = parity_w + 2 * right - cell % 2
                    if within(tap_h, kernel_h) & within(tap_w, kernel_w):
                        tap = (out_channel * kernel_h + tap_h) * kernel_w + tap_w
                        weights = weight_ptr + ((tap * in_channels)[None, :] + channel[:, None])
                        weight = tf32(load(weights, channel_mask[:, None] & k_mask[None, :]), PRECISION)
                        grad_conv = tl.where(argmax == cell, grad, 0.0).to(weight.dtype)
                        grad_input = tl.dot(weight, grad_conv, grad_input, input_precision=PRECISION)

    offset = image * output_stride_n + h.to(INDEX) * output_stride_h + w.to(INDEX) * output_stride_w
    offset = ((group * in_channels + channel).to(INDEX) * output_stride_c)[:, None] + offset[None, :]
    store(output_ptr + offset, grad_input, channel_mask[:, None] & position_mask[None, :])


@triton.jit(do_not_specialize=_GENERAL)
def _grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    partials_ptr,
    in_channels,
    out_channels,
    input_h,
    input_w,
    kernel_h,
    kernel_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    rows,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    pool_h,
    pool_w,
    pool_stride_h,
    pool_stride_w,
    pool_padding_h,
    pool_padding_w,
    pool_dilation_h,
    pool_dilation_w,
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    argmax_stride_n,
    argmax_stride_c,
    argmax_stride_h,
    argmax_stride_w,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    rows_per_part,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the weight and the bias in parts: each program sums over a part of the pooled cells.

    `sum_partials` adds the parts up in a fixed order afterwards.

    Maths: ``grad_weight[o, k] = sum over (n, p, t) of where(argmax[n, o, p] == t, grad[n, o, p], 0) *
    patch[n, p, t, k]`` with k = (channel, kernel row, kernel column), and
    ``grad_bias[o] = sum where(argmax != NO_WINNER, grad, 0)``.

    Tile: BLOCK_N output channels (rows) x BLOCK_M weight entries k (columns) of one group. The entries follow one
    another in the weight. If WIDE, they are those of one tap for successive input channels: then the products need no
    division to find a pixel. The sum runs over the `rows_per_part` pooled cells of one part, BLOCK_K at a time.

    Shapes and strides: grad and argmax (N, G * O, PH, PW), any strides (0 too); input (N, G * C, H, W), any strides;
    partials (parts, *) float32: the weight's (G * O, C * KH * KW) if NEED_WEIGHT, then the bias' (G * O) if NEED_BIAS.

    Cost per image: the FLOP of the forward; reads input, gradients and argmax once for each tile of k.
    """
    taps = kernel_h * kernel_w
    depth = in_channels * taps
    channel_tiles = (out_channels + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1)
    group = tl.program_id(2)
    tile = tl.program_id(0) // channel_tiles
    channel = tl.program_id(0) % channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < out_channels
    if WIDE:
        tap = tile % taps
        k = (tile // taps * BLOCK_M + tl.arange(0, BLOCK_M)) * taps + tap
    else:
        k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        tap = k % taps
    k_mask = k < depth
    out_channel = (group * out_channels + channel).to(INDEX)
    in_channel = (group * in_channels + k // taps).to(INDEX)
    tap_h = tap // kernel_w * dilation_h - padding_h
    tap_w = tap % kernel_w * dilation_w - padding_w

    grad_weight = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    grad_bias = tl.zeros((BLOCK_N,), tl.float32)
    first = part.to(INDEX) * rows_per_part
    for start in range(0, rows_per_part, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        row_mask = row < rows
        image = row // (pooled_h * pooled_w)
        pooled_row = (row // pooled_w % pooled_h).to(tl.int32)
        pooled_column = (row % pooled_w).to(tl.int32)
        mask = channel_mask[:, None] & row_mask[None, :]
        offset = image * argmax_stride_n
        offset += pooled_row.to(INDEX) * argmax_stride_h + pooled_column.to(INDEX) * argmax_stride_w
        argmax = tl.load(
            argmax_ptr + offset[None, :] + (out_channel * argmax_stride_c)[:, None], mask=mask, other=NO_WINNER
        ).to(tl.int32)
        offset = image * grad_stride_n
        offset += pooled_row.to(INDEX) * grad_stride_h + pooled_column.to(INDEX) * grad_stride_w
        grad = load(grad_ptr + offset[None, :] + (out_channel * grad_stride_c)[:, None], mask & (argmax != NO_WINNER))
        # Every tile of k would have the same sum; the first takes it.
        if NEED_BIAS and tile == 0:
            grad_bias += tl.sum(grad.to(tl.float32), axis=1)
        if NEED_WEIGHT:
            grad = tf32(grad, PRECISION)  # once for all cells
            for cell in range(pool_h * pool_w):
                conv_row = pooled_row * pool_stride_h - pool_padding_h + (cell // pool_w) * pool_dilation_h
                conv_column = pooled_column * pool_stride_w - pool_padding_w + (cell % pool_w) * pool_dilation_w
                inside = within(conv_row, conv_h) & within(conv_column, conv_w) & row_mask
                if WIDE:
                    h = tap_h + conv_row * stride_h
                    w = tap_w + conv_column * stride_w
                    inside &= within(h, input_h) & within(w, input_w)
                    pixel = image * input_stride_n + h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
                    position = (in_channel * input_stride_c)[:, None] + pixel[None, :]
                    patch = load(input_ptr + position, k_mask[:, None] & inside[None, :])
                else:
                    h = tap_h[:, None] + (conv_row * stride_h)[None, :]
                    w = tap_w[:, None] + (conv_column * stride_w)[None, :]
                    on_input = inside[None, :] & k_mask[:, None] & within(h, input_h) & within(w, input_w)
                    position = (in_channel * input_stride_c)[:, None] + (image * input_stride_n)[None, :]
                    position += h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
                    patch = load(input_ptr + position, on_input)
                chosen = tl.where(argmax == cell, grad, 0.0).to(patch.dtype)
                patch = tf32(patch, PRECISION)
                grad_weight = tl.dot(chosen, tl.trans(patch), grad_weight, input_precision=PRECISION)

    channels = tl.num_programs(2) * out_channels
    weights = channels * depth if NEED_WEIGHT else 0
    partials_ptr += part.to(INDEX) * (weights + (channels if NEED_BIAS else 0))
    if NEED_WEIGHT:
        offset = (out_channel * depth)[:, None] + k[None, :]
        tl.store(partials_ptr + offset, grad_weight, mask=channel_mask[:, None] & k_mask[None, :])
    if NEED_BIAS:
        tl.store(partials_ptr + weights + out_channel, grad_bias, mask=channel_mask & (tile == 0))


_AS_RULED: Mapping[str, int] = MappingProxyType({})
"""Nothing replaces the tiles that `tiles` gives."""

_WIDE = 16
"""From so many input channels in a group, kernels loop over taps and then channels; fewer would not fill a step."""


def _non_overlapping(geometry: ConvPoolGeometry) -> bool:
    """Whether the convolution has stride 1 and the 2x2 windows do not overlap, as in nearly all networks."""
    unit = geometry.stride == geometry.dilation == geometry.pool_dilation == (1, 1)
    return unit and geometry.pool_size == geometry.pool_stride == (2, 2)


def _sizes(input: Tensor, weight: Tensor, pooled: Sequence[int], rows: int, geometry: ConvPoolGeometry) -> list[Any]:
    """List what the kernels take in `_GEOMETRY`'s order."""
    size, kernel = input.shape[2:], weight.shape[2:]
    return [
        *(weight.shape[1], weight.shape[0] // geometry.groups, *size, *kernel),
        *(*geometry.conv_size(tuple(size), tuple(kernel)), *pooled, rows),
        *(*geometry.stride, *geometry.padding, *geometry.dilation),
        *(*geometry.pool_size, *geometry.pool_stride, *geometry.pool_padding, *geometry.pool_dilation),
    ]


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvPoolGeometry,
    return_argmax: bool,
    options: Mapping[str, int] = _AS_RULED,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; arguments and results as in `conv2d_relu_max_pool2d`, `options` in place of the rule's."""
    shape = geometry.output_shape(input, weight)
    layout = output_format(input, weight)
    output = empty(shape, input, memory_format=layout)
    argmax = empty(shape, output, geometry.argmax_dtype, layout) if return_argmax else None
    rows, channels = shape[0] * shape[2] * shape[3], shape[1] // geometry.groups
    wide = weight.shape[1] >= _WIDE
    sizes = rows, channels, weight.shape[1], weight[0].numel()
    tile = tiles.conv_forward(input.dtype, *sizes, wide)
    tile |= options
    weight = contiguous(weight, torch.channels_last if wide else torch.contiguous_format)
    launch(
        _forward_kernel,
        (cdiv(rows, tile["BLOCK_M"]), cdiv(channels, tile["BLOCK_N"]), geometry.groups),
        input,
        weight,
        weight if bias is None else contiguous(bias),
        output,
        output if argmax is None else argmax,
        *_sizes(input, weight, shape[2:], rows, geometry),
        *input.stride(),
        *output.stride(),
        HAS_BIAS=bias is not None,
        RETURN_ARGMAX=return_argmax,
        WIDE=wide,
        INDEX=index_type(input, weight, output),
        **tile,
    )
    return output, argmax


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    options: Mapping[str, int] = _AS_RULED,
) -> Tensor:
    """Launch the gradient of the input, in the input's layout; `options` in place of the rule's."""
    result = empty(input.shape, input, memory_format=memory_format(input, weight))
    (images, _, height, width), channels = input.shape, weight.shape[1]
    kernel, rows, parities = _grad_input_kernel, images * height * width, 1
    if _non_overlapping(geometry):
        kernel, rows, parities = _non_overlapping_grad_input_kernel, images * cdiv(height, 2) * cdiv(width, 2), 4
    tile = tiles.conv_grad_input(input.dtype, rows, channels, weight.shape[0] // geometry.groups) | options
    launch(
        kernel,
        (cdiv(rows, tile["BLOCK_M"]) * parities, cdiv(channels, tile["BLOCK_N"]), geometry.groups),
        grad_output,
        argmax,
        contiguous(weight, torch.channels_last),
        result,
        *_sizes(input, weight, argmax.shape[2:], rows, geometry),
        *grad_output.stride(),
        *argmax.stride(),
        *result.stride(),
        INDEX=index_type(grad_output, argmax, weight, result),
        **tile,
    )
    return result


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    options: Mapping[str, int] = _AS_RULED,
    need_weight: bool = True,
    need_bias: bool = True,
    later: Later | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the gradients of the weight and the bias, dense, or None; `later` as in `joint.launch_job`."""
    out_channels, depth = weight.shape[0], weight[0].numel()
    channels = out_channels // geometry.groups
    rows = argmax.shape[0] * argmax.shape[2] * argmax.shape[3]
    wide = weight.shape[1] >= _WIDE
    taps = weight[0, 0].numel() if wide else 1
    narrow = index_type(grad_output, argmax, input) == tl.int32
    tile = tiles.conv_grad_weight(input.dtype, rows, channels, weight.shape[1], depth, wide, narrow)
    tile |= options
    channel_tiles = cdiv(channels, tile["BLOCK_N"])
    programs = (cdiv(depth // taps, tile["BLOCK_M"]) * taps if need_weight else 1) * channel_tiles
    parts, rows_per_part = split_reduction(rows, tile["BLOCK_K"], programs * geometry.groups)
    result = empty(weight.shape, weight) if need_weight else None
    grad_bias = empty((out_channels,), weight) if need_bias else None
    wanted = [output for output in (result, grad_bias) if output is not None]
    partials = empty((parts, sum(output.numel() for output in wanted)), input, torch.float32)
    launch(
        _grad_weight_kernel,
        (programs, parts, geometry.groups),
        grad_output,
        argmax,
        input,
        partials,
        *_sizes(input, weight, argmax.shape[2:], rows, geometry),
        *grad_output.stride(),
        *argmax.stride(),
        *input.stride(),
        rows_per_part,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        WIDE=wide,
        INDEX=index_type(grad_output, argmax, input, partials),
        **tile,
    )
    sum_partials((partials, wanted, 1.0), later=None if later is None else later.sums)
    return result, grad_bias
