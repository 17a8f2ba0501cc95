"""Tiles: how large a piece of work a program takes, and with how many warps, stages and registers.

This module chooses the tiles of the general convolution, the matrix product and the head, from sizes, type and
architecture. `rules` chooses those of `patch_fma`. An entry of `configurations.json` overrides both. No tile depends on
the number of images where that could change a result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .configurations import architecture
from .runtime import (
    DESCRIPTORS_ROUND,
    INTERPRETED,
    all_registers,
    cdiv,
    describable,
    dot_precision,
    interpreted_tile,
    layout,
    next_power_of_2,
)

# --- the general convolution -----------------------------------------------------------------------------------------


def conv_forward(dtype: torch.dtype, rows: int, columns: int, channels: int, depth: int, wide: bool) -> dict[str, Any]:
    """Choose the forward's tile.

    Args:
        dtype: of the operands.
        rows: pooled cells.
        columns: output channels of a group.
        channels: input channels of a group.
        depth: products of a cell.
        wide: whether the depth is walked tap by tap.
    """
    if not wide:
        return _conv_tile(dtype, rows, columns, depth)
    # Where products are taken out of registers, in which tf32 operands are rounded, deeper steps spill.
    rounds = dtype == torch.float32 and not _exact_conv(dtype) and architecture() not in ("sm_90", "sm_100")
    step = _block(channels, 16 if rounds else 32)
    return _wide_conv_tile(dtype, rows, columns, channels, widest=64, step=step)


def conv_grad_input(dtype: torch.dtype, rows: int, columns: int, depth: int) -> dict[str, Any]:
    """Choose the tile of `depth` output channels' products for `rows` pixels of `columns` input channels."""
    return _wide_conv_tile(dtype, rows, columns, depth)


def conv_grad_weight(
    dtype: torch.dtype, rows: int, columns: int, channels: int, depth: int, wide: bool, narrow: bool
) -> dict[str, Any]:
    """Choose the tile of the weight's gradient; arguments as of `conv_forward`; `narrow`: by 32-bit addresses."""
    if not wide:
        return _conv_tile(dtype, depth, columns, rows)
    tall, step = _block(channels, 128), 32 if _roomy(dtype) and narrow else 16
    return _wide_conv_tile(dtype, channels, columns, rows, tall=tall, step=step)


def _conv_tile(dtype: torch.dtype, rows: int, columns: int, depth: int) -> dict[str, Any]:
    """Choose the tile and precision of a product of `rows` x `columns` with inner dimension `depth`.

    On a GPU it never depends on the rows, of which the batch may be one dimension.
    """
    precision = dot_precision(dtype, torch.backends.cudnn.conv.fp32_precision)
    if INTERPRETED:
        return {"PRECISION": precision, **interpreted_tile(rows, columns, depth)}
    blocks = {"BLOCK_M": 32, "BLOCK_N": _block(columns, 64), "BLOCK_K": 16}
    return {"PRECISION": precision, **blocks, "num_warps": 4, "num_stages": 1, **all_registers()}


def _wide_conv_tile(
    dtype: torch.dtype, rows: int, columns: int, depth: int, *, tall: int = 128, widest: int = 128, step: int = 16
) -> dict[str, Any]:
    """Choose a large tile, for kernels that walk the depth tap by tap; see `_conv_tile`.

    Args:
        dtype: of the operands.
        rows: extent of BLOCK_M.
        columns: extent of BLOCK_N.
        depth: extent of BLOCK_K.
        tall: BLOCK_M.
        widest: the largest BLOCK_N.
        step: BLOCK_K.
    """
    tile = _conv_tile(dtype, rows, columns, depth)
    if INTERPRETED:
        return tile
    if _exact_conv(dtype) and architecture().startswith("sm_1"):
        # Blackwell's matrix units take products of 64 columns and more, and round exact float32 to tf32 there.
        widest = 32
    block_n = _block(columns, widest)
    return tile | {"BLOCK_M": tall, "BLOCK_N": block_n, "BLOCK_K": step, "num_warps": 8 if tall * block_n > 4096 else 4}


def _roomy(dtype: torch.dtype) -> bool:
    """Whether the weight's gradient may take 32 pooled cells a step: elsewhere, and by 64-bit addresses, it spills."""
    return not _exact_conv(dtype) and architecture() in ("sm_90", "sm_100")


