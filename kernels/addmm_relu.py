"""addmm + relu in one kernel, and its gradients, for matrices of any size and strides.

output (M, N) = relu(beta * input + alpha * mat1 (M, K) @ mat2 (K, N)). The three products are tiled matrix products.
Sizes and strides are run-time values, so a new shape compiles nothing.

The backward needs the masked gradient: grad_output where relu was on, and 0 elsewhere. A product loads grad_output and
output together and masks the gradient in registers. For products with many columns `_lay_out_kernel` writes the
masked gradient to memory once instead (`tiles.masks_once`). Matrix units take operands whose rows or columns start at
multiples of 8 bytes; `_lay_out_kernel` copies others. Where the GPU copies tiles on its own, operands at multiples of
16 bytes go by tensor descriptors (`tiles.describes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .runtime import (
    INTERPRETED,
    Box,
    Sum,
    bound,
    box,
    boxed_dot,
    cdiv,
    contiguous,
    describable,
    dot,
    empty,
    in_registers,
    index_type,
    launch,
    layout,
    load,
    load_box,
    pointers,
    relu,
    split_reduction,
    store,
    store_box,
    sum_partials,
)

# Never specialised on: neither a size of 1 nor a multiple of 16 compiles a kernel anew. What a layout promises about
# alignment is told by the constants `LEFT`, `RIGHT` and so on, which have few values.
_GENERAL = [
    *("m", "n", "k", "width", "depth_per_part", "tiles", "parts"),
    *(f"{tensor}_stride_{axis}" for tensor in ("input", "mat1", "mat2", "grad", "result") for axis in "mnk"),
    *(f"{tensor}_ptr" for tensor in ("input", "mat1", "mat2", "output", "grad", "result", "column_sums")),
    *("grad_box", "mat1_box", "output_box"),
]


@triton.jit
def _position(m, n, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of this program's tile of an (m, n) result.

    Programs take GROUP tiles of one column, then GROUP tiles of the next column. Programs that run at the same time so
    share rows and columns of the operands, which come from the L2 cache.
    """
    program = tl.program_id(0)
    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    per_group = (n + BLOCK_N - 1) // BLOCK_N * GROUP
    first = program // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rest = program % per_group
    return ((first + rest % height) * BLOCK_M).to(INDEX), (rest // height * BLOCK_N).to(INDEX)


@triton.jit
def _product(
    left_ptr,
    output_ptr,
    right_ptr,
    first_row,
    first_column,
    first,
    last,
    m,
    n,
    k,
    left_stride_m,
    left_stride_k,
    output_stride_m,
    output_stride_k,
    right_stride_k,
    right_stride_n,
    LEFT: tl.constexpr,
    OUTPUT: tl.constexpr,
    RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return one tile of left (m, k) @ right (k, n), summed over the depths `first` to `last` in float32.

    Tile: BLOCK_M rows from `first_row` on x BLOCK_N columns from `first_column` on, BLOCK_K depths at a time.

    Shapes and strides: left (m, k) and right (k, n), any strides; LEFT, OUTPUT and RIGHT are what `runtime.layout` says
    of them. If MASKED, left is a gradient, output has its shape, and left counts as 0 where output <= 0.

    The masked operand is always the left one, because matrix units can take the left operand from registers. The right
    operand goes from memory to shared memory, and matrix units read it there.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    if LEFT > 0:
        left_stride_k = 1
    if RIGHT < 0:
        right_stride_k = 1
    start_depth = (first + tl.arange(0, BLOCK_K)).to(INDEX)
    left_pointers = pointers(left_ptr, row, start_depth, left_stride_m, left_stride_k, LEFT)
    output_pointers = pointers(output_ptr, row, start_depth, output_stride_m, output_stride_k, OUTPUT)
    right_pointers = pointers(right_ptr, start_depth, column, right_stride_k, right_stride_n, RIGHT)
    left_rows, left_depth = bound(m, -LEFT), bound(k, LEFT)
    output_rows, output_depth = bound(m, -OUTPUT), bound(k, OUTPUT)
    right_depth, right_columns = bound(k, -RIGHT), bound(n, RIGHT)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        left = load(left_pointers, (row < left_rows)[:, None] & (depth < left_depth)[None, :])
        if MASKED:
            mask = (row < output_rows)[:, None] & (depth < output_depth)[None, :]
            left = tl.where(load(output_pointers, mask) <= 0, 0.0, left).to(left.dtype)
            output_pointers += BLOCK_K * tl.cast(output_stride_k, INDEX)
        right = load(right_pointers, (depth < right_depth)[:, None] & (column < right_columns)[None, :])
        product = dot(left, right, product, PRECISION)
        left_pointers += BLOCK_K * tl.cast(left_stride_k, INDEX)
        right_pointers += BLOCK_K * tl.cast(right_stride_k, INDEX)
    return product


@triton.jit
def _boxed_product(
    left,
    output,
    right,
    first_row,
    first_column,
    first,
    last,
    LEFT: tl.constexpr,
    OUTPUT: tl.constexpr,
    RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return what `_product` does, of operands by descriptors.

    The GPU copies tiles to shared memory on its own, rounds them to tf32 on the way, and fills up with zeros. Matrix
    units read them there. Only an operand that is masked, and one of tf32 whose depth is not dense, takes the way
    through registers.
    """
    row, column = first_row.to(tl.int32), first_column.to(tl.int32)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        depth = tl.cast(start, tl.int32)
        left_tile = load_box(left, row, depth, LEFT)
        if MASKED:
            left_tile = tl.where(load_box(output, row, depth, OUTPUT) <= 0, 0.0, left_tile).to(left_tile.dtype)
        elif LEFT < 0 and PRECISION == "tf32":
            # Otherwise shared memory takes it again, depth first.
            left_tile = in_registers(left_tile)
        right_tile = load_box(right, depth, column, RIGHT)
        product = boxed_dot(left_tile, right_tile, product, PRECISION)
    return product


@triton.jit
def _forward_product(
    mat1_ptr,
    mat2_ptr,
    first_row,
    first_column,
    first,
    last,
    m,
    n,
    k,
    mat1_stride_m,
    mat1_stride_k,
    mat2_stride_k,
    mat2_stride_n,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOXED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return one tile of mat1 @ mat2, summed over the depths `first` to `last`: nothing is masked."""
    if BOXED:
        product = _boxed_product(
            mat1_ptr, mat1_ptr, mat2_ptr, first_row, first_column, first, last,
            LEFT, LEFT, RIGHT, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        product = _product(
            mat1_ptr, mat1_ptr, mat2_ptr, first_row, first_column, first, last, m, n, k,
            mat1_stride_m, mat1_stride_k, mat1_stride_m, mat1_stride_k, mat2_stride_k, mat2_stride_n,
            LEFT, LEFT, RIGHT, False, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return product


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    mat1_ptr,
    mat2_ptr,
    input_ptr,
    output_ptr,
    m,
    n,
    k,
    input_stride_m,
    input_stride_n,
    mat1_stride_m,
    mat1_stride_k,
    mat2_stride_k,
    mat2_stride_n,
    beta,
    alpha,
    CHUNK: tl.constexpr,
    INPUT: tl.constexpr,
    ADDEND: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    RESULT: tl.constexpr,
    BOXED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Product, sum and relu: output = relu(beta * input + alpha * mat1 @ mat2).

    Tile: BLOCK_M rows x BLOCK_N columns of the output. A program sums over all of K in float32. The order of the sum
    does not depend on the batch size M. Every CHUNK products (0: never) the program adds its sum to a total and starts
    a new sum, so that `_forward_parts_kernel` and `_finish_kernel` give the same bits.

    Shapes and strides: mat1 (M, K) and mat2 (K, N), any strides, as LEFT and RIGHT tell; input (M, N) after
    broadcasting, strides may be 0; output (M, N) contiguous.

    Saves: nothing. The backward reads relu's mask from the sign of the output.

    Cost per row (one image): 2 * K * N FLOP; reads K elements of mat1 once per tile of columns, writes N elements. All
    rows share mat2.
    """
    first_row, first_column = _position(m, n, INDEX, BLOCK_M, BLOCK_N, GROUP)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    if CHUNK == 0:
        total = _forward_product(
            mat1_ptr, mat2_ptr, first_row, first_column, 0, k, m, n, k,
            mat1_stride_m, mat1_stride_k, mat2_stride_k, mat2_stride_n,
            LEFT, RIGHT, BOXED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, k, CHUNK):
            total += _forward_product(
                mat1_ptr, mat2_ptr, first_row, first_column, first, tl.minimum(first + CHUNK, k), m, n, k,
                mat1_stride_m, mat1_stride_k, mat2_stride_k, mat2_stride_n,
                LEFT, RIGHT, BOXED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    _finish(
        input_ptr, output_ptr, total, row, column, m, n, input_stride_m, input_stride_n, beta, alpha,
        INPUT, ADDEND, RESULT,
    )  # fmt: skip


@triton.jit(do_not_specialize=_GENERAL)
def _forward_parts_kernel(
    mat1_ptr,
    mat2_ptr,
    result_ptr,
    m,
    n,
    k,
    mat1_stride_m,
    mat1_stride_k,
    mat2_stride_k,
    mat2_stride_n,
    CHUNK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    RESULT: tl.constexpr,
    BOXED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The forward's product for few rows, cut along K: each program sums CHUNK products of a tile's sums.

    Maths: ``result[p] = mat1[:, p * CHUNK : (p + 1) * CHUNK] @ mat2[p * CHUNK : (p + 1) * CHUNK]``. `_finish_kernel`
    adds up the chunks.

    Tile: BLOCK_M rows x BLOCK_N columns along the grid's first axis, one chunk along the second. So as many programs
    run for each tile as there are chunks.

    Shapes and strides: mat1 (M, K) and mat2 (K, N), any strides; result float32 (chunks, M, N), contiguous.

    Saves: nothing. Cost per row: 2 * K * N FLOP; reads K elements of mat1 once per tile of columns, writes N float32
    for each chunk.
    """
    first_row, first_column = _position(m, n, INDEX, BLOCK_M, BLOCK_N, GROUP)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(INDEX)
    first = part * CHUNK
    total = _forward_product(
        mat1_ptr, mat2_ptr, first_row, first_column, first, tl.minimum(first + CHUNK, k), m, n, k,
        mat1_stride_m, mat1_stride_k, mat2_stride_k, mat2_stride_n,
        LEFT, RIGHT, BOXED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mask = (row < m)[:, None] & (column < bound(n, RESULT))[None, :]
    tl.store(pointers(result_ptr + part * m * n, row, column, n, 1, RESULT), total, mask=mask)


@triton.jit(do_not_specialize=_GENERAL)
def _finish_kernel(
    input_ptr,
    result_ptr,
    output_ptr,
    m,
    n,
    parts,
    input_stride_m,
    input_stride_n,
    beta,
    alpha,
    INPUT: tl.constexpr,
    ADDEND: tl.constexpr,
    RESULT: tl.constexpr,
    PARTS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the chunks of `_forward_parts_kernel`, then add the input and apply relu.

    Maths: ``output = relu(beta * input + alpha * sum over p of result[p])``, from the first chunk to the last, as
    `_forward_kernel` adds them.

    Tile: BLOCK_M rows x BLOCK_N columns.

    Shapes and strides: result float32 (parts, M, N) and output (M, N), both contiguous; input (M, N) after
    broadcasting, strides may be 0.

    Saves: nothing. Cost per row: reads N float32 for each chunk, writes N elements.
    """
    across = (n + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // across).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < m)[:, None] & (column < bound(n, PARTS))[None, :]
    found = pointers(result_ptr, row, column, n, 1, PARTS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(parts):
        total += tl.load(found, mask=mask, other=0.0)
        found += m.to(INDEX) * n
    _finish(
        input_ptr, output_ptr, total, row, column, m, n, input_stride_m, input_stride_n, beta, alpha,
        INPUT, ADDEND, RESULT,
    )  # fmt: skip


@triton.jit
def _finish(
    input_ptr,
    output_ptr,
    total,
    row,
    column,
    m,
    n,
    input_stride_m,
    input_stride_n,
    beta,
    alpha,
    INPUT: tl.constexpr,
    ADDEND: tl.constexpr,
    RESULT: tl.constexpr,
):
    """Store relu(beta * input + alpha * total).

    INPUT tells how input lies: "row" (one row for all, dense), "full" (any strides) or "none" (no input). The
    multiply-add is written as `tl.fma`, so that all kernels that end here round alike.
    """
    if INPUT == "row":
        inside = column < bound(n, ADDEND)
        addend = tl.load(pointers(input_ptr, tl.arange(0, 1), column, 0, 1, ADDEND), mask=inside[None, :], other=0.0)
        total = tl.fma(total, alpha, tl.broadcast_to(beta * addend.to(tl.float32), total.shape))
    elif INPUT == "full":
        inside = (row < bound(m, -ADDEND))[:, None] & (column < bound(n, ADDEND))[None, :]
        addend = load(pointers(input_ptr, row, column, input_stride_m, input_stride_n, ADDEND), inside)
        total = tl.fma(total, alpha, beta * addend.to(tl.float32))
    else:
        total *= alpha
    mask = (row < m)[:, None] & (column < bound(n, RESULT))[None, :]
    store(pointers(output_ptr, row, column, n, 1, RESULT), relu(total), mask)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_mat1_kernel(
    grad_ptr,
    mat2_ptr,
    output_ptr,
    result_ptr,
    m,
    n,
    k,
    grad_stride_m,
    grad_stride_n,
    mat2_stride_k,
    mat2_stride_n,
    alpha,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    OUTPUT: tl.constexpr,
    RIGHT: tl.constexpr,
    RESULT: tl.constexpr,
    BOXED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of mat1: grad_mat1 = alpha * grad @ mat2^T, with grad = grad_output where output > 0, else 0.

    If not MASKED, `grad_ptr` points to a gradient that is masked already, and output is not read.

    Tile: BLOCK_M rows x BLOCK_N columns of grad_mat1. Each element is a sum over N.

    Shapes and strides: grad_output (M, N), any strides (0 too); output (M, N) contiguous; mat2 (K, N), any strides;
    result (M, K) contiguous.

    Saves: nothing. Cost per row: 2 * N * K FLOP; reads 2 * N elements (N if not MASKED) once per tile of columns,
    writes K elements.
    """
    first_row, first_column = _position(m, k, INDEX, BLOCK_M, BLOCK_N, GROUP)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    if BOXED:
        product = _boxed_product(
            grad_ptr, output_ptr, mat2_ptr, first_row, first_column, 0, n,
            LEFT, OUTPUT, RIGHT, MASKED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        product = _product(
            grad_ptr, output_ptr, mat2_ptr, first_row, first_column, 0, n, m, k, n,
            grad_stride_m, grad_stride_n, n, 1, mat2_stride_n, mat2_stride_k,
            LEFT, OUTPUT, RIGHT, MASKED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    mask = (row < m)[:, None] & (column < bound(k, RESULT))[None, :]
    store(pointers(result_ptr, row, column, k, 1, RESULT), product * alpha, mask)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_mat2_kernel(
    grad_box,
    mat1_box,
    output_box,
    grad_ptr,
    output_ptr,
    result_ptr,
    column_sums_ptr,
    m,
    n,
    k,
    grad_stride_m,
    grad_stride_n,
    mat1_stride_m,
    mat1_stride_k,
    result_stride_n,
    result_stride_k,
    depth_per_part,
    tiles,
    alpha,
    beta,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    OUTPUT: tl.constexpr,
    RIGHT: tl.constexpr,
    RESULT: tl.constexpr,
    BOXED: tl.constexpr,
    BOXED_RESULT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of mat2, and of an input that was broadcast over rows (a bias): one part of each sum over the M rows.

    Maths: grad_mat2^T = alpha * grad^T @ mat1 and grad_bias = beta * (sum of grad's rows), with grad = grad_output
    where output > 0, else 0. If not MASKED, `grad_ptr` points to a gradient that is masked already, and output is not
    read.

    The rows are cut into parts. If there is one part, it is the result. If there are several, the launcher passes 1 for
    alpha and beta, and `sum_partials` adds up the parts in a fixed order and applies the factors.

    Tile: along the grid's first axis the first `tiles` programs own BLOCK_M rows x BLOCK_N columns of grad_mat2^T
    (N, K). The others own 64 columns of grad_bias each. The second axis counts the parts, `depth_per_part` rows each.

    Shapes and strides: grad_output (M, N) and mat1 (M, K), any strides (0 too); output (M, N) contiguous; result
    (parts, N, K), dense, with the two strides given; column_sums (parts, N) contiguous.

    Saves: nothing. Cost per row: 2 * N * K FLOP; each tile reads BLOCK_M elements of grad_output and of output and
    BLOCK_N elements of mat1.
    """
    part = tl.program_id(1).to(INDEX)
    first = part * depth_per_part
    last = tl.minimum(first + depth_per_part, m)
    if tl.program_id(0) < tiles:
        first_row, first_column = _position(n, k, INDEX, BLOCK_M, BLOCK_N, GROUP)
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        if BOXED:
            product = _boxed_product(
                grad_box, output_box, mat1_box, first_row, first_column, first, last,
                LEFT, OUTPUT, RIGHT, MASKED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            product = _product(
                grad_box, output_box, mat1_box, first_row, first_column, first, last, n, k, m,
                grad_stride_n, grad_stride_m, 1, n, mat1_stride_m, mat1_stride_k,
                LEFT, OUTPUT, RIGHT, MASKED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if BOXED_RESULT:
            store_box(result_ptr, first_row, first_column, product * alpha, RESULT)
        else:
            mask = (row < bound(n, -RESULT))[:, None] & (column < bound(k, RESULT))[None, :]
            result = pointers(result_ptr + part * n * k, row, column, result_stride_n, result_stride_k, RESULT)
            store(result, product * alpha, mask)
    else:
        # In tf32 matrix units would sum rounded gradients.
        block = tl.program_id(0) - tiles
        _column_sums(
            column_sums_ptr + part * n, grad_ptr, output_ptr, block.to(INDEX) * 64 + tl.arange(0, 64), first, last, n,
            grad_stride_m, grad_stride_n, beta, MASKED, -LEFT, -OUTPUT,
        )  # fmt: skip


@triton.jit
def _column_sums(
    result_ptr,
    grad_ptr,
    output_ptr,
    column,
    first,
    last,
    n,
    grad_stride_m,
    grad_stride_n,
    beta,
    MASKED: tl.constexpr,
    GRAD: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """Store beta * (the sum of the rows `first` to `last`) of some columns of the masked gradient.

    Each of 32 sums takes every 32nd row; a tree adds up the 32 sums.
    """
    total = tl.zeros((32, column.shape[0]), tl.float32)
    for start in range(first, last, 32):
        row = start + tl.arange(0, 32)
        total += _masked_grad(
            grad_ptr, output_ptr, row, column, last, n, grad_stride_m, grad_stride_n, MASKED, GRAD, OUTPUT
        )
    store(result_ptr + column, tl.sum(total, axis=0) * beta, column < n)


@triton.jit
def _masked_grad(
    grad_ptr,
    output_ptr,
    row,
    column,
    m,
    n,
    grad_stride_m,
    grad_stride_n,
    MASKED: tl.constexpr,
    GRAD: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """Load a tile of grad_output in float32; if MASKED, with 0 where the contiguous output is <= 0.

    Where the output is NaN the gradient stays, as in PyTorch. Rows from m on are not read. Where a load takes several
    rows at a time, m is a multiple of their number.
    """
    mask = (row < bound(m, -GRAD))[:, None] & (column < bound(n, GRAD))[None, :]
    grad = load(pointers(grad_ptr, row, column, grad_stride_m, grad_stride_n, GRAD), mask).to(tl.float32)
    if MASKED:
        mask = (row < m)[:, None] & (column < bound(n, OUTPUT))[None, :]
        grad = tl.where(load(pointers(output_ptr, row, column, n, 1, OUTPUT), mask) <= 0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=_GENERAL)
def _lay_out_kernel(
    grad_ptr,
    output_ptr,
    result_ptr,
    m,
    n,
    width,
    grad_stride_m,
    grad_stride_n,
    factor,
    MASKED: tl.constexpr,
    GRAD: tl.constexpr,
    OUTPUT: tl.constexpr,
    RESULT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy a matrix to dense rows, and mask it where relu was off if MASKED.

    Maths: result = factor * grad, if MASKED with 0 where output <= 0. With factor beta a masked grad_output is the
    gradient of an input of the output's size. With factor 1 it is the gradient that both products take if
    `tiles.masks_once` says so.

    Tile: BLOCK_M rows x BLOCK_N columns.

    Shapes and strides: grad (M, N), any strides (0 too); output (M, N) contiguous, not read if not MASKED; result
    (M, width) contiguous, 0 from column N on.

    Saves: nothing. Cost per row: reads 2 * N elements (N if not MASKED), writes width.
    """
    across = (width + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // across).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = _masked_grad(grad_ptr, output_ptr, row, column, m, n, grad_stride_m, grad_stride_n, MASKED, GRAD, OUTPUT)
    mask = (row < m)[:, None] & (column < bound(width, RESULT))[None, :]
    store(pointers(result_ptr, row, column, width, 1, RESULT), grad * factor, mask)


_CHUNK = 2048
"""Products that the forward sums before it starts a new sum: the same for every batch size, so that bits are too."""

_FEW_PROGRAMS = 64
"""Tiles of the forward up to which chunks are summed by programs of their own: half of an H100's multiprocessors."""

_RESULT = 5
"""Position of the result among the arguments of `_grad_mat2_kernel`."""

_SUM_COLUMNS = 64
"""Columns of which a program sums the gradient, 32 rows at a time."""


def addmm_relu(
    input: Tensor | None,
    mat1: Tensor,
    mat2: Tensor,
    beta: float,
    alpha: float,
    *,
    launcher: Callable[..., Any] | None = None,
) -> Tensor:
    """Launch the forward.

    Args:
        input: broadcastable to (M, N), or None; not read where beta is 0.
        mat1: (M, K), any strides.
        mat2: (K, N), any strides.
        beta: factor of `input`.
        alpha: factor of the product.
        launcher: `launch_forward`, or one that follows its plans.

    Returns:
        relu(beta * input + alpha * (mat1 @ mat2)), (M, N) contiguous.
    """
    run = launch_forward if launcher is None else launcher
    return run(mat1, mat2, None if beta == 0 else input, (float(beta), float(alpha)))[0]


def launch_forward(mat1: Tensor, mat2: Tensor, input: Tensor | None, factors: tuple[float, float]) -> tuple[Tensor]:
    """Launch the forward; all that a plan must tell apart, and nothing else, is an argument."""
    (m, k), n = mat1.shape, mat2.shape[1]
    beta, alpha = factors
    output = empty((m, n), mat1)
    # The view is only asked for its strides: a plan knows the tensor that it is given.
    addend = mat1 if input is None else input.expand(m, n)
    row = addend.stride(0) == 0 or m == 1
    tile = tiles.product(mat1.dtype, None, n, k)
    exact = tiles.is_exact(mat1.dtype, tile["PRECISION"])
    mat1, mat2 = _packed(mat1, exact), _packed(mat2, exact)
    chunk = tile["CHUNK"] = _CHUNK if k > _CHUNK else 0
    programs = cdiv(m, tile["BLOCK_M"]) * cdiv(n, tile["BLOCK_N"])
    index = index_type(addend, mat1, mat2, output)
    boxes = _boxes(mat1, mat2, None, tile)
    operands = {"LEFT": layout(mat1), "RIGHT": layout(mat2), "BOXED": bool(boxes), "INDEX": index}
    given = mat1 if input is None else input
    how = "none" if input is None else "row" if row and addend.stride(1) == 1 else "full"
    ending = {"INPUT": how, "ADDEND": 0 if input is None else layout(addend), "RESULT": layout(output)}
    strides = *mat1.stride(), *mat2.stride()
    if chunk and programs <= _FEW_PROGRAMS:
        parts = empty((cdiv(k, chunk), m, n), mat1, torch.float32)
        width = layout(parts[0])
        grid = programs, parts.shape[0]
        launch(
            _forward_parts_kernel,
            grid,
            mat1,
            mat2,
            parts,
            m,
            n,
            k,
            *strides,
            boxes=boxes,
            RESULT=width,
            **operands,
            **tile,
        )
        elements = {"BLOCK_M": 256, "BLOCK_N": 128} if INTERPRETED else {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 2}
        launch(
            _finish_kernel,
            (cdiv(m, elements["BLOCK_M"]) * cdiv(n, elements["BLOCK_N"]),),
            given,
            parts,
            output,
            m,
            n,
            parts.shape[0],
            *addend.stride(),
            beta,
            alpha,
            PARTS=width,
            INDEX=index_type(addend, parts, output),
            **ending,
            **elements,
        )
    else:
        sizes = m, n, k, *addend.stride(), *strides
        launch(
            _forward_kernel,
            (programs,),
            mat1,
            mat2,
            given,
            output,
            *sizes,
            beta,
            alpha,
            boxes=boxes,
            **ending,
            **operands,
            **tile,
        )
    return (output,)


def addmm_relu_backward(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Sequence[int],
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
    later: list[Sum] | None = None,
    *,
    launcher: Callable[..., Any] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch those kernels of the backward that `output_mask` asks for.

    Args:
        grad_output: (M, N), any strides.
        output: the forward's result.
        mat1: the forward's.
        mat2: the forward's.
        input_size: size of the forward's input before broadcasting.
        beta: the forward's.
        alpha: the forward's.
        output_mask: whether to compute grad_input, grad_mat1 and grad_mat2.
        later: as in `sum_partials`; what is noted there makes grad_mat2 and a bias' gradient whole.
        launcher: `launch_backward`, or one that follows its plans.

    Returns:
        The three gradients, grad_mat2 in mat2's order of dimensions; None where not asked for.
    """
    need_input, need_mat1, need_mat2 = output_mask
    n, size = mat2.shape[1], tuple(input_size)
    is_bias = need_input and size in ((n,), (1, n))
    # A sum over a broadcast dimension is left to PyTorch, in float32.
    addend = "none" if not need_input else "row" if is_bias else "full" if size == tuple(output.shape) else "broadcast"
    factors, wanted = (float(beta), float(alpha)), (addend, bool(need_mat1), bool(need_mat2))
    run = launch_backward if launcher is None else launcher
    grad_input, grad_mat1, grad_mat2 = run(mat1, mat2, grad_output, output, factors, wanted, later)
    if grad_mat2 is not None and _columns_first(mat2):
        grad_mat2 = grad_mat2.t()
    if grad_input is not None and addend == "row":
        grad_input = grad_input.view(size)
    elif grad_input is not None and addend == "broadcast":
        grad_input = grad_input.sum_to_size(size).to(output.dtype)
    return grad_input, grad_mat1, grad_mat2


def _columns_first(mat2: Tensor) -> bool:
    """Whether a column's elements are neighbours, as of nn.Linear's weight: so are its gradient's then."""
    return mat2.stride(0) == 1 and mat2.stride(1) != 1


def launch_backward(
    mat1: Tensor,
    mat2: Tensor,
    grad_output: Tensor,
    output: Tensor,
    factors: tuple[float, float],
    wanted: tuple[str, bool, bool],
    later: list[Sum] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the kernels; grad_mat2 comes as (N, K) where `_columns_first` says so."""
    beta, alpha = factors
    addend, need_mat1, need_mat2 = wanted
    (m, k), n = mat1.shape, mat2.shape[1]
    grad, output = grad_output, contiguous(output)
    grad_input = grad_mat1 = grad_mat2 = None
    masked = True
    exact = tiles.exact_product(mat1.dtype)
    if addend in ("full", "broadcast"):
        grad_input = _lay_out(grad, output, n, beta, None if addend == "full" else torch.float32)
    if not need_mat1 and not need_mat2:
        pass  # column sums alone load any layout
    elif addend == "full" and beta == 1 and (exact or not tiles.narrow(grad_input)):
        grad, masked = grad_input, False
    elif tiles.masks_once(k * (need_mat1 + need_mat2)) or (not exact and (tiles.narrow(grad) or tiles.narrow(output))):
        grad, masked = _lay_out(grad, output, n if exact else _padded(n, output)), False
    if need_mat1:
        grad_mat1 = empty((m, k), mat1)
        _grad_mat1(grad, output, mat1, mat2, grad_mat1, masked, alpha)
    if need_mat2:
        grad_mat2 = empty((n, k) if _columns_first(mat2) else (k, n), mat1)
    if addend == "row":
        grad_input = empty((n,), mat1)
    if need_mat2 or addend == "row":
        grad_bias = grad_input if addend == "row" else None
        _grad_mat2(grad, output, mat1, grad_mat2, grad_bias, _columns_first(mat2), masked, beta, alpha, later)
    return grad_input, grad_mat1, grad_mat2


def _boxes(left: Tensor, right: Tensor, output: Tensor | None, tile: dict[str, Any]) -> dict[int, Box]:
    """Describe a product's operands, the first tensors of its launch; empty where the kernel takes pointers.

    Args:
        left: (rows, depth).
        right: (depth, columns).
        output: of left's shape, to mask it; or None. Its sign matters, so it is not rounded.
        tile: of the product.
    """
    rounded, rows, depth = tile["PRECISION"] == "tf32", tile["BLOCK_M"], tile["BLOCK_K"]
    if not tiles.describes(left, right) or (output is not None and not describable(output)):
        return {}
    found = {0: box(left, rows, depth, rounded), 1: box(right, depth, tile["BLOCK_N"], rounded)}
    return found if output is None else found | {2: box(output, rows, depth, False)}


def _lay_out(
    matrix: Tensor, output: Tensor | None, width: int, factor: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Copy a matrix to dense rows of `width` elements, masked by `output` if there is one."""
    m, n = matrix.shape
    result = empty((m, width), matrix, dtype)
    tile = {"BLOCK_M": 256, "BLOCK_N": 128} if INTERPRETED else {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}
    launch(
        _lay_out_kernel,
        (cdiv(m, tile["BLOCK_M"]) * cdiv(width, tile["BLOCK_N"]),),
        matrix,
        matrix if output is None else output,
        result,
        m,
        n,
        width,
        *matrix.stride(),
        factor,
        MASKED=output is not None,
        GRAD=layout(matrix),
        OUTPUT=0 if output is None else layout(output),
        RESULT=layout(result),
        INDEX=index_type(matrix, output, result),
        **tile,
    )
    return result


def _padded(columns: int, like: Tensor) -> int:
    """Elements of a row that starts at multiples of 16 bytes, as do all rows after it."""
    wide = 16 // like.element_size()
    return cdiv(columns, wide) * wide


def _packed(matrix: Tensor, exact: bool) -> Tensor:
    """Return an operand as matrix units need it: itself, or a copy with padded rows (columns, if those are dense).

    Loads of single elements cost more instructions than the product, and spill. A copy costs one pass over the operand.
    """
    if exact or not tiles.narrow(matrix):
        return matrix
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:
        return _packed(matrix.t(), exact).t()
    return _lay_out(matrix, None, _padded(matrix.shape[1], matrix))


def _grad_mat1(
    grad: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, grad_mat1: Tensor, masked: bool, alpha: float
) -> None:
    (m, k), n = mat1.shape, mat2.shape[1]
    tile = tiles.product(mat1.dtype, m, k, n)
    mat2 = _packed(mat2, tiles.is_exact(mat1.dtype, tile["PRECISION"]))
    boxes = _boxes(grad, mat2.t(), output if masked else None, tile)
    launch(
        _grad_mat1_kernel,
        (cdiv(m, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"]),),
        grad,
        mat2,
        output,
        grad_mat1,
        m,
        n,
        k,
        *grad.stride(),
        *mat2.stride(),
        alpha,
        boxes=boxes,
        BOXED=bool(boxes),
        MASKED=masked,
        LEFT=layout(grad),
        OUTPUT=layout(output),
        RIGHT=-layout(mat2),
        RESULT=layout(grad_mat1),
        INDEX=index_type(grad, output, mat2, grad_mat1),
        **tile,
    )


def _grad_mat2(
    grad: Tensor,
    output: Tensor,
    mat1: Tensor,
    grad_mat2: Tensor | None,
    grad_bias: Tensor | None,
    transposed: bool,
    masked: bool,
    beta: float,
    alpha: float,
    later: list[Sum] | None,
) -> None:
    (m, k), n = mat1.shape, output.shape[1]
    tile = tiles.product(mat1.dtype, n, k, m, masks=masked)
    programs = 0 if grad_mat2 is None else cdiv(n, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"])
    sum_tiles = 0 if grad_bias is None else cdiv(n, _SUM_COLUMNS)
    parts, depth_per_part = split_reduction(m, tile["BLOCK_K"], max(1, 4 * (programs or sum_tiles)))
    sums = output if grad_mat2 is None else grad_mat2
    column_sums = output if grad_bias is None else grad_bias
    factors = alpha, beta
    if parts > 1:
        factors = 1.0, 1.0
        if grad_mat2 is not None:
            sums = empty((parts, *grad_mat2.shape), mat1, torch.float32)
        if grad_bias is not None:
            column_sums = empty((parts, n), mat1, torch.float32)
    width = layout(sums[0] if sums.dim() == 3 else sums)
    mat1 = _packed(mat1, tiles.is_exact(mat1.dtype, tile["PRECISION"]))
    boxes = _boxes(grad.t(), mat1, output.t() if masked else None, tile)
    boxed = bool(boxes)
    boxed_result = boxed and parts == 1 and grad_mat2 is not None and describable(grad_mat2)
    if boxed_result:
        result = sums if transposed else sums.t()
        boxes[_RESULT] = box(result, tile["BLOCK_M"], tile["BLOCK_N"], False)
    launch(
        _grad_mat2_kernel,
        (programs + sum_tiles, parts),
        grad,
        mat1,
        output,
        grad,
        output,
        sums,
        column_sums,
        m,
        n,
        k,
        *grad.stride(),
        *mat1.stride(),
        *((k, 1) if transposed else (1, n)),
        depth_per_part,
        programs,
        *factors,
        boxes=boxes,
        BOXED=boxed,
        BOXED_RESULT=boxed_result,
        MASKED=masked,
        LEFT=-layout(grad),
        OUTPUT=-layout(output),
        RIGHT=layout(mat1),
        RESULT=width if transposed else -width,
        INDEX=index_type(grad, output, mat1, sums),
        **tile,
    )
    if parts > 1:
        found = (sums, grad_mat2, alpha), (column_sums, grad_bias, beta)
        sum_partials(*((s, (grad,), factor) for s, grad, factor in found if grad is not None), later=later)
