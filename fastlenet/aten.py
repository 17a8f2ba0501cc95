"""The operators in plain ATen: what runs on CPU tensors, in float64, and wherever no Triton kernel covers a call.

Each function computes what the Triton launcher of the same name in `fastlenet.kernels` computes, from the same
arguments and with the same saved tensors, so that the backward of one may follow the forward of the other.

How a CPU computes a call depends on its shape alone; `_plan` chooses, by rules that the benchmarks justify. What is
gained over stock's conv2d, relu and max_pool2d, each in the layout of its input:

- The batch is worked off in slices whose convolution stays in the cache: nothing at the convolution's resolution is
  ever allocated for the whole batch, and stock's cost per image, which grows with the batch, does not.
- No pool runs in the plain layout, where stock's max_pool2d is two to eight times slower. Windows that stand side by
  side are taken apart into planes, one per window cell, by one copy; one max_pool2d over the planes, in disguise, gives
  values, relu and argmax (`_largest`). Other windows are pooled in channels_last. Pooled values alone are laid out.
- A convolution with few output channels becomes one with `cells` times as many, whose output is the planes
  (`_phases`): no copy then, and vector lanes are full. The gradient of the weight alone is served likewise
  (`_by_phases`); LeNet's conv1 takes two thirds to three quarters of the time so.
- A small call is stock's own operators with stock's derivatives, relu last (`small_conv2d_relu_max_pool2d`): a Function
  and its calls from Python take longer than they save. LeNet's step of one image takes 0.7 of its time so.
- A few images are multiplied as matrices: oneDNN takes longer to set a convolution up than to compute it.
- relu and its mask see pooled cells only, and the int64 indices of max_pool2d become bytes at once.
- A linear layer with relu has nothing to gain here: it is stock's two calls, relu in place; on a CPU with stock's own
  derivatives (`fastlenet.autograd.plain_linear_relu`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, Pair, memory_format

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

_SLICE_BYTES = 6 << 20
"""Size that the convolution of a slice of the batch may have: small enough for a CPU's caches and for reused memory."""

_FEW_PRODUCTS, _FEW_IMAGES = 1 << 22, 16
"""Multiply-adds, and images, up to which a convolution is a matrix product for each image.

Below, oneDNN's set-up costs more than the work: LeNet's convolutions of one image take 0.6 of its time as products,
their gradients half or less.
"""

_LITTLE_TO_KEEP, _LITTLE_TO_COMPUTE = 5 << 16, 1 << 18
"""Bytes of a convolution up to which stock's operators, in a better order, win: with derivatives, and without.

They take little beside a `torch.autograd.Function` and all that it calls one by one. With derivatives they win up to
some 2 MB in most shapes; but they keep the convolution, and from LeNet's batches of 64 on that is given up for memory.
"""

_SMALL = 1 << 12
"""Pooled values up to which the number of calls counts for more than how fast each is."""

# Bound once: looking an operator up takes as long as a small one runs.
_unfold_and_multiply = torch._C._nn.thnn_conv2d  # type: ignore[attr-defined]
_unfold_and_multiply_backward = torch.ops.aten._slow_conv2d_backward.output_mask
_convolution_backward = torch.ops.aten.convolution_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default
_threshold_backward_out = torch.ops.aten.threshold_backward.grad_input
_max_pool2d = torch.ops.aten.max_pool2d_with_indices.default
_max_pool2d_backward = torch.ops.aten.max_pool2d_with_indices_backward.default

_CHAIN = 160
"""Products that a convolution in channels_last may add up one after the other, where there are more than 16 channels.

In that layout oneDNN (with AVX-512) adds all products of an output in one chain, in the plain one 16 channels at a
time. For 32 channels of 3x3 the largest error is twice as large, for 128 channels five times: more than a result may be
off stock's for a caller who never asked for channels_last.
"""

