"""The launchers of `network`'s kernels: a row of fused layers as one call on CPU tensors."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import few, link, record, threads
from .compiled import address
from .conv2d_relu_max_pool2d import MOST_TASKS, backward_kernel, covers, dense
from .memory import empty
from .plan import BYTES, LANES, Plan, linear_tile, plan_of

Link: TypeAlias = ConvPoolGeometry | str
"""A convolution with relu and pool, ``"linear_relu"`` or ``"linear"``."""

PIECE_ROWS = 8
"""Rows of a parameter whose gradient one worker sums at a time."""


LITTLE_WORK = 1 << 24
"""FLOP of a block of 16 images, or of all of a few, up to which stock's operators take longer to be called."""


def chain_covers(input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]) -> str | None:
    """Why the kernels cannot compute a chain; None if they can."""
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (input, *parameters)):
        return "the compiled kernels compute in float32"
    shape = list(input.shape[1:])
    for place, weight in zip(links, parameters[::2], strict=True):
        assert weight is not None
        if isinstance(place, ConvPoolGeometry):
            reason = covers(torch.float32, shape, weight, place)
            if reason is not None:
                return reason
            conv = place.conv_size((shape[1], shape[2]), (weight.shape[2], weight.shape[3]))
            shape = [weight.shape[0], *place.pooled_size(conv)]
        elif weight.shape[1] < LANES:
            return f"a linear layer of a compiled chain has at least {LANES} inputs"
    return None


def chain_rejects(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link], save: bool = True
) -> str | None:
    """Why a chain is not covered, or not expected to win; None if it is. `save`: whether a backward may follow."""
    reason = chain_covers(input, parameters, links)
    if reason is not None:
        return reason
    images, *shape = input.shape
    flop = 0
    for place, weight in zip(links, parameters[::2], strict=True):
        assert weight is not None
        if isinstance(place, ConvPoolGeometry):
            conv = place.conv_size((shape[1], shape[2]), (weight.shape[2], weight.shape[3]))
            flop += 2 * LANES * weight.numel() * conv[0] * conv[1]
            shape = [weight.shape[0], *place.pooled_size(conv)]
        else:
            flop += 2 * LANES * weight.numel()
    if few.takes(images, links):
        work = flop * images // LANES
        return (
            None
            if work <= LITTLE_WORK
            else f"{images} images take {work >> 20} MFLOP, for which stock has more threads"
        )
    wanted = (0.2 if save else 0.0) if flop <= LITTLE_WORK else 0.45 if save else 0.2
    if images and threads.fill(images, LANES) < wanted:
        return f"{images} images keep too few of the {LANES} lanes of {torch.get_num_threads()} threads busy"
    return None


