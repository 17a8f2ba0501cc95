"""The operators in plain ATen: what runs on CPU tensors, in float64, and wherever no Triton kernel covers a call.

Each function computes what the Triton launcher of the same name in `fastlenet.kernels` computes, from the same
arguments and with the same saved tensors, so that the backward of one may follow the forward of the other.

How a CPU computes a call depends on its shape; `_formulation` and `_backward_layouts` choose, by rules that the
benchmarks justify. What is gained over stock's conv2d, relu and max_pool2d, each in the layout of its input:

- The batch is worked off in slices whose convolution stays in the cache: nothing at the convolution's resolution is
  ever allocated for the whole batch, and stock's cost per image, which grows with the batch, does not.
- Convolution and pooling run in channels_last, whatever the caller's layout: stock's max_pool2d is ten to twenty times
  faster there, and most of oneDNN's convolutions are faster too. Only pooled values are laid out again.
- A convolution with few output channels becomes one with `cells` times as many (`_phases`): half its time.
- A few images are multiplied as matrices: oneDNN takes longer to set a convolution up than to compute it.
- relu and its mask see pooled cells only, and the int64 indices of max_pool2d become bytes at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, Pair, memory_format

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

_SLICE_BYTES = 2 << 20
"""Size that the convolution of a slice of the batch may have: small enough for a CPU's caches and for reused memory."""

_FEW_PRODUCTS = 1 << 20
"""Multiply-adds up to which a convolution is a matrix product: below, oneDNN's set-up costs more than the work."""

_ANY, _PLAIN, _LAST = torch.preserve_format, torch.contiguous_format, torch.channels_last


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_code: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax codes (see `ConvPoolGeometry.code_dtype`)."""
    if _is_matrix_product(input, weight, geometry):
        conv = torch.ops.aten._slow_conv2d_forward.default(
            input.contiguous(), weight.contiguous(), weight.shape[2:], bias, geometry.stride, geometry.padding
        )
        return _pool_by_index(conv, geometry, return_code)
    layout = memory_format(input, weight)
    shape = geometry.output_shape(input, weight)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    code = torch.empty_like(output, dtype=geometry.code_dtype) if return_code else None
    dtype = _computed_in(input)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    phases = _phases(weight, bias, geometry) if layout == _PLAIN and _phases_pay(weight, geometry) else None
    by_index = _has_index(input, weight, geometry)
    pool = _pool_by_index if by_index else _pool_by_planes
    # Grouped convolutions stay in the caller's layout: in another one infinite weights act otherwise on the padding.
    convolved_in = _LAST if by_index and geometry.groups == 1 else _ANY
    kernel = _laid_out(weight, convolved_in)
    for images in _slices(input, weight, geometry):
        part = input[images].to(dtype)
        whole = output[images], None if code is None else code[images]
        if phases is not None:
            conv = F.conv2d(part, *phases, geometry.pool_stride, geometry.padding)
            # The zeros around a shifted kernel turn an infinite input into NaN, so that needs the plain way.
            if _pool_phases(conv.chunk(geometry.cells, dim=1), *whole):
                continue
        part = _laid_out(part, convolved_in)
        conv = F.conv2d(part, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        conv = _channels_last(conv) if by_index else conv
        for target, pooled in zip(whole, pool(conv, geometry, return_code), strict=True):
            if target is not None and pooled is not None:
                target.copy_(pooled)
    return output, code


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    code: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` does not ask for one."""
    need_input, need_weight, need_bias = output_mask
    if _is_matrix_product(input, weight, geometry):
        grad_conv = _unpool_by_index(grad_output, code, _conv_size(input, weight, geometry), geometry, _PLAIN)
        # The operator takes its operands to be contiguous without a look.
        operands = grad_conv, input.contiguous(), weight.contiguous()
        grads = torch.ops.aten._slow_conv2d_backward.output_mask(
            *operands, weight.shape[2:], geometry.stride, geometry.padding, output_mask
        )
        return _requested(grads, output_mask)
    dtype = _computed_in(input)
    kernel = weight.to(dtype)
    # Sums over slices are kept in at least float32, whatever the operands.
    exact = torch.promote_types(dtype, torch.float32)
    grad_input = torch.empty_like(input, memory_format=memory_format(input, weight)) if need_input else None
    grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=exact) if need_bias else None
    wholes = grad_input, grad_weight, grad_bias
    for images in _slices(input, weight, geometry):
        tensors = grad_output[images].to(dtype), input[images].to(dtype), kernel, code[images]
        parts = _backward_of_slice(*tensors, geometry, output_mask)
        for whole, part in zip(wholes, parts, strict=True):
            if whole is None or part is None:
                continue
            if whole is grad_input:
                whole[images].copy_(part)
            else:
                whole.add_(part)
    return _requested([None if whole is None else whole.to(input.dtype) for whole in wholes], output_mask)


