"""Kernels of a chain: a whole network, or a part of it, for a block of 16 images at a time.

From the first pixel to the last number a block stays in the cache: each layer reads what the one before has written,
with images as lanes throughout. A block's *record* holds what passes between the layers, and where each pool's maxima
were; in training the records are what is saved, else a worker has one that it uses again and again.

    convolution with relu and pool: `convolution`'s kernels
    linear layer, with or without relu:
        Y[o] = bias[o] + sum over k of weight[o, k] * X[k]
        grad_X[k] = sum over o of weight[o, k] * G[o],  G = grad_Y where Y is above 0
        grad_weight[o, k] = sum over images of G[o] * X[k]

A linear layer has no pixels that share a weight: of 17 loads for 16 FMAs a step 16 are weights, spread over a vector by
the FMA itself. Its weight's gradient is a sum over images, so lanes are 16 neighbouring inputs there: X is turned back
into images first.
"""

from __future__ import annotations

from typing import Any

from . import link, record
from .convolution import fill, pack_backward, pack_forward, pad, sum_lanes, vectors
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
    relu,
    set_float,
    splat,
    splat_strided,
    store,
    store_first,
    take,
    total,
    where_positive,
    zeros,
)
from .plan import BYTES, CHAIN, LANES, linear_tile

SUMS, LINEAR_VECTORS, LINEAR_FILTERS = linear_tile()
ONE, OUTPUTS = (0,), (0,) * SUMS
INPUT_VECTORS, FILTERS = (0,) * LINEAR_VECTORS, (0,) * LINEAR_FILTERS
BESIDE = vectors(LINEAR_VECTORS)


# --- linear layers -------------------------------------------------------------------------------------------------


