"""The input's gradient of many channels on matrix units, in two launches: spread the gradient, then multiply it.

A window's gradient belongs to one cell of the convolution. The first kernel writes every cell's gradient to a
workspace, channels last, and rounds it as the products take it. So windows are looked at once for each cell, not once
for each cell and tap. The second kernel is a matrix product over taps and output channels. It reads both operands 16
bytes at a time, straight into shared memory, because nothing is left to round or to compare.

Letters: N images, C input and O output channels, H x W input, KH x KW kernel, PH x PW pooled output. A block is the
cells from one window's first to the next window's first: pool stride down times pool stride right. RH and RW: how many
blocks further down and right a window reaches. BR = PH + RH and BC = PW + RW blocks have all cells of all windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry
from ..joint import Later
from ..runtime import (
    INTERPRETED,
    NO_WINNER,
    all_registers,
    architecture,
    cdiv,
    empty,
    index_type,
    launch,
    load,
    next_power_of_2,
    split_reduction,
    store,
    sum_partials,
    tf32,
)
from .shared import covers, pack, precision_of, sizes_of, within

__all__ = ["covers", "grad_input", "grad_weight"]


@triton.jit(do_not_specialize=["blocks", "programs", "pooled_h", "pooled_w"])
def _spread_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    spread_ptr,
    packed_ptr,
    blocks,
    programs,
    pooled_h,
    pooled_w,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    IN_PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write the gradient of every cell of the convolution, and lay out the weight, as `_product_kernel` reads them.

    Maths: ``spread[n, y, x, o] = sum of grad[n, o, i, j] over the windows (i, j) whose argmax is cell (y, x)``, added
    in float32 from the window farthest below and right on, and rounded once. Cell (0, 0) is the first of window (0, 0),
    also where that lies in the pool's padding. Cells of no window, and channels from O on, are 0.
    ``packed[tap, c, o] = weight[o, c, tap]``, 0 beyond C and O.

    Tile: the first `programs` programs take BLOCK blocks each, of CHANNELS channels by the grid's second axis. Those
    behind them, of the first channels, take ENTRIES entries of the packed weight each.

    Shapes and strides: grad and argmax (N, O, PH, PW) contiguous or, if LAST, channels_last; weight (O, C, KH * KW),
    spread (N, BR * pool stride, BC * pool stride, OUT_PADDED) and packed (KH * KW, IN_PADDED, OUT_PADDED) contiguous.

    Cost per image: reads each gradient and argmax (RH + 1) * (RW + 1) times, mostly from cache; writes O numbers
    a cell.
    """
    number = tl.program_id(0)
    if number < programs:
        RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
        RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
        block_rows, block_columns = pooled_h + RH, pooled_w + RW
        block = number.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        there = block < blocks
        image = block // (block_rows * block_columns)
        i = (block // block_columns % block_rows).to(tl.int32)
        j = (block % block_columns).to(tl.int32)
        plane = 1 if LAST else pooled_h * pooled_w
        step = OUT_CHANNELS if LAST else 1
        window = image * (OUT_CHANNELS * pooled_h * pooled_w) + (i * pooled_w + j) * step
        # Neighbouring threads read neighbouring windows, or channels where these are neighbours.
        offsets = window[None, :] + (channel * plane)[:, None]
        cells = ()
        for _ in tl.static_range(POOL_STRIDE_H * POOL_STRIDE_W):
            cells = cells + (tl.zeros((CHANNELS, BLOCK), tl.float32),)
        for k in tl.static_range(RH, -1, -1):
            for w in tl.static_range(RW, -1, -1):
                mask = there & within(i - k, pooled_h) & within(j - w, pooled_w)
                both = mask[None, :] & (channel < OUT_CHANNELS)[:, None]
                found = offsets - (k * pooled_w + w) * step
                argmax = tl.load(argmax_ptr + found, mask=both, other=NO_WINNER).to(tl.int32)
                grad = load(grad_ptr + found, both).to(tl.float32)
                new = ()
                for b in tl.static_range(POOL_STRIDE_H):
                    for a in tl.static_range(POOL_STRIDE_W):
                        total = cells[b * POOL_STRIDE_W + a]
                        if k * POOL_STRIDE_H + b < POOL_H and w * POOL_STRIDE_W + a < POOL_W:
                            wins = argmax == (k * POOL_STRIDE_H + b) * POOL_W + w * POOL_STRIDE_W + a
                            total = tl.where(wins, total + grad, total)
                        new = new + (total,)
                cells = new
        line = block_columns * POOL_STRIDE_W
        first = (image * block_rows + i) * POOL_STRIDE_H * line + j * POOL_STRIDE_W
        for b in tl.static_range(POOL_STRIDE_H):
            for a in tl.static_range(POOL_STRIDE_W):
                rows = spread_ptr + (first + (b * line + a)) * OUT_PADDED
                store(
                    rows[:, None] + channel[None, :],
                    tl.trans(tf32(cells[b * POOL_STRIDE_W + a], PRECISION)),
                    there[:, None] & (channel < OUT_PADDED)[None, :],
                )
    elif tl.program_id(1) == 0:
        entry = (number - programs) * ENTRIES + tl.arange(0, ENTRIES)
        pack(
            weight_ptr,
            packed_ptr,
            entry,
            IN_CHANNELS,
            OUT_CHANNELS,
            TAPS,
            IN_CHANNELS * TAPS,
            IN_PADDED,
            OUT_PADDED,
            TAPS,
            PRECISION,
        )


@triton.jit(do_not_specialize=["rows", "input_h", "input_w", "cells_h", "cells_w"])
def _product_kernel(
    spread_ptr,
    packed_ptr,
    output_ptr,
    rows,
    input_h,
    input_w,
    cells_h,
    cells_w,
    IN_CHANNELS: tl.constexpr,
    IN_PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    POOL_PADDING_H: tl.constexpr,
    POOL_PADDING_W: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the input from the cells' gradients.

    Maths: ``grad_input[n, c, h, w] = sum over (kh, kw, o) of spread[n, y, x, o] * packed[kh, kw, c, o]``, where (y, x)
    is the cell whose tap (kh, kw) lies on (h, w): ``y * stride + kh = h + padding``.

    Tile: BLOCK_M positions (n, h, w) x BLOCK_N input channels. A tile's positions have the same remainder of h +
    padding by the stride, and of columns alike, so all have the same taps: every stride-th. `rows` counts the
    positions of one remainder, rounded up: N * ceil(H / stride) * ceil(W / stride). One loop runs over taps and output
    channels, BLOCK_K at a time, so that loads of the next steps are under way.

    Shapes and strides: spread and packed as of `_spread_kernel`; output (N, C, H, W) contiguous or, if LAST,
    channels_last.

    Cost per image: 2 * H * W * C * O * KH * KW FLOP over the strides; reads the cells' gradients for each tap, mostly
    from cache; writes C * H * W elements.
    """
    remainder = tl.program_id(0) % (STRIDE_H * STRIDE_W)
    remainder_h, remainder_w = remainder // STRIDE_W, remainder % STRIDE_W
    position = (tl.program_id(0) // (STRIDE_H * STRIDE_W)).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    lines, columns = (input_h + (STRIDE_H - 1)) // STRIDE_H, (input_w + (STRIDE_W - 1)) // STRIDE_W
    image = position // (lines * columns)
    h = (position // columns % lines).to(tl.int32) * STRIDE_H
    w = (position % columns).to(tl.int32) * STRIDE_W
    h += (remainder_h + (STRIDE_H - PADDING_H % STRIDE_H)) % STRIDE_H
    w += (remainder_w + (STRIDE_W - PADDING_W % STRIDE_W)) % STRIDE_W
    there = (position < rows) & (h < input_h) & (w < input_w)
    # The cell of the first tap, counted as the workspace counts them; the next taps lie above and left of it.
    y = (h + (PADDING_H - remainder_h)) // STRIDE_H + POOL_PADDING_H
    x = (w + (PADDING_W - remainder_w)) // STRIDE_W + POOL_PADDING_W
    depth = tl.arange(0, BLOCK_K)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cells = spread_ptr + (((image * cells_h + y) * cells_w + x) * OUT_PADDED)[:, None] + depth[None, :]
    weights = packed_ptr + (channel * OUT_PADDED)[:, None] + depth[None, :]
    taps_h = (KERNEL_H - remainder_h + (STRIDE_H - 1)) // STRIDE_H
    taps_w = (KERNEL_W - remainder_w + (STRIDE_W - 1)) // STRIDE_W
    CHUNKS: tl.constexpr = OUT_PADDED // BLOCK_K

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps_h * taps_w * CHUNKS):
        chunk = step % CHUNKS * BLOCK_K
        up = step // CHUNKS // taps_w
        left = step // CHUNKS % taps_w
        mask = there & within(y - up, cells_h) & within(x - left, cells_w)
        grad = load(cells - ((up * cells_w + left) * OUT_PADDED - chunk), mask[:, None])
        tap = (up * STRIDE_H + remainder_h) * KERNEL_W + (left * STRIDE_W + remainder_w)
        weight = load(weights + (tap * (IN_PADDED * OUT_PADDED) + chunk))
        total = tl.dot(grad, tl.trans(weight), total, input_precision=PRECISION)

    plane = 1 if LAST else input_h * input_w
    place = image * (IN_CHANNELS * input_h * input_w) + (h * input_w + w) * (IN_CHANNELS if LAST else 1)
    outputs = output_ptr + (channel * plane)[:, None] + place[None, :]
    store(outputs, tl.trans(total), (channel < IN_CHANNELS)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows", "input_h", "input_w", "cells_h", "cells_w", "conv_h", "conv_w", "rows_per_part"])
def _weight_product_kernel(
    spread_ptr,
    input_ptr,
    partials_ptr,
    rows,
    input_h,
    input_w,
    cells_h,
    cells_w,
    conv_h,
    conv_w,
    rows_per_part,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    POOL_PADDING_H: tl.constexpr,
    POOL_PADDING_W: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Gradients of the weight and the bias: one part of each sum, which `sum_partials` completes in a fixed order.

    Maths: ``grad_weight[o, c, kh, kw] = sum over cells (n, y, x) of spread[n, y, x, o] * input[n, c, y * stride -
    padding + kh, x * stride - padding + kw]``, and ``grad_bias[o] = sum over cells of spread[n, y, x, o]``.

    Tile: BLOCK_M input channels x BLOCK_N output channels x TAPS taps of one kernel row, which share the cells'
    gradients. The sum runs over the `rows_per_part` cells of one part, BLOCK_K at a time. The programs of the first
    taps and input channels sum the bias.

    Shapes and strides: spread as `_spread_kernel` writes it, not rounded to tf32; input (N, C, H, W) contiguous or, if
    LAST, channels_last; partials (parts, O * C * KH * KW + O) float32: the weight's, in its own order, then the bias'.

    Cost per image: 2 * cells * C * O * KH * KW FLOP; reads the cells' gradients once per tile of taps and input
    channels, and the input once per tap and tile of output channels, mostly from cache.
    """
    IN_TILES: tl.constexpr = (IN_CHANNELS + BLOCK_M - 1) // BLOCK_M
    ROW_TILES: tl.constexpr = (KERNEL_W + TAPS - 1) // TAPS
    number, part = tl.program_id(0), tl.program_id(1)
    in_channel = number % IN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    tap_w = number // IN_TILES % ROW_TILES * TAPS
    tap_h = number // (IN_TILES * ROW_TILES) % KERNEL_H
    out_channel = number // (IN_TILES * ROW_TILES * KERNEL_H) * BLOCK_N + tl.arange(0, BLOCK_N)
    with_bias = number % (IN_TILES * ROW_TILES * KERNEL_H) == 0
    plane = 1 if LAST else input_h * input_w
    step = IN_CHANNELS if LAST else 1
    channels = input_ptr + (in_channel * plane)[:, None]

    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    bias_sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    first = part.to(INDEX) * rows_per_part
    for start in range(0, rows_per_part, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        there = row < rows
        image = row // (cells_h * cells_w)
        y = (row // cells_w % cells_h).to(tl.int32) - POOL_PADDING_H
        x = (row % cells_w).to(tl.int32) - POOL_PADDING_W
        both = there[:, None] & (out_channel < OUT_PADDED)[None, :]
        grad = load(spread_ptr + (row * OUT_PADDED)[:, None] + out_channel[None, :], both)
        if with_bias:
            bias_sums += grad.to(tl.float32)
        grad = tf32(grad, PRECISION)
        h = y * STRIDE_H + (tap_h - PADDING_H)
        w = x * STRIDE_W + (tap_w - PADDING_W)
        inside = there & within(y, conv_h) & within(x, conv_w) & within(h, input_h)
        pixels = channels + (image * (IN_CHANNELS * input_h * input_w) + (h * input_w + w) * step)[None, :]
        done = ()
        for t in tl.static_range(TAPS):
            mask = inside & within(w + t, input_w)
            patch = load(pixels + t * step, mask[None, :] & (in_channel < IN_CHANNELS)[:, None])
            done = done + (tl.dot(tf32(patch, PRECISION), grad, sums[t], input_precision=PRECISION),)
        sums = done

    WEIGHTS: tl.constexpr = OUT_CHANNELS * IN_CHANNELS * KERNEL_H * KERNEL_W
    parts = partials_ptr + part.to(INDEX) * (WEIGHTS + OUT_CHANNELS)
    known = (in_channel < IN_CHANNELS)[:, None] & (out_channel < OUT_CHANNELS)[None, :]
    entries = (out_channel * IN_CHANNELS)[None, :] + in_channel[:, None]
    entries = parts + (entries * (KERNEL_H * KERNEL_W) + (tap_h * KERNEL_W + tap_w))
    for t in tl.static_range(TAPS):
        tl.store(entries + t, sums[t], mask=known & (tap_w + t < KERNEL_W))
    if with_bias:
        tl.store(parts + (WEIGHTS + out_channel), tl.sum(bias_sums, axis=0), mask=out_channel < OUT_CHANNELS)


def _tile(dtype: torch.dtype, channels: int, out_channels: int) -> dict[str, int]:
    """Choose the product's tile: matrix units' steps at full depth, and as many positions as shared memory feeds."""
    on = architecture()
    deepest = 32 if dtype == torch.float32 else 64
    block_k = next(k for k in (64, 32, 16) if k <= deepest and cdiv(out_channels, 16) * 16 % k == 0)
    if INTERPRETED:
        return {"BLOCK_M": 1024, "BLOCK_N": max(16, next_power_of_2(channels)), "BLOCK_K": block_k}
    block_n = min(128, max(16, next_power_of_2(channels)))
    warps = 8 if block_n > 64 else 4
    stages = 3 if on.startswith("sm_") else 2
    return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def _spread(
    grad_output: Tensor,
    argmax: Tensor,
    weight: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    precision: str,
    in_padded: int,
) -> tuple[Tensor, Tensor, tl.dtype]:
    """Launch the first kernel: the cells' gradients, the weight of `in_padded` input channels (0: none), and INDEX."""
    out_padded = _padded(weight.shape[0])
    taps = weight[0, 0].numel()
    blocks: Sequence[int] = [
        pooled + (pool - 1) // step
        for pooled, pool, step in zip(argmax.shape[2:], geometry.pool_size, geometry.pool_stride, strict=True)
    ]
    cells = [count * step for count, step in zip(blocks, geometry.pool_stride, strict=True)]
    spread = empty((argmax.shape[0], *cells, out_padded), grad_output)
    packed = empty((taps, in_padded, out_padded), grad_output) if in_padded else spread
    count = argmax.shape[0] * blocks[0] * blocks[1]
    block, entries = (1024, 65536) if INTERPRETED else (32, 1024)
    programs = cdiv(count, block)
    wide = min(next_power_of_2(out_padded), 256 if INTERPRETED else 32)
    index = index_type(spread, grad_output)
    launch(
        _spread_kernel,
        (programs + cdiv(taps * in_padded * out_padded, entries), cdiv(out_padded, wide)),
        *(grad_output, argmax, weight, spread, packed),
        *(count, programs, *argmax.shape[2:]),
        **sizes_of(_spread_kernel, geometry, weight),
        IN_PADDED=max(1, in_padded),
        OUT_PADDED=out_padded,
        LAST=last,
        PRECISION=precision,
        INDEX=index,
        BLOCK=block,
        CHANNELS=wide,
        ENTRIES=entries,
        **({} if INTERPRETED else {"num_warps": 4, **all_registers()}),
    )
    return spread, packed, index


def _padded(out_channels: int) -> int:
    """Output channels of a workspace: full steps of a matrix unit."""
    return cdiv(out_channels, 16) * 16


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    options: Mapping[str, int],
) -> Tensor:
    """Launch the gradient of the input; all tensors dense, images and gradients in one layout."""
    result = empty(input.shape, input, memory_format=torch.channels_last if last else torch.contiguous_format)
    images, channels, height, width = input.shape
    precision = precision_of(input.dtype)
    tile = _tile(input.dtype, channels, weight.shape[0]) | options
    in_padded = cdiv(channels, tile["BLOCK_N"]) * tile["BLOCK_N"]
    spread, packed, index = _spread(grad_output, argmax, weight, geometry, last, precision, in_padded)
    stride_h, stride_w = geometry.stride
    rows = images * cdiv(height, stride_h) * cdiv(width, stride_w)
    launch(
        _product_kernel,
        (cdiv(rows, tile["BLOCK_M"]) * stride_h * stride_w, in_padded // tile["BLOCK_N"]),
        *(spread, packed, result),
        *(rows, height, width, *spread.shape[1:3]),
        **sizes_of(_product_kernel, geometry, weight),
        IN_PADDED=in_padded,
        OUT_PADDED=spread.shape[3],
        LAST=last,
        PRECISION=precision,
        INDEX=tl.int64 if tl.int64 in (index, index_type(result)) else tl.int32,
        **tile,
        **({} if INTERPRETED else all_registers()),
    )
    return result


def _weight_tile(channels: int, out_channels: int, kernel_w: int) -> dict[str, int]:
    """Choose the tile of the weight's gradient: taps share what is loaded, as far as registers hold their sums."""
    block_m, block_n = (min(64, max(16, next_power_of_2(n))) for n in (channels, out_channels))
    if INTERPRETED:
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 1024, "TAPS": kernel_w}
    most = max(1, 64 * 128 // (block_m * block_n))
    taps = cdiv(kernel_w, cdiv(kernel_w, most))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32, "TAPS": taps, "num_warps": 4, "num_stages": 1}


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    options: Mapping[str, int],
    later: Later | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of the weight and the bias; all tensors dense, images and gradients in one layout.

    Of `later` the sums alone are used: a workspace lives as long as its reader.
    """
    (out_channels, channels), kernel = weight.shape[:2], (weight.shape[2], weight.shape[3])
    tile = _weight_tile(channels, out_channels, kernel[1]) | options
    spread, _, index = _spread(grad_output, argmax, weight, geometry, last, "ieee", 0)
    rows = spread.numel() // spread.shape[3]
    tiles = kernel[0] * cdiv(kernel[1], tile["TAPS"])
    tiles *= cdiv(channels, tile["BLOCK_M"]) * cdiv(out_channels, tile["BLOCK_N"])
    parts, rows_per_part = split_reduction(rows, tile["BLOCK_K"], tiles)
    result, bias = empty(weight.shape, weight), empty((out_channels,), weight)
    partials = empty((parts, weight.numel() + out_channels), input, torch.float32)
    launch(
        _weight_product_kernel,
        (tiles, parts),
        *(spread, input, partials),
        *(rows, *input.shape[2:], *spread.shape[1:3]),
        *(*geometry.conv_size((input.shape[2], input.shape[3]), kernel), rows_per_part),
        **(sizes_of(_weight_product_kernel, geometry, weight) | tile),
        OUT_PADDED=spread.shape[3],
        LAST=last,
        PRECISION=precision_of(input.dtype),
        INDEX=tl.int64 if tl.int64 in (index, index_type(input, partials)) else tl.int32,
        **({} if INTERPRETED else all_registers()),
    )
    sum_partials((partials, (result, bias), 1.0), later=None if later is None else later.sums)
    return result, bias
