"""`explain`: a model's sites, the implementation of each, and the reason."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet import timing
from fastlenet.fusion import copies
from fastlenet.fusion.backend import Backend, Record
from fastlenet.fusion.fuse import MODES, Fused, arguments, first_line, handle_of, undisturbed, unusable, word
from fastlenet.fusion.patterns import CHAIN, CONV, Call, describe, implementation
from fastlenet.kernels.geometry import LINEAR_RELU as LINEAR
from fastlenet.lenet import LAYERS, LeNet, chain_of
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU, prepared

__all__ = ["Explanation", "Site", "explain"]

_WIDTH = 80
"""Width of a table in characters, unless names are longer."""

UNKNOWN = (
    "nothing is known of this model's sites yet: give explain an example input, or fuse the model and call it once"
)
UNCALLED = "nothing is known of the fused model's sites yet: call it once, or give explain an example input"
NO_SITES = "nothing to fuse: no convolution is followed by relu and a max-pool, and no linear layer by relu"
COMPILED = "torch.compile compiles this model; with backend='fastlenet' it fuses the sites that fuse would take over"


@dataclass(frozen=True)
class Site:
    """One place in a model where a fused operator runs or could run.

    Attributes:
        name: the layer's path, or the paths and names of the operators that stand together.
        operator: a function of `fastlenet.functional`, such as ``"conv2d_relu_max_pool2d"``.
        mode: ``"training"`` or ``"inference"``; empty where both are alike.
        input: shape and dtype, ``"?"`` where unknown.
        output: likewise.
        implementation: ``"triton"``, ``"cpu"`` or ``"aten"``; ``"stock"`` if the operators are left as they are;
            ``"none"`` if a forced backend would raise.
        stock: measured time of the stock operators, empty where not measured.
        fused: measured time of the fused operator.
        reason: why this implementation.
    """

    name: str
    operator: str
    mode: str
    input: str
    output: str
    implementation: str
    stock: str
    fused: str
    reason: str

    @property
    def heading(self) -> str:
        """Its place in the model, its operator, and its shapes if they are known."""
        where = f"{self.name}: {self.operator}"
        if self.input == "?":
            return where
        (shape, _, dtype), (*_, result) = self.input.rpartition(" "), self.output.rpartition(" ")
        return f"{where}, {shape if dtype == result else self.input} -> {self.output}"


@dataclass(frozen=True)
class Explanation:
    """A model's operator sites, and notes about the whole model. It prints as a table.

    Attributes:
        sites: each a `Site`, in the order of the model.
        notes: one sentence each.
    """

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        titles = {"mode": "mode", "implementation": "runs", "stock": "stock", "fused": "fused"}
        columns = {name: title for name, title in titles.items() if any(getattr(site, name) for site in self.sites)}
        rows = [[getattr(site, name) for name in columns] for site in self.sites]
        widths = [max(map(len, column)) for column in zip(columns.values(), *rows, strict=True)]

        def line(cells: Iterable[str], reason: str) -> str:
            start = "  ".join(["", *(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), ""])
            return textwrap.fill(reason, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))

        lines, heading = [line(columns.values(), "why")] if rows else [], ""
        for site, row in zip(self.sites, rows, strict=True):
            if site.heading != heading:
                heading = site.heading
                lines.append(textwrap.fill(heading, _WIDTH, subsequent_indent="    ", break_long_words=False))
            lines.append(line(row, site.reason))
        if all(site.implementation == "stock" for site in self.sites):
            lines.append("(no fused operators)")
        return "\n".join([*lines, *(textwrap.fill(note, _WIDTH, break_long_words=False) for note in self.notes)])

    __repr__ = __str__


def explain(model: nn.Module, example_input: Any = None) -> Explanation:
    """Tell which sites a model has, which implementation each takes, and why.

    Sites are the model's `ConvReLUMaxPool2d` and `LinearReLU` layers, and the places that `fuse` has fused or would
    fuse. After `fuse` with an example, measured times are included.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of the forward's positional arguments. With it a copy of the model runs on
            it, in the model's present mode; the model does not change. Without it `explain` knows the model's fastlenet
            layers, and the sites of a fused model that has been called or was fused with an example.

    Returns:
        An object with the sites in order, which prints as a table.

    Examples:
        >>> import torch, fastlenet
        >>> with fastlenet.use_backend("aten"):
        ...     print(fastlenet.explain(fastlenet.LeNet()))
          runs  why
        conv1: conv2d_relu_max_pool2d
          aten  backend 'aten' is forced
        conv2: conv2d_relu_max_pool2d
          aten  backend 'aten' is forced
        fc1: linear_relu
          aten  backend 'aten' is forced
        fc2: linear_relu
          aten  backend 'aten' is forced
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain(): argument 'model' must be a torch.nn.Module, but got {type(model).__name__}")
    notes = []
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
        notes.append(COMPILED)
    layers = {
        name or "(model)": layer
        for name, layer in model.named_modules()
        if isinstance(layer, (ConvReLUMaxPool2d, LinearReLU))
    }
    example = None if example_input is None else arguments(example_input)
    seen = _observe(model, layers, example) if layers and example is not None else {}
    sites = [_site_of_layer(name, layer, seen.get(name)) for name, layer in layers.items()]
    sites = _with_networks(sites, model, seen)
    handle, reason = handle_of(model), unusable(model)
    records: list[Record] = []
    if handle is not None:
        notes += handle.notes
        records = list(handle.backend.records.values())
        notes += [f"in {mode} the model runs as it is: {why}" for mode, why in handle.refused.items()]
        notes += filter(None, [handle.limit()])
    if reason is not None:
        if not layers:
            notes.append(f"cannot be fused: {reason}")
    elif example is not None:
        fresh, remark = _traced(model, handle, example)
        known = {record.key for record in fresh}
        modes = {record.mode for record in fresh}
        # Sites that were captured earlier in the other mode stay in the table.
        records = [record for record in records if record.mode not in modes and record.key not in known] + fresh
        notes += remark
    elif handle is None and not layers:
        notes.append(UNKNOWN)
    elif handle is not None and not records and not notes:
        notes.append(NO_SITES if handle.backend.called else UNCALLED)
    if example is not None and not records and not layers and not notes:
        notes.append(NO_SITES)
    rows = [_site(record, handle is not None) for record in records]
    if any(row.stock for row in rows):
        notes.append(timing.RULE)
    return Explanation((*sites, *_merged(rows)), tuple(dict.fromkeys(notes)))


