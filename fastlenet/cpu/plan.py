"""The window arithmetic of a convolution and its pool as tables of offsets: what `record` names, filled in.

A plan holds for every number of images. It is made once for each kind of call and kept, so the kernels do no arithmetic
of windows at all: a pixel, a tap and a window are offsets to them. That is how one loop nest serves every stride,
padding, dilation and pool, and how both layouts of images (channel by channel, or pixel by pixel as in channels_last)
are the same to it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, Pair

from . import record
from .compiled import register_vectors
from .memory import on_cpu

LANES = 16
"""Images of a block: one to a lane."""

BYTES = 4 * LANES
"""Size of a number of every image of a block."""

CHAIN = 160
"""Products that are added one after the other at most; longer sums are made of several.

From some 288 on the error of one chain is more than twice stock's.
"""

BAND = 64
"""Pixels whose gradients are kept in the first-level cache for all taps; their sum is one chain."""


class Tile(NamedTuple):
    """Sizes of the tiles that a kernel keeps in registers; the kernels are compiled for them.

    Attributes:
        filters: a pass computes.
        pixels: of the convolution's output at a time.
        taps: of the weight's gradient at a time.
        channels: of the input's gradient in a pass.
        input_pixels: of the input's gradient at a time.
    """

    filters: int
    pixels: int
    taps: int
    channels: int
    input_pixels: int


class LinearTile(NamedTuple):
    """Sizes of the tiles of a linear layer.

    Attributes:
        sums: of a pass of the output, and of the input's gradient.
        vectors: of 16 inputs, of the weight's gradient at a time.
        filters: of the weight's gradient at a time.
    """

    sums: int
    vectors: int
    filters: int


class _Tiles(NamedTuple):
    """Tiles for a register file.

    Each width of a pass is compiled at its first use, so they are few.

    Attributes:
        filters: for each width of a pass: pixels, taps, and how fast the pass is when full.
        channels: for each width of a pass of the input's gradient: pixels, and how fast the pass is when full.
        one_image: tiles where the lanes are filters or channels of one image; the widths then count vectors of 16.
        linear: tiles of linear layers.
    """

    filters: dict[int, tuple[int, int, float]]
    channels: dict[int, tuple[int, float]]
    one_image: Tile
    linear: LinearTile


_TILES = {
    32: _Tiles(
        {1: (8, 8, 0.6), 2: (8, 8, 0.85), 4: (4, 5, 1.0), 5: (4, 4, 1.0), 6: (4, 4, 1.0)},
        {1: (8, 0.6), 4: (4, 0.9), 6: (2, 1.0), 8: (2, 1.0)},
        Tile(1, 8, 9, 1, 8),
        LinearTile(16, 2, 8),
    ),
    8: _Tiles(
        {1: (5, 5, 0.7), 2: (3, 3, 1.0)},
        {1: (4, 0.65), 3: (1, 0.85), 4: (1, 0.95), 6: (1, 1.0)},
        Tile(1, 5, 5, 1, 5),
        LinearTile(4, 2, 3),
    ),
}
"""By the vectors of 16 that the registers hold: a tile's sums and one row must fit, and FMA units need 4 to 8 sums."""


def tile_of(filters: int, channels: int, one_image: bool = False) -> Tile:
    """Choose the tiles of this CPU."""
    tiles = _TILES[register_vectors()]
    if one_image:
        return tiles.one_image
    wide = _width(filters, {width: speed for width, (*_, speed) in tiles.filters.items()})
    deep = _width(channels, {width: speed for width, (_, speed) in tiles.channels.items()})
    pixels, taps, _ = tiles.filters[wide]
    return Tile(wide, pixels, taps, deep, tiles.channels[deep][0])


def linear_tile() -> LinearTile:
    """Return a linear layer's tiles on this CPU."""
    return _TILES[register_vectors()].linear


def _width(count: int, speed: dict[int, float]) -> int:
    """The width of the fastest passes; empty places of the last one cost as much as others."""
    return min(speed, key=lambda width: (_ceil(count, width) * width / speed[width], -width))


