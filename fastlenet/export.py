"""The registered operators as plain ATen operators, for exported graphs that run without fastlenet.

An exported program names ``torch.ops.fastlenet.*``, so loading it needs fastlenet. A decomposed program needs PyTorch
only. Converted to ONNX it does not need PyTorch either:

>>> import torch, fastlenet
>>> layer = fastlenet.LinearReLU(3, 2).requires_grad_(False)
>>> program = torch.export.export(layer, (torch.randn(4, 3),)).run_decompositions(fastlenet.decompositions())
>>> any("fastlenet" in str(node.target) for node in program.graph.nodes)
False
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlenet import reference
from fastlenet.ops.chain import links_of
from fastlenet.ops.conv2d_relu_max_pool2d import geometry_of
from fastlenet.ops.registration import operators, or_empty
from fastlenet.private import OpOverload

__all__ = ["decompositions"]


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the decompositions of fastlenet's operators, forward and backward, into plain ATen operators.

    The table is for ``torch.export.ExportedProgram.run_decompositions`` and ``make_fx(..., decomposition_table=...)``.
    It leaves every other operator as it is. To decompose those too, add it to PyTorch's table:
    ``table = torch.export.default_decompositions(); table.update(fastlenet.decompositions())``.

    The decomposed graph computes what stock PyTorch computes, argmax and gradients included, with stock's speed and
    memory. Shapes may be symbolic.

    Returns:
        A new dict from operator to function.

    Examples:
        >>> import fastlenet
        >>> len(fastlenet.decompositions())
        6
    """
    names = operators
    return {
        names.conv2d_relu_max_pool2d.default: _conv2d_relu_max_pool2d,
        names.conv2d_relu_max_pool2d_backward.default: _conv2d_relu_max_pool2d_backward,
        names.addmm_relu.default: reference.addmm_relu,
        names.addmm_relu_backward.default: _addmm_relu_backward,
        names.chain.default: _chain,
        names.chain_backward.default: _chain_backward,
    }


def _conv2d_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *fields, return_argmax = args
    geometry = geometry_of(fields)
    if return_argmax:
        return reference.conv2d_relu_max_pool2d_with_argmax(input, weight, bias, geometry)
    output = reference.conv2d_relu_max_pool2d(input, weight, bias, geometry)
    return output, output.new_empty(0, dtype=geometry.argmax_dtype)


def _conv2d_relu_max_pool2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *fields, output_mask = args
    grads = reference.conv2d_relu_max_pool2d_backward(
        grad_output, input, weight, argmax, geometry_of(fields), tuple(output_mask)
    )
    return or_empty(input, grads)


def _addmm_relu_backward(
    grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return or_empty(mat1, reference.addmm_relu_backward(grad_output, output, mat1, mat2, *args))


def _chain(input: Tensor, parameters: Any, spec: str, save: bool) -> tuple[Tensor, list[Tensor]]:
    if save:
        return reference.chain_with_saved(input, parameters, links_of(spec))
    return reference.chain(input, parameters, links_of(spec)), []


def _chain_backward(
    grad_output: Tensor, output: Tensor, input: Tensor, parameters: Any, saved: Any, spec: str, output_mask: Any
) -> list[Tensor]:
    args = grad_output, output, input, parameters, saved, links_of(spec), tuple(output_mask)
    return list(or_empty(input, reference.chain_backward(*args)))