def _backward_of_slice(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    code: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    need_input, need_weight, need_bias = output_mask
    size = _conv_size(input, weight, geometry)
    for_input, for_weight = _backward_layouts(input, weight, geometry)
    layout = for_input if need_input else for_weight
    if _has_index(input, weight, geometry):
        grad_conv = _unpool_by_index(grad_output, code, size, geometry, layout)
    else:
        grad_conv = _unpool_by_planes(grad_output, code, size, geometry)

    def backward(layout: torch.memory_format, mask: list[bool]) -> Grads:
        grads = torch.ops.aten.convolution_backward(
            *(_laid_out(tensor, layout) for tensor in (grad_conv, input, weight)),
            [weight.shape[0]],
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0, 0],
            geometry.groups,
            mask,
        )
        # oneDNN's backward may return a gradient that was not asked for.
        return _requested(grads, mask)

    if for_input == for_weight or not need_input or not (need_weight or need_bias):
        return backward(layout, list(output_mask))
    grad_input, _, _ = backward(for_input, [True, False, False])
    _, grad_weight, grad_bias = backward(for_weight, [False, need_weight, need_bias])
    return grad_input, grad_weight, grad_bias


def _requested(grads: Sequence[Tensor | None], output_mask: Sequence[bool]) -> Grads:
    """Replace by None what was not asked for."""
    first, second, third = (grad if needed else None for grad, needed in zip(grads, output_mask, strict=True))
    return first, second, third


# --- which formulation ---------------------------------------------------------------------------------------------


def _is_matrix_product(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> bool:
    """Whether a call is so small that one product per image, of the kernel and the unfolded image, is the fastest.

    LeNet's convolutions of one image take a third of oneDNN's time so, backward even less. Without padding, because
    its zeros would meet infinite weights in the product, where stock's convolutions leave them out.
    """
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and _few_products(input.shape, weight.shape, geometry)
        and memory_format(input, weight) == _PLAIN
    )


@functools.lru_cache(maxsize=256)
def _few_products(input: torch.Size, weight: torch.Size, geometry: ConvPoolGeometry) -> bool:
    """Whether these sizes make a call a matrix product; remembered, as it is asked for where microseconds count."""
    height, width = geometry.conv_size((input[2], input[3]), (weight[2], weight[3]))
    return (
        0 < input[0] * height * width * weight.numel() <= _FEW_PRODUCTS
        and geometry.padding == (0, 0)
        and geometry.dilation == (1, 1)
        and geometry.groups == 1
        and _index_tells((height, width), geometry)
    )


