"""Every operator as a composition of stock PyTorch operators: the implementation "aten".

A composition is differentiable to any order, works under `torch.func`, and can be exported. It runs if no kernel takes
a call, and if derivatives beyond the first may be needed. Its output is never a view, and may be modified in place if
stock's may.

The functions with saved tensors compute in plain operators the results of the kernels, argmax included. Compiled graphs
fall back on them, and exported graphs are decomposed into them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry, Links, memory_format
from fastlenet.private import unfold_and_multiply

Grads = tuple[Tensor | None, ...]


def requested(grads: Sequence[Tensor | None], output_mask: Sequence[bool]) -> Grads:
    """Replace gradients that were not asked for by None, because some stock operators return them nevertheless."""
    return tuple(grad if needed else None for grad, needed in zip(grads, output_mask, strict=True))


# --- conv2d + relu + max-pool ---------------------------------------------------------------------------------------


FEW_IMAGES, FEW_PRODUCTS, SHORT_SUM = 8, 1 << 21, 160
"""Images, multiply-adds, and products of a sum, up to which a convolution on a CPU is faster as matrix products.

LeNet's convolutions of one image take a third of oneDNN's time so, of four images two thirds. Up to that many products
the largest error was 0.8 to 1.6 of oneDNN's in the output, and 0.1 to 1 of it in the gradients.
"""


@functools.lru_cache(maxsize=512)
def _faster_by_product(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    weight_strides: tuple[int, ...],
    geometry: ConvPoolGeometry,
) -> bool:
    """Whether a convolution is few matrix products, faster so, and both operands have the plain layout."""
    if len(shape) != 4 or not 0 < shape[0] <= FEW_IMAGES or geometry.groups != 1 or geometry.dilation != (1, 1):
        return False
    for sizes, steps in ((shape, strides), (weight_shape, weight_strides)):
        tensor = torch.empty_strided(sizes, steps, device="meta")
        # A kernel of one pixel is in both layouts.
        if not tensor.is_contiguous() or memory_format(tensor) == torch.channels_last:
            return False
    filters, *terms = weight_shape
    rows, columns = geometry.conv_size((shape[2], shape[3]), (terms[1], terms[2]))
    depth = math.prod(terms)
    return 0 < depth <= SHORT_SUM and 0 < shape[0] * filters * depth * rows * columns <= FEW_PRODUCTS


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, quick: bool = False
) -> Tensor:
    """Return the pooled output for a batched or an unbatched input.

    With `quick`, for plain tensors on a CPU, the convolution may be matrix products if that is faster. Then relu also
    comes first, in place, where no gradient is asked for: that takes up to a fifth less time.

    Else relu comes after the pool, where there are fewer values. Results and gradients are the same: no gradient passes
    if the largest cell is not above 0. relu is a threshold here, which saves its input and not its output, so the
    output may be modified in place, as that of max_pool2d.
    """
    if (
        quick
        and weight.dtype == torch.float32
        and _faster_by_product(input.shape, input.stride(), weight.shape, weight.stride(), geometry)
    ):
        conv = unfold_and_multiply(input, weight, weight.shape[2:], bias, geometry.stride, geometry.padding)
    else:
        conv = torch.conv2d(input, weight, bias, *geometry[:4])
    if geometry.window_may_be_empty:  # stock's output is -inf there, and relu must not change it
        return _pool_with_empty_windows(F.relu(conv), geometry)
    if quick and not conv.requires_grad:
        return torch.max_pool2d(conv.relu_(), *geometry[4:])
    return torch.threshold(torch.max_pool2d(conv, *geometry[4:]), 0, 0)


def _pool_with_empty_windows(conv: Tensor, geometry: ConvPoolGeometry) -> Tensor:
    """Return what ``max_pool2d`` does; if windows lie wholly in its padding, with a frame of -inf instead.

    Stock's index of such a window is not in the image, and its backward writes there (torch 2.13).
    """
    conv_size = conv.shape[-2], conv.shape[-1]
    if all(geometry.pool_dilation[i] <= conv_size[i] or not geometry.pool_padding[i] for i in (0, 1)):
        return F.max_pool2d(conv, *geometry[4:])
    pooled, frame = geometry.pooled_size(conv_size), []
    for i in (1, 0):
        reach = geometry.pool_dilation[i] * (geometry.pool_size[i] - 1) + 1
        end = (pooled[i] - 1) * geometry.pool_stride[i] + reach - geometry.pool_padding[i]
        frame += [geometry.pool_padding[i], max(end - conv_size[i], 0)]
    framed = F.pad(conv, frame, value=-math.inf)
    return F.max_pool2d(framed, geometry.pool_size, geometry.pool_stride, 0, geometry.pool_dilation)


def conv2d_relu_max_pool2d_with_argmax(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry
) -> tuple[Tensor, Tensor]:
    """Return the pooled output for a batched input, and its argmax (see `ConvPoolGeometry.argmax_dtype`)."""
    conv = torch.conv2d(input, weight, bias, *geometry[:4])
    if geometry.window_may_be_empty:
        conv = torch.relu(conv)
    output, index = torch.ops.aten.max_pool2d_with_indices(conv, *geometry[4:])
    output = output if geometry.window_may_be_empty else torch.relu(output)
    return output, _argmax(output, index, conv.shape[3], geometry)


def _argmax(output: Tensor, index: Tensor, width: Any, geometry: ConvPoolGeometry) -> Tensor:
    """Convert stock's flat positions in a convolution's output of this width to cells of the windows."""
    rows, columns = (
        torch.arange(output.shape[2 + i], device=output.device) * geometry.pool_stride[i] - geometry.pool_padding[i]
        for i in (0, 1)
    )
    down = torch.div(index, width, rounding_mode="floor") - rows[:, None]
    right = index % width - columns
    row, column = (
        torch.div(offset, dilation, rounding_mode="floor")
        for offset, dilation in zip((down, right), geometry.pool_dilation, strict=True)
    )
    cell = row * geometry.pool_size[1] + column
    return torch.where(output <= 0, geometry.no_winner, cell).to(geometry.argmax_dtype)


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` asks for none; differentiable."""
    conv_size = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    # A strided 1x1 kernel in channels_last makes stock's weight gradient write beyond its memory (torch 2.13).
    pointwise = weight.shape[2] == 1 and weight.shape[3] == 1 and max(geometry.stride) > 1
    grads = torch.ops.aten.convolution_backward(
        _scattered(grad_output, argmax, conv_size, geometry),
        input.contiguous() if pointwise else input,
        weight.contiguous() if pointwise else weight,
        [weight.shape[0]],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        output_mask,
    )
    return requested(grads, output_mask)


