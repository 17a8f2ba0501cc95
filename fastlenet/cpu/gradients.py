"""Kernel of the gradients of max_pool2d(relu(conv2d(input, weight, bias))), image by image.

With X the padded input, and for each filter o and window w the gradient g[o, w] and the pixel p[o, w] that won, only
winners count (of 2x2 windows at most one pixel of four; none where no cell was above 0):

    grad_weight[o, c, t] = sum over images and w of  g[o, w] * X[c, p[o, w] + t]
    grad_X[c, p + t]     = sum over the w and o that p won of  g[o, w] * weight[o, c, t]
    grad_bias[o]         = sum over images and w of  g[o, w]

Layout. An image lies in a *frame*, [group, row, column, channel] with its padding around it. A row of the kernel is
then one run of neighbouring numbers, KW * C of them: they are the lanes, in as many vectors as the run needs. The
weights lie likewise. Both sums are the same loop over a list of winners, with as many vectors of sums as the registers
hold:

    ============  ================  ======================  ===============================
    sum           list              vectors, from           sums are added to
    ============  ================  ======================  ===============================
    grad_weight   of a filter       the frame, at p[o, w]   the filter's sums
    grad_X        of a window cell  the weights of o        the gradient's frame, at p
    ============  ================  ======================  ===============================

The two loops are kernels of their own, compiled for a number of vectors. The main kernel calls them by their addresses,
which the plan has.

An image costs 2 * O * C * T * W FLOP for each of the two sums, W being the number of windows. The dense sums over all
pixels cost as much for each pixel. A chain has at most `CHAIN` products. A block's sums are added to its task's.

Zeros matter where something is not finite: 0 * inf is NaN in stock PyTorch. If an image is not finite, its lists for
the weight's gradient have all pixels. If a weight or a gradient is not finite, so have those for the input's.
"""

from __future__ import annotations

from typing import Any

from . import record
from .convolution import NO_WINNER, fill, vectors
from .lanes import (
    add,
    add_products,
    add_tile,
    byte_at,
    call,
    field,
    float_at,
    inlined,
    kernel,
    load,
    load_bytes,
    long_at,
    longs_at,
    set_float,
    set_long,
    splat,
    store,
    totals,
    where_not_equal,
    zeros,
)
from .plan import BYTES, CHAIN, ENTRY, LANES

ONE = (0,)


def pack() -> Any:
    """Return the kernel that lays the weights out as the input's gradient reads them."""

    @kernel(3)
    def pack(plan, weight, packed):
        """Write whether a weight is not finite, then [filter, vector, lane], zero where a lane has no weight."""
        rest = 0.0
        row, places = field(plan, record.ROW_BYTES), field(plan, record.LANE)
        filters, products = field(plan, record.GROUPS) * field(plan, record.FILTERS), field(plan, record.PRODUCTS)
        fill(packed + BYTES, row * filters)
        for o in range(filters):
            here = packed + BYTES + row * o
            for i in range(products):
                value = float_at(weight)
                set_float(here + field(places, i), value)
                rest += 0.0 * value
                weight += 4
        set_long(packed, 0 if rest == 0.0 else 1)

    return pack


@inlined
def finite(address, size):
    """Whether all numbers of some whole vectors are finite."""
    rest = zeros(ONE, ONE)
    for offset in range(0, size, BYTES):
        rest = add_products(rest, load(address + offset, ONE), zeros(ONE, ONE))
    return totals(rest)[0] == 0.0


@inlined
def total_of(numbers, count):
    """Sum so many numbers, in 16 chains; behind them there is room for a vector."""
    for i in range(count, count + LANES):
        set_float(numbers + 4 * i, 0.0)
    sums = zeros(ONE, ONE)
    for i in range(0, count, LANES):
        sums = add(sums, load(numbers + 4 * i, ONE))
    return totals(sums)[0]


@inlined
def exchange(plan, to_frame, image, steps, frame):
    """Copy an image to its frame, or back; `steps`: the field of its step from channel to channel, then row, column."""
    depth, plane = field(plan, record.CHANNELS), field(plan, record.PLANE_BYTES)
    channel_step, row_step, column_step = field(plan, steps), field(plan, steps + 1), field(plan, steps + 2)
    for group in range(field(plan, record.GROUPS)):
        for c in range(depth):
            for row in range(field(plan, record.ROWS)):
                outside = image + (group * depth + c) * channel_step + row * row_step
                inside = frame + group * plane + field(plan, record.FIRST) + row * field(plan, record.PITCH) + 4 * c
                for _ in range(field(plan, record.COLUMNS)):
                    if to_frame:
                        set_float(inside, float_at(outside))
                    else:
                        set_float(outside, float_at(inside))
                    inside += 4 * depth
                    outside += column_step