@inlined
def linear(source, packed, bias, inputs, outputs, positive, target):
    """Compute Y for a block; packed: the weight as [16 outputs][input, output]."""
    for first in range(0, outputs, SUMS):
        live = min(SUMS, outputs - first)
        factors = packed + BYTES * inputs * (first // LANES) + 4 * (first % LANES)
        for start in range(0, inputs, CHAIN):
            end = min(start + CHAIN, inputs)
            sums = zeros(ONE, OUTPUTS)
            for k in range(start, end):
                sums = add_products(sums, load(source + BYTES * k, ONE), splat(factors + BYTES * k, OUTPUTS))
            if start:
                sums = add(load_first(target, BYTES, live, OUTPUTS), sums)
            if end == inputs:
                if bias != 0:
                    sums = add(sums, splat(bias + 4 * first, OUTPUTS))
                if positive:
                    sums = relu(sums)
            store_first(target, BYTES, live, sums)
        target += BYTES * SUMS


@inlined
def linear_grad_input(grad, weight, inputs, outputs, target):
    """Compute grad_X for a block; weight: [output, input]."""
    for place in range(0, inputs, SUMS):
        # The last inputs overlap those before where their number is not a multiple.
        first = min(place, inputs - SUMS)
        for start in range(0, outputs, CHAIN):
            sums = zeros(ONE, OUTPUTS)
            for o in range(start, min(start + CHAIN, outputs)):
                factors = splat(weight + 4 * (o * inputs + first), OUTPUTS)
                sums = add_products(sums, load(grad + BYTES * o, ONE), factors)
            here = target + BYTES * first
            if start:
                sums = add(load_first(here, BYTES, SUMS, OUTPUTS), sums)
            store_first(here, BYTES, SUMS, sums)


@inlined
def linear_grad_weight(grad, rows, row_bytes, outputs, sums):
    """Add a block's part to the weight's gradient, [output, input] with rows of `row_bytes`; rows: X as 16 images."""
    for o in range(0, outputs, LINEAR_FILTERS):
        for place in range(0, row_bytes, BYTES * LINEAR_VECTORS):
            tile = zeros(INPUT_VECTORS, FILTERS)
            for n in range(LANES):
                inputs = load(rows + n * row_bytes + place, BESIDE)
                tile = add_products(tile, inputs, splat_strided(grad + BYTES * o + 4 * n, BYTES, FILTERS))
            add_tile(sums + o * row_bytes + place, BESIDE, row_bytes, tile)


# --- forward -------------------------------------------------------------------------------------------------------


def forward_chain() -> Any:
    """Return the kernel that each worker runs: it takes blocks of images through all links until none is left."""

    @kernel(1)
    def forward_chain(head):
        """Take blocks of images; `head`: see `link`."""
        scratch = field(head, link.SCRATCH) + take(head + 8 * link.WORKERS) * field(head, link.SCRATCH_BYTES)
        images, copy, number = field(head, link.IMAGES), field(head, link.EXCHANGE), field(head, link.LINKS)
        step, output_step = field(head, link.INPUT_STEP), field(head, link.OUTPUT_STEP)
        conv = scratch + field(head, link.CONV_AT)
        links = head + 8 * link.HEAD
        for i in range(number):
            this = links + 8 * link.SIZE * i
            packed, weight, plan = (
                scratch + field(this, link.PACKED_AT),
                field(this, link.WEIGHT),
                field(this, link.PLAN),
            )
            if field(this, link.LINEAR):
                # A weight's rows are turned into lanes as images are: 16 outputs beside each other.
                row = 4 * field(this, link.INPUTS)
                for first in range(0, field(this, link.OUTPUTS), LANES):
                    live = min(LANES, field(this, link.OUTPUTS) - first)
                    call(
                        copy, (1, 4, weight + row * first, row, live, packed + LANES * row * (first // LANES), row // 4)
                    )
            else:
                pack_forward(plan, weight, field(this, link.BIAS), packed, field(plan, record.TILE_FILTERS))
                fill(scratch + field(this, link.PADDED_AT), field(plan, record.PAD_BYTES))
        while True:
            block = take(head + 8 * link.TAKEN)
            if LANES * block >= images:
                break
            count = min(LANES, images - LANES * block)
            kept = scratch + field(head, link.RECORD_AT)
            if field(head, link.RECORD) != 0:
                kept = field(head, link.RECORD) + block * field(head, link.RECORD_BYTES)
            source, numbers = scratch, field(links, link.INPUTS)
            call(copy, (1, 4, field(head, link.INPUT) + LANES * block * step, step, count, source, numbers))
            for i in range(number):
                this = links + 8 * link.SIZE * i
                packed = scratch + field(this, link.PACKED_AT)
                target = (scratch if field(this, link.PASSES) else kept) + field(this, link.TARGET_AT)
                numbers = field(this, link.OUTPUTS)
                if field(this, link.LINEAR):
                    bias, positive = field(this, link.BIAS), field(this, link.RELU)
                    linear(source, packed, bias, field(this, link.INPUTS), numbers, positive, target)
                else:
                    plan = field(this, link.PLAN)
                    if field(plan, record.PAD_BYTES):
                        pad(plan, source, scratch + field(this, link.PADDED_AT))
                        source = scratch + field(this, link.PADDED_AT)
                    argmax = kept + field(this, link.ARGMAX_AT)
                    call(field(this, link.FORWARD), (plan, source, packed, target, argmax, conv))
                source = target
            output = field(head, link.OUTPUT) + LANES * block * output_step
            call(copy, (0, 4, output, output_step, count, source, numbers))

    return forward_chain


# --- backward ------------------------------------------------------------------------------------------------------


def backward_chain() -> Any:
    """Return the kernel that each worker runs: it works off tasks, each some blocks, until none is left."""

    @kernel(1)
    def backward_chain(head):
        """Take tasks; each adds up its blocks' gradients of the parameters in sums of its own."""
        scratch = field(head, link.SCRATCH) + take(head + 8 * link.WORKERS) * field(head, link.SCRATCH_BYTES)
        images, copy, number = field(head, link.IMAGES), field(head, link.EXCHANGE), field(head, link.LINKS)
        step, output_step, grad_step = (
            field(head, link.INPUT_STEP),
            field(head, link.OUTPUT_STEP),
            field(head, link.GRAD_INPUT_STEP),
        )
        conv, rows = scratch + field(head, link.CONV_AT), scratch + field(head, link.ROWS_AT)
        output_grad, grad_input = scratch + field(head, link.OUTPUT_GRAD_AT), field(head, link.GRAD_INPUT)
        first_wanted, links = field(head, link.FIRST_WANTED), head + 8 * link.HEAD
        inexact = 0
        for i in range(number):
            this, plan = links + 8 * link.SIZE * i, field(links + 8 * link.SIZE * i, link.PLAN)
            if field(this, link.LINEAR):
                # `linear_grad_weight` works off the outputs' gradients in full tiles.
                grad = output_grad if i == number - 1 else scratch + field(this + 8 * link.SIZE, link.GRAD_AT)
                fill(grad + BYTES * field(this, link.OUTPUTS), BYTES * (-field(this, link.OUTPUTS) % LINEAR_FILTERS))
                continue
            fill(scratch + field(this, link.PADDED_AT), field(plan, record.PAD_BYTES))
            if i > first_wanted or grad_input != 0:
                packed = scratch + field(this, link.PACKED_AT)
                filters, channels = field(plan, record.TILE_FILTERS), field(plan, record.TILE_CHANNELS)
                if not pack_backward(plan, field(this, link.WEIGHT), packed, filters, channels):
                    inexact |= 1 << i
        while True:
            task = take(head + 8 * link.TAKEN)
            if task >= field(head, link.TASKS):
                break
            sums = field(head, link.SUMS) + task * field(head, link.SUMS_BYTES)
            fill(sums, field(head, link.SUMS_BYTES))
            for i in range(number):
                this = links + 8 * link.SIZE * i
                if not field(this, link.LINEAR):
                    size = field(field(this, link.PLAN), record.PARTIAL_BYTES)
                    fill(scratch + field(this, link.PARTIAL_AT), size)
            begin = task * field(head, link.BLOCKS)
            blocks = (images + LANES - 1) // LANES
            for block in range(begin, min(begin + field(head, link.BLOCKS), blocks)):
                count = min(LANES, images - LANES * block)
                kept = field(head, link.RECORD) + block * field(head, link.RECORD_BYTES)
                last = links + 8 * link.SIZE * (number - 1)
                output = field(head, link.OUTPUT) + LANES * block * output_step
                call(copy, (1, 4, output, output_step, count, output_grad, field(last, link.OUTPUTS)))
                grad = output_grad
                for back in range(number - first_wanted):
                    i = number - 1 - back
                    this = links + 8 * link.SIZE * i
                    inputs, target = field(this, link.INPUTS), scratch + field(this, link.GRAD_AT)
                    onward, wanted = i > first_wanted or grad_input != 0, field(this, link.WANTED)
                    if i:
                        source = kept + field(this - 8 * link.SIZE, link.TARGET_AT)
                    else:
                        source = scratch
                        if wanted:
                            images_in = field(head, link.INPUT) + LANES * block * step
                            call(copy, (1, 4, images_in, step, count, source, inputs))
                    if field(this, link.LINEAR):
                        outputs = field(this, link.OUTPUTS)
                        if field(this, link.RELU):
                            mask(kept + field(this, link.TARGET_AT), outputs, grad)
                        if wanted:
                            row_bytes = field(this, link.SUMS_STEP)
                            call(copy, (0, 4, rows, row_bytes, LANES, source, inputs))
                            clear_tail(rows, inputs, row_bytes)
                            linear_grad_weight(grad, rows, row_bytes, outputs, sums + field(this, link.SUMS_AT))
                            add_lanes(grad, outputs, sums + field(this, link.BIAS_SUMS_AT))
                        if onward:
                            linear_grad_input(grad, field(this, link.WEIGHT), inputs, outputs, target)
                    else:
                        plan = field(this, link.PLAN)
                        if wanted and field(plan, record.PAD_BYTES):
                            pad(plan, source, scratch + field(this, link.PADDED_AT))
                            source = scratch + field(this, link.PADDED_AT)
                        call(
                            field(this, link.BACKWARD),
                            (
                                plan,
                                source,
                                scratch + field(this, link.PACKED_AT),
                                (inexact >> i) & 1,
                                grad,
                                kept + field(this, link.ARGMAX_AT),
                                target if onward else 0,
                                scratch + field(this, link.PARTIAL_AT) if wanted else 0,
                                conv,
                            ),
                        )
                    grad = target
                if grad_input != 0:
                    place = grad_input + LANES * block * grad_step
                    call(copy, (0, 4, place, grad_step, count, grad, field(links, link.INPUTS)))
            for i in range(number):
                this = links + 8 * link.SIZE * i
                if field(this, link.WANTED) and not field(this, link.LINEAR):
                    partial = scratch + field(this, link.PARTIAL_AT)
                    sum_lanes(field(this, link.PLAN), partial, sums + field(this, link.SUMS_AT))

    return backward_chain


@inlined
def mask(target, numbers, grad):
    """Let the gradient pass where relu was open."""
    for i in range(numbers):
        values = where_positive(load(target + BYTES * i, ONE), load(grad + BYTES * i, ONE))
        store(grad + BYTES * i, ONE, values)


@inlined
def clear_tail(rows, inputs, row_bytes):
    """Fill the rest of each row with zeros."""
    for n in range(LANES):
        for place in range(4 * inputs, row_bytes, 4):
            set_float(rows + n * row_bytes + place, 0.0)


@inlined
def add_lanes(grad, outputs, sums):
    """Add each output's sum over the images."""
    for o in range(outputs):
        set_float(sums + 4 * o, float_at(sums + 4 * o) + total(grad + BYTES * o))


def sum_tasks() -> Any:
    """Return the kernel that adds up the tasks' sums, in their order, whichever thread made them."""

    @kernel(1)
    def sum_tasks(head):
        """Take pieces of parameters; they stand behind the links' tables."""
        tasks, step, number = field(head, link.TASKS), field(head, link.SUMS_BYTES), field(head, link.BLOCKS)
        pieces = head + 8 * link.HEAD
        while True:
            i = take(head + 8 * link.TAKEN)
            if i >= number:
                break
            piece = pieces + 8 * link.PIECE * i
            width, row_bytes = field(piece, link.WIDTH), field(piece, link.STEP)
            for row in range(field(piece, link.FIRST), field(piece, link.LAST)):
                source = field(head, link.SUMS) + field(piece, link.SOURCE) + row * row_bytes
                target = field(piece, link.TARGET) + 4 * row * width
                whole = width - width % LANES
                for k in range(0, whole, LANES):
                    sums = load(source + 4 * k, ONE)
                    for task in range(1, tasks):
                        sums = add(sums, load(source + 4 * k + task * step, ONE))
                    store(target + 4 * k, ONE, sums)
                for k in range(whole, width):
                    value = float_at(source + 4 * k)
                    for task in range(1, tasks):
                        value += float_at(source + 4 * k + task * step)
                    set_float(target + 4 * k, value)

    return sum_tasks
