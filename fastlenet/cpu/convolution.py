"""Kernels of max_pool2d(relu(conv2d(input, weight, bias))) for a block of 16 images, and of its gradients.

With X the (padded) input, C the convolution's pixels, and each window w a list of pixels of C:

    C[o, p]  = bias[o] + sum over c, t of  weight[o, c, t] * X[c, p + t]
    Y[o, w]  = max(0, C[o, p] over the pixels p of w),   A[o, w] = the winning cell, NO_WINNER where none is above 0
    G[o, p]  = sum over the windows w that p won of  grad_Y[o, w]
    grad_weight[o, c, t] = sum over images and p of  G[o, p] * X[c, p + t]
    grad_X[c, i]         = sum over o, t of  G[o, i - t] * weight[o, c, t]

Layout. Every number stands 16 times, once for each image of the block: X is [channel, pixel, image], so that any
pixel is one aligned vector and the inner loops never see a window, a stride or an edge. `plan` has turned these into
offsets. All three sums have one form, ``tile[i, j] += rows[i] * columns[j]``, with as many vectors of sums as the
registers hold:

    ============  =====================  =======================  =============
    sum           rows                   columns                  runs over
    ============  =====================  =======================  =============
    forward       pixels of X            weights of filters       channels, taps
    grad_weight   taps of X              filters of G             pixels
    grad_X        pixels of G            weights of channels      filters, taps
    ============  =====================  =======================  =============

A weight is one number for all images and is spread over a vector as it is loaded. With AVX-512 a tile of 4 x 6 takes
10 loads and 24 FMAs for each step of the sum. With AVX2 a vector takes two registers and a tile of 3 x 2 takes 8 loads
and 12 FMAs. Both keep the FMA units of a core busy.

Of one image, 16 filters or channels are the lanes instead, and rows are spread: see `image`. The loops are the same.

C is computed in the order in which windows need it; a window is pooled once its last pixel is there, out of the
first-level cache. G exists for a few filters at a time. So an image costs 2 * O * C * T * P FLOP for each of the three
sums, and nothing at the convolution's resolution leaves the core. Every sum is broken into chains of at most
`CHAIN` products.
"""

from __future__ import annotations

from typing import Any

from . import record
from .lanes import (
    add,
    add_products,
    add_to_memory,
    byte_at,
    field,
    float_at,
    inlined,
    kernel,
    larger,
    load,
    load_bytes_first,
    load_first,
    long_at,
    longs_at,
    repeat,
    set_byte,
    set_float,
    set_long,
    splat,
    splat_each,
    spread,
    spread_int,
    store,
    store_bytes_first,
    store_first,
    total,
    transpose,
    transpose_bytes,
    where_equal,
    where_not_equal,
    winner,
    zeros,
)
from .plan import BYTES, CHAIN, LANES

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


def clear() -> Any:
    """Return the kernel that fills memory with zeros."""

    @kernel(2)
    def clear(address, size):
        """Fill so many bytes, whole vectors."""
        fill(address, size)

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


# --- backward ------------------------------------------------------------------------------------------------------


def pack_backward() -> Any:
    """Return the kernel that lays the weights out as the input's gradient reads them."""

    @kernel(4)
    def pack_backward(plan, weight, packed, spoiled):
        """Write [group, pass over channels, pass over filters, tap, filter of the pass, channel of the pass].

        Zero where a last pass has fewer of either. weight: [group, filter, channel, tap]; spoiled: where to write 1 if
        a weight is not finite, else 0.
        """
        rest = 0.0
        own, depth, taps = field(plan, record.FILTERS), field(plan, record.CHANNELS), field(plan, record.TAPS)
        filters, channels = field(plan, record.TILE_FILTERS), field(plan, record.TILE_CHANNELS)
        for _ in range(field(plan, record.GROUPS)):
            for first_channel in range(0, depth, channels):
                for first_filter in range(0, own, filters):
                    for t in range(taps):
                        for o in range(first_filter, first_filter + filters):
                            for c in range(first_channel, first_channel + channels):
                                live = o < own and c < depth
                                value = float_at(weight + 4 * ((o * depth + c) * taps + t)) if live else 0.0
                                set_float(packed, value)
                                rest += 0.0 * value
                                packed += 4
            weight += 4 * own * depth * taps
        set_long(spoiled, 0 if rest == 0.0 else 1)

    return pack_backward


