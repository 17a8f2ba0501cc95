"""Kernels of BatchNorm, relu and max-pool in one: lanes are 16 channels of a pixel, in channels_last.

BatchNorm needs the whole batch before it can normalise a number, so that there are two passes each way, with a few
numbers for each channel in between. Neither the normalised batch nor its gradient is ever in memory.

============  ==========================================================================================
``moments``   each image's sums of ``x - pivot`` and of its square; the pivot is nearly the image's mean
``factors``   from these the factors of each channel, and the running statistics
``pool``      ``max(0, max over a window of scale * x + shift)``, and which cell it was
``sums``      each image's sums of the gradient, and of the gradient times ``x - mean``, at those cells
``slopes``    from these the gradients of weight and bias, and the factors of the input's gradient
``grad``      ``slope * (x - mean) + level``, and at those cells ``scale * gradient`` besides
``lay_out``   from the plain layout to channels_last, or back, for a convolution that runs in the plain layout
``fold``      in eval mode: weight and bias of the convolution that equals one with BatchNorm behind it
============  ==========================================================================================

A task is up to 64 channels of an image. Sums are those of an image, so that tasks do not change them. Sums of up to
`CHAIN` numbers are float32, and sums of these are float64, as stock's are. Squares are float32 too: numbers whose
distance from the mean is above 1e19 have an infinite variance. Other loops take as many windows at a
time, of all channels of a task, so that neighbouring memory is read together.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32, float64

from . import folding, layout
from .batch_norm_relu_max_pool2d import (
    ARGMAX,
    BIAS,
    CELL,
    CELLS,
    CHANNELS,
    EPS,
    FACTORS,
    GRAD_INPUT,
    IMAGES,
    INPUT,
    INVERSE,
    LEVEL,
    MINUS_MEAN,
    MOMENTUM,
    PADDED,
    PIVOTS,
    PIXELS,
    POOLED,
    RUNNING_MEAN,
    RUNNING_VAR,
    SCALE,
    SHIFT,
    SLOPE,
    SLOPES,
    SUMS,
    TASKS,
    VECTORS,
    WEIGHT,
    WINDOWS,
)
from .convolution import NO_WINNER
from .lanes import (
    BYTES,
    LANES,
    add,
    add_doubles,
    add_products,
    double_at,
    field,
    float_at,
    inlined,
    kernel,
    larger,
    load,
    load_bytes,
    load_lanes,
    long_at,
    set_float,
    spread,
    spread_int,
    store,
    store_bytes_first,
    store_lanes,
    take,
    transpose,
    where_equal,
    where_not_equal,
    winner,
    zeros,
)

ONE = (0,)
CHAIN = 16


@inlined
def part(job, task):
    """Return a task's image, its first channel, and the one after its last."""
    width = LANES * field(job, VECTORS)
    groups = (field(job, PADDED) + width - 1) // width
    first = width * (task % groups)
    return task // groups, first, min(first + width, field(job, CHANNELS))


@inlined
def maps(job, table, size, image, first):
    """Return the address of an image's channels among tensors of `size` pixels."""
    return field(job, table) + 4 * (image * field(job, size) * field(job, CHANNELS) + first)


@inlined
def argmaxes(job, image, first):
    """Return the address of an image's winners."""
    return field(job, ARGMAX) + image * field(job, WINDOWS) * field(job, PADDED) + first


@inlined
def operands(job, image, first, end):
    """Return the addresses of an image's pixels, pooled pixels and winners, and how many lanes are channels."""
    source, output = maps(job, INPUT, PIXELS, image, first), maps(job, POOLED, WINDOWS, image, first)
    return source, output, argmaxes(job, image, first), min(LANES, end - first)


@inlined
def sums_of(job, row, image, first):
    """Return the address of one of an image's three rows of sums."""
    return field(job, SUMS) + 8 * ((3 * image + row) * field(job, PADDED) + first)


@inlined
def factor(job, table, row, channel):
    """Return the address of a channel's factor."""
    return field(job, table) + 4 * (row * field(job, PADDED) + channel)


