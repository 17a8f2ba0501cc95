"""The window arithmetic of a convolution and its pool as tables of offsets: what `record` names, filled in.

A plan holds for every number of images. It is made once for each kind of call and kept, so the kernels do no arithmetic
of windows at all: a pixel, a tap and a window are offsets to them. That is how one loop nest serves every stride,
padding, dilation and pool, and how both layouts of images (channel by channel, or pixel by pixel as in channels_last)
are the same to it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, Pair

from . import record
from .compiled import address, register_vectors
from .memory import on_cpu

LANES = 16
"""Images of a block: one to a lane."""

BYTES = 4 * LANES
"""Size of a number of every image of a block."""

CHAIN = 160
"""Products that are added one after the other at most; longer sums are made of several.

From some 288 on the error of one chain is more than twice stock's.
"""

ENTRY = 16
"""Size of an entry of a list of winners: an address and a gradient."""


class Tile(NamedTuple):
    """Sizes of the tile that the forward keeps in registers; the kernel is compiled for them.

    Attributes:
        filters: a pass computes; with filters as lanes, vectors of 16.
        pixels: of the convolution's output at a time.
    """

    filters: int
    pixels: int


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

    Each is compiled at its first use, so they are few.

    Attributes:
        filters: for each width of a pass: pixels, and how fast the pass is when full.
        one_image: tile where the lanes are filters of one image.
        winners: vectors of sums of the gradients.
        linear: tiles of linear layers.
    """

    filters: dict[int, tuple[int, float]]
    one_image: Tile
    winners: tuple[int, ...]
    linear: LinearTile


_TILES = {
    32: _Tiles(
        {1: (8, 0.6), 2: (8, 0.85), 4: (4, 1.0), 5: (4, 1.0), 6: (4, 1.0)},
        Tile(1, 8),
        (3, 5, 9, 10),
        LinearTile(16, 2, 8),
    ),
    8: _Tiles({1: (5, 0.7), 2: (3, 1.0)}, Tile(1, 5), (3, 5, 6), LinearTile(4, 2, 3)),
}
"""By the vectors of 16 that the registers hold: a tile's sums and one row must fit, and FMA units need 4 to 8 sums."""


def tile_of(filters: int) -> Tile:
    """Choose the tile of this CPU; empty places of the last pass cost as much as others."""
    tiles = _TILES[register_vectors()].filters
    wide = min(tiles, key=lambda width: (_ceil(filters, width) * width / tiles[width][1], -width))
    return Tile(wide, tiles[wide][0])


