"""The forward and the weight's gradient of many channels on matrix units: each cell of a block is computed once.

A lane owns a block, as in `patch_fma`: a window's cells up to the first cell of the next window. The block's cells are
as many accumulators of a matrix product, whose rows are blocks and whose columns are output channels. A pixel of the
block's patch is loaded once for all of them. If windows overlap, cells of blocks further right come from the next
lanes, and a lane goes down a column of blocks, so that cells of blocks further down are computed next.

Letters: N images, C input and O output channels, H x W input, KH x KW kernel, PH x PW pooled output, BH x BW cells of
a block; RH and RW: how many blocks further down and right a window reaches (0 where windows do not overlap).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    relu,
    split_reduction,
    store,
    sum_partials,
    tf32,
)
from .shared import better, covers, pack, precision_of, sizes_of, within

__all__ = ["covers", "forward", "grad_weight"]


@triton.jit
def _pack_kernel(
    weight_ptr,
    packed_ptr,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    IN_PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lay out the weight as `_forward_kernel` reads it: ``packed[tap, o, c] = weight[o, c, tap]``, 0 beyond O and C."""
    pack(
        weight_ptr,
        packed_ptr,
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),
        OUT_CHANNELS,
        IN_CHANNELS,
        IN_CHANNELS * TAPS,
        TAPS,
        OUT_PADDED,
        IN_PADDED,
        TAPS,
        PRECISION,
    )


