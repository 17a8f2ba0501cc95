"""Kernels of a chain for a few images, one after the other: lanes are 16 filters or inputs of one image.

A block of 16 images keeps its lanes idle where there are fewer. Here a vector holds 16 filters of one pixel, and
`convolution`'s forward runs with its factors exchanged: pixels are spread, weights are vectors. What passes between
layers is [vector of 16 filters, pixel, filter]. The gradients are `gradients`' kernel, which knows images alone.

A linear layer reads its weight as it lies: in the forward lanes are 16 inputs, whose sums are added up at the end.
"""

from __future__ import annotations

from typing import Any

from .convolution import clear_bytes, vectors
from .lanes import (
    add,
    add_products,
    float_at,
    kernel,
    load,
    load_lanes,
    set_float,
    splat,
    store,
    store_lanes,
    totals,
    where_positive,
    zeros,
)
from .plan import BYTES, CHAIN, LANES

ONE, OUTPUTS, INPUTS = (0,), (0,) * 8, (0,) * 4
BESIDE = vectors(4)


def pad() -> Any:
    """Return the kernel that puts a frame of zeros around an image's planes."""

    @kernel(7)
    def pad(source, channels, height, width, rows, columns, target):
        """Copy planes one after the other; rows, columns: of the frame on each side."""
        row, pitch = 4 * width, 4 * (width + 2 * columns)
        plane = pitch * (height + 2 * rows)
        clear_bytes(target, plane * channels)
        for c in range(channels):
            here = target + plane * c + pitch * rows + 4 * columns
            for y in range(height):
                for place in range(0, row, BYTES):
                    count = min(LANES, (row - place) // 4)
                    values = load_lanes(source + row * (height * c + y) + place, ONE, count)
                    store_lanes(here + pitch * y + place, ONE, count, values)

    return pad


def linear() -> Any:
    """Return the kernel of a linear layer, with or without relu."""

    @kernel(8)
    def linear(source, weight, bias, inputs, outputs, positive, target, skipped):
        """Compute Y = W X + b; weight: [output, input]; bias: or 0, behind so many outputs that others compute."""
        row = 4 * inputs
        for first in range(0, outputs, len(OUTPUTS)):
            live = min(len(OUTPUTS), outputs - first)
            here = weight + row * first
            # Rows beyond the last are read as the last.
            rows = (
                here,
                here + row * min(1, live - 1),
                here + row * min(2, live - 1),
                here + row * min(3, live - 1),
                here + row * min(4, live - 1),
                here + row * min(5, live - 1),
                here + row * min(6, live - 1),
                here + row * min(7, live - 1),
            )
            sums = zeros(OUTPUTS, ONE)
            whole = row - row % BYTES
            for place in range(0, whole, BYTES):
                sums = add_products(sums, load(place, rows), load(source + place, ONE))
            if whole < row:
                rest = (row - whole) // 4
                sums = add_products(sums, load_lanes(whole, rows, rest), load_lanes(source + whole, ONE, rest))
            values = totals(sums)
            for i in range(live):
                value = values[i]
                if bias != 0:
                    value += float_at(bias + 4 * (skipped + first + i))
                if positive and value < 0.0:
                    set_float(target + 4 * (first + i), 0.0)
                else:
                    set_float(target + 4 * (first + i), value)

    return linear


def linear_grads() -> Any:
    """Return the kernel of a linear layer's gradients."""

    @kernel(10)
    def linear_grads(grad, result, source, weight, inputs, outputs, grad_weight, grad_bias, grad_source, image):
        """Compute what is asked for, and not 0; the first image's parameters are written, the others' added.

        grad: of Y, in which what relu stopped becomes zero; result: Y, or 0 where no relu follows.
        """
        row = 4 * inputs
        if result != 0:
            for place in range(0, 4 * outputs, BYTES):
                count = min(LANES, outputs - place // 4)
                values = load_lanes(grad + place, ONE, count)
                store_lanes(grad + place, ONE, count, where_positive(load_lanes(result + place, ONE, count), values))
        if grad_bias != 0:
            for o in range(outputs):
                value = float_at(grad + 4 * o)
                set_float(grad_bias + 4 * o, value + float_at(grad_bias + 4 * o) if image else value)
        if grad_weight != 0:
            for o in range(outputs):
                factor = splat(grad + 4 * o, ONE)
                for place in range(0, row, BYTES):
                    count, here = min(LANES, inputs - place // 4), grad_weight + row * o + place
                    before = load_lanes(here, ONE, count if image else 0)
                    values = add_products(before, load_lanes(source + place, ONE, count), factor)
                    store_lanes(here, ONE, count, values)
        if grad_source != 0:
            for place in range(0, row, BYTES * len(INPUTS)):
                for start in range(0, outputs, CHAIN):
                    end = min(start + CHAIN, outputs)
                    if place + BYTES * len(INPUTS) <= row:
                        sums = zeros(INPUTS, ONE)
                        for o in range(start, end):
                            sums = add_products(sums, load(weight + row * o + place, BESIDE), splat(grad + 4 * o, ONE))
                        if start:
                            sums = add(load(grad_source + place, BESIDE), sums)
                        store(grad_source + place, BESIDE, sums)
                        continue
                    for part in range(place, row, BYTES):
                        count = min(LANES, inputs - part // 4)
                        some = zeros(ONE, ONE)
                        for o in range(start, end):
                            factors = load_lanes(weight + row * o + part, ONE, count)
                            some = add_products(some, factors, splat(grad + 4 * o, ONE))
                        if start:
                            some = add(load_lanes(grad_source + part, ONE, count), some)
                        store_lanes(grad_source + part, ONE, count, some)

    return linear_grads
