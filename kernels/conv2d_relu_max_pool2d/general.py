"""conv2d + relu + max-pool in one kernel, and its gradients, for every geometry that PyTorch allows.

The kernels share one plan. A convolution is a matrix product whose inner dimension is flattened, and a pooling window
is a loop over its cells, all held by one program, so that nothing at the convolution's resolution reaches memory. All
sizes and strides are run-time values: a new shape compiles nothing.

Letters: N images, C input channels and O output channels of each of G groups, H x W input, KH x KW kernel, OH x OW
convolution, PH x PW pooled output, T cells of a pooling window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry, memory_format
from ..runtime import (
    INTERPRETED,
    all_registers,
    dot_precision,
    empty,
    index_type,
    interpreted_tile,
    launch,
    load,
    relu,
    splits,
    store,
    sum_parts,
)

# What the three kernels take after their pointers, in this order. Never specialised on: neither a size of 1 nor a
# multiple of 16 compiles a kernel anew.
_GEOMETRY = [
    *("in_channels", "out_channels", "input_h", "input_w", "kernel_h", "kernel_w"),
    *("conv_h", "conv_w", "pooled_h", "pooled_w", "rows"),
    *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("pool_h", "pool_w", "pool_stride_h", "pool_stride_w"),
    *("pool_padding_h", "pool_padding_w", "pool_dilation_h", "pool_dilation_w"),
]
_STRIDES = [f"{tensor}_stride_{axis}" for tensor in ("input", "output", "grad", "code") for axis in "nchw"]
_POINTERS = [f"{tensor}_ptr" for tensor in ("input", "weight", "bias", "output", "code", "grad", "weight_parts")]
_GENERAL = [*_POINTERS, *_GEOMETRY, *_STRIDES, "rows_per_part", "bias_parts_ptr"]


@triton.jit
def _within(position, size):
    """Whether 0 <= position < size: as unsigned numbers, one comparison tells."""
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    code_ptr,
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
    RETURN_CODE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pooled output and argmax codes.

    Maths: ``output[n, o, p] = max over cells t of relu(bias[o] + sum_k patch[n, p, t, k] * weight[o, k])``, where k
    runs over (channel, kernel row, kernel column); code is the first t, in scan order, that attains the maximum (the
    last NaN, as in PyTorch), or 255 where the output is <= 0.

    Tile: BLOCK_M pooled cells (rows of N * PH * PW) x BLOCK_N output channels of one group. Per window cell a
    (BLOCK_M, BLOCK_N) product over depth C * KH * KW accumulates in float32, and joins a running maximum.

    Shapes and strides: input (N, G * C, H, W), any strides; weight (G * O, C * KH * KW) contiguous; bias (G * O)
    contiguous; output and code (N, G * O, PH, PW), any strides, the same for both.

    Saves: one byte of code per pooled cell, nothing else.

    Cost per image: 2 * T * PH * PW * G * O * C * KH * KW FLOP; reads G * C * H * W input elements once from memory
    (overlapping patches come from cache), writes G * O * PH * PW outputs and as many bytes of code.
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
    depth = in_channels * kernel_h * kernel_w
    out_channel = (group * out_channels + channel).to(INDEX)
    input_rows = input_ptr + (group * in_channels).to(INDEX) * input_stride_c + image * input_stride_n
    weight_columns = weight_ptr + out_channel * depth
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_channel, mask=channel_mask, other=0.0).to(tl.float32)

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for cell in range(pool_h * pool_w):
        conv_row = top + (cell // pool_w) * pool_dilation_h
        conv_column = left + (cell % pool_w) * pool_dilation_w
        inside = _within(conv_row, conv_h) & _within(conv_column, conv_w) & row_mask
        first_h = conv_row * stride_h - padding_h
        first_w = conv_column * stride_w - padding_w
        conv = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_mask = k < depth
            in_channel = (k // (kernel_h * kernel_w)).to(INDEX)
            h = first_h[:, None] + ((k // kernel_w % kernel_h) * dilation_h)[None, :]
            w = first_w[:, None] + ((k % kernel_w) * dilation_w)[None, :]
            mask = inside[:, None] & k_mask[None, :] & _within(h, input_h) & _within(w, input_w)
            offset = (in_channel * input_stride_c)[None, :]
            offset += h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
            patch = load(input_rows[:, None] + offset, mask)
            weight = load(weight_columns[None, :] + k[:, None], k_mask[:, None] & channel_mask[None, :])
            conv = tl.dot(patch, weight, conv, input_precision=PRECISION)
        if HAS_BIAS:
            conv += bias[None, :]
        value = relu(conv)
        wins = ((value > best) | (value != value)) & inside[:, None]
        best = tl.where(wins, value, best)
        code = tl.where(wins, cell, code)

    output_row = image * output_stride_n
    output_row += pooled_row.to(INDEX) * output_stride_h + pooled_column.to(INDEX) * output_stride_w
    offset = output_row[:, None] + (out_channel * output_stride_c)[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    store(output_ptr + offset, best, mask)
    if RETURN_CODE:
        tl.store(code_ptr + offset, tl.where(best <= 0, 255, code).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=_GENERAL)
def _grad_input_kernel(
    grad_ptr,
    code_ptr,
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
    code_stride_n,
    code_stride_c,
    code_stride_h,
    code_stride_w,
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
    """Gradient of the input, gathered: each program sums all that reaches its own tile, so no atomics are needed.

    Maths: ``grad_input[n, c, h, w] = sum_k grad_conv[n, o, oh, ow] * weight[o, c, kh, kw]`` over k = (o, kh, kw), where
    (oh, ow) is the convolution cell whose tap (kh, kw) lies on (h, w), and ``grad_conv[n, o, oh, ow]`` is the sum of
    grad_output over the windows that cover the cell and whose code names it.

    Tile: BLOCK_M input positions (rows of N * H * W) x BLOCK_N input channels of one group; depth O * KH * KW.

    Shapes and strides: grad (N, G * O, PH, PW) and code, any strides (0 too); weight (G * O, C, KH, KW) contiguous;
    output (N, G * C, H, W), any strides.

    Cost per image: 2 * H * W * C * G * O * KH * KW FLOP at stride 1; reads PH * PW * G * O gradients and codes, writes
    G * C * H * W elements.
    """
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    row_mask = row < rows
    channel_mask = channel < in_channels
    image = row // (input_h * input_w)
    h = (row // input_w % input_h).to(tl.int32)
    w = (row % input_w).to(tl.int32)
    taps = kernel_h * kernel_w
    depth = out_channels * taps
    # How many windows can cover one cell of the convolution, along each dimension.
    cover_h = ((pool_h - 1) * pool_dilation_h + pool_stride_h) // pool_stride_h
    cover_w = ((pool_w - 1) * pool_dilation_w + pool_stride_w) // pool_stride_w

    grad_input = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < depth
        out_channel = (group * out_channels + k // taps).to(INDEX)
        reach_h = (h + padding_h)[:, None] - ((k // kernel_w % kernel_h) * dilation_h)[None, :]
        reach_w = (w + padding_w)[:, None] - ((k % kernel_w) * dilation_w)[None, :]
        conv_row = reach_h // stride_h
        conv_column = reach_w // stride_w
        on_conv = row_mask[:, None] & k_mask[None, :] & (reach_h >= 0) & (reach_w >= 0)
        on_conv &= (reach_h % stride_h == 0) & (reach_w % stride_w == 0) & (conv_row < conv_h) & (conv_column < conv_w)
        grad_base = (image * grad_stride_n)[:, None] + (out_channel * grad_stride_c)[None, :]
        code_base = (image * code_stride_n)[:, None] + (out_channel * code_stride_c)[None, :]
        grad_conv = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for cover in range(cover_h * cover_w):
            pooled_row = (conv_row + pool_padding_h) // pool_stride_h - cover // cover_w
            pooled_column = (conv_column + pool_padding_w) // pool_stride_w - cover % cover_w
            from_top = conv_row + pool_padding_h - pooled_row * pool_stride_h
            from_left = conv_column + pool_padding_w - pooled_column * pool_stride_w
            cell_row = from_top // pool_dilation_h
            cell_column = from_left // pool_dilation_w
            mask = on_conv & _within(pooled_row, pooled_h) & _within(pooled_column, pooled_w)
            mask &= (cell_row < pool_h) & (cell_column < pool_w)
            mask &= (from_top % pool_dilation_h == 0) & (from_left % pool_dilation_w == 0)
            offset = code_base + pooled_row.to(INDEX) * code_stride_h + pooled_column.to(INDEX) * code_stride_w
            code = tl.load(code_ptr + offset, mask=mask, other=255)
            mask &= code.to(tl.int32) == cell_row * pool_w + cell_column
            offset = grad_base + pooled_row.to(INDEX) * grad_stride_h + pooled_column.to(INDEX) * grad_stride_w
            grad_conv += load(grad_ptr + offset, mask).to(tl.float32)
        tap = (out_channel * in_channels)[:, None] * taps + (k % taps)[:, None] + (channel * taps)[None, :]
        weight = load(weight_ptr + tap, k_mask[:, None] & channel_mask[None, :])
        grad_input = tl.dot(grad_conv.to(weight.dtype), weight, grad_input, input_precision=PRECISION)

    output_row = image * output_stride_n + h.to(INDEX) * output_stride_h + w.to(INDEX) * output_stride_w
    offset = output_row[:, None] + ((group * in_channels + channel).to(INDEX) * output_stride_c)[None, :]
    store(output_ptr + offset, grad_input, row_mask[:, None] & channel_mask[None, :])


@triton.jit(do_not_specialize=_GENERAL)
def _grad_weight_kernel(
    grad_ptr,
    code_ptr,
    input_ptr,
    weight_parts_ptr,
    bias_parts_ptr,
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
    code_stride_n,
    code_stride_c,
    code_stride_h,
    code_stride_w,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    rows_per_part,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the weight and the bias: one part of each sum, which `sum_parts` completes in a fixed order.

    Maths: ``grad_weight[o, k] = sum over (n, p, t) of where(code[n, o, p] == t, grad[n, o, p], 0) * patch[n, p, t, k]``
    with k = (channel, kernel row, kernel column), and ``grad_bias[o] = sum where(code != 255, grad, 0)``.

    Tile: BLOCK_M weight entries k of one group (rows of C * KH * KW) x BLOCK_N output channels; the sum runs over the
    `rows_per_part` pooled cells of one part, BLOCK_K at a time.

    Shapes and strides: grad and code (N, G * O, PH, PW), any strides (0 too); input (N, G * C, H, W), any strides;
    weight_parts (parts, G * O, C * KH * KW) and bias_parts (parts, G * O) float32, contiguous.

    Cost per image: as the forward; reads input, gradients and codes once per tile of k.
    """
    depth = in_channels * kernel_h * kernel_w
    channel_tiles = (out_channels + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1)
    group = tl.program_id(2)
    k = tl.program_id(0) // channel_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k_mask = k < depth
    channel_mask = channel < out_channels
    out_channel = (group * out_channels + channel).to(INDEX)
    in_channel = (group * in_channels + k // (kernel_h * kernel_w)).to(INDEX)
    tap_h = (k // kernel_w % kernel_h) * dilation_h - padding_h
    tap_w = (k % kernel_w) * dilation_w - padding_w

    grad_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_bias = tl.zeros((BLOCK_N,), tl.float32)
    first = part.to(INDEX) * rows_per_part
    for start in range(0, rows_per_part, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        row_mask = row < rows
        image = row // (pooled_h * pooled_w)
        pooled_row = (row // pooled_w % pooled_h).to(tl.int32)
        pooled_column = (row % pooled_w).to(tl.int32)
        mask = row_mask[:, None] & channel_mask[None, :]
        offset = image * code_stride_n
        offset += pooled_row.to(INDEX) * code_stride_h + pooled_column.to(INDEX) * code_stride_w
        code = tl.load(code_ptr + offset[:, None] + (out_channel * code_stride_c)[None, :], mask=mask, other=255).to(
            tl.int32
        )
        offset = image * grad_stride_n
        offset += pooled_row.to(INDEX) * grad_stride_h + pooled_column.to(INDEX) * grad_stride_w
        grad = load(grad_ptr + offset[:, None] + (out_channel * grad_stride_c)[None, :], mask & (code != 255))
        if NEED_BIAS:
            grad_bias += tl.sum(grad.to(tl.float32), axis=0)
        if NEED_WEIGHT:
            for cell in range(pool_h * pool_w):
                conv_row = pooled_row * pool_stride_h - pool_padding_h + (cell // pool_w) * pool_dilation_h
                conv_column = pooled_column * pool_stride_w - pool_padding_w + (cell % pool_w) * pool_dilation_w
                inside = _within(conv_row, conv_h) & _within(conv_column, conv_w) & row_mask
                h = tap_h[:, None] + (conv_row * stride_h)[None, :]
                w = tap_w[:, None] + (conv_column * stride_w)[None, :]
                on_input = inside[None, :] & k_mask[:, None] & _within(h, input_h) & _within(w, input_w)
                position = (in_channel * input_stride_c)[:, None] + (image * input_stride_n)[None, :]
                position += h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
                patch = load(input_ptr + position, on_input)
                chosen = tl.where(code == cell, grad, 0.0).to(patch.dtype)
                grad_weight = tl.dot(patch, chosen, grad_weight, input_precision=PRECISION)

    channels = tl.num_programs(2) * out_channels
    out_channel += part.to(INDEX) * channels
    if NEED_WEIGHT:
        offset = k[:, None] + (out_channel * depth)[None, :]
        tl.store(weight_parts_ptr + offset, grad_weight, mask=k_mask[:, None] & channel_mask[None, :])
    if NEED_BIAS:
        # Every tile of k has the same sum; the first writes it.
        tl.store(bias_parts_ptr + out_channel, grad_bias, mask=channel_mask & (tl.program_id(0) < channel_tiles))


def _tile(dtype: torch.dtype, rows: int, columns: int, depth: int) -> dict[str, Any]:
    """Choose the tile and precision of a product of `rows` x `columns` with inner dimension `depth`.

    On a GPU it never depends on the rows, of which the batch may be one dimension.
    """
    precision = dot_precision(dtype, torch.backends.cudnn.conv.fp32_precision)
    if INTERPRETED:
        return {"PRECISION": precision, **interpreted_tile(rows, columns, depth)}
    block_n = min(64, max(16, triton.next_power_of_2(columns)))
    blocks = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_K": 16}
    return {"PRECISION": precision, **blocks, "num_warps": 4, "num_stages": 1, **all_registers()}


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
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_code: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; arguments and results as in `conv2d_relu_max_pool2d`."""
    shape = geometry.output_shape(input, weight)
    output = empty(shape, input, memory_format=memory_format(input, weight))
    code = empty(shape, output, geometry.code_dtype, memory_format(input, weight)) if return_code else None
    rows, channels = shape[0] * shape[2] * shape[3], shape[1] // geometry.groups
    tile = _tile(input.dtype, rows, channels, weight[0].numel())
    weight = weight.contiguous()
    launch(
        _forward_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(channels, tile["BLOCK_N"]), geometry.groups),
        input,
        weight,
        weight if bias is None else bias.contiguous(),
        output,
        output if code is None else code,
        *_sizes(input, weight, shape[2:], rows, geometry),
        *input.stride(),
        *output.stride(),
        HAS_BIAS=bias is not None,
        RETURN_CODE=return_code,
        INDEX=index_type(input, weight, output),
        **tile,
    )
    return output, code


def grad_input(grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Launch the gradient of the input, in the input's layout."""
    result = empty(input.shape, input, memory_format=memory_format(input, weight))
    rows, channels = input.shape[0] * input.shape[2] * input.shape[3], weight.shape[1]
    tile = _tile(input.dtype, rows, channels, weight[:, 0].numel() // geometry.groups)
    launch(
        _grad_input_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(channels, tile["BLOCK_N"]), geometry.groups),
        grad_output,
        code,
        weight.contiguous(),
        result,
        *_sizes(input, weight, code.shape[2:], rows, geometry),
        *grad_output.stride(),
        *code.stride(),
        *result.stride(),
        INDEX=index_type(grad_output, code, weight, result),
        **tile,
    )
    return result


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    code: Tensor,
    geometry: ConvPoolGeometry,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the gradients of the weight, in its layout, and of the bias; None where not needed."""
    out_channels, depth = weight.shape[0], weight[0].numel()
    channels = out_channels // geometry.groups
    rows = code.shape[0] * code.shape[2] * code.shape[3]
    tile = _tile(input.dtype, depth, channels, rows)
    channel_tiles = triton.cdiv(channels, tile["BLOCK_N"])
    tiles = (triton.cdiv(depth, tile["BLOCK_M"]) if need_weight else 1) * channel_tiles
    parts, rows_per_part = splits(rows, tile["BLOCK_K"], tiles * geometry.groups)
    weight_parts = empty((parts, out_channels, depth), input, torch.float32) if need_weight else None
    bias_parts = empty((parts, out_channels), input, torch.float32) if need_bias else None
    launch(
        _grad_weight_kernel,
        (tiles, parts, geometry.groups),
        grad_output,
        code,
        input,
        code if weight_parts is None else weight_parts,
        code if bias_parts is None else bias_parts,
        *_sizes(input, weight, code.shape[2:], rows, geometry),
        *grad_output.stride(),
        *code.stride(),
        *input.stride(),
        rows_per_part,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        INDEX=index_type(grad_output, code, input, weight_parts),
        **tile,
    )
    result = grad_bias = None
    if weight_parts is not None:
        result = sum_parts(weight_parts, empty(weight.shape, weight))
        result = result.contiguous(memory_format=memory_format(input, weight))
    if bias_parts is not None:
        grad_bias = sum_parts(bias_parts, empty((out_channels,), weight))
    return result, grad_bias
