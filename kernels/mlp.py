"""Three linear layers with relu between them in one kernel, and their gradients: the head of a small network.

A program owns a block of rows and takes them through all three layers; what lies between the layers stays on the chip.
Letters: hidden1 (M, P) = relu(input (M, K) @ weight1 (P, K)^T + bias1); hidden2 (M, Q) = relu(hidden1 @ weight2
(Q, P)^T + bias2); output (M, R) = hidden2 @ weight3 (R, Q)^T + bias3. K may be anything; P, Q and R are at most
`geometry.WIDEST_LAYER`.

Operands are contiguous, and results rounded to their type where the layers, run one by one, would round them. Sizes are
run-time values: a new shape compiles nothing, but for the width of a block of hidden1, the number of slices of hidden2,
and whether rows start at multiples of four elements, which decides how wide loads may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .joint import Job, Later, launch_job
from .runtime import (
    cdiv,
    contiguous,
    dot,
    empty,
    index_type,
    launch,
    load,
    operand,
    relu,
    split_reduction,
    store,
)

# Never specialised on: neither a size of 1 nor a multiple of 16 compiles a kernel anew.
_GENERAL = [
    *("m", "k", "p", "q", "r", "rows_per_part", "before"),
    *("grad_stride_m", "grad_stride_r"),
    *(f"{tensor}_ptr" for tensor in ("input", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3", "output")),
    *(f"{tensor}_ptr" for tensor in ("hidden1", "hidden2", "grad", "grad1", "grad2", "result", "row_sums")),
    "weight_sums_ptr",
]


@triton.jit
def _pointers(ptr, row, column, rows, columns, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to the elements [row, column] of a contiguous (rows, columns) matrix, and which of them exist.

    TRANSPOSED puts the matrix's rows along the tile's columns. ALIGNED promises that rows start at multiples of four
    elements.
    """
    WIDTH: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # bytes of four elements
    limit = columns // 4 * 4 if ALIGNED else columns
    if TRANSPOSED:
        pointers = ptr + (row * columns)[None, :] + column[:, None]
        mask = (row < rows)[None, :] & (column < limit)[:, None]
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (WIDTH, 1))
    else:
        pointers = ptr + (row * columns)[:, None] + column[None, :]
        mask = (row < rows)[:, None] & (column < limit)[None, :]
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (1, WIDTH))
    return pointers, mask


