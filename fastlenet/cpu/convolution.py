"""Kernels of max_pool2d(relu(conv2d(input, weight, bias))) for a block of 16 images; `gradients` has the backward.

With X the (padded) input, C the convolution's pixels, and each window w a list of pixels of C:

    C[o, p]  = bias[o] + sum over c, t of  weight[o, c, t] * X[c, p + t]
    Y[o, w]  = max(0, C[o, p] over the pixels p of w),   A[o, w] = the winning cell, NO_WINNER where none is above 0

Layout. Every number stands 16 times, once for each image of the block: X is [channel, pixel, image], so that any
pixel is one aligned vector and the inner loops never see a window, a stride or an edge. `plan` has turned these into
offsets. The sum is ``tile[i, j] += rows[i] * columns[j]`` over channels and taps, with pixels of X as rows, weights of
filters as columns, and as many vectors of sums as the registers hold.

A weight is one number for all images and is spread over a vector as it is loaded. With AVX-512 a tile of 4 x 6 takes
10 loads and 24 FMAs for each step of the sum. With AVX2 a vector takes two registers and a tile of 3 x 2 takes 8 loads
and 12 FMAs. Both keep the FMA units of a core busy.

Of one image, 16 filters are the lanes instead, and rows are spread: see `image`. The loops are the same.

C is computed in the order in which windows need it; a window is pooled once its last pixel is there, out of the
first-level cache. An image costs 2 * O * C * T * P FLOP, and nothing at the convolution's resolution leaves the core.
Every sum is broken into chains of at most `CHAIN` products.
"""

from __future__ import annotations

from typing import Any

from . import record
from .lanes import (
    add,
    add_products,
    byte_at,
    field,
    float_at,
    inlined,
    kernel,
    larger,
    load,
    long_at,
    longs_at,
    repeat,
    set_byte,
    set_float,
    splat,
    splat_each,
    spread,
    spread_int,
    store,
    store_bytes_first,
    store_first,
    transpose,
    transpose_bytes,
    winner,
    zeros,
)
from .plan import BYTES, LANES

NO_WINNER = 255
INFINITY = float("inf")


def vectors(count: int) -> tuple[int, ...]:
    """Offsets of so many consecutive vectors."""
    return tuple(BYTES * i for i in range(count))


@inlined
def fill(address, size):
    """Fill memory with zeros, a vector at a time."""
    for offset in range(0, size, BYTES):
        store(address + offset, (0,), zeros((0,), (0,)))


@inlined
def clear_bytes(address, size):
    """Fill so many bytes, whole numbers, with zeros."""
    whole = size - size % BYTES
    fill(address, whole)
    for offset in range(whole, size, 4):
        set_float(address + offset, 0.0)


def clear() -> Any:
    """Return the kernel that fills memory with zeros."""

    @kernel(2)
    def clear(address, size):
        clear_bytes(address, size)

    return clear


# --- images and lanes ----------------------------------------------------------------------------------------------


def exchange() -> Any:
    """Return the kernel that turns images into lanes and back."""

    @kernel(7)
    def exchange(to_lanes, size, images, step, count, lanes, numbers):
        """Copy `count` images of so many numbers, `step` bytes apart, to lanes, or back.

        A number has `size` bytes, 4 or 1. The last image stands for those that are missing among the lanes. 16 numbers
        of 16 images are transposed at a time; the last 16 overlap those before if need be.
        """
        width = LANES * size
        if numbers < LANES:
            for i in range(numbers):
                for n in range(LANES if to_lanes else count):
                    image, lane = images + step * n + size * i, lanes + width * i + size * n
                    for byte in range(size):
                        if to_lanes:
                            set_byte(lane + byte, byte_at(image + byte) if n < count else 0)
                        else:
                            set_byte(image + byte, byte_at(lane + byte))
            return
        for i in range(0, numbers, LANES):
            start = min(i, numbers - LANES)
            image, lane = images + size * start, lanes + width * start
            source, source_step, last = (image, step, count - 1) if to_lanes else (lane, width, LANES - 1)
            target, target_step, stored = (lane, width, LANES) if to_lanes else (image, step, count)
            if size == 1:
                transpose_bytes(source, source_step, last, target, target_step, stored)
            else:
                transpose(source, source_step, last, target, target_step, stored)

    return exchange


def pad() -> Any:
    """Return the kernel that pads a block of images."""

    @kernel(3)
    def pad(plan, images, padded):
        """Copy the images into a frame that was filled with zeros before."""
        runs = field(plan, record.PAD_RUN)
        for i in range(field(plan, record.PAD_RUNS)):
            source, target = images + long_at(runs + 24 * i), padded + long_at(runs + 24 * i + 8)
            for offset in range(0, long_at(runs + 24 * i + 16), BYTES):
                store(target + offset, (0,), load(source + offset, (0,)))

    return pad


