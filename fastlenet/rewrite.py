"""Looking at whole models: which operators they hold and what runs for each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet.backend import why_aten
from fastlenet.checks import pair
from fastlenet.functional import IntOrPair
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU

__all__ = ["Explanation", "Site", "explain"]


@dataclass(frozen=True)
class Site:
    """One place in a model where a fused operator runs."""

    name: str
    operator: str
    input: str
    output: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A model's operator sites; prints as a table."""

    sites: tuple[Site, ...]

    def __str__(self) -> str:
        names = [field.name for field in fields(Site)]
        rows = [names, *([getattr(site, name) for name in names] for site in self.sites)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self.sites:
            lines.append("(no fused operators)")
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module, example_input: Tensor | None = None) -> Explanation:
    """Tell which implementation each fused operator of a model takes, and why.

    Args:
        model: any module; its `ConvReLUMaxPool2d` and `LinearReLU` layers are the sites.
        example_input: if given, the model is run on it once, without gradients, to learn shapes and to decide by the
            tensors that really arrive; a module that is called more than once shows its first call.

    Returns:
        The sites in order; printing it gives a table. A site's implementation is ``"triton"``, ``"aten"``, or
        ``"none"`` where a forced backend would raise, with the error as its reason.

    Example:
        >>> import torch, fastlenet
        >>> with fastlenet.use_backend("aten"):
        ...     print(fastlenet.explain(fastlenet.LeNet()))
        name   operator                input  output  implementation  reason
        conv1  conv2d_relu_max_pool2d  ?      ?       aten            backend 'aten' is forced
        conv2  conv2d_relu_max_pool2d  ?      ?       aten            backend 'aten' is forced
        fc1    linear_relu             ?      ?       aten            backend 'aten' is forced
        fc2    linear_relu             ?      ?       aten            backend 'aten' is forced
    """
    layers = {
        name or "(model)": layer
        for name, layer in model.named_modules()
        if isinstance(layer, (ConvReLUMaxPool2d, LinearReLU))
    }
    seen = {} if example_input is None else _observe(model, layers, example_input)
    return Explanation(tuple(_site(name, layer, seen.get(name)) for name, layer in layers.items()))


def _observe(model: nn.Module, layers: dict[str, Any], example_input: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model once and return the first input and output of each layer, as empty tensors on the same device."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # The output has the dtype that the operator ran in, under autocast too; nothing is kept alive.
            seen.setdefault(name, (torch.empty_like(args[0], dtype=output.dtype), torch.empty_like(output)))

        return hook

    handles = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _site(name: str, layer: ConvReLUMaxPool2d | LinearReLU, seen: tuple[Tensor, Tensor] | None) -> Site:
    operand = layer.weight if seen is None else seen[0]
    try:
        reason = why_aten(operand, _cells(layer.pool_size) if isinstance(layer, ConvReLUMaxPool2d) else 1)
        implementation = "triton" if reason is None else "aten"
    except (RuntimeError, NotImplementedError) as error:
        implementation, reason = "none", str(error)
    return Site(
        name,
        "conv2d_relu_max_pool2d" if isinstance(layer, ConvReLUMaxPool2d) else "linear_relu",
        "?" if seen is None else _shape(seen[0]),
        "?" if seen is None else _shape(seen[1]),
        implementation,
        reason or "a Triton kernel covers it",
    )


def _cells(pool_size: IntOrPair) -> int:
    height, width = pair("explain", "pool_size", pool_size)
    return height * width


def _shape(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
