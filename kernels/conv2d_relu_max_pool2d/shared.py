"""What several variants of the convolution share: blocks of cells, comparisons, packed weights, constants."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry
from ..runtime import dot_precision, load, store, tf32


@triton.jit
def within(position, size):
    """Whether 0 <= position < size, by one comparison: a negative number read as unsigned is larger than any size."""
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def better(best, value, argmax, code, RETURN_ARGMAX: tl.constexpr):
    """Let `value`, which comes later in scan order, win over `best` if it is larger or NaN."""
    if RETURN_ARGMAX:
        wins = (value > best) | (value != value)
        return tl.where(wins, value, best), tl.where(wins, code, argmax)
    else:  # noqa: RET505  (Triton compiles what follows a return)
        return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), argmax


@triton.jit
def pack(
    weight_ptr,
    packed_ptr,
    entry,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Lay out entries of a weight as a product's operand: ``packed[tap, row, column]``, rounded, 0 beyond the channels.

    Rows and columns are output and input channels, one or the other. In the weight they lie ROW_STEP and COLUMN_STEP
    elements apart, and a tap is 1 from the next.
    """
    column = entry % COLUMNS_PADDED
    row = entry // COLUMNS_PADDED % ROWS_PADDED
    tap = entry // (COLUMNS_PADDED * ROWS_PADDED)
    mask = (row < ROWS) & (column < COLUMNS) & (tap < TAPS)
    values = load(weight_ptr + (row * ROW_STEP + column * COLUMN_STEP + tap), mask)
    store(packed_ptr + entry, tf32(values, PRECISION), tap < TAPS)


def covers(geometry: ConvPoolGeometry, input: Tensor, weight: Tensor) -> bool:
    """Whether a variant whose windows and kernels have no gaps, and groups no meaning, can compute this."""
    plain = geometry.dilation == geometry.pool_dilation == (1, 1) and geometry.groups == 1
    return plain and geometry.window_size <= 254 and min(geometry.output_shape(input, weight)) > 0


def precision_of(dtype: torch.dtype) -> str:
    """Return `tl.dot`'s precision for a convolution of this type."""
    return dot_precision(dtype, torch.backends.cudnn.conv.fp32_precision)


def sizes_of(kernel: Any, geometry: ConvPoolGeometry, weight: Tensor) -> dict[str, int]:
    """List those of a call's sizes that `kernel` takes as constants: channels, convolution and pool."""
    out_channels, in_channels, *lengths = weight.shape
    found = {"IN_CHANNELS": in_channels, "OUT_CHANNELS": out_channels, "TAPS": lengths[0] * lengths[1]}
    pairs = {
        "KERNEL": lengths,
        "STRIDE": geometry.stride,
        "PADDING": geometry.padding,
        "POOL": geometry.pool_size,
        "POOL_STRIDE": geometry.pool_stride,
        "POOL_PADDING": geometry.pool_padding,
    }
    for name, (down, right) in pairs.items():
        found |= {f"{name}_H": down, f"{name}_W": right}
    return {name: size for name, size in found.items() if name in kernel.arg_names}