# --- forward -------------------------------------------------------------------------------------------------------


def pack_forward() -> Any:
    """Return the kernel that lays the weights out as the forward reads them."""

    @kernel(4)
    def pack_forward(plan, weight, bias, packed):
        """Write for each pass its biases, then its weights.

        weight: [group, filter, channel, tap]; packed: [group, pass]([filter of the pass], [channel, tap, filter of
        the pass]), zero where the last pass of a group has fewer filters.
        """
        own, depth = field(plan, record.FILTERS), field(plan, record.CHANNELS) * field(plan, record.TAPS)
        filters = field(plan, record.TILE_FILTERS)
        for group in range(field(plan, record.GROUPS)):
            for first in range(0, own, filters):
                for j in range(filters):
                    number = group * own + first + j
                    live = first + j < own
                    set_float(packed + 4 * j, float_at(bias + 4 * number) if live and bias != 0 else 0.0)
                    place = packed + 4 * (filters + j)
                    for i in range(depth):
                        set_float(place, float_at(weight + 4 * (number * depth + i)) if live else 0.0)
                        place += 4 * filters
                packed += 4 * filters * (depth + 1)

    return pack_forward


def forward_block(filters: int, pixels: int, with_argmax: int, one_image: int = 0) -> Any:
    """Return the kernel of the forward, for tiles of `pixels` x `filters`; with `one_image` lanes are filters."""
    rows, columns = (0,) * pixels, (0,) * filters
    tile, beside = vectors(pixels * filters), vectors(filters)
    at_rows, at_columns, like, unit = (splat_each, load, beside, BYTES) if one_image else (load, splat, columns, 4)

    @inlined
    def pool(plan, window, conv, target, argmax, step, byte_step, live):
        """Reduce a window to its largest cell above 0 and that cell's number, and store them for `live` filters.

        relu comes last: what is not above 0 loses against the 0 it starts from. NaN wins always, as in max_pool2d.
        """
        floor = -INFINITY if field(field(plan, record.EMPTY), window) else 0.0
        best, arg = spread(floor, columns), spread_int(NO_WINNER, columns)
        cells = field(plan, record.CELLS)
        place = field(plan, record.CELL) + 8 * window * cells
        for cell in range(cells):
            offset = long_at(place + 8 * cell)
            if offset >= 0:
                values = load(conv + offset, beside)
                if with_argmax:
                    arg = winner(arg, best, values, cell)
                best = larger(best, values)
        offset = field(field(plan, record.TARGET), window)
        store_first(target + offset, step, live, best)
        if with_argmax:
            store_bytes_first(argmax + (offset >> 2), byte_step, live, arg)

    @kernel(6)
    def forward_block(plan, source, weights, target, argmax, conv):
        """Compute pooled values and argmax of a block.

        source: X. weights: as `pack_forward` lays them out. target, argmax: [filter, window, image] (or window by
        window), float32 and bytes. conv: scratch for C of one pass, [pixel, filter of the pass, image].
        """
        channels, taps, own = field(plan, record.CHANNELS), field(plan, record.TAPS), field(plan, record.FILTERS)
        source_step, target_step = field(plan, record.SOURCE_STEP), field(plan, record.TARGET_STEP)
        positions, tap, chunk = field(plan, record.PIXELS), field(plan, record.TAP), field(plan, record.CHUNK)
        ready = field(plan, record.READY)
        for _ in range(field(plan, record.GROUPS)):
            for first in range(0, own, filters):
                live = min(filters, own - first)
                biases, packed = weights, weights + unit * filters
                pooled = 0
                for i in range(field(plan, record.PIXEL_TILES)):
                    places = longs_at(positions + 8 * pixels * i, rows)
                    here = conv + BYTES * pixels * filters * i
                    for k in range(field(plan, record.CHUNKS)):
                        sums = zeros(rows, columns) if k else repeat(rows, at_columns(biases, like))
                        start, end = long_at(chunk + 32 * k + 16), long_at(chunk + 32 * k + 24)
                        for c in range(long_at(chunk + 32 * k), long_at(chunk + 32 * k + 8)):
                            channel = source + c * source_step
                            factor = packed + unit * filters * c * taps
                            for t in range(start, end):
                                pixel = at_rows(channel + long_at(tap + 8 * t), places)
                                sums = add_products(sums, pixel, at_columns(factor + unit * filters * t, like))
                        if k:
                            sums = add(load(here, tile), sums)
                        store(here, tile, sums)
                    complete = field(ready, i)
                    while pooled < complete:
                        pool(plan, pooled, conv, target, argmax, target_step, target_step >> 2, live)
                        pooled += 1
                weights = packed + unit * filters * field(plan, record.PRODUCTS)
                target += live * target_step
                argmax += live * (target_step >> 2)
            source += channels * source_step

    return forward_block
