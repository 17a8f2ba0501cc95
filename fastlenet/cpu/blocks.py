"""The launchers of `network`'s kernels: a chain on CPU tensors, in blocks of 16 images that threads share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import program, record, threads
from .memory import empty
from .plan import BYTES, LANES, Plan, gradients_of, linear_tile, plan_of, steps_of
from .program import COUNT, NOTHING, UNIT, At, Link, Program, Step, exchange, step

MOST_TASKS = 16
"""Parts of a batch whose sums of a weight's gradient are kept apart: fixed, whatever the number of threads."""


class _Layer(NamedTuple):
    """A link, and where its results lie.

    Attributes:
        link: see `Link`.
        plan: of a convolution's forward.
        weight: its shape.
        shape: of an image that goes out.
        inputs: numbers of an image that come in.
        outputs: numbers of an image that go out.
        kept: whether what goes out is in the record; else no backward needs it.
        target_at: what goes out, in the record.
        argmax_at: a convolution's, in the record.
        sums_at: the weight's gradient, in a task's sums.
        sums_step: bytes from row to row of it.
        bias_sums_at: the bias's.
    """

    link: Link
    plan: Plan | None
    weight: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    outputs: int
    kept: bool
    target_at: int
    argmax_at: int
    sums_at: int
    sums_step: int
    bias_sums_at: int


class _Layers(NamedTuple):
    """A chain's layers, bytes of a block's record, of a task's sums and of a convolution, and the output's shape."""

    layers: tuple[_Layer, ...]
    record_bytes: int
    sums_bytes: int
    conv_bytes: int
    shape: tuple[int, ...]


class _Shapes(NamedTuple):
    """What programs are made for.

    Attributes:
        image: shape of an image.
        input_step: bytes from image to image of the input.
        weights: their shapes.
        links: see `Link`.
        layouts: of the convolutions, whether stock's output would be channels_last.
    """

    image: tuple[int, ...]
    input_step: int
    weights: tuple[tuple[int, ...], ...]
    links: tuple[Link, ...]
    layouts: tuple[bool, ...]