def chain(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the output of a chain and, to be saved, what its backward needs.

    Args:
        input: (N, C, H, W), or (N, K) where the first link is linear; any strides.
        parameters: weight and bias, or None, of each link.
        links: see `Link`; what enters the first linear link is flattened.
        save: whether a backward may follow.
    """
    if few.takes(input.shape[0], links):
        return few.forward(input, parameters, tuple(links), save)
    plan, input, parameters = _planned(input, parameters, links)
    images = input.shape[0]
    output = empty((images, *plan.output_shape), torch.float32, plan.layout)
    blocks = -(-images // LANES)
    kept = empty((blocks * plan.record_bytes // 4,), torch.float32) if save else None
    if not output.numel():
        return output, [] if kept is None else [kept]
    workers = threads.workers(blocks)
    head = _head(plan, plan.forward[save], input, parameters, workers)
    head[link.OUTPUT], head[link.OUTPUT_STEP] = output.data_ptr(), 4 * output.stride(0)
    head[link.RECORD] = 0 if kept is None else kept.data_ptr()
    scratch = empty((workers * head[link.SCRATCH_BYTES] // 4,), torch.float32)
    head[link.SCRATCH] = scratch.data_ptr()
    threads.run(address("network", "forward_chain"), head, workers)
    return output, [] if kept is None else [kept]


def chain_backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: Sequence[Link],
    saved: Sequence[Tensor],
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of input and parameters, None where `output_mask` does not ask for one.

    Args:
        grad_output: of the output's shape, any strides.
        input: the forward's.
        parameters: the forward's.
        links: the forward's.
        saved: what the forward returned.
        output_mask: whether to compute the gradient of the input, and of each parameter.
    """
    shapes = [None if tensor is None else tensor.shape for tensor in (input, *parameters)]
    if not any(output_mask):
        return [None] * len(shapes)
    if few.takes(input.shape[0], links):
        return few.backward(grad_output, input, parameters, tuple(links), saved, output_mask)
    plan, input, parameters = _planned(input, parameters, links)
    images = input.shape[0]
    if not images:
        return [
            input.new_zeros(shape) if needed and shape is not None else None
            for needed, shape in zip(output_mask, shapes, strict=True)
        ]
    grad_output = dense(grad_output, plan.layout) if grad_output.dim() == 4 else grad_output.contiguous()
    blocks = -(-images // LANES)
    blocks_each = -(-blocks // MOST_TASKS)
    tasks = -(-blocks // blocks_each)
    workers = threads.workers(tasks)
    head = _head(plan, plan.backward, input, parameters, workers)
    head[link.OUTPUT], head[link.OUTPUT_STEP] = grad_output.data_ptr(), 4 * grad_output.stride(0)
    head[link.RECORD] = saved[0].data_ptr()
    head[link.TASKS], head[link.BLOCKS] = tasks, blocks_each
    need_input, *needs = output_mask
    wanted = [any(needs[2 * i : 2 * i + 2]) for i in range(len(links))]
    for i, needed in enumerate(wanted):
        head[link.HEAD + link.SIZE * i + link.WANTED] = needed
    first = 0 if need_input else wanted.index(True)
    head[link.FIRST_WANTED] = first
    for i, conv in enumerate(plan.plans[first:], first):
        head[link.HEAD + link.SIZE * i + link.BACKWARD] = backward_kernel(conv.tile, need_input or i > first)
    grad_input = None
    if need_input:
        grad_input = empty(input.shape, torch.float32, plan.input_layout)
        head[link.GRAD_INPUT], head[link.GRAD_INPUT_STEP] = grad_input.data_ptr(), 4 * grad_input.stride(0)
    sums = empty((tasks, plan.sums_bytes // 4), torch.float32)
    head[link.SUMS] = sums.data_ptr()
    scratch = empty((workers * head[link.SCRATCH_BYTES] // 4,), torch.float32)
    head[link.SCRATCH] = scratch.data_ptr()
    threads.run(address("network", "backward_chain"), head, workers)
    grads: list[Tensor | None] = [grad_input]
    pieces: list[int] = []
    count = 0
    for parameter, needed, (source, width, step, rows) in zip(parameters, needs, plan.sums, strict=True):
        if parameter is None or not needed:
            grads.append(None)
            continue
        grad = empty(parameter.shape, torch.float32)
        grads.append(grad)
        for first in range(0, rows, PIECE_ROWS):
            pieces += grad.data_ptr(), source, width, step, first, min(first + PIECE_ROWS, rows)
            count += 1
    if count:
        head = head[: link.HEAD] + array("q", pieces)
        head[link.TAKEN], head[link.BLOCKS] = 0, count
        threads.run(address("network", "sum_tasks"), head, workers)
    return grads


class _Plan(NamedTuple):
    """What is known of a chain but for the number of images and the tensors' places.

    Attributes:
        forward: the table of integers for its forward, without and with a record for the backward.
        backward: likewise for its backward.
        record_bytes: size of a block's record.
        sums_bytes: size of a task's sums.
        sums: of each parameter's gradient, where it lies in the sums: offset, numbers and bytes of a row, and rows.
        output_shape: without the number of images.
        layout: of the output.
        input_layout: of the input.
        plans: of the convolutions: their tables must stay.
    """

    forward: tuple[array[int], array[int]]
    backward: array[int]
    record_bytes: int
    sums_bytes: int
    sums: tuple[tuple[int, int, int, int], ...]
    output_shape: tuple[int, ...]
    layout: torch.memory_format
    input_layout: torch.memory_format
    plans: tuple[Plan, ...]


class _Space:
    """Gives out places one after the other, each at the start of a cache line."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        place = self.size
        self.size += -(-size // BYTES) * BYTES
        return place


def _planned(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]
) -> tuple[_Plan, Tensor, list[Tensor | None]]:
    """Return a chain's plan, and its tensors in layouts that the kernels read."""
    layouts: list[bool] = []
    last = torch.contiguous_format
    for place, weight in zip(links, parameters[::2], strict=True):
        assert weight is not None
        if isinstance(place, ConvPoolGeometry):
            if last != torch.channels_last:
                last = memory_format(weight) if layouts else memory_format(input, weight)
            layouts.append(last == torch.channels_last)
            if weight.shape[0] == 1:  # stock's pool takes a single channel for plainly laid out
                last = torch.contiguous_format
    if input.dim() == 2:
        input = input.contiguous()
    else:
        input = dense(input, torch.channels_last if layouts[0] else torch.contiguous_format)
    shapes = tuple(tuple(weight.shape) for weight in parameters[::2] if weight is not None)
    flat = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    return _plan(tuple(input.shape[1:]), shapes, tuple(links), tuple(layouts)), input, flat


@functools.lru_cache(maxsize=128)
def _plan(
    input: tuple[int, ...], weights: tuple[tuple[int, ...], ...], links: tuple[Link, ...], layouts: tuple[bool, ...]
) -> _Plan:
    """Plan a chain: where everything lies in a worker's scratch, in a block's record and in a task's sums.

    Args:
        input: shape of an image.
        weights: their shapes.
        links: see `Link`.
        layouts: of the convolutions, whether stock's output would be channels_last.
    """
    tables: list[dict[int, int]] = []
    plans: list[Plan] = []
    tile = linear_tile()
    forward, backward, kept, sums = _Space(), _Space(), _Space(), _Space()
    places: list[tuple[int, int, int, int]] = []
    shape, numbers = input, torch.Size(input).numel()
    for space in (forward, backward):
        space.take(numbers * BYTES)
    conv_bytes = row_bytes = 0
    forward_tables: list[dict[int, int]] = []
    backward_tables: list[dict[int, int]] = []
    for i, (place, weight) in enumerate(zip(links, weights, strict=True)):
        table = {link.INPUTS: numbers}
        ahead: dict[int, int] = {}
        back: dict[int, int] = {link.GRAD_AT: backward.take(-(-numbers // tile.filters) * tile.filters * BYTES)}
        if isinstance(place, ConvPoolGeometry):
            if len(shape) != 3 or weight[1] * place.groups != shape[0]:
                raise ValueError(f"link {i}: a weight of shape {weight} does not fit images of shape {shape}")
            ends = i + 1 == len(links)
            plan = plan_of(shape, weight, place, layouts[0] and i == 0, layouts[i] and ends)
            plans.append(plan)
            shape = (weight[0], *plan.pooled_size)
            size = plan.record
            conv_bytes = max(conv_bytes, size[record.GRAD_AT] - size[record.CONV_AT])
            table[link.PLAN] = plan.address
            ahead[link.PACKED_AT], back[link.PACKED_AT] = (
                space.take(size[record.IMAGES_AT]) for space in (forward, backward)
            )
            ahead[link.PADDED_AT], back[link.PADDED_AT] = (
                space.take(size[record.PAD_BYTES]) for space in (forward, backward)
            )
            back[link.PARTIAL_AT] = backward.take(size[record.PARTIAL_BYTES])
            step = width = torch.Size(weight[1:]).numel()
            rows = weight[0]
            numbers = torch.Size(shape).numel()
            table[link.ARGMAX_AT] = kept.take(numbers * LANES)
        else:
            if weight[1] != numbers:
                raise ValueError(f"link {i}: a weight of shape {weight} does not fit {numbers} inputs")
            table[link.LINEAR], table[link.RELU] = 1, int(place == "linear_relu")
            rows, width = weight
            wide = LANES * tile.vectors
            step = -(-width // wide) * wide
            ahead[link.PACKED_AT] = forward.take(-(-rows // LANES) * width * BYTES)
            row_bytes = max(row_bytes, 4 * step)
            numbers, shape = rows, (rows,)
        # Tiles of the weight's gradient are whole.
        padded_rows = -(-rows // tile.filters) * tile.filters
        table[link.SUMS_STEP], table[link.OUTPUTS] = 4 * step, numbers
        if i + 1 < len(links) or place == "linear_relu":
            table[link.TARGET_AT] = kept.take(numbers * BYTES)
        else:
            table[link.TARGET_AT], table[link.PASSES] = forward.take(numbers * BYTES), 1
        if isinstance(place, ConvPoolGeometry):
            # `convolution.sum_lanes` writes the bias's gradient right behind the weight's.
            start = sums.take(4 * (rows * width + rows))
            table[link.SUMS_AT], table[link.BIAS_SUMS_AT] = start, start + 4 * rows * width
        else:
            table[link.SUMS_AT], table[link.BIAS_SUMS_AT] = sums.take(4 * padded_rows * step), sums.take(4 * rows)
        places += (table[link.SUMS_AT], width, 4 * step, rows), (table[link.BIAS_SUMS_AT], rows, 4 * rows, 1)
        tables.append(table)
        forward_tables.append(ahead)
        backward_tables.append(back)
    common = {link.LINKS: len(links), link.RECORD_BYTES: kept.size, link.SUMS_BYTES: sums.size}
    heads = []
    for saves in (0, 1):
        space = _Space()
        space.size = forward.size
        head = {
            link.CONV_AT: space.take(conv_bytes),
            link.RECORD_AT: space.take(0 if saves else kept.size),
        }
        head[link.SCRATCH_BYTES] = space.size
        heads.append(_table(common | head, [a | b for a, b in zip(tables, forward_tables, strict=True)]))
    head = {
        link.CONV_AT: backward.take(conv_bytes),
        link.ROWS_AT: backward.take(LANES * row_bytes),
        link.OUTPUT_GRAD_AT: backward.take(-(-numbers // tile.filters) * tile.filters * BYTES),
    }
    head[link.SCRATCH_BYTES] = backward.size
    back_head = _table(common | head, [a | b for a, b in zip(tables, backward_tables, strict=True)])
    return _Plan(
        (heads[0], heads[1]),
        back_head,
        kept.size,
        sums.size,
        tuple(places),
        shape,
        torch.channels_last if len(shape) == 3 and layouts[-1] and shape[0] > 1 else torch.contiguous_format,
        torch.channels_last if layouts and layouts[0] else torch.contiguous_format,
        tuple(plans),
    )


def _table(head: dict[int, int], links: Sequence[dict[int, int]]) -> array[int]:
    values = array("q", bytes(8 * (link.HEAD + link.SIZE * len(links))))
    for name, value in head.items():
        values[name] = value
    for i, table in enumerate(links):
        for name, value in table.items():
            values[link.HEAD + link.SIZE * i + name] = value
    return values


def _head(
    plan: _Plan, table: array[int], input: Tensor, parameters: Sequence[Tensor | None], workers: int
) -> array[int]:
    """A chain's table for one call: with the addresses of its tensors and of its convolutions' kernels."""
    head = array("q", table)
    head[link.EXCHANGE], head[link.IMAGES] = address("convolution", "exchange"), input.shape[0]
    head[link.INPUT], head[link.INPUT_STEP] = input.data_ptr(), 4 * input.stride(0)
    backward = table is plan.backward
    for i in range(head[link.LINKS]):
        place = link.HEAD + link.SIZE * i
        weight, bias = parameters[2 * i : 2 * i + 2]
        assert weight is not None
        head[place + link.WEIGHT] = weight.data_ptr()
        head[place + link.BIAS] = 0 if bias is None else bias.data_ptr()
    for i, conv in enumerate(plan.plans):
        if not backward:
            tile = conv.tile
            kernel = address("convolution", "forward_block", tile.filters, tile.pixels, int(table is plan.forward[1]))
            head[link.HEAD + link.SIZE * i + link.FORWARD] = kernel
    return head
