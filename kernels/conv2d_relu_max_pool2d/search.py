"""Which configurations of each variant are worth trying: what `fastlenet bench --tune` measures.

A space is wider than what fits: a configuration that spills, needs too much shared memory or computes something else is
dropped by the tuner, which checks all three.

- `general`: its own rule, then one constant of it changed at a time.
- `patch_dot`: tiles of 32 to 128 rows, filled by as many whole images, or rows of pooled cells, as they hold; two
  depths of a step, four or eight warps, all registers or 128 a thread; in the forward one or two stages of loads, in
  the weight's gradient one window or two by two in a patch.
- `patch_fma`: the rule's tile with other numbers of channels and registers, and image sizes compiled in.
- `block_dot`: rows and columns of a tile, depth of a step, stages of loads; kernel rows in the weight's gradient.
- `spread_dot`: rows of a tile, depth of a step, stages of loads.
- `column_fma`: channels, rows of a strip, registers.

Products of tf32 and 16 bits may take either: few of them leave matrix units waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
from torch import Tensor

from .. import configurations, rules
from ..geometry import ConvPoolGeometry
from . import VARIANTS

Candidate = tuple[str, dict[str, int]]


def candidates(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, exact: bool
) -> list[Candidate]:
    """List variants with their configurations, the general kernels' own rule first.

    Args:
        direction: ``"forward"``, ``"grad_input"`` or ``"grad_weight"``.
        geometry: of the convolution and the pool.
        input: of the shape and layout to be tuned.
        weight: likewise.
        exact: whether products are of exact float32, which `patch_dot` leaves to `patch_fma`.
    """
    found: list[Candidate] = [("general", options) for options in _GENERAL]
    if not exact and VARIANTS["patch_dot"].covers(geometry, input, weight):
        found += [("patch_dot", options) for options in _patch_dot(direction, geometry, input, weight)]
    if VARIANTS["patch_fma"].covers(geometry, input, weight):
        found += [("patch_fma", options) for options in _patch_fma(direction, geometry, input, weight, exact)]
    if not exact and direction != "grad_input" and VARIANTS["block_dot"].covers(geometry, input, weight):
        tiles = _BLOCK_DOT if direction == "forward" else _BLOCK_DOT_WEIGHT
        found += [("block_dot", options) for options in tiles]
    if not exact and direction == "grad_input" and VARIANTS["spread_dot"].covers(geometry, input, weight):
        found += [("spread_dot", options) for options in _SPREAD_DOT]
    # The input's gradient by columns meets in memory, which must hold sums in full.
    columns = direction == "grad_input" and input.dtype == torch.float32
    if columns and VARIANTS["column_fma"].covers(geometry, input, weight):
        found += [("column_fma", options) for options in _column_fma(input)]
    return found


_BLOCK_DOT: list[dict[str, int]] = [
    {},
    {"BLOCK_M": 64, "num_warps": 4},
    {"BLOCK_N": 32},
    {"BLOCK_K": 16},
    {"num_stages": 2},
]

_BLOCK_DOT_WEIGHT: list[dict[str, int]] = [
    {},
    {"BLOCK_N": 32},
    {"BLOCK_K": 32},
    {"TAP_ROWS": 1},
]

_SPREAD_DOT: list[dict[str, int]] = [
    {},
    {"BLOCK_M": 64},
    {"BLOCK_M": 256, "num_warps": 8},
    {"BLOCK_K": 16},
    {"num_stages": 2},
    {"num_stages": 4},
]

_GENERAL: list[dict[str, int]] = [
    {},
    {"BLOCK_M": 64, "num_warps": 4},
    {"BLOCK_K": 16},
    {"BLOCK_K": 32},
    {"num_stages": 2},
]


def _patch_dot(direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor) -> Iterator[dict[str, int]]:
    out_channels, in_channels = weight.shape[:2]
    pads = {"OUT_PAD": max(8, triton.next_power_of_2(out_channels))}
    height, width = geometry.output_shape(input, weight)[2:]
    for block_m, num_warps, registers in product((32, 64, 128), (4, 8), ({}, {"maxnreg": 128})):
        if direction == "grad_input":
            pads["IN_PAD"] = max(8, triton.next_power_of_2(in_channels))
            images = block_m // -(-input.shape[3] // 2)
            if images:
                yield {"IMAGES": images, **pads, "BLOCK_M": block_m, "num_warps": num_warps, **registers}
            continue
        if direction == "forward":
            for rows, block_k, stages in product((1, height), (16, 32), (1, 2)):
                constants = {"BLOCK_M": block_m, "BLOCK_K": block_k, "STAGES": stages, "num_warps": num_warps}
                constants |= registers
                if images := block_m // (rows * width):
                    yield {"IMAGES": images, "ROWS": rows, **pads, **constants}
            continue
        for windows, block_k in product((1, 2), (64, 128)):
            if height % windows or width % windows:
                continue
            for rows in (1, height // windows):
                constants = {"BLOCK_M": block_m, "BLOCK_K": block_k, "STAGES": 1, "num_warps": num_warps, **registers}
                if images := block_m // (rows * width // windows):
                    yield {"IMAGES": images, "ROWS": rows, "WINDOWS": windows, **pads, **constants}


def _patch_fma(
    direction: str, geometry: ConvPoolGeometry, input: Tensor, weight: Tensor, exact: bool
) -> Iterator[dict[str, int]]:
    (out_channels, in_channels), kernel = weight.shape[:2], (weight.shape[2], weight.shape[3])
    target = configurations.architecture()
    rule = rules.choose(direction, geometry, in_channels, out_channels, kernel, exact, target)
    spaces = product((2, 3, 4, 6, 8), ({}, {"maxnreg": 128}, {"maxnreg": 255}))
    for channels, registers in spaces:
        if direction != "grad_input":
            yield {"CHANNELS": channels, "FIXED": 1, **registers}
        if rule is not None and rule.variant == "patch_fma":
            yield {**rule.options, "CHANNELS": channels, **registers}


def _column_fma(input: Tensor) -> Iterator[dict[str, int]]:
    strips = (1, 2, -(-input.shape[2] // 2))
    spaces = product((1, 2, 3), strips, ({}, {"maxnreg": 128}))
    yield from ({"CHANNELS": channels, "STRIP": strip, **registers} for channels, strip, registers in spaces)