def _whole(count: int) -> int:
    """Bytes of so many numbers in full tiles of a linear layer's weight gradient."""
    filters = linear_tile().filters
    return BYTES * (-(-count // filters) * filters)


@functools.lru_cache(maxsize=256)
def _layers(shapes: _Shapes) -> _Layers:
    """Plan where everything lies in a block's record and in a task's sums."""
    kept, sums, layers, conv_bytes = program.Space(), program.Space(), [], 0
    shape, last = shapes.image, len(shapes.links) - 1
    for i, (link, weight) in enumerate(zip(shapes.links, shapes.weights, strict=True)):
        numbers, plan, argmax_at = torch.Size(shape).numel(), None, 0
        rows, width = weight[0], torch.Size(weight[1:]).numel()
        if isinstance(link, ConvPoolGeometry):
            if len(shape) != 3 or weight[1] * link.groups != shape[0]:
                raise ValueError(f"link {i}: a weight of shape {weight} does not fit images of shape {shape}")
            layouts = shapes.layouts
            plan = plan_of(shape, weight, link, layouts[0] and i == 0, layouts[i] and i == last)
            shape = (rows, *plan.pooled_size)
            conv_bytes = max(conv_bytes, plan.record[record.CONV_BYTES])
            argmax_at = kept.take(torch.Size(shape).numel() * LANES)
            sums_step, sums_at, bias_sums_at = 4 * width, sums.take(4 * rows * width), sums.take(4 * rows)
        else:
            if width != numbers:
                raise ValueError(f"link {i}: a weight of shape {weight} does not fit {numbers} inputs")
            shape = (rows,)
            wide = BYTES * linear_tile().vectors
            sums_step = -(-4 * width // wide) * wide
            sums_at, bias_sums_at = sums.take(_whole(rows) // BYTES * sums_step), sums.take(4 * rows)
        outputs, held = torch.Size(shape).numel(), i < last or link == "linear_relu"
        places = kept.take(outputs * BYTES if held else 0), argmax_at, sums_at, sums_step, bias_sums_at
        layers.append(_Layer(link, plan, weight, shape, numbers, outputs, held, *places))
    return _Layers(tuple(layers), kept.size, sums.size, conv_bytes, shape)


@functools.lru_cache(maxsize=256)
def _forward(shapes: _Shapes, keeps: str) -> Program:
    """Steps of the forward; `keeps`: the blocks' ``"record"``, the ``"argmax"`` of a single convolution, or ``""``."""
    layers, record_bytes, _, conv_bytes, shape = _layers(shapes)
    scratch = program.Scratch(len(layers))
    ready: list[Step] = []
    source, numbers = scratch.at(BYTES * layers[0].inputs), torch.Size(shape).numel()
    kept = At(program.RECORD, 0, record_bytes) if keeps == "record" else scratch.at(record_bytes)
    conv = scratch.at(conv_bytes)
    each = [_input(shapes, source)]
    for i, layer in enumerate(layers):
        weight, bias, *_ = program.parameters_of(i)
        target = kept.plus(layer.target_at) if layer.kept else scratch.at(BYTES * layer.outputs)
        if layer.plan is None:
            rows, width = layer.weight
            packed = scratch.at(BYTES * width * -(-rows // LANES))
            for first in range(0, rows, LANES):
                # A weight's rows are turned into lanes as images are: 16 outputs beside each other.
                place, live = packed.plus(BYTES * width * (first // LANES)), min(LANES, rows - first)
                ready.append(exchange(1, 4, weight.plus(4 * width * first), 4 * width, live, place, width))
            sizes = width, rows, int(layer.link == "linear_relu")
            each.append(step("network", ("linear", linear_tile().sums), source, packed, bias, *sizes, target))
        else:
            plan, tile = layer.plan, layer.plan.tile
            packed = scratch.at(plan.record[record.PACKED_BYTES])
            ready.append(step("convolution", "pack_forward", plan.address, weight, bias, packed))
            source = _padded(plan, source, scratch, ready, each)
            kernel = "forward_block", tile.filters, tile.pixels, int(keeps != "")
            places = packed, target, kept.plus(layer.argmax_at), conv
            each.append(step("convolution", kernel, plan.address, source, *places))
        source = target
    each.append(exchange(0, 4, At(program.OUTPUT, 0, LANES * 4 * numbers), 4 * numbers, At(COUNT), source, numbers))
    if keeps == "argmax":
        argmax = kept.plus(layers[0].argmax_at)
        each.append(exchange(0, 1, At(program.RECORD, 0, LANES * numbers), numbers, At(COUNT), argmax, numbers))
    steps = program.listed(ready, [], each, [])
    return Program(steps, scratch.size, record_bytes, 0, shape, tuple(layer.plan for layer in layers if layer.plan))


def _input(shapes: _Shapes, lanes: At) -> Step:
    images, numbers = At(program.INPUT, 0, LANES * shapes.input_step), torch.Size(shapes.image).numel()
    return exchange(1, 4, images, shapes.input_step, At(COUNT), lanes, numbers)


def _padded(plan: Plan, source: At, scratch: program.Scratch, ready: list[Step], each: list[Step]) -> At:
    """Add the steps that pad a convolution's input, if it needs any, and return where the convolution reads it."""
    size = plan.record[record.PAD_BYTES]
    if not size:
        return source
    padded = scratch.at(size)
    ready.append(step("convolution", "clear", padded, size))
    each.append(step("convolution", "pad", plan.address, source, padded))
    return padded


@functools.lru_cache(maxsize=256)
def _backward(
    shapes: _Shapes, grad_step: int, argmax_step: int | None, need_input: bool, wanted: tuple[bool, ...]
) -> tuple[Program, Program]:
    """Steps of the gradients, and of the sum over all tasks.

    Args:
        shapes: of the operands.
        grad_step: bytes from image to image of the output's gradient.
        argmax_step: likewise of a single convolution's argmax; None where there are records of blocks.
        need_input: whether the input needs a gradient.
        wanted: of each link, whether its parameters need some.
    """
    layers, record_bytes, sums_bytes, _, shape = _layers(shapes)
    scratch, last = program.Scratch(len(layers)), layers[-1]
    row_bytes = max(0 if layer.plan else layer.sums_step for layer in layers)
    rows = scratch.at(LANES * row_bytes)
    ready: list[Step] = []
    begin = [step("convolution", "clear", At(program.SUMS), sums_bytes)]
    each: list[Step] = []
    kept, plans = At(program.RECORD, 0, record_bytes), []
    grad = At(program.OUTPUT, 0, LANES * grad_step)
    grad_last = shapes.layouts[-1] if last.plan else False
    if last.plan is None:
        lanes = scratch.at(_whole(last.outputs))
        each.append(exchange(1, 4, grad, grad_step, At(COUNT), lanes, last.outputs))
        grad = lanes
    first_wanted = 0 if need_input else wanted.index(True)
    for i in reversed(range(first_wanted, len(layers))):
        layer, onward = layers[i], i > first_wanted or need_input
        weight = program.parameters_of(i)[0]
        source = kept.plus(layers[i - 1].target_at)
        target = NOTHING
        sums, bias_sums = At(program.SUMS).plus(layer.sums_at), At(program.SUMS).plus(layer.bias_sums_at)
        if not wanted[i]:
            sums = bias_sums = NOTHING
        if layer.plan is None:
            if not i and wanted[i]:
                source = scratch.at(BYTES * layer.inputs)
                each.append(_input(shapes, source))
            if onward:
                target = scratch.at(_whole(layer.inputs))
            rest = _whole(layer.outputs) - BYTES * layer.outputs
            if rest:
                # The weight's gradient works off the outputs' gradients in full tiles.
                ready.append(step("convolution", "clear", grad.plus(BYTES * layer.outputs), rest))
            if wanted[i]:
                each.append(exchange(0, 4, rows, layer.sums_step, LANES, source, layer.inputs))
            result = kept.plus(layer.target_at) if layer.link == "linear_relu" else NOTHING
            sizes = layer.inputs, layer.outputs
            kernel = "linear_grads", *linear_tile()
            tensors = grad, result, At(COUNT), rows, weight
            each.append(step("network", kernel, *tensors, *sizes, sums, bias_sums, target))
            grad = target
            continue
        # The kernel of the gradients works image by image.
        if i < len(layers) - 1 and layers[i + 1].plan is None:
            images = scratch.at(BYTES * layer.outputs)
            each.append(exchange(0, 4, images, 4 * layer.outputs, LANES, grad, layer.outputs))
            grad, grad_step = images, 4 * layer.outputs
        argmax, own_argmax_step = At(program.RECORD, 0, LANES * (argmax_step or 0)), argmax_step
        if own_argmax_step is None:
            argmax, own_argmax_step = scratch.at(LANES * layer.outputs), layer.outputs
            each.append(exchange(0, 1, argmax, layer.outputs, LANES, kept.plus(layer.argmax_at), layer.outputs))
        image = layers[i - 1].shape if i else shapes.image
        in_last = not i and shapes.layouts[0]
        source_step = target_step = 4 * layer.inputs
        if not i:
            source, source_step = At(program.INPUT, 0, LANES * shapes.input_step), shapes.input_step
        elif wanted[i]:
            images = scratch.at(BYTES * layer.inputs)
            each.append(exchange(0, 4, images, source_step, LANES, source, layer.inputs))
            source = images
        if onward:
            target = scratch.at(BYTES * layer.inputs) if i else At(program.GRAD_INPUT, 0, BYTES * layer.inputs)
        assert isinstance(layer.link, ConvPoolGeometry)
        plan = gradients_of(
            image,
            layer.weight,
            layer.link,
            steps_of(image, source_step, in_last),
            steps_of(layer.shape, grad_step, grad_last),
            tuple(step // 4 for step in steps_of(layer.shape, 4 * own_argmax_step, grad_last)),
            steps_of(image, target_step, in_last) if onward else None,
        )
        plans.append(plan)
        packed = NOTHING
        if onward:
            packed = scratch.at(plan.packed_bytes)
            ready.append(step("gradients", "pack", plan.address, weight, packed))
        places = source, grad, argmax, packed, target, sums, bias_sums, scratch.at(plan.scratch_bytes)
        each.append(step("gradients", "gradients", plan.address, At(COUNT), *places))
        grad, grad_step, grad_last = target, target_step, False
    if need_input and layers[0].plan is None:
        numbers = layers[0].inputs
        target = At(program.GRAD_INPUT, 0, LANES * 4 * numbers)
        each.append(exchange(0, 4, target, 4 * numbers, At(COUNT), grad, numbers))
    steps = program.listed(ready, begin, each, [])
    return (
        Program(steps, scratch.size, record_bytes, sums_bytes, shape, tuple(plans)),
        Program(program.listed([], [], _all_sums(layers, sums_bytes), []), scratch.size, 0, 0, (), ()),
    )


def _all_sums(layers: Sequence[_Layer], sums_bytes: int) -> list[Step]:
    """Steps that add up the tasks' sums of all parameters."""
    steps = []
    for i, layer in enumerate(layers):
        _, _, grad_weight, grad_bias, _ = program.parameters_of(i)
        rows, width = layer.weight[0], torch.Size(layer.weight[1:]).numel()
        for target, place, *sizes in (
            (grad_weight, layer.sums_at, width, layer.sums_step, rows),
            (grad_bias, layer.bias_sums_at, rows, 4 * rows, 1),
        ):
            source = At(program.SUMS).plus(place)
            steps.append(step("network", "sum_tasks", target, source, *sizes, At(program.PARTS), sums_bytes, UNIT))
    return steps


def _planned(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]
) -> tuple[_Shapes, Tensor, list[Tensor | None]]:
    """Return what a chain's programs are made for, and its tensors in layouts that the kernels read."""
    layouts: list[bool] = []
    last = torch.contiguous_format
    for link, weight in zip(links, parameters[::2], strict=True):
        assert weight is not None
        if isinstance(link, ConvPoolGeometry):
            if last != torch.channels_last:
                last = memory_format(weight) if layouts else memory_format(input, weight)
            layouts.append(last == torch.channels_last)
            if weight.shape[0] == 1:  # stock's pool takes a single channel for plainly laid out
                last = torch.contiguous_format
    input = input.contiguous() if input.dim() == 2 else _dense(input, layouts[0])
    flat = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    weights = tuple(tuple(weight.shape) for weight in flat[::2] if weight is not None)
    shapes = _Shapes(tuple(input.shape[1:]), 4 * input.stride(0), weights, tuple(links), tuple(layouts))
    return shapes, input, flat


def _dense(tensor: Tensor, last: bool) -> Tensor:
    """The tensor with each image dense, in channels_last or plainly; images may lie apart."""
    _, channels, height, width = tensor.shape
    wanted = (1, width * channels, channels) if last else (height * width, width, 1)
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    if all(size == 1 or stride == want for size, stride, want in zip(sizes, strides, wanted, strict=True)):
        return tensor
    return tensor.contiguous(memory_format=_format(last))


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def forward(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link], keeps: str
) -> tuple[Tensor, Tensor | None]:
    """Do what `chain.chain` does; return what is kept, too: see `_forward`."""
    shapes, input, parameters = _planned(input, parameters, links)
    made = _forward(shapes, keeps)
    images, blocks = input.shape[0], -(-input.shape[0] // LANES)
    # Stock's pool takes a single channel for plainly laid out.
    layout = _format(len(made.output_shape) == 3 and shapes.layouts[-1] and made.output_shape[0] > 1)
    output, kept = empty((images, *made.output_shape), torch.float32, layout), None
    if keeps == "record":
        kept = empty((blocks * made.record_bytes // 4,), torch.float32)
    elif keeps:
        kept = empty(output.shape, torch.uint8, layout)
    if not output.numel():
        return output, kept
    workers = threads.workers(blocks)
    scratch = empty((workers * made.scratch_bytes // 4,), torch.float32)
    rest = [images, 0, scratch.data_ptr(), made.scratch_bytes, 0, 0, 0, input.data_ptr(), output.data_ptr()]
    rest += program.place(kept), 0
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        rest += program.place(weight), program.place(bias), 0, 0, 0
    program.run(made.steps, workers, blocks, 1, blocks, rest)
    return output, kept


def backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: Sequence[Link],
    kept: Tensor,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Do what `chain.chain_backward` does; `kept`: what the forward returned."""
    shapes, input, parameters = _planned(input, parameters, links)
    images, (need_input, *needs) = input.shape[0], output_mask
    layout = _format(bool(shapes.layouts) and shapes.layouts[0])
    grads: list[Tensor | None] = [empty(input.shape, torch.float32, layout) if need_input else None]
    for i, needed in enumerate(needs):
        weight = shapes.weights[i // 2]
        grads.append(empty(weight[:1] if i % 2 else weight, torch.float32) if needed else None)
    if not images:
        return [None if grad is None else grad.zero_() for grad in grads]
    argmax_step = None
    if grad_output.dim() == 4:
        grad_output = _dense(grad_output, shapes.layouts[-1])
        if kept.dtype == torch.uint8:
            kept = _dense(kept, shapes.layouts[-1])
            argmax_step = kept.stride(0)
    else:
        grad_output = grad_output.contiguous()
    wanted = tuple(needs[i] or needs[i + 1] for i in range(0, len(needs), 2))
    made, adding = _backward(shapes, 4 * grad_output.stride(0), argmax_step, need_input, wanted)
    blocks = -(-images // LANES)
    each = -(-blocks // MOST_TASKS)
    tasks = -(-blocks // each)
    workers = threads.workers(tasks)
    scratch = empty((workers * made.scratch_bytes // 4,), torch.float32)
    sums = empty((tasks, made.sums_bytes // 4), torch.float32)
    ends = [tasks, input.data_ptr(), grad_output.data_ptr(), kept.data_ptr(), program.place(grads[0])]
    for i in range(0, len(parameters), 2):
        ends += (program.place(tensor) for tensor in (*parameters[i : i + 2], *grads[i + 1 : i + 3]))
        ends.append(0)
    begins = [images, 0, scratch.data_ptr(), made.scratch_bytes, sums.data_ptr()]
    program.run(made.steps, workers, tasks, each, blocks, [*begins, made.sums_bytes, *ends])
    if any(needs):
        program.run(adding.steps, workers, program.PIECES, 1, program.PIECES, [*begins, 0, *ends])
    return grads
