"""Kernels of BatchNorm, relu and max-pool in one: lanes are 16 channels of a pixel, in channels_last.

BatchNorm needs the whole batch before it can normalise a number, so that there are two passes each way, with a few
numbers for each channel in between. Neither the normalised batch nor its gradient is ever in memory.

============  ==========================================================================================
``moments``   each image's mean and variance
``factors``   from these the factors of each channel, and the running statistics
``pool``      ``max(0, max over a window of scale * x + shift)``, and which cell it was
``sums``      each image's sums of the gradient, and of the gradient times ``x - mean``, at those cells
``slopes``    from these the gradients of weight and bias, and the factors of the input's gradient
``grad``      ``slope * (x - mean) + level``, and at those cells ``scale * gradient`` besides
============  ==========================================================================================

A task is an image, whatever the number of threads. Sums run row by row, so that no chain of additions is long, and over
the images in float64.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32, float64

from .batch_norm_relu_max_pool2d import (
    ARGMAX,
    BIAS,
    CELL,
    CELLS,
    CHANNELS,
    EPS,
    FACTORS,
    GRAD_INPUT,
    HEIGHT,
    IMAGES,
    INPUT,
    INVERSE,
    LEVEL,
    MINUS_MEAN,
    MOMENTUM,
    PADDED,
    POOLED,
    POOLED_HEIGHT,
    POOLED_WIDTH,
    RUNNING_MEAN,
    RUNNING_VAR,
    SCALE,
    SHIFT,
    SLOPE,
    SLOPES,
    SUMS,
    WEIGHT,
    WIDTH,
)
from .lanes import (
    LANES,
    add,
    add_products,
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
    where_equal,
    where_not_equal,
    winner,
    zeros,
)

ONE = (0,)
NO_WINNER = 255


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


@inlined
def factor(job, table, row, first):
    """Load a factor of 16 channels."""
    return load(field(job, table) + 4 * (field(job, PADDED) * row + first), ONE)


@inlined
def times(first, second):
    """Multiply two vectors."""
    return add_products(zeros(ONE, ONE), first, second)


def moments() -> Any:
    """Return the kernel of the images' means and variances."""

    @kernel(1)
    def moments(job):
        channels, height, width = field(job, CHANNELS), field(job, HEIGHT), field(job, WIDTH)
        step, part = 4 * channels, float32(1.0 / (height * width))
        image = take(job)
        while image < field(job, IMAGES):
            for first in range(0, channels, LANES):
                count = min(LANES, channels - first)
                source = field(job, INPUT) + image * height * width * step + 4 * first
                target = field(job, SUMS) + 4 * (2 * image * field(job, PADDED) + first)
                total = zeros(ONE, ONE)
                for row in range(height):
                    here, some = source + row * width * step, zeros(ONE, ONE)
                    for _ in range(width):
                        some = add(some, read(here, count))
                        here += step
                    total = add(total, some)
                store(target, ONE, times(total, spread(part, ONE)))
                minus = times(total, spread(-part, ONE))
                total = zeros(ONE, ONE)
                for row in range(height):
                    here, some = source + row * width * step, zeros(ONE, ONE)
                    for _ in range(width):
                        distance = add(read(here, count), minus)
                        some = add_products(some, distance, distance)
                        here += step
                    total = add(total, some)
                store(target + 4 * field(job, PADDED), ONE, times(total, spread(part, ONE)))
            image = take(job)

    return moments


def factors() -> Any:
    """Return the kernel of what stands between the statistics and the output."""

    @kernel(1)
    def factors(job):
        images, padded, number = field(job, IMAGES), field(job, PADDED), field(job, HEIGHT) * field(job, WIDTH)
        momentum, number = float64(float_at(job + 8 * MOMENTUM)), images * number
        for channel in range(field(job, CHANNELS)):
            place, mean, variance = 4 * channel, 0.0, 0.0
            for part in range(images):
                mean += float64(float_at(field(job, SUMS) + 8 * padded * part + place))
            mean /= images
            for part in range(images):
                here = field(job, SUMS) + 8 * padded * part + place
                variance += (float64(float_at(here)) - mean) ** 2 + float64(float_at(here + 4 * padded))
            variance /= images
            running = field(job, RUNNING_MEAN) + place
            if field(job, RUNNING_MEAN) != 0:
                set_float(running, float32((1.0 - momentum) * float64(float_at(running)) + momentum * mean))
            running = field(job, RUNNING_VAR) + place
            if field(job, RUNNING_VAR) != 0:
                unbiased = momentum * variance * number / (number - 1)
                set_float(running, float32((1.0 - momentum) * float64(float_at(running)) + unbiased))
            scale = inverse = 1.0 / math.sqrt(variance + float64(float_at(job + 8 * EPS)))
            if field(job, WEIGHT) != 0:
                scale *= float64(float_at(field(job, WEIGHT) + place))
            shift = -mean * scale
            if field(job, BIAS) != 0:
                shift += float64(float_at(field(job, BIAS) + place))
            target = field(job, FACTORS) + place
            set_float(target + 4 * padded * INVERSE, float32(inverse))
            set_float(target + 4 * padded * SCALE, float32(scale))
            set_float(target + 4 * padded * SHIFT, float32(shift))
            set_float(target + 4 * padded * MINUS_MEAN, float32(-mean))

    return factors


