"""Kernels of a chain: a whole network, or a part of it, for a block of 16 images at a time.

From the first pixel to the last number a block stays in the cache: each layer reads what the one before has written,
with images as lanes throughout. A block's *record* holds what passes between the layers, and where each pool's maxima
were; in training the records are what is saved, else a worker has one that it uses again and again.

    convolution with relu and pool: `convolution`'s kernels
    linear layer, with or without relu:
        Y[o] = bias[o] + sum over k of weight[o, k] * X[k]
        grad_X[k] = sum over o of weight[o, k] * G[o],  G = grad_Y where Y is above 0
        grad_weight[o, k] = sum over images of G[o] * X[k]

A linear layer has no pixels that share a weight: all but one of a step's loads are weights, spread over a vector by the
FMA itself. Its weight's gradient is a sum over images, so lanes are 16 neighbouring inputs there: X is turned back
into images first.

A chain is a program (see `program`), which one kernel works off: no chain needs a driver of its own.
"""

from __future__ import annotations

from typing import Any

from . import program
from .convolution import fill, vectors
from .lanes import (
    add,
    add_products,
    add_tile,
    call,
    field,
    float_at,
    inlined,
    kernel,
    load,
    load_first,
    load_lanes,
    relu,
    set_float,
    set_long,
    splat,
    splat_strided,
    store,
    store_first,
    take,
    total,
    where_positive,
    zeros,
)
from .plan import BYTES, CHAIN, LANES

ONE = (0,)


def steps() -> Any:
    """Return the kernel that each worker runs: it works a program off, task by task, until none is left."""

    @inlined
    def argument(step, number, unit, own):
        here = step + 8 + 24 * number
        return field(own, field(here, 0)) + field(here, 1) + unit * field(here, 2)

    @kernel(1)
    def steps(bases):
        """Call the kernels of the steps; `bases`: the table that all workers share."""
        worker, size = take(bases + 8 * program.WORKERS), field(bases, program.SCRATCH_BYTES)
        own = field(bases, program.SCRATCH) + worker * size
        for i in range(field(bases, program.SIZE)):
            set_long(own + 8 * i, field(bases, i))
        set_long(own + 8 * program.OWN, own)
        set_long(own + 8 * program.SCRATCH, own)
        tasks, each, units = field(own, program.TASKS), field(own, program.UNITS_EACH), field(own, program.UNITS)
        begun = 0
        while True:
            task = take(bases + 8 * program.TAKEN)
            if task >= tasks:
                break
            sums = field(bases, program.SUMS) + task * field(own, program.SUMS_BYTES)
            set_long(own + 8 * program.SUMS, sums)
            numbers = field(own, program.STEPS)
            first = numbers + 8 * program.PARTS_OF_STEPS
            for part in range(program.PARTS_OF_STEPS):
                start, end, number = 0, 1, field(numbers, part)
                if part == 0:
                    start, begun = begun, 1
                if part == 2:
                    start, end = task * each, min(task * each + each, units)
                for unit in range(start, end):
                    set_long(own + 8 * program.COUNT, min(LANES, field(own, program.IMAGES) - LANES * unit))
                    for i in range(number):
                        step = first + 8 * program.STEP * i
                        call(
                            field(step, 0),
                            (
                                argument(step, 0, unit, own),
                                argument(step, 1, unit, own),
                                argument(step, 2, unit, own),
                                argument(step, 3, unit, own),
                                argument(step, 4, unit, own),
                                argument(step, 5, unit, own),
                                argument(step, 6, unit, own),
                                argument(step, 7, unit, own),
                                argument(step, 8, unit, own),
                                argument(step, 9, unit, own),
                            ),
                        )
                first += 8 * program.STEP * number

    return steps