@triton.jit
def _load(ptr, row, column, rows, columns, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Load the elements [row, column] of a contiguous matrix, zero where there are none."""
    pointers, mask = _pointers(ptr, row, column, rows, columns, ALIGNED, TRANSPOSED)
    return load(pointers, mask)


@triton.jit
def _store(ptr, row, column, rows, columns, values, ALIGNED: tl.constexpr):
    """Store the elements [row, column] of a contiguous matrix."""
    pointers, mask = _pointers(ptr, row, column, rows, columns, ALIGNED, False)
    store(pointers, values, mask)


@triton.jit
def _hidden(product, bias_ptr, row, column, rows, columns):
    """Add the bias and apply relu; zero in the tile's padding, where an infinity would turn a later product to NaN."""
    product += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return tl.where((row < rows)[:, None] & (column < columns)[None, :], relu(product), 0.0)


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    input_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    weight3_ptr,
    bias3_ptr,
    output_ptr,
    hidden1_ptr,
    hidden2_ptr,
    m,
    k,
    p,
    q,
    r,
    SAVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SLICES_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All three layers for BLOCK_M rows, on matrix units.

    hidden1 is made BLOCK_P features at a time, each block feeding hidden2's sums, which stay in registers as SLICES_Q
    slices of BLOCK_Q features. Every sum runs within the program in one order, whatever the batch, in float32.

    Saves: hidden1 and hidden2 if SAVE, whose signs are relu's masks; else nothing.

    Cost per row ("image"): 2 * (K * P + P * Q + Q * R) FLOP; reads K elements, writes R, and P + Q if SAVE; the weights
    are read once per program.
    """
    row = tl.arange(0, BLOCK_M)
    first_row = tl.program_id(0).to(INDEX) * BLOCK_M
    if INDEX == tl.int64:  # noqa: SIM300  (a type is no constant here)
        # Only a tile's beginning takes 64 bits, which every lane would need registers for.
        input_ptr += first_row * k
        output_ptr += first_row * r
        hidden1_ptr += first_row * p
        hidden2_ptr += first_row * q
        m = tl.minimum(m - first_row, BLOCK_M).to(tl.int32)
    else:
        row += first_row
    sums = ()
    for _ in tl.static_range(SLICES_Q):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_Q), tl.float32),)
    for first in range(0, p, BLOCK_P):
        column1 = first + tl.arange(0, BLOCK_P)
        product = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for start in range(0, k, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            left = _load(input_ptr, row, depth, m, k, ALIGNED)
            right = _load(weight1_ptr, column1, depth, p, k, ALIGNED, True)
            product = dot(left, right, product, PRECISION)
        hidden = _hidden(product, bias1_ptr, row, column1, m, p)
        if SAVE:
            _store(hidden1_ptr, row, column1, m, p, hidden, ALIGNED)
        hidden = operand(hidden, input_ptr)
        for i in tl.static_range(SLICES_Q):
            right = _load(weight2_ptr, i * BLOCK_Q + tl.arange(0, BLOCK_Q), column1, q, p, ALIGNED, True)
            total = dot(hidden, right, sums[i], PRECISION)
            sums = sums[:i] + (total,) + sums[i + 1 :]
    for i in tl.static_range(SLICES_Q):
        column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        hidden = _hidden(sums[i], bias2_ptr, row, column2, m, q)
        if SAVE:
            _store(hidden2_ptr, row, column2, m, q, hidden, ALIGNED)
        sums = sums[:i] + (operand(hidden, input_ptr),) + sums[i + 1 :]
    for first in tl.range(0, r, BLOCK_R, num_stages=1, disable_licm=True):
        columns3 = first + tl.arange(0, BLOCK_R)
        product3 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in tl.static_range(SLICES_Q):
            right = _load(weight3_ptr, columns3, i * BLOCK_Q + tl.arange(0, BLOCK_Q), r, q, ALIGNED, True)
            product3 = dot(sums[i], right, product3, PRECISION)
        product3 += tl.load(bias3_ptr + columns3, mask=columns3 < r, other=0.0).to(tl.float32)[None, :]
        _store(output_ptr, row, columns3, m, r, product3, False)


@triton.jit(do_not_specialize=_GENERAL)
def _exact_forward_kernel(
    input_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    weight3_ptr,
    bias3_ptr,
    output_ptr,
    hidden1_ptr,
    hidden2_ptr,
    m,
    k,
    p,
    q,
    r,
    SAVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SLICES_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All three layers for BLOCK_M rows in exact float32, on FMA units.

    All of hidden1 is stored first and read again, BLOCK_K features at a time: an operand that comes from registers is
    held there over its whole depth, which leaves no room for many outputs a lane. hidden2's sums stay in registers as
    SLICES_Q slices of BLOCK_Q features. Every sum runs within the program in one order, whatever the batch.

    Saves: hidden1; hidden2 if SAVE. Their signs are relu's masks.

    Cost per row ("image"): as of `_forward_kernel`, and writes and reads P always.
    """
    row = tl.arange(0, BLOCK_M)
    first_row = tl.program_id(0).to(INDEX) * BLOCK_M
    if INDEX == tl.int64:  # noqa: SIM300  (a type is no constant here)
        # Only a tile's beginning takes 64 bits, which every lane would need registers for.
        input_ptr += first_row * k
        output_ptr += first_row * r
        hidden1_ptr += first_row * p
        hidden2_ptr += first_row * q
        m = tl.minimum(m - first_row, BLOCK_M).to(tl.int32)
    else:
        row += first_row
    sums = ()
    for first in range(0, p, BLOCK_P):
        column1 = first + tl.arange(0, BLOCK_P)
        product = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for start in range(0, k, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            left = _load(input_ptr, row, depth, m, k, ALIGNED)
            right = _load(weight1_ptr, column1, depth, p, k, ALIGNED, True)
            product = dot(left, right, product, PRECISION)
        hidden = _hidden(product, bias1_ptr, row, column1, m, p)
        _store(hidden1_ptr, row, column1, m, p, hidden, ALIGNED)
    # What other lanes of this program stored is read.
    tl.debug_barrier()
    for _ in tl.static_range(SLICES_Q):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_Q), tl.float32),)
    for start in range(0, p, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        left = _load(hidden1_ptr, row, depth, m, p, ALIGNED)
        for i in tl.static_range(SLICES_Q):
            right = _load(weight2_ptr, i * BLOCK_Q + tl.arange(0, BLOCK_Q), depth, q, p, ALIGNED, True)
            total = dot(left, right, sums[i], PRECISION)
            sums = sums[:i] + (total,) + sums[i + 1 :]
    for i in tl.static_range(SLICES_Q):
        column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        hidden = _hidden(sums[i], bias2_ptr, row, column2, m, q)
        if SAVE:
            _store(hidden2_ptr, row, column2, m, q, hidden, ALIGNED)
        sums = sums[:i] + (operand(hidden, input_ptr),) + sums[i + 1 :]
    # One output after the other: a tl.dot would need more registers than there are.
    for column3 in range(r):
        total3 = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(SLICES_Q):
            column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            weight = load(weight3_ptr + column3 * q + column2, column2 < q)
            total3 += tl.sum(sums[i] * weight[None, :], axis=1)
        total3 += tl.load(bias3_ptr + column3)
        store(output_ptr + row * r + column3, total3, row < m)


@triton.jit
def _masked_grad(grad, hidden, row, column, rows, columns):
    """Mask a gradient where relu was off (NaN counts as on, as in PyTorch) and in the tile's padding."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.where((hidden <= 0) | (inside == 0), 0.0, grad)


@triton.jit
def _grad_input(
    grad1_ptr,
    weight1_ptr,
    result_ptr,
    row,
    m,
    k,
    p,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store result (M, K) = grad1 @ weight1, the input's gradient, in the rows of grad1 that this program stored."""
    # What other lanes of this program stored is read.
    tl.debug_barrier()
    for first in tl.range(0, k, BLOCK_J, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, BLOCK_J)
        product = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        for start in tl.range(0, p, BLOCK_D, num_stages=STAGES):
            depth = start + tl.arange(0, BLOCK_D)
            left = _load(grad1_ptr, row, depth, m, p, ALIGNED)
            right = _load(weight1_ptr, depth, column, p, k, ALIGNED)
            product = dot(left, right, product, PRECISION)
        _store(result_ptr, row, column, m, k, product, ALIGNED)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_hidden_kernel(
    grad_ptr,
    hidden1_ptr,
    hidden2_ptr,
    weight2_ptr,
    weight3_ptr,
    weight1_ptr,
    grad1_ptr,
    grad2_ptr,
    row_sums_ptr,
    result_ptr,
    m,
    k,
    p,
    q,
    r,
    grad_stride_m,
    grad_stride_r,
    SUMS: tl.constexpr,
    INPUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SLICES_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of both hidden layers before relu, and BLOCK_M rows' share of what sums over the rows alone.

    grad2 (M, Q) = grad_output @ weight3 where hidden2 > 0, grad1 (M, P) = grad2 @ weight2 where hidden1 > 0, else 0.
    row_sums, float32 (programs, R * Q + P + Q + R), if SUMS: this program's grad_output^T @ hidden2 and the column sums
    of grad1, grad2 and grad_output, which `sum_partials` completes: the gradients of weight3 and of the biases. The
    column sums are taken before grad1 and grad2 are rounded. result (M, K) = grad1 @ weight1, if INPUT: the gradient of
    the input, BLOCK_J columns at a time, from grad1 as it was stored.

    Shapes and strides: grad_output (M, R), any strides (0 too); all else contiguous.

    Cost per row: 2 * (2 * R * Q + Q * P + P * K) FLOP; reads R + P + Q elements, writes P + Q + K; reads grad1 again
    from cache, once for each BLOCK_J columns.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums_ptr = row_sums_ptr + tl.program_id(0).to(tl.int64) * (r * q + p + q + r)
    hiddens = ()
    grads = ()
    for i in tl.static_range(SLICES_Q):
        hiddens = hiddens + (_load(hidden2_ptr, row, i * BLOCK_Q + tl.arange(0, BLOCK_Q), m, q, ALIGNED),)
        grads = grads + (tl.zeros((BLOCK_M, BLOCK_Q), tl.float32),)
    for first in tl.range(0, r, BLOCK_R, num_stages=1, disable_licm=True):
        column3 = first + tl.arange(0, BLOCK_R)
        offset = (row * grad_stride_m)[:, None] + (column3 * grad_stride_r)[None, :]
        grad = load(grad_ptr + offset, (row < m)[:, None] & (column3 < r)[None, :])
        if SUMS:
            total = tl.sum(grad.to(tl.float32), axis=0)
            tl.store(sums_ptr + r * q + p + q + column3, total, mask=column3 < r)
        for i in tl.static_range(SLICES_Q):
            column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            right = _load(weight3_ptr, column3, column2, r, q, ALIGNED)
            total = dot(grad, right, grads[i], PRECISION)
            grads = grads[:i] + (total,) + grads[i + 1 :]
            if SUMS:
                product = dot(tl.trans(grad), hiddens[i], None, PRECISION)
                _store(sums_ptr, column3, column2, r, q, product, False)
    for i in tl.static_range(SLICES_Q):
        column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        masked = _masked_grad(grads[i], hiddens[i], row, column2, m, q)
        if SUMS:
            tl.store(sums_ptr + r * q + p + column2, tl.sum(masked, axis=0), mask=column2 < q)
        _store(grad2_ptr, row, column2, m, q, masked, ALIGNED)
        grads = grads[:i] + (operand(masked, grad2_ptr),) + grads[i + 1 :]
    for first in tl.range(0, p, BLOCK_P, num_stages=1, disable_licm=True):
        column1 = first + tl.arange(0, BLOCK_P)
        product1 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for i in tl.static_range(SLICES_Q):
            right = _load(weight2_ptr, i * BLOCK_Q + tl.arange(0, BLOCK_Q), column1, q, p, ALIGNED)
            product1 = dot(grads[i], right, product1, PRECISION)
        masked1 = _masked_grad(product1, _load(hidden1_ptr, row, column1, m, p, ALIGNED), row, column1, m, p)
        if SUMS:
            tl.store(sums_ptr + r * q + column1, tl.sum(masked1, axis=0), mask=column1 < p)
        _store(grad1_ptr, row, column1, m, p, masked1, ALIGNED)
    if INPUT:
        _grad_input(
            grad1_ptr, weight1_ptr, result_ptr, row, m, k, p, ALIGNED, PRECISION, BLOCK_M, BLOCK_J, BLOCK_D, STAGES
        )


@triton.jit(do_not_specialize=_GENERAL)
def _exact_grad_hidden_kernel(
    grad_ptr,
    hidden1_ptr,
    hidden2_ptr,
    weight2_ptr,
    weight3_ptr,
    weight1_ptr,
    grad1_ptr,
    grad2_ptr,
    row_sums_ptr,
    result_ptr,
    m,
    k,
    p,
    q,
    r,
    grad_stride_m,
    grad_stride_r,
    SUMS: tl.constexpr,
    INPUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SLICES_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of both hidden layers as of `_grad_hidden_kernel`, in exact float32, on FMA units.

    The last layer goes output by output, as outer products; grad2 is stored and read again, as hidden1 is forward.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums_ptr = row_sums_ptr + tl.program_id(0).to(tl.int64) * (r * q + p + q + r)
    hiddens = ()
    grads = ()
    for i in tl.static_range(SLICES_Q):
        hiddens = hiddens + (_load(hidden2_ptr, row, i * BLOCK_Q + tl.arange(0, BLOCK_Q), m, q, ALIGNED),)
        grads = grads + (tl.zeros((BLOCK_M, BLOCK_Q), tl.float32),)
    # One output after the other: a tl.dot over BLOCK_M rows would need more registers than there are.
    pointers = grad_ptr + row * grad_stride_m
    for column3 in range(r):
        grad3 = load(pointers, row < m)
        pointers += grad_stride_r
        if SUMS:
            tl.store(sums_ptr + r * q + p + q + column3, tl.sum(grad3, axis=0))
        for i in tl.static_range(SLICES_Q):
            column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            weight = load(weight3_ptr + column3 * q + column2, column2 < q)
            grads = grads[:i] + (grads[i] + grad3[:, None] * weight[None, :],) + grads[i + 1 :]
            if SUMS:
                total3 = tl.sum(grad3[:, None] * hiddens[i], axis=0)
                tl.store(sums_ptr + column3 * q + column2, total3, mask=column2 < q)
    for i in tl.static_range(SLICES_Q):
        column2 = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        masked = _masked_grad(grads[i], hiddens[i], row, column2, m, q)
        if SUMS:
            tl.store(sums_ptr + r * q + p + column2, tl.sum(masked, axis=0), mask=column2 < q)
        _store(grad2_ptr, row, column2, m, q, masked, ALIGNED)
        grads = grads[:i] + (operand(masked, grad2_ptr),) + grads[i + 1 :]
    # What other lanes of this program stored is read.
    tl.debug_barrier()
    for first in tl.range(0, p, BLOCK_P, num_stages=1, disable_licm=True):
        column1 = first + tl.arange(0, BLOCK_P)
        product1 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for start in range(0, q, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            left = _load(grad2_ptr, row, depth, m, q, ALIGNED)
            right = _load(weight2_ptr, depth, column1, q, p, ALIGNED)
            product1 = dot(left, right, product1, PRECISION)
        masked1 = _masked_grad(product1, _load(hidden1_ptr, row, column1, m, p, ALIGNED), row, column1, m, p)
        if SUMS:
            tl.store(sums_ptr + r * q + column1, tl.sum(masked1, axis=0), mask=column1 < p)
        _store(grad1_ptr, row, column1, m, p, masked1, ALIGNED)
    if INPUT:
        _grad_input(
            grad1_ptr, weight1_ptr, result_ptr, row, m, k, p, ALIGNED, PRECISION, BLOCK_M, BLOCK_J, BLOCK_D, STAGES
        )


@triton.jit(do_not_specialize=_GENERAL)
def _grad_weights_kernel(
    input_ptr,
    hidden1_ptr,
    grad1_ptr,
    grad2_ptr,
    weight_sums_ptr,
    before,
    m,
    k,
    p,
    q,
    rows_per_part,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of weight1 (P, K) = grad1^T @ input and of weight2 (Q, P) = grad2^T @ hidden1: one part of each sum.

    Tile: BLOCK_I x BLOCK_J of one of the two, over the `rows_per_part` rows of one part. The program's number, less
    `before` (see `joint`), counts the tiles of weight1 first, then those of weight2, then parts.

    Shapes: weight_sums, float32 (parts, P * K + Q * P), holds the parts, which `sum_partials` completes; all
    contiguous.

    Cost per row: 2 * (K * P + P * Q) FLOP; reads K + P elements per BLOCK_I features of grad1, P + Q per tile of
    weight2.
    """
    tile = tl.program_id(0) - before
    tiles_k = (k + BLOCK_J - 1) // BLOCK_J
    product = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    tiles1 = (p + BLOCK_I - 1) // BLOCK_I * tiles_k
    tiles_p = (p + BLOCK_J - 1) // BLOCK_J
    tiles = tiles1 + (q + BLOCK_I - 1) // BLOCK_I * tiles_p
    part = tile // tiles
    tile %= tiles
    sums_ptr = weight_sums_ptr + part.to(tl.int64) * (p * k + q * p)
    left_ptr, right_ptr, height, width, across = grad1_ptr, input_ptr, p, k, tiles_k
    if tile >= tiles1:
        tile -= tiles1
        sums_ptr += p * k
        left_ptr, right_ptr, height, width, across = grad2_ptr, hidden1_ptr, q, p, tiles_p
    row = (tile // across).to(INDEX) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = tile % across * BLOCK_J + tl.arange(0, BLOCK_J)
    first = part.to(INDEX) * rows_per_part
    for start in tl.range(0, rows_per_part, BLOCK_D, num_stages=STAGES):
        depth = first + start + tl.arange(0, BLOCK_D)
        left = _load(left_ptr, depth, row, m, height, ALIGNED, True)
        right = _load(right_ptr, depth, column, m, width, ALIGNED)
        product = dot(left, right, product, PRECISION)
    _store(sums_ptr, row, column, height, width, product, ALIGNED)


def _aligned(*matrices: Tensor) -> bool:
    """Whether every row of the matrices starts at a multiple of four elements."""
    return all(t.shape[1] % 4 == 0 and t.data_ptr() % (4 * t.element_size()) == 0 for t in matrices)


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    return_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the forward.

    Args:
        input: (M, K).
        weight1: (P, K), P at most `WIDEST_LAYER`.
        bias1: (P,).
        weight2: (Q, P), Q at most `WIDEST_LAYER`.
        bias2: (Q,).
        weight3: (R, Q), R at most `WIDEST_LAYER`.
        bias3: (R,).
        return_hidden: whether to keep what lies between the layers, which the backward needs.

    Returns:
        The output (M, R), and hidden1 (M, P) and hidden2 (M, Q), or None for both.
    """
    (m, k), p, q, r = input.shape, weight1.shape[0], weight2.shape[0], weight3.shape[0]
    operands = [contiguous(t) for t in (input, weight1, bias1, weight2, bias2, weight3, bias3)]
    output = empty((m, r), input)
    aligned = _aligned(operands[0], operands[1], operands[3], operands[5])
    tile = tiles.head_layers(input.dtype, p, q, aligned)
    exact = tiles.is_exact(input.dtype, tile["PRECISION"])
    hidden1 = empty((m, p), input) if return_hidden or exact else None
    hidden2 = empty((m, q), input) if return_hidden else None
    launch(
        _exact_forward_kernel if exact else _forward_kernel,
        (cdiv(m, tile["BLOCK_M"]),),
        *operands,
        output,
        output if hidden1 is None else hidden1,
        output if hidden2 is None else hidden2,
        m,
        k,
        p,
        q,
        r,
        SAVE=return_hidden,
        ALIGNED=aligned,
        INDEX=index_type(operands[0], output, hidden1, hidden2),
        **tile,
    )
    return output, hidden1 if return_hidden else None, hidden2


def mlp_backward(
    grad_output: Tensor,
    input: Tensor,
    hidden1: Tensor,
    hidden2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    output_mask: Sequence[bool],
    later: Later | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch those kernels of the backward that `output_mask` asks for: three where it asks for everything.

    Args:
        grad_output: (M, R), any strides.
        input: the forward's.
        hidden1: the forward's.
        hidden2: the forward's.
        weight1: the forward's.
        weight2: the forward's.
        weight3: the forward's.
        output_mask: whether to compute the gradients of input, weight1, bias1, weight2, bias2, weight3 and bias3.
        later: as in `joint.launch_job`; what is noted there makes the parameters' gradients whole.

    Returns:
        The seven gradients; None where not asked for.
    """
    (m, k), p, q, r = input.shape, weight1.shape[0], weight2.shape[0], weight3.shape[0]
    input, hidden1, hidden2, weight1, weight2, weight3 = (
        contiguous(t) for t in (input, hidden1, hidden2, weight1, weight2, weight3)
    )
    # The same kernels compute all parameters' gradients, so one that is asked for costs as much as all.
    need_input, need_sums = output_mask[0], any(output_mask[1:])
    aligned = _aligned(input, hidden1, hidden2, weight1, weight2, weight3)
    grad1, grad2 = empty((m, p), input), empty((m, q), input)
    grad_input = empty((m, k), input) if need_input else None
    layers = tiles.head_layers(input.dtype, p, q, aligned)
    exact = tiles.is_exact(input.dtype, layers["PRECISION"])
    row_parts = cdiv(m, layers["BLOCK_M"])
    row_sums = empty((row_parts, r * q + p + q + r), input, torch.float32) if need_sums else None
    launch(
        _exact_grad_hidden_kernel if exact else _grad_hidden_kernel,
        (row_parts,),
        grad_output,
        hidden1,
        hidden2,
        weight2,
        weight3,
        weight1,
        grad1,
        grad2,
        grad1 if row_sums is None else row_sums,
        grad1 if grad_input is None else grad_input,
        m,
        k,
        p,
        q,
        r,
        *grad_output.stride(),
        SUMS=need_sums,
        INPUT=need_input,
        ALIGNED=aligned,
        INDEX=index_type(grad_output, hidden1, hidden2, grad_input),
        **layers,
        **tiles.head_grad_input(input.dtype),
    )
    if row_sums is None:
        return grad_input, None, None, None, None, None, None
    warps, tile = tiles.head_grad_weights(input.dtype)
    products = cdiv(p, tile["BLOCK_I"]) * cdiv(k, tile["BLOCK_J"])
    products += cdiv(q, tile["BLOCK_I"]) * cdiv(p, tile["BLOCK_J"])
    # Few parts: other kernels keep the device busy too, and memory binds where products run on matrix units.
    parts, rows_per_part = split_reduction(m, tile["BLOCK_D"], max(1, (2 if exact else 3) * products))
    weight_sums = empty((parts, p * k + q * p), input, torch.float32)
    grads = [empty(shape, input) for shape in ((p, k), (q, p), (r, q), (p,), (q,), (r,))]
    job = Job(
        _grad_weights_kernel,
        warps,
        (input, hidden1, grad1, grad2, weight_sums),
        index_type(input, hidden1, hidden2),
        lambda _: (products * parts, (m, k, p, q, rows_per_part), {"ALIGNED": aligned, **tile}),
    )
    noted = Later() if later is None else later
    noted.sums.append((row_sums, grads[2:], 1.0))
    launch_job(job, (weight_sums, grads[:2], 1.0), noted)
    if later is None:
        noted.finish()
    weight1_grad, weight2_grad, weight3_grad, *bias_grads = grads
    found = weight1_grad, bias_grads[0], weight2_grad, bias_grads[1], weight3_grad, bias_grads[2]
    return grad_input, *(grad if needed else None for grad, needed in zip(found, output_mask[1:], strict=True))