class OneImage(NamedTuple):
    """How one image lies whose filters and channels are lanes.

    Attributes:
        lanes: whether what comes in is [vector of 16 channels, pixel, channel], as a layer before has written it; else
            it is [channel, pixel], as images come.
        padding: of the layer that follows: the pooled image is written into a frame of so many zeros.
    """

    lanes: bool
    padding: Pair

    def placed(self, windows: Tensor, pooled: Pair) -> tuple[Tensor, int]:
        """Return each window's place in the frame, and the frame's number of places."""
        (height, width), (rows, columns) = pooled, self.padding
        places = (windows // max(width, 1) + rows) * (width + 2 * columns) + windows % max(width, 1) + columns
        return places, (height + 2 * rows) * (width + 2 * columns)


class Plan(NamedTuple):
    """A table for the kernels, and what their launchers must know.

    Attributes:
        record: numbers of the table, by `record`'s names.
        tile: sizes of the tiles.
        address: where the table lies.
        pooled_size: height and width of the pooled output.
        memory: the table and the tables that it refers to.
    """

    record: tuple[int, ...]
    tile: Tile
    address: int
    pooled_size: Pair
    memory: Tensor


def _ceil(count: int, step: int) -> int:
    return -(-count // step)


@functools.lru_cache(maxsize=512)
@on_cpu
def plan_of(
    input: tuple[int, int, int],
    weight: tuple[int, int, int, int],
    geometry: ConvPoolGeometry,
    input_last: bool,
    target_last: bool,
    one_image: OneImage | None = None,
) -> Plan:
    """Plan calls of one shape.

    Args:
        input: channels, height, width.
        weight: its shape.
        geometry: of the convolution and the pool.
        input_last: whether images, and their gradient, lie pixel by pixel (channels_last).
        target_last: whether pooled images do.
        one_image: how one image lies, where filters and channels are the lanes; without padding, and of one group.
    """
    (all_channels, height, width), (all_filters, channels, *kernel) = input, weight
    filters, groups = all_filters // geometry.groups, geometry.groups
    tile = tile_of(filters, channels, one_image is not None)
    taps = kernel[0] * kernel[1]
    (pad_h, pad_w), (gap_h, gap_w), (step_h, step_w) = geometry.padding, geometry.dilation, geometry.stride
    padded_h, padded_w = height + 2 * pad_h, width + 2 * pad_w
    conv = geometry.conv_size((height, width), (kernel[0], kernel[1]))
    pooled = geometry.pooled_size(conv)
    padded = bool(pad_h or pad_w)
    source_pixel, source_step = (all_channels, 1) if input_last else (1, padded_h * padded_w)
    input_pixel, input_step = (all_channels, 1) if input_last else (1, height * width)
    target_pixel, target_step = (all_filters, 1) if target_last else (1, pooled[0] * pooled[1])
    pixel_bytes, channel_at = source_pixel * BYTES, torch.arange(channels) * source_step * BYTES
    factor_bytes = 4 * tile.filters * tile.channels
    if one_image is not None:
        factor_bytes *= LANES * LANES
        if one_image.lanes:
            channel_at = torch.arange(channels) // LANES * source_step * BYTES + torch.arange(channels) % LANES * 4
        else:
            pixel_bytes, channel_at = 4, torch.arange(channels) * source_step * 4

    cell = _window_cells(conv, pooled, geometry)
    position, order = _order(cell, conv)
    if not len(order):
        order = torch.zeros(1, dtype=torch.int64)  # no window has a cell: there is a pixel that counts for nothing
    y, x = order // conv[1], order % conv[1]
    tiles = _ceil(len(order), tile.pixels)
    in_source = (y * step_h * padded_w + x * step_w) * pixel_bytes
    pixels = torch.cat([in_source, in_source[-1:].expand(tiles * tile.pixels - len(order))])
    last = position.amax(1).cummax(0).values
    ready = torch.searchsorted(last, (torch.arange(tiles) + 1) * tile.pixels)
    tap_h, tap_w = torch.meshgrid(torch.arange(kernel[0]), torch.arange(kernel[1]), indexing="ij")
    tap = ((tap_h * gap_h * padded_w + tap_w * gap_w) * pixel_bytes).flatten()

    border = tile.input_pixels - 1
    grad_w = conv[1] + 2 * border
    in_grad = (y * grad_w + x + border) * tile.filters * BYTES
    grad_cell = torch.where(position >= 0, in_grad[position.clamp_min(0)], -1)
    overlap = int((position >= 0).sum()) > len(order)
    bands = _bands(position, overlap)
    all_taps = (channel_at[:, None] + tap).flatten()
    products = len(all_taps)
    tap = tap if one_image is None else all_taps
    tap_tiles = _ceil(len(all_taps), tile.taps)
    all_taps = torch.cat([all_taps, all_taps[-1:].expand(tap_tiles * tile.taps - len(all_taps))])
    sizes = (height, width), (kernel[0], kernel[1]), conv, geometry, tile, (input_pixel * BYTES, factor_bytes)
    input_tiles, input_taps = _input_tiles(*sizes, tile.input_pixels)
    exact_tiles, exact_taps = _input_tiles(*sizes, 1)

    chunks = _chunks(channels, taps)
    windows = torch.arange(len(cell))
    if one_image is not None:
        chunks = [(0, 1, 0, products)] if products <= CHAIN else _flat_chunks(products)
        windows, target_step = one_image.placed(windows, pooled)
        filters, channels = _ceil(filters, LANES), _ceil(channels, LANES)
        all_filters, all_channels = filters, channels
    filter_tiles, channel_tiles = _ceil(filters, tile.filters), _ceil(channels, tile.channels)
    runs = _pad_runs(all_channels, (height, width), geometry.padding, input_last) if padded else []
    tables = {
        record.PIXELS: pixels,
        record.READY: ready,
        record.CHUNK: torch.tensor(chunks),
        record.TAP: tap,
        record.CELL: torch.where(position >= 0, position * tile.filters * BYTES, -1),
        record.EMPTY: (position < 0).all(1),
        record.TARGET: windows * target_pixel * BYTES,
        record.GRAD_CELL: grad_cell,
        record.POSITION: torch.stack([in_source, in_grad], 1),
        record.BAND: torch.tensor(bands),
        record.TAP_TILE: all_taps,
        record.INPUT_TILE: input_tiles,
        record.INPUT_TAP: input_taps,
        record.EXACT_TILE: exact_tiles,
        record.EXACT_TAP: exact_taps,
        record.PAD_RUN: torch.tensor(runs, dtype=torch.int64),
    }
    numbers = {
        record.GROUPS: groups,
        record.CHANNELS: channels,
        record.FILTERS: filters,
        record.FILTER_TILES: filter_tiles,
        record.CHANNEL_TILES: channel_tiles,
        record.TAPS: taps,
        record.PRODUCTS: products,
        record.ALL_FILTERS: weight[0] // groups,
        record.SOURCE_STEP: source_step * BYTES,
        record.TARGET_STEP: target_step * BYTES,
        record.INPUT_STEP: input_step * BYTES,
        record.PIXEL_TILES: tiles,
        record.CHUNKS: len(chunks),
        record.WINDOWS: len(cell),
        record.CELLS: geometry.window_size,
        record.CONV_BYTES: tiles * tile.pixels * tile.filters * BYTES,
        record.GRAD_BYTES: conv[0] * grad_w * tile.filters * BYTES,
        record.OVERLAP: int(overlap),
        record.BANDS: len(bands),
        record.TAP_TILES: tap_tiles,
        record.INPUT_TILES: len(input_tiles),
        record.EXACT_TILES: len(exact_tiles),
        record.PAD_RUNS: len(runs),
        record.PAD_BYTES: all_channels * padded_h * padded_w * BYTES if padded else 0,
        record.INPUT_BYTES: all_channels * height * width * BYTES,
        record.TARGET_BYTES: all_filters * (target_step if one_image else len(cell)) * BYTES,
        record.PARTIAL_BYTES: groups * filter_tiles * tile.filters * (tap_tiles * tile.taps + 1) * BYTES,
        record.TILE_FILTERS: tile.filters,
        record.TILE_CHANNELS: tile.channels,
        record.TILE_TAPS: tile.taps,
    }
    forward_weights = groups * filter_tiles * tile.filters * (products + 1)
    backward_weights = groups * channel_tiles * filter_tiles * taps * factor_bytes // 4
    forward_weights *= 1 if one_image is None else LANES
    numbers[record.PACKED_BYTES] = 4 * max(forward_weights, backward_weights)
    memory = torch.cat([torch.zeros(record.SIZE, dtype=torch.int64), *(t.flatten().long() for t in tables.values())])
    place = memory.data_ptr() + 8 * record.SIZE
    for name, table in tables.items():
        memory[name] = place
        place += 8 * table.numel()
    for name, number in numbers.items():
        memory[name] = number
    return Plan(tuple(memory[: record.SIZE].tolist()), tile, memory.data_ptr(), pooled, memory)


def _window_cells(conv: Pair, pooled: Pair, geometry: ConvPoolGeometry) -> Tensor:
    """The convolution's pixel, as a flat number, of each window and cell; -1 where a window reaches over the edge."""
    places = []
    for i in (0, 1):
        window = torch.arange(pooled[i]) * geometry.pool_stride[i] - geometry.pool_padding[i]
        places.append(window[:, None] + torch.arange(geometry.pool_size[i]) * geometry.pool_dilation[i])
    rows, columns = places[0][:, None, :, None], places[1][None, :, None, :]
    inside = (rows >= 0) & (rows < conv[0]) & (columns >= 0) & (columns < conv[1])
    return torch.where(inside, rows * conv[1] + columns, -1).reshape(pooled[0] * pooled[1], geometry.window_size)


def _order(cell: Tensor, conv: Pair) -> tuple[Tensor, Tensor]:
    """Order the pixels by the first window that needs them; pixels that none needs are left out.

    Returns:
        Each window's and cell's place in that order (-1 stays), and the pixels in that order.
    """
    pixels, flat = conv[0] * conv[1], cell.flatten()
    never = flat.numel()
    first = torch.full((pixels + 1,), never)
    first = first.scatter_reduce(0, torch.where(flat >= 0, flat, pixels), torch.arange(never), "amin")[:pixels]
    order = first.argsort(stable=True)[: int((first < never).sum())]
    rank = torch.full((pixels,), -1)
    rank[order] = torch.arange(len(order))
    return torch.where(cell >= 0, rank[cell.clamp_min(0)], -1), order


def _chunks(channels: int, taps: int) -> list[tuple[int, int, int, int]]:
    """First and last channel, first and last tap of each chain of at most `CHAIN` products."""
    if taps <= CHAIN:
        chains = _ceil(channels * taps, CHAIN)
        step = _ceil(channels, chains)
        while step * taps > CHAIN:
            step -= 1
        return [(c, min(c + step, channels), 0, taps) for c in range(0, channels, step)]
    return [(c, c + 1, t, min(t + CHAIN, taps)) for c in range(channels) for t in range(0, taps, CHAIN)]


def _flat_chunks(products: int) -> list[tuple[int, int, int, int]]:
    """Likewise where one table holds the taps of all channels."""
    chains = _ceil(products, CHAIN)
    step = _ceil(products, chains)
    return [(0, 1, first, min(first + step, products)) for first in range(0, products, step)]


def _bands(position: Tensor, overlap: bool) -> list[tuple[int, int, int, int]]:
    """First and last window whose gradient is taken next, and first and last pixel that can be worked off then.

    Where windows overlap all must have been taken before the first pixel is complete.
    """
    windows, pixels = len(position), int(position.max()) + 1
    if overlap:
        return [(0, 0 if i else windows, i, min(i + BAND, pixels)) for i in range(0, max(pixels, 1), BAND)]
    ends = position.amax(1).cummax(0).values + 1
    bands, first, done = [], 0, 0
    while first < windows:
        last = max(first + 1, int(torch.searchsorted(ends, done + BAND, right=True)))
        bands.append((first, last, done, int(ends[last - 1])))
        first, done = last, int(ends[last - 1])
    return bands


def _input_tiles(
    size: Pair, kernel: Pair, conv: Pair, geometry: ConvPoolGeometry, tile: Tile, bytes: Pair, together: int
) -> tuple[Tensor, Tensor]:
    """Tables for the gradient of the input: what reaches each tile of its pixels.

    Pixel (i, j) of the (padded) input meets tap k at row (i - k * dilation) / stride of the convolution, if that is an
    integer and a row; columns likewise. A tile's pixels lie in one row, a stride apart, so that tap by tap they meet
    neighbours. Taps that meet no pixel of the convolution are left out: of 5x5 taps over LeNet's conv2 that is half.
    A tile whose pixels meet the edge at different taps reads zeros beyond it, from a border beside the gradient. Times
    an infinite weight they would be NaN: for such weights `together` is 1, and a tile is one pixel.

    Returns:
        A row for each tile: base in the gradient, first and last of its taps, then its pixels' places (-1 beyond the
        row); and a row for each tap: offset in the gradient, and of the weight. `bytes` says how far pixels lie apart,
        and how far the weights of two taps.
    """
    pixels, border, (step, factor) = tile.input_pixels, tile.input_pixels - 1, bytes
    grad_w = conv[1] + 2 * border

    def meets(i: int, place: int, reach: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """A base, and relative to it the pixels that `reach` pixels from `place` on meet, tap by tap."""
        stride = geometry.stride[i]
        base, found = (place + geometry.padding[i]) // stride, []
        for k in range(kernel[i]):
            there, rest = divmod(place + geometry.padding[i] - k * geometry.dilation[i], stride)
            if rest == 0 and there + reach > 0 and there < conv[i]:
                found.append((k, there - base))
        return base, tuple(found)

    columns = []
    for phase in range(min(geometry.stride[1], size[1])):
        places = list(range(phase, size[1], geometry.stride[1]))
        for start in range(0, len(places), together):
            own = places[start : start + together]
            columns.append((*meets(1, own[0], len(own)), own + [-1] * (pixels - len(own))))
    kinds: dict[object, tuple[int, int]] = {}
    taps: list[tuple[int, int]] = []
    tiles = []
    for row in range(size[0]):
        base_h, rows = meets(0, row, 1)
        for base_w, beside, own in columns:
            if (rows, beside) not in kinds:
                first = len(taps)
                for kernel_h, h in rows:
                    for kernel_w, w in beside:
                        offset = (h * grad_w + w) * tile.filters * BYTES
                        taps.append((offset, (kernel_h * kernel[1] + kernel_w) * factor))
                kinds[rows, beside] = first, len(taps)
            base = (base_h * grad_w + base_w + border) * tile.filters * BYTES
            tiles.append((base, *kinds[rows, beside], *(-1 if j < 0 else (row * size[1] + j) * step for j in own)))
    return torch.tensor(tiles), torch.tensor(taps, dtype=torch.int64).reshape(-1, 2)


def _pad_runs(channels: int, size: Pair, padding: Pair, last: bool) -> list[tuple[int, int, int]]:
    """Each run of pixels that padding keeps together: offset in the images, offset in the padded ones, and size."""
    (height, width), (pad_h, pad_w) = size, padding
    depth, planes = (channels, 1) if last else (1, channels)
    padded_h, padded_w = height + 2 * pad_h, width + 2 * pad_w
    return [
        (
            (plane * height + row) * width * depth * BYTES,
            ((plane * padded_h + row + pad_h) * padded_w + pad_w) * depth * BYTES,
            width * depth * BYTES,
        )
        for plane in range(planes)
        for row in range(height)
    ]
