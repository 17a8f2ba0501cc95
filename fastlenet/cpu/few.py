"""The launchers of `image`'s kernels: a chain of a few images on CPU tensors, on the caller's thread."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import record
from .compiled import address
from .link import PROGRAM_STEP
from .memory import empty
from .plan import BYTES, LANES, OneImage, Plan, plan_of

Link: TypeAlias = ConvPoolGeometry | str

MOST_IMAGES = 7
"""Images that are computed one after the other: 16 as the lanes of a vector take as long as some eight.

Their number alone decides, so that results are equal for any number of threads.
"""

# Bases of a step's arguments: addresses and numbers of a call.
ZERO, BASES, INPUT, OUTPUT, RECORD, SCRATCH, GRAD_INPUT, SUMS, PARAMETERS = range(9)
"""Behind these stand, link by link, weight, bias and their gradients; then a number.

That is, in the forward, 0, or -16 where there is no bias; in the backward whether a weight is not finite.
"""
EACH = 5


def takes(images: int, links: Sequence[Link]) -> bool:
    """Whether a chain of so many images is computed image by image."""
    return 0 < images <= MOST_IMAGES and all(link.groups == 1 for link in links if isinstance(link, ConvPoolGeometry))


class _Program(NamedTuple):
    """Steps, and the memory they need.

    Attributes:
        steps: see `image.steps`.
        scratch_bytes: of a call.
        record_bytes: what an image keeps for the backward; in the scratch where nothing is kept.
        sums_bytes: of sums that begin at zero.
        framed: whether some memory must hold zeros at first.
        result_at: where the last link's output lies in the record.
        output_shape: of an image.
        plans: their tables must stay.
    """

    steps: array[int]
    scratch_bytes: int
    record_bytes: int
    sums_bytes: int
    framed: bool
    result_at: int
    output_shape: tuple[int, ...]
    plans: tuple[Plan, ...]


class _Space:
    """Gives out places one after the other, by default each at the start of a cache line."""

    def __init__(self, unit: int = BYTES) -> None:
        self.size, self.unit = 0, unit

    def take(self, size: int) -> int:
        place = self.size
        self.size += -(-size // self.unit) * self.unit
        return place


class At(NamedTuple):
    """An argument that a call decides: a base, an offset from it, and what is added from image to image."""

    base: int
    offset: int = 0
    step: int = 0

    def plus(self, offset: int) -> At:
        """Return a place so many bytes further on."""
        return self._replace(offset=self.offset + offset)


NOTHING = At(ZERO)


def _step(kernel: int, *arguments: int | At) -> list[int]:
    row = [kernel]
    for argument in arguments:
        row += At(ZERO, argument) if isinstance(argument, int) else argument
    return row + [0] * (PROGRAM_STEP - len(row))


def _program(*parts: list[list[int]]) -> array[int]:
    values = array("q", [len(part) for part in parts])
    for part in parts:
        for row in part:
            values.extend(row)
    return values


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
    kept, lanes = _Space(4), _Space()
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


def _exchanged(to_lanes: int, size: int, layer: _Layer, flat: At, lanes: At) -> list[list[int]]:
    """Steps that turn a convolution's results of `size` bytes from lanes to what images have, or back."""
    exchange, windows = address("convolution", "exchange"), layer.windows
    return [
        _step(
            exchange,
            to_lanes,
            size,
            flat.plus(size * windows * LANES * v),
            size * windows,
            live,
            lanes.plus(size * windows * LANES * v),
            windows,
        )
        for v, live in _by_vectors(layer.weight)
    ]


