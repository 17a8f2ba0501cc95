"""The operators in plain ATen: what runs on CPU tensors, in float64, and wherever no Triton kernel covers a call.

Each function computes what the Triton launcher of the same name in `fastlenet.kernels` computes, from the same
arguments and with the same saved tensors, so that the backward of one may follow the forward of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_code: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax codes (see `ConvPoolGeometry.code_dtype`).

    Replaces max_pool2d's int64 indices by a running maximum over strided views of the convolution, one per window
    cell, with a one-byte code; relu is monotonic, so it acts on the pooled cells alone.
    """
    conv = F.conv2d(input, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    if max(geometry.pool_dilation) > 1 and max(geometry.pool_padding) > 0:
        # A window may then hold no cell at all. It stays at -inf, as in stock, which relu must not close.
        return _max_pool(conv.relu_(), geometry, return_code)
    output, code = _max_pool(conv, geometry, return_code)
    output = output.relu_()
    if code is not None:
        code = code.masked_fill_(output <= 0, geometry.dropped)
    return output, code


def _max_pool(conv: Tensor, geometry: ConvPoolGeometry, return_code: bool) -> tuple[Tensor, Tensor | None]:
    layout = memory_format(conv)
    pooled = geometry.pooled_size((conv.shape[2], conv.shape[3]))
    views = _window_views(_with_overhang(conv, pooled, geometry), pooled, geometry)
    output = views[0].clone(memory_format=layout)
    if not return_code:
        for view in views[1:]:
            torch.maximum(output, view, out=output)
        return output, None
    code = torch.zeros_like(output, dtype=geometry.code_dtype)
    for cell, view in enumerate(views[1:], start=1):
        # Stock's rule: a later cell wins only where it is greater, or NaN.
        code.masked_fill_((view > output).logical_or_(view != view), cell)
        torch.maximum(output, view, out=output)
    return output, code.masked_fill_(output <= 0, geometry.dropped)


def _overhang(length: int, pooled: int, i: int, geometry: ConvPoolGeometry) -> tuple[int, int]:
    """Cells that the windows reach before and behind the convolution's output, along dimension `i`."""
    reach = (pooled - 1) * geometry.pool_stride[i] + (geometry.pool_size[i] - 1) * geometry.pool_dilation[i] + 1
    return geometry.pool_padding[i], max(0, reach - length - geometry.pool_padding[i])


def _with_overhang(conv: Tensor, pooled: tuple[int, int], geometry: ConvPoolGeometry) -> Tensor:
    """Surround `conv` with cells that never win, wherever a window reaches beyond it."""
    (top, bottom), (left, right) = (_overhang(conv.shape[2 + i], pooled[i], i, geometry) for i in (0, 1))
    if not any((top, bottom, left, right)):
        return conv
    least = -torch.inf if conv.is_floating_point() else torch.iinfo(conv.dtype).min
    return F.pad(conv, (left, right, top, bottom), value=least)


def _window_views(padded: Tensor, pooled: tuple[int, int], geometry: ConvPoolGeometry) -> list[Tensor]:
    """One strided view of `padded` per window cell, in scan order, each of the pooled size."""
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.pool_stride, geometry.pool_dilation
    height, width = (pooled[0] - 1) * stride_h + 1, (pooled[1] - 1) * stride_w + 1
    return [
        padded[:, :, top : top + height : stride_h, left : left + width : stride_w]
        for top in range(0, geometry.pool_size[0] * dilation_h, dilation_h)
        for left in range(0, geometry.pool_size[1] * dilation_w, dilation_w)
    ]


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
    grad_conv = _max_unpool(grad_output, input, weight, code, geometry)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_conv,
        input,
        weight,
        [weight.shape[0]],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        [need_input, need_weight, need_bias],
    )
    return grad_input, grad_weight, grad_bias


def _max_unpool(grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Gradient at the convolution's resolution: each pooled gradient at the cell that its code names, zero elsewhere.

    Replaces max_pool2d's backward, a zero fill and a scatter by int64 index, and relu's backward by one masked write
    per window cell.
    """
    conv_size = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    pooled = (code.shape[2], code.shape[3])
    (top, bottom), (left, right) = (_overhang(conv_size[i], pooled[i], i, geometry) for i in (0, 1))
    padded = grad_output.new_zeros(
        (*code.shape[:2], conv_size[0] + top + bottom, conv_size[1] + left + right)
    ).contiguous(memory_format=memory_format(input, weight))
    zero = grad_output.new_zeros(())
    disjoint = all(
        geometry.pool_stride[i] >= (geometry.pool_size[i] - 1) * geometry.pool_dilation[i] + 1 for i in (0, 1)
    )
    for cell, view in enumerate(_window_views(padded, pooled, geometry)):
        if disjoint:
            torch.where(code == cell, grad_output, zero, out=view)
        else:
            view += torch.where(code == cell, grad_output, zero)
    return padded[:, :, top : top + conv_size[0], left : left + conv_size[1]]


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
