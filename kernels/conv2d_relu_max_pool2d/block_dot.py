"""The forward of many channels on matrix units: a lane computes a block of cells, and each cell once.

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
    store,
    tf32,
)
from .shared import better, covers, pack, precision_of, sizes_of, within

__all__ = ["covers", "forward"]


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
