"""Chains of operators: the kernels of their links, launched one after the other.

A chain is a row of convolutions with relu and max-pool, then of linear maps with relu, then perhaps one linear map
without relu; see `geometry.Links`. The kernels of `mlp` compute three linear maps at the end, if these are small enough
(`geometry.head_of`). `addmm_relu` or a library, as the caller says, computes other linear maps with relu. A library
computes a linear map without relu.

The weights' gradients are the exception from "one after the other": no other gradient waits for them, so they are
noted and launched together at the end of the backward (`joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import addmm_relu as linear
from . import conv2d_relu_max_pool2d as conv
from . import mlp as head
from .geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry, Links, head_of
from .joint import Later
from .plans import Kind, Kinds
from .runtime import by_library

Saved = tuple[Tensor, ...]


def forward(library: bool) -> Callable[..., tuple[Tensor, Saved]]:
    """Make a launcher of one kind of chain.

    Args:
        library: whether a library multiplies the matrices of the linear maps, rather than kernels.

    Returns:
        A function of the batched input, weight and bias of each link, the links, and whether a backward follows. It
        returns the output and, for the backward, link by link a convolution's argmax, and the output of each link but
        the last.
    """
    kind = Kind(_forward)

    def call(input: Tensor, parameters: Sequence[Tensor | None], links: Links, save: bool) -> tuple[Tensor, Saved]:
        output, *saved = kind(input, *parameters, links, save, library)
        return output, tuple(saved)

    return call


def backward(library: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make a launcher of the gradients of one kind of chain; see `forward`.

    Returns:
        A function of the output's gradient, the output (None after a linear map without relu, where its sign is not
        needed), the forward's input and parameters, what it saved, the links, and which gradients to compute.
    """
    kinds = Kinds(_backward)

    def call(
        grad_output: Tensor,
        output: Tensor | None,
        input: Tensor,
        parameters: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        links: Links,
        output_mask: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        return kinds(grad_output, output, input, *parameters, *saved, links, output_mask, library)

    return call


def _forward(input: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    *parameters, links, save, library = args
    saved: list[Tensor] = []
    first = head_of(links, parameters)
    for index, link in enumerate(links[:first]):
        weight, bias = parameters[2 * index : 2 * index + 2]
        if isinstance(link, ConvPoolGeometry):
            input, argmax = conv.conv2d_relu_max_pool2d(input, weight, bias, link, save)
            saved.append(argmax)
        else:
            input = _linear(input, weight, bias, link, library)
        saved.append(input)
    if first == len(links):
        return saved.pop(), *(saved if save else ())
    operands = parameters[2 * first :]
    if library:
        hidden1 = _linear(input, *operands[:2], LINEAR_RELU, True)
        hidden2 = _linear(hidden1, *operands[2:4], LINEAR_RELU, True)
        output = _linear(hidden2, *operands[4:], LINEAR, True)
    else:
        output, hidden1, hidden2 = head.mlp(_rows(input), *operands, save)
    return output, *((*saved, hidden1, hidden2) if save else ())


def _rows(input: Tensor) -> Tensor:
    """Make each sample a row: a view, where a sample is laid out plainly."""
    return input if input.dim() == 2 else input.flatten(1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, link: str, library: bool) -> Tensor:
    if link == LINEAR_RELU and not library:
        return linear.addmm_relu(bias, _rows(input), weight.t(), 1, 1)
    return by_library(_stock_linear_relu if link == LINEAR_RELU else _stock_linear, input, weight, *_given(bias))


def _given(bias: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias is None else (bias,)


def _stock_linear(input: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return F.linear(_rows(input), weight, *bias)


def _stock_linear_relu(input: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return F.linear(_rows(input), weight, *bias).relu_()


def _backward(grad_output: Tensor, output: Tensor | None, input: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    *tensors, links, mask, library = args
    count = 2 * len(links)
    parameters, saved = tensors[:count], tensors[count:]
    outputs, argmaxes = [], []
    waiting = iter((*saved, output))
    for link in links:
        argmaxes.append(next(waiting) if isinstance(link, ConvPoolGeometry) else None)
        outputs.append(next(waiting))
    before = [input, *outputs]
    grads: list[Tensor | None] = [None] * len(mask)
    later = Later()  # the links' weight gradients that can be launched together, and all partial sums
    grad: Tensor | None = grad_output
    first = head_of(links, parameters)
    if first < len(links):
        weights = parameters[2 * first :: 2]
        needs = any(mask[: 2 * first + 1]), *mask[2 * first + 1 :]
        grad, *grads[2 * first + 1 :] = head.mlp_backward(
            grad_output, _rows(before[first]), outputs[first], outputs[first + 1], *weights, needs, later
        )
    for index in reversed(range(first)):
        if grad is None:
            break
        link, weight, argmax = links[index], parameters[2 * index], argmaxes[index]
        needs = any(mask[: 2 * index + 1]), *mask[2 * index + 1 : 2 * index + 3]
        if isinstance(link, ConvPoolGeometry):
            grad = grad if grad.dim() == 4 else grad.view(argmax.shape)
            found = conv.conv2d_relu_max_pool2d_backward(grad, before[index], weight, argmax, link, needs, later)
        else:
            found = _linear_backward(grad, outputs[index], before[index], weight, link, needs, library, later)
        grad, *grads[2 * index + 1 : 2 * index + 3] = found
    later.finish()
    grads[0] = grad if mask[0] else None
    return tuple(grads)


def _linear_backward(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    link: str,
    needs: tuple[bool, ...],
    library: bool,
    later: Later,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the input's rows, the weight and the bias."""
    need_rows, need_weight, need_bias = needs
    if link == LINEAR_RELU and not library:
        assert output is not None
        sizes = grad, output, _rows(input), weight.t(), (weight.shape[0],), 1, 1, (need_bias, need_rows, need_weight)
        grad_bias, grad_rows, grad_matrix = linear.addmm_relu_backward(*sizes, later.sums)
        return grad_rows, None if grad_matrix is None else grad_matrix.t(), grad_bias
    if link == LINEAR_RELU:
        grad = by_library(_masked, grad, output)
    return (
        by_library(torch.mm, grad, weight) if need_rows else None,
        by_library(_transposed_mm, grad, input) if need_weight else None,
        by_library(_column_sums, grad) if need_bias else None,
    )


def _masked(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _transposed_mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.t(), _rows(right))


def _column_sums(rows: Tensor) -> Tensor:
    return rows.sum(0)