def _merged(rows: list[Site]) -> list[Site]:
    """List sites that are alike in both modes once, with the rows of a site together."""
    alike: dict[Site, str] = {}
    for row in rows:
        key = replace(row, mode="")
        alike[key] = "" if key in alike else row.mode
    order = {name: number for number, name in enumerate(dict.fromkeys(row.name for row in rows))}
    one_mode = len({row.mode for row in rows}) == 1
    found = [replace(row, mode="" if one_mode else mode) for row, mode in alike.items()]
    return sorted(found, key=lambda row: (order[row.name], MODES.index(row.mode) if row.mode else 0))


def _traced(model: nn.Module, handle: Fused | None, example: tuple[Any, ...]) -> tuple[list[Record], list[str]]:
    """Run a copy of the model through the backend once, in its present mode."""
    trial = copies.apart(model)
    known = {} if handle is None else handle.backend.decisions
    compiler = Backend(None, handle is not None and handle.backend.measure, known, faithful=True)
    fused = Fused(trial, compiler).install()
    mode = MODES[0 if model.training else 1]
    with undisturbed(example), torch.set_grad_enabled(model.training):
        try:
            trial(*example)
        except Exception as error:  # any error of the model
            return [], [f"in {word(mode)} mode the model cannot run the example: {first_line(error)}"]
    found = list(compiler.records.values())
    if handle is not None and mode not in handle.modes:
        kept = handle.backend.records
        found = [
            replace(record, fused=False, reason=kept[record.key].reason if record.key in kept else "not fused")
            for record in found
        ]
    notes = [f"cannot be fused: {why}" for why in fused.refused.values()]
    return found, notes