def _scattered(grad_output: Tensor, argmax: Tensor, conv_size: Sequence[int], geometry: ConvPoolGeometry) -> Tensor:
    """The gradient of the convolution's output: each pooled gradient is added to the cell that its argmax names."""
    kept = argmax != geometry.no_winner
    cell = torch.where(kept, argmax, 0).long()
    rows, columns = (torch.arange(argmax.shape[2 + i], device=argmax.device) * geometry.pool_stride[i] for i in (0, 1))
    row = rows[:, None] - geometry.pool_padding[0] + cell // geometry.pool_size[1] * geometry.pool_dilation[0]
    column = columns - geometry.pool_padding[1] + cell % geometry.pool_size[1] * geometry.pool_dilation[1]
    index = torch.where(kept, row * conv_size[1] + column, 0).flatten(2)
    zeros = grad_output.new_zeros(*argmax.shape[:2], conv_size[0] * conv_size[1])
    passing = torch.where(kept, grad_output, 0.0).reshape(index.shape)
    return zeros.scatter_add(2, index, passing).view(*argmax.shape[:2], *conv_size)


# --- BatchNorm with the batch's own statistics + relu + max-pool ----------------------------------------------------


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    geometry: ConvPoolGeometry,
) -> Tensor:
    """Return the pooled output; the running statistics are updated in place."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.max_pool2d(F.relu(output), *geometry[4:])


def batch_norm_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    argmax: Tensor,
    mean: Tensor,
    inverse: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` asks for none; differentiable.

    `mean` and `inverse` are the batch's, the latter of the standard deviation.
    """
    grad = _scattered(grad_output, argmax, input.shape[2:], geometry)
    # eps is in the inverse already.
    grads = torch.ops.aten.native_batch_norm_backward(
        grad, input, weight, None, None, mean, inverse, True, 0.0, output_mask
    )
    return requested(grads, output_mask)


