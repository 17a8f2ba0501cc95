"""addmm + relu in one kernel, and its gradients, for matrices of any size and strides.

Each kernel is a tiled matrix product. Sizes and strides are run-time values: a new shape compiles nothing. Letters:
output (M, N) = relu(beta * input + alpha * mat1 (M, K) @ mat2 (K, N)). Where the backward needs ``grad``, it loads
grad_output and the output together and closes it where relu was off, so that the masked gradient never reaches memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import (
    INTERPRETED,
    all_registers,
    cdiv,
    dot,
    dot_precision,
    empty,
    index_type,
    interpreted_tile,
    launch,
    load,
    next_power_of_2,
    relu,
    splits,
    store,
    sum_parts,
)

# Never specialised on: neither a size of 1 nor a multiple of 16 compiles a kernel anew.
_GENERAL = [
    *("m", "n", "k", "rows_per_part", "parts_n"),
    *(f"{tensor}_stride_{axis}" for tensor in ("input", "mat1", "mat2", "output", "grad", "result") for axis in "mnk"),
    *(f"{tensor}_ptr" for tensor in ("input", "mat1", "mat2", "output", "grad", "result", "mat2_parts", "input_parts")),
]


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    input_ptr,
    mat1_ptr,
    mat2_ptr,
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
    HAS_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Product, sum and relu: output = relu(beta * input + alpha * mat1 @ mat2).

    Tile: BLOCK_M rows x BLOCK_N columns of the output; the sum over K runs within the program, in one order whatever
    the batch size M, and accumulates in float32.

    Shapes and strides: mat1 (M, K) and mat2 (K, N), any strides; input (M, N) after broadcasting, strides may be 0;
    output (M, N) contiguous.

    Saves: nothing beyond the output, whose sign is relu's mask.

    Cost per row ("image"): 2 * K * N FLOP; reads K elements of mat1, writes N; mat2 is shared.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < m
    column_mask = column < n
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K).to(INDEX)
        depth_mask = depth < k
        offset = (row * mat1_stride_m)[:, None] + (depth * mat1_stride_k)[None, :]
        left = load(mat1_ptr + offset, row_mask[:, None] & depth_mask[None, :])
        offset = (depth * mat2_stride_k)[:, None] + (column * mat2_stride_n)[None, :]
        right = load(mat2_ptr + offset, depth_mask[:, None] & column_mask[None, :])
        product = dot(left, right, product, PRECISION)
    mask = row_mask[:, None] & column_mask[None, :]
    product *= alpha
    if HAS_INPUT:
        offset = (row * input_stride_m)[:, None] + (column * input_stride_n)[None, :]
        product += beta * load(input_ptr + offset, mask).to(tl.float32)
    store(output_ptr + (row * n)[:, None] + column[None, :], relu(product), mask)


@triton.jit
def _masked_grad(grad_ptr, output_ptr, row, column, n, grad_stride_m, grad_stride_n, mask):
    """Load grad_output (any strides) where relu was on in the contiguous output; NaN counts as on, as in PyTorch."""
    output = load(output_ptr + row * n + column, mask)
    grad = load(grad_ptr + row * grad_stride_m + column * grad_stride_n, mask)
    return tl.where(output <= 0, 0.0, grad).to(grad.dtype)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_mat1_kernel(
    grad_ptr,
    output_ptr,
    mat2_ptr,
    result_ptr,
    m,
    n,
    k,
    grad_stride_m,
    grad_stride_n,
    mat2_stride_k,
    mat2_stride_n,
    alpha,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of mat1: grad_mat1 = alpha * grad @ mat2^T, with grad = grad_output where output > 0, else 0.

    Tile: BLOCK_M rows x BLOCK_N columns of grad_mat1 (M, K), contiguous; depth N.

    Shapes and strides: grad_output (M, N), any strides (0 too); output (M, N) contiguous; mat2 (K, N), any strides.

    Cost per row: 2 * N * K FLOP; reads 2 * N elements, writes K.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < m
    column_mask = column < k
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K).to(INDEX)
        depth_mask = depth < n
        mask = row_mask[:, None] & depth_mask[None, :]
        grad = _masked_grad(grad_ptr, output_ptr, row[:, None], depth[None, :], n, grad_stride_m, grad_stride_n, mask)
        offset = (column * mat2_stride_k)[None, :] + (depth * mat2_stride_n)[:, None]
        right = load(mat2_ptr + offset, depth_mask[:, None] & column_mask[None, :])
        product = dot(grad, right, product, PRECISION)
    mask = row_mask[:, None] & column_mask[None, :]
    store(result_ptr + (row * k)[:, None] + column[None, :], product * alpha, mask)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_mat2_kernel(
    grad_ptr,
    output_ptr,
    mat1_ptr,
    mat2_parts_ptr,
    input_parts_ptr,
    m,
    n,
    k,
    grad_stride_m,
    grad_stride_n,
    mat1_stride_m,
    mat1_stride_k,
    result_stride_k,
    result_stride_n,
    rows_per_part,
    NEED_MAT2: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One part of mat1^T @ grad and of grad's column sums, which `sum_parts` completes in a fixed order.

    grad = grad_output where output > 0, else 0. The first product is grad_mat2 up to alpha, the column sums are the
    gradient of an input that was broadcast over rows (a bias) up to beta.

    Tile: BLOCK_M rows x BLOCK_N columns of grad_mat2 (K, N); the sum runs over the `rows_per_part` rows of one part.

    Shapes and strides: grad_output (M, N) and mat1 (M, K), any strides (0 too); output (M, N) contiguous; mat2_parts
    float32 (parts, K, N) with mat2's own order of dimensions, dense; input_parts float32 (parts, N).

    Cost per row: 2 * N * K FLOP; reads 2 * N + K elements per tile.
    """
    column_tiles = (n + BLOCK_N - 1) // BLOCK_N
    inner = (tl.program_id(0) // column_tiles).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % column_tiles).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(INDEX)
    inner_mask = inner < k
    column_mask = column < n
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column_sum = tl.zeros((BLOCK_N,), tl.float32)
    first = part * rows_per_part
    for start in range(0, rows_per_part, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        row_mask = row < m
        mask = row_mask[:, None] & column_mask[None, :]
        grad = _masked_grad(grad_ptr, output_ptr, row[:, None], column[None, :], n, grad_stride_m, grad_stride_n, mask)
        if NEED_INPUT:
            column_sum += tl.sum(grad.to(tl.float32), axis=0)
        if NEED_MAT2:
            offset = (inner * mat1_stride_k)[:, None] + (row * mat1_stride_m)[None, :]
            left = load(mat1_ptr + offset, inner_mask[:, None] & row_mask[None, :])
            product = dot(left, grad, product, PRECISION)
    if NEED_MAT2:
        offset = part * k * n + (inner * result_stride_k)[:, None] + (column * result_stride_n)[None, :]
        tl.store(mat2_parts_ptr + offset, product, mask=inner_mask[:, None] & column_mask[None, :])
    if NEED_INPUT:
        # Every tile of the inner dimension has the same sum; the first writes it.
        first_tile = tl.program_id(0) < column_tiles
        tl.store(input_parts_ptr + part * n + column, column_sum, mask=column_mask & first_tile)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_input_kernel(
    grad_ptr,
    output_ptr,
    result_ptr,
    m,
    n,
    grad_stride_m,
    grad_stride_n,
    beta,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a full-size input: grad_input = beta * grad_output where output > 0, else 0.

    Tile: BLOCK elements of M * N. Shapes and strides: grad_output any strides (0 too); output and result contiguous.
    Cost per row: reads 2 * N elements, writes N.
    """
    element = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    row = element // n
    mask = row < m
    grad = _masked_grad(grad_ptr, output_ptr, row, element % n, n, grad_stride_m, grad_stride_n, mask)
    store(result_ptr + element, grad.to(tl.float32) * beta, mask)


def _tile(dtype: torch.dtype, rows: int, columns: int, depth: int) -> dict[str, Any]:
    """Choose the tile and precision of a product of `rows` x `columns` with inner dimension `depth`.

    On a GPU it never depends on the rows, of which the batch may be one dimension.
    """
    precision = dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
    if INTERPRETED:
        return {"PRECISION": precision, **interpreted_tile(rows, columns, depth)}
    # Exact float32 runs on the FMA units with both operands in registers: a wider tile spills.
    widest = 32 if dtype == torch.float32 and precision == "ieee" else 64
    block_n = min(widest, max(16, next_power_of_2(columns)))
    blocks = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 16}
    return {"PRECISION": precision, **blocks, "num_warps": 4, "num_stages": 2, **all_registers()}


def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """Launch the forward.

    Args:
        input: broadcastable to (M, N), or None; not read where beta is 0.
        mat1: (M, K), any strides.
        mat2: (K, N), any strides.
        beta: factor of `input`.
        alpha: factor of the product.

    Returns:
        relu(beta * input + alpha * (mat1 @ mat2)), (M, N) contiguous.
    """
    (m, k), n = mat1.shape, mat2.shape[1]
    output = empty((m, n), mat1)
    addend = mat1 if input is None or beta == 0 else input.expand(m, n)
    tile = _tile(mat1.dtype, m, n, k)
    launch(
        _forward_kernel,
        (cdiv(m, tile["BLOCK_M"]), cdiv(n, tile["BLOCK_N"])),
        addend,
        mat1,
        mat2,
        output,
        m,
        n,
        k,
        *addend.stride(),
        *mat1.stride(),
        *mat2.stride(),
        float(beta),
        float(alpha),
        HAS_INPUT=input is not None and beta != 0,
        INDEX=index_type(addend, mat1, mat2, output),
        **tile,
    )
    return output


def addmm_relu_backward(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Sequence[int],
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
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

    Returns:
        The three gradients, grad_mat2 in mat2's order of dimensions; None where not asked for.
    """
    need_input, need_mat1, need_mat2 = output_mask
    output = output.contiguous()
    grad_mat1 = _grad_mat1(grad_output, output, mat1, mat2, alpha) if need_mat1 else None
    is_bias = tuple(input_size) in ((mat2.shape[1],), (1, mat2.shape[1]))
    grad_bias, grad_mat2 = _grad_mat2(grad_output, output, mat1, mat2, beta, alpha, need_input and is_bias, need_mat2)
    if not need_input:
        return None, grad_mat1, grad_mat2
    if grad_bias is not None:
        return grad_bias.view(tuple(input_size)), grad_mat1, grad_mat2
    return _grad_input(grad_output, output, input_size, beta), grad_mat1, grad_mat2


def _grad_mat1(grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, alpha: float) -> Tensor:
    (m, k), n = mat1.shape, mat2.shape[1]
    grad_mat1 = empty((m, k), mat1)
    tile = _tile(mat1.dtype, m, k, n)
    launch(
        _grad_mat1_kernel,
        (cdiv(m, tile["BLOCK_M"]), cdiv(k, tile["BLOCK_N"])),
        grad_output,
        output,
        mat2,
        grad_mat1,
        m,
        n,
        k,
        *grad_output.stride(),
        *mat2.stride(),
        float(alpha),
        INDEX=index_type(grad_output, output, mat2, grad_mat1),
        **tile,
    )
    return grad_mat1


def _grad_mat2(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    beta: float,
    alpha: float,
    need_bias: bool,
    need_mat2: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_bias or need_mat2):
        return None, None
    (m, k), n = mat1.shape, mat2.shape[1]
    tile = _tile(mat1.dtype, k, n, m)
    column_tiles = cdiv(n, tile["BLOCK_N"])
    # A tile of no depth still sums the bias's gradient.
    tiles = (max(1, cdiv(k, tile["BLOCK_M"])) if need_mat2 else 1) * column_tiles
    parts, rows_per_part = splits(m, tile["BLOCK_K"], max(1, tiles))
    transposed = mat2.stride(0) == 1 and mat2.stride(1) != 1
    mat2_parts = empty((parts, n, k) if transposed else (parts, k, n), mat1, torch.float32) if need_mat2 else None
    bias_parts = empty((parts, n), mat1, torch.float32) if need_bias else None
    strides: Any = (1, k) if transposed else (n, 1)
    launch(
        _grad_mat2_kernel,
        (tiles, parts),
        grad_output,
        output,
        mat1,
        output if mat2_parts is None else mat2_parts,
        output if bias_parts is None else bias_parts,
        m,
        n,
        k,
        *grad_output.stride(),
        *mat1.stride(),
        *strides,
        rows_per_part,
        NEED_MAT2=need_mat2,
        NEED_INPUT=need_bias,
        INDEX=index_type(grad_output, output, mat1, mat2_parts),
        **tile,
    )
    grad_bias = grad_mat2 = None
    if bias_parts is not None:
        grad_bias = sum_parts(bias_parts, empty((n,), mat1), float(beta))
    if mat2_parts is not None:
        grad_mat2 = sum_parts(mat2_parts, empty(mat2_parts.shape[1:], mat1), float(alpha))
        grad_mat2 = grad_mat2.t() if transposed else grad_mat2
    return grad_bias, grad_mat2


def _grad_input(grad_output: Tensor, output: Tensor, input_size: Sequence[int], beta: float) -> Tensor:
    m, n = output.shape
    full = tuple(input_size) == (m, n)
    # A sum over a broadcast dimension is left to PyTorch, in float32.
    grad_input = empty((m, n), output, None if full else torch.float32)
    block = 4096 if INTERPRETED else 1024
    launch(
        _grad_input_kernel,
        (cdiv(m * n, block),),
        grad_output,
        output,
        grad_input,
        m,
        n,
        *grad_output.stride(),
        float(beta),
        INDEX=index_type(grad_output, output),
        BLOCK=block,
    )
    return grad_input if full else grad_input.sum_to_size(tuple(input_size)).to(output.dtype)
