"""Kernel of the gradients of max_pool2d(relu(conv2d(input, weight, bias))), image by image.

With X the padded input, and for each filter o and window w the gradient g[o, w] and the pixel p[o, w] that won, only
winners count (of 2x2 windows at most one pixel of four; none where no cell was above 0):

    grad_weight[o, c, t] = sum over images and w of  g[o, w] * X[c, p[o, w] + t]
    grad_X[c, p + t]     = sum over the w and o that p won of  g[o, w] * weight[o, c, t]
    grad_bias[o]         = sum over images and w of  g[o, w]

Layout. An image lies in a *frame*, [group, row, column, channel] with its padding around it, so that a row of the kernel
is one run of neighbouring numbers, KW * C of them: they are the lanes, in as many vectors as the run needs. The weights
lie likewise. Both sums are then the same loop over a list of winners, with as many vectors of sums as the registers hold:

    ============  ================  ======================  ===============================
    sum           list              vectors, from           sums are added to
    ============  ================  ======================  ===============================
    grad_weight   of a filter       the frame, at p[o, w]   the filter's sums
    grad_X        of a window cell  the weights of o        the gradient's frame, at p
    ============  ================  ======================  ===============================

An image costs 2 * O * C * T * W FLOP for each of the two sums, W being the number of windows, where the dense sums cost
as much for each pixel. Chains have at most `CHAIN` products; a block's sums are added to its task's.

Zeros matter where something is not finite: 0 * inf is NaN in stock PyTorch. If an image is not finite, its lists for the
weight's gradient have all pixels; if a weight or a gradient is not finite, so have those for the input's.
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


def clear() -> Any:
    """Return the kernel that fills numbers with zeros."""

    @kernel(2)
    def clear(address, count):
        """Fill so many numbers."""
        for i in range(count):
            set_float(address + 4 * i, 0.0)

    return clear


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


def gradients(width: int) -> Any:
    """Return the kernel of the gradients, with so many vectors of sums at a time."""
    many, beside, masks = (0,) * width, vectors(width), tuple(LANES * i for i in range(width))

    @inlined
    def winners(plan, grads, argmax, frame, entries):
        """List a filter's winners: place in the frame and gradient; return the list's end and the gradients' sum."""
        place, cells, total = field(plan, record.PLACE), field(plan, record.CELLS), 0.0
        for row in range(field(plan, record.POOLED_ROWS)):
            grad, arg = (
                grads + row * field(plan, record.GRAD_STEPS + 2),
                argmax + row * field(plan, record.ARGMAX_STEPS + 2),
            )
            for _ in range(field(plan, record.POOLED_COLUMNS)):
                cell = byte_at(arg)
                live = 1 if cell != NO_WINNER else 0
                value = float_at(grad)
                set_long(entries, frame + field(place, cell & -live))
                set_float(entries + 8, value)
                total += value if live else 0.0
                entries += ENTRY * live
                place += 8 * cells
                grad += field(plan, record.GRAD_STEPS + 3)
                arg += field(plan, record.ARGMAX_STEPS + 3)
        return entries, total

    @inlined
    def everything(plan, grads, argmax, frame, dense, entries):
        """List all pixels of the convolution likewise, with the gradient 0 if they won nothing; return the list's end."""
        place, cells, depth = field(plan, record.PLACE), field(plan, record.CELLS), field(plan, record.CHANNELS)
        fill(dense, field(plan, record.DENSE_BYTES))
        for row in range(field(plan, record.POOLED_ROWS)):
            for column in range(field(plan, record.POOLED_COLUMNS)):
                cell = byte_at(
                    argmax + row * field(plan, record.ARGMAX_STEPS + 2) + column * field(plan, record.ARGMAX_STEPS + 3)
                )
                if cell != NO_WINNER:
                    here = dense + field(place, cell) // depth
                    value = float_at(
                        grads + row * field(plan, record.GRAD_STEPS + 2) + column * field(plan, record.GRAD_STEPS + 3)
                    )
                    set_float(here, float_at(here) + value)
                place += 8 * cells
        for row in range(field(plan, record.CONV_ROWS)):
            for column in range(field(plan, record.CONV_COLUMNS)):
                offset = row * field(plan, record.CONV_ROW_STEP) + column * field(plan, record.CONV_COLUMN_STEP)
                set_long(entries, frame + offset)
                set_float(entries + 8, float_at(dense + offset // depth))
                entries += ENTRY
        return entries

    @inlined
    def weight_sums_of(plan, entries, end, sums):
        """Add a list's part to a filter's sums."""
        offsets = field(plan, record.VECTOR)
        for t in range(field(plan, record.TILES)):
            places, here = longs_at(offsets + 8 * width * t, many), sums + BYTES * width * t
            for start in range(entries, end, ENTRY * CHAIN):
                tile = zeros(many, ONE)
                for e in range(start, min(start + ENTRY * CHAIN, end), ENTRY):
                    tile = add_products(tile, load(long_at(e), places), splat(e + 8, ONE))
                store(here, beside, add(load(here, beside), tile))

    @inlined
    def input_sums_of(plan, entries, end, target):
        """Add a list's part to the gradient's frame, vector by vector: short runs overlap."""
        offsets = field(plan, record.VECTOR)
        for t in range(field(plan, record.TILES)):
            places = longs_at(offsets + 8 * width * t, many)
            for start in range(entries, end, ENTRY * CHAIN):
                tile = zeros(many, ONE)
                for e in range(start, min(start + ENTRY * CHAIN, end), ENTRY):
                    tile = add_products(tile, load(long_at(e) + BYTES * width * t, beside), splat(e + 8, ONE))
                add_tile(target, places, 0, tile)

    @inlined
    def grad_input(plan, grads, argmax, weights, lists, frame):
        """Add a group's part to the gradient's frame, window by window; `lists`: of each cell, and of no cell."""
        cells, own, row_bytes = field(plan, record.CELLS), field(plan, record.FILTERS), field(plan, record.ROW_BYTES)
        place, each = field(plan, record.PLACE), BYTES + ENTRY * own
        for row in range(field(plan, record.POOLED_ROWS)):
            for column in range(field(plan, record.POOLED_COLUMNS)):
                for k in range(cells + 1):
                    set_long(lists + each * k, lists + each * k + BYTES)
                grad = grads + row * field(plan, record.GRAD_STEPS + 2) + column * field(plan, record.GRAD_STEPS + 3)
                arg = (
                    argmax + row * field(plan, record.ARGMAX_STEPS + 2) + column * field(plan, record.ARGMAX_STEPS + 3)
                )
                for o in range(own):
                    cell = byte_at(arg)
                    head = lists + each * (cells if cell == NO_WINNER else cell)
                    end = long_at(head)
                    set_long(end, weights + row_bytes * o)
                    set_float(end + 8, float_at(grad))
                    set_long(head, end + ENTRY)
                    grad += field(plan, record.GRAD_STEPS + 1)
                    arg += field(plan, record.ARGMAX_STEPS + 1)
                for k in range(cells):
                    head = lists + each * k
                    if long_at(head) > head + BYTES:
                        input_sums_of(plan, head + BYTES, long_at(head), frame + field(place, k))
                place += 8 * cells

    @inlined
    def exact_grad_input(plan, entries, end, weights):
        """Add a filter's part to the gradient's frame, pixel by pixel, and no lane that has no weight."""
        offsets, mask = field(plan, record.VECTOR), field(plan, record.MASK)
        for e in range(entries, end, ENTRY):
            for t in range(field(plan, record.TILES)):
                places, factors = longs_at(offsets + 8 * width * t, many), load(weights + BYTES * width * t, beside)
                tile = add_products(zeros(many, ONE), factors, splat(e + 8, ONE))
                tile = where_not_equal(load_bytes(mask + LANES * width * t, masks), 0, tile)
                add_tile(long_at(e), places, 0, tile)

    @kernel(10)
    def gradients(plan, count, source, grads, argmax, weights, target, weight_sums, bias_sums, scratch):
        """Compute the gradients of so many images.

        source: the images. grads: of the pooled output. argmax: its winners. weights: as `pack` lays them out. target:
        the images' gradient, or 0 if not asked for. weight_sums, bias_sums: gradients of the parameters, which are added
        to; or 0. The plan has the steps of all images.
        """
        groups, own, row_bytes = field(plan, record.GROUPS), field(plan, record.FILTERS), field(plan, record.ROW_BYTES)
        frame_bytes, plane = field(plan, record.FRAME_BYTES), field(plan, record.PLANE_BYTES)
        frame, grad_frame = scratch, scratch + frame_bytes
        sums = grad_frame + frame_bytes
        biases = sums + row_bytes * groups * own
        dense = biases + field(plan, record.BIAS_BYTES)
        entries = dense + field(plan, record.DENSE_BYTES)
        fill(frame, frame_bytes)
        fill(sums, dense - sums)
        for _ in range(count):
            plain = True
            if weight_sums != 0:
                exchange(plan, True, source, record.SOURCE_STEPS + 1, frame)
                plain = finite(frame, frame_bytes)
            rest = 0.0
            for o in range(groups * own):
                grad, arg = (
                    grads + o * field(plan, record.GRAD_STEPS + 1),
                    argmax + o * field(plan, record.ARGMAX_STEPS + 1),
                )
                own_frame = frame + o // own * plane
                end, total = winners(plan, grad, arg, own_frame, entries)
                rest += 0.0 * total
                if weight_sums != 0:
                    if not plain:
                        end = everything(plan, grad, arg, own_frame, dense, entries)
                    weight_sums_of(plan, entries, end, sums + row_bytes * o)
                    set_float(biases + 4 * o, float_at(biases + 4 * o) + total)
            if target != 0:
                fill(grad_frame, frame_bytes)
                if long_at(weights) == 0 and rest == 0.0:
                    for group in range(groups):
                        first = group * own
                        grad_input(
                            plan,
                            grads + first * field(plan, record.GRAD_STEPS + 1),
                            argmax + first * field(plan, record.ARGMAX_STEPS + 1),
                            weights + BYTES + row_bytes * first,
                            entries,
                            grad_frame + group * plane,
                        )
                else:
                    for o in range(groups * own):
                        grad = grads + o * field(plan, record.GRAD_STEPS + 1)
                        arg = argmax + o * field(plan, record.ARGMAX_STEPS + 1)
                        end = everything(plan, grad, arg, grad_frame + o // own * plane, dense, entries)
                        exact_grad_input(plan, entries, end, weights + BYTES + row_bytes * o)
                exchange(plan, False, target, record.TARGET_STEPS + 1, grad_frame)
                target += field(plan, record.TARGET_STEPS)
            source += field(plan, record.SOURCE_STEPS)
            grads += field(plan, record.GRAD_STEPS)
            argmax += field(plan, record.ARGMAX_STEPS)
        if weight_sums != 0:
            places, products = field(plan, record.LANE), field(plan, record.PRODUCTS)
            for o in range(groups * own):
                for i in range(products):
                    value = float_at(sums + row_bytes * o + field(places, i))
                    set_float(weight_sums, float_at(weight_sums) + value)
                    weight_sums += 4
                set_float(bias_sums + 4 * o, float_at(bias_sums + 4 * o) + float_at(biases + 4 * o))

    return gradients