def _site(record: Record, fused: bool) -> Site:
    runs, reason = "stock", record.reason
    if record.fused and not fused:
        reason = "fastlenet.fuse can take it over"
    elif record.fused:
        assert record.call is not None
        runs, why = implementation(record.call)
        reason = f"{record.reason or 'not measured'}; {why}"
    stock, fast = ("", "") if record.times is None else map(timing.readable, (record.times.stock, record.times.fused))
    return Site(record.name, record.operator, record.mode, record.input, record.output, runs, stock, fast, reason)


def _observe(
    model: nn.Module, layers: Mapping[str, nn.Module], example: tuple[Any, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a copy of the model and return the first input and output of each layer, as empty tensors."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    trial = copies.apart(model)

    def remember(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The output has the dtype that the operator ran in, also under autocast. Empty tensors keep nothing alive.
        seen.setdefault(name, (torch.empty_like(args[0], dtype=output.dtype), torch.empty_like(output)))

    for name in layers:
        layer = trial.get_submodule("" if name == "(model)" else name)
        layer.register_forward_hook(functools.partial(remember, name))
    with undisturbed(example), torch.no_grad():
        trial(*arguments(example))
    return seen


def _with_networks(sites: list[Site], model: nn.Module, seen: Mapping[str, tuple[Tensor, Tensor]]) -> list[Site]:
    """Put one site for all layers of each `LeNet` that runs as a chain."""
    for name, network in model.named_modules():
        path = f"{name}." if name else ""
        first = seen.get(f"{path}{LAYERS[0]}")
        chain = chain_of(*map(network._modules.get, LAYERS)) if isinstance(network, LeNet) else None
        if first is None or chain is None:
            continue
        parameters, links = chain
        tensors = first[0], *parameters
        operands = (None if t is None else (tuple(t.shape), first[0].dtype, t.device) for t in tensors)
        runs, reason = implementation(Call(CHAIN, links, tuple(operands), False))
        if runs in ("aten", "none"):
            continue
        own = {f"{path}{layer}" for layer in LAYERS}
        place = next(i for i, site in enumerate(sites) if site.name in own)
        output = first[0].new_empty(len(first[0]), network.fc3.out_features, device="meta")
        title = " > ".join(f"{path}{layer}" for layer in LAYERS)
        site = Site(title, CHAIN, "", describe(first[0]), describe(output), runs, "", "", reason)
        sites = [site for site in sites if site.name not in own]
        sites.insert(place, site)
    return sites


def _site_of_layer(name: str, layer: ConvReLUMaxPool2d | LinearReLU, seen: tuple[Tensor, Tensor] | None) -> Site:
    convolves = isinstance(layer, ConvReLUMaxPool2d)
    operator, settings = (CONV, prepared(layer)) if convolves else (LINEAR, None)
    tensors: tuple[Tensor | None, ...] = (layer.weight,)  # Without an image, dtype and device decide.
    if seen is not None or not convolves:
        # The number of rows of a linear map does not matter.
        first = layer.weight.new_empty(1, layer.weight.shape[1]) if seen is None else seen[0]
        tensors = first, layer.weight, layer.bias
    dtype = (layer.weight if seen is None else seen[0]).dtype
    operands = (None if tensor is None else (tuple(tensor.shape), dtype, tensor.device) for tensor in tensors)
    runs, reason = implementation(Call(operator, settings, tuple(operands), False))
    input, output = ("?", "?") if seen is None else map(describe, seen)
    return Site(name, operator, "", input, output, runs, "", "", reason)
