"""Convolutions of few channels on the FMA units: a lane computes whole results in its own registers.

A lane owns a block: a pooling window's cells of the convolution, up to the first cell of the next window. A block is
2 x 2 cells for a pool of 2x2/2 or 3x3/2, and 3 x 3 for 3x3/3. If windows overlap, a window also has cells of other
blocks. Cells of blocks further right belong to the next lanes, which hand them over by shuffles. Cells of blocks
further down belong to the same lane, which computes them next. So only cells at the border of a program are computed
twice.

Channels, kernel, strides, paddings and the window are compile-time constants, so that loops over taps are unrolled.
Image sizes are run-time values, unless the table's `FIXED` makes them constants. Images lie as NCHW or as
channels_last. Every result is a chain of fused multiply-adds in a fixed order, or a sum of such chains in a fixed
order. So a tile may depend on the batch, and the forward's bits do not.

Letters: N images, C input and O output channels, H x W input, KH x KW kernel, PH x PW pooled output, BH x BW cells of
a block; RH and RW: how many blocks further down and right a window reaches (0 where windows do not overlap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .. import rules
from ..geometry import ConvPoolGeometry
from ..joint import Job, Later, launch_job
from ..runtime import (
    INTERPRETED,
    NO_WINNER,
    all_registers,
    cdiv,
    empty,
    index_type,
    launch,
    relu,
    store,
    sum_partials,
)
from .shared import better, covers, sizes_of, within

__all__ = ["covers", "forward", "grad_input", "grad_weight"]


@triton.jit
def _inside(position, limit, K: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, PERIOD: tl.constexpr):
    """Whether pixel K of a block's patch is in the image, along one axis.

    Of the arguments

        position: of the patch's first pixel in the image. It is FROM below a multiple of PERIOD. So the comparison can
            be rounded to such multiples, and pixels that enter the image with the same block share one comparison.
        limit: the image's pixels.
        FROM, TO: pixels with K >= FROM never lie before the image and those with K < TO never behind it, in any block.
        PERIOD: pixels from block to block.
    """
    if K < TO:
        return position >= (FROM - K + PERIOD - 1) // PERIOD * PERIOD - FROM
    elif K >= FROM:  # noqa: RET505  (Triton compiles what follows a return)
        return position < limit - K
    else:
        return within(position + K, limit)


@triton.jit
def _cell_there(
    cell_y, cell_x, conv_h, conv_w, B: tl.constexpr, A: tl.constexpr, CELLS_H: tl.constexpr, CELLS_W: tl.constexpr
):
    """Which blocks, whose first cell is (cell_y, cell_x), have their cell (B, A).

    All have those with B < CELLS_H and A < CELLS_W. Others may lie beyond the convolution, or in the pool's padding.
    """
    if A < CELLS_W:
        return within(cell_y + B, conv_h)
    elif B < CELLS_H:  # noqa: RET505  (Triton compiles what follows a return)
        return within(cell_x + A, conv_w)
    else:
        return within(cell_y + B, conv_h) & within(cell_x + A, conv_w)


@triton.jit
def _load_pixels(
    pointers,
    x,
    there,
    width,
    K: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    PERIOD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load pixel K of a row, or the pair that starts there, as float32; 0 outside the image.

    Arguments as of `_pixels`.
    """
    if (K < FROM) | (K >= TO):
        mask = _inside(x, width, K, FROM, TO, PERIOD)
        if MASKED:
            mask &= there
        if len(pointers.shape) == 2:
            mask = mask[:, None]
        values = tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        mask = there
        if len(pointers.shape) == 2:
            mask = mask[:, None]
        values = tl.load(pointers, mask=mask, other=0.0)
    else:
        values = tl.load(pointers)
    return values.to(tl.float32)