_ANY, _PLAIN, _LAST = torch.preserve_format, torch.contiguous_format, torch.channels_last


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax (see `ConvPoolGeometry.argmax_dtype`)."""
    plan = _plan(input.shape, weight.shape, input.dtype, input.device.type, memory_format(input, weight), geometry)
    if plan.matrix_product:
        operands = input.contiguous(), weight.contiguous(), plan.kernel_size, bias
        conv = _unfold_and_multiply(*operands, geometry.stride, geometry.padding)
        return _pool_by_index(conv, geometry, return_argmax)
    weight, bias = weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
    phases = _phases(weight, bias, geometry.pool_size) if plan.phases else None
    kernel = _laid_out(weight, plan.convolved_in)

    def of_slice(part: Tensor) -> tuple[Tensor, Tensor | None]:
        part = part.to(plan.dtype)
        if phases is not None:
            conv = F.conv2d(part, *phases, geometry.pool_stride, geometry.padding)
            found = _pool_phases(conv, geometry, return_argmax)
            # The zeros around a shifted kernel turn an infinite input into NaN, so that needs the plain way.
            if found is not None:
                return found
        part = _laid_out(part, plan.convolved_in)
        conv = F.conv2d(part, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        return _pool(conv, geometry, plan, return_argmax)

    if len(plan.slices) == 1:
        output, argmax = of_slice(input)
        layout = plan.layout
        argmax = None if argmax is None else argmax.contiguous(memory_format=layout)
        return output.to(input.dtype).contiguous(memory_format=layout), argmax
    output = torch.empty(plan.output_shape, dtype=input.dtype, device=input.device, memory_format=plan.layout)
    argmax = torch.empty_like(output, dtype=geometry.argmax_dtype) if return_argmax else None
    for images in plan.slices:
        pooled, part = of_slice(input[images])
        output[images].copy_(pooled)
        if argmax is not None and part is not None:
            argmax[images].copy_(part)
    return output, argmax


def small_conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, differentiable: bool
) -> Tensor | None:
    """Return the pooled output by stock's operators and with their derivatives, or None where that does not pay.

    relu comes last, on as many values as are left, which changes nothing: it lets no gradient pass where the largest
    cell is not above 0. As a threshold it keeps its input for that, so that the output may be modified in place.
    """
    plan = _plan(input.shape, weight.shape, input.dtype, input.device.type, memory_format(input, weight), geometry)
    if not (plan.small if differentiable else plan.tiny):
        return None
    if plan.matrix_product:
        operands = input.contiguous(), weight.contiguous(), plan.kernel_size, bias
        conv = _unfold_and_multiply(*operands, geometry.stride, geometry.padding)
    else:
        conv = torch.conv2d(input, weight, bias, *geometry[:4])
    return torch.threshold(torch.max_pool2d(conv, *_pool_args(geometry)), 0, 0)


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` does not ask for one."""
    plan = _plan(input.shape, weight.shape, input.dtype, input.device.type, memory_format(input, weight), geometry)
    if plan.matrix_product:
        grad_conv = _unpool_by_index(_passing(grad_output, argmax, geometry), argmax, plan.conv_size, geometry, _PLAIN)
        # The operator takes its operands to be contiguous without a look.
        operands = grad_conv, input.contiguous(), weight.contiguous(), plan.kernel_size
        grads = _unfold_and_multiply_backward(*operands, geometry.stride, geometry.padding, output_mask)
        return requested(grads, output_mask)
    kernel = weight.to(plan.dtype)

    def of_slice(images: slice) -> Grads:
        tensors = grad_output[images].to(plan.dtype), input[images].to(plan.dtype), kernel, argmax[images]
        return _backward_of_slice(*tensors, geometry, plan, output_mask)

    if len(plan.slices) == 1:
        totals = of_slice(plan.slices[0])
    else:
        need_input, need_weight, need_bias = output_mask
        # Sums over slices are kept in at least float32, whatever the operands.
        exact = torch.promote_types(plan.dtype, torch.float32)
        grad_input = torch.empty_like(input, memory_format=plan.layout) if need_input else None
        grad_weight = weight.new_zeros(weight.shape, dtype=exact) if need_weight else None
        grad_bias = weight.new_zeros(weight.shape[:1], dtype=exact) if need_bias else None
        totals = grad_input, grad_weight, grad_bias
        for images in plan.slices:
            part, *sums = of_slice(images)
            if grad_input is not None and part is not None:
                grad_input[images].copy_(part)
            for total, term in zip(totals[1:], sums, strict=True):
                if total is not None and term is not None:
                    total.add_(term)
    return requested([None if total is None else total.to(input.dtype) for total in totals], output_mask)


def _backward_of_slice(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    plan: _Plan,
    output_mask: Sequence[bool],
) -> Grads:
    need_input, need_weight, need_bias = output_mask
    if plan.phases and need_weight and not need_input:
        return None, *_by_phases(grad_output, input, weight, argmax, geometry)
    for_input, for_weight = plan.for_input, plan.for_weight
    layout = for_input if need_input else for_weight
    # Where oneDNN would not add as stock does.
    apart = need_bias and not (need_weight and for_weight == _PLAIN)
    exact = torch.promote_types(grad_output.dtype, torch.float32)
    if plan.tiled and layout == _LAST and (need_input or need_weight):
        grad_conv = _unpool_by_cells(grad_output, argmax, geometry)
        grad_bias = grad_conv.permute(0, 2, 3, 1).flatten(0, 2).sum(0, dtype=exact) if apart else None
    else:
        passing = _passing(grad_output, argmax, geometry)
        # Of pooled values, a quarter of the work.
        grad_bias = passing.sum((0, 2, 3), dtype=exact) if apart else None
        if not (need_input or need_weight):
            return None, None, grad_bias
        if plan.by_index:
            grad_conv = _unpool_by_index(passing, argmax, plan.conv_size, geometry, layout)
        else:
            grad_conv = _unpool_by_planes(passing, argmax, plan.conv_size, geometry)

    def backward(layout: torch.memory_format, *mask: bool) -> Grads:
        grads = _convolution_backward(
            *(_laid_out(tensor, layout) for tensor in (grad_conv, input, weight)),
            weight.shape[:1],
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0, 0],
            geometry.groups,
            mask,
        )
        # oneDNN's backward may return a gradient that was not asked for.
        return requested(grads, mask)

    if for_input == for_weight or not need_input or not need_weight:
        grad_input, grad_weight, bias = backward(layout, need_input, need_weight, need_bias and not apart)
    else:
        grad_input, _, _ = backward(for_input, True, False, False)
        _, grad_weight, bias = backward(for_weight, False, True, need_bias and not apart)
    return grad_input, grad_weight, grad_bias if apart else bias


