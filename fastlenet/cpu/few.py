"""The launchers of `image`'s kernels: a chain of a few images on CPU tensors."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, Pair, memory_format

from . import program, record, threads
from .memory import empty
from .plan import BYTES, LANES, OneImage, Plan, Steps, gradients_of, plan_of, steps_of
from .program import NOTHING, UNIT, At, Link, Program, Step, exchange, step

MOST_IMAGES = 7
"""Images that are computed one after the other: 16 as the lanes of a vector take as long as some eight.

Their number alone decides, so that results are equal for any number of threads.
"""

DIVIDED_WORK = 1 << 21
"""FLOP of a few images, or of a convolution of one, from which threads share them. To call threads costs some 10 us."""
DIVIDED_BYTES = 1 << 20
"""Bytes of a linear layer's weight from which threads share its outputs for one image: one core's cache is full."""
LITTLE_WORK = 1 << 24
"""FLOP of a thread's share up to which stock's operators take longer to be called."""
UNEVEN = 1.25
"""How many times its even share of more work a thread may have. An even share takes as long as oneDNN's."""
WIDE = 3072
"""Channels times filters from which oneDNN's convolutions are faster."""


def takes(images: int, links: Sequence[Link]) -> bool:
    """Whether a chain of so many images is computed image by image."""
    return 0 < images <= MOST_IMAGES and all(link.groups == 1 for link in links if isinstance(link, ConvPoolGeometry))