def _has_index(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> bool:
    """Whether stock's max_pool2d gives indices that bytes can be made of, and gradients be spread by."""
    if input.device.type != "cpu" or not input.is_floating_point():
        return False
    return _index_tells(_conv_size(input, weight, geometry), geometry)


def _index_tells(conv_size: Pair, geometry: ConvPoolGeometry) -> bool:
    """Whether an index tells the cell: not where a window may be empty, and not where it is wider than the image."""
    return (
        geometry.cells <= 255
        and not _window_may_be_empty(geometry)
        and (geometry.pool_size[1] - 1) * geometry.pool_dilation[1] < conv_size[1]
    )


def _backward_layouts(
    input: Tensor, weight: Tensor, geometry: ConvPoolGeometry
) -> tuple[torch.memory_format, torch.memory_format]:
    """Choose layouts for the gradients of the input and of the weight.

    oneDNN is faster in channels_last (the weight of LeNet's conv1: six times), except for an input of fewer channels
    than a vector has lanes, for strided convolutions, and for many channels. Large kernels stay as they are: with few
    images oneDNN has no fast code for their weight in channels_last (15x15, two images: thirty times slower).
    """
    if input.device.type != "cpu":
        return _ANY, _ANY
    if geometry.groups > 1 or max(weight.shape[2:]) > 8:
        return _PLAIN, _PLAIN
    for_input = _PLAIN if weight.shape[1] < 8 else _LAST
    for_weight = _PLAIN if max(geometry.stride) > 1 or weight.shape[1] >= 128 else _LAST
    return for_input, for_weight


def _computed_in(input: Tensor) -> torch.dtype:
    """The type to convolve in: float32 for narrower ones that this CPU has no instructions for.

    Stock then takes a slow convolution of its own; one in float32 on slices is faster, and rounds but once.
    """
    if input.device.type != "cpu" or input.dtype not in (torch.float16, torch.bfloat16):
        return input.dtype
    return input.dtype if _narrow_types_run()[input.dtype] else torch.float32


@functools.cache
def _narrow_types_run() -> dict[torch.dtype, bool]:
    if not torch.backends.mkldnn.is_available():
        return {torch.float16: False, torch.bfloat16: False}
    onednn = torch.ops.mkldnn
    return {
        torch.float16: onednn._is_mkldnn_fp16_supported(),
        torch.bfloat16: onednn._is_mkldnn_bf16_supported(),
    }


def _slices(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Iterator[slice]:
    """Cut the batch: on a CPU into slices that fit the cache, while a GPU wants everything at once."""
    images = input.shape[0]
    step = images
    if input.device.type == "cpu":
        height, width = _conv_size(input, weight, geometry)
        step = _SLICE_BYTES // (weight.shape[0] * height * width * _computed_in(input).itemsize)
    # Slices of about one size, because a small rest would cost nearly as much as a whole one.
    count = -(-images // max(1, step))
    step = -(-images // max(1, count))
    for first in range(0, images, max(1, step)):
        yield slice(first, min(images, first + step))


def _conv_size(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Pair:
    return geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    if layout == _ANY:
        return tensor
    return _channels_last(tensor) if layout == _LAST else tensor.contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    """Lay out as channels_last, also where there is one channel: then only strides tell a convolution what is meant."""
    tensor = tensor.contiguous(memory_format=_LAST)
    _, channels, height, width = tensor.shape
    return tensor.as_strided(tensor.shape, (channels * height * width, 1, channels * width, channels))


# --- pooling by index: stock's max_pool2d, with a byte for an int64 ------------------------------------------------


def _pool(geometry: ConvPoolGeometry) -> tuple[Pair, Pair, Pair, Pair, bool]:
    """Arguments of ATen's max_pool2d."""
    return geometry.pool_size, geometry.pool_stride, geometry.pool_padding, geometry.pool_dilation, geometry.ceil_mode


@functools.lru_cache(maxsize=64)
def _windows(conv_size: Pair, pooled_size: Pair, geometry: ConvPoolGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Tables between indices, flat positions in the convolution's output, and codes.

    Returns:
        By pooled cell, the position of its window's first cell, (PH, PW); by code, how far behind it the cell's
        position is; and the other way round, by distance, the code.
    """
    with torch.inference_mode(False):
        rows, columns = (
            torch.arange(pooled_size[i], device="cpu") * geometry.pool_stride[i] - geometry.pool_padding[i]
            for i in (0, 1)
        )
        down, right = (torch.arange(geometry.pool_size[i], device="cpu") * geometry.pool_dilation[i] for i in (0, 1))
        first = rows[:, None] * conv_size[1] + columns
        distance = (down[:, None] * conv_size[1] + right).flatten()
        code = torch.zeros(int(distance[-1]) + 1, dtype=geometry.code_dtype, device="cpu")
        code[distance] = torch.arange(geometry.cells, dtype=geometry.code_dtype, device="cpu")
        # Every byte may be looked up, `dropped` too; what that gives is not used.
        return first, F.pad(distance, (0, 256 - geometry.cells)), code


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Take, for a contiguous `index`, the table's entries: twice as fast as ``table.take(index)``."""
    return table.index_select(0, index.view(-1)).view(index.shape)


def _pool_by_index(conv: Tensor, geometry: ConvPoolGeometry, return_code: bool) -> tuple[Tensor, Tensor | None]:
    """Pool a convolution in its own layout; relu after it, on as many values as are left."""
    output, index = torch.ops.aten.max_pool2d_with_indices.default(conv, *_pool(geometry))
    output.relu_()
    if not return_code:
        return output, None
    first, _, codes = _windows(tuple(conv.shape[2:]), tuple(output.shape[2:]), geometry)
    if output.is_contiguous():
        code = _looked_up(codes, index.sub_(first))
    else:
        code = _looked_up(codes, index.permute(0, 2, 3, 1).sub_(first.unsqueeze(2))).permute(0, 3, 1, 2)
    # What masked_fill_ does, but vectorised: minus one is the byte 255, of which an "or" makes 255 of any code.
    return output, code.bitwise_or_((output <= 0).view(torch.uint8).neg_())


def _unpool_by_index(
    grad_output: Tensor, code: Tensor, conv_size: Pair, geometry: ConvPoolGeometry, layout: torch.memory_format
) -> Tensor:
    """Gradient at the convolution's resolution, in `layout`: each pooled gradient at the cell that its code names."""
    first, distances, _ = _windows(conv_size, tuple(code.shape[2:]), geometry)
    grad_output, code = grad_output.contiguous(memory_format=layout), code.contiguous(memory_format=layout)
    if layout == _LAST:
        index = _looked_up(distances, code.permute(0, 2, 3, 1).int()).add_(first.unsqueeze(2)).permute(0, 3, 1, 2)
    else:
        index = _looked_up(distances, code.int()).add_(first)
    if any(geometry.pool_padding):
        # Where nothing passes, the window's first cell stands in, which may lie in the padding, before the image.
        index.clamp_(min=0)
    # threshold_backward selects without arithmetic, so that an infinite gradient leaves no NaN behind, and vectorised.
    passing = torch.ops.aten.threshold_backward(grad_output, code.to(grad_output.dtype).neg_(), -geometry.dropped)
    # Of the convolution's output, sizes and layout are read, not the values.
    like = torch.empty((*code.shape[:2], *conv_size), dtype=grad_output.dtype, memory_format=layout)
    return torch.ops.aten.max_pool2d_with_indices_backward(passing, like, *_pool(geometry), index)


# --- pooling by planes, one per cell of the window: for few channels, and for all that has no index ----------------


def _phases_pay(weight: Tensor, geometry: ConvPoolGeometry) -> bool:
    """Whether to convolve once per window cell: one convolution with `cells` times the channels, strided as the pool.

    Its output is the window's planes, ready to be compared. Its kernel is larger by the window's reach, so it pays
    only where a convolution has too few output channels to fill the vector lanes: LeNet's conv1 takes half the time.
    """
    larger = (weight.shape[2] + geometry.pool_size[0] - 1) * (weight.shape[3] + geometry.pool_size[1] - 1)
    unit = (geometry.stride, geometry.dilation, geometry.pool_dilation) == ((1, 1),) * 3
    return (
        weight.device.type == "cpu"
        and weight.is_floating_point()
        and unit
        and geometry.groups == 1
        and not geometry.ceil_mode
        and geometry.pool_padding == (0, 0)
        and 1 < geometry.cells <= 255
        and weight.shape[0] < 16
        and larger <= 1.5 * weight.shape[2] * weight.shape[3]
    )


def _phases(weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry) -> tuple[Tensor, Tensor | None]:
    """Stack the kernel and the bias once per window cell, the kernel shifted to the cell's receptive field."""
    (out_channels, in_channels, height, width), (rows, columns) = weight.shape, geometry.pool_size
    kernels = weight.new_zeros(geometry.cells, out_channels, in_channels, height + rows - 1, width + columns - 1)
    for cell, kernel in enumerate(kernels):
        row, column = divmod(cell, columns)
        kernel[..., row : row + height, column : column + width] = weight
    return kernels.flatten(0, 1), None if bias is None else bias.repeat(geometry.cells)


def _pool_phases(planes: Sequence[Tensor], output: Tensor, code: Tensor | None) -> bool:
    """Fill `output` and `code` from a window's planes; return False, with both undefined, where there is any NaN.

    Each pass is one vectorised operation: comparisons write 0 or 1 in the planes' own type, where a bool result would
    not vectorise.
    """
    best = torch.maximum(planes[0], planes[1])
    for plane in planes[2:]:
        torch.maximum(best, plane, out=best)
    if torch.isnan(best.sum()):
        return False
    best.relu_()
    output.copy_(best)
    if code is None:
        return True
    # The number of the first cell that has the maximum, by Horner's rule: each cell that has not adds one, if all
    # before it added theirs. relu's zero comes first, so that cells count from 1 and a closed relu is 0; taking one
    # off makes that the byte 255.
    number = torch.gt(best, planes[-2], out=torch.empty_like(best))
    below = torch.empty_like(best)
    for plane in planes[-3::-1]:
        torch.gt(best, plane, out=below)
        torch.addcmul(below, below, number, out=number)
    torch.gt(best, 0, out=below)
    torch.addcmul(below, below, number, out=number)
    code.copy_(number).sub_(1)
    return True


def _pool_by_planes(conv: Tensor, geometry: ConvPoolGeometry, return_code: bool) -> tuple[Tensor, Tensor | None]:
    """Pool any type on any device, empty windows and NaN included: the last NaN of a window has its argmax."""
    pooled = geometry.pooled_size(tuple(conv.shape[2:]))
    planes = _planes(conv, pooled, geometry)
    output = next(planes).clone()
    code = torch.zeros_like(output, dtype=geometry.code_dtype) if return_code else None
    for cell, plane in enumerate(planes, start=1):
        if code is not None:
            code.masked_fill_((plane > output).logical_or_(plane != plane), cell)
        torch.maximum(output, plane, out=output)
    if not _window_may_be_empty(geometry):
        output.relu_()
    if code is not None:
        code.masked_fill_(output <= 0, geometry.dropped)
    return output, code


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


def _unpool_by_planes(grad_output: Tensor, code: Tensor, conv_size: Pair, geometry: ConvPoolGeometry) -> Tensor:
    """Gradient at the convolution's resolution: each cell's gradients where its plane was taken from."""
    top, bottom, left, right = _overhang(conv_size, code.shape[2:], geometry)
    size = *code.shape[:2], conv_size[0] + top + bottom, conv_size[1] + left + right
    padded = grad_output.new_zeros(size)
    for cell, view in enumerate(_window_views(padded, code.shape[2:], geometry)):
        # `where` selects without arithmetic, so that an infinite gradient leaves no NaN behind.
        view += torch.where(code == cell, grad_output, 0)
    return padded[:, :, top : top + conv_size[0], left : left + conv_size[1]]


# --- the argmax as differentiable operators: for derivatives of any order ------------------------------------------


def _argmax_index(code: Tensor, conv_size: Sequence[int], geometry: ConvPoolGeometry) -> tuple[Tensor, Tensor]:
    """Turn codes into flat int64 positions in the convolution's output, and tell which pooled cells have one."""
    kept = code != geometry.dropped
    cell = torch.where(kept, code, 0).long()
    rows, columns = (torch.arange(code.shape[2 + i], device=code.device) * geometry.pool_stride[i] for i in (0, 1))
    row = rows[:, None] - geometry.pool_padding[0] + cell // geometry.pool_size[1] * geometry.pool_dilation[0]
    column = columns - geometry.pool_padding[1] + cell % geometry.pool_size[1] * geometry.pool_dilation[1]
    return torch.where(kept, row * conv_size[1] + column, 0).flatten(2), kept


def max_gather(conv: Tensor, code: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Take from `conv` the cell that each code names, zero where it names none; differentiable to any order."""
    index, kept = _argmax_index(code, conv.shape[2:], geometry)
    return torch.where(kept, conv.flatten(2).gather(2, index).view(code.shape), 0.0)


def max_scatter(grad_output: Tensor, code: Tensor, conv_size: Sequence[int], geometry: ConvPoolGeometry) -> Tensor:
    """Transpose of `max_gather`: add each pooled gradient to the cell that its code names; differentiable too."""
    index, kept = _argmax_index(code, conv_size, geometry)
    zeros = grad_output.new_zeros(*code.shape[:2], conv_size[0] * conv_size[1])
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
    grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
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