def linear(sums: int) -> Any:
    """Return the kernel of a linear layer, with or without relu, that computes so many outputs at a time."""
    many = (0,) * sums

    @kernel(7)
    def linear(source, packed, bias, inputs, outputs, positive, target):
        """Compute Y for a block; packed: the weight as [16 outputs][input, output]; bias: or 0."""
        for first in range(0, outputs, sums):
            live = min(sums, outputs - first)
            factors = packed + BYTES * inputs * (first // LANES) + 4 * (first % LANES)
            for start in range(0, inputs, CHAIN):
                end = min(start + CHAIN, inputs)
                tile = zeros(ONE, many)
                for k in range(start, end):
                    tile = add_products(tile, load(source + BYTES * k, ONE), splat(factors + BYTES * k, many))
                if start:
                    tile = add(load_first(target, BYTES, live, many), tile)
                if end == inputs:
                    if bias != 0:
                        tile = add(tile, splat(bias + 4 * first, many))
                    if positive:
                        tile = relu(tile)
                store_first(target, BYTES, live, tile)
            target += BYTES * sums

    return linear


def linear_grads(sums: int, vectors_of_inputs: int, filters: int) -> Any:
    """Return the kernel of a linear layer's gradients.

    It computes so many gradients of inputs at a time, and so many vectors of inputs x outputs of the weight's gradient.
    """
    many, input_vectors, columns = (0,) * sums, (0,) * vectors_of_inputs, (0,) * filters
    beside, wide = vectors(vectors_of_inputs), BYTES * vectors_of_inputs

    @inlined
    def grad_input(grad, weight, inputs, outputs, target):
        """Compute grad_X for a block; weight: [output, input]."""
        for place in range(0, inputs, sums):
            # The last inputs overlap those before where their number is not a multiple.
            first = min(place, inputs - sums)
            for start in range(0, outputs, CHAIN):
                tile = zeros(ONE, many)
                for o in range(start, min(start + CHAIN, outputs)):
                    factors = splat(weight + 4 * (o * inputs + first), many)
                    tile = add_products(tile, load(grad + BYTES * o, ONE), factors)
                here = target + BYTES * first
                if start:
                    tile = add(load_first(here, BYTES, sums, many), tile)
                store_first(here, BYTES, sums, tile)

    @inlined
    def grad_weight(grad, rows, row_bytes, outputs, target):
        """Add a block's part to the weight's gradient: [output, input], rows of `row_bytes`; rows: X as 16 images."""
        for o in range(0, outputs, filters):
            for place in range(0, row_bytes, wide):
                tile = zeros(input_vectors, columns)
                for n in range(LANES):
                    inputs = load(rows + n * row_bytes + place, beside)
                    tile = add_products(tile, inputs, splat_strided(grad + BYTES * o + 4 * n, BYTES, columns))
                add_tile(target + o * row_bytes + place, beside, row_bytes, tile)

    @kernel(10)
    def linear_grads(grad, result, count, rows, weight, inputs, outputs, weight_sums, bias_sums, grad_source):
        """Compute what is asked for, and not 0; the parameters' gradients are added to sums.

        grad: of Y, in which what relu stopped becomes zero; result: Y, or 0 where no relu follows; count: of images;
        rows: X as images. Lanes beyond the last image may be NaN or infinite: they become zero.
        """
        if count < LANES:
            for place in range(0, BYTES * outputs, BYTES):
                store(grad + place, ONE, load_lanes(grad + place, ONE, count))
        if result != 0:
            for place in range(0, BYTES * outputs, BYTES):
                store(grad + place, ONE, where_positive(load(result + place, ONE), load(grad + place, ONE)))
        if weight_sums != 0:
            row_bytes = (4 * inputs + wide - 1) // wide * wide
            for n in range(LANES):
                for place in range(4 * inputs, row_bytes, 4):
                    set_float(rows + n * row_bytes + place, 0.0)
            if count < LANES:
                fill(rows + count * row_bytes, (LANES - count) * row_bytes)
            grad_weight(grad, rows, row_bytes, outputs, weight_sums)
            for o in range(outputs):
                set_float(bias_sums + 4 * o, float_at(bias_sums + 4 * o) + total(grad + BYTES * o))
        if grad_source != 0:
            grad_input(grad, weight, inputs, outputs, grad_source)

    return linear_grads


def sum_tasks() -> Any:
    """Return the kernel that adds up the tasks' sums, in their order, whichever thread made them."""

    @kernel(8)
    def sum_tasks(target, source, width, row_bytes, rows, tasks, step, piece):
        """Write one of `program.PIECES` of a parameter's gradient, unless the target is 0.

        source: the first task's sums, of so many rows of `width` numbers; the others follow, `step` bytes apart.
        """
        each = (rows + program.PIECES - 1) // program.PIECES
        if target != 0:
            for row in range(piece * each, min(piece * each + each, rows)):
                here, there = source + row * row_bytes, target + 4 * row * width
                whole = width - width % LANES
                for k in range(0, whole, LANES):
                    sums = load(here + 4 * k, ONE)
                    for task in range(1, tasks):
                        sums = add(sums, load(here + 4 * k + task * step, ONE))
                    store(there + 4 * k, ONE, sums)
                for k in range(whole, width):
                    value = float_at(here + 4 * k)
                    for task in range(1, tasks):
                        value += float_at(here + 4 * k + task * step)
                    set_float(there + 4 * k, value)

    return sum_tasks