@inlined
def mean_of(job, image, channel):
    """Return an image's mean, and its distance from the pivot."""
    pivot = -float64(float_at(factor(job, PIVOTS, image, channel)))
    distance = double_at(sums_of(job, 1, image, channel)) / field(job, PIXELS)
    return pivot if math.isinf(pivot) else pivot + distance, distance


@inlined
def vector(job, table, row, first):
    """Load a factor of 16 channels."""
    return load(factor(job, table, row, first), ONE)


@inlined
def read(place, count):
    """Load a vector of which only some lanes are channels."""
    if count == LANES:
        return load(place, ONE)
    return load_lanes(place, ONE, count)


@inlined
def write(place, count, values):
    """Store those lanes of a vector that are channels."""
    if count == LANES:
        store(place, ONE, values)
    else:
        store_lanes(place, ONE, count, values)


def moments() -> Any:
    """Return the kernel of the images' sums."""

    @kernel(1)
    def moments(job):
        pixels, step = field(job, PIXELS), 4 * field(job, CHANNELS)
        task = take(job)
        while task < field(job, TASKS):
            image, begin, end = part(job, task)
            for start in range(0, pixels, CHAIN):
                stop = min(start + CHAIN, pixels)
                for first in range(begin, end, LANES):
                    source, count = maps(job, INPUT, PIXELS, image, first), min(LANES, end - first)
                    total = zeros(ONE, ONE)
                    for pixel in range(start, stop):
                        total = add(total, read(source + step * pixel, count))
                    add_doubles(sums_of(job, 0, image, first), total)
            for channel in range(begin, (end + LANES - 1) // LANES * LANES):
                total = double_at(sums_of(job, 0, image, channel))
                set_float(factor(job, PIVOTS, image, channel), float32(-total / pixels))
            for start in range(0, pixels, CHAIN):
                stop = min(start + CHAIN, pixels)
                for first in range(begin, end, LANES):
                    source, count = maps(job, INPUT, PIXELS, image, first), min(LANES, end - first)
                    minus = vector(job, PIVOTS, image, first)
                    total, squares = zeros(ONE, ONE), zeros(ONE, ONE)
                    for pixel in range(start, stop):
                        distance = add(read(source + step * pixel, count), minus)
                        total, squares = add(total, distance), add_products(squares, distance, distance)
                    add_doubles(sums_of(job, 1, image, first), total)
                    add_doubles(sums_of(job, 2, image, first), squares)
            task = take(job)

    return moments


def factors() -> Any:
    """Return the kernel of what stands between the statistics and the output."""

    @kernel(1)
    def factors(job):
        images, pixels = field(job, IMAGES), field(job, PIXELS)
        momentum, number = double_at(job + 8 * MOMENTUM), images * pixels
        for channel in range(field(job, CHANNELS)):
            mean = variance = 0.0
            for image in range(images):
                mean += mean_of(job, image, channel)[0]
            mean /= images
            for image in range(images):
                own, distance = mean_of(job, image, channel)
                square = double_at(sums_of(job, 2, image, channel)) / pixels
                variance += square - distance**2 + (own - mean) ** 2
            variance /= images
            if variance < 0.0:  # by rounding
                variance = 0.0
            if field(job, RUNNING_MEAN) != 0:
                place = field(job, RUNNING_MEAN) + 4 * channel
                set_float(place, float32((1.0 - momentum) * float64(float_at(place)) + momentum * mean))
                place = field(job, RUNNING_VAR) + 4 * channel
                unbiased = variance * (number / (number - 1))
                set_float(place, float32((1.0 - momentum) * float64(float_at(place)) + momentum * unbiased))
            scale = inverse = 1.0 / math.sqrt(variance + double_at(job + 8 * EPS))
            if field(job, WEIGHT) != 0:
                scale *= float64(float_at(field(job, WEIGHT) + 4 * channel))
            # The scale as it will be used: what rounding changed, a large mean would multiply.
            scale = float64(float32(scale))
            shift = -mean * scale
            if field(job, BIAS) != 0:
                shift += float64(float_at(field(job, BIAS) + 4 * channel))
            set_float(factor(job, FACTORS, INVERSE, channel), float32(inverse))
            set_float(factor(job, FACTORS, SCALE, channel), float32(scale))
            set_float(factor(job, FACTORS, SHIFT, channel), float32(shift))
            set_float(factor(job, FACTORS, MINUS_MEAN, channel), float32(-mean))

    return factors


def pool() -> Any:
    """Return the kernel of the output and its argmax."""

    @kernel(1)
    def pool(job):
        step, padded, cells, table = 4 * field(job, CHANNELS), field(job, PADDED), field(job, CELLS), field(job, CELL)
        windows = field(job, WINDOWS)
        task = take(job)
        while task < field(job, TASKS):
            image, begin, end = part(job, task)
            for start in range(0, windows, CHAIN):
                stop = min(start + CHAIN, windows)
                for first in range(begin, end, LANES):
                    source, output, winners, count = operands(job, image, first, end)
                    scale, shift = vector(job, FACTORS, SCALE, first), vector(job, FACTORS, SHIFT, first)
                    for window in range(start, stop):
                        best, argmax = zeros(ONE, ONE), spread_int(NO_WINNER, ONE)
                        for cell in range(cells):
                            place = long_at(table + 8 * (window * cells + cell))
                            if place >= 0:
                                value = add_products(shift, scale, read(source + place, count))
                                argmax = winner(argmax, best, value, cell)
                                best = larger(best, value)
                        write(output + step * window, count, best)
                        store_bytes_first(winners + padded * window, LANES, 1, argmax)
            task = take(job)

    return pool


def sums() -> Any:
    """Return the kernel of the images' sums of the gradient."""

    @kernel(1)
    def sums(job):
        step, padded, cells, table = 4 * field(job, CHANNELS), field(job, PADDED), field(job, CELLS), field(job, CELL)
        windows = field(job, WINDOWS)
        task = take(job)
        while task < field(job, TASKS):
            image, begin, end = part(job, task)
            for start in range(0, windows, CHAIN):
                stop = min(start + CHAIN, windows)
                for first in range(begin, end, LANES):
                    source, output, winners, count = operands(job, image, first, end)
                    minus = vector(job, FACTORS, MINUS_MEAN, first)
                    plain, weighted = zeros(ONE, ONE), zeros(ONE, ONE)
                    for window in range(start, stop):
                        grad = read(output + step * window, count)
                        argmax = load_bytes(winners + padded * window, ONE)
                        plain = add(plain, where_not_equal(argmax, NO_WINNER, grad))
                        for cell in range(cells):
                            place = long_at(table + 8 * (window * cells + cell))
                            if place >= 0:
                                distance = add(read(source + place, count), minus)
                                weighted = add_products(weighted, where_equal(argmax, cell, grad), distance)
                    add_doubles(sums_of(job, 0, image, first), plain)
                    add_doubles(sums_of(job, 1, image, first), weighted)
            task = take(job)

    return sums


def slopes() -> Any:
    """Return the kernel of what stands between the sums and the input's gradient."""

    @kernel(1)
    def slopes(job):
        images = field(job, IMAGES)
        for channel in range(field(job, CHANNELS)):
            plain = weighted = 0.0
            for image in range(images):
                plain += double_at(sums_of(job, 0, image, channel))
                weighted += double_at(sums_of(job, 1, image, channel))
            inverse = float64(float_at(factor(job, FACTORS, INVERSE, channel)))
            mean_of = -float64(float_at(factor(job, FACTORS, SCALE, channel))) / (images * field(job, PIXELS))
            set_float(factor(job, SLOPES, SLOPE, channel), float32(weighted * inverse * inverse * mean_of))
            set_float(factor(job, SLOPES, LEVEL, channel), float32(plain * mean_of))
            set_float(field(job, WEIGHT) + 4 * channel, float32(weighted * inverse))
            set_float(field(job, BIAS) + 4 * channel, float32(plain))

    return slopes


def grad() -> Any:
    """Return the kernel of the input's gradient."""

    @kernel(1)
    def grad(job):
        """Write the pixels up to the last one of some windows, then add what passes these windows."""
        step, padded, cells, table = 4 * field(job, CHANNELS), field(job, PADDED), field(job, CELLS), field(job, CELL)
        pixels, windows = field(job, PIXELS), field(job, WINDOWS)
        task = take(job)
        while task < field(job, TASKS):
            image, begin, end = part(job, task)
            written = 0
            for start in range(0, windows, CHAIN):
                stop = min(start + CHAIN, windows)
                last = -1
                for entry in range(start * cells, stop * cells):
                    last = max(last, long_at(table + 8 * entry))
                until = pixels if stop == windows else max(written, last // step + 1)
                for first in range(begin, end, LANES):
                    source, output, winners, count = operands(job, image, first, end)
                    target = maps(job, GRAD_INPUT, PIXELS, image, first)
                    minus, scale = vector(job, FACTORS, MINUS_MEAN, first), vector(job, FACTORS, SCALE, first)
                    slope, level = vector(job, SLOPES, SLOPE, first), vector(job, SLOPES, LEVEL, first)
                    for pixel in range(written, until):
                        distance = add(read(source + step * pixel, count), minus)
                        write(target + step * pixel, count, add_products(level, slope, distance))
                    for window in range(start, stop):
                        passing = add_products(zeros(ONE, ONE), scale, read(output + step * window, count))
                        argmax = load_bytes(winners + padded * window, ONE)
                        for cell in range(cells):
                            place = long_at(table + 8 * (window * cells + cell))
                            if place >= 0:
                                spot = target + place
                                write(spot, count, add(read(spot, count), where_equal(argmax, cell, passing)))
                written = until
            task = take(job)

    return grad


def lay_out() -> Any:
    """Return the kernel that transposes each image's matrix of channels and pixels."""

    @kernel(1)
    def lay_out(job):
        """Transpose 16 channels and 16 pixels at a time; the last 16 of either overlap those before if need be.

        Pixels follow each other, so that one side is read or written as 16 streams.
        """
        channels, pixels, last = field(job, layout.CHANNELS), field(job, layout.PIXELS), field(job, layout.LAST)
        blocks = (channels + LANES - 1) // LANES
        task = take(job)
        while task < field(job, layout.TASKS):
            image, channel = 4 * channels * pixels * (task // blocks), min(LANES * (task % blocks), channels - LANES)
            source, target = field(job, layout.SOURCE) + image, field(job, layout.TARGET) + image
            for start in range(0, pixels, LANES):
                pixel = min(start, pixels - LANES)
                plain, other = 4 * (pixels * channel + pixel), 4 * (channels * pixel + channel)
                if last:
                    transpose(source + plain, 4 * pixels, LANES - 1, target + other, 4 * channels, LANES)
                else:
                    transpose(source + other, 4 * channels, LANES - 1, target + plain, 4 * pixels, LANES)
            task = take(job)

    return lay_out


def fold() -> Any:
    """Return the kernel that folds BatchNorm in eval mode into convolutions."""

    @kernel(1)
    def fold(table):
        """Fold one norm after the other; `table`: their number, then for each what `folding` names."""
        for norm in range(field(table, 0)):
            job = table + 8 + 8 * folding.SIZE * norm
            row = field(job, folding.ROW_BYTES)
            for o in range(field(job, folding.FILTERS)):
                factor = 1.0 / math.sqrt(
                    float64(float_at(field(job, folding.VARIANCE) + 4 * o)) + double_at(job + 8 * folding.EPS)
                )
                if field(job, folding.SCALE) != 0:
                    factor *= float64(float_at(field(job, folding.SCALE) + 4 * o))
                offset = -float64(float_at(field(job, folding.MEAN) + 4 * o))
                if field(job, folding.BIAS) != 0:
                    offset += float64(float_at(field(job, folding.BIAS) + 4 * o))
                offset *= factor
                if field(job, folding.SHIFT) != 0:
                    offset += float64(float_at(field(job, folding.SHIFT) + 4 * o))
                set_float(field(job, folding.FOLDED_BIAS) + 4 * o, float32(offset))
                factors = spread(float32(factor), ONE)
                source, target = field(job, folding.WEIGHT) + row * o, field(job, folding.FOLDED_WEIGHT) + row * o
                for begin in range(0, row, BYTES):
                    count = min(LANES, (row - begin) // 4)
                    write(target + begin, count, add_products(zeros(ONE, ONE), read(source + begin, count), factors))

    return fold
