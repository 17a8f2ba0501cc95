"""Which variant computes a convolution, and with which tile, where the table of configurations has no entry.

This module does not import triton, so that `fastlenet.library` can ask it too. Neither the number of images nor their
size decides. All ratios below are modelled (`python -m bench.static --conv`), against products at 60 TFLOP/s on an
H100.

- **FMA units** (`patch_fma`) compute up to 31 input channels in every type and precision, and up to 64 in exact
  float32. So few products leave matrix units waiting: an H100 took 65 us for LeNet's first layer on FMA units and 106
  on matrix units, though the model had it the other way round. Stride, padding and pool may be any whose cells fit in
  registers.
- **The forward of 32 channels and more** computes blocks of cells on matrix units (`block_dot`): 0.12 to 0.55 of the
  floor, where the general kernel took 0.36 to 1. That loads a pixel again for every cell, and computes cells again for
  every window that overlaps.
- **The weight's gradient of 32 channels and more** multiplies blocks of cells too (`block_dot`): 0.11 to 0.84 of the
  floor in most shapes, where the general kernel took 0.3 to 2.0. On sm_90 it computes kernels up to 7 columns wide.
  Elsewhere the sums of larger kernels and windows do not fit: there up to 5 columns and 4 cells, if none is missing.
- **General kernels**, on matrix units, compute the rest: from 32 channels on their steps are full.
- **The input's gradient of 32 to 64 channels** is spread over cells and multiplied (`spread_dot`): 0.2 to 0.6 of the
  floor, where the general kernel took 0.3 to 3.6. It looks at windows again for every tap, four times as often where
  they overlap. With one tap that is once, and costs less than the workspace. Up to 31 channels `patch_fma` takes 1.2 to
  1.4 of the floor and stays, but under overlapping windows, where it takes up to 2.1 and the workspace 0.9.
- **The weight's gradient of 32 to 64 channels** takes the same workspace under overlapping windows where blocks do not
  compute it, because the general kernel multiplies each cell once for every window that covers it.
- **gfx942** does not take `patch_fma` for the weight's gradient. Triton compiles it there for 7 s to minutes, in its
  own passes for that target.

Tiles of `patch_fma` follow from registers. A thread has 168 of them if three programs of four warps shall fit on a
multiprocessor. Accumulators take some 70 to 100, and pixels, weights and addresses the rest. The weight's gradient of
small kernels takes 255: only then do four input channels share the cost of spreading a gradient over its cells.
"""

from __future__ import annotations

from typing import NamedTuple

from .geometry import ConvPoolGeometry


class Rule(NamedTuple):
    """A variant and its tile."""

    variant: str
    options: dict[str, int]


MOST_CHANNELS, MOST_EXACT = 31, 64
"""Input channels up to which FMA units are taken, by matrix units' types and by exact float32."""

UNROLL_WITH_ARGMAX = 2
"""The forward's option UNROLL: 0 for a loop over kernel rows, 1 for none, this for none if argmax is returned."""

_SPREAD_FROM, _SPREAD_TO = 16, 64
"""Input channels from and up to which `spread_dot` may compute a gradient."""


def choose(
    direction: str,
    geometry: ConvPoolGeometry,
    channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    exact: bool,
    architecture: str,
) -> Rule | None:
    """Return the specialised variant for a convolution, or None where the general kernels stay.

    Args:
        direction: ``"forward"``, ``"grad_input"`` or ``"grad_weight"``.
        geometry: of convolution and pool.
        channels: input channels.
        out_channels: output channels.
        kernel: height and width.
        exact: whether products are of exact float32.
        architecture: as the table names it.
    """
    if geometry.groups != 1 or geometry.dilation != (1, 1) or geometry.pool_dilation != (1, 1):
        return None
    (pool_h, pool_w), (step_h, step_w) = geometry.pool_size, geometry.pool_stride
    cells = min(pool_h, step_h) * min(pool_w, step_w)
    taps = kernel[0] * kernel[1]
    if cells > 9 or max(pool_h, pool_w) > 5 or taps > 121 or max(*geometry.stride, *geometry.pool_stride) > 4:
        return None
    overlaps = pool_h > step_h or pool_w > step_w
    if direction == "grad_weight" and not exact and channels > MOST_CHANNELS:
        plain = not overlaps and not geometry.ceil_mode and geometry.pool_padding == (0, 0)
        # Elsewhere larger kernels and windows need more registers, or tensor memory, than there are.
        if kernel[1] <= 7 if architecture == "sm_90" else plain and kernel[1] <= 5 and cells <= 4:
            return Rule("block_dot", {})
    if direction != "forward" and not exact and _spreads(direction, channels, taps, overlaps, architecture):
        return Rule("spread_dot", {})
    if direction == "forward" and not exact and channels > MOST_CHANNELS:
        return Rule("block_dot", {})
    if channels > (MOST_EXACT if exact else MOST_CHANNELS):
        return None
    # Pixels of a block's patch, down and right.
    spans = [
        (min(pool, step) - 1) * stride + length
        for pool, step, stride, length in zip(
            geometry.pool_size, geometry.pool_stride, geometry.stride, kernel, strict=True
        )
    ]
    if direction == "forward":
        padded = geometry.padding != (0, 0)
        return _forward(cells, taps, spans, kernel[0], out_channels, overlaps, padded, architecture)
    if direction == "grad_weight":
        if not architecture.startswith("sm_"):
            return None
        return _grad_weight(cells, kernel, spans, channels, out_channels, overlaps, architecture)
    return _grad_input(cells, spans[0] * spans[1], channels, overlaps)