@inlined
def winners(plan, grads, argmax, frame, places, factors):
    """List a filter's winners: places in the frame, and gradients; return how many there are."""
    count, offsets = 0, field(plan, record.CELL_OFFSET)
    column_step = field(plan, record.WINDOW_COLUMN_STEP)
    grad_row, grad_column = field(plan, record.GRAD_STEPS + 2), field(plan, record.GRAD_STEPS + 3)
    argmax_row, argmax_column = field(plan, record.ARGMAX_STEPS + 2), field(plan, record.ARGMAX_STEPS + 3)
    columns = field(plan, record.POOLED_COLUMNS)
    for row in range(field(plan, record.POOLED_ROWS)):
        window = frame + row * field(plan, record.WINDOW_ROW_STEP)
        grad, arg = grads + row * grad_row, argmax + row * argmax_row
        for _ in range(columns):
            # What does not count is written, too, and then overwritten: a branch would be mispredicted.
            cell = byte_at(arg) + 1 & NO_WINNER
            set_long(places + 8 * count, window + field(offsets, cell))
            set_float(factors + 4 * count, float_at(grad))
            count += cell + NO_WINNER >> 8
            window += column_step
            grad += grad_column
            arg += argmax_column
    return count


@inlined
def everything(plan, grads, argmax, frame, dense, places, factors):
    """List all pixels of the convolution likewise, with the gradient 0 if they won nothing."""
    depth, bytes = field(plan, record.CHANNELS), field(plan, record.DENSE_BYTES)
    fill(dense, bytes)
    # A place in the frame has a number for each channel, in the dense gradient one.
    count = winners(plan, grads, argmax, 0, places, factors)
    for e in range(count):
        here = dense + field(places, e) // depth
        set_float(here, float_at(here) + float_at(factors + 4 * e))
    count = 0
    for row in range(field(plan, record.CONV_ROWS)):
        for column in range(field(plan, record.CONV_COLUMNS)):
            offset = row * field(plan, record.CONV_ROW_STEP) + column * field(plan, record.CONV_COLUMN_STEP)
            set_long(places + 8 * count, frame + offset)
            set_float(factors + 4 * count, float_at(dense + offset // depth))
            count += 1
    return count


@inlined
def exact_grad_input(plan, count, places, factors, weights):
    """Add a filter's part to the gradient's frame, pixel by pixel, and no lane that has no weight."""
    offsets, mask = field(plan, record.VECTOR), field(plan, record.MASK)
    for e in range(count):
        for v in range(field(plan, record.ROW_BYTES) // BYTES):
            values = load(weights + BYTES * v, ONE)
            part = add_products(zeros(ONE, ONE), values, splat(factors + 4 * e, ONE))
            part = where_not_equal(load_bytes(mask + LANES * v, ONE), 0, part)
            add_tile(field(places, e) + field(offsets, v), ONE, 0, part)


def add_winners(width: int) -> Any:
    """Return the kernel of a filter's part of the weight's gradient, with so many vectors of sums at a time."""
    many, beside = (0,) * width, vectors(width)

    @kernel(5)
    def add_winners(plan, count, places, factors, sums):
        """Add a list's part to a filter's sums."""
        offsets = field(plan, record.VECTOR)
        for t in range(field(plan, record.TILES)):
            vector, here = longs_at(offsets + 8 * width * t, many), sums + BYTES * width * t
            for start in range(0, count, CHAIN):
                tile = zeros(many, ONE)
                for e in range(start, min(start + CHAIN, count)):
                    tile = add_products(tile, load(field(places, e), vector), splat(factors + 4 * e, ONE))
                store(here, beside, add(load(here, beside), tile))

    return add_winners


def add_windows(width: int) -> Any:
    """Return the kernel of a group's part of the input's gradient, with so many vectors of sums at a time."""
    many, beside = (0,) * width, vectors(width)

    @kernel(6)
    def add_windows(plan, grads, argmax, weights, lists, frame):
        """Add a group's part to the gradient's frame, window by window.

        lists: for each cell, and for no cell, its end, then the weights and the gradients of its filters.
        """
        cells, own, row_bytes = field(plan, record.CELLS), field(plan, record.FILTERS), field(plan, record.ROW_BYTES)
        cell_offsets, offsets, each = field(plan, record.CELL_OFFSET), field(plan, record.VECTOR), 8 + ENTRY * own
        for row in range(field(plan, record.POOLED_ROWS)):
            window = frame + row * field(plan, record.WINDOW_ROW_STEP)
            first_grad = grads + row * field(plan, record.GRAD_STEPS + 2)
            first_arg = argmax + row * field(plan, record.ARGMAX_STEPS + 2)
            for _ in range(field(plan, record.POOLED_COLUMNS)):
                for k in range(cells + 1):
                    set_long(lists + each * k, lists + each * k + 8)
                grad, arg = first_grad, first_arg
                for o in range(own):
                    head = lists + each * (byte_at(arg) + 1 & NO_WINNER)
                    end = long_at(head)
                    set_long(end, weights + row_bytes * o)
                    set_float(end + 8, float_at(grad))
                    set_long(head, end + ENTRY)
                    grad += field(plan, record.GRAD_STEPS + 1)
                    arg += field(plan, record.ARGMAX_STEPS + 1)
                for k in range(1, cells + 1):
                    first, end = lists + each * k + 8, long_at(lists + each * k)
                    if end > first:
                        target = window + field(cell_offsets, k)
                        for t in range(field(plan, record.TILES)):
                            vector = longs_at(offsets + 8 * width * t, many)
                            for start in range(first, end, ENTRY * CHAIN):
                                tile = zeros(many, ONE)
                                for e in range(start, min(start + ENTRY * CHAIN, end), ENTRY):
                                    values = load(long_at(e) + BYTES * width * t, beside)
                                    tile = add_products(tile, values, splat(e + 8, ONE))
                                # Vector by vector: short runs overlap.
                                add_tile(target, vector, 0, tile)
                window += field(plan, record.WINDOW_COLUMN_STEP)
                first_grad += field(plan, record.GRAD_STEPS + 3)
                first_arg += field(plan, record.ARGMAX_STEPS + 3)

    return add_windows


def gradients() -> Any:
    """Return the kernel of the gradients."""

    @kernel(10)
    def gradients(plan, count, source, grads, argmax, weights, target, weight_sums, bias_sums, scratch):
        """Compute the gradients of so many images.

        source: the images. grads: of the pooled output. argmax: its winners. weights: as `pack` lays them out.
        target: the images' gradient, or 0 if not asked for. weight_sums, bias_sums: the parameters' gradients, which
        are added to, or 0. The plan has the steps of all images.
        """
        groups, own, row_bytes = field(plan, record.GROUPS), field(plan, record.FILTERS), field(plan, record.ROW_BYTES)
        frame_bytes, plane = field(plan, record.FRAME_BYTES), field(plan, record.PLANE_BYTES)
        grad_step, argmax_step = field(plan, record.GRAD_STEPS + 1), field(plan, record.ARGMAX_STEPS + 1)
        frame, grad_frame = scratch, scratch + frame_bytes
        sums = grad_frame + frame_bytes
        biases = sums + row_bytes * groups * own
        dense = biases + field(plan, record.BIAS_BYTES)
        places = dense + field(plan, record.DENSE_BYTES)
        factors = places + field(plan, record.LIST_BYTES)
        fill(frame, frame_bytes)
        fill(sums, dense - sums)
        for _ in range(count):
            plain = True
            if weight_sums != 0:
                exchange(plan, True, source, record.SOURCE_STEPS + 1, frame)
                plain = finite(frame, frame_bytes)
            rest = 0.0
            for o in range(groups * own):
                grad, arg, own_frame = grads + o * grad_step, argmax + o * argmax_step, frame + o // own * plane
                number = winners(plan, grad, arg, own_frame, places, factors)
                total = total_of(factors, number)
                rest += 0.0 * total
                if weight_sums != 0:
                    if not plain:
                        number = everything(plan, grad, arg, own_frame, dense, places, factors)
                    call(field(plan, record.ADD_WINNERS), (plan, number, places, factors, sums + row_bytes * o))
                    set_float(biases + 4 * o, float_at(biases + 4 * o) + total)
            if target != 0:
                fill(grad_frame, frame_bytes)
                if long_at(weights) == 0 and rest == 0.0:
                    for group in range(groups):
                        first, rows = group * own, weights + BYTES + row_bytes * group * own
                        grad, arg = grads + first * grad_step, argmax + first * argmax_step
                        group_frame = grad_frame + group * plane
                        call(field(plan, record.ADD_WINDOWS), (plan, grad, arg, rows, places, group_frame))
                else:
                    for o in range(groups * own):
                        # Filter by filter in the other frame: all in one would be one long chain of additions.
                        fill(frame, frame_bytes)
                        grad, arg, own_frame = grads + o * grad_step, argmax + o * argmax_step, frame + o // own * plane
                        number = everything(plan, grad, arg, own_frame, dense, places, factors)
                        exact_grad_input(plan, number, places, factors, weights + BYTES + row_bytes * o)
                        for offset in range(0, frame_bytes, BYTES):
                            add_tile(grad_frame + offset, ONE, 0, load(frame + offset, ONE))
                    fill(frame, frame_bytes)
                exchange(plan, False, target, record.TARGET_STEPS + 1, grad_frame)
                target += field(plan, record.TARGET_STEPS)
            source += field(plan, record.SOURCE_STEPS)
            grads += field(plan, record.GRAD_STEPS)
            argmax += field(plan, record.ARGMAX_STEPS)
        if weight_sums != 0:
            lanes, products = field(plan, record.LANE), field(plan, record.PRODUCTS)
            for o in range(groups * own):
                for i in range(products):
                    value = float_at(sums + row_bytes * o + field(lanes, i))
                    set_float(weight_sums, float_at(weight_sums) + value)
                    weight_sums += 4
                set_float(bias_sums + 4 * o, float_at(bias_sums + 4 * o) + float_at(biases + 4 * o))

    return gradients