def linear_tile() -> LinearTile:
    """Return a linear layer's tiles on this CPU."""
    return _TILES[register_vectors()].linear


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
        input_last: whether images lie pixel by pixel (channels_last).
        target_last: whether pooled images do.
        one_image: how one image lies, where filters and channels are the lanes; without padding, and of one group.
    """
    (all_channels, height, width), (all_filters, channels, *kernel) = input, weight
    filters, groups = all_filters // geometry.groups, geometry.groups
    tile = tile_of(filters) if one_image is None else _TILES[register_vectors()].one_image
    taps = kernel[0] * kernel[1]
    (pad_h, pad_w), (gap_h, gap_w), (step_h, step_w) = geometry.padding, geometry.dilation, geometry.stride
    padded_h, padded_w = height + 2 * pad_h, width + 2 * pad_w
    conv = geometry.conv_size((height, width), (kernel[0], kernel[1]))
    pooled = geometry.pooled_size(conv)
    padded = bool(pad_h or pad_w)
    source_pixel, source_step = (all_channels, 1) if input_last else (1, padded_h * padded_w)
    target_pixel, target_step = (all_filters, 1) if target_last else (1, pooled[0] * pooled[1])
    pixel_bytes, channel_at = source_pixel * BYTES, torch.arange(channels) * source_step * BYTES
    if one_image is not None:
        if one_image.lanes:
            channel_at = torch.arange(channels) // LANES * source_step * BYTES + torch.arange(channels) % LANES * 4
        else:
            pixel_bytes, channel_at = 4, torch.arange(channels) * source_step * 4

    cell = window_cells(conv, pooled, geometry)
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

    products = channels * taps
    chunks, windows = _chunks(channels, taps), torch.arange(len(cell))
    if one_image is not None:
        tap = (channel_at[:, None] + tap).flatten()
        chunks = [(0, 1, 0, products)] if products <= CHAIN else _flat_chunks(products)
        windows, target_step = one_image.placed(windows, pooled)
        filters = all_filters = _ceil(filters, LANES)
    runs = _pad_runs(all_channels, (height, width), geometry.padding, input_last) if padded else []
    tables = {
        record.PIXELS: pixels,
        record.READY: ready,
        record.CHUNK: torch.tensor(chunks),
        record.TAP: tap,
        record.CELL: torch.where(position >= 0, position * tile.filters * BYTES, -1),
        record.EMPTY: (position < 0).all(1),
        record.TARGET: windows * target_pixel * BYTES,
        record.PAD_RUN: torch.tensor(runs, dtype=torch.int64),
    }
    numbers = {
        record.GROUPS: groups,
        record.CHANNELS: channels,
        record.FILTERS: filters,
        record.TAPS: taps,
        record.PRODUCTS: products,
        record.SOURCE_STEP: source_step * BYTES,
        record.TARGET_STEP: target_step * BYTES,
        record.PIXEL_TILES: tiles,
        record.CHUNKS: len(chunks),
        record.CELLS: geometry.window_size,
        record.CONV_BYTES: tiles * tile.pixels * tile.filters * BYTES,
        record.PAD_RUNS: len(runs),
        record.PAD_BYTES: all_channels * padded_h * padded_w * BYTES if padded else 0,
        record.TARGET_BYTES: all_filters * (target_step if one_image else len(cell)) * BYTES,
        record.TILE_FILTERS: tile.filters,
    }
    packed = groups * _ceil(filters, tile.filters) * tile.filters * (products + 1)
    numbers[record.PACKED_BYTES] = packed * (4 if one_image is None else BYTES)
    memory = _table(record.FORWARD_SIZE, numbers, tables)
    return Plan(tuple(memory[: record.FORWARD_SIZE].tolist()), tile, memory.data_ptr(), pooled, memory)


def window_cells(conv: Pair, pooled: Pair, geometry: ConvPoolGeometry) -> Tensor:
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


class Gradients(NamedTuple):
    """A table for the kernel of the gradients, and what its launchers must know.

    Attributes:
        address: where the table lies.
        packed_bytes: of the weights as the input's gradient reads them.
        scratch_bytes: what the kernel needs.
        memory: the table and the tables that it refers to.
    """

    address: int
    packed_bytes: int
    scratch_bytes: int
    memory: Tensor


Steps: TypeAlias = tuple[int, int, int, int]
"""Bytes from image to image, channel to channel, row to row and column to column."""


def steps_of(shape: tuple[int, ...], image: int = 0, last: bool = False) -> Steps:
    """Return the steps of dense float32 images, in channels_last or plainly, `image` bytes apart."""
    channels, height, width = shape
    return (image, 4, 4 * channels * width, 4 * channels) if last else (image, 4 * height * width, 4 * width, 4)


@functools.lru_cache(maxsize=512)
@on_cpu
def gradients_of(
    input: tuple[int, int, int],
    weight: tuple[int, int, int, int],
    geometry: ConvPoolGeometry,
    source: Steps,
    grad: Steps,
    argmax: Steps,
    target: Steps | None,
) -> Gradients:
    """Plan gradients of calls of one shape.

    Args:
        input: channels, height, width.
        weight: its shape.
        geometry: of the convolution and the pool.
        source: how the images lie.
        grad: how the pooled output's gradient lies.
        argmax: how its winners lie.
        target: how the images' gradient lies; None if it is not asked for.
    """
    (_, height, width), (all_filters, depth, *kernel) = input, weight
    groups, filters, taps = geometry.groups, all_filters // geometry.groups, kernel[0] * kernel[1]
    (pad_h, pad_w), (gap_h, gap_w), (step_h, step_w) = geometry.padding, geometry.dilation, geometry.stride
    padded_h, padded_w = height + 2 * pad_h, width + 2 * pad_w
    conv = geometry.conv_size((height, width), (kernel[0], kernel[1]))
    pooled = geometry.pooled_size(conv)
    pixel, pitch = 4 * depth, 4 * depth * padded_w
    # A run of neighbouring numbers: a row of the kernel, or a single tap where taps lie apart.
    together = kernel[1] if gap_w == 1 else 1
    run = together * depth
    each = _ceil(run, LANES)
    starts = [h * gap_h * pitch + w * gap_w * pixel for h in range(kernel[0]) for w in range(0, kernel[1], together)]
    vector = [start + BYTES * v for start in starts for v in range(each)]
    sums = min(_TILES[register_vectors()].winners, key=lambda sums: (_ceil(len(vector), sums) * (sums + 1), sums))
    tiles = _ceil(len(vector), sums)
    vector += vector[-1:] * (tiles * sums - len(vector))
    mask = torch.zeros(tiles * sums, LANES, dtype=torch.uint8)
    mask[: len(starts) * each] = (torch.arange(each * LANES) < run).view(each, LANES).repeat(len(starts), 1)
    channel, tap = torch.meshgrid(torch.arange(depth), torch.arange(taps), indexing="ij")
    in_run = tap % together * depth + channel
    lane = tap // together * each * BYTES + in_run * 4
    row_step, column_step = step_h * pitch, step_w * pixel
    rows, columns = (
        torch.arange(geometry.pool_size[i]) * geometry.pool_dilation[i] - geometry.pool_padding[i] for i in (0, 1)
    )
    tables = {
        record.CELL_OFFSET: F.pad((rows[:, None] * row_step + columns * column_step).flatten(), (1, 0)),
        record.VECTOR: torch.tensor(vector),
        record.MASK: mask.flatten().view(torch.int64),
        record.LANE: lane,
    }
    row, plane = BYTES * tiles * sums, padded_h * pitch
    numbers = {
        record.GROUPS: groups,
        record.CHANNELS: depth,
        record.FILTERS: filters,
        record.PRODUCTS: depth * taps,
        record.CELLS: geometry.window_size,
        record.POOLED_ROWS: pooled[0],
        record.POOLED_COLUMNS: pooled[1],
        record.CONV_ROWS: conv[0],
        record.CONV_COLUMNS: conv[1],
        record.CONV_ROW_STEP: row_step,
        record.CONV_COLUMN_STEP: column_step,
        record.WINDOW_ROW_STEP: geometry.pool_stride[0] * row_step,
        record.WINDOW_COLUMN_STEP: geometry.pool_stride[1] * column_step,
        record.ROWS: height,
        record.COLUMNS: width,
        record.PITCH: pitch,
        record.FIRST: pad_h * pitch + pad_w * pixel,
        record.PLANE_BYTES: plane,
        # The last run ends up to a vector behind the frame.
        record.FRAME_BYTES: _ceil(groups * plane, BYTES) * BYTES + BYTES,
        record.TILES: tiles,
        record.ADD_WINNERS: address("gradients", "add_winners", sums),
        record.ADD_WINDOWS: address("gradients", "add_windows", sums) if target else 0,
        record.ROW_BYTES: row,
        record.BIAS_BYTES: _ceil(4 * all_filters, BYTES) * BYTES,
        record.DENSE_BYTES: _ceil(plane // depth, BYTES) * BYTES,
    }
    for first, steps in (
        (record.SOURCE_STEPS, source),
        (record.GRAD_STEPS, grad),
        (record.ARGMAX_STEPS, argmax),
        (record.TARGET_STEPS, target or (0, 0, 0, 0)),
    ):
        numbers |= {first + i: step for i, step in enumerate(steps)}
    places = 8 * _ceil(max(pooled[0] * pooled[1], conv[0] * conv[1]) + 1, 8) * 8
    numbers[record.LIST_BYTES] = places
    memory = _table(record.GRADIENTS_SIZE, numbers, tables)
    packed = row * all_filters
    lists = max(places + places // 2 + BYTES, (geometry.window_size + 1) * (8 + ENTRY * filters))
    fixed = 2 * numbers[record.FRAME_BYTES] + numbers[record.BIAS_BYTES] + numbers[record.DENSE_BYTES]
    return Gradients(memory.data_ptr(), BYTES + packed, packed + fixed + lists, memory)


def _table(size: int, numbers: dict[int, int], tables: dict[int, Tensor]) -> Tensor:
    """Return a table of so many integers with all tables that it refers to behind it."""
    memory = torch.cat([torch.zeros(size, dtype=torch.int64), *(t.flatten().long() for t in tables.values())])
    place = memory.data_ptr() + 8 * size
    for name, table in tables.items():
        memory[name] = place
        place += 8 * table.numel()
    for name, number in numbers.items():
        memory[name] = number
    return memory