def _spreads(direction: str, channels: int, taps: int, overlaps: bool, architecture: str) -> bool:
    """Whether a gradient takes the workspace: where windows would be looked at more often than that costs."""
    if not _SPREAD_FROM <= channels <= _SPREAD_TO:
        return False
    if direction == "grad_weight":
        return overlaps and channels > MOST_CHANNELS
    if channels > MOST_CHANNELS:
        return overlaps or taps >= 4
    # Elsewhere FMA units take about as long. On sm_80 a product of 16 columns spills.
    return overlaps and taps >= 9 and architecture in ("sm_90", "sm_100")


def _even(number: int, most: int) -> int:
    """Channels of a tile, at most `most`, so that tiles cover `number` with the least overlap."""
    most = max(1, min(number, most))
    return min(range(1, most + 1), key=lambda n: (-(-number // n) * n * (1 + 0.5 / n), -n))


def _forward(
    cells: int,
    taps: int,
    spans: list[int],
    kernel_h: int,
    out_channels: int,
    overlaps: bool,
    padded: bool,
    architecture: str,
) -> Rule:
    # Two lanes a thread: so many accumulators for each channel.
    channels = _even(out_channels, min(8, 72 // (2 * cells)))
    # Masks of large padded kernels take the registers that rows of pixels need.
    unrolled = taps * channels * cells <= 1000 and (overlaps or not padded or taps < 25)
    options = {"CHANNELS": channels, "UNROLL": int(unrolled)}
    # Rows of pixels that wait for later kernel rows take registers, and so do masks of padded rows of odd length.
    waiting = spans[0] - kernel_h + 1 if unrolled else 0
    masked = overlaps and padded and taps >= 25 and architecture != "sm_100"
    if masked and unrolled:
        # Without argmax the compiler lets more loads wait than there are registers.
        options["UNROLL"] = UNROLL_WITH_ARGMAX
    if 2 * (cells * channels + waiting * spans[1]) > 160 or masked:
        return Rule("patch_fma", options | {"maxnreg": 255})
    # Rows that wait for the next take more registers; with 168 eight channels spill.
    return Rule("patch_fma", options | ({"maxnreg": 200} if overlaps else {}))


def _grad_weight(
    cells: int,
    kernel: tuple[int, int],
    spans: list[int],
    in_channels: int,
    out_channels: int,
    overlaps: bool,
    architecture: str,
) -> Rule:
    taps, rows = kernel[0] * kernel[1], kernel[0]
    if taps > 100:
        taps, rows = kernel[1], 1
    pixels = (spans[0] - kernel[0] + rows) * spans[1]  # which wait for their products, as the gradients of cells do
    if overlaps or (in_channels > 1 and taps <= 16 and pixels <= 81):
        # Spreading a gradient over its cells costs most where windows overlap or taps are few: many products share it.
        # Larger kernels keep more pixels beside their accumulators.
        inputs = _even(in_channels, max(1, min(4, 75 // taps)))
        channels = _even(out_channels, max(1, min(8, 36 // cells, (150 if taps <= 25 else 100) // (taps * inputs))))
        options = {"CHANNELS": channels, "INPUTS": inputs, "TAP_ROWS": rows, "maxnreg": 255}
        # Cells that wait for the windows below take registers, which large tiles do not have, less so if they load from
        # three input channels; sm_100, which takes registers in pairs, has fewer.
        most = {"sm_90": 150 if inputs < 3 else 144, "sm_100": 100}.get(architecture, 144)
        slides = overlaps and taps * inputs * channels <= most
        return Rule("patch_fma", options | ({"SLIDE": 1} if slides else {}))
    channels = _even(out_channels, max(1, min(8, 100 // taps)))
    options = {"CHANNELS": channels, "INPUTS": 1, "TAP_ROWS": rows}
    if taps * channels + cells * channels + pixels > 185:
        return Rule("patch_fma", options | {"maxnreg": 255})
    return Rule("patch_fma", options | ({"maxnreg": 200} if taps > 25 or cells > 4 else {}))


def _grad_input(cells: int, span: int, channels: int, overlaps: bool) -> Rule | None:
    if span > 160:
        return None
    positions = 2 if span <= 72 else 1
    tile = _even(channels, max(1, 96 // (span * positions)))
    # To spread a gradient over its cells costs most where windows overlap: channels share it, positions do not.
    more = _even(channels, max(1, 72 // span))
    if overlaps and cells > 1 and more > tile:
        positions, tile = 1, more
    options = {"CHANNELS": tile, "POSITIONS": positions}
    sums = span * positions
    return Rule("patch_fma", options | ({"maxnreg": 255 if sums > 120 and overlaps else 200} if sums > 100 else {}))
