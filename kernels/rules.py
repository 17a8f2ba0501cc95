"""Which design computes a convolution, and with which tile, where the table of configurations has no entry.

Free of triton, so that `dispatch` may ask as well. The number of images never decides.

- **FMA units** (`patch_fma`) for up to 16 input channels in every type and precision: so few products leave matrix
  units waiting (an H100 took 65 us for LeNet's first layer on FMA units, 106 on matrix units). Any stride, padding and
  pool whose windows are not too large to be unrolled.
- **General kernels** for the rest.

Tiles of `patch_fma` follow from registers: a thread has 168 of them if three programs of four warps shall fit on a
multiprocessor, of which accumulators may take some 100; the rest holds pixels, weights and addresses.
"""

from __future__ import annotations

from typing import NamedTuple

from .geometry import ConvPoolGeometry


class Rule(NamedTuple):
    """A design and its tile."""

    design: str
    options: dict[str, int]


MOST_CHANNELS = 16
"""Input channels up to which FMA units are taken."""


def choose(
    direction: str, geometry: ConvPoolGeometry, channels: int, out_channels: int, kernel: tuple[int, int]
) -> Rule | None:
    """Return the specialised design for a convolution, or None where the general kernels stay.

    Args:
        direction: ``"forward"``, ``"grad_input"`` or ``"grad_weight"``.
        geometry: of convolution and pool.
        channels: input channels.
        out_channels: output channels.
        kernel: height and width.
    """
    if channels > MOST_CHANNELS or geometry.groups != 1:
        return None
    if geometry.dilation != (1, 1) or geometry.pool_dilation != (1, 1):
        return None
    (pool_h, pool_w), (step_h, step_w) = geometry.pool_size, geometry.pool_stride
    cells = min(pool_h, step_h) * min(pool_w, step_w)
    taps = kernel[0] * kernel[1]
    if cells > 9 or max(pool_h, pool_w) > 5 or taps > 121 or max(*geometry.stride, *geometry.pool_stride) > 4:
        return None
    if direction == "forward":
        return _forward(cells, taps, out_channels)
    if direction == "grad_weight":
        return _grad_weight(cells, kernel, channels, out_channels)
    spans = [
        (min(pool, step) - 1) * stride + size
        for pool, step, stride, size in zip(
            geometry.pool_size, geometry.pool_stride, geometry.stride, kernel, strict=True
        )
    ]
    return _grad_input(spans[0] * spans[1], taps, channels)


def _even(number: int, most: int) -> int:
    """Channels of a tile, at most `most`, so that tiles cover `number` with the least overlap."""
    most = max(1, min(number, most))
    return min(range(1, most + 1), key=lambda n: (-(-number // n) * n * (1 + 0.5 / n), -n))


def _forward(cells: int, taps: int, out_channels: int) -> Rule:
    # Two lanes a thread: so many accumulators for each channel.
    channels = _even(out_channels, min(8, 72 // (2 * cells)))
    return Rule("patch_fma", {"CHANNELS": channels, "UNROLL": int(taps * channels * cells <= 1000)})


def _grad_weight(cells: int, kernel: tuple[int, int], in_channels: int, out_channels: int) -> Rule:
    taps = kernel[0] * kernel[1]
    options = {"CHANNELS": 1, "INPUTS": 1, "TAP_ROWS": kernel[0]}
    if taps > 100:
        options["TAP_ROWS"], taps = 1, kernel[1]
    most = max(1, 100 // taps)
    options["CHANNELS"] = _even(out_channels, min(most, 8))
    options["INPUTS"] = _even(in_channels, max(1, most // options["CHANNELS"]))
    return Rule("patch_fma", options)


def _grad_input(span: int, taps: int, channels: int) -> Rule | None:
    if span > 160:
        return None
    positions = 2 if span <= 72 else 1
    return Rule("patch_fma", {"CHANNELS": _even(channels, max(1, 96 // (span * positions))), "POSITIONS": positions})
