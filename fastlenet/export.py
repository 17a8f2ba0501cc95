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

from fastlenet.ops import ADDMM_RELU, CHAIN, CONV2D_RELU_MAX_POOL2D
from fastlenet.ops.registration import decomposition, operators
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
    found: dict[OpOverload, Callable[..., Any]] = {}
    for operator in (CONV2D_RELU_MAX_POOL2D, ADDMM_RELU, CHAIN):
        for name, registered in operator.registered().items():
            found[getattr(operators, name).default] = decomposition(operator, registered)
    return found
