"""Small non-overlapping 2x2 pools on matrix units: one matrix product per patch instead of one per window cell.

The four convolution cells of a 2x2 window read one patch of (KS + 1) x (KS + 1) pixels. With the patch as the inner
dimension and (cell, output channel) as the columns of one banded weight matrix, a pooled position costs a single
product, and its four cells lie in one thread's registers, where they are pooled. Each program builds the banded matrix
once, from the weight itself, and keeps it in shared memory; rows of a tile are (image, position) with fixed offsets, so
that going on to the next position adds one number to a pointer.

The geometry is compiled in, the number of images is not. These kernels serve what `configurations` lists for the
architecture: stride, dilation and groups 1, no padding, odd square kernels, windows of 2x2 that do not overlap and
cover the convolution exactly, contiguous tensors. `general` serves the rest.

The band's zeros multiply pixels that a cell does not look at, which is wrong if such a pixel is infinite or NaN. Then
the result is not finite either; a program that meets one computes its tiles again, cell by cell, and replaces what was
not finite. So every result is stock's, and finite data pays for one addition a result.

Letters: C input and O output channels, KS the kernel's size, S = KS + 1 the patch's, PH x PW pooled output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry
from ..joint import Job, Later, launch_job
from ..runtime import (
    INTERPRETED,
    NO_WINNER,
    all_registers,
    cdiv,
    dot_precision,
    empty,
    index_type,
    launch,
    load,
    next_power_of_2,
    store,
    tf32,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_COUNTS = ["images", "tiles_per_program", "rows_per_program"]
_SMALL = ["weight_ptr", "bias_ptr", "argmax_ptr", "grad_ptr"]


@triton.jit
def _patch_offsets(start, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the elements start..start + BLOCK_K of a patch (C, S, S) lie in an image (C, H, W).

    Beyond the patch's end the first element stands in: its weight is 0.
    """
    k = start + tl.arange(0, BLOCK_K)
    offset = tl.where(k < C * S * S, k // (S * S) * (H * W) + k // S % S * W + k % S, 0)
    # S and W are even: elements lie in pairs at least, which one load can take.
    RUN: tl.constexpr = 4 if S % 4 == 0 and W % 4 == 0 else 2
    return tl.max_contiguous(tl.multiple_of(offset, RUN), RUN)


@triton.jit
def _forward_band(
    weight_ptr,
    start,
    C: tl.constexpr,
    OUT: tl.constexpr,
    KS: tl.constexpr,
    OUT_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows start..start + BLOCK_K of the banded matrix (patch, (cell, output channel)); 0 where a cell has no tap."""
    S: tl.constexpr = KS + 1
    k = start + tl.arange(0, BLOCK_K)
    column = tl.arange(0, 4 * OUT_PAD)
    cell = column // OUT_PAD
    o = column % OUT_PAD
    tap_h = (k // S % S)[:, None] - (cell // 2)[None, :]
    tap_w = (k % S)[:, None] - (cell % 2)[None, :]
    mask = (k < C * S * S)[:, None] & (o < OUT)[None, :]
    mask &= (tap_h >= 0) & (tap_h < KS) & (tap_w >= 0) & (tap_w < KS)
    offset = (o * (C * KS * KS))[None, :] + (k // (S * S) * (KS * KS))[:, None] + tap_h * KS + tap_w
    return load(weight_ptr + offset, mask)


@triton.jit
def _input_band(
    weight_ptr,
    di,
    dj,
    C: tl.constexpr,
    OUT: tl.constexpr,
    KS: tl.constexpr,
    IN_PAD: tl.constexpr,
    OUT_PAD: tl.constexpr,
):
    """Banded matrix ((cell, output channel), (input channel, pixel)) from a window to a block of 2x2 pixels.

    The block lies di, dj blocks below and right of the window's own first pixels.
    """
    row = tl.arange(0, 4 * OUT_PAD)
    column = tl.arange(0, 4 * IN_PAD)
    cell = row // OUT_PAD
    o = row % OUT_PAD
    c = column // 4
    tap_h = (2 * di - cell // 2)[:, None] + (column // 2 % 2)[None, :]
    tap_w = (2 * dj - cell % 2)[:, None] + (column % 2)[None, :]
    mask = (o < OUT)[:, None] & (c < C)[None, :] & (tap_h >= 0) & (tap_h < KS) & (tap_w >= 0) & (tap_w < KS)
    offset = (o * (C * KS * KS))[:, None] + (c * (KS * KS))[None, :] + tap_h * KS + tap_w
    return load(weight_ptr + offset, mask)


@triton.jit
def _to_cells(grad, argmax, BLOCK_M: tl.constexpr, OUT_PAD: tl.constexpr):
    """Spread gradients (rows, channels) over their windows' cells: (rows, (cell, channel)), 0 where a cell lost."""
    bits = grad.to(tl.int32 if grad.dtype.primitive_bitwidth == 32 else tl.int16, bitcast=True)
    top = tl.join(tl.where(argmax == 0, bits, 0), tl.where(argmax == 1, bits, 0))
    bottom = tl.join(tl.where(argmax == 2, bits, 0), tl.where(argmax == 3, bits, 0))
    cells = tl.join(top, bottom).permute(0, 3, 2, 1)  # from (row, channel, column of the window, its row)
    return cells.reshape(BLOCK_M, 4 * OUT_PAD).to(grad.dtype, bitcast=True)


@triton.jit
def _cells(grad, argmax, number, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, OUT_PAD: tl.constexpr):
    """Return `_to_cells`, safe as an operand of a product of depth DEPTH; `number` counts something from 0.

    Triton up to 3.7 lays an operand out by the narrowest type it was loaded from, here argmax's 8 bits, joined twice:
    64 deep. It adds up a shorter product more than once (triton#11691, seen on an H100). It does not look through a
    branch, so there the cells come out of one, which is always taken. Deep products took up to 1.7 times as long so.
    """
    if DEPTH >= 64:
        return _to_cells(grad, argmax, BLOCK_M, OUT_PAD)
    else:  # noqa: RET505  (Triton compiles what follows a return)
        cells = tl.zeros((BLOCK_M, 4 * OUT_PAD), grad.dtype)
        if number >= 0:
            cells = _to_cells(grad, argmax, BLOCK_M, OUT_PAD)
        return cells


@triton.jit
def _lane_sums(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums (ROWS, 4) that are not finite where a value is not: no number brings infinity or NaN back.

    Of a matrix unit's results each of four lanes holds pairs of columns, eight apart. Only a lane's own are added, so
    nothing is exchanged between lanes, and a row takes one register.
    """
    if COLUMNS < 8:
        return values
    else:  # noqa: RET505  (Triton compiles what follows a return)
        return tl.sum(tl.sum(values.reshape(ROWS, COLUMNS // 8, 4, 2), axis=3), axis=1)


@triton.jit
def _any_not_finite(sums):
    """Whether one of the sums is infinite or NaN. They may be for large finite values, too."""
    return tl.max(tl.max((tl.abs(sums) < float("inf")).to(tl.int32) ^ 1, axis=1), axis=0) > 0


@triton.jit(do_not_specialize=[*_COUNTS, *_SMALL])
def _forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    argmax_ptr,
    images,
    tiles_per_program,
    rows_per_program,
    C: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pooled output and argmax.

    Maths: ``conv[n, p, (t, o)] = sum_k patch[n, p, k] * band[k, (t, o)]``, ``output[n, o, p] = max over the four cells
    t of relu(bias[o] + conv[n, p, (t, o)])``; argmax as in `general`.

    Tile: IMAGES images x ROWS pooled rows x all pooled columns (BLOCK_M rows, nearly all used) x 4 * OUT_PAD columns.
    A program takes `tiles_per_program` groups of images and, of each, `rows_per_program` row blocks.

    Shapes and strides: input (N, C, H, W), weight (O, C, KS, KW), bias (O), output and argmax (N, O, PH, PW), dense.

    Saves: one byte of argmax per pooled cell.

    Cost per image: 2 * PH * PW * C * S * S * 4 * O FLOP, of which (KS / S)^2 are useful; reads the input, whose
    overlapping patches come from cache, and writes output and argmax once.
    """
    PH: tl.constexpr = (H - KS + 1) // 2
    PW: tl.constexpr = (W - KS + 1) // 2
    S: tl.constexpr = KS + 1
    DEPTH: tl.constexpr = C * S * S
    row = tl.arange(0, BLOCK_M)
    pooled_row = row // PW % ROWS
    pooled_column = row % PW
    channel = tl.arange(0, OUT_PAD)
    plane = (channel * (PH * PW))[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < OUT, other=0.0).to(tl.float32)
    bands = ()
    for start in tl.static_range(0, DEPTH, BLOCK_K):
        bands = bands + (tf32(_forward_band(weight_ptr, start, C, OUT, KS, OUT_PAD, BLOCK_K), PRECISION),)

    first_image = tl.program_id(0).to(INDEX) * tiles_per_program * IMAGES
    first_row = tl.program_id(1) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, PH // ROWS)
    finite = tl.zeros((BLOCK_M, 4), tl.float32)
    for tile in tl.range(tiles_per_program, num_stages=1, disable_licm=True):
        image = first_image + tile * IMAGES + row // (ROWS * PW)
        mask = ((row < IMAGES * ROWS * PW) & (image < images))[:, None] & (channel < OUT)[None, :]
        # Rows beyond the last image read it again, so that loads need no mask.
        corner = tl.minimum(image, images - 1) * (C * H * W) + pooled_row * (2 * W) + pooled_column * 2
        # Rows and depth are added to the pointer one after the other: each is widened to 64 bits once, not their sums.
        patch = input_ptr + tl.multiple_of(corner, 2)[:, None]
        window = (image * (OUT * PH * PW) + pooled_row * PW + pooled_column)[:, None]
        outputs = output_ptr + window
        argmax_ptrs = argmax_ptr + window
        for r in tl.range(first_row, last_row, num_stages=STAGES):
            conv = tl.zeros((BLOCK_M, 4 * OUT_PAD), tl.float32)
            for start in tl.static_range(0, DEPTH, BLOCK_K):
                offset = _patch_offsets(start, C, H, W, S, BLOCK_K)[None, :]
                pixels = load(patch + r * (ROWS * 2 * W) + offset)
                conv = tl.dot(tf32(pixels, PRECISION), bands[start // BLOCK_K], conv, input_precision=PRECISION)
            # Columns are (cell row, cell column, channel): a thread holds all cells of its channels.
            left, right = tl.split(conv.reshape(BLOCK_M, 2, 2, OUT_PAD).permute(0, 3, 1, 2))
            cell0, cell2 = tl.split(left)
            cell1, cell3 = tl.split(right)
            top = tl.maximum(cell0, cell1, propagate_nan=tl.PropagateNan.ALL)
            bottom = tl.maximum(cell2, cell3, propagate_nan=tl.PropagateNan.ALL)
            best = tl.maximum(top, bottom, propagate_nan=tl.PropagateNan.ALL)
            if HAS_BIAS:
                # Added to the largest cell it gives what the largest of its sums with all four would be.
                best += bias[None, :]
            if RETURN_ARGMAX:
                argmax = tl.where(bottom > top, tl.where(cell3 > cell2, 3, 2), tl.where(cell1 > cell0, 1, 0))
                argmax = tl.where(best <= 0, NO_WINNER, argmax)
                tl.store(argmax_ptrs + r * (ROWS * PW) + plane, argmax.to(tl.uint8), mask=mask)
            best = tl.maximum(best, 0.0, propagate_nan=tl.PropagateNan.ALL)
            store(outputs + r * (ROWS * PW) + plane, best, mask)
            finite += _lane_sums(best, BLOCK_M, OUT_PAD)

    if _any_not_finite(finite):
        tl.debug_barrier()
        for tile in tl.range(tiles_per_program, num_stages=1, disable_licm=True):
            image = first_image + tile * IMAGES + row // (ROWS * PW)
            mask = ((row < IMAGES * ROWS * PW) & (image < images))[:, None] & (channel < OUT)[None, :]
            corner = image * (C * H * W) + pooled_row * (2 * W) + pooled_column * 2
            window = (image * (OUT * PH * PW) + pooled_row * PW + pooled_column)[:, None] + plane
            for r in tl.range(first_row, last_row, num_stages=1):
                _replace_not_finite(
                    input_ptr + r * (ROWS * 2 * W) + corner,
                    weight_ptr + channel * (C * KS * KS),
                    bias_ptr + channel,
                    output_ptr + r * (ROWS * PW) + window,
                    argmax_ptr + r * (ROWS * PW) + window,
                    mask,
                    C,
                    H * W,
                    W,
                    KS,
                    HAS_BIAS,
                    RETURN_ARGMAX,
                    BLOCK_M,
                    OUT_PAD,
                    OUT,
                )


@triton.jit
def _replace_not_finite(
    pixel_ptrs,
    weight_ptrs,
    bias_ptrs,
    output_ptrs,
    argmax_ptrs,
    mask,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    W: tl.constexpr,
    KS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OUT_PAD: tl.constexpr,
    OUT: tl.constexpr,
):
    """Compute a tile of the forward cell by cell, tap by tap, and store it where what is stored is not finite."""
    row_mask = tl.max(mask.to(tl.int32), axis=1) > 0
    channel_mask = tl.arange(0, OUT_PAD) < OUT
    best = tl.full((BLOCK_M, OUT_PAD), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_M, OUT_PAD), tl.int32)
    for cell in tl.range(4, num_stages=1):
        conv = tl.zeros((BLOCK_M, OUT_PAD), tl.float32)
        for k in tl.range(C * KS * KS, num_stages=1):
            tap = k // (KS * KS) * PLANE + (k // KS % KS + cell // 2) * W + k % KS + cell % 2
            pixel = tl.load(pixel_ptrs + tap, mask=row_mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptrs + k, mask=channel_mask, other=0.0).to(tl.float32)
            conv += pixel[:, None] * weight[None, :]
        if HAS_BIAS:
            conv += tl.load(bias_ptrs, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        conv = tl.maximum(conv, 0.0, propagate_nan=tl.PropagateNan.ALL)
        wins = (conv > best) | (conv != conv)
        best = tl.where(wins, conv, best)
        argmax = tl.where(wins, cell, argmax)
    old = tl.load(output_ptrs, mask=mask, other=0.0).to(tl.float32)
    mask &= (old == float("inf")) | (old != old)
    store(output_ptrs, best, mask)
    if RETURN_ARGMAX:
        tl.store(argmax_ptrs, tl.where(best <= 0, NO_WINNER, argmax).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=[*_COUNTS, *_SMALL])
def _grad_input_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    output_ptr,
    images,
    tiles_per_program,
    C: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    IMAGES: tl.constexpr,
    IN_PAD: tl.constexpr,
    OUT_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradient of the input, gathered: a block of 2x2 pixels receives from the windows above and left of it.

    Maths: ``grad_input[n, c, pixels of block (i, j)] = sum over di, dj of cells[n, i - di, j - dj] @ band[di, dj]``,
    with di, dj in 0..KS // 2 and cells the gradients spread over their window's cells (`_to_cells`).

    Tile: IMAGES images x one row of blocks (BLOCK_M rows) x 4 * IN_PAD columns (channel, pixel of the block). A program
    slides over the pooled rows and keeps the KS // 2 + 1 rows of blocks that a pooled row reaches in registers; each
    gradient is spread once for every dj and serves all di.

    Shapes and strides: grad (N, O, PH, PW), argmax, weight (O, C, KS, KS), output (N, C, H, W), contiguous.

    Cost per image: 2 * PH * W / 2 * (KS // 2 + 1)^2 * 4 * O * 4 * C FLOP; reads gradients and argmax, from cache
    KS // 2 + 1 times, and writes C * H * W elements.
    """
    PH: tl.constexpr = (H - KS + 1) // 2
    PW: tl.constexpr = (W - KS + 1) // 2
    BLOCKS: tl.constexpr = W // 2
    REACH: tl.constexpr = KS // 2 + 1
    row = tl.arange(0, BLOCK_M)
    j = row % BLOCKS
    channel = tl.arange(0, OUT_PAD)
    column = tl.arange(0, 4 * IN_PAD)
    bands = ()
    for d in tl.static_range(REACH * REACH):
        band = _input_band(weight_ptr, d // REACH, d % REACH, C, OUT, KS, IN_PAD, OUT_PAD)
        bands = bands + (tf32(band, PRECISION),)

    first_image = tl.program_id(0).to(INDEX) * tiles_per_program * IMAGES
    finite = tl.zeros((BLOCK_M, 4), tl.float32)
    for tile in tl.range(tiles_per_program, num_stages=1, disable_licm=True):
        image = first_image + tile * IMAGES + row // BLOCKS
        row_mask = (row < IMAGES * BLOCKS) & (image < images)
        window = (image * (OUT * PH * PW) + j)[:, None] + (channel * (PH * PW))[None, :]
        pixel = (column // 4 * (H * W) + column // 2 % 2 * W + column % 2)[None, :]
        pixel += (image * (C * H * W) + j * 2)[:, None]
        pixel_mask = row_mask[:, None] & (column // 4 < C)[None, :]
        sums = ()
        for _ in tl.static_range(REACH):
            sums = sums + (tl.zeros((BLOCK_M, 4 * IN_PAD), tl.float32),)
        for p in tl.range(PH, num_stages=1):
            for dj in tl.static_range(REACH):
                mask = (row_mask & (j >= dj) & (j - dj < PW))[:, None] & (channel < OUT)[None, :]
                argmax = tl.load(argmax_ptr + p * PW - dj + window, mask=mask, other=NO_WINNER).to(tl.int32)
                grad = load(grad_ptr + p * PW - dj + window, mask)
                cells = _cells(tf32(grad, PRECISION), argmax, p, 4 * OUT_PAD, BLOCK_M, OUT_PAD)
                new = ()
                for di in tl.static_range(REACH):
                    band = bands[di * REACH + dj]
                    new = new + (tl.dot(cells.to(band.dtype), band, sums[di], input_precision=PRECISION),)
                sums = new
            finite += _lane_sums(sums[0], BLOCK_M, 4 * IN_PAD)
            store(output_ptr + p * (2 * W) + pixel, sums[0], pixel_mask)
            sums = sums[1:] + (tl.zeros((BLOCK_M, 4 * IN_PAD), tl.float32),)
        for d in tl.static_range(REACH - 1):
            finite += _lane_sums(sums[d], BLOCK_M, 4 * IN_PAD)
            store(output_ptr + (PH + d) * (2 * W) + pixel, sums[d], pixel_mask)

    if _any_not_finite(finite):
        tl.debug_barrier()
        input_channel = tl.arange(0, IN_PAD)
        for tile in tl.range(tiles_per_program, num_stages=1, disable_licm=True):
            image = first_image + tile * IMAGES + row // BLOCKS
            row_mask = (row < IMAGES * BLOCKS) & (image < images)
            mask = row_mask[:, None] & (input_channel < C)[None, :]
            for h in tl.range(H, num_stages=1):
                for half in tl.range(2, num_stages=1):
                    w = 2 * j + half
                    total = tl.zeros((BLOCK_M, IN_PAD), tl.float32)
                    for tap in tl.range(KS * KS, num_stages=1):
                        y = h - tap // KS
                        x = w - tap % KS
                        inside = row_mask & (y >= 0) & (y < 2 * PH) & (x >= 0) & (x < 2 * PW)
                        window = image * (OUT * PH * PW) + y // 2 * PW + x // 2
                        for o in tl.range(OUT, num_stages=1):
                            argmax = tl.load(argmax_ptr + window + o * (PH * PW), mask=inside, other=NO_WINNER).to(
                                tl.int32
                            )
                            grad = tl.load(grad_ptr + window + o * (PH * PW), mask=inside, other=0.0).to(tl.float32)
                            grad = tl.where(argmax == y % 2 * 2 + x % 2, grad, 0.0)
                            offset = o * (C * KS * KS) + input_channel * (KS * KS) + tap
                            weight = tl.load(weight_ptr + offset, mask=input_channel < C, other=0.0).to(tl.float32)
                            # As in stock, a gradient of 0 inside the convolution still meets its weight.
                            total += tl.where(inside[:, None], grad[:, None] * weight[None, :], 0.0)
                    pixels = (
                        output_ptr + (image * (C * H * W) + h * W + w)[:, None] + (input_channel * (H * W))[None, :]
                    )
                    old = tl.load(pixels, mask=mask, other=0.0).to(tl.float32)
                    store(pixels, total, mask & ((tl.abs(old) == float("inf")) | (old != old)))


@triton.jit(do_not_specialize=["before", "groups", "row_groups", *_COUNTS])
def _grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    partials_ptr,
    before,
    groups,
    row_groups,
    images,
    tiles_per_program,
    rows_per_program,
    INDEX: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KS: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOWS: tl.constexpr,
    OUT_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the weight and the bias: one part of each sum, which `sum_partials` completes in a fixed order.

    Maths: WINDOWS x WINDOWS windows w share a patch of S = KS + 2 * WINDOWS - 1 pixels a side. ``sums[k, (t, w, o)] =
    sum over the part's (n, p) of patch[n, p, k] * cells[n, p, (t, w, o)]`` with cells t as `_to_cells` spreads them;
    ``weight_part[o, (c, tap)] = sum over t, w of sums[(c, tap + t + 2 * w), (t, w, o)]``: the band's entries, shifted
    onto each other; the others are never read. ``bias_part[o] = sum where(argmax != NO_WINNER, grad, 0)``, in float32.

    Tile: IMAGES images x ROWS rows of patches x all their columns (BLOCK_M rows), times the whole matrix of patch and
    (cell, window, channel), in accumulators of BLOCK_K rows; the sum runs over the images and row blocks of a program,
    as in the forward. The program's number, less `before` (see `joint`), counts the `groups` of images first, then the
    `row_groups` of row blocks. The wider the patches, the less often a pixel is loaded: (S / (2 * WINDOWS))^2 times.

    Shapes and strides: grad and argmax (N, O, PH, PW), input (N, C, H, W), all contiguous; partials (parts, O * C * KS
    * KS + O) float32, first the weight's, then the bias'.

    Cost per image: 2 * PH * PW * C * S * S * 4 * O FLOP.
    """
    PH: tl.constexpr = (H - KS + 1) // 2
    PW: tl.constexpr = (W - KS + 1) // 2
    S: tl.constexpr = KS + 2 * WINDOWS - 1
    STEP: tl.constexpr = 2 * WINDOWS  # pixels from patch to patch
    COLUMNS: tl.constexpr = PW // WINDOWS
    DEPTH: tl.constexpr = C * S * S
    TAPS: tl.constexpr = C * KS * KS
    WIDTH: tl.constexpr = WINDOWS * OUT_PAD * WINDOWS
    row = tl.arange(0, BLOCK_M)
    patch_row = row // COLUMNS % ROWS
    patch_column = row % COLUMNS
    # Columns are (row of the window, channel, column of the window): windows side by side are loaded as one.
    column = tl.arange(0, WIDTH)
    channel = column // WINDOWS % OUT_PAD
    plane = channel * (PH * PW) + column // (WINDOWS * OUT_PAD) * PW + column % WINDOWS
    plane = tl.max_contiguous(tl.multiple_of(plane, WINDOWS), WINDOWS)[None, :]
    sums = ()
    for _ in tl.static_range(0, DEPTH, BLOCK_K):
        sums = sums + (tl.zeros((BLOCK_K, 4 * WIDTH), tl.float32),)
    bias_sum = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    number = tl.program_id(0) - before
    first_image = (number % groups).to(INDEX) * tiles_per_program * IMAGES
    first_row = number // groups * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, PH // (WINDOWS * ROWS))
    for tile in tl.range(tiles_per_program, num_stages=1, disable_licm=True):
        image = first_image + tile * IMAGES + row // (ROWS * COLUMNS)
        row_mask = (row < IMAGES * ROWS * COLUMNS) & (image < images)
        mask = row_mask[:, None] & (channel < OUT)[None, :]
        corner = image * (C * H * W) + patch_row * (STEP * W) + patch_column * STEP
        patch = input_ptr + tl.multiple_of(corner, STEP if W % STEP == 0 else 2)[:, None]
        window = image * (OUT * PH * PW) + patch_row * (WINDOWS * PW) + patch_column * WINDOWS
        window = tl.multiple_of(window, WINDOWS)[:, None]
        grads = grad_ptr + window
        argmax_ptrs = argmax_ptr + window
        for r in tl.range(first_row, last_row, num_stages=STAGES):
            argmax = tl.load(argmax_ptrs + r * (ROWS * WINDOWS * PW) + plane, mask=mask, other=NO_WINNER).to(tl.int32)
            grad = load(grads + r * (ROWS * WINDOWS * PW) + plane, mask)
            bias_sum += tl.where(argmax != NO_WINNER, grad, 0.0).to(tl.float32)
            cells = _cells(tf32(grad, PRECISION), argmax, r, BLOCK_M, BLOCK_M, WIDTH)
            new = ()
            for start in tl.static_range(0, DEPTH, BLOCK_K):
                offset = _patch_offsets(start, C, H, W, S, BLOCK_K)[None, :]
                # Pixels of rows that are not there must be 0 as well: infinity times 0 is not.
                pixels = tf32(load(patch + r * (ROWS * STEP * W) + offset, row_mask[:, None]), PRECISION)
                product = tl.dot(
                    tl.trans(pixels), cells.to(pixels.dtype), sums[start // BLOCK_K], input_precision=PRECISION
                )
                new = new + (product,)
            sums = new

    # Each column's taps, from where its window's cell sees them in the patch; the padding repeats some.
    tap = tl.arange(0, BLOCK_T)
    padded = tl.minimum(tap, TAPS - 1)
    place = padded // (KS * KS) * (S * S) + padded // KS % KS * S + padded % KS
    column = tl.arange(0, 4 * WIDTH)
    cell = column // WIDTH
    down = cell // 2 + 2 * (column % WIDTH // (WINDOWS * OUT_PAD))
    right = cell % 2 + 2 * (column % WINDOWS)
    k = place[:, None] + (down * S + right)[None, :]
    if DEPTH <= BLOCK_K:
        total = tl.gather(sums[0], k, axis=0)
    else:
        total = tl.zeros((BLOCK_T, 4 * WIDTH), tl.float32)
        for start in tl.static_range(0, DEPTH, BLOCK_K):
            here = (k >= start) & (k < start + BLOCK_K)
            total = tl.where(here, tl.gather(sums[start // BLOCK_K], tl.where(here, k - start, 0), axis=0), total)
    total = total.reshape(BLOCK_T, 4 * WINDOWS, OUT_PAD, WINDOWS)
    total = tl.sum(tl.sum(total, axis=3), axis=1)
    channel = tl.arange(0, OUT_PAD)
    part = (number % groups * row_groups + number // groups).to(INDEX)
    partials_ptr += part * (OUT * (TAPS + 1))
    mask = (tap < TAPS)[:, None] & (channel < OUT)[None, :]
    tl.store(partials_ptr + (channel * TAPS)[None, :] + tap[:, None], total, mask=mask)
    bias = tl.sum(bias_sum, axis=0).reshape(WINDOWS, OUT_PAD, WINDOWS)
    bias = tl.sum(tl.sum(bias, axis=2), axis=0)
    tl.store(partials_ptr + OUT * TAPS + channel, bias, mask=channel < OUT)


def covers(geometry: ConvPoolGeometry, input: Tensor, weight: Tensor) -> bool:
    """Whether these kernels can compute this convolution and pool."""
    size, kernel = tuple(input.shape[2:]), tuple(weight.shape[2:])
    plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), geometry.ceil_mode)
    if geometry != plain or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        return False
    conv = geometry.conv_size(size, kernel)
    return min(conv) > 0 and conv[0] % 2 == 0 and conv[1] % 2 == 0


def _shape(input: Tensor, weight: Tensor) -> dict[str, Any]:
    """Compile in the shape of all but the batch."""
    _, in_channels, height, width = input.shape
    return {"C": in_channels, "OUT": weight.shape[0], "H": height, "W": width, "KS": weight.shape[2]}


def _options(input: Tensor, configuration: Mapping[str, int]) -> dict[str, Any]:
    """Turn a configuration into launch options."""
    precision = dot_precision(input.dtype, torch.backends.cudnn.conv.fp32_precision)
    registers = {} if INTERPRETED else all_registers()
    return {"PRECISION": precision, **registers, **configuration}


def _programs(configuration: Mapping[str, int]) -> int:
    """How many programs some 132 multiprocessors hold at once, by the registers that a configuration leaves them.

    With as many, each builds its weight matrices once, and none waits for another to end.
    """
    registers = -(-configuration.get("maxnreg", 255) // 8) * 8
    return 132 * max(1, 65536 // (32 * configuration.get("num_warps", 4) * registers))


def _share(tiles: int, rows: int, programs: int) -> tuple[int, int]:
    """Share `tiles` groups of images, each of `rows` row blocks, between about `programs` programs.

    Depends on the shape alone, so that a sum over programs never depends on the device it was computed on.

    Returns:
        Groups of images and row blocks that one program takes.
    """
    tiles_per_program = -(-tiles // programs)
    splits = min(rows, max(1, programs // max(1, tiles)))
    return tiles_per_program, -(-rows // splits)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvPoolGeometry,
    return_argmax: bool,
    last: bool,
    configuration: Mapping[str, int],
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; arguments and results as in `conv2d_relu_max_pool2d`, tensors contiguous."""
    shape = _shape(input, weight)
    pooled_h, pooled_w = ((shape[side] - shape["KS"] + 1) // 2 for side in "HW")
    output = empty((input.shape[0], shape["OUT"], pooled_h, pooled_w), input)
    argmax = empty(output.shape, output, torch.uint8) if return_argmax else None
    tiles, rows = cdiv(input.shape[0], configuration["IMAGES"]), pooled_h // configuration["ROWS"]
    tiles_per_program, rows_per_program = _share(tiles, rows, _programs(configuration))
    launch(
        _forward_kernel,
        (cdiv(tiles, tiles_per_program), cdiv(rows, rows_per_program)),
        input,
        weight,
        weight if bias is None else bias,
        output,
        output if argmax is None else argmax,
        input.shape[0],
        tiles_per_program,
        rows_per_program,
        **shape,
        HAS_BIAS=bias is not None,
        RETURN_ARGMAX=return_argmax,
        INDEX=index_type(input, output),
        **_options(input, configuration),
    )
    return output, argmax


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    configuration: Mapping[str, int],
) -> Tensor:
    """Launch the gradient of the input; all tensors contiguous."""
    result = empty(input.shape, input)
    tiles = cdiv(input.shape[0], configuration["IMAGES"])
    tiles_per_program, _ = _share(tiles, 1, _programs(configuration))
    launch(
        _grad_input_kernel,
        (cdiv(tiles, tiles_per_program),),
        grad_output,
        argmax,
        weight,
        result,
        input.shape[0],
        tiles_per_program,
        **_shape(input, weight),
        INDEX=index_type(result, grad_output),
        **_options(input, configuration),
    )
    return result


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    configuration: Mapping[str, int],
    later: Later | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of the weight and the bias; all tensors contiguous. `later` as in `joint.launch_job`."""
    shape = _shape(input, weight)
    patch_rows = argmax.shape[2] // configuration["WINDOWS"]
    tiles, rows = cdiv(input.shape[0], configuration["IMAGES"]), patch_rows // configuration["ROWS"]
    tiles_per_program, rows_per_program = _share(tiles, rows, _programs(configuration))
    grid = cdiv(tiles, tiles_per_program), cdiv(rows, rows_per_program)
    partials = empty((grid[0] * grid[1], weight.numel() + weight.shape[0]), input, torch.float32)
    options = _options(input, configuration)
    num_warps, registers = options.pop("num_warps", 4), options.pop("maxnreg", 255)
    numbers = *grid, input.shape[0], tiles_per_program, rows_per_program
    constants = {**shape, "BLOCK_T": next_power_of_2(weight.numel() // weight.shape[0]), **options}
    result, bias = empty(weight.shape, weight), empty(weight.shape[:1], weight)
    job = Job(
        _grad_weight_kernel,
        (1,) if INTERPRETED else (num_warps,),
        (grad_output, argmax, input, partials),
        index_type(input, grad_output, partials),
        lambda _: (grid[0] * grid[1], numbers, constants),
        registers,
    )
    launch_job(job, (partials, (result, bias), 1.0), later)
    return result, bias