@triton.jit(
    do_not_specialize=["lanes", "input_h", "input_w", "conv_h", "conv_w", "pooled_h", "pooled_w", "chunk", "chunks"]
)
def _forward_kernel(
    input_ptr,
    packed_ptr,
    bias_ptr,
    output_ptr,
    argmax_ptr,
    lanes,
    input_h,
    input_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    chunk,
    chunks,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    IN_PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PADDING_H: tl.constexpr,
    POOL_PADDING_W: tl.constexpr,
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pooled output and argmax.

    Maths: as in `general`. Each cell of the convolution is the bias, to which products are added in the order (kernel
    row, kernel column, channel); so no result depends on the tile.

    Tile: BLOCK_M lanes x BLOCK_N output channels. The program's number counts the tiles of channels first. A lane is a
    column of blocks (n, chunk, j): `chunk` + RH rows of blocks, one after the other, where a row has PW + RW columns.
    The last RW lanes of a program store nothing; they compute cells that lanes before them need. Without overlap a
    chunk is one row.

    One loop runs over the (BH - 1) * stride + KH rows and (BW - 1) * stride + KW columns of a block's patch, and over
    input channels, BLOCK_K at a time. What it loads is multiplied with the weights of all taps under which it lies: one
    for each of the BH x BW cells, or fewer at the patch's border.

    Shapes and strides: input (N, C, H, W), output and argmax (N, O, PH, PW), all contiguous or, if LAST, channels_last;
    packed as of `_pack_kernel`; bias (O) contiguous.

    Saves: one byte of argmax per pooled cell, nothing else.

    Cost per image: 2 * BH * BW * (PH + RH) * (PW + RW) * O * C * KH * KW FLOP; reads each pixel once for every block
    under whose patch it lies, mostly from cache, writes O * PH * PW outputs and as many bytes of argmax.
    """
    # A block's cells: a window's up to the first of the next one. (In Triton 3.6 no function returns a constant.)
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    SPAN_H: tl.constexpr = (BH - 1) * STRIDE_H + KERNEL_H
    SPAN_W: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    CHUNKS: tl.constexpr = IN_PADDED // BLOCK_K
    TILES: tl.constexpr = OUT_PADDED // BLOCK_N

    number = tl.arange(0, BLOCK_M)
    lane = (tl.program_id(0) // TILES).to(INDEX) * (BLOCK_M - RW) + number
    there = lane < lanes
    columns = pooled_w + RW
    column = (lane % columns).to(tl.int32)
    above = lane // columns
    row = (above % chunks).to(tl.int32) * chunk
    image = above // chunks
    whole = there & (number < BLOCK_M - RW) & (column < pooled_w)
    channel = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    plane = 1 if LAST else input_h * input_w
    step_w = IN_CHANNELS if LAST else 1
    images = image * (IN_CHANNELS * input_h * input_w)
    cell_x = column * POOL_STRIDE_W - POOL_PADDING_W
    x = cell_x * STRIDE_W - PADDING_W
    weights = packed_ptr + (channel * IN_PADDED)[:, None] + depth[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < OUT_CHANNELS, other=0.0).to(tl.float32)
    out_plane = 1 if LAST else pooled_h * pooled_w
    out_step = OUT_CHANNELS if LAST else 1
    outputs = image * (OUT_CHANNELS * pooled_h * pooled_w)

    pending = ()
    for _ in tl.static_range(RH):
        pending = pending + (tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32),)
        pending = pending + (tl.zeros((BLOCK_M, BLOCK_N), tl.int32),)
    for step in range(chunk + RH if RH > 0 else 1):
        cell_y = (row + step) * POOL_STRIDE_H - POOL_PADDING_H
        y = cell_y * STRIDE_H - PADDING_H
        start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_BIAS:
            start += bias[None, :]
        conv = ()
        for _ in tl.static_range(BH * BW):
            conv = conv + (start,)
        corner = images + (y.to(INDEX) * input_w + x) * step_w
        for pixel in range(SPAN_H * SPAN_W * CHUNKS):
            first = pixel % CHUNKS * BLOCK_K
            u = pixel // CHUNKS // SPAN_W
            v = pixel // CHUNKS % SPAN_W
            mask = there & within(y + u, input_h) & within(x + v, input_w)
            pixels = input_ptr + corner + (u * input_w + v) * step_w
            in_channel = first + depth
            if LAST:
                patch = load(pixels[:, None] + in_channel[None, :], mask[:, None] & (in_channel < IN_CHANNELS)[None, :])
            else:
                offsets = (in_channel * plane)[:, None]
                patch = tl.trans(load(pixels[None, :] + offsets, mask[None, :] & (in_channel < IN_CHANNELS)[:, None]))
            patch = tf32(patch, PRECISION)
            new = ()
            for b in tl.static_range(BH):
                for a in tl.static_range(BW):
                    total = conv[b * BW + a]
                    tap_h, tap_w = u - b * STRIDE_H, v - a * STRIDE_W
                    if (tap_h >= 0) & (tap_h < KERNEL_H) & (tap_w >= 0) & (tap_w < KERNEL_W):
                        tap = tap_h * KERNEL_W + tap_w
                        weight = load(weights + (tap * (IN_PADDED * OUT_PADDED) + first))
                        total = tl.dot(patch, tl.trans(weight), total, input_precision=PRECISION)
                    new = new + (total,)
            conv = new

        opened = ()
        for _ in tl.static_range(1):
            opened = opened + (tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32),)
            opened = opened + (tl.zeros((BLOCK_M, BLOCK_N), tl.int32),)
        opened = opened + pending
        for b in tl.static_range(BH):
            best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
            argmax = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            for q in tl.static_range(POOL_W):
                value = conv[b * BW + q % BW]
                if q >= BW:
                    other = tl.minimum(number + q // BW, BLOCK_M - 1)[:, None]
                    value = tl.gather(value, tl.broadcast_to(other, (BLOCK_M, BLOCK_N)), axis=0)
                inside = within(cell_y + b, conv_h) & within(cell_x + q, conv_w)
                value = tl.where(inside[:, None], value, float("-inf"))
                best, argmax = better(best, value, argmax, q, RETURN_ARGMAX)
            new = ()
            for k in tl.static_range(RH + 1):
                found = opened[2 * k], opened[2 * k + 1]
                if k * POOL_STRIDE_H + b < POOL_H:
                    found = better(found[0], best, found[1], argmax + (k * POOL_STRIDE_H + b) * POOL_W, RETURN_ARGMAX)
                new = new + found
            opened = new
        pooled_row = row + (step - RH)
        mask = whole & (step >= RH) & (pooled_row < pooled_h)
        place = outputs + (pooled_row * pooled_w + column) * out_step
        both = mask[None, :] & (channel < OUT_CHANNELS)[:, None]
        offsets = (channel * out_plane)[:, None] + place[None, :]
        best = opened[2 * RH]
        store(output_ptr + offsets, tl.trans(relu(best)), both)
        if RETURN_ARGMAX:
            winner = tl.where(best <= 0, NO_WINNER, opened[2 * RH + 1]).to(tl.uint8)
            tl.store(argmax_ptr + offsets, tl.trans(winner), mask=both)
        pending = opened[: 2 * RH]


@triton.jit(
    do_not_specialize=["rows", "input_h", "input_w", "conv_h", "conv_w", "pooled_h", "pooled_w", "rows_per_part"]
)
def _grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    partials_ptr,
    rows,
    input_h,
    input_w,
    conv_h,
    conv_w,
    pooled_h,
    pooled_w,
    rows_per_part,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PADDING_H: tl.constexpr,
    POOL_PADDING_W: tl.constexpr,
    MISSING_H: tl.constexpr,
    MISSING_W: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAP_ROWS: tl.constexpr,
):
    """Gradients of the weight and the bias: one part of each sum, which `sum_partials` completes in a fixed order.

    Maths: ``grad_weight[o, c, kh, kw] = sum over cells (n, y, x) of grad_conv[n, o, y, x] * input[n, c, y * stride -
    padding + kh, x * stride - padding + kw]``, where grad_conv sums, in float32, the gradients of the windows whose
    argmax is that cell, from the window farthest below and right on.

    Tile: BLOCK_M input channels x BLOCK_N output channels x all taps of TAP_ROWS kernel rows. The sum runs over the
    `rows_per_part` blocks (n, i, j) of one part, BLOCK_K at a time. The gradients of a block's cells are as many
    operands of matrix products. Each pixel of the blocks' patches is loaded once, and multiplied with the gradients of
    all cells that see it: for each it is another tap. The programs of the first kernel rows and input channels sum the
    bias. A bit of MISSING_H and MISSING_W says that the convolution lacks this row or column of cells in some block:
    their gradient is 0, but must not meet an infinite pixel.

    Shapes and strides: grad and argmax (N, O, PH, PW), input (N, C, H, W), all contiguous or, if LAST, channels_last;
    partials (parts, O * C * KH * KW + O) float32: the weight's, in its own order, then the bias'.

    Cost per image: 2 * BH * BW * (PH + RH) * (PW + RW) * O * C * KH * KW FLOP; reads each pixel once for every block
    under whose patch it lies, mostly from cache, and the gradients (RH + 1) * (RW + 1) times.
    """
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    SPAN_H: tl.constexpr = (BH - 1) * STRIDE_H + TAP_ROWS
    SPAN_W: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    IN_TILES: tl.constexpr = (IN_CHANNELS + BLOCK_M - 1) // BLOCK_M
    ROW_TILES: tl.constexpr = (KERNEL_H + TAP_ROWS - 1) // TAP_ROWS
    number, part = tl.program_id(0), tl.program_id(1)
    in_channel = number % IN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    tap_row = number // IN_TILES % ROW_TILES * TAP_ROWS
    out_channel = number // (IN_TILES * ROW_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    with_bias = number % (IN_TILES * ROW_TILES) == 0
    plane = 1 if LAST else input_h * input_w
    step_w = IN_CHANNELS if LAST else 1
    out_plane = 1 if LAST else pooled_h * pooled_w
    out_step = OUT_CHANNELS if LAST else 1
    block_rows, block_columns = pooled_h + RH, pooled_w + RW

    sums = ()
    for _ in tl.static_range(TAP_ROWS * KERNEL_W):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    bias_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = part.to(INDEX) * rows_per_part
    for start in range(0, rows_per_part, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        there = row < rows
        image = row // (block_rows * block_columns)
        i = (row // block_columns % block_rows).to(tl.int32)
        j = (row % block_columns).to(tl.int32)
        windows = image * (OUT_CHANNELS * pooled_h * pooled_w) + (i * pooled_w + j) * out_step
        offsets = windows[None, :] + (out_channel * out_plane)[:, None]
        totals = ()
        for _ in tl.static_range(BH * BW):
            totals = totals + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
        for k in tl.static_range(RH, -1, -1):
            for w in tl.static_range(RW, -1, -1):
                known = there & within(i - k, pooled_h) & within(j - w, pooled_w)
                both = known[None, :] & (out_channel < OUT_CHANNELS)[:, None]
                found = offsets - (k * pooled_w + w) * out_step
                argmax = tl.load(argmax_ptr + found, mask=both, other=NO_WINNER).to(tl.int32)
                grad = load(grad_ptr + found, both)
                value = grad.to(tl.float32)
                if k == 0 and w == 0:  # noqa: SIM102  (Triton compiles only what this constant lets it)
                    if with_bias:
                        bias_sums = tl.where(argmax != NO_WINNER, bias_sums + value, bias_sums)
                new = ()
                for b in tl.static_range(BH):
                    for a in tl.static_range(BW):
                        total = totals[b * BW + a]
                        if k * POOL_STRIDE_H + b < POOL_H and w * POOL_STRIDE_W + a < POOL_W:
                            wins = argmax == (k * POOL_STRIDE_H + b) * POOL_W + w * POOL_STRIDE_W + a
                            total = tl.where(wins, total + value, total)
                        new = new + (total,)
                totals = new
        cells = ()
        for cell in tl.static_range(BH * BW):
            cells = cells + (tl.trans(tf32(totals[cell].to(grad.dtype), PRECISION)),)

        cell_y, cell_x = i * POOL_STRIDE_H - POOL_PADDING_H, j * POOL_STRIDE_W - POOL_PADDING_W
        y, x = cell_y * STRIDE_H + (tap_row - PADDING_H), cell_x * STRIDE_W - PADDING_W
        pixels = image * (IN_CHANNELS * input_h * input_w) + (y.to(INDEX) * input_w + x) * step_w
        pixels = input_ptr + (in_channel * plane)[:, None] + pixels[None, :]
        for u in tl.static_range(SPAN_H):
            inside = there
            if PADDING_H > 0 or MISSING_H > 0 or KERNEL_H % TAP_ROWS > 0:
                inside &= within(y + u, input_h)
            for v in tl.static_range(SPAN_W):
                mask = inside
                if PADDING_W > 0 or MISSING_W > 0:
                    mask &= within(x + v, input_w)
                mask = mask[None, :] & (in_channel < IN_CHANNELS)[:, None]
                patch = tf32(load(pixels + (u * input_w + v) * step_w, mask), PRECISION)
                done = ()
                for h in tl.static_range(TAP_ROWS):
                    for w in tl.static_range(KERNEL_W):
                        total = sums[h * KERNEL_W + w]
                        # The cell that sees the pixel through this tap, if there is one.
                        if (
                            (u - h >= 0 and (u - h) % STRIDE_H == 0 and (u - h) // STRIDE_H < BH)
                            and (v - w >= 0 and (v - w) % STRIDE_W == 0)
                            and (v - w) // STRIDE_W < BW
                        ):
                            seen = patch
                            if (MISSING_H >> (u - h) // STRIDE_H) % 2 > 0:
                                exists = within(cell_y + (u - h) // STRIDE_H, conv_h)
                                seen = tl.where(exists[None, :], seen, 0.0).to(patch.dtype)
                            if (MISSING_W >> (v - w) // STRIDE_W) % 2 > 0:
                                exists = within(cell_x + (v - w) // STRIDE_W, conv_w)
                                seen = tl.where(exists[None, :], seen, 0.0).to(patch.dtype)
                            cell = cells[(u - h) // STRIDE_H * BW + (v - w) // STRIDE_W]
                            total = tl.dot(seen, cell, total, input_precision=PRECISION)
                        done = done + (total,)
                sums = done

    WEIGHTS: tl.constexpr = OUT_CHANNELS * IN_CHANNELS * KERNEL_H * KERNEL_W
    parts = partials_ptr + part.to(INDEX) * (WEIGHTS + OUT_CHANNELS)
    known = (in_channel < IN_CHANNELS)[:, None] & (out_channel < OUT_CHANNELS)[None, :]
    entries = (out_channel * IN_CHANNELS)[None, :] + in_channel[:, None]
    entries = parts + (entries * (KERNEL_H * KERNEL_W) + tap_row * KERNEL_W)
    for tap in tl.static_range(TAP_ROWS * KERNEL_W):
        tl.store(entries + tap, sums[tap], mask=known & (tap_row + tap // KERNEL_W < KERNEL_H))
    if with_bias:
        tl.store(parts + (WEIGHTS + out_channel), tl.sum(bias_sums, axis=1), mask=out_channel < OUT_CHANNELS)


def _tile(dtype: torch.dtype, channels: int, out_channels: int, geometry: ConvPoolGeometry) -> dict[str, int]:
    """Choose the tile: as many output channels as registers hold accumulators of, for cells and windows that wait."""
    on = architecture()
    deepest = 32 if dtype == torch.float32 or on == "sm_80" else 64
    block_k = next(k for k in (64, 32, 16) if k <= deepest and cdiv(channels, 16) * 16 % k == 0)
    block_n = min(64, max(16, next_power_of_2(out_channels)))
    if INTERPRETED:
        return {"BLOCK_M": 256, "BLOCK_N": block_n, "BLOCK_K": block_k}
    down, right = (min(sizes) for sizes in zip(geometry.pool_size, geometry.pool_stride, strict=True))
    reach = (geometry.pool_size[0] - 1) // geometry.pool_stride[0]
    if on in ("sm_80", "sm_100") and reach > 1:  # rows of more windows wait
        block_n = 16
    # Accumulators of a block: 128 blocks leave room for 288, and 64 for 576. Only wgmma multiplies 64 rows well.
    sums = down * right + 2 * reach
    while block_n > 16 and sums * block_n > (576 if on == "sm_90" else 288):
        block_n //= 2
    block_m = 128 if on.startswith("sm_") and sums * block_n <= 288 else 64
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 1}


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvPoolGeometry,
    return_argmax: bool,
    last: bool,
    options: Mapping[str, int],
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; arguments and results as in `conv2d_relu_max_pool2d`, tensors dense in one layout."""
    shape = images, _, pooled_h, pooled_w = geometry.output_shape(input, weight)
    layout = torch.channels_last if last and shape[1] > 1 else torch.contiguous_format
    output = empty(shape, input, memory_format=layout)
    argmax = empty(shape, output, torch.uint8, layout) if return_argmax else None
    (out_channels, channels), taps = weight.shape[:2], weight[0, 0].numel()
    tile: dict[str, Any] = {"PRECISION": precision_of(input.dtype)}
    tile |= _tile(input.dtype, channels, out_channels, geometry) | options
    tile["IN_PADDED"] = cdiv(channels, tile["BLOCK_K"]) * tile["BLOCK_K"]
    tiles = cdiv(out_channels, tile["BLOCK_N"])
    tile["OUT_PADDED"] = tiles * tile["BLOCK_N"]
    packed = empty((taps, tile["OUT_PADDED"], tile["IN_PADDED"]), input)
    block = 65536 if INTERPRETED else 1024
    launch(
        _pack_kernel,
        (cdiv(packed.numel(), block),),
        *(weight, packed),
        **sizes_of(_pack_kernel, geometry, weight),
        **{name: tile[name] for name in ("PRECISION", "IN_PADDED", "OUT_PADDED")},
        BLOCK=block,
    )
    down, right = ((pool - 1) // step for pool, step in zip(geometry.pool_size, geometry.pool_stride, strict=True))
    # Few chunks of rows under overlapping windows, as each computes rows of the next once more.
    columns = images * (pooled_w + right)
    chunk = cdiv(pooled_h, max(1, min(pooled_h, 65536 // (columns * tiles)))) if down else 1
    chunks = cdiv(pooled_h, chunk)
    lanes = columns * chunks
    conv = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    launch(
        _forward_kernel,
        (cdiv(lanes, tile["BLOCK_M"] - right) * tiles,),
        *(input, packed, weight if bias is None else bias, output, output if argmax is None else argmax),
        *(lanes, *input.shape[2:], *conv, pooled_h, pooled_w, chunk, chunks),
        **sizes_of(_forward_kernel, geometry, weight),
        LAST=last,
        HAS_BIAS=bias is not None,
        RETURN_ARGMAX=return_argmax,
        INDEX=index_type(input, output),
        **tile,
        **({} if INTERPRETED else all_registers()),
    )
    return output, argmax


def _weight_tile(out_channels: int, kernel: tuple[int, int], cells: int, missing: bool) -> dict[str, int]:
    """Choose the tile of the weight's gradient: as many kernel rows as registers hold sums of.

    Args:
        out_channels: of the weight.
        kernel: height and width.
        cells: of a block.
        missing: whether the convolution lacks cells of some block.
    """
    on = architecture()
    block_n = min(64 if on in ("sm_90", "interpreted") else 32, max(16, next_power_of_2(out_channels)))
    if INTERPRETED:
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 1024, "TAP_ROWS": cdiv(kernel[0], 2)}
    # Taps times output channels, which are half as many sums a lane. A single row of taps may have more than several
    # rows together, unless masks or gradients of many cells take registers. On sm_100 sums lie in tensor memory, twice.
    most, widest = {"sm_90": (240, 160 if cells > 4 else 240 if missing else 320), "sm_100": (160, 160)}.get(
        on, (96, 160)
    )
    while block_n > 16 and kernel[1] * block_n > widest:
        block_n //= 2
    rows = cdiv(kernel[0], cdiv(kernel[0], max(1, most // (block_n * kernel[1]))))
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 16, "TAP_ROWS": rows, "num_warps": 4, "num_stages": 1}


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
    """Launch the gradients of the weight and the bias; all tensors dense, images and gradients in one layout."""
    (out_channels, channels), kernel = weight.shape[:2], (weight.shape[2], weight.shape[3])
    conv = geometry.conv_size((input.shape[2], input.shape[3]), kernel)
    rows, cells, missing = argmax.shape[0], 1, []
    for axis, (pool, step) in enumerate(zip(geometry.pool_size, geometry.pool_stride, strict=True)):
        blocks = argmax.shape[2 + axis] + (pool - 1) // step
        rows, cells = rows * blocks, cells * min(pool, step)
        before = geometry.pool_padding[axis]
        after = (blocks - 1) * step - before
        missing.append(sum(1 << n for n in range(min(pool, step)) if n < before or after + n >= conv[axis]))
    tile = _weight_tile(out_channels, kernel, cells, any(missing)) | options
    tiles = cdiv(channels, tile["BLOCK_M"]) * cdiv(kernel[0], tile["TAP_ROWS"]) * cdiv(out_channels, tile["BLOCK_N"])
    # At least eight steps a part: writing and adding up the parts of a few images takes longer than their products.
    parts, rows_per_part = split_reduction(rows, 2 * tile["BLOCK_K"], tiles)
    result, bias = empty(weight.shape, weight), empty((out_channels,), weight)
    partials = empty((parts, weight.numel() + out_channels), input, torch.float32)
    launch(
        _grad_weight_kernel,
        (tiles, parts),
        *(grad_output, argmax, input, partials),
        *(rows, *input.shape[2:], *conv, *argmax.shape[2:], rows_per_part),
        **sizes_of(_grad_weight_kernel, geometry, weight),
        MISSING_H=missing[0],
        MISSING_W=missing[1],
        LAST=last,
        PRECISION=precision_of(input.dtype),
        INDEX=index_type(grad_output, argmax, input, partials),
        **tile,
        **({} if INTERPRETED else all_registers()),
    )
    sum_partials((partials, (result, bias), 1.0), later=None if later is None else later.sums)
    return result, bias