def _by_vectors(weight: tuple[int, ...]) -> list[tuple[int, int]]:
    """Number of each vector of 16 filters, and how many filters it has."""
    return [(first // LANES, min(LANES, weight[0] - first)) for first in range(0, weight[0], LANES)]


@functools.lru_cache(maxsize=256)
def _forward(
    image: tuple[int, ...], weights: tuple[tuple[int, ...], ...], links: tuple[Link, ...], save: bool
) -> _Program:
    layers, record_bytes, lanes_bytes, shape = _layers(image, weights, links)
    exchange = address("convolution", "exchange")
    space = _Space()
    before: list[list[int]] = []
    each: list[list[int]] = []
    kept = At(RECORD, 0, record_bytes) if save else At(SCRATCH, space.take(record_bytes))
    lanes = At(SCRATCH, space.take(lanes_bytes))
    conv = space.take(max((layer.plan.record[record.CONV_BYTES] for layer in layers if layer.plan), default=0))
    source = At(INPUT, 0, 4 * layers[0].inputs)
    output = At(OUTPUT, 0, 4 * torch.Size(shape).numel())
    for i, layer in enumerate(layers):
        weight, bias, missing = (At(PARAMETERS + EACH * i + k) for k in (0, 1, 4))
        ends = i + 1 == len(layers)
        target = (kept if layer.plan is None or layer.framed else lanes).plus(layer.target_at)
        if layer.plan is None:
            relu = int(layer.link == "linear_relu")
            # The backward needs what relu let pass; the output's user may modify it.
            target = output if ends and not (relu and save) else target
            arguments = source, weight, bias, layer.inputs, layer.outputs, relu, target
            each.append(_step(address("image", "linear"), *arguments))
            source = target
            continue
        depth = torch.Size(layer.weight[1:]).numel()
        packed = At(SCRATCH, space.take(BYTES * layer.vectors * (depth + 1)))
        for v, live in _by_vectors(layer.weight):
            place = packed.plus(BYTES * (depth + 1) * v)
            before.append(_step(exchange, 1, 4, bias.plus(4 * LANES * v), 4, missing.plus(live), place, 1))
            rows = weight.plus(4 * depth * LANES * v), 4 * depth, live
            before.append(_step(exchange, 1, 4, *rows, place.plus(BYTES), depth))
        tile = layer.plan.tile
        kernel = address("convolution", "forward_block", tile.filters, tile.pixels, int(save), 1)
        argmax = (kept if layer.framed else lanes).plus(layer.argmax_at)
        each.append(_step(kernel, layer.plan.address, source, packed, target, argmax, At(SCRATCH, conv)))
        source = target
        if ends or layers[i + 1].plan is None:
            source = output if ends else kept.plus(layer.flat_at)
            each += _exchanged(0, 4, layer, source, target)
        elif save and not layer.framed:
            each += _exchanged(0, 4, layer, kept.plus(layer.flat_at), target)
        if save and not layer.framed:
            each += _exchanged(0, 1, layer, kept.plus(layer.flat_argmax_at), argmax)
    return _Program(
        _program(before, each, []),
        space.size,
        record_bytes if save else 0,
        0,
        _framed(layers),
        layers[-1].target_at,
        shape,
        tuple(layer.plan for layer in layers if layer.plan is not None),
    )


def _framed(layers: Sequence[_Layer]) -> bool:
    return any(isinstance(layer.link, ConvPoolGeometry) and any(layer.link.padding) for layer in layers[1:])


@functools.lru_cache(maxsize=256)
def _backward(
    image: tuple[int, ...],
    weights: tuple[tuple[int, ...], ...],
    links: tuple[Link, ...],
    need_input: bool,
    wanted: tuple[bool, ...],
) -> _Program:
    """Steps of the gradients; `wanted`: of each link, whether its parameters need some."""
    layers, record_bytes, _, shape = _layers(image, weights, links)
    exchange = address("convolution", "exchange")
    space, sums = _Space(), _Space()
    before: list[list[int]] = []
    each: list[list[int]] = []
    after: list[list[int]] = []
    first_wanted = 0 if need_input else wanted.index(True)
    conv = space.take(max((layer.plan.record[record.GRAD_BYTES] for layer in layers if layer.plan), default=0))
    kept = At(RECORD, 0, record_bytes)
    grad = At(OUTPUT, 0, 4 * torch.Size(shape).numel())
    flat = True  # whether it lies as the output does, not in lanes
    for i in reversed(range(first_wanted, len(layers))):
        layer = layers[i]
        weight, grad_weight, grad_bias, spoiled = (At(PARAMETERS + EACH * i + k) for k in (0, 2, 3, 4))
        onward = i > first_wanted or need_input
        source = At(INPUT, 0, 4 * layers[0].inputs)
        if i:
            last = layers[i - 1]
            held = last.plan is None or last.framed
            source = kept.plus(last.target_at if held else last.flat_at)
            if not held and layer.plan is not None:
                assert last.plan is not None
                flat_source, source = source, At(SCRATCH, space.take(last.plan.record[record.TARGET_BYTES]))
                if wanted[i]:
                    each += _exchanged(1, 4, last, flat_source, source)
        target = NOTHING
        if layer.plan is None:
            if onward:
                target = At(SCRATCH, space.take(4 * layer.inputs)) if i else At(GRAD_INPUT, 0, 4 * layer.inputs)
            result = kept.plus(layer.target_at) if layer.link == "linear_relu" else NOTHING
            sizes = layer.inputs, layer.outputs
            grads = grad_weight, grad_bias, target, At(ZERO, 0, 1)
            each.append(_step(address("image", "linear_grads"), grad, result, source, weight, *sizes, *grads))
            grad = target
            continue
        plan = layer.plan
        if flat:
            lanes = At(SCRATCH, space.take(plan.record[record.TARGET_BYTES]))
            each += _exchanged(1, 4, layer, grad, lanes)
            grad, flat = lanes, False
        depth = torch.Size(layer.weight[1:]).numel()
        packed = NOTHING
        if onward:
            packed = At(SCRATCH, space.take(plan.record[record.IMAGES_AT]))
            target = At(SCRATCH, space.take(plan.record[record.INPUT_BYTES]))
            flag = At(BASES, 8 * spoiled.base)
            before.append(_step(address("image", "pack"), plan.address, weight, packed, flag))
        tile = plan.tile
        input_tile = (tile.channels, tile.input_pixels) if onward else (0, 0)
        kernel = address("convolution", "backward_block", tile.filters, tile.taps, *input_tile, 1)
        partial = NOTHING
        if wanted[i]:
            partial = At(SUMS, sums.take(plan.record[record.PARTIAL_BYTES]))
            taps = BYTES * plan.record[record.TAP_TILES] * tile.taps
            for v, live in _by_vectors(layer.weight):
                place = partial.plus((taps + BYTES) * v)
                rows, biases = grad_weight.plus(4 * depth * LANES * v), grad_bias.plus(4 * LANES * v)
                after.append(_step(exchange, 0, 4, rows, 4 * depth, live, place, depth))
                after.append(_step(exchange, 0, 4, biases, 4, live, place.plus(taps), 1))
        argmax = kept.plus(layer.argmax_at)
        if not layer.framed:
            argmax = At(SCRATCH, space.take(plan.record[record.TARGET_BYTES] // 4))
            each += _exchanged(1, 1, layer, kept.plus(layer.flat_argmax_at), argmax)
        places = packed, spoiled, grad, argmax, target, partial, At(SCRATCH, conv)
        each.append(_step(kernel, plan.address, source, *places))
        grad = target
    if need_input and layers[0].plan is not None:
        channels, pixels = layers[0].weight[1], layers[0].size[0] * layers[0].size[1]
        for v, live in _by_vectors((channels,)):
            rows = At(GRAD_INPUT, 4 * pixels * LANES * v, 4 * layers[0].inputs)
            plane = grad.plus(BYTES * pixels * v)
            each.append(_step(exchange, 0, 4, rows, 4 * pixels, live, plane, pixels))
    return _Program(_program(before, each, after), space.size, record_bytes, sums.size, False, 0, shape, ())


_STEPS = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def _run() -> ctypes._FuncPointer:
    return _STEPS(address("image", "steps"))


def _call(program: _Program, bases: list[int], images: int) -> None:
    table = array("q", bases)
    place = table.buffer_info()[0]
    table[BASES] = place
    _run()(program.steps.buffer_info()[0], place, images)


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
    program = _forward(image, weights, links, save)
    output = empty((images, *program.output_shape), torch.float32)
    kept = empty((images, program.record_bytes // 4), torch.float32) if save else None
    scratch = empty((program.scratch_bytes // 4,), torch.float32)
    if program.framed:
        (scratch if kept is None else kept).zero_()
    if output.numel():
        bases = [0, 0, input.data_ptr(), output.data_ptr(), 0 if kept is None else kept.data_ptr(), scratch.data_ptr()]
        bases += 0, 0
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            assert weight is not None
            bases += (
                (weight.data_ptr(), 0, 0, 0, -LANES) if bias is None else (weight.data_ptr(), bias.data_ptr(), 0, 0, 0)
            )
        _call(program, bases, images)
        if kept is not None and links[-1] == "linear_relu":
            output.copy_(kept[:, program.result_at // 4 :][:, : output.shape[1]])
    return _laid_out(output, layout), [] if kept is None else [kept]


def backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: tuple[Link, ...],
    saved: Sequence[Tensor],
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Do what `chain.chain_backward` does."""
    whole, image = input, input.shape[1:]
    input, parameters, weights = _operands(input, parameters, links)
    need_input, *needs = output_mask
    wanted = tuple(needs[i] or needs[i + 1] for i in range(0, len(needs), 2))
    program = _backward(image, weights, links, need_input, wanted)
    grad_output = grad_output.contiguous()
    if links[-1] == "linear_relu":
        grad_output = grad_output.clone()  # what relu stopped is taken out of it
    scratch = empty((program.scratch_bytes // 4,), torch.float32)
    sums = empty((program.sums_bytes // 4,), torch.float32).zero_()
    grad_input = empty(input.shape, torch.float32) if need_input else None
    grads: list[Tensor | None] = [grad_input]
    bases = [0, 0, input.data_ptr(), grad_output.data_ptr(), saved[0].data_ptr(), scratch.data_ptr()]
    bases += 0 if grad_input is None else grad_input.data_ptr(), sums.data_ptr()
    unasked = []
    for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        assert weight is not None
        bases += weight.data_ptr(), 0
        for parameter, needed in ((weight, needs[2 * i]), (bias, needs[2 * i + 1])):
            grad = empty(parameter.shape, torch.float32) if needed and parameter is not None else None
            grads.append(grad)
            if grad is None and wanted[i] and isinstance(links[i], ConvPoolGeometry):
                # A convolution has both, or neither.
                unasked.append(empty(weight.shape if parameter is weight else weight.shape[:1], torch.float32))
                bases.append(unasked[-1].data_ptr())
            else:
                bases.append(0 if grad is None else grad.data_ptr())
        bases.append(0)
    _call(program, bases, input.shape[0])
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