def backward_block(filters: int, taps: int, channels: int, input_pixels: int, one_image: int = 0) -> Any:
    """Return the kernel of the gradients, for tiles of `taps` x `filters` and of `input_pixels` x `channels`.

    With `one_image` lanes are filters, and of the input's gradient channels. With neither channels nor pixels it
    computes no gradient of the input, as for a network's first layer.
    """
    columns, beside = (0,) * filters, vectors(filters)
    tap_rows, tap_tile = (0,) * taps, vectors(taps * filters)
    input_rows = tuple(BYTES * filters * i for i in range(input_pixels))
    input_columns = (0,) * channels
    at_rows = splat_each if one_image else load
    if one_image:
        at_columns, like, each, unit = load, vectors(channels), 4, BYTES * channels
        width, square = LANES * filters, LANES * LANES
    else:
        at_columns, like, each, unit = splat, input_columns, BYTES, 4 * channels
        width, square = filters, 1
    together = max(1, CHAIN // width)

    @inlined
    def unpool(plan, first, last, grad_target, argmax, live, grad_conv, grad_bias):
        """Write G for some windows and a pass of filters, and add its sums to the gradients of the biases."""
        step, cells, offsets = field(plan, record.TARGET_STEP), field(plan, record.CELLS), field(plan, record.TARGET)
        overlap, places = field(plan, record.OVERLAP), field(plan, record.GRAD_CELL)
        sums = zeros((0,), columns)
        for window in range(first, last):
            offset = field(offsets, window)
            grad = load_first(grad_target + offset, step, live, columns)
            arg = load_bytes_first(argmax + (offset >> 2), step >> 2, live, columns)
            sums = add(sums, where_not_equal(arg, NO_WINNER, grad))
            for cell in range(cells):
                place = long_at(places + 8 * (window * cells + cell))
                if place >= 0:
                    part = where_equal(arg, cell, grad)
                    if overlap:
                        part = add(load(grad_conv + place, beside), part)
                    store(grad_conv + place, beside, part)
        if grad_bias != 0:
            store(grad_bias, beside, add(load(grad_bias, beside), sums))

    @inlined
    def grad_weight(plan, first, last, source, grad_conv, partial):
        """Add some pixels' products with a pass of filters to the gradients of all taps of all channels.

        partial: [tile of taps, tap, filter of the pass, image].
        """
        positions, places = field(plan, record.POSITION), field(plan, record.TAP_TILE)
        for i in range(field(plan, record.TAP_TILES)):
            tap = longs_at(places + 8 * taps * i, tap_rows)
            sums = zeros(tap_rows, columns)
            for n in range(first, last):
                pixel = at_rows(source + long_at(positions + 16 * n), tap)
                sums = add_products(sums, pixel, load(grad_conv + long_at(positions + 16 * n + 8), beside))
            here = partial + BYTES * taps * filters * i
            store(here, tap_tile, add(load(here, tap_tile), sums))

    if channels:

        @inlined
        def grad_input(plan, exact, first_filter, grad_conv, weights, grad_source):
            """Add to the input's gradient what comes through a pass of filters."""
            depth, pass_step = field(plan, record.CHANNELS), 4 * square * channels * filters * field(plan, record.TAPS)
            # Lanes that are no filter may hold NaN.
            live = min(width, field(plan, record.ALL_FILTERS) - LANES * first_filter) if one_image else width
            tables = plan + 8 * (record.EXACT_TILES - record.INPUT_TILES) if exact else plan
            number, tiles = field(tables, record.INPUT_TILES), field(tables, record.INPUT_TILE)
            tap = field(tables, record.INPUT_TAP)
            step, passes = field(plan, record.INPUT_STEP), field(plan, record.FILTER_TILES)
            for first in range(0, depth, channels):
                for i in range(number):
                    here = tiles + 8 * (3 + input_pixels) * i
                    pixels, end = grad_conv + long_at(here), long_at(here + 16)
                    for start in range(long_at(here + 8), end, together):
                        sums = zeros(input_rows, input_columns)
                        for t in range(start, min(start + together, end)):
                            place, factor = pixels + long_at(tap + 16 * t), weights + long_at(tap + 16 * t + 8)
                            for j in range(live):
                                grad = at_rows(place + each * j, input_rows)
                                values = at_columns(factor + unit * j, like)
                                sums = add_products(sums, grad, values)
                        add_to_memory(grad_source, here + 24, input_rows, step, min(channels, depth - first), sums)
                weights += passes * pass_step
                grad_source += channels * step

    else:

        @inlined
        def grad_input(plan, exact, first_filter, grad_conv, weights, grad_source):
            """Compute nothing."""

    @kernel(9)
    def backward_block(plan, source, weights, exact, grad_target, argmax, grad_source, partial, grad_conv):
        """Compute the gradients of a block.

        source: X. weights: as `pack_backward` lays them out; exact: whether one is not finite.
        grad_target, argmax: [filter, window, image].
        grad_source: [channel, pixel, image], or 0
        if not asked for. partial: sums of the gradients of weight and bias that are added to, [pass]([tap, filter of
        the pass, image], [filter of the pass, image]), or 0. grad_conv: scratch for G of one pass of filters,
        [pixel, filter of the pass, image] with a border of zeros left and right of each row.
        """
        depth, own, all_taps = field(plan, record.CHANNELS), field(plan, record.FILTERS), field(plan, record.TAPS)
        source_step, target_step = field(plan, record.SOURCE_STEP), field(plan, record.TARGET_STEP)
        input_step, size = field(plan, record.INPUT_STEP), field(plan, record.TAP_TILES) * taps * filters * BYTES
        bands, band = field(plan, record.BANDS), field(plan, record.BAND)
        overlap, grad_bytes = field(plan, record.OVERLAP), field(plan, record.GRAD_BYTES)
        if grad_source != 0:
            fill(grad_source, field(plan, record.INPUT_BYTES))
        if grad_source != 0 and not overlap:
            fill(grad_conv, grad_bytes)
        for _ in range(field(plan, record.GROUPS)):
            factors = weights
            for first in range(0, own, filters):
                live = min(filters, own - first)
                if overlap:
                    fill(grad_conv, grad_bytes)
                # G of a band of windows stays in the first-level cache while all taps pass over it.
                for i in range(bands):
                    here = band + 32 * i
                    grad_bias = partial + size if partial != 0 else 0
                    begin, end = long_at(here), long_at(here + 8)
                    unpool(plan, begin, end, grad_target, argmax, live, grad_conv, grad_bias)
                    if partial != 0:
                        grad_weight(plan, long_at(here + 16), long_at(here + 24), source, grad_conv, partial)
                if grad_source != 0:
                    grad_input(plan, exact, first, grad_conv, factors, grad_source)
                factors += 4 * square * channels * filters * all_taps
                if partial != 0:
                    partial += size + BYTES * filters
                grad_target += live * target_step
                argmax += live * (target_step >> 2)
            source += depth * source_step
            weights += (
                4 * field(plan, record.CHANNEL_TILES) * channels * field(plan, record.FILTER_TILES) * filters * all_taps
            )
            if grad_source != 0:
                grad_source += depth * input_step

    return backward_block


def sum_lanes() -> Any:
    """Return the kernel that sums a task's partial sums over the images."""

    @kernel(3)
    def sum_lanes(plan, partial, sums):
        """Write the weights' sums as [filter, channel, tap], then the biases'."""
        own, depth = field(plan, record.FILTERS), field(plan, record.CHANNELS) * field(plan, record.TAPS)
        taps, filters = field(plan, record.TILE_TAPS), field(plan, record.TILE_FILTERS)
        size = BYTES * filters * taps * field(plan, record.TAP_TILES)
        biases = sums + 4 * field(plan, record.GROUPS) * own * depth
        for _ in range(field(plan, record.GROUPS)):
            for first in range(0, own, filters):
                for j in range(min(filters, own - first)):
                    for i in range(depth):
                        set_float(sums, total(partial + BYTES * (filters * i + j)))
                        sums += 4
                    set_float(biases, total(partial + size + BYTES * j))
                    biases += 4
                partial += size + BYTES * filters

    return sum_lanes
