"""The launchers of `image`'s kernels: a chain of a few images on CPU tensors, on the caller's thread."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import program, record
from .memory import empty
from .plan import BYTES, LANES, OneImage, Plan, plan_of
from .program import NOTHING, UNIT, At, Link, Program, Step, exchange, step

MOST_IMAGES = 7
"""Images that are computed one after the other: 16 as the lanes of a vector take as long as some eight.

Their number alone decides, so that results are equal for any number of threads.
"""


def takes(images: int, links: Sequence[Link]) -> bool:
    """Whether a chain of so many images is computed image by image."""
    return 0 < images <= MOST_IMAGES and all(link.groups == 1 for link in links if isinstance(link, ConvPoolGeometry))


class _Layer(NamedTuple):
    """A link, and where its results lie.

    Attributes:
        link: see `Link`.
        plan: of a convolution.
        weight: its shape.
        inputs: numbers of an image that come in.
        outputs: numbers of an image that go out.
        size: height and width that a convolution reads, padding included.
        framed: whether a convolution's lanes have a frame for the next one's padding: they are kept as they are then.
        target_at: its output, of a convolution in lanes: in the record if `framed` or linear, else in the scratch.
        argmax_at: a convolution's, in lanes, likewise.
        flat_at: a convolution's output as images have it, in the record.
        flat_argmax_at: likewise.
    """

    link: Link
    plan: Plan | None
    weight: tuple[int, ...]
    inputs: int
    outputs: int
    size: tuple[int, int] = (0, 0)
    framed: bool = False
    target_at: int = 0
    argmax_at: int = 0
    flat_at: int = 0
    flat_argmax_at: int = 0

    @property
    def vectors(self) -> int:
        """Of 16 filters."""
        return -(-self.weight[0] // LANES)

    @property
    def windows(self) -> int:
        """Pooled pixels of a filter."""
        return self.outputs // self.weight[0]


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
        onward = links[i + 1] if i + 1 < len(links) else None
        if not isinstance(link, ConvPoolGeometry):
            place = kept.take(0 if onward is None and link == "linear" else 4 * weight[0])
            layers.append(_Layer(link, None, weight, torch.Size(shape).numel(), weight[0], target_at=place))
            shape = (weight[0],)
            continue
        padding = onward.padding if isinstance(onward, ConvPoolGeometry) else (0, 0)
        padded = (shape[0], shape[1] + 2 * link.padding[0], shape[2] + 2 * link.padding[1])
        plan = plan_of(padded, weight, link._replace(padding=(0, 0)), False, False, OneImage(in_lanes, padding))
        shape, in_lanes, framed = (weight[0], *plan.pooled_size), True, any(padding)
        inputs, outputs, size = torch.Size(padded).numel(), torch.Size(shape).numel(), plan.record[record.TARGET_BYTES]
        space = kept if framed else lanes
        in_vectors = space.take(size), space.take(size // 4)
        flat = kept.take(0 if framed or onward is None else 4 * outputs), kept.take(0 if framed else outputs)
        layers.append(_Layer(link, plan, weight, inputs, outputs, (padded[1], padded[2]), framed, *in_vectors, *flat))
    return _Layers(tuple(layers), kept.size, lanes.size, shape)


def _exchanged(to_lanes: int, size: int, layer: _Layer, flat: At, lanes: At) -> list[Step]:
    """Steps that turn a convolution's results of `size` bytes from lanes to what images have, or back."""
    row, windows = size * layer.windows, layer.windows
    return [
        exchange(to_lanes, size, flat.plus(row * LANES * v), row, live, lanes.plus(row * LANES * v), windows)
        for v, live in _by_vectors(layer.weight)
    ]