@triton.jit
def _pixels(
    starts,
    line,
    x,
    there,
    width,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    PERIOD: tl.constexpr,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Load COUNT neighbours of a row, STEP elements apart, as float32; 0 for those that are not in the image.

    PAIRS tells at which neighbour an even address begins: 0 or 1. From there on pixels are loaded two at a time. If
    PAIRS is -1, no address is known to be even, and pixels are loaded one by one. FROM, TO and PERIOD as of `_inside`.
    Of the arguments

        starts: pointers to the first neighbour of a row, or to the first pair. In the latter case they are computed
            as twice a number, so that the compiler knows that pairs begin at even addresses.
        line: how far from there the wanted row lies, in elements, or in pairs.
        x: the first neighbour's column.
        there: whether a lane's row is there at all; looked at if MASKED.
        width: columns of the image.
    """
    values = ()
    pointers = starts + line if PAIRS < 0 else starts + line * 2
    LEAD: tl.constexpr = 0 if PAIRS < 0 else PAIRS
    for i in tl.static_range(COUNT if PAIRS < 0 else PAIRS):
        found = _load_pixels(pointers + (i * STEP - LEAD), x, there, width, i, FROM, TO, PERIOD, MASKED)
        values = values + (found,)
    if PAIRS >= 0:
        pairs = pointers[:, None] + tl.arange(0, 2)[None, :]
        for i in tl.static_range(PAIRS, COUNT - 1, 2):
            # A row of even length has both or neither.
            found = _load_pixels(pairs + (i - PAIRS), x, there, width, i, FROM, TO, PERIOD, MASKED)
            values = values + tl.split(found)
        if (COUNT - PAIRS) % 2 == 1:
            last = pointers + (COUNT - 1 - PAIRS)
            values = values + (_load_pixels(last, x, there, width, COUNT - 1, FROM, TO, PERIOD, MASKED),)
    return values


_CODES = tl.constexpr(2.0**23)
"""A float32 argmax is this number plus the cell. One is then the mantissa's last bit, so the bits end in the cell."""


@triton.jit
def _finish(outputs, argmax_ptrs, best, argmax, mask, RETURN_ARGMAX: tl.constexpr):
    """Store a pooled cell after relu, and its argmax.

    The argmax is a float32, `_CODES` plus the cell, because a float is selected by one instruction and an integer by
    several masks and shifts. The last bits of that float are the cell.
    """
    store(outputs, relu(best), mask)
    if RETURN_ARGMAX:
        argmax = tl.where(best <= 0, _CODES + NO_WINNER, argmax)
        tl.store(argmax_ptrs, argmax.to(tl.int32, bitcast=True).to(tl.uint8), mask=mask)


@triton.jit
def _add_rows(
    conv,
    rows,
    taps,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Add kernel row R, whose weights are at `taps`, times its pixels to the cells of all channels.

    `rows[FIRST + STRIDE_H * b]` are the pixels of the cells in row b.
    """
    done = ()
    for o in tl.static_range(CHANNELS):
        cells = conv[o * BH * BW : (o + 1) * BH * BW]
        for q in tl.static_range(KERNEL_W):
            tap = tl.load(taps + (o * DEPTH + R * KERNEL_W + q)).to(tl.float32)
            new = ()
            for b in tl.static_range(BH):
                for a in tl.static_range(BW):
                    new = new + (tl.fma(rows[FIRST + b * STRIDE_H][a * STRIDE_W + q], tap, cells[b * BW + a]),)
            cells = new
        done = done + cells
    return done


@triton.jit(do_not_specialize=["lanes", "input_h", "input_w", "output_h", "output_w", "chunk", "chunks"])
def _forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    argmax_ptr,
    lanes,
    input_h,
    input_w,
    output_h,
    output_w,
    chunk,
    chunks,
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
    FIXED_H: tl.constexpr,
    FIXED_W: tl.constexpr,
    FIXED_POOLED_H: tl.constexpr,
    FIXED_POOLED_W: tl.constexpr,
    LAST: tl.constexpr,
    ROWS_FROM: tl.constexpr,
    ROWS_TO: tl.constexpr,
    COLUMNS_FROM: tl.constexpr,
    COLUMNS_TO: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Pooled output and argmax, in exact float32.

    Maths: as in `general`. Each convolution cell is one chain of fused multiply-adds: the bias, then all products in
    the order (channel, kernel row, kernel column). So no result depends on the tile.

    Tile: BLOCK lanes (two or four a thread) x CHANNELS output channels. A program's number counts the tiles of channels
    first, so that programs with neighbouring numbers read the same input.

    - If windows do not overlap, a lane computes one pooled cell (n, i, j).
    - If they overlap, a lane computes a column of blocks (n, chunk, j): `chunk` + RH rows of blocks, one after the
      other. A row has PW + RW columns. The last RW lanes of a program store nothing; they compute cells that lanes
      before them need.

    For each input channel a lane slides down its patch of ((BH - 1) * stride + KH) x ((BW - 1) * stride + KW) pixels.
    Weights are scalars that all lanes share; a lane uses each for BH * BW products. If CHANNELS does not divide O, the
    last tile begins earlier, and some results are stored twice with the same bits.

    Shapes and strides: input (N, C, H, W), output and argmax (N, O, PH, PW), all contiguous or, if LAST, all
    channels_last; weight (O, C, KH, KW) and bias (O) contiguous.

    Saves: one byte of argmax per pooled cell, nothing else.

    Cost per image: 2 * BH * BW * PH * PW * O * C * KH * KW FLOP, (PH + RH) * (PW + RW) for overlapping windows; reads
    the input once per tile of channels, writes O * PH * PW outputs and as many bytes of argmax.
    """
    # A block's cells: a window's up to the first of the next one. (In Triton 3.6 no function returns a constant.)
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    WIDTH: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    PERIOD_H: tl.constexpr = POOL_STRIDE_H * STRIDE_H
    PERIOD_W: tl.constexpr = POOL_STRIDE_W * STRIDE_W
    SPAN: tl.constexpr = (BH - 1) * STRIDE_H + 1  # rows of pixels that one kernel row meets
    STEP: tl.constexpr = IN_CHANNELS if LAST else 1
    DEPTH: tl.constexpr = IN_CHANNELS * KERNEL_H * KERNEL_W
    tiles: tl.constexpr = (OUT_CHANNELS + CHANNELS - 1) // CHANNELS
    height = FIXED_H if FIXED_H > 0 else input_h
    width = FIXED_W if FIXED_W > 0 else input_w
    pooled_h = FIXED_POOLED_H if FIXED_POOLED_H > 0 else output_h
    pooled_w = FIXED_POOLED_W if FIXED_POOLED_W > 0 else output_w
    first = tl.minimum(tl.program_id(0) % tiles * CHANNELS, OUT_CHANNELS - CHANNELS)
    number = tl.arange(0, BLOCK)
    lane = (tl.program_id(0) // tiles).to(INDEX) * (BLOCK - RW) + number
    mask = (lane < lanes) & (number < BLOCK - RW)
    # Lanes beyond the last repeat it: without padding loads need no mask then.
    lane = tl.minimum(lane, lanes - 1)
    columns = pooled_w + RW
    # A chunk is a row of windows where these do not overlap. Unsigned numbers take fewer instructions to divide.
    unsigned = lane.to(tl.uint64) if INDEX == tl.int64 else lane.to(tl.uint32)  # noqa: SIM300
    columns = (lane * 0 + columns).to(unsigned.dtype)
    per_image = (lane * 0 + (pooled_h if RH == 0 else chunks)).to(unsigned.dtype)
    above = unsigned // columns
    column = (unsigned % columns).to(tl.int32)
    row = (above % per_image).to(tl.int32) * (1 if RH == 0 else chunk)
    image = (above // per_image).to(INDEX)
    mask &= column < pooled_w
    x = (column * POOL_STRIDE_W - POOL_PADDING_W) * STRIDE_W - PADDING_W
    # From here on offsets of pixels count pairs, where pairs are loaded.
    line = width * STEP if PAIRS < 0 else width >> 1
    corner = image * (height * line * (1 if LAST else IN_CHANNELS)) + (x * STEP if PAIRS < 0 else (x + PAIRS) >> 1)
    limit_w = x * 0 + width
    limit_h = x * 0 + height
    position = 1 if not LAST else OUT_CHANNELS
    plane = 1 if LAST else pooled_h * pooled_w
    outputs = image * (OUT_CHANNELS * pooled_h * pooled_w) + first * plane + column * position
    taps_ptr = weight_ptr + first * DEPTH

    pending = ()
    for _ in tl.static_range(RH * CHANNELS):
        pending = pending + (tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), _CODES, tl.float32))
    for step in range(chunk + RH if RH > 0 else 1):
        block_row = row + step
        if RH > 0:  # the last chunk may have fewer rows
            block_row = tl.minimum(block_row, pooled_h + (RH - 1))
        cell_y = block_row * POOL_STRIDE_H - POOL_PADDING_H
        y = cell_y * STRIDE_H - PADDING_H
        conv = ()
        for o in tl.static_range(CHANNELS):
            start = tl.zeros((BLOCK,), tl.float32)
            if HAS_BIAS:
                start += tl.load(bias_ptr + first + o).to(tl.float32)
            for _ in tl.static_range(BH * BW):
                conv = conv + (start,)
        offset = corner + y.to(INDEX) * line
        taps = taps_ptr
        for _channel in range(IN_CHANNELS):
            starts = input_ptr + (offset if PAIRS < 0 else offset * 2)
            if UNROLL:
                rows = ()
                for r in tl.static_range(KERNEL_H):
                    for h in tl.static_range(r if r == 0 else r + SPAN - 1, r + SPAN):
                        rows = rows + (
                            _pixels(
                                starts,
                                h * line,
                                x,
                                _inside(y, limit_h, h, ROWS_FROM, ROWS_TO, PERIOD_H),
                                limit_w,
                                WIDTH,
                                STEP,
                                COLUMNS_FROM,
                                COLUMNS_TO,
                                PERIOD_W,
                                h < ROWS_FROM or h >= ROWS_TO,
                                PAIRS,
                            ),
                        )
                    conv = _add_rows(
                        conv,
                        rows,
                        taps,
                        r,
                        r,
                        CHANNELS,
                        DEPTH,
                        KERNEL_W,
                        STRIDE_H,
                        STRIDE_W,
                        BH,
                        BW,
                    )
            else:
                for r in range(KERNEL_H):
                    rows = ()
                    for h in tl.static_range(SPAN):
                        if h % STRIDE_H == 0:
                            rows = rows + (
                                _pixels(
                                    starts,
                                    (r + h) * line,
                                    x,
                                    within(y + (r + h), limit_h),
                                    limit_w,
                                    WIDTH,
                                    STEP,
                                    COLUMNS_FROM,
                                    COLUMNS_TO,
                                    PERIOD_W,
                                    ROWS_FROM > 0 or ROWS_TO < SPAN - 1 + KERNEL_H,
                                    PAIRS,
                                ),
                            )
                    conv = _add_rows(
                        conv,
                        rows,
                        taps + r * KERNEL_W,
                        0,
                        0,
                        CHANNELS,
                        DEPTH,
                        KERNEL_W,
                        1,
                        STRIDE_W,
                        BH,
                        BW,
                    )
            offset += 1 if LAST else height * line
            taps += KERNEL_H * KERNEL_W

        if CELLS_H < BH or CELLS_W < BW:
            conv_h = (limit_h + (2 * PADDING_H - KERNEL_H)) // STRIDE_H + 1
            conv_w = (limit_w + (2 * PADDING_W - KERNEL_W)) // STRIDE_W + 1
            cell_x = column * POOL_STRIDE_W - POOL_PADDING_W
            clipped = ()
            for o in tl.static_range(CHANNELS):
                for b in tl.static_range(BH):
                    for a in tl.static_range(BW):
                        # All alike: sm_100 multiplies pairs of cells, and would move one that alone is selected.
                        there = within(cell_y + b, conv_h) & within(cell_x + a, conv_w)
                        clipped = clipped + (tl.where(there, conv[(o * BH + b) * BW + a], float("-inf")),)
            conv = clipped
        done = mask & (row + step - RH < pooled_h)
        if RH > 0:
            done &= step >= RH
        here = outputs + (row + step - RH).to(INDEX) * (pooled_w * position)
        waiting = ()
        for o in tl.static_range(CHANNELS):
            windows = pending[2 * RH * o : 2 * RH * (o + 1)]
            best = tl.full((BLOCK,), float("-inf"), tl.float32)
            argmax = tl.full((BLOCK,), _CODES, tl.float32)
            for b in tl.static_range(BH):
                # The row's best for the window that starts in this block, its code counted from the row's first.
                for w in tl.static_range(POOL_W):
                    value = conv[(o * BH + b) * BW + w % BW]
                    if w >= BW:
                        value = tl.gather(value, tl.minimum(number + w // BW, BLOCK - 1), axis=0)
                    if RH == 0:
                        if b == 0 and w == 0:
                            best = value
                        else:
                            best, argmax = better(best, value, argmax, _CODES + (b * POOL_W + w), RETURN_ARGMAX)
                    elif w == 0:
                        row_best = value
                        row_argmax = tl.full((BLOCK,), _CODES, tl.float32)
                    else:
                        row_best, row_argmax = better(row_best, value, row_argmax, _CODES + w, RETURN_ARGMAX)
                if RH > 0:
                    merged = ()
                    for k in tl.static_range(RH):
                        # Oldest first: this block lies RH - k blocks below the window's own.
                        old, code = windows[2 * k], windows[2 * k + 1]
                        if (RH - k) * BH + b < POOL_H:
                            offset_code = 1.0 * (((RH - k) * BH + b) * POOL_W)
                            old, code = better(old, row_best, code, row_argmax + offset_code, RETURN_ARGMAX)
                        merged = merged + (old, code)
                    windows = merged
                    if b == 0:
                        best = row_best
                        argmax = row_argmax
                    else:
                        best, argmax = better(best, row_best, argmax, row_argmax + 1.0 * (b * POOL_W), RETURN_ARGMAX)
            if RH > 0:
                _finish(
                    output_ptr + here + o * plane,
                    argmax_ptr + here + o * plane,
                    windows[0],
                    windows[1],
                    done,
                    RETURN_ARGMAX,
                )
                waiting = waiting + windows[2:] + (best, argmax)
            else:
                _finish(output_ptr + here + o * plane, argmax_ptr + here + o * plane, best, argmax, done, RETURN_ARGMAX)
        pending = waiting


@triton.jit
def _cells(
    grads,
    argmaxes,
    i,
    j,
    there,
    pooled_h,
    pooled_w,
    row_step,
    column_step,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
):
    """Return the gradients of a block's BH x BW cells, and the masked gradient of its own window (0 without a winner).

    Of the arguments

        grads, argmaxes: pointers to the block's own window.
        i, j: its row and column; windows up to RH above and RW left of it reach the block.
        there: which lanes have a block at all.
        row_step, column_step: elements from window to window.
    """
    cells = ()
    masked_grads = tl.zeros(j.shape, tl.float32)
    for k in tl.static_range(RH + 1):
        for w in tl.static_range(RW + 1):
            offset = k * row_step + w * column_step
            if RH + RW > 0:
                mask = there
                # Of RH + 1 windows above each other the first has none above it, the last none below.
                if k > 0:
                    mask &= i >= k
                if k < RH:
                    mask &= i < pooled_h + k
                if w > 0:
                    mask &= j >= w
                if w < RW:
                    mask &= j < pooled_w + w
                # Without a winner the gradient is not looked at.
                grad = tl.load(grads - offset, mask=mask).to(tl.float32)
                argmax = tl.load(argmaxes - offset, mask=mask, other=NO_WINNER).to(tl.int32)
            else:
                grad = tl.load(grads).to(tl.float32)
                argmax = tl.where(there, tl.load(argmaxes).to(tl.int32), NO_WINNER)
            new = ()
            for b in tl.static_range(BH):
                for a in tl.static_range(BW):
                    if k * BH + b < POOL_H and w * BW + a < POOL_W:
                        wins = argmax == (k * BH + b) * POOL_W + w * BW + a
                        if k + w == 0:
                            new = new + (tl.where(wins, grad, 0.0),)
                        else:
                            # One instruction adds, or does not: a selected 0 that is added takes two.
                            new = new + (tl.where(wins, cells[b * BW + a] + grad, cells[b * BW + a]),)
                    else:
                        new = new + (cells[b * BW + a],)
            cells = new
            if k + w == 0:
                masked_grads = tl.where(argmax == NO_WINNER, 0.0, grad)
    return cells, masked_grads


@triton.jit
def _multiply(
    weight_sums,
    cells,
    starts,
    tops,
    x,
    y,
    there,
    cell_x,
    cell_y,
    height,
    width,
    conv_h,
    conv_w,
    line,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    STEP: tl.constexpr,
    PERIOD_H: tl.constexpr,
    PERIOD_W: tl.constexpr,
    ROWS_FROM: tl.constexpr,
    ROWS_TO: tl.constexpr,
    COLUMNS_FROM: tl.constexpr,
    COLUMNS_TO: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
    TAP_ROWS: tl.constexpr,
):
    """Add a block's cells times the pixels under them to the sums of CHANNELS x INPUTS x TAP_ROWS x KW weights.

    Of the arguments

        starts, tops: for each input channel, as `_pixels` takes them, pointers to a row, and how far below it the patch
            begins.
        x, y: the patch's first column and row.
        there: which lanes have a block at all.
        cell_x, cell_y: the block's first cell.
        height, width, conv_h, conv_w: of the image, and of the convolution.
        line: elements, or pairs, from row to row.
    """
    WIDTH: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    HEIGHT: tl.constexpr = (BH - 1) * STRIDE_H + TAP_ROWS
    done = ()
    for c in tl.static_range(INPUTS):
        patch = ()
        for h in tl.static_range(HEIGHT):
            inside = there
            if TAP_ROWS < KERNEL_H and (ROWS_FROM > 0 or ROWS_TO < HEIGHT - TAP_ROWS + KERNEL_H):
                inside = there & within(y + h, height)
            elif TAP_ROWS == KERNEL_H and (h < ROWS_FROM or h >= ROWS_TO):
                inside = there & _inside(y, height, h, ROWS_FROM, ROWS_TO, PERIOD_H)
            patch = patch + (
                _pixels(
                    starts[c],
                    tops[c] + h * line,
                    x,
                    inside,
                    width,
                    WIDTH,
                    STEP,
                    COLUMNS_FROM,
                    COLUMNS_TO,
                    PERIOD_W,
                    True,
                    PAIRS,
                ),
            )
        for r in tl.static_range(TAP_ROWS):
            for o in tl.static_range(CHANNELS):
                for q in tl.static_range(KERNEL_W):
                    total = weight_sums[((c * TAP_ROWS + r) * CHANNELS + o) * KERNEL_W + q]
                    for b in tl.static_range(BH):
                        for a in tl.static_range(BW):
                            pixel = patch[b * STRIDE_H + r][a * STRIDE_W + q]
                            cell = cells[(o * BH + b) * BW + a]
                            if b >= CELLS_H or a >= CELLS_W:
                                # A cell that is not there must not meet an infinity. One instruction adds, or does not;
                                # but where two are added by one instruction, a selected 0 keeps it.
                                has_cell = _cell_there(cell_y, cell_x, conv_h, conv_w, b, a, CELLS_H, CELLS_W)
                                if not INTERPRETED and cuda_capability_geq(10):
                                    total = tl.fma(cell, tl.where(has_cell, pixel, 0.0), total)
                                else:
                                    total = tl.where(has_cell, tl.fma(cell, pixel, total), total)
                            else:
                                total = tl.fma(cell, pixel, total)
                    done = done + (total,)
    return done


@triton.jit
def _sum_of_warp(values, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Return to every lane the sum of its warp's lanes, so that the lanes that store it already hold it."""
    total = tl.sum(values.reshape(WARPS, BLOCK // WARPS), axis=1, keep_dims=True)
    return total.broadcast_to(WARPS, BLOCK // WARPS).reshape(BLOCK)


@triton.jit
def _store_parts(
    partials_ptr,
    part,
    weight_sums,
    bias_sums,
    first,
    in_channel,
    first_row,
    with_bias,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
    TAP_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Add up the sums of a warp's lanes, and store them in the warp's row of the partial sums.

    A row holds the weight's sums, then the biases'. Each warp has a row of its own, so warps need not wait for each
    other. Neighbouring lanes store neighbouring sums.
    """
    WEIGHTS: tl.constexpr = OUT_CHANNELS * IN_CHANNELS * KERNEL_H * KERNEL_W
    TAPS: tl.constexpr = TAP_ROWS * KERNEL_W
    COUNT: tl.constexpr = CHANNELS * INPUTS * TAPS
    LANES: tl.constexpr = BLOCK // WARPS
    number = tl.arange(0, BLOCK)
    rows = partials_ptr + (part.to(INDEX) * WARPS + number // LANES) * (WEIGHTS + OUT_CHANNELS)
    lane = number % LANES
    for begin in tl.static_range(0, COUNT, LANES):
        values = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(begin, begin + LANES if begin + LANES < COUNT else COUNT):
            total = weight_sums[
                ((i // TAPS % INPUTS * TAP_ROWS + i % TAPS // KERNEL_W) * CHANNELS + i // (TAPS * INPUTS)) * KERNEL_W
                + i % KERNEL_W
            ]
            values = tl.where(lane == i - begin, _sum_of_warp(total, BLOCK, WARPS), values)
        entry = begin + lane
        channels = (first + entry // (TAPS * INPUTS)) * IN_CHANNELS + in_channel + entry // TAPS % INPUTS
        tap = first_row * KERNEL_W + entry % TAPS
        tl.store(rows + channels * (KERNEL_H * KERNEL_W) + tap, values, mask=entry < COUNT)
    if with_bias:
        values = tl.zeros((BLOCK,), tl.float32)
        for o in tl.static_range(CHANNELS):
            values = tl.where(lane == o, _sum_of_warp(bias_sums[o], BLOCK, WARPS), values)
        tl.store(rows + (WEIGHTS + first + lane), values, mask=lane < CHANNELS)


@triton.jit(do_not_specialize=["before", "parts", "images", "input_h", "input_w", "output_h", "output_w"])
def _grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    partials_ptr,
    before,
    parts,
    images,
    input_h,
    input_w,
    output_h,
    output_w,
    INDEX: tl.constexpr,
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
    FIXED_H: tl.constexpr,
    FIXED_W: tl.constexpr,
    FIXED_POOLED_H: tl.constexpr,
    FIXED_POOLED_W: tl.constexpr,
    LAST: tl.constexpr,
    ROWS_FROM: tl.constexpr,
    ROWS_TO: tl.constexpr,
    COLUMNS_FROM: tl.constexpr,
    COLUMNS_TO: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
    TAP_ROWS: tl.constexpr,
):
    """Gradients of the weight and the bias in exact float32: one part of each sum, which `sum_partials` completes.

    Maths: as in `general`: ``grad_weight[o, c, r, q] = sum over (n, cell) of grad_conv[n, o, cell] * input[n, c,
    cell * stride - padding + (r, q)]``, where grad_conv[cell] sums the gradients of the windows whose argmax is the
    cell (`_cells`). Cells that get nothing are multiplied as well, so that NaN and infinities in the input go where
    PyTorch's go.

    Tile: the program's number, less `before` (see `joint`), counts the tiles of weights first, then `parts` groups of
    BLOCK lanes. A lane stays on one block of cells and steps through the images. All lanes together take
    parts * BLOCK // ((PH + RH) * (PW + RW)) images at a time; lanes left over idle. A lane adds up
    CHANNELS x INPUTS x TAP_ROWS x KW weights in registers, and in the first of a part's programs the biases. At the end
    a tree adds up the lanes of each of the WARPS warps. If a tile does not divide the channels, the last tile begins
    earlier and stores some sums twice with the same bits.

    Shapes and strides: grad and argmax (N, O, PH, PW) and input (N, C, H, W) contiguous or, if LAST, channels_last;
    partials (parts * WARPS, O * C * KH * KW + O) float32: the weight's, in its own order, then the bias'.

    Saves: nothing. Cost per image: as the forward; reads the input once per tile of output channels, gradients and
    argmax once per tile of input channels.
    """
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    PERIOD_H: tl.constexpr = POOL_STRIDE_H * STRIDE_H
    PERIOD_W: tl.constexpr = POOL_STRIDE_W * STRIDE_W
    STEP: tl.constexpr = IN_CHANNELS if LAST else 1
    TAPS: tl.constexpr = TAP_ROWS * KERNEL_W
    TALL: tl.constexpr = KERNEL_H // TAP_ROWS
    height = FIXED_H if FIXED_H > 0 else input_h
    width = FIXED_W if FIXED_W > 0 else input_w
    pooled_h = FIXED_POOLED_H if FIXED_POOLED_H > 0 else output_h
    pooled_w = FIXED_POOLED_W if FIXED_POOLED_W > 0 else output_w
    in_tiles: tl.constexpr = (IN_CHANNELS + INPUTS - 1) // INPUTS
    tiles: tl.constexpr = (OUT_CHANNELS + CHANNELS - 1) // CHANNELS * in_tiles * TALL
    number = tl.program_id(0) - before
    tile = number % tiles // TALL
    first_row = number % TALL * TAP_ROWS
    in_channel = tl.minimum(tile % in_tiles * INPUTS, IN_CHANNELS - INPUTS)
    first = tl.minimum(tile // in_tiles * CHANNELS, OUT_CHANNELS - CHANNELS)
    with_bias = number % (TALL * in_tiles) == 0
    part = number // tiles
    columns = pooled_w + RW
    size = (pooled_h + RH) * columns
    lane = part * BLOCK + tl.arange(0, BLOCK)
    step = parts * BLOCK // size
    image = tl.where(lane < step * size, lane // size, images)
    i = lane % size // columns
    j = lane % columns
    cell_y = i * POOL_STRIDE_H - POOL_PADDING_H
    cell_x = j * POOL_STRIDE_W - POOL_PADDING_W
    y = cell_y * STRIDE_H - PADDING_H + first_row
    x = cell_x * STRIDE_W - PADDING_W
    # From here on offsets of pixels count pairs, where pairs are loaded.
    line = width * STEP if PAIRS < 0 else width >> 1
    plane = 1 if LAST else height * line
    corner = y * line + (x * STEP if PAIRS < 0 else (x + PAIRS) >> 1) + in_channel * plane
    column_step = OUT_CHANNELS if LAST else 1
    row_step = pooled_w * column_step
    out_plane = 1 if LAST else pooled_h * pooled_w
    window = i * row_step + j * column_step + first * out_plane
    limit_h, limit_w = x * 0 + height, x * 0 + width
    windows_h, windows_w = x * 0 + pooled_h, x * 0 + pooled_w
    conv_h = (limit_h + (2 * PADDING_H - KERNEL_H)) // STRIDE_H + 1
    conv_w = (limit_w + (2 * PADDING_W - KERNEL_W)) // STRIDE_W + 1

    weight_sums = ()
    bias_sums = ()
    zero = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(INPUTS * CHANNELS * TAPS):
        weight_sums = weight_sums + (zero,)
    for _ in tl.static_range(CHANNELS):
        bias_sums = bias_sums + (zero,)
    for _round in range((images + step - 1) // step):
        there = image < images
        row = tl.minimum(image, images - 1).to(INDEX)
        image += step
        offset = row * (OUT_CHANNELS * pooled_h * pooled_w) + window
        cells = ()
        masked_grads = ()
        for o in tl.static_range(CHANNELS):
            found, own = _cells(
                grad_ptr + (offset + o * out_plane),
                argmax_ptr + (offset + o * out_plane),
                i,
                j,
                there,
                windows_h,
                windows_w,
                row_step,
                column_step,
                POOL_H,
                POOL_W,
                BH,
                BW,
                RH,
                RW,
            )
            cells = cells + found
            masked_grads = masked_grads + (own,)
        if with_bias:
            done = ()
            for o in tl.static_range(CHANNELS):
                done = done + (bias_sums[o] + masked_grads[o],)
            bias_sums = done
        starts = ()
        tops = ()
        for c in tl.static_range(INPUTS):
            pixels = row * (height * line * (1 if LAST else IN_CHANNELS)) + (corner + c * plane)
            starts = starts + (input_ptr + (pixels if PAIRS < 0 else pixels * 2),)
            tops = tops + (0,)
        weight_sums = _multiply(
            weight_sums,
            cells,
            starts,
            tops,
            x,
            y,
            there,
            cell_x,
            cell_y,
            limit_h,
            limit_w,
            conv_h,
            conv_w,
            line,
            KERNEL_H,
            KERNEL_W,
            STRIDE_H,
            STRIDE_W,
            BH,
            BW,
            STEP,
            PERIOD_H,
            PERIOD_W,
            ROWS_FROM,
            ROWS_TO,
            COLUMNS_FROM,
            COLUMNS_TO,
            CELLS_H,
            CELLS_W,
            PAIRS,
            CHANNELS,
            INPUTS,
            TAP_ROWS,
        )

    _store_parts(
        partials_ptr,
        part,
        weight_sums,
        bias_sums,
        first,
        in_channel,
        first_row,
        with_bias,
        IN_CHANNELS,
        OUT_CHANNELS,
        KERNEL_H,
        KERNEL_W,
        CHANNELS,
        INPUTS,
        TAP_ROWS,
        INDEX,
        BLOCK,
        WARPS,
    )


@triton.jit
def _shares(
    grads,
    argmaxes,
    top,
    there,
    j,
    pooled_w,
    waiting,
    bias_sums,
    column_step,
    out_plane,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Spread a row of windows over the cells of the blocks that they reach, for CHANNELS output channels.

    Returns the gradients of the block's own BH x BW cells, what the RH blocks below it have got so far, and the biases'
    sums. Of the arguments

        grads, argmaxes: pointers to the block's own window of the first channel, if it lay in the first row.
        top: elements from there to the block's row.
        there: which lanes have a block, and windows in this row.
        j: the block's column; windows up to RW left of it reach the block.
        waiting: what rows of windows above sent to this block and to those below it.
        bias_sums: to which the gradients of the block's own windows are added, but for those without a winner.
        column_step, out_plane: elements from window to window and from channel to channel.
    """
    cells = ()
    sent = ()
    done = ()
    for o in tl.static_range(CHANNELS):
        grad = ()
        argmax = ()
        for w in tl.static_range(RW + 1):
            mask = there & (j >= w) & (j < pooled_w + w)
            # Without a winner the gradient is not looked at.
            grad = grad + (tl.load(grads + (top + o * out_plane) - w * column_step, mask=mask).to(tl.float32),)
            found = tl.load(argmaxes + (top + o * out_plane) - w * column_step, mask=mask, other=NO_WINNER)
            argmax = argmax + (found.to(tl.int32),)
        for k in tl.static_range(RH + 1):
            for b in tl.static_range(BH):
                for a in tl.static_range(BW):
                    total = tl.zeros(there.shape, tl.float32)
                    if k * BH + b < POOL_H:
                        for w in tl.static_range(RW + 1):
                            if w * BW + a < POOL_W:
                                wins = argmax[w] == (k * BH + b) * POOL_W + w * BW + a
                                if w == 0 and (k + 1) * BH + b < POOL_H:
                                    total = waiting[(o * RH * BH + k * BH + b) * BW + a]
                                if w == 0 and (k + 1) * BH + b >= POOL_H:
                                    total = tl.where(wins, grad[w], 0.0)
                                else:
                                    total = tl.where(wins, total + grad[w], total)
                    if k == 0:
                        cells = cells + (total,)
                    else:
                        sent = sent + (total,)
        done = done + (tl.where(argmax[0] == NO_WINNER, bias_sums[o], bias_sums[o] + grad[0]),)
    return cells, sent, done


@triton.jit(do_not_specialize=["images", "input_h", "input_w", "output_h", "output_w", "chunk"])
def _sliding_grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    partials_ptr,
    images,
    input_h,
    input_w,
    output_h,
    output_w,
    chunk,
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
    FIXED_H: tl.constexpr,
    FIXED_W: tl.constexpr,
    FIXED_POOLED_H: tl.constexpr,
    FIXED_POOLED_W: tl.constexpr,
    LAST: tl.constexpr,
    ROWS_FROM: tl.constexpr,
    ROWS_TO: tl.constexpr,
    COLUMNS_FROM: tl.constexpr,
    COLUMNS_TO: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    PAIRS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Gradients of the weight and the bias as of `_grad_weight_kernel`, for windows that overlap from row to row.

    Tile: a lane owns a column of blocks and slides down `chunk` rows of it, image after image. So a window is loaded
    once for all blocks of a column. A window's gradients for the blocks below its own wait in registers. A chunk that
    is not an image's first also reads the RH rows of windows above it, which reach into it, without products. If RH is
    1, chunks count rows of windows. The last one then adds the products of those cells below that windows look at.

    Shapes, strides, sums and cost are as of `_grad_weight_kernel`, but a gradient and its argmax are read once for the
    RH + 1 rows of blocks that its window reaches. A program is one warp. The grid's second and third axes count the
    parts.
    """
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    PERIOD_H: tl.constexpr = POOL_STRIDE_H * STRIDE_H
    PERIOD_W: tl.constexpr = POOL_STRIDE_W * STRIDE_W
    STEP: tl.constexpr = IN_CHANNELS if LAST else 1
    height = FIXED_H if FIXED_H > 0 else input_h
    width = FIXED_W if FIXED_W > 0 else input_w
    pooled_h = FIXED_POOLED_H if FIXED_POOLED_H > 0 else output_h
    pooled_w = FIXED_POOLED_W if FIXED_POOLED_W > 0 else output_w
    in_tiles: tl.constexpr = (IN_CHANNELS + INPUTS - 1) // INPUTS
    in_channel = tl.minimum(tl.program_id(0) % in_tiles * INPUTS, IN_CHANNELS - INPUTS)
    first = tl.minimum(tl.program_id(0) // in_tiles * CHANNELS, OUT_CHANNELS - CHANNELS)
    with_bias = tl.program_id(0) % in_tiles == 0
    part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    begin = tl.program_id(2) * chunk
    rows = pooled_h if RH == 1 else pooled_h + RH
    columns = pooled_w + RW
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(1) * BLOCK // columns
    image = tl.where(lane < step * columns, lane // columns, images)
    j = lane % columns
    cell_x = j * POOL_STRIDE_W - POOL_PADDING_W
    x = cell_x * STRIDE_W - PADDING_W
    # From here on offsets of pixels count pairs, where pairs are loaded.
    line = width * STEP if PAIRS < 0 else width >> 1
    plane = 1 if LAST else height * line
    corner = (x * STEP if PAIRS < 0 else (x + PAIRS) >> 1) + in_channel * plane
    column_step = OUT_CHANNELS if LAST else 1
    row_step = pooled_w * column_step
    out_plane = 1 if LAST else pooled_h * pooled_w
    window = j * column_step + first * out_plane
    limit_h, limit_w = chunk * 0 + height, x * 0 + width
    conv_h = (limit_h + (2 * PADDING_H - KERNEL_H)) // STRIDE_H + 1
    conv_w = (limit_w + (2 * PADDING_W - KERNEL_W)) // STRIDE_W + 1

    weight_sums = ()
    bias_sums = ()
    zero = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(INPUTS * CHANNELS * KERNEL_H * KERNEL_W):
        weight_sums = weight_sums + (zero,)
    for _ in tl.static_range(CHANNELS):
        bias_sums = bias_sums + (zero,)
    for _round in range((images + step - 1) // step):
        there = image < images
        row = tl.minimum(image, images - 1).to(INDEX)
        image += step
        offset = row * (OUT_CHANNELS * pooled_h * pooled_w) + window
        pixels = row * (height * line * (1 if LAST else IN_CHANNELS)) + corner
        corners = input_ptr + (pixels if PAIRS < 0 else pixels * 2)
        waiting = ()
        for _ in tl.static_range(CHANNELS * RH * BH * BW):
            waiting = waiting + (zero,)
        # Rows of windows above a later chunk reach into it.
        for t in range(tl.maximum(begin - RH, 0), begin):
            _cells_above, waiting, _bias_sums = _shares(
                grad_ptr + offset,
                argmax_ptr + offset,
                t * row_step,
                there & (t < pooled_h),
                j,
                pooled_w,
                waiting,
                bias_sums,
                column_step,
                out_plane,
                POOL_H,
                POOL_W,
                BH,
                BW,
                RH,
                RW,
                CHANNELS,
            )
        end = tl.minimum(begin + chunk, rows)
        # The row of blocks below the last windows, if it is one, has only the cells that wait for it.
        for below in tl.static_range(1 if RH != 1 else 2):
            for t in range(end if below else begin, tl.where(end == rows, end + below, end)):
                if below:
                    cells = ()
                    for o in tl.static_range(CHANNELS):
                        cells = cells + waiting[o * BH * BW : (o * BH + POOL_H - BH) * BW]
                else:
                    cells, waiting, bias_sums = _shares(
                        grad_ptr + offset,
                        argmax_ptr + offset,
                        t * row_step,
                        there if RH == 1 else there & (t < pooled_h),
                        j,
                        pooled_w,
                        waiting,
                        bias_sums,
                        column_step,
                        out_plane,
                        POOL_H,
                        POOL_W,
                        BH,
                        BW,
                        RH,
                        RW,
                        CHANNELS,
                    )
                cell_y = t * POOL_STRIDE_H - POOL_PADDING_H
                y = cell_y * STRIDE_H - PADDING_H
                tops = ()
                starts = ()
                for c in tl.static_range(INPUTS):
                    tops = tops + (y * line + c * plane,)
                    starts = starts + (corners,)
                weight_sums = _multiply(
                    weight_sums,
                    cells,
                    starts,
                    tops,
                    x,
                    y,
                    there,
                    cell_x,
                    cell_y,
                    limit_h,
                    limit_w,
                    conv_h,
                    conv_w,
                    line,
                    KERNEL_H,
                    KERNEL_W,
                    STRIDE_H,
                    STRIDE_W,
                    POOL_H - BH if below else BH,
                    BW,
                    STEP,
                    PERIOD_H,
                    PERIOD_W,
                    ROWS_FROM,
                    ROWS_TO,
                    COLUMNS_FROM,
                    COLUMNS_TO,
                    CELLS_H,
                    CELLS_W,
                    PAIRS,
                    CHANNELS,
                    INPUTS,
                    KERNEL_H,
                )

    _store_parts(
        partials_ptr,
        part,
        weight_sums,
        bias_sums,
        first,
        in_channel,
        0,
        with_bias,
        IN_CHANNELS,
        OUT_CHANNELS,
        KERNEL_H,
        KERNEL_W,
        CHANNELS,
        INPUTS,
        KERNEL_H,
        INDEX,
        BLOCK,
        1,
    )


@triton.jit
def _spread(
    sums,
    cells,
    weights,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    cell_y,
    cell_x,
    conv_h,
    conv_w,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
):
    """Add a block's cells times the weights to the pixels under them, for CHANNELS input channels.

    Of the arguments

    sums: of each channel's ((BH - 1) * stride + KH) x ((BW - 1) * stride + KW) pixels.
    cells: gradients of the block's cells.
    weights: pointer to the first channel's taps.
    cell_y, cell_x, conv_h, conv_w: as of `_cell_there`. A cell that is not there has no gradient, but must not meet an
        infinite weight.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    SPAN_H: tl.constexpr = (BH - 1) * STRIDE_H + KERNEL_H
    SPAN_W: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    done = ()
    for c in tl.static_range(CHANNELS):
        kernel = ()
        for k in tl.static_range(TAPS):
            kernel = kernel + (tl.load(weights + (c * TAPS + k)).to(tl.float32),)
        for h in tl.static_range(SPAN_H):
            row = sums[(c * SPAN_H + h) * SPAN_W : (c * SPAN_H + h + 1) * SPAN_W]
            for w in tl.static_range(SPAN_W):
                total = row[w]
                for b in tl.static_range(BH):
                    if h >= b * STRIDE_H and h < b * STRIDE_H + KERNEL_H:
                        for a in tl.static_range(BW):
                            if w >= a * STRIDE_W and w < a * STRIDE_W + KERNEL_W:
                                tap = kernel[(h - b * STRIDE_H) * KERNEL_W + (w - a * STRIDE_W)]
                                new = tl.fma(cells[b * BW + a], tap, total)
                                if b >= CELLS_H or a >= CELLS_W:
                                    has_cell = _cell_there(cell_y, cell_x, conv_h, conv_w, b, a, CELLS_H, CELLS_W)
                                    new = tl.where(has_cell, new, total)
                                total = new
                done = done + (total,)
    return done


@triton.jit(do_not_specialize=["lanes", "input_h", "input_w", "output_h", "output_w", "chunk"])
def _grad_input_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    output_ptr,
    lanes,
    input_h,
    input_w,
    output_h,
    output_w,
    chunk,
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
    FIXED_H: tl.constexpr,
    FIXED_W: tl.constexpr,
    FIXED_POOLED_H: tl.constexpr,
    FIXED_POOLED_W: tl.constexpr,
    LAST: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    PAIRS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Gradient of the input in exact float32, without atomics.

    Maths: as in `general`. A block of cells has QH x QW pixels of its own, QH = pool stride * stride down and QW right.
    Its cells also reach the pixels of MH blocks further down and MW blocks further right. A pixel sums one chain of
    fused multiply-adds for each column of blocks that reaches it, over (row of blocks, output channel, cell). The
    chains of the columns are then added from right to left. So no result depends on the tile.

    Tile: BLOCK lanes, each a column of blocks (n, j), x CHANNELS input channels x `chunk` rows of blocks. A lane slides
    down its column and keeps rows of pixels in registers until they are complete, so that no product is wasted on rows
    beside the image. Shuffles add up a complete row over lanes, and it is stored. The first MW lanes of a program store
    nothing; they compute what lanes right of them need. A chunk that is not an image's first also computes the MH rows
    of blocks above it, for the same reason. The last lane of a row also stores the EXTRA blocks of pixels right of its
    own. A program's number counts the tiles of channels first, so that programs with neighbouring numbers read the same
    gradients.

    Shapes and strides: grad and argmax (N, O, PH, PW) and output (N, C, H, W) contiguous or, if LAST, channels_last;
    weight (O, C, KH, KW) contiguous.

    Saves: nothing. Cost per image: 2 * BH * BW * (PH + RH) * (PW + RW) * O * C * KH * KW FLOP; reads gradients and
    argmax once per tile of channels, writes C * H * W elements.
    """
    BH: tl.constexpr = POOL_H if POOL_H < POOL_STRIDE_H else POOL_STRIDE_H
    BW: tl.constexpr = POOL_W if POOL_W < POOL_STRIDE_W else POOL_STRIDE_W
    RH: tl.constexpr = (POOL_H - 1) // POOL_STRIDE_H
    RW: tl.constexpr = (POOL_W - 1) // POOL_STRIDE_W
    SPAN_H: tl.constexpr = (BH - 1) * STRIDE_H + KERNEL_H
    SPAN_W: tl.constexpr = (BW - 1) * STRIDE_W + KERNEL_W
    QH: tl.constexpr = POOL_STRIDE_H * STRIDE_H
    QW: tl.constexpr = POOL_STRIDE_W * STRIDE_W
    MH: tl.constexpr = (SPAN_H - 1) // QH
    MW: tl.constexpr = (SPAN_W - 1) // QW
    KEPT: tl.constexpr = SPAN_H - QH if SPAN_H > QH else 0
    ORIGIN_H: tl.constexpr = POOL_PADDING_H * STRIDE_H + PADDING_H
    ORIGIN_W: tl.constexpr = POOL_PADDING_W * STRIDE_W + PADDING_W
    STEP: tl.constexpr = IN_CHANNELS if LAST else 1
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    height = FIXED_H if FIXED_H > 0 else input_h
    width = FIXED_W if FIXED_W > 0 else input_w
    pooled_h = FIXED_POOLED_H if FIXED_POOLED_H > 0 else output_h
    pooled_w = FIXED_POOLED_W if FIXED_POOLED_W > 0 else output_w
    tiles: tl.constexpr = (IN_CHANNELS + CHANNELS - 1) // CHANNELS
    first = tl.minimum(tl.program_id(0) % tiles * CHANNELS, IN_CHANNELS - CHANNELS)
    number = tl.arange(0, BLOCK)
    lane = (tl.program_id(0) // tiles).to(INDEX) * (BLOCK - MW) + (number - MW)
    inside = (lane >= 0) & (lane < lanes)
    mask = inside & (number >= MW)
    lane = tl.maximum(tl.minimum(lane, lanes - 1), 0)
    columns = pooled_w + RW
    j = (lane % columns).to(tl.int32)
    image = lane // columns
    column_step = OUT_CHANNELS if LAST else 1
    row_step = pooled_w * column_step
    out_plane = 1 if LAST else pooled_h * pooled_w
    windows_h, windows_w = j * 0 + pooled_h, j * 0 + pooled_w
    window = image * (OUT_CHANNELS * pooled_h * pooled_w) + j * column_step
    cell_x = j * POOL_STRIDE_W - POOL_PADDING_W
    conv_h = (j * 0 + height + (2 * PADDING_H - KERNEL_H)) // STRIDE_H + 1
    conv_w = (j * 0 + width + (2 * PADDING_W - KERNEL_W)) // STRIDE_W + 1
    x = j * QW - ORIGIN_W
    # From here on offsets of pixels count pairs, where pairs are stored.
    line = width * STEP if PAIRS < 0 else width >> 1
    plane = 1 if LAST else height * line
    corner = image * (height * line * (1 if LAST else IN_CHANNELS))
    corner += first * plane + (x * STEP if PAIRS < 0 else (x + PAIRS) >> 1)
    starts = output_ptr + (corner if PAIRS < 0 else corner * 2)
    limit_w = j * 0 + width

    kept = ()
    for _ in tl.static_range(CHANNELS * KEPT * SPAN_W):
        kept = kept + (tl.zeros((BLOCK,), tl.float32),)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, (height + (ORIGIN_H + QH - 1)) // QH)
    for t in range(tl.maximum(begin - MH, 0), end):
        sums = ()
        for c in tl.static_range(CHANNELS):
            sums = sums + kept[c * KEPT * SPAN_W : (c + 1) * KEPT * SPAN_W]
            for _ in tl.static_range((SPAN_H - KEPT) * SPAN_W):
                sums = sums + (tl.zeros((BLOCK,), tl.float32),)
        offset = window + t * row_step
        weights = weight_ptr + first * TAPS
        for _channel in range(tl.where(t < pooled_h + RH, OUT_CHANNELS, 0)):
            cells, _own = _cells(
                grad_ptr + offset,
                argmax_ptr + offset,
                j * 0 + t,
                j,
                inside,
                windows_h,
                windows_w,
                row_step,
                column_step,
                POOL_H,
                POOL_W,
                BH,
                BW,
                RH,
                RW,
            )
            sums = _spread(
                sums,
                cells,
                weights,
                CHANNELS,
                KERNEL_H,
                KERNEL_W,
                STRIDE_H,
                STRIDE_W,
                BH,
                BW,
                j * 0 + (t * POOL_STRIDE_H - POOL_PADDING_H),
                cell_x,
                conv_h,
                conv_w,
                CELLS_H,
                CELLS_W,
            )
            offset += out_plane
            weights += IN_CHANNELS * TAPS
        kept = ()
        for c in tl.static_range(CHANNELS):
            kept = kept + sums[(c * SPAN_H + SPAN_H - KEPT) * SPAN_W : (c + 1) * SPAN_H * SPAN_W]
            for h in tl.static_range(QH):
                y = t * QH + (h - ORIGIN_H)
                rows = mask & (t >= begin) & (y >= 0) & (y < height)
                for e in tl.static_range(EXTRA + 1):
                    values = ()
                    for w in tl.static_range(QW):
                        total = tl.zeros((BLOCK,), tl.float32)
                        # From the block farthest left on.
                        for m in tl.static_range(MW, e - 1, -1):
                            if h < SPAN_H and w + m * QW < SPAN_W:
                                sent = sums[(c * SPAN_H + h) * SPAN_W + w + m * QW]
                                if m > e:
                                    sent = tl.gather(sent, tl.maximum(number - (m - e), 0), axis=0)
                                    sent = tl.where(j >= m - e, sent, 0.0)
                                total += sent
                        values = values + (total,)
                    _store_row(
                        starts,
                        y * line + (c * plane + e * (QW * STEP if PAIRS < 0 else QW // 2)),
                        x + e * QW,
                        rows if e == 0 else rows & (j == columns - 1),
                        limit_w,
                        values,
                        QW,
                        STEP,
                        PAIRS,
                    )


@triton.jit
def _store_row(starts, line, x, there, width, values, COUNT: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr):
    """Store COUNT neighbours of a row, as `_pixels` loads them."""
    pointers = starts + line if PAIRS < 0 else starts + line * 2
    LEAD: tl.constexpr = 0 if PAIRS < 0 else PAIRS
    for i in tl.static_range(COUNT if PAIRS < 0 else PAIRS):
        store(pointers + (i * STEP - LEAD), values[i], there & within(x + i, width))
    if PAIRS >= 0:
        pairs = pointers[:, None] + tl.arange(0, 2)[None, :]
        for i in tl.static_range((COUNT - PAIRS) // 2):
            mask = there & within(x + (PAIRS + 2 * i), width)
            store(pairs + 2 * i, tl.join(values[PAIRS + 2 * i], values[PAIRS + 2 * i + 1]), mask[:, None])
        if (COUNT - PAIRS) % 2 == 1:
            store(pointers + (COUNT - 1 - PAIRS), values[COUNT - 1], there & within(x + (COUNT - 1), width))


# --- launching -------------------------------------------------------------------------------------------------------


def _registers(limit: int) -> dict[str, int]:
    """Launch option that bounds a thread's registers, on the targets that have it."""
    return {"maxnreg": limit} if not INTERPRETED and all_registers() else {}


class _Axis:
    """How blocks lie along one axis."""

    def __init__(self, geometry: ConvPoolGeometry, axis: int, size: int, kernel: int, pooled: int) -> None:
        self.stride, self.padding = geometry.stride[axis], geometry.padding[axis]
        self.pool, self.pool_stride = geometry.pool_size[axis], geometry.pool_stride[axis]
        self.pool_padding, self.pooled = geometry.pool_padding[axis], pooled
        self.cells = min(self.pool, self.pool_stride)
        self.reach = (self.pool - 1) // self.pool_stride
        self.span = (self.cells - 1) * self.stride + kernel
        self.origin = self.pool_padding * self.stride + self.padding
        self.step = self.pool_stride * self.stride
        last = (pooled + self.reach - 1) * self.pool_stride + self.cells - self.pool_padding
        conv = (size + 2 * self.padding - kernel) // self.stride + 1
        self.there = 0 if self.pool_padding > 0 else max(0, min(self.cells, self.cells - last + conv))
        """How many cells, from the first on, all blocks have: 0 where the first may lie in the pool's padding."""
        self.inside = self.origin, min(self.span, size + self.origin - (pooled + self.reach - 1) * self.step)
        """FROM and TO of `_inside`."""


def _geometry(geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, pooled: Sequence[int]) -> tuple[Any, Any]:
    """How blocks lie along both axes."""
    height, width = (
        _Axis(geometry, axis, input.shape[2 + axis], weight.shape[2 + axis], pooled[axis]) for axis in (0, 1)
    )
    return height, width


def _constants(
    geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, last: bool, axes: Any, options: Mapping[str, int]
) -> dict[str, Any]:
    """List what the kernels take as constants: all sizes but the images'."""
    fixed = options.get("FIXED", 0)
    # Pairs of a row's neighbours, where both rows and blocks begin at even addresses, or all blocks at odd ones.
    even = not last and input.data_ptr() % 16 == 0 and input.shape[3] % 2 == 0 and axes[1].step % 2 == 0
    return {
        **sizes_of(_forward_kernel, geometry, weight),  # the other kernels take the same
        "FIXED_H": input.shape[2] if fixed else 0,
        "FIXED_W": input.shape[3] if fixed else 0,
        "FIXED_POOLED_H": axes[0].pooled if fixed else 0,
        "FIXED_POOLED_W": axes[1].pooled if fixed else 0,
        "LAST": last,
        "CELLS_H": axes[0].there,
        "CELLS_W": axes[1].there,
        "PAIRS": axes[1].origin % 2 if even else -1,
    }


def _always_inside(axes: Any) -> dict[str, int]:
    """Tell the kernels which pixels of a block's patch need no look at the image's borders."""
    (rows_from, rows_to), (columns_from, columns_to) = (axis.inside for axis in axes)
    return {"ROWS_FROM": rows_from, "ROWS_TO": rows_to, "COLUMNS_FROM": columns_from, "COLUMNS_TO": columns_to}


def _block_and_warps(lanes: int, tiles: int, halo: int, positions: int) -> dict[str, int]:
    """Choose how many lanes a program takes, and its warps.

    Programs of four warps, unless that leaves fewer than about four for each of 128 multiprocessors, or lanes must
    exchange what they have, which only those of one warp do cheaply. No result depends on the choice.

    Args:
        lanes: how many there are.
        tiles: programs for each group of lanes.
        halo: lanes of a program that only lend.
        positions: lanes that a thread takes.
    """
    if INTERPRETED:
        return {"BLOCK": min(4096, triton.next_power_of_2(max(lanes, 2) + halo))}
    num_warps = 4 if halo == 0 and cdiv(lanes, 128 * positions) * tiles >= 512 else 1
    return {"BLOCK": 32 * positions * num_warps, "num_warps": num_warps}


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
    shape = geometry.output_shape(input, weight)
    # Of one channel both layouts are the same memory, and stock's strides are the plain one's.
    layout = torch.channels_last if last and shape[1] > 1 else torch.contiguous_format
    output = empty(shape, input, memory_format=layout)
    argmax = empty(shape, output, torch.uint8, layout) if return_argmax else None
    height, width = axes = _geometry(geometry, input, weight, shape[2:])
    images, channels, pooled_h, pooled_w = shape
    # Overlapping windows: few chunks of rows, as each computes `reach` rows of the next once more.
    columns = images * (pooled_w + width.reach)
    limit = min(options["CHANNELS"], channels)
    tiles = cdiv(channels, limit)
    chunks = pooled_h if height.reach == 0 else max(1, min(pooled_h, 65536 // (columns * tiles)))
    chunk = cdiv(pooled_h, chunks)
    chunks = cdiv(pooled_h, chunk)
    lanes = columns * chunks
    tile = _block_and_warps(lanes, tiles, width.reach, options.get("POSITIONS", 2))
    if not INTERPRETED and height.reach == width.reach == 0:
        # Small batches take fewer channels a program.
        for fewer in (4, 2, 1):
            if cdiv(lanes, tile["BLOCK"]) * cdiv(channels, limit) < 512 and limit > fewer:
                limit = fewer
    launch(
        _forward_kernel,
        (cdiv(lanes, tile["BLOCK"] - width.reach) * cdiv(channels, limit),),
        input,
        weight,
        weight if bias is None else bias,
        output,
        output if argmax is None else argmax,
        lanes,
        *input.shape[2:],
        *shape[2:],
        chunk,
        chunks,
        **_constants(geometry, input, weight, last, axes, options),
        **_always_inside(axes),
        HAS_BIAS=bias is not None,
        RETURN_ARGMAX=return_argmax,
        INDEX=index_type(input, output),
        CHANNELS=limit,
        UNROLL=options.get("UNROLL", 1) in ((1, rules.UNROLL_WITH_ARGMAX) if return_argmax else (1,)),
        num_stages=1,
        **tile,
        **_registers(options.get("maxnreg", 168)),
    )
    return output, argmax


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
    height, width = axes = _geometry(geometry, input, weight, argmax.shape[2:])
    images, channels = input.shape[:2]
    limit = min(options["CHANNELS"], channels)
    tiles, halo = cdiv(channels, limit), (width.span - 1) // width.step
    blocks = argmax.shape[3] + width.reach
    columns = images * blocks
    rows = cdiv(input.shape[2] + height.origin, height.step)
    tile = _block_and_warps(columns, tiles, halo, options.get("POSITIONS", 2))
    groups = cdiv(columns, tile["BLOCK"] - halo) * tiles
    # Whole columns, if there are enough of them: each chunk computes what reaches it from above once more.
    chunk = cdiv(rows, max(1, min(rows, 1024 // groups)))
    launch(
        _grad_input_kernel,
        (groups, cdiv(rows, chunk)),
        grad_output,
        argmax,
        weight,
        result,
        columns,
        *input.shape[2:],
        *argmax.shape[2:],
        chunk,
        **_constants(geometry, input, weight, last, axes, options),
        INDEX=index_type(grad_output, result),
        CHANNELS=limit,
        EXTRA=max(0, cdiv(input.shape[3] + width.origin, width.step) - blocks),
        num_stages=1,
        **tile,
        **_registers(options.get("maxnreg", 168)),
    )
    return result


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

    `later` as in `joint.launch_job`.
    """
    height, width = axes = _geometry(geometry, input, weight, argmax.shape[2:])
    out_channels, in_channels, kernel_h, _ = weight.shape
    images, columns, rows = input.shape[0], argmax.shape[3] + width.reach, argmax.shape[2] + height.reach
    channels, inputs = min(options["CHANNELS"], out_channels), min(options.get("INPUTS", 1), in_channels)
    tap_rows = options.get("TAP_ROWS", kernel_h)
    tiles = cdiv(out_channels, channels) * cdiv(in_channels, inputs) * (kernel_h // tap_rows)
    # One warp's lanes and, of these, as many as some 132 multiprocessors hold at once.
    block, registers = 1024 if INTERPRETED else 32 * options.get("POSITIONS", 1), options.get("maxnreg", 168)
    programs = 132 * (65536 // (32 * registers)) // tiles
    constants = _constants(geometry, input, weight, last, axes, options) | _always_inside(axes)
    constants |= {"CHANNELS": channels, "INPUTS": inputs}
    sizes = images, *input.shape[2:], *argmax.shape[2:]
    result, bias = empty(weight.shape, weight), empty((out_channels,), weight)
    if options.get("SLIDE", 0) and height.reach > 0 and tap_rows == kernel_h:
        # As few programs as take the same number of rounds; columns are cut where there are not enough of them.
        parts = max(cdiv(columns, block), min(cdiv(images * columns, block), programs))
        parts = cdiv(cdiv(images, cdiv(images, parts * block // columns)) * columns, block)
        rows -= 1 if height.reach == 1 else 0
        chunk = cdiv(rows, max(1, min(rows // 4, programs // parts)))
        grid = tiles, parts, cdiv(rows, chunk)
        partials = empty((parts * grid[2], weight.numel() + out_channels), input, torch.float32)
        launch(
            _sliding_grad_weight_kernel,
            grid,
            grad_output,
            argmax,
            input,
            partials,
            *sizes,
            chunk,
            **constants,
            INDEX=index_type(input, grad_output, partials),
            BLOCK=block,
            num_warps=1,
            num_stages=1,
            **_registers(registers),
        )
        sum_partials((partials, (result, bias), 1.0), later=None if later is None else later.sums)
        return result, bias
    # Four images or more a lane, and at least one lane for each block.
    size = rows * columns
    parts = max(cdiv(size, block), min(cdiv(images * size, 4 * block), programs))
    warps: tuple[int, ...] = (1,)
    if later is not None and not INTERPRETED:
        # Beside other kernels a program has as many warps as theirs: parts come in eights.
        parts = max(8 * cdiv(cdiv(size, block), 8), parts // 8 * 8)
        warps = 1, 2, 4, 8
    else:
        # As few programs as take the same number of rounds: lanes beyond a multiple of the blocks would idle.
        parts = cdiv(cdiv(images, cdiv(images, parts * block // size)) * size, block)
    partials = empty((parts, weight.numel() + out_channels), input, torch.float32)

    def work(warps: int) -> tuple[int, tuple[int, ...], dict[str, Any]]:
        tile = {"BLOCK": block * warps, "WARPS": warps, "TAP_ROWS": tap_rows}
        return tiles * parts // warps, (parts // warps, *sizes), constants | tile

    tensors = grad_output, argmax, input, partials
    job = Job(_grad_weight_kernel, warps, tensors, index_type(input, grad_output, partials), work, registers)
    launch_job(job, (partials, (result, bias), 1.0), later)
    return result, bias