def _exact_conv(dtype: torch.dtype) -> bool:
    """Whether products are of exact float32."""
    return dtype == torch.float32 and dot_precision(dtype, torch.backends.cudnn.conv.fp32_precision) == "ieee"


def _block(size: int, most: int) -> int:
    """Side of a tile that covers `size`, or as much of it as `most` allows."""
    return min(most, max(16, next_power_of_2(size)))


# --- the matrix product ----------------------------------------------------------------------------------------------

_MASK_ONCE_FROM = {"sm_90": 2048}
_MASK_ONCE_FROM_ELSEWHERE = 1024
"""Columns of both gradients' products together from which the gradient is masked once before instead of in each tile.

Modelled: a tile of 128 columns that masks the gradient itself reads the output from L2 into shared memory and on into
registers. Masking it once is three passes over memory, as long as eight such tiles take in either product. Warps of
sm_80 and gfx942 share left operands, and each masks its own copy. sm_100 puts a masked operand back into shared
memory.
"""


def masks_once(columns: int) -> bool:
    """Whether a product's gradient is masked by a kernel of its own, with `columns` of both gradients' products."""
    return columns >= _MASK_ONCE_FROM.get(architecture(), _MASK_ONCE_FROM_ELSEWHERE)


def exact_product(dtype: torch.dtype) -> bool:
    """Whether matrices are multiplied in exact float32, on FMA units."""
    return is_exact(dtype, dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision))


_DESCRIBES = "sm_90", "sm_100", "interpreted"
"""Where the GPU copies tiles on its own, by tensor descriptors."""


def narrow(matrix: Tensor) -> bool:
    """Whether a matrix' layout is too narrow for matrix units: loads of less than 8 bytes.

    In tf32 16 bytes are asked for where there are descriptors: by pointers sm_100 takes 2.6 times its limit.
    """
    least = 16 if matrix.dtype == torch.float32 and architecture() in _DESCRIBES else 8
    return abs(layout(matrix)) * matrix.element_size() < least


def describes(left: Tensor, right: Tensor) -> bool:
    """Whether a product's operands go by tensor descriptors, to matrix units."""
    precision = dot_precision(left.dtype, torch.backends.cuda.matmul.fp32_precision)
    if architecture() not in _DESCRIBES or is_exact(left.dtype, precision):
        return False
    return (precision != "tf32" or DESCRIPTORS_ROUND) and describable(left) and describable(right)


def product(dtype: torch.dtype, rows: int | None, columns: int, depth: int, *, masks: bool = False) -> dict[str, Any]:
    """Choose the tile and precision of a product of `rows` x `columns` with inner dimension `depth`.

    Args:
        dtype: of the operands.
        rows: None where they are the forward's: a row's sums must not depend on how many rows travel with it.
        columns: of the product.
        depth: products summed.
        masks: whether the left operand is masked in registers, across its rows: then a wide tile would spill.
    """
    precision = dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
    if INTERPRETED:
        return {"PRECISION": precision, "GROUP": 8, **interpreted_tile(rows or 1024, columns, depth)}
    on, half = architecture(), dtype != torch.float32
    block_n = min(128, max(16, next_power_of_2(columns)))
    if not half and precision == "ieee":
        # FMA units take both operands in registers: a wider tile spills, and runs on matrix units, in tf32, on sm_100.
        block_n = min(block_n, 64 if on == "sm_90" and rows is not None else 32)
        tile = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    else:
        large = columns > 128 and (rows is None or rows > 64)
        block_m, block_k, stages = (128 if large else 64), (64 if half else 32), 3
        if on == "sm_90" and not half and rows is not None and not masks and columns > 512:
            # Twice as wide, a tile reads its left operand half as often: shared memory is what binds in tf32.
            if cdiv(rows, block_m) * cdiv(columns, 256) >= 128:
                block_n = 256
        elif on == "sm_100" and not half and rows is not None and not masks and large:
            # The right operand is rounded in registers on its way to shared memory, which binds; the left one goes to
            # tensor memory. Twice as tall, a tile reads the right operand half as often.
            if cdiv(rows, 256) * cdiv(columns, block_n) >= 128:
                block_m = 256
        elif on == "sm_80":
            block_k //= 2  # operands pass through registers
        elif on not in ("sm_90", "sm_100"):
            block_k, stages = 32, 2  # 64 KiB of shared memory
        warps = 8 if large else 4
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    return {"PRECISION": precision, "GROUP": 8, **tile, **all_registers()}