def _by_vectors(weight: tuple[int, ...]) -> list[tuple[int, int]]:
    """Number of each vector of 16 filters, and how many filters it has."""
    return [(first // LANES, min(LANES, weight[0] - first)) for first in range(0, weight[0], LANES)]


@functools.lru_cache(maxsize=256)
def _forward(
    image: tuple[int, ...], weights: tuple[tuple[int, ...], ...], links: tuple[Link, ...], save: bool
) -> Program:
    layers, record_bytes, lanes_bytes, shape = _layers(image, weights, links)
    scratch = program.Scratch(len(layers))
    before: list[Step] = []
    each: list[Step] = []
    kept = At(program.RECORD, 0, record_bytes) if save else scratch.at(record_bytes)
    lanes = scratch.at(lanes_bytes)
    conv = scratch.at(max((layer.plan.record[record.CONV_BYTES] for layer in layers if layer.plan), default=0))
    source = At(program.INPUT, 0, 4 * layers[0].inputs)
    output = At(program.OUTPUT, 0, 4 * torch.Size(shape).numel())
    for i, layer in enumerate(layers):
        weight, bias, *_, missing = program.parameters_of(i)
        ends = i + 1 == len(layers)
        target = (kept if layer.plan is None or layer.framed else lanes).plus(layer.target_at)
        if layer.plan is None:
            relu = int(layer.link == "linear_relu")
            # The backward needs what relu let pass; the output's user may modify it.
            target = output if ends and not (relu and save) else target
            arguments = source, weight, bias, layer.inputs, layer.outputs, relu, target
            each.append(step("image", "linear", *arguments))
            source = target
            continue
        depth = torch.Size(layer.weight[1:]).numel()
        packed = scratch.at(BYTES * layer.vectors * (depth + 1))
        for v, live in _by_vectors(layer.weight):
            place = packed.plus(BYTES * (depth + 1) * v)
            before.append(exchange(1, 4, bias.plus(4 * LANES * v), 4, missing.plus(live), place, 1))
            rows = weight.plus(4 * depth * LANES * v), 4 * depth, live
            before.append(exchange(1, 4, *rows, place.plus(BYTES), depth))
        if layer.framed:
            each.append(step("convolution", "clear", target, layer.plan.record[record.TARGET_BYTES]))
        tile = layer.plan.tile
        kernel = "forward_block", tile.filters, tile.pixels, int(save), 1
        argmax = (kept if layer.framed else lanes).plus(layer.argmax_at)
        each.append(step("convolution", kernel, layer.plan.address, source, packed, target, argmax, conv))
        source = target
        if ends or layers[i + 1].plan is None:
            source = output if ends else kept.plus(layer.flat_at)
            each += _exchanged(0, 4, layer, source, target)
        elif save and not layer.framed:
            each += _exchanged(0, 4, layer, kept.plus(layer.flat_at), target)
        if save and not layer.framed:
            each += _exchanged(0, 1, layer, kept.plus(layer.flat_argmax_at), argmax)
    plans = tuple(layer.plan for layer in layers if layer.plan)
    return Program(program.listed([], before, each, []), scratch.size, record_bytes if save else 0, 0, shape, plans)


@functools.lru_cache(maxsize=256)
def _backward(
    image: tuple[int, ...],
    weights: tuple[tuple[int, ...], ...],
    links: tuple[Link, ...],
    need_input: bool,
    wanted: tuple[bool, ...],
) -> Program:
    """Steps of the gradients; `wanted`: of each link, whether its parameters need some."""
    layers, record_bytes, _, shape = _layers(image, weights, links)
    scratch, sums = program.Scratch(len(layers)), program.Space()
    before: list[Step] = []
    each: list[Step] = []
    after: list[Step] = []
    first_wanted = 0 if need_input else wanted.index(True)
    conv = scratch.at(max((layer.plan.record[record.GRAD_BYTES] for layer in layers if layer.plan), default=0))
    kept = At(program.RECORD, 0, record_bytes)
    grad = At(program.OUTPUT, 0, 4 * torch.Size(shape).numel())
    flat = True  # whether it lies as the output does, not in lanes
    for i in reversed(range(first_wanted, len(layers))):
        layer = layers[i]
        weight, _, grad_weight, grad_bias, spoiled = program.parameters_of(i)
        onward = i > first_wanted or need_input
        source = At(program.INPUT, 0, 4 * layers[0].inputs)
        if i:
            last = layers[i - 1]
            held = last.plan is None or last.framed
            source = kept.plus(last.target_at if held else last.flat_at)
            if not held and layer.plan is not None:
                assert last.plan is not None
                flat_source, source = source, scratch.at(last.plan.record[record.TARGET_BYTES])
                if wanted[i]:
                    each += _exchanged(1, 4, last, flat_source, source)
        target = NOTHING
        if layer.plan is None:
            if onward:
                target = scratch.at(4 * layer.inputs) if i else At(program.GRAD_INPUT, 0, 4 * layer.inputs)
            result = kept.plus(layer.target_at) if layer.link == "linear_relu" else NOTHING
            sizes = layer.inputs, layer.outputs
            grads = grad_weight, grad_bias, target, UNIT
            each.append(step("image", "linear_grads", grad, result, source, weight, *sizes, *grads))
            grad = target
            continue
        plan = layer.plan
        if flat:
            lanes = scratch.at(plan.record[record.TARGET_BYTES])
            each += _exchanged(1, 4, layer, grad, lanes)
            grad, flat = lanes, False
        depth = torch.Size(layer.weight[1:]).numel()
        packed = NOTHING
        if onward:
            packed = scratch.at(plan.record[record.PACKED_BYTES])
            target = scratch.at(plan.record[record.INPUT_BYTES])
            flag = At(program.OWN, 8 * spoiled.base)
            before.append(step("image", "pack", plan.address, weight, packed, flag))
        tile = plan.tile
        input_tile = (tile.channels, tile.input_pixels) if onward else (0, 0)
        kernel = "backward_block", tile.filters, tile.taps, *input_tile, 1
        partial = NOTHING
        if wanted[i]:
            partial = At(program.SUMS, sums.take(plan.record[record.PARTIAL_BYTES]))
            taps = BYTES * plan.record[record.TAP_TILES] * tile.taps
            for v, live in _by_vectors(layer.weight):
                place = partial.plus((taps + BYTES) * v)
                rows, biases = grad_weight.plus(4 * depth * LANES * v), grad_bias.plus(4 * LANES * v)
                after.append(exchange(0, 4, rows, 4 * depth, live, place, depth))
                after.append(exchange(0, 4, biases, 4, live, place.plus(taps), 1))
        argmax = kept.plus(layer.argmax_at)
        if not layer.framed:
            argmax = scratch.at(plan.record[record.TARGET_BYTES] // 4)
            each += _exchanged(1, 1, layer, kept.plus(layer.flat_argmax_at), argmax)
        places = packed, spoiled, grad, argmax, target, partial, conv
        each.append(step("convolution", kernel, plan.address, source, *places))
        grad = target
    if need_input and layers[0].plan is not None:
        channels, pixels = layers[0].weight[1], layers[0].size[0] * layers[0].size[1]
        for v, live in _by_vectors((channels,)):
            rows = At(program.GRAD_INPUT, 4 * pixels * LANES * v, 4 * layers[0].inputs)
            plane = grad.plus(BYTES * pixels * v)
            each.append(exchange(0, 4, rows, 4 * pixels, live, plane, pixels))
    if sums.size:
        before.append(step("convolution", "clear", At(program.SUMS), sums.size))
    plans = tuple(layer.plan for layer in layers if layer.plan)
    return Program(program.listed([], before, each, after), scratch.size, record_bytes, sums.size, shape, plans)


def _operands(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]
) -> tuple[Tensor, list[Tensor | None], tuple[tuple[int, ...], ...]]:
    """Return the input, with the first link's padding around it, and the parameters, all contiguous, and the shapes."""
    first = links[0]
    if isinstance(first, ConvPoolGeometry) and first.padding != (0, 0):
        rows, columns = first.padding
        input = F.pad(input, (columns, columns, rows, rows))
    flat = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    return input.contiguous(), flat, tuple(weight.shape for weight in parameters[::2] if weight is not None)


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
    input, parameters, weights = _operands(input, parameters, links)
    made = _forward(image, weights, links, save)
    output = empty((images, *made.output_shape), torch.float32)
    kept = empty((images, made.record_bytes // 4), torch.float32) if save else None
    scratch = empty((made.scratch_bytes // 4,), torch.float32)
    if output.numel():
        rest = [images, 0, scratch.data_ptr(), made.scratch_bytes, 0, 0, 0, input.data_ptr(), output.data_ptr()]
        rest += program.place(kept), 0
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            rest += program.place(weight), program.place(bias), 0, 0, -LANES if bias is None else 0
        program.run(made.steps, 1, 1, images, images, rest)
        if kept is not None and links[-1] == "linear_relu":
            output.copy_(kept[:, -output.shape[1] :])
    return _laid_out(output, layout), [] if kept is None else [kept]


def backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: tuple[Link, ...],
    kept: Tensor,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Do what `chain.chain_backward` does; `kept`: what the forward returned."""
    whole, image = input, input.shape[1:]
    input, parameters, weights = _operands(input, parameters, links)
    need_input, *needs = output_mask
    wanted = tuple(needs[i] or needs[i + 1] for i in range(0, len(needs), 2))
    made = _backward(image, weights, links, need_input, wanted)
    grad_output = grad_output.contiguous()
    if links[-1] == "linear_relu":
        grad_output = grad_output.clone()  # what relu stopped is taken out of it
    images = input.shape[0]
    scratch = empty((made.scratch_bytes // 4,), torch.float32)
    sums = empty((made.sums_bytes // 4,), torch.float32)
    grad_input = empty(input.shape, torch.float32) if need_input else None
    grads: list[Tensor | None] = [grad_input]
    rest = [images, 0, scratch.data_ptr(), made.scratch_bytes, sums.data_ptr(), 0, 0, input.data_ptr()]
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
    if grad_input is not None and grad_input.shape != whole.shape:
        rows, columns = links[0].padding  # type: ignore[union-attr]
        grad_input = grad_input[:, :, rows : rows + whole.shape[2], columns : columns + whole.shape[3]]
    if grad_input is not None:
        layout = torch.contiguous_format
        if isinstance(links[0], ConvPoolGeometry):
            weight = parameters[0]
            assert weight is not None
            layout = memory_format(whole, weight)
        grads[0] = _laid_out(grad_input, layout)
    return grads