# --- linear maps with relu ------------------------------------------------------------------------------------------


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return relu(input @ weight^T + bias), for any leading dimensions."""
    return torch.relu(F.linear(input, weight, bias))


def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """Return relu(beta * input + alpha * (mat1 @ mat2)); without `input`, relu(alpha * (mat1 @ mat2))."""
    if input is None:
        product = torch.mm(mat1, mat2)
        return torch.relu(product if alpha == 1 else product * alpha)
    return torch.relu(torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha))


def addmm_relu_backward(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Sequence[int],
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_mat1 and grad_mat2, None where `output_mask` asks for none; differentiable."""
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


def column_major(matrix: Tensor) -> bool:
    """Whether `matrix` is the transpose of a contiguous matrix."""
    return matrix.t().is_contiguous() and not matrix.is_contiguous()


# --- chains ---------------------------------------------------------------------------------------------------------


def chain(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: Links,
    convolve: Callable[..., Tensor] = conv2d_relu_max_pool2d,
    linear_relu: Callable[..., Tensor] = linear_relu,
) -> Tensor:
    """Return the output of the links, one after the other, for an input that is batched or not.

    Samples are flattened before the first linear link. `parameters` are weight and bias of each link.
    """
    convolved = False
    for index, link in enumerate(links):
        weight, bias = parameters[2 * index : 2 * index + 2]
        assert weight is not None
        if isinstance(link, ConvPoolGeometry):
            input, convolved = convolve(input, weight, bias, link), True
            continue
        if convolved:
            input, convolved = input.flatten(-3), False
        input = F.linear(input, weight, bias) if link == LINEAR else linear_relu(input, weight, bias)
    return input


def chain_with_saved(input: Tensor, parameters: Sequence[Tensor | None], links: Links) -> tuple[Tensor, list[Tensor]]:
    """Return the output and what `chain_backward` needs.

    That is, link by link, the argmax of a convolution, and the link's output unless it is the chain's.
    """
    saved: list[Tensor] = []

    def convolve(*args: Any) -> Tensor:
        output, argmax = conv2d_relu_max_pool2d_with_argmax(*args)
        saved.extend((argmax, output))
        return output

    def hidden(*args: Any) -> Tensor:
        saved.append(linear_relu(*args))
        return saved[-1]

    output = chain(input, parameters, links, convolve, hidden)
    return output, saved if links[-1] == LINEAR else saved[:-1]


def chain_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    links: Links,
    output_mask: Sequence[bool],
) -> Grads:
    """Return the gradients of the input and of every parameter, None where `output_mask` asks for none."""
    outputs, argmaxes = [], []
    waiting = iter((*saved, output))
    for link in links:
        argmaxes.append(next(waiting) if isinstance(link, ConvPoolGeometry) else None)
        outputs.append(next(waiting))
    grads: list[Tensor | None] = [None] * len(output_mask)
    for index in reversed(range(len(links))):
        link, weight, argmax = links[index], parameters[2 * index], argmaxes[index]
        assert weight is not None
        before = outputs[index - 1] if index else input
        mask = any(output_mask[: 2 * index + 1]), *output_mask[2 * index + 1 : 2 * index + 3]
        if isinstance(link, ConvPoolGeometry):
            assert argmax is not None
            grad_output = grad_output if grad_output.dim() == 4 else grad_output.unflatten(1, argmax.shape[1:])
            found = conv2d_relu_max_pool2d_backward(grad_output, before, weight, argmax, link, mask)
        else:
            rows = before if before.dim() == 2 else before.flatten(1)
            if link == LINEAR_RELU:
                grad_output = torch.ops.aten.threshold_backward(grad_output, outputs[index], 0)
            found = (
                torch.mm(grad_output, weight) if mask[0] else None,
                torch.mm(grad_output.t(), rows) if mask[1] else None,
                grad_output.sum(0) if mask[2] else None,
            )
        grads[2 * index + 1 : 2 * index + 3] = found[1:]
        if found[0] is None:
            break
        grad_output = found[0]
    if output_mask[0]:
        grads[0] = grad_output if grad_output.shape == input.shape else grad_output.view(input.shape)
    return tuple(grads)
