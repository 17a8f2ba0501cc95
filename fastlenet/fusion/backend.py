"""The backend for ``torch.compile``: it replaces sites in TorchDynamo's graphs by fused operators.

``torch.compile(model, backend="fastlenet")`` finds `compile_graph` by the package's entry point. The graph that it
returns runs eagerly, under autograd. With ``options={"inner": "inductor"}`` Inductor compiles it; to Inductor a fused
operator is one opaque call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fastlenet import private, timing
from fastlenet.fusion import patterns
from fastlenet.fusion.patterns import Call, Match
from fastlenet.ops import NAMESPACE

INNER = (None, "inductor")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """Facts of a site as plain data. `explain` shows them, and a copied model keeps them.

    Attributes:
        name: its place in the model.
        operator: the fused function.
        mode: ``"training"`` if gradients are recorded, else ``"inference"``.
        input: shape and dtype.
        output: likewise.
        call: the data that decides which implementation runs.
        fused: whether a fused operator computes it.
        reason: why, or why not.
        times: measured times.
    """

    name: str
    operator: str
    mode: str
    input: str
    output: str
    call: Call | None
    fused: bool
    reason: str
    times: timing.Comparison | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Its identity: when a graph is captured again, the new record replaces the one with the same key."""
        return self.name, self.operator, self.mode