def pool() -> Any:
    """Return the kernel of the output and its argmax."""

    @kernel(1)
    def pool(job):
        channels, pixels = field(job, CHANNELS), field(job, HEIGHT) * field(job, WIDTH)
        rows, columns = field(job, POOLED_HEIGHT), field(job, POOLED_WIDTH)
        cells, table, padded = field(job, CELLS), field(job, CELL), field(job, PADDED)
        image = take(job)
        while image < field(job, IMAGES):
            for first in range(0, channels, LANES):
                count = min(LANES, channels - first)
                source = field(job, INPUT) + 4 * (image * pixels * channels + first)
                scale, shift = factor(job, FACTORS, SCALE, first), factor(job, FACTORS, SHIFT, first)
                place = image * rows * columns
                output, winners = (
                    field(job, POOLED) + 4 * (place * channels + first),
                    field(job, ARGMAX) + place * padded + first,
                )
                for window in range(rows * columns):
                    best, argmax = zeros(ONE, ONE), spread_int(NO_WINNER, ONE)
                    for cell in range(cells):
                        place = long_at(table + 8 * (window * cells + cell))
                        if place >= 0:
                            value = add_products(shift, scale, read(source + place, count))
                            argmax = winner(argmax, best, value, cell)
                            best = larger(best, value)
                    write(output + 4 * channels * window, count, best)
                    store_bytes_first(winners + padded * window, LANES, 1, argmax)
            image = take(job)

    return pool


def sums() -> Any:
    """Return the kernel of the images' sums of the gradient."""

    @kernel(1)
    def sums(job):
        channels, pixels = field(job, CHANNELS), field(job, HEIGHT) * field(job, WIDTH)
        rows, columns = field(job, POOLED_HEIGHT), field(job, POOLED_WIDTH)
        cells, table, padded = field(job, CELLS), field(job, CELL), field(job, PADDED)
        image = take(job)
        while image < field(job, IMAGES):
            for first in range(0, channels, LANES):
                count = min(LANES, channels - first)
                source = field(job, INPUT) + 4 * (image * pixels * channels + first)
                target = field(job, SUMS) + 4 * (2 * image * field(job, PADDED) + first)
                place = image * rows * columns
                output, winners = (
                    field(job, POOLED) + 4 * (place * channels + first),
                    field(job, ARGMAX) + place * padded + first,
                )
                minus, plain, weighted = factor(job, FACTORS, MINUS_MEAN, first), zeros(ONE, ONE), zeros(ONE, ONE)
                for row in range(rows):
                    some, others = zeros(ONE, ONE), zeros(ONE, ONE)
                    for column in range(columns):
                        window = row * columns + column
                        grad = read(output + 4 * channels * window, count)
                        argmax = load_bytes(winners + padded * window, ONE)
                        some = add(some, where_not_equal(argmax, NO_WINNER, grad))
                        for cell in range(cells):
                            place = long_at(table + 8 * (window * cells + cell))
                            if place >= 0:
                                distance = add(read(source + place, count), minus)
                                others = add_products(others, where_equal(argmax, cell, grad), distance)
                    plain, weighted = add(plain, some), add(weighted, others)
                store(target, ONE, plain)
                store(target + 4 * field(job, PADDED), ONE, weighted)
            image = take(job)

    return sums


def slopes() -> Any:
    """Return the kernel of what stands between the sums and the input's gradient."""

    @kernel(1)
    def slopes(job):
        images, padded, number = field(job, IMAGES), field(job, PADDED), field(job, HEIGHT) * field(job, WIDTH)
        for channel in range(field(job, CHANNELS)):
            place, plain, weighted = 4 * channel, 0.0, 0.0
            for part in range(images):
                here = field(job, SUMS) + 8 * padded * part + place
                plain += float64(float_at(here))
                weighted += float64(float_at(here + 4 * padded))
            source, target = field(job, FACTORS) + place, field(job, SLOPES) + place
            inverse = float64(float_at(source + 4 * padded * INVERSE))
            part_of = -float64(float_at(source + 4 * padded * SCALE)) / (images * number)
            set_float(target + 4 * padded * SLOPE, float32(weighted * inverse * inverse * part_of))
            set_float(target + 4 * padded * LEVEL, float32(plain * part_of))
            set_float(field(job, WEIGHT) + place, float32(weighted * inverse))
            set_float(field(job, BIAS) + place, float32(plain))

    return slopes


def grad() -> Any:
    """Return the kernel of the input's gradient."""

    @kernel(1)
    def grad(job):
        channels, pixels = field(job, CHANNELS), field(job, HEIGHT) * field(job, WIDTH)
        rows, columns = field(job, POOLED_HEIGHT), field(job, POOLED_WIDTH)
        cells, table, padded = field(job, CELLS), field(job, CELL), field(job, PADDED)
        image = take(job)
        while image < field(job, IMAGES):
            for first in range(0, channels, LANES):
                count = min(LANES, channels - first)
                offset = 4 * (image * pixels * channels + first)
                source, target = field(job, INPUT) + offset, field(job, GRAD_INPUT) + offset
                minus, scale = factor(job, FACTORS, MINUS_MEAN, first), factor(job, FACTORS, SCALE, first)
                slope, level = factor(job, SLOPES, SLOPE, first), factor(job, SLOPES, LEVEL, first)
                for place in range(0, 4 * channels * pixels, 4 * channels):
                    distance = add(read(source + place, count), minus)
                    write(target + place, count, add_products(level, slope, distance))
                place = image * rows * columns
                output, winners = (
                    field(job, POOLED) + 4 * (place * channels + first),
                    field(job, ARGMAX) + place * padded + first,
                )
                for window in range(rows * columns):
                    passing = times(scale, read(output + 4 * channels * window, count))
                    argmax = load_bytes(winners + padded * window, ONE)
                    for cell in range(cells):
                        place = long_at(table + 8 * (window * cells + cell))
                        if place >= 0:
                            spot = target + place
                            write(spot, count, add(read(spot, count), where_equal(argmax, cell, passing)))
            image = take(job)

    return grad