def rejects(images: int, weights: Sequence[Tensor], flop: Sequence[int], save: bool) -> str | None:
    """Why a chain that `takes` takes is not expected to win; None if it is.

    Args:
        images: their number.
        weights: of the links.
        flop: of each link for one image.
        save: whether a backward may follow, which one thread computes.
    """
    convolutions = [weight for weight in weights if weight.dim() == 4]
    if save or images > 1:
        longest = sum(flop) * (images if save else -(-images // threads.workers(images)))
    else:
        longest = sum(map(_longest, flop, weights))
    share = sum(flop) * images / torch.get_num_threads()
    widest = max((weight.shape[0] * weight.shape[1] for weight in convolutions), default=0)
    if longest <= LITTLE_WORK or (longest <= UNEVEN * share and widest < WIDE):
        return None
    return f"{images} images take a thread {longest >> 20} MFLOP, and stock's operators {int(share) >> 20}"


def _longest(flop: int, weight: Tensor) -> int:
    """What of a link's FLOP, in the forward of one image, the thread has that has most."""
    vectors = -(-weight.shape[0] // LANES)
    if weight.dim() < 4 or flop < DIVIDED_WORK:
        return flop
    return flop * -(-vectors // threads.workers(vectors)) // vectors


class _Layer(NamedTuple):
    """A link, and where its results lie.

    Attributes:
        link: see `Link`.
        plan: of a convolution's forward.
        weight: its shape.
        image: shape of what comes in, without padding.
        shape: of what goes out, likewise.
        source: a convolution's image with its padding.
        in_lanes: whether that has channels as lanes.
        padding: of the next convolution: a frame of zeros around a convolution's pooled image, wherever it lies.
        lanes_at: a convolution's output with filters as lanes, in the scratch.
        lanes_argmax_at: its argmax, likewise.
        target_at: what goes out, as images have it, in the record.
        argmax_at: a convolution's, likewise.
    """

    link: Link
    plan: Plan | None
    weight: tuple[int, ...]
    image: tuple[int, ...]
    shape: tuple[int, ...]
    source: tuple[int, int, int] = (0, 0, 0)
    in_lanes: bool = False
    padding: Pair = (0, 0)
    lanes_at: int = 0
    lanes_argmax_at: int = 0
    target_at: int = 0
    argmax_at: int = 0

    @property
    def vectors(self) -> int:
        """Of 16 filters or outputs."""
        return -(-self.weight[0] // LANES)

    @property
    def framed(self) -> tuple[int, int]:
        """Height and width of a convolution's pooled image with its frame."""
        return self.shape[1] + 2 * self.padding[0], self.shape[2] + 2 * self.padding[1]


class _Layers(NamedTuple):
    """A chain's layers, bytes of an image's record and of the lanes in the scratch, and the output's shape."""

    layers: tuple[_Layer, ...]
    record_bytes: int
    lanes_bytes: int
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _layers(image: tuple[int, ...], weights: tuple[tuple[int, ...], ...], links: tuple[Link, ...]) -> _Layers:
    """Plan the links."""
    # A record is dense: in training it is kept.
    kept, lanes = program.Space(4), program.Space()
    layers: list[_Layer] = []
    shape, in_lanes = image, False
    for i, (link, weight) in enumerate(zip(links, weights, strict=True)):
        before, onward = shape, links[i + 1] if i + 1 < len(links) else None
        if not isinstance(link, ConvPoolGeometry):
            place = kept.take(0 if onward is None and link == "linear" else 4 * weight[0])
            shape = (weight[0],)
            layers.append(_Layer(link, None, weight, before, shape, target_at=place))
            continue
        padding = onward.padding if isinstance(onward, ConvPoolGeometry) else (0, 0)
        source = (shape[0], shape[1] + 2 * link.padding[0], shape[2] + 2 * link.padding[1])
        plan = _plan(source, weight, link, in_lanes, padding)
        shape, size = (weight[0], *plan.pooled_size), plan.record[record.TARGET_BYTES]
        places = lanes.take(size), lanes.take(size // 4)
        layer = _Layer(link, plan, weight, before, shape, source, in_lanes, padding, *places)
        in_lanes = True
        numbers = weight[0] * layer.framed[0] * layer.framed[1]
        target_at, argmax_at = kept.take(0 if onward is None else 4 * numbers), kept.take(numbers)
        layers.append(layer._replace(target_at=target_at, argmax_at=argmax_at))
    return _Layers(tuple(layers), kept.size, lanes.size, shape)


def _plan(source: tuple[int, int, int], weight: tuple[int, ...], link: Link, in_lanes: bool, padding: Pair) -> Plan:
    """Plan a convolution of an image that has its padding; `padding`: of the convolution that follows."""
    assert isinstance(link, ConvPoolGeometry)
    return plan_of(source, weight, link._replace(padding=(0, 0)), False, False, OneImage(in_lanes, padding))


def _flop(plan: Plan) -> int:
    """FLOP of a convolution of one image."""
    sums = plan.record[record.PIXEL_TILES] * plan.tile.pixels * plan.record[record.FILTERS] * LANES
    return 2 * sums * plan.record[record.PRODUCTS]


def _from_lanes(size: int, layer: _Layer, images: At, lanes: At) -> list[Step]:
    """Steps that turn a convolution's results of `size` bytes, filters as lanes, to what images have."""
    height, width = layer.framed
    return [
        exchange(
            0,
            size,
            images.plus(size * height * width * first),
            size * height * width,
            min(LANES, layer.weight[0] - first),
            lanes.plus(size * height * width * first),
            height * width,
        )
        for first in range(0, layer.weight[0], LANES)
    ]


class _Stage(NamedTuple):
    """Steps that the threads share unit by unit: images, or vectors of a layer's filters or outputs.

    Attributes:
        units: the number of vectors; 0 for images.
        filters: their number, or that of outputs; likewise.
        steps: see `program.listed`.
    """

    units: int
    filters: int
    steps: array[int]


class _Forward(NamedTuple):
    """The stages of a forward, one after the other, and the memory they need.

    Attributes:
        stages: see `_Stage`.
        flop: of an image.
        scratch_bytes: of a worker.
        shared_bytes: of all workers.
        record_bytes: what an image keeps for the backward.
        output_shape: of an image.
        plans: their tables must stay.
    """

    stages: tuple[_Stage, ...]
    flop: int
    scratch_bytes: int
    shared_bytes: int
    record_bytes: int
    output_shape: tuple[int, ...]
    plans: tuple[Plan, ...]


@functools.lru_cache(maxsize=256)
def _forward(
    image: tuple[int, ...], weights: tuple[tuple[int, ...], ...], links: tuple[Link, ...], save: bool, divided: bool
) -> _Forward:
    """Plan a forward; `divided`: of one image, the threads share the filters of each large convolution."""
    layers, record_bytes, lanes_bytes, shape = _layers(image, weights, links)
    scratch, shared = program.Scratch(len(layers)), program.Space()
    stages: list[_Stage] = []
    before: list[Step] = []
    each: list[Step] = []

    def at(size: int) -> At:
        """What a worker has for each of its images, or all workers for the one image."""
        return At(program.SUMS, shared.take(size)) if divided else scratch.at(size)

    kept = At(program.RECORD, 0, record_bytes) if save else at(record_bytes)
    lanes = at(lanes_bytes)
    conv = scratch.at(max((layer.plan.record[record.CONV_BYTES] for layer in layers if layer.plan), default=0))
    source = At(program.INPUT, 0, 4 * torch.Size(image).numel())
    output = At(program.OUTPUT, 0, 4 * torch.Size(shape).numel())
    opening, plans = links[0], []
    if isinstance(opening, ConvPoolGeometry) and opening.padding != (0, 0):
        padded = at(4 * torch.Size(layers[0].source).numel())
        each.append(step("image", "pad", source, *image, *opening.padding, padded))
        source = padded
    for i, layer in enumerate(layers):
        weight, bias, *_, missing = program.parameters_of(i)
        ends = i + 1 == len(layers)
        if layer.plan is None:
            relu = int(layer.link == "linear_relu")
            # The backward needs what relu let pass; the output's user may modify it.
            target = output if ends and not (relu and save) else kept.plus(layer.target_at)
            inputs, outputs = torch.Size(layer.image).numel(), layer.weight[0]
            if divided and 4 * inputs * outputs >= DIVIDED_BYTES:
                stages.append(_Stage(0, 0, program.listed(before, [], each, [])))
                places = source._replace(step=0), weight._replace(step=4 * inputs * LANES), bias
                ends_at = relu, target._replace(step=BYTES), At(program.ZERO, 0, LANES)
                own = [step("image", "linear", *places, inputs, At(program.COUNT), *ends_at)]
                stages.append(_Stage(layer.vectors, outputs, program.listed([], [], own, [])))
                before, each = [], []
            else:
                each.append(step("image", "linear", source, weight, bias, inputs, outputs, relu, target, 0))
            source = target
            continue
        depth = torch.Size(layer.weight[1:]).numel()
        row = BYTES * (depth + 1)
        packed = at(row * layer.vectors)
        target, argmax = lanes.plus(layer.lanes_at), lanes.plus(layer.lanes_argmax_at)
        plan, vectors = layer.plan, layer.vectors
        kernel = "forward_block", plan.tile.filters, plan.tile.pixels, int(save), 1
        if any(layer.padding):
            each.append(step("convolution", "clear", target, plan.record[record.TARGET_BYTES]))
        for first in range(0, layer.weight[0], LANES):
            place, live = packed.plus(row * (first // LANES)), min(LANES, layer.weight[0] - first)
            before.append(exchange(1, 4, bias.plus(4 * first), 4, missing.plus(live), place, 1))
        if divided and vectors > 1 and _flop(plan) >= DIVIDED_WORK:
            stages.append(_Stage(0, 0, program.listed(before, [], each, [])))
            plan = _plan(layer.source, (LANES, *layer.weight[1:]), layer.link, layer.in_lanes, layer.padding)
            rows_of_vector = weight._replace(step=4 * depth * LANES)
            places = (
                packed._replace(step=row),
                target._replace(step=plan.record[record.TARGET_STEP]),
                argmax._replace(step=plan.record[record.TARGET_STEP] // 4),
            )
            own = [
                exchange(1, 4, rows_of_vector, 4 * depth, At(program.COUNT), places[0].plus(BYTES), depth),
                step("convolution", kernel, plan.address, source._replace(step=0), *places, conv),
            ]
            stages.append(_Stage(vectors, layer.weight[0], program.listed([], [], own, [])))
            before, each = [], []
        else:
            for first in range(0, layer.weight[0], LANES):
                rows = weight.plus(4 * depth * first), 4 * depth, min(LANES, layer.weight[0] - first)
                before.append(exchange(1, 4, *rows, packed.plus(row * (first // LANES) + BYTES), depth))
            each.append(step("convolution", kernel, plan.address, source, packed, target, argmax, conv))
        plans.append(plan)
        source, flat = target, output if ends else kept.plus(layer.target_at)
        if ends or save or layers[i + 1].plan is None:
            each += _from_lanes(4, layer, flat, target)
        if not ends and layers[i + 1].plan is None:
            source = flat
        if save:
            each += _from_lanes(1, layer, kept.plus(layer.argmax_at), argmax)
    stages.append(_Stage(0, 0, program.listed(before, [], each, [])))
    flop = sum(_flop(layer.plan) if layer.plan else 2 * torch.Size(layer.weight).numel() for layer in layers)
    record_bytes = record_bytes if save else 0
    return _Forward(tuple(stages), flop, scratch.size, shared.size, record_bytes, shape, tuple(plans))


@functools.lru_cache(maxsize=256)
def _backward(
    image: tuple[int, ...],
    weights: tuple[tuple[int, ...], ...],
    links: tuple[Link, ...],
    source_steps: Steps,
    need_input: bool,
    wanted: tuple[bool, ...],
) -> Program:
    """Steps of the gradients; `wanted`: of each link, whether its parameters need some; `source_steps`: the input's."""
    layers, record_bytes, _, shape = _layers(image, weights, links)
    scratch = program.Scratch(len(layers))
    before: list[Step] = []
    each: list[Step] = []
    first_wanted = 0 if need_input else wanted.index(True)
    kept, plans = At(program.RECORD, 0, record_bytes), []
    grad = At(program.OUTPUT, 0, 4 * torch.Size(shape).numel())
    for i in reversed(range(first_wanted, len(layers))):
        layer, last = layers[i], layers[i - 1]
        weight, _, grad_weight, grad_bias, _ = program.parameters_of(i)
        numbers, onward = torch.Size(layer.image).numel(), i > first_wanted or need_input
        source, target = At(program.INPUT, 0, source_steps[0]), NOTHING
        if i:
            source = kept.plus(last.target_at)
        if onward:
            target = scratch.at(4 * numbers) if i else At(program.GRAD_INPUT, 0, 4 * numbers)
        if layer.plan is None:
            result = kept.plus(layer.target_at) if layer.link == "linear_relu" else NOTHING
            sizes = numbers, layer.weight[0]
            grads = grad_weight, grad_bias, target, UNIT
            each.append(step("image", "linear_grads", grad, result, source, weight, *sizes, *grads))
            grad = target
            continue
        steps = source_steps
        if i:
            (rows, columns), (height, width) = last.padding, last.framed
            source, steps = source.plus(4 * (rows * width + columns)), (0, 4 * height * width, 4 * width, 4)
        assert isinstance(layer.link, ConvPoolGeometry)
        height, width = layer.framed
        rows, columns = layer.padding
        argmax = kept.plus(layer.argmax_at).plus(rows * width + columns)
        plan = gradients_of(
            layer.image,
            layer.weight,
            layer.link,
            steps,
            steps_of(layer.shape),
            (0, height * width, width, 1),
            steps_of(layer.image) if onward else None,
        )
        plans.append(plan)
        packed = NOTHING
        if onward:
            packed = scratch.at(plan.packed_bytes)
            before.append(step("gradients", "pack", plan.address, weight, packed))
        sums = (grad_weight, grad_bias) if wanted[i] else (NOTHING, NOTHING)
        if wanted[i]:
            before.append(step("convolution", "clear", grad_weight, 4 * torch.Size(layer.weight).numel()))
            before.append(step("convolution", "clear", grad_bias, 4 * layer.weight[0]))
        places = source, grad, argmax, packed, target, *sums, scratch.at(plan.scratch_bytes)
        each.append(step("gradients", "gradients", plan.address, 1, *places))
        grad = target
    return Program(program.listed([], before, each, []), scratch.size, record_bytes, 0, shape, tuple(plans))


def _flat(parameters: Sequence[Tensor | None]) -> tuple[list[Tensor | None], tuple[tuple[int, ...], ...]]:
    """Return the parameters, contiguous, and the weights' shapes."""
    flat = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    return flat, tuple(weight.shape for weight in parameters[::2] if weight is not None)


def _output_format(input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]) -> torch.memory_format:
    """The layout of stock's output, where that is a convolution's."""
    layout = torch.contiguous_format
    if isinstance(links[-1], ConvPoolGeometry):
        layout = memory_format(input)
        for weight in parameters[::2]:
            assert weight is not None
            if weight.shape[0] == 1:  # stock's pool takes a single channel for plainly laid out
                layout = torch.contiguous_format
            elif layout != torch.channels_last:
                layout = memory_format(weight)
    return layout


def _laid_out(result: Tensor, layout: torch.memory_format) -> Tensor:
    """Give a result its layout, also in the strides of dimensions of size 1, which `contiguous` leaves as they are."""
    if layout == torch.contiguous_format:
        return result.contiguous()
    return empty(result.shape, torch.float32, layout).copy_(result)


def forward(
    input: Tensor, parameters: Sequence[Tensor | None], links: tuple[Link, ...], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Do what `chain.chain` does."""
    layout, images, image = _output_format(input, parameters, links), input.shape[0], input.shape[1:]
    input, (parameters, weights) = input.contiguous(), _flat(parameters)
    made = _forward(image, weights, links, save, images == 1 and threads.workers(2) > 1)
    output = empty((images, *made.output_shape), torch.float32)
    kept = empty((images, made.record_bytes // 4), torch.float32) if save else None
    of_images = threads.workers(images) if images * made.flop >= DIVIDED_WORK else 1
    workers = [threads.workers(stage.units) if stage.units else of_images for stage in made.stages]
    scratch_bytes = max(workers) * made.scratch_bytes
    memory = empty(((scratch_bytes + made.shared_bytes) // 4,), torch.float32)
    if output.numel():
        scratch = memory.data_ptr()
        rest = [0, scratch, made.scratch_bytes, scratch + scratch_bytes, 0, 0]
        rest += input.data_ptr(), output.data_ptr(), program.place(kept), 0
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            rest += program.place(weight), program.place(bias), 0, 0, -LANES if bias is None else 0
        for stage, sharing in zip(made.stages, workers, strict=True):
            units = stage.units or images
            program.run(stage.steps, sharing, units, 1, units, [stage.filters or images, *rest])
        if kept is not None and links[-1] == "linear_relu":
            output.copy_(kept[:, -output.shape[1] :])
    return _laid_out(output, layout), [] if kept is None else [kept]


def layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Do what `conv2d_relu_max_pool2d.conv2d_relu_max_pool2d` does."""
    output, kept = forward(input, (weight, bias), (geometry,), return_argmax)
    if not kept:
        return output, None
    # A layer's record is its argmax.
    argmax = kept[0].view(torch.uint8)[:, : output[:1].numel()].unflatten(1, output.shape[1:])
    return output, torch.empty_like(output, dtype=torch.uint8).copy_(argmax)


def backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: tuple[Link, ...],
    kept: Tensor,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Do what `chain.chain_backward` does; `kept`: what the forward returned."""
    if not isinstance(links[0], ConvPoolGeometry):
        input = input.contiguous()
    parameters, weights = _flat(parameters)
    need_input, *needs = output_mask
    wanted = tuple(needs[i] or needs[i + 1] for i in range(0, len(needs), 2))
    steps = tuple(4 * step for step in input.stride())
    made = _backward(input.shape[1:], weights, links, steps, need_input, wanted)
    grad_output = grad_output.contiguous()
    if links[-1] == "linear_relu":
        grad_output = grad_output.clone()  # what relu stopped is taken out of it
    images = input.shape[0]
    scratch = empty((made.scratch_bytes // 4,), torch.float32)
    grad_input = empty(input.shape, torch.float32) if need_input else None
    grads: list[Tensor | None] = [grad_input]
    rest = [images, 0, scratch.data_ptr(), made.scratch_bytes, 0, 0, 0, input.data_ptr()]
    rest += grad_output.data_ptr(), kept.data_ptr(), program.place(grad_input)
    unasked = []
    for i, weight in enumerate(parameters[::2]):
        assert weight is not None
        rest += weight.data_ptr(), 0
        for shape, needed in ((weight.shape, needs[2 * i]), (weight.shape[:1], needs[2 * i + 1])):
            grad = empty(shape, torch.float32) if needed else None
            grads.append(grad)
            if grad is None and wanted[i] and isinstance(links[i], ConvPoolGeometry):
                # A convolution has both, or neither.
                grad = empty(shape, torch.float32)
                unasked.append(grad)
            rest.append(program.place(grad))
        rest.append(0)
    program.run(made.steps, 1, 1, images, images, rest)
    if grad_input is not None:
        layout = torch.contiguous_format
        if isinstance(links[0], ConvPoolGeometry):
            weight = parameters[0]
            assert weight is not None
            layout = memory_format(input, weight)
        grads[0] = _laid_out(grad_input, layout)
    return grads