class Backend:
    """A compiler of Dynamo's graphs that remembers sites and times.

    Args:
        inner: the next compiler, ``"inductor"``, or None to run the graph eagerly.
        measure: whether to keep only sites that are clearly faster fused, measured at their shapes.
        decisions: earlier measurements; sites in it are not measured again.
        faithful: whether to refuse a graph in which Dynamo loses some of the model's behaviour.
    """

    __name__ = "fastlenet"

    def __init__(
        self,
        inner: str | None = None,
        measure: bool = False,
        decisions: Mapping[Key, timing.Comparison] | None = None,
        *,
        faithful: bool = False,
    ) -> None:
        if inner not in INNER:
            raise ValueError(f"fastlenet: option 'inner' must be one of {INNER}, but got {inner!r}")
        if not isinstance(measure, bool):
            raise ValueError(f"fastlenet: option 'measure' must be True or False, but got {measure!r}")
        self.inner, self.measure, self.faithful = inner, measure, faithful
        self.decisions = dict(decisions or {})
        self.records: dict[tuple[str, str, str], Record] = {}
        self.called = False
        self.codes: set[Any] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy compiles its own graphs.
        return {**vars(self), "codes": set()}

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        self.called = True
        self.codes.add(private.captured_code())
        parts = [part.graph for part in graph_module.modules() if isinstance(part, fx.GraphModule)]
        function = torch.ops.higher_order.autograd_function_apply
        if self.faithful and any(node.target is function for graph in parts for node in graph.nodes):
            raise NotImplementedError("it holds a torch.autograd.Function, whose second derivatives would be lost")
        if self.faithful and any(patterns.writes_to_input(node) for graph in parts[1:] for node in graph.nodes):
            raise NotImplementedError("it holds a checkpoint that modifies a tensor, such as a BatchNorm's counter")
        if self.inner is None:
            for node in [node for graph in parts for node in graph.nodes if node.target is function]:
                _follow_grad_mode(node)
        private.guard_attributes()
        private.guard_hooks()
        mode = "training" if torch.is_grad_enabled() else "inference"
        kinds = {
            node: type(value)
            for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
            if type(value).__name__ != "FakeTensor"
        }
        self.records.update((record.key, record) for record in self.rewrite(graph_module, kinds, mode))
        if self.inner is not None:
            return private.backend_named(self.inner)(graph_module, list(example_inputs))
        return graph_module.forward

    def rewrite(self, module: fx.GraphModule, kinds: Mapping[fx.Node, type], mode: str) -> list[Record]:
        """Fuse the sites of a graph and of its checkpointed parts, in place, and record them."""
        graph, records, taken = module.graph, [], []
        matches = patterns.find(graph, kinds)
        for chain, members in patterns.chains(matches):
            # If no kernel takes the whole chain, its members are faster by themselves.
            if all(member in matches for member in members) and _is_covered(chain.call(mode == "training")):
                record = self._record(chain, mode)
                if record.fused:
                    matches[matches.index(members[0])] = chain
                    matches = [match for match in matches if match not in members]
        for match in matches:
            if match.operator in patterns.OPERATORS:
                record = self._record(match, mode)
                records.append(record)
                if record.fused:
                    taken.append(match)
        for node in graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                part, *operands = node.args
                body = getattr(module, part.target)
                inputs = zip(body.graph.find_nodes(op="placeholder"), operands, strict=False)
                records += self.rewrite(body, {own: kinds[given] for own, given in inputs if given in kinds}, mode)
        if taken:
            patterns.replace_all(graph, taken)
            graph.lint()
            module.recompile()
        return records

    def _record(self, match: Match, mode: str) -> Record:
        values: list[Any] = [match.input.meta.get("example_value"), match.result.meta.get("example_value")]
        input, output = (patterns.describe(value) if isinstance(value, Tensor) else "?" for value in values)
        record = Record(match.name, match.operator, mode, input, output, None, False, match.refusal or "")
        if match.refusal is not None:
            return record
        call = match.call(mode == "training")
        if match.operator == patterns.NORM and (self.inner is not None or not _is_covered(call)):
            why = f"{self.inner} compiles it" if self.inner is not None else patterns.implementation(call)[1]
            return replace(record, reason=f"BatchNorm takes its statistics from the whole batch; {why}")
        record = replace(record, call=call, fused=True)
        if not self.measure:
            return record
        first = 0 if values[0].dim() == 3 else 1  # the number of images does not count
        sizes = map(patterns.hint, values[0].shape[first:])
        key = mode, match.name, match.operator, *(value.dtype for value in values), *sizes
        if key not in self.decisions:
            times = measure(match)
            if times is None:
                return replace(record, fused=False, reason="its sizes are not known, so that it cannot be measured")
            self.decisions[key] = times
        times = self.decisions[key]
        reason = str(times) if times.clear else f"{times}: not clearly faster"
        return replace(record, times=times, fused=times.clear, reason=reason)


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph for ``torch.compile(model, backend="fastlenet")``.

    There are two options. ``inner`` names the compiler of the fused graph: ``"inductor"``, or None (default), which
    runs it eagerly under autograd. ``measure`` (default False) says whether to keep only the sites that are clearly
    faster fused than stock, at their shapes.

    Args:
        graph_module: TorchDynamo's graph.
        example_inputs: its inputs, or stand-ins of their shapes.
        mode: torch.compile's; this backend has none.
        options: the options by name.

    Returns:
        A function that computes the graph.

    Raises:
        ValueError: for any other option, and for a mode.
    """
    if mode is not None:
        raise ValueError(f"fastlenet: the backend has options 'inner' and 'measure', and no mode, but got {mode!r}")
    given = dict(options or {})
    unknown = set(given) - {"inner", "measure"}
    if unknown:
        raise ValueError(f"fastlenet: the options are 'inner' and 'measure', but got {', '.join(map(repr, unknown))}")
    return Backend(**given)(graph_module, example_inputs)


def _follow_grad_mode(node: fx.Node) -> None:
    """Let the backward of a fused operator be differentiated if the engine records it: Dynamo's graph forbids it.

    Functions of others may forbid it themselves, so they stay as they are.
    """
    name: Any = node.args[1]
    backward = getattr(node.graph.owning_module, name.target)
    if not any(str(call.target).startswith(f"{NAMESPACE}.") for call in backward.graph.nodes):
        return
    for switch in backward.graph.find_nodes(op="call_function", target=private.set_grad_enabled):
        backward.graph.erase_node(switch)
    backward.recompile()


def _is_covered(call: Call) -> bool:
    """Whether kernels take a call, and not stock operators."""
    return patterns.implementation(call)[0] not in ("aten", "none")


def measure(match: Match) -> timing.Comparison | None:
    """Time a site's operators and the fused one, on random numbers; None if its sizes are not known.

    Forward and backward are timed if a gradient is needed, else the forward alone.
    """
    late = [norm.variance for norm in match.norms if norm is not None]
    generators: dict[torch.device, torch.Generator] = {}
    arguments: list[Any] = []
    for node in match.inputs():
        value = node.meta["example_value"]
        if not isinstance(value, Tensor):  # a size that results from a flatten
            arguments.append(patterns.hint(value))
            continue
        shape = [size for size in map(patterns.hint, value.shape) if size is not None]
        if len(shape) < value.dim():
            return None
        generator = generators.setdefault(value.device, torch.Generator(value.device).manual_seed(0))
        sample = torch.rand(shape, dtype=torch.float32, device=value.device, generator=generator) * 2 - 1
        sample = (sample.abs() + 0.1 if node in late else sample).to(value.dtype)
        if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
            sample = sample.to(memory_format=torch.channels_last)
        arguments.append(sample.requires_grad_(value.requires_grad))
    backward = bool(match.result.meta["example_value"].requires_grad)
    modules = [patterns.isolate(match, fused) for fused in (False, True)]
    autocast = _autocast(match)
    with torch.inference_mode(False), private.not_compiling():
        stock, fused = (timing.step(autocast(module.forward), arguments, (), backward) for module in modules)
        return timing.compare(stock, fused, match.result.meta["example_value"].device)


def _autocast(match: Match) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the innermost autocast region of the graph that contains a site."""
    inside: list[fx.Node] = []
    for node in itertools.takewhile(lambda node: node is not match.nodes[0], match.nodes[0].graph.nodes):
        if node.target is private.enter_autocast:
            inside.append(node)
        elif node.target is private.exit_autocast:
            inside.remove(node.args[0])
    if not inside:
        return lambda function: function
    device, dtype, enabled, cache = inside[-1].args
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)  # type: ignore[arg-type]
