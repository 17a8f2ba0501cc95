"""The raw operators taken apart into plain ATen, for graphs that leave this library.

An exported program names ``torch.ops.fastlenet.*``, so whoever loads it needs fastlenet. Decomposed, it needs PyTorch
alone, or, through ONNX, not even that:

>>> import torch, fastlenet
>>> layer = fastlenet.LinearReLU(3, 2).requires_grad_(False)
>>> program = torch.export.export(layer, (torch.randn(4, 3),)).run_decompositions(fastlenet.decompositions())
>>> any("fastlenet" in str(node.target) for node in program.graph.nodes)
False
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlenet import aten, autograd, ops
from fastlenet.kernels.geometry import ConvPoolGeometry

__all__ = ["decompositions"]


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return the table that takes fastlenet's operators, forward and backward, apart into plain ATen.

    It is made for ``torch.export.ExportedProgram.run_decompositions``, and does for ``make_fx(...,
    decomposition_table=...)`` too. On its own it leaves every other operator as it is; to take those apart as well, add
    it to PyTorch's: ``table = torch.export.default_decompositions(); table.update(fastlenet.decompositions())``.

    The decomposed graph computes what stock PyTorch computes, argmax and gradients included, with stock's memory: it is
    for running elsewhere, not for speed. Shapes may be symbolic.

    Returns:
        A new dict from operator to function.

    Example:
        >>> import fastlenet
        >>> len(fastlenet.decompositions())
        6
    """
    names = ops.operators
    return {
        names.conv2d_relu_max_pool2d.default: _conv2d_relu_max_pool2d,
        names.conv2d_relu_max_pool2d_backward.default: _conv2d_relu_max_pool2d_backward,
        names.addmm_relu.default: _addmm_relu,
        names.addmm_relu_backward.default: _addmm_relu_backward,
        names.mlp.default: _mlp,
        names.mlp_backward.default: _mlp_backward,
    }


def _conv2d_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *fields, return_argmax = args
    geometry = ConvPoolGeometry(*fields)
    conv = torch.ops.aten.convolution(
        input, weight, bias, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], geometry.groups
    )
    output, index = torch.ops.aten.max_pool2d_with_indices(
        torch.relu(conv),
        geometry.pool_size,
        geometry.pool_stride,
        geometry.pool_padding,
        geometry.pool_dilation,
        geometry.ceil_mode,
    )
    if not return_argmax:
        return output, output.new_empty(0, dtype=geometry.argmax_dtype)
    return output, _argmax(output, index, conv.shape[3], geometry)


def _argmax(output: Tensor, index: Tensor, width: Any, geometry: ConvPoolGeometry) -> Tensor:
    """Turn stock's flat positions in a convolution's output of this width into argmax."""
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


def _conv2d_relu_max_pool2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *fields, output_mask = args
    grads = autograd._conv_grads(grad_output, input, weight, argmax, tuple(fields), tuple(output_mask))
    return ops._or_empty(input, *grads)


def _addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    if input is None:
        return torch.relu(torch.mm(mat1, mat2) * alpha)
    return torch.relu(torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha))


def _addmm_relu_backward(
    grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return ops._or_empty(mat1, *aten.addmm_relu_backward(grad_output, output, mat1, mat2, *args))


def _mlp(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight1, bias1, weight2, bias2, weight3, bias3, return_hidden = args
    hidden1 = _addmm_relu(bias1, input, weight1.t(), 1, 1)
    hidden2 = _addmm_relu(bias2, hidden1, weight2.t(), 1, 1)
    output = torch.addmm(bias3, hidden2, weight3.t())
    return ops._or_empty(input, output, *((hidden1, hidden2) if return_hidden else (None, None)))


def _mlp_backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ops._or_empty(input, *aten.mlp_backward(grad_output, input, *args))