# --- the head --------------------------------------------------------------------------------------------------------


def is_exact(dtype: torch.dtype, precision: str) -> bool:
    """Whether products run on the FMA units: they keep both operands in registers, and spill in wide tiles."""
    return dtype == torch.float32 and precision == "ieee"


def head_layers(dtype: torch.dtype, p: int, q: int, aligned: bool) -> dict[str, Any]:
    """Choose precision and tile of the kernels that take rows through the layers; it never depends on the rows.

    Loads of single elements take registers for their addresses: a wide tile would spill.
    """
    precision = dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
    exact, wide = is_exact(dtype, precision), q > 96
    registers = {} if INTERPRETED else all_registers()
    tile: dict[str, Any]
    if INTERPRETED:
        tile = {"BLOCK_M": 1024, "BLOCK_K": 256, "BLOCK_P": 128, "BLOCK_Q": 128}
    elif exact:
        # Operands come through shared memory: the more outputs a lane has, the fewer loads a product takes, so that all
        # of hidden1 is one block. Addresses of single elements leave room for half, sm_100's pairs of registers too.
        paired = architecture() == "sm_100"
        block_p = min(max(32, next_power_of_2(p)), 64 if paired else 128)
        tile = {"BLOCK_M": 64, "BLOCK_K": 16, "BLOCK_P": block_p, "BLOCK_Q": 32, "num_stages": 1, **registers}
        tile["num_warps"] = 4 if aligned and not (paired and wide) else 8
    else:
        # Four slices of hidden2 leave registers for half as wide a block of hidden1. AMD's lanes have 256: less still.
        # On sm_80, which multiplies out of registers, rounding tf32 operands there takes the rest.
        rounded = dtype == torch.float32 and architecture() == "sm_80"
        block_p = min(max(32, next_power_of_2(p)), 32 if rounded else 64 if wide else 128) if aligned else 32
        rows = 64
        if wide and dtype == torch.float32 and not registers:
            rows, block_p = 32, 32
        # The third stage was measured on an H100: 23 us for 30 in tf32, 13 for 16 in bfloat16, at batch 8192.
        stages = 1 if wide else 3 if architecture() == "sm_90" else 2
        tile = {"BLOCK_M": rows, "BLOCK_K": 32, "BLOCK_P": block_p, "BLOCK_Q": 32, "num_warps": 8, "num_stages": stages}
        tile |= registers
    slices = max(1, cdiv(q, tile["BLOCK_Q"]))
    return {"PRECISION": precision, "SLICES_Q": slices, "BLOCK_R": 16, **tile}


def head_grad_input(dtype: torch.dtype) -> dict[str, Any]:
    """Choose the tile of the input's gradient; its rows and warps are those of `head_layers`."""
    precision = dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
    if INTERPRETED:
        return {"BLOCK_J": 256, "BLOCK_D": 256, "STAGES": 1}
    if is_exact(dtype, precision):
        return {"BLOCK_J": 128, "BLOCK_D": 16, "STAGES": 2 if architecture() == "sm_90" else 1}
    return {"BLOCK_J": 128, "BLOCK_D": 32 if dtype == torch.float32 else 64, "STAGES": 2}


def head_grad_weights(dtype: torch.dtype) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Choose precision and tile of the products of two layers' weight gradients, and which warps may compute them."""
    precision = dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
    warps: tuple[int, ...]
    if INTERPRETED:
        warps, tile = (1,), {"BLOCK_I": 1024, "BLOCK_J": 256, "BLOCK_D": 256, "STAGES": 1}
    elif is_exact(dtype, precision):
        warps, tile = (2,), {"BLOCK_I": 128, "BLOCK_J": 32, "BLOCK_D": 16, "STAGES": 1}
        if architecture() == "sm_90":
            # Two stages copy past the registers, which spares shared memory's stores. On an H100 at batch 8192
            # the whole backward takes 102 us; with 128 x 32 by two warps 118.
            warps, tile = (4,), tile | {"BLOCK_I": 64, "BLOCK_J": 64, "STAGES": 2}
    else:
        # Deeper steps in tf32 take registers from LeNet's second layer, which shares the launch: 24 bytes of spills.
        depth = 16 if dtype == torch.float32 else 64
        warps, tile = (4, 8), {"BLOCK_I": 128, "BLOCK_J": 64, "BLOCK_D": depth, "STAGES": 2}
    return warps, {"PRECISION": precision, **tile}