def _pool(conv: Tensor, geometry: ConvPoolGeometry, plan: _Plan, return_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax, as `plan` says."""
    if plan.side_by_side:
        return _pool_by_cells(conv, geometry, return_argmax)
    if plan.by_index:
        return _pool_by_index(_channels_last(conv), geometry, return_argmax)
    return _pool_by_planes(conv, geometry, return_argmax)


def requested(grads: Sequence[Tensor | None], output_mask: Sequence[bool]) -> Grads:
    """Replace by None what was not asked for."""
    first, second, third = (grad if needed else None for grad, needed in zip(grads, output_mask, strict=True))
    return first, second, third


# --- which formulation ---------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How calls of one shape are computed.

    Attributes:
        small: by stock's operators and derivatives; and `tiny`, without derivatives.
        matrix_product: one product per image, of the kernel and the unfolded image; its gradients likewise.
        phases: one convolution with the kernel once per window cell; and the weight's gradient alone likewise.
        side_by_side: pool by planes, one per window cell, taken apart by one copy.
        tiled: windows side by side leave no cell over.
        by_index: pool by stock's max_pool2d; else by one view per window cell.
        convolved_in: layout of the convolution's operands; likewise `for_input` and `for_weight` for its gradients.
        dtype: the type to compute in.
        layout: of the output.
        kernel_size: height and width of the kernel.
        conv_size: height and width of the convolution's output.
        output_shape: of the pooled output.
        slices: of the batch.
    """

    small: bool
    tiny: bool
    matrix_product: bool
    phases: bool
    side_by_side: bool
    tiled: bool
    by_index: bool
    convolved_in: torch.memory_format
    for_input: torch.memory_format
    for_weight: torch.memory_format
    dtype: torch.dtype
    layout: torch.memory_format
    kernel_size: Pair
    conv_size: Pair
    output_shape: tuple[int, ...]
    slices: tuple[slice, ...]


@functools.lru_cache(maxsize=512)
def _plan(
    input: torch.Size,
    weight: torch.Size,
    dtype: torch.dtype,
    device: str,
    layout: torch.memory_format,
    geometry: ConvPoolGeometry,
) -> _Plan:
    """Choose by shapes alone; remembered, as it is asked for where microseconds count."""
    conv_size = geometry.conv_size((input[2], input[3]), (weight[2], weight[3]))
    pooled_size = geometry.pooled_size(conv_size)
    floating = device == "cpu" and dtype.is_floating_point
    computed_in = _computed_in(dtype, device)
    plain = floating and layout == _PLAIN
    by_index = floating and _index_tells(conv_size, geometry)
    # Grouped convolutions stay in the caller's layout: in another one infinite weights act otherwise on the padding.
    # Few output channels gain less than laying the operands out takes.
    last = by_index and geometry.groups == 1 and weight[0] >= 32 and _short_chain(weight[1], weight)
    for_input, for_weight = _backward_layouts(weight, geometry) if device == "cpu" else (_ANY, _ANY)
    few = plain and dtype == torch.float32 and input[0] <= _FEW_IMAGES
    bytes_per_image = weight[0] * conv_size[0] * conv_size[1] * computed_in.itemsize
    stock = device == "cpu" and dtype == torch.float32 and not _window_may_be_empty(geometry)
    phases = plain and weight[0] < 16 and _phases_pay(weight, geometry)
    return _Plan(
        small=stock and input[0] * bytes_per_image <= _LITTLE_TO_KEEP,
        tiny=stock and input[0] * bytes_per_image <= _LITTLE_TO_COMPUTE,
        matrix_product=few and _products(input, weight, geometry) <= _FEW_PRODUCTS,
        phases=phases,
        side_by_side=plain and not last and _side_by_side(conv_size, geometry),
        tiled=floating and _tiled(conv_size, geometry),
        by_index=by_index,
        convolved_in=_LAST if last else _ANY,
        for_input=for_input,
        for_weight=for_weight,
        dtype=computed_in,
        layout=layout,
        kernel_size=(weight[2], weight[3]),
        conv_size=conv_size,
        output_shape=(input[0], weight[0], *pooled_size),
        slices=_slices(input[0], bytes_per_image, device),
    )


def _products(input: torch.Size, weight: torch.Size, geometry: ConvPoolGeometry) -> float:
    """Multiply-adds of one product per image, of the kernel and the unfolded image; infinite where that is not right.

    Without padding, because its zeros would meet infinite weights in the product, where stock's convolutions leave
    them out.
    """
    height, width = geometry.conv_size((input[2], input[3]), (weight[2], weight[3]))
    possible = (
        input[0] > 0
        and geometry.padding == (0, 0)
        and geometry.dilation == (1, 1)
        and geometry.groups == 1
        and _index_tells((height, width), geometry)
    )
    return input[0] * height * width * weight.numel() if possible else math.inf


def _phases_pay(weight: torch.Size, geometry: ConvPoolGeometry) -> bool:
    """Whether a convolution can be made one with `cells` times the channels, strided as the pool.

    Its output is the window's planes, ready to be compared. Its kernel is larger by the window's reach, so it pays only
    where that adds little, and where few channels leave vector lanes empty: LeNet's conv1 takes half the time.
    """
    larger = (weight[2] + geometry.pool_size[0] - 1) * (weight[3] + geometry.pool_size[1] - 1)
    return (
        (geometry.stride, geometry.dilation, geometry.pool_dilation) == ((1, 1),) * 3
        and geometry.groups == 1
        and not geometry.ceil_mode
        and geometry.pool_padding == (0, 0)
        and 1 < geometry.window_size <= 255
        and larger <= 1.5 * weight[2] * weight[3]
    )


def _index_tells(conv_size: Pair, geometry: ConvPoolGeometry) -> bool:
    """Whether an index tells the cell: not where a window may be empty, and not where it is wider than the image."""
    return (
        geometry.window_size <= 255
        and not _window_may_be_empty(geometry)
        and (geometry.pool_size[1] - 1) * geometry.pool_dilation[1] < conv_size[1]
    )


def _side_by_side(conv_size: Pair, geometry: ConvPoolGeometry) -> bool:
    """Whether each cell of the convolution is in one window at most, and each window whole."""
    pooled = geometry.pooled_size(conv_size)
    return (
        geometry.pool_stride == geometry.pool_size
        and geometry.pool_dilation == (1, 1)
        and geometry.pool_padding == (0, 0)
        and geometry.window_size <= 255
        and all(pooled[i] * geometry.pool_size[i] <= conv_size[i] for i in (0, 1))
    )


def _tiled(conv_size: Pair, geometry: ConvPoolGeometry) -> bool:
    """Whether each cell of the convolution is in exactly one window."""
    pooled = geometry.pooled_size(conv_size)
    return _side_by_side(conv_size, geometry) and all(pooled[i] * geometry.pool_size[i] == conv_size[i] for i in (0, 1))


def _backward_layouts(
    weight: torch.Size, geometry: ConvPoolGeometry
) -> tuple[torch.memory_format, torch.memory_format]:
    """Choose layouts for the gradients of the input and of the weight.

    oneDNN is faster in channels_last (the weight of LeNet's conv2: twice), except for an input of fewer channels than a
    vector has lanes, and for strided convolutions. Where the input's gradient stays plain to be exact, that of a weight
    of many channels does, too: two layouts take more copies than they save. Large kernels stay as they are: not every
    CPU has fast code for their weight in channels_last.
    """
    if geometry.groups > 1 or max(weight[2:]) > 8:
        return _PLAIN, _PLAIN
    for_input = _LAST if weight[1] >= 8 and _short_chain(weight[0], weight) else _PLAIN
    many = for_input == _PLAIN and weight[1] >= 32
    for_weight = _PLAIN if max(geometry.stride) > 1 or many else _LAST
    return for_input, for_weight


def _short_chain(channels: int, weight: torch.Size) -> bool:
    """Whether sums over so many channels and the kernel are as exact in channels_last as in the plain layout."""
    return channels <= 16 or channels * weight[2] * weight[3] <= _CHAIN


def _computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type to convolve in: float32 for narrower ones that this CPU has no instructions for.

    Stock then takes a slow convolution of its own; one in float32 on slices is faster, and rounds but once.
    """
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if _narrow_types_run()[dtype] else torch.float32


@functools.cache
def _narrow_types_run() -> dict[torch.dtype, bool]:
    if not torch.backends.mkldnn.is_available():
        return {torch.float16: False, torch.bfloat16: False}
    onednn = torch.ops.mkldnn
    return {
        torch.float16: onednn._is_mkldnn_fp16_supported(),
        torch.bfloat16: onednn._is_mkldnn_bf16_supported(),
    }


def _slices(images: int, bytes_per_image: int, device: str) -> tuple[slice, ...]:
    """Cut the batch: on a CPU into slices that fit the cache, while a GPU wants everything at once."""
    step = max(1, _SLICE_BYTES // bytes_per_image) if device == "cpu" else images
    # Slices of about one size, because a small rest would cost nearly as much as a whole one.
    count = -(-images // max(1, step))
    step = -(-images // max(1, count))
    return tuple(slice(first, min(images, first + step)) for first in range(0, images, max(1, step)))


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    if layout == _ANY:
        return tensor
    return _channels_last(tensor) if layout == _LAST else tensor.contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    """Lay out as channels_last, also where there is one channel: then only strides tell a convolution what is meant."""
    tensor = tensor.contiguous(memory_format=_LAST)
    _, channels, height, width = tensor.shape
    return tensor.as_strided(tensor.shape, (channels * height * width, 1, channels * width, channels))


# --- pooling windows that stand side by side: the convolution taken apart into planes, one per window cell ----------


def _largest(planes: Tensor, return_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Reduce contiguous planes (N, 1 + cells, ...), the first of zeros, to the largest values and their argmax.

    As an image of one column, a row for each plane and all else as channels, stock's max_pool2d runs vectorised: the
    zeros are relu's, and its index is the plane, whose number less one is the argmax and, for the zeros, the byte 255.
    """
    if not return_argmax:
        return planes.amax(1), None
    images, rows, *shape = planes.shape
    size = math.prod(shape)
    column = planes.as_strided((images, size, rows, 1), (rows * size, 1, size, size))
    output, plane = _max_pool2d(column, [rows, 1])
    return output.view(images, *shape), plane.to(torch.uint8).sub_(1).view(images, *shape)


def _pool_by_cells(conv: Tensor, geometry: ConvPoolGeometry, return_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Pool a convolution laid out plainly."""
    (height, width), (over_n, over_c, down, right) = geometry.pool_size, conv.stride()
    size = *conv.shape[:1], height, width, conv.shape[1], conv.shape[2] // height, conv.shape[3] // width
    cells = conv.as_strided(size, (over_n, down, right, over_c, height * down, width * right))
    planes = conv.new_empty((cells.shape[0], 1 + geometry.window_size, *cells.shape[3:]))
    planes.select(1, 0).zero_()
    planes.narrow(1, 1, geometry.window_size).view(cells.shape).copy_(cells)
    return _largest(planes, return_argmax)


def _unpool_by_cells(grad_output: Tensor, argmax: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Gradient at the resolution of a convolution that windows tile, in channels_last.

    Each cell compares its number with the argmax, as in `_spread`, but where the convolution has it. Fewer passes than
    by index, none of them over int64: 0.7 to 0.95 of the time.
    """
    (rows, columns), (images, channels, height, width) = geometry.pool_size, argmax.shape
    size = images, height, rows, width, columns, channels
    # Pooled cells with the window's cells between them.
    grad, number = (
        tensor.permute(0, 2, 3, 1).contiguous().view(images, height, 1, width, 1, channels)
        for tensor in (grad_output, argmax)
    )
    number = number.to(grad.dtype)
    cells = _cell_numbers(geometry.window_size, number.dtype).view(1, rows, 1, columns, 1)
    here = torch.eq(number, cells, out=number.new_empty(size))
    _threshold_backward_out(grad.expand(size), here, 0.5, grad_input=here)
    return here.view(images, height * rows, width * columns, channels).permute(0, 3, 1, 2)


# --- pooling by index: stock's max_pool2d, with a byte for an int64 ------------------------------------------------


def _pool_args(geometry: ConvPoolGeometry) -> tuple[Pair, Pair, Pair, Pair, bool]:
    """Arguments of ATen's max_pool2d."""
    return geometry.pool_size, geometry.pool_stride, geometry.pool_padding, geometry.pool_dilation, geometry.ceil_mode


@functools.lru_cache(maxsize=64)
def _windows(conv_size: Pair, pooled_size: Pair, geometry: ConvPoolGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Tables between indices, flat positions in the convolution's output, and argmax.

    Returns:
        By pooled cell, the position of its window's first cell, (PH, PW); by argmax, how far behind it the cell's
        position is; and the other way round, by distance, the argmax.
    """
    with torch.inference_mode(False):
        rows, columns = (
            torch.arange(pooled_size[i], device="cpu") * geometry.pool_stride[i] - geometry.pool_padding[i]
            for i in (0, 1)
        )
        down, right = (torch.arange(geometry.pool_size[i], device="cpu") * geometry.pool_dilation[i] for i in (0, 1))
        first = rows[:, None] * conv_size[1] + columns
        distance = (down[:, None] * conv_size[1] + right).flatten()
        argmax = torch.zeros(int(distance[-1]) + 1, dtype=geometry.argmax_dtype, device="cpu")
        argmax[distance] = torch.arange(geometry.window_size, dtype=geometry.argmax_dtype, device="cpu")
        # Every byte may be looked up, `no_winner` too; what that gives is not used.
        return first, F.pad(distance, (0, 256 - geometry.window_size)), argmax


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Take, for a contiguous `index` of any type, the table's entries."""
    if index.numel() <= _SMALL:
        return table.take(index.long())
    # Several times as fast as `take`, but more calls.
    index = index.int() if index.dtype == torch.uint8 else index
    return table.index_select(0, index.view(-1)).view(index.shape)


def _pool_by_index(conv: Tensor, geometry: ConvPoolGeometry, return_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Pool a convolution in its own layout; relu after it, on as many values as are left."""
    output, index = _max_pool2d(conv, *_pool_args(geometry))
    output.relu_()
    if not return_argmax:
        return output, None
    first, _, argmax = _windows(tuple(conv.shape[2:]), tuple(output.shape[2:]), geometry)
    if output.is_contiguous():
        argmax = _looked_up(argmax, index.sub_(first))
    else:
        argmax = _looked_up(argmax, index.permute(0, 2, 3, 1).sub_(first.unsqueeze(2))).permute(0, 3, 1, 2)
    closed = output <= 0
    if argmax.numel() <= _SMALL:
        return output, argmax.masked_fill_(closed, geometry.no_winner)
    # What masked_fill_ does, but vectorised: minus one is the byte 255, of which an "or" makes 255 of any argmax.
    return output, argmax.bitwise_or_(closed.view(torch.uint8).neg_())


def _passing(grad_output: Tensor, argmax: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Pooled gradients, zero where the argmax says that none passes, and no NaN where one was infinite."""
    if argmax.numel() <= _SMALL or argmax.dtype != torch.uint8 or not grad_output.is_floating_point():
        return grad_output.masked_fill(argmax == geometry.no_winner, 0)
    # What masked_fill does, but vectorised.
    return _threshold_backward(grad_output, argmax.to(grad_output.dtype).neg_(), -geometry.no_winner)


def _unpool_by_index(
    passing: Tensor, argmax: Tensor, conv_size: Pair, geometry: ConvPoolGeometry, layout: torch.memory_format
) -> Tensor:
    """Gradient at the convolution's resolution, in `layout`: each pooled gradient at the cell that its argmax names."""
    first, distances, _ = _windows(conv_size, tuple(argmax.shape[2:]), geometry)
    passing, argmax = passing.contiguous(memory_format=layout), argmax.contiguous(memory_format=layout)
    if layout == _LAST:
        index = _looked_up(distances, argmax.permute(0, 2, 3, 1)).add_(first.unsqueeze(2)).permute(0, 3, 1, 2)
    else:
        index = _looked_up(distances, argmax).add_(first)
    if any(geometry.pool_padding):
        # Where nothing passes, the window's first cell stands in, which may lie in the padding, before the image.
        index.clamp_(min=0)
    # Of the convolution's output, sizes and layout are read, not the values.
    like = torch.empty((*argmax.shape[:2], *conv_size), dtype=passing.dtype, memory_format=layout)
    return _max_pool2d_backward(passing, like, *_pool_args(geometry), index)


# --- pooling by planes, one per cell of the window: for few channels, and for all that has no index ----------------


def _stacked_shape(weight: torch.Size, pool_size: Pair) -> tuple[int, int, int, int]:
    """Shape of the kernel stacked once per window cell, each as large as the cells' receptive fields together."""
    (out_channels, in_channels, height, width), (rows, columns) = weight, pool_size
    return rows * columns * out_channels, in_channels, height + rows - 1, width + columns - 1


@functools.lru_cache(maxsize=64)
def _phase_tables(weight: torch.Size, pool_size: Pair) -> tuple[Tensor, Tensor]:
    """Where elements lie.

    Returns:
        By element of a plane of zeros and the stack, where it lies in the flat weight behind one zero; and by cell and
        element of the weight, where it lies in the flat stack.
    """
    (rows, columns), (height, width) = pool_size, weight[2:]
    with torch.inference_mode(False):
        elements = torch.arange(1, weight.numel() + 1, device="cpu").view(weight)
        stack = torch.zeros(_stacked_shape(weight, pool_size), dtype=torch.int64, device="cpu")
        positions = torch.arange(stack.numel(), device="cpu").view(rows * columns, *weight[:2], *stack.shape[2:])
        cells = []
        for cell, kernel in enumerate(stack.view(positions.shape)):
            row, column = divmod(cell, columns)
            kernel[..., row : row + height, column : column + width] = elements
            cells.append(positions[cell, ..., row : row + height, column : column + width])
        zeros = torch.zeros_like(stack[: weight[0]])
        return torch.cat([zeros, stack]).flatten(), torch.stack(cells).flatten()


def _gathered(weight: Tensor, table: Tensor) -> Tensor:
    """Take elements of the flat weight by a table that counts from 1, where 0 gives 0."""
    return torch.constant_pad_nd(weight.reshape(-1), [1, 0]).index_select(0, table)


def _phases(weight: Tensor, bias: Tensor | None, pool_size: Pair) -> tuple[Tensor, Tensor | None]:
    """Stack the kernel and the bias once per window cell, shifted to the cell's receptive field, behind zeros."""
    size = _stacked_shape(weight.shape, pool_size)
    stack, _ = _phase_tables(weight.shape, pool_size)
    kernels = _gathered(weight, stack).view(-1, *size[1:])
    return kernels, None if bias is None else torch.cat([torch.zeros_like(bias)] + [bias] * (size[0] // len(bias)))


def _fold_phases(stack: Tensor, weight: torch.Size, pool_size: Pair) -> Tensor:
    """Transpose of `_phases`: add up what the cells' kernels receive, each shifted back."""
    _, cells = _phase_tables(weight, pool_size)
    return stack.reshape(-1).index_select(0, cells).view(-1, weight.numel()).sum(0).view(weight)


@functools.lru_cache(maxsize=64)
def _cell_numbers(cells: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(cells, dtype=dtype, device="cpu").view(-1, 1, 1, 1)


def _spread(grad_output: Tensor, argmax: Tensor, cells: int) -> Tensor:
    """Gradients as a window's planes, (N, cells, C, PH, PW): each where its argmax is, 0 elsewhere.

    threshold_backward selects without arithmetic, so that an infinite gradient leaves no NaN behind, and vectorised.
    """
    number = argmax.to(grad_output.dtype).unsqueeze(1)
    size = argmax.shape[0], cells, *argmax.shape[1:]
    here = torch.eq(number, _cell_numbers(cells, number.dtype), out=number.new_empty(size))
    return _threshold_backward_out(grad_output.unsqueeze(1).expand(size), here, 0.5, grad_input=here)


def _by_phases(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, geometry: ConvPoolGeometry
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias without the convolution's resolution."""
    planes = _spread(grad_output, argmax, geometry.window_size).flatten(1, 2)
    stack = weight.new_empty(_stacked_shape(weight.shape, geometry.pool_size))
    layout = _PLAIN if weight.shape[1] == 1 else _LAST
    _, kernels, biases = _convolution_backward(
        *(_laid_out(tensor, layout) for tensor in (planes, input, stack)),
        [len(stack)],
        geometry.pool_stride,
        geometry.padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, True],
    )
    return _fold_phases(kernels, weight.shape, geometry.pool_size), biases.view(geometry.window_size, -1).sum(0)


def _pool_phases(conv: Tensor, geometry: ConvPoolGeometry, return_argmax: bool) -> tuple[Tensor, Tensor | None] | None:
    """Pool a plane of zeros and a window's planes, (N, (1 + cells) * O, PH, PW); None where there is any NaN."""
    # An image of one channel may pass for channels_last, and its convolution be laid out so.
    output, argmax = _largest(conv.contiguous().unflatten(1, (1 + geometry.window_size, -1)), return_argmax)
    return None if math.isnan(output.sum().item()) else (output, argmax)


def _pool_by_planes(conv: Tensor, geometry: ConvPoolGeometry, return_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Pool any type on any device, empty windows and NaN included: the last NaN of a window has its argmax."""
    pooled = geometry.pooled_size(tuple(conv.shape[2:]))
    planes = _planes(conv, pooled, geometry)
    output = next(planes).clone()
    argmax = torch.zeros_like(output, dtype=geometry.argmax_dtype) if return_argmax else None
    for cell, plane in enumerate(planes, start=1):
        if argmax is not None:
            argmax.masked_fill_((plane > output).logical_or_(plane != plane), cell)
        torch.maximum(output, plane, out=output)
    if not _window_may_be_empty(geometry):
        output.relu_()
    if argmax is not None:
        argmax.masked_fill_(output <= 0, geometry.no_winner)
    return output, argmax


def _window_may_be_empty(geometry: ConvPoolGeometry) -> bool:
    """Whether a window may lie wholly in the padding: its output is then -inf, as in stock, which relu must spare."""
    return max(geometry.pool_dilation) > 1 and max(geometry.pool_padding) > 0


def _planes(conv: Tensor, pooled: Pair, geometry: ConvPoolGeometry) -> Iterator[Tensor]:
    """Give each window cell's values in scan order, -inf where a window overhangs."""
    if _window_may_be_empty(geometry):
        conv = conv.relu()
    top, bottom, left, right = _overhang(conv.shape[2:], pooled, geometry)
    if any((top, bottom, left, right)):
        least = -torch.inf if conv.is_floating_point() else torch.iinfo(conv.dtype).min
        conv = F.pad(conv, (left, right, top, bottom), value=least)
    return _window_views(conv, pooled, geometry)


def _overhang(size: Sequence[int], pooled: Sequence[int], geometry: ConvPoolGeometry) -> tuple[int, int, int, int]:
    """Cells by which the windows reach beyond the convolution's output: top, bottom, left, right."""
    reach = [
        (pooled[i] - 1) * geometry.pool_stride[i] + (geometry.pool_size[i] - 1) * geometry.pool_dilation[i] + 1
        for i in (0, 1)
    ]
    top, left = geometry.pool_padding
    return top, max(0, reach[0] - size[0] - top), left, max(0, reach[1] - size[1] - left)


def _window_views(padded: Tensor, pooled: Sequence[int], geometry: ConvPoolGeometry) -> Iterator[Tensor]:
    """Give one strided view of `padded` per window cell, in scan order, each of the pooled size."""
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.pool_stride, geometry.pool_dilation
    height, width = (pooled[0] - 1) * stride_h + 1, (pooled[1] - 1) * stride_w + 1
    for top in range(0, geometry.pool_size[0] * dilation_h, dilation_h):
        for left in range(0, geometry.pool_size[1] * dilation_w, dilation_w):
            yield padded[:, :, top : top + height : stride_h, left : left + width : stride_w]


def _unpool_by_planes(passing: Tensor, argmax: Tensor, conv_size: Pair, geometry: ConvPoolGeometry) -> Tensor:
    """Gradient at the convolution's resolution: each cell's gradients where its plane was taken from."""
    top, bottom, left, right = _overhang(conv_size, argmax.shape[2:], geometry)
    size = *argmax.shape[:2], conv_size[0] + top + bottom, conv_size[1] + left + right
    padded = passing.new_zeros(size)
    for cell, view in enumerate(_window_views(padded, argmax.shape[2:], geometry)):
        # `where` selects without arithmetic, so that an infinite gradient leaves no NaN behind.
        view += torch.where(argmax == cell, passing, 0)
    return padded[:, :, top : top + conv_size[0], left : left + conv_size[1]]


# --- the argmax as differentiable operators: for derivatives of any order ------------------------------------------


def _argmax_index(argmax: Tensor, conv_size: Sequence[int], geometry: ConvPoolGeometry) -> tuple[Tensor, Tensor]:
    """Turn argmax into flat int64 positions in the convolution's output, and tell which pooled cells have one."""
    kept = argmax != geometry.no_winner
    cell = torch.where(kept, argmax, 0).long()
    rows, columns = (torch.arange(argmax.shape[2 + i], device=argmax.device) * geometry.pool_stride[i] for i in (0, 1))
    row = rows[:, None] - geometry.pool_padding[0] + cell // geometry.pool_size[1] * geometry.pool_dilation[0]
    column = columns - geometry.pool_padding[1] + cell % geometry.pool_size[1] * geometry.pool_dilation[1]
    return torch.where(kept, row * conv_size[1] + column, 0).flatten(2), kept


def max_gather(conv: Tensor, argmax: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Take from `conv` the cell that each argmax names, zero where it names none; differentiable to any order."""
    index, kept = _argmax_index(argmax, conv.shape[2:], geometry)
    return torch.where(kept, conv.flatten(2).gather(2, index).view(argmax.shape), 0.0)


def max_scatter(grad_output: Tensor, argmax: Tensor, conv_size: Sequence[int], geometry: ConvPoolGeometry) -> Tensor:
    """Transpose of `max_gather`: add each pooled gradient to the cell that its argmax names; differentiable too."""
    index, kept = _argmax_index(argmax, conv_size, geometry)
    zeros = grad_output.new_zeros(*argmax.shape[:2], conv_size[0] * conv_size[1])
    chosen = torch.where(kept, grad_output, 0.0).flatten(2)
    return zeros.scatter_add(2, index, chosen).unflatten(2, tuple(conv_size))


# --- linear maps ---------------------------------------------------------------------------------------------------


def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """Return relu(beta * input + alpha * (mat1 @ mat2)); without `input`, relu(alpha * (mat1 @ mat2))."""
    if input is None:
        product = torch.mm(mat1, mat2)
        return product.relu_() if alpha == 1 else product.mul_(alpha).relu_()
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha).relu_()


def addmm_relu_backward(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Sequence[int],
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return grad_input, grad_mat1 and grad_mat2, None where `output_mask` does not ask for one."""
    need_input, need_mat1, need_mat2 = output_mask
    grad = _threshold_backward(grad_output, output, 0)
    grad_input = grad_mat1 = grad_mat2 = None
    if need_input:
        grad_input = grad.sum(0) if list(input_size) == [grad.shape[1]] else grad.sum_to_size(input_size)
        grad_input = grad_input if beta == 1 else grad_input * beta
    scaled = grad if alpha == 1 else grad * alpha
    if need_mat1:
        grad_mat1 = torch.mm(scaled, mat2.t())
    if need_mat2:
        # The gradient has mat2's own layout, so that a transposed nn.Linear weight gets a contiguous gradient.
        grad_mat2 = torch.mm(scaled.t(), mat1).t() if column_major(mat2) else torch.mm(mat1.t(), scaled)
    return grad_input, grad_mat1, grad_mat2


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    return_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return three linear layers with relu between them and, if asked for, what relu gave."""
    hidden1 = addmm_relu(bias1, input, weight1.t(), 1, 1)
    hidden2 = addmm_relu(bias2, hidden1, weight2.t(), 1, 1)
    output = torch.addmm(bias3, hidden2, weight3.t())
    return (output, hidden1, hidden2) if return_hidden else (output, None, None)


def mlp_backward(
    grad_output: Tensor,
    input: Tensor,
    hidden1: Tensor,
    hidden2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of input and of each layer's weight and bias, None where `output_mask` asks for none."""
    need_input, need_weight1, need_bias1, need_weight2, need_bias2, need_weight3, need_bias3 = output_mask
    need_hidden1 = need_input or need_weight1 or need_bias1
    grad_weight3 = torch.mm(grad_output.t(), hidden2) if need_weight3 else None
    grad_bias3 = grad_output.sum(0) if need_bias3 else None
    grad_input = grad_weight1 = grad_bias1 = grad_weight2 = grad_bias2 = None
    if need_hidden1 or need_weight2 or need_bias2:
        mask = need_bias2, need_hidden1, need_weight2
        grad_hidden2 = torch.mm(grad_output, weight3)
        grad_bias2, grad_hidden1, grad_weight2 = _linear_relu_backward(grad_hidden2, hidden2, hidden1, weight2, mask)
        if grad_hidden1 is not None:
            mask = need_bias1, need_input, need_weight1
            grad_bias1, grad_input, grad_weight1 = _linear_relu_backward(grad_hidden1, hidden1, input, weight1, mask)
    return grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_weight3, grad_bias3


def _linear_relu_backward(
    grad_output: Tensor, output: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> Grads:
    """Return grad_bias, grad_input and grad_weight of relu(input @ weight^T + bias)."""
    args = grad_output, output, input, weight.t(), weight.shape[:1], 1, 1, output_mask
    grad_bias, grad_input, grad_matrix = addmm_relu_backward(*args)
    return grad_bias, grad_input, None if grad_matrix is None else grad_matrix.t().contiguous()


def column_major(matrix: Tensor) -> bool:
    """Whether `matrix` is laid out as the transpose of a contiguous one."""
    return matrix.t().is_contiguous() and not matrix.is_contiguous()
