"""The operators in plain ATen: what runs on CPU tensors, in float64, and wherever no Triton kernel covers a call.

Each function computes what the Triton launcher of the same name in `fastlenet.kernels` computes, from the same
arguments and with the same saved tensors, so that the backward of one may follow the forward of the other.

On a CPU two ideas make it faster than stock. The batch is worked off in slices whose convolution stays in the cache,
so that nothing at the convolution's resolution is ever allocated for the whole batch. And a pooling window is taken
apart into planes, one per cell, over which maximum and argmax are a few vectorised passes, where stock's max_pool2d
writes and reads an int64 index per cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

_SLICE_BYTES = 4 << 20
"""Size that the convolution of a slice of the batch may have: small enough for a CPU's caches and for reused memory."""


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_code: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax codes (see `ConvPoolGeometry.code_dtype`)."""
    output = torch.empty(
        geometry.output_shape(input, weight),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    )
    code = torch.empty_like(output, dtype=geometry.code_dtype) if return_code else None
    phases = _phases(weight, bias, geometry) if _phases_pay(weight, geometry) else None
    for images in _slices(input, weight, geometry):
        result = output[images], None if code is None else code[images], geometry
        if phases is not None:
            conv = F.conv2d(input[images], *phases, geometry.pool_stride, geometry.padding)
            # The zeros around a shifted kernel turn an infinite input into NaN, so that needs the plain way.
            if _max_of_numbers(conv.chunk(geometry.cells, dim=1), *result):
                continue
        conv = F.conv2d(
            input[images], weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        if not _max_of_numbers(_planes(conv, result[0], geometry), *result):
            _max_of_anything(_planes(conv, result[0], geometry), *result)
    return output, code


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    code: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` does not ask for one."""
    need_input, need_weight, need_bias = output_mask
    slices = list(_slices(input, weight, geometry))
    phases = _phases(weight, None, geometry)[0] if not need_input and _phases_pay(weight, geometry) else None
    if len(slices) == 1:
        return _backward_of_slice(grad_output, input, weight, phases, code, geometry, output_mask)
    grad_input = torch.empty_like(input, memory_format=memory_format(input, weight)) if need_input else None
    # Sums over slices are kept in at least float32, whatever the operands.
    exact = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=exact) if need_bias else None
    for images in slices:
        tensors = grad_output[images], input[images], weight, phases, code[images]
        grads = _backward_of_slice(*tensors, geometry, output_mask)
        if grad_input is not None:
            grad_input[images].copy_(grads[0])
        for total, part in ((grad_weight, grads[1]), (grad_bias, grads[2])):
            if total is not None:
                total.add_(part)
    return (
        grad_input,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _backward_of_slice(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    phases: Tensor | None,
    code: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    chosen = _chosen_gradients(grad_output, code, geometry)
    if phases is not None:
        grad_conv = torch.cat(list(chosen), dim=1)
        kernel, stride = phases, geometry.pool_stride
    else:
        grad_conv = _max_unpool(chosen, input, weight, geometry)
        kernel, stride = weight, geometry.stride
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_conv,
        input,
        kernel,
        [kernel.shape[0]],
        stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        output_mask,
    )
    need_input, need_weight, need_bias = output_mask
    if phases is not None and need_weight:
        grad_weight = _fold_phases(grad_weight, weight, geometry)
    if phases is not None and need_bias:
        grad_bias = grad_bias.view(geometry.cells, -1).sum(0)
    # oneDNN's backward may return a gradient that was not asked for.
    return grad_input if need_input else None, grad_weight if need_weight else None, grad_bias if need_bias else None


def _slices(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Iterator[slice]:
    """Cut the batch: on a CPU into slices that fit the cache, while a GPU wants everything at once."""
    images = input.shape[0]
    step = images
    if input.device.type == "cpu":
        height, width = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
        step = _SLICE_BYTES // (weight.shape[0] * height * width * input.element_size())
    for first in range(0, images, max(1, step)):
        yield slice(first, min(images, first + max(1, step)))


def _max_of_numbers(planes: Iterable[Tensor], output: Tensor, code: Tensor | None, geometry: ConvPoolGeometry) -> bool:
    """Fill `output` and `code` from a window's planes; return False, with both undefined, where there is any NaN.

    Comparisons write 0 or 1 in the planes' own type, which vectorises where a bool result does not. Only on a CPU: a
    GPU would have to wait for the answer.
    """
    if output.device.type != "cpu" or not output.is_floating_point() or geometry.code_dtype != torch.uint8:
        return False
    wins = winner = None
    for cell, plane in enumerate(planes):
        if cell == 0:
            output.copy_(plane)
            continue
        if code is not None:
            wins = torch.gt(plane, output, out=torch.empty_like(output) if wins is None else wins)
            wins *= cell
            # Cells come in order, so the greatest cell that ever won is the last one that did.
            winner = wins.clone() if winner is None else torch.maximum(winner, wins, out=winner)
        torch.maximum(output, plane, out=output)
    if torch.isnan(output.sum()):
        return False
    if not _window_may_be_empty(geometry):
        output.relu_()
    if code is not None:
        off = torch.le(output, 0, out=torch.empty_like(output) if wins is None else wins).mul_(geometry.dropped)
        code.copy_(off if winner is None else torch.maximum(winner, off, out=winner))
    return True


def _max_of_anything(planes: Iterable[Tensor], output: Tensor, code: Tensor | None, geometry: ConvPoolGeometry) -> None:
    """Do as `_max_of_numbers` does, NaN included: it propagates, and the last NaN of a window has its argmax."""
    for cell, plane in enumerate(planes):
        if cell == 0:
            output.copy_(plane)
            if code is not None:
                code.zero_()
            continue
        if code is not None:
            code.masked_fill_((plane > output).logical_or_(plane != plane), cell)
        torch.maximum(output, plane, out=output)
    if not _window_may_be_empty(geometry):
        output.relu_()
    if code is not None:
        code.masked_fill_(output <= 0, geometry.dropped)


def _window_may_be_empty(geometry: ConvPoolGeometry) -> bool:
    """Whether a window may lie wholly in the padding: its output is then -inf, as in stock, which relu must spare."""
    return max(geometry.pool_dilation) > 1 and max(geometry.pool_padding) > 0


def _planes(conv: Tensor, output: Tensor, geometry: ConvPoolGeometry) -> Iterator[Tensor]:
    """Give each window cell's values in scan order, -inf where a window overhangs; each is valid until the next."""
    if _window_may_be_empty(geometry):
        conv = conv.relu()
    top, bottom, left, right = _overhang(conv.shape[2:], output.shape[2:], geometry)
    if any((top, bottom, left, right)):
        least = -torch.inf if conv.is_floating_point() else torch.iinfo(conv.dtype).min
        conv = F.pad(conv, (left, right, top, bottom), value=least)
    first, *others = _window_views(conv, output.shape[2:], geometry)
    yield first
    plane = torch.empty_like(output)
    for view in others:
        # One strided read into a contiguous plane costs less than the two that the passes over it would make.
        yield plane.copy_(view)


def _overhang(size: Sequence[int], pooled: Sequence[int], geometry: ConvPoolGeometry) -> tuple[int, int, int, int]:
    """Cells by which the windows reach beyond the convolution's output: top, bottom, left, right."""
    reach = [
        (pooled[i] - 1) * geometry.pool_stride[i] + (geometry.pool_size[i] - 1) * geometry.pool_dilation[i] + 1
        for i in (0, 1)
    ]
    top, left = geometry.pool_padding
    return top, max(0, reach[0] - size[0] - top), left, max(0, reach[1] - size[1] - left)


def _window_views(padded: Tensor, pooled: Sequence[int], geometry: ConvPoolGeometry) -> list[Tensor]:
    """One strided view of `padded` per window cell, in scan order, each of the pooled size."""
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.pool_stride, geometry.pool_dilation
    height, width = (pooled[0] - 1) * stride_h + 1, (pooled[1] - 1) * stride_w + 1
    return [
        padded[:, :, top : top + height : stride_h, left : left + width : stride_w]
        for top in range(0, geometry.pool_size[0] * dilation_h, dilation_h)
        for left in range(0, geometry.pool_size[1] * dilation_w, dilation_w)
    ]


def _chosen_gradients(grad_output: Tensor, code: Tensor, geometry: ConvPoolGeometry) -> Iterator[Tensor]:
    """Give, per window cell, the gradients of those pooled cells whose code names it, zero for the others."""
    if geometry.code_dtype == torch.uint8:
        # Codes up to 255 are exact in every floating type, in which comparisons vectorise.
        code = code.to(grad_output.dtype)
    mask = torch.empty_like(code)
    for cell in range(geometry.cells):
        # threshold_backward selects without arithmetic, so that an infinite gradient leaves no NaN behind.
        yield torch.ops.aten.threshold_backward(grad_output, torch.eq(code, cell, out=mask), 0)


def _max_unpool(chosen: Iterable[Tensor], input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Gradient at the convolution's resolution: each cell's chosen gradients where its plane was taken from."""
    size = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    pooled = geometry.pooled_size(size)
    top, bottom, left, right = _overhang(size, pooled, geometry)
    padded = torch.empty(
        (input.shape[0], weight.shape[0], size[0] + top + bottom, size[1] + left + right),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    ).zero_()
    disjoint = all(
        geometry.pool_stride[i] >= (geometry.pool_size[i] - 1) * geometry.pool_dilation[i] + 1 for i in (0, 1)
    )
    for view, grads in zip(_window_views(padded, pooled, geometry), chosen, strict=True):
        if disjoint:
            view.copy_(grads)
        else:
            view += grads
    return padded[:, :, top : top + size[0], left : left + size[1]]


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


def _phases_pay(weight: Tensor, geometry: ConvPoolGeometry) -> bool:
    """Whether to convolve once per window cell: one convolution with `cells` times the channels, strided as the pool.

    Its output is the window's planes, ready to be compared. Its kernel is larger by the window's reach, so it pays
    only where a convolution has too few output channels to fill the vector lanes.
    """
    larger = (weight.shape[2] + geometry.pool_size[0] - 1) * (weight.shape[3] + geometry.pool_size[1] - 1)
    unit = (geometry.stride, geometry.dilation, geometry.pool_dilation) == ((1, 1),) * 3
    return (
        weight.device.type == "cpu"
        and unit
        and geometry.groups == 1
        and not geometry.ceil_mode
        and geometry.pool_padding == (0, 0)
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


def _fold_phases(grad_phases: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Sum the gradients of the shifted kernels where each has the kernel's own entries."""
    (out_channels, _, height, width), (rows, columns) = weight.shape, geometry.pool_size
    shifted = grad_phases.unflatten(0, (geometry.cells, out_channels))
    grad_weight = shifted[0, ..., :height, :width].clone(memory_format=torch.contiguous_format)
    for cell in range(1, rows * columns):
        row, column = divmod(cell, columns)
        grad_weight += shifted[cell, ..., row : row + height, column : column + width]
    return grad_weight


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
        grad_input = grad.sum_to_size(input_size)
        grad_input = grad_input.clone() if beta == 1 else grad_input * beta
    scaled = grad if alpha == 1 else grad * alpha
    if need_mat1:
        grad_mat1 = torch.mm(scaled, mat2.t())
    if need_mat2:
        # The gradient has mat2's own layout, so that a transposed nn.Linear weight gets a contiguous gradient.
        grad_mat2 = torch.mm(scaled.t(), mat1).t() if column_major(mat2) else torch.mm(mat1.t(), scaled)
    return grad_input, grad_mat1, grad_mat2


def column_major(matrix: Tensor) -> bool:
    """Whether `matrix` is laid out as the transpose of a contiguous one."""
    return matrix.t().is_contiguous() and not matrix.is_contiguous()
