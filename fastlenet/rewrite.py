"""Whole models: fusing the operators of any model, and telling which operators a model holds and what runs for each.

`fuse` leaves every submodule as it is. It gives the model's class a subclass whose forward is the model's own, with
the chains that a fused operator can take over replaced by calls of that operator on the very same parameters, read
anew at each call. It is used only while all that was true when it was made still holds, else the model's own forward
runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlenet import ops, pattern, selection, trial
from fastlenet.checks import pair
from fastlenet.functional import IntOrPair
from fastlenet.kernels.geometry import ConvPoolGeometry
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU
from fastlenet.pattern import CONV, LINEAR, Chain, Trace, UntraceableError
from fastlenet.selection import logger

__all__ = ["Explanation", "Site", "explain", "fuse"]

Flags = Mapping[str, bool]

_WIDTH = 80
"""Columns that a table takes, unless names are longer."""


@dataclass(frozen=True)
class Site:
    """One place in a model where a fused operator runs or might run.

    Attributes:
        name: the layer's path, or the paths and names of the operators that stand together.
        operator: ``"conv2d_relu_max_pool2d"`` or ``"linear_relu"``.
        mode: ``"training"`` or ``"inference"``; empty where both are alike.
        input: shape and dtype, ``"?"`` where unknown.
        output: likewise.
        implementation: ``"triton"``, ``"aten"``, ``"stock"`` where the operators are left as they are, or ``"none"``
            where a forced backend would raise.
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
        """Where it is, what it computes, and of which shapes where they are known."""
        where = f"{self.name}: {self.operator}"
        if self.input == "?":
            return where
        (shape, _, dtype), (*_, result) = self.input.rpartition(" "), self.output.rpartition(" ")
        return f"{where}, {shape if dtype == result else self.input} -> {self.output}"


@dataclass(frozen=True)
class Explanation:
    """A model's operator sites, and remarks about the whole; prints as a table."""

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = {"mode": "mode", "implementation": "runs", "stock": "stock", "fused": "fused"}
        columns = {
            name: title
            for name, title in columns.items()
            if name == "implementation" or any(getattr(site, name) for site in self.sites)
        }
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
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


@dataclass(frozen=True)
class _Record:
    """What is known of a chain: plain data, from which `explain` makes a row and a copied model its forward."""

    name: str
    operator: str
    cells: int
    dtype: torch.dtype
    device: torch.device
    fused: bool
    reason: str
    input: str = "?"
    output: str = "?"
    times: trial.Comparison | None = None


@dataclass(frozen=True)
class _Variant:
    """What is known of a model in one setting of its modules' training flags."""

    flags: Flags
    records: tuple[_Record, ...]
    notes: tuple[str, ...]

    @property
    def mode(self) -> str:
        return "training" if self.flags[""] else "inference"


class _Plan:
    """A rewritten forward, and what must hold for it to stand in for the model's own."""

    def __init__(self, trace: Trace, taken: Sequence[Chain]) -> None:
        self.run = pattern.function_of(pattern.rewrite(trace.graph, list(taken)))
        self.entered = [(module, tuple(module._modules.values()), module.training) for module in trace.entered]
        self.training = trace.entered[0].training
        # The model's own hooks run as ever: they are called around the forward, whichever it is.
        self.unhooked = [*trace.entered[1:], *(module for chain in taken for module in chain.modules)]
        self.frozen = [module for chain in taken for module in chain.frozen]
        watched = (*trace.entered, *(module for chain in taken for module in chain.modules))
        self.settings = [(module, *setting) for module in watched for setting in pattern.settings(module)]

    def broken(self) -> str | None:
        """Why the plan must not be used now, or None."""
        for module, children, training in self.entered:
            if module.training is not training:
                return "training and eval mode are mixed in another way"
            if tuple(module._modules.values()) != children:
                return "a submodule was exchanged"
        for module, name, value in self.settings:
            if getattr(module, name, None) != value:
                return f"{name!r} of a {type(module).__name__} is another"
        for module in self.frozen:
            if module.training:
                return "BatchNorm or dropout was put in training mode"
        for module in self.unhooked:
            if pattern.hooked(module):
                return f"a submodule {pattern.HOOKS}"
        return None


class _Fused(nn.Module):
    """Mixed in before a model's class: runs a plan that holds, else the class's own forward."""

    _fastlenet_stock: type[nn.Module]
    # Empty in models that have the class but were not fused, such as a slice of a fused nn.Sequential.
    _fastlenet_variants: tuple[_Variant, ...] = ()
    _fastlenet_plans: tuple[_Plan, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle holds the model's own class and the plain records; plans are made anew from them.
        with _as_stock(self) as stock:
            state: dict[str, Any] = stock.__reduce_ex__(2)[2]  # type: ignore[assignment]
        state = {name: value for name, value in state.items() if name != "_fastlenet_plans"}
        return _empty, (_stock_class(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A model may have changed since it was fused, so that it cannot be traced any more; then it runs as it is.
        if self._fastlenet_variants:
            with contextlib.suppress(UntraceableError):
                _install(self, self._fastlenet_variants)


def _stock_class(model: nn.Module) -> type[nn.Module]:
    return model._fastlenet_stock if isinstance(model, _Fused) else type(model)


def _empty(stock: type[nn.Module]) -> nn.Module:
    """A fused model of a class without its state, for copy and pickle to fill."""
    fused = _fused_class(stock)  # type: ignore[arg-type]
    return fused.__new__(fused)


@functools.cache
def _fused_class(stock: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        broken = None
        for plan in self._fastlenet_plans:
            broken = plan.broken()
            if broken is None:
                return plan.run(self, *args, **kwargs)
        if broken is not None and not torch.compiler.is_compiling():
            logger.debug("%s runs as it was before fuse: %s", stock.__name__, broken)
        return stock.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, stock.forward)
    members = {"forward": forward, "_fastlenet_stock": stock, "__module__": stock.__module__}
    return type(f"Fused{stock.__name__}", (_Fused, stock), members)


@contextmanager
def _as_stock(model: nn.Module) -> Iterator[nn.Module]:
    """Give a fused model its own class back for a while."""
    before = model.__class__
    model.__class__ = _stock_class(model)
    try:
        yield model
    finally:
        model.__class__ = before


@contextmanager
def _flagged(model: nn.Module, flags: Flags) -> Iterator[None]:
    """Set the modules' training flags for a while."""
    before = [(module, module.training) for module in model.modules()]
    for name, module in model.named_modules():
        module.training = flags.get(name, flags[""])
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _analyse(model: nn.Module, flags: Flags) -> tuple[Trace, list[Chain]]:
    """Trace a model as it would run under `flags`, and find its chains."""
    with _as_stock(model), _flagged(model, flags):
        trace = pattern.trace(model, (_Fused,))
        return trace, pattern.chains(model, trace.graph)


def _install(model: nn.Module, variants: Sequence[_Variant]) -> None:
    """Make a model run the chains that its variants' records say are fused."""
    plans = []
    for variant in variants:
        if any(record.fused for record in variant.records):
            trace, chains = _analyse(model, variant.flags)
            chosen = {record.name for record in variant.records if record.fused}
            taken = [chain for chain in chains if chain.name in chosen and chain.refusal is None]
            with _flagged(model, variant.flags):
                plans.append(_Plan(trace, taken))
    model.__class__ = _fused_class(_stock_class(model))  # type: ignore[arg-type]
    model._fastlenet_variants, model._fastlenet_plans = tuple(variants), tuple(plans)  # type: ignore[assignment]


def fuse(model: nn.Module, example_input: Any = None, *, inplace: bool = False) -> nn.Module:
    """Rewrite a model so that its convolution-relu-max-pool and linear-relu sites run as fused operators.

    Sites are found however they are written: submodules, ``nn.Sequential``, functions, tensor methods, in place, relu
    after the max-pool. BatchNorm in eval mode between convolution and relu is folded into the weights at each call,
    dropout in eval mode is skipped. No submodule changes: the state_dict, its keys, the parameters and
    ``model.features[0]`` are what they were, and so is what a submodule computes when it is called by itself.

    A site stays as it is where fusing would not be safe: a result in between is used elsewhere, one of its modules has
    hooks, BatchNorm is in training mode, the max-pool returns indices, the padding is not of zeros. A submodule whose
    forward cannot be traced (`torch.fx.symbolic_trace`) runs as it is; if the model's own forward cannot, the model
    is left alone and the logger ``fastlenet`` warns. `explain` gives the reasons.

    Should one of these things come true later (a hook is added, a layer exchanged, a number changed that the forward
    reads), the model's own forward runs. What cannot be seen to change is what a forward reads elsewhere: globals,
    lists, Python's random generator.

    Args:
        model: any module; its class's forward must be traceable.
        example_input: a tensor, or a tuple of the forward's positional arguments, of the size that matters. If given,
            each site is measured, fused against stock, in training mode with its backward and in eval mode without
            gradients; only clear wins are kept, and none of them if the whole model does not become clearly faster
            (see `fastlenet.trial`). Without it every safe site is fused, which for small inputs on a CPU may be slower.
        inplace: whether to rewrite the model itself. Else a copy is rewritten that shares parameters and buffers with
            the model, which stays as it is.

    Returns:
        The rewritten model: an instance of the model's class still. A copy or a pickle of it is rewritten too.

    Raises:
        TypeError: if `model` is no module.
        Exception: whatever the model raises for `example_input`.

    Example:
        >>> import torch, fastlenet
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> fused = fastlenet.fuse(net)
        >>> fused(torch.ones(64, 1, 32, 32)).grad_fn
        <ThresholdBackward0 object at ...>
        >>> fused[0].weight is net[0].weight
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse(): argument 'model' must be a torch.nn.Module, but got {type(model).__name__}")
    if not inplace:
        shared = (*model.parameters(), *model.buffers())
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if isinstance(model, _Fused):
        model.__class__ = _stock_class(model)  # type: ignore[assignment]
        vars(model).pop("_fastlenet_plans", None)
        vars(model).pop("_fastlenet_variants", None)
    present = {name: module.training for name, module in model.named_modules()}
    variants, failures = [], dict[str, str]()
    for flags in (present, dict.fromkeys(present, not model.training)):
        try:
            variants.append(_variant(model, flags, None if example_input is None else _arguments(example_input)))
        except UntraceableError as error:
            failures.setdefault(str(error), _in_mode(flags))
    for reason, mode in failures.items():
        where = mode if variants or len(failures) > 1 else ""
        logger.warning("fuse leaves %s as it is%s: %s", type(model).__name__, where, reason)
    if any(variant.records for variant in variants):
        _install(model, variants)
    return model


def _in_mode(flags: Flags) -> str:
    return f" in {'training' if flags[''] else 'eval'} mode"


def _arguments(example_input: Any) -> tuple[Any, ...]:
    return example_input if isinstance(example_input, tuple) else (example_input,)


def _variant(model: nn.Module, flags: Flags, example: tuple[Any, ...] | None) -> _Variant:
    """Decide chain by chain, by measuring if there is an example."""
    trace, chains = _analyse(model, flags)
    records = tuple(_record(model, chain) for chain in chains)
    notes = tuple(f"{name} runs as it is: {reason}" for name, reason in trace.opaque.items())
    variant = _Variant(flags, records, notes)
    return variant if example is None or not records else _Trial(model, variant, example).judged()


def _record(model: nn.Module, chain: Chain) -> _Record:
    weight = chain.operands[1]
    path = weight if isinstance(weight, str) else weight.target if weight.op == "get_attr" else None
    # A weight that is computed is of its sources' kind, most probably.
    known = next(model.parameters(), torch.empty(0)) if path is None else _attribute(model, path)
    cells = 1 if chain.refusal else chain.cells
    reason = chain.refusal or ""
    return _Record(chain.name, chain.operator, cells, known.dtype, known.device, chain.refusal is None, reason)


def _attribute(model: nn.Module, path: str) -> Tensor:
    return functools.reduce(getattr, path.split("."), model)  # type: ignore[return-value]


class _Observer(fx.Interpreter):
    """Runs a graph once and keeps the inputs of its chains and the shapes of their outputs."""

    def __init__(self, model: nn.Module, trace: Trace, chains: Sequence[Chain]) -> None:
        super().__init__(model, graph=trace.graph)
        self.wanted = {node for chain in chains for node in (*chain.inputs(), chain.result)}
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            # What follows may overwrite a result, and a measurement must not reach back beyond its chain.
            leaf = not isinstance(result, Tensor) or isinstance(result, nn.Parameter)
            self.seen[n] = result if leaf else result.detach().clone().requires_grad_(result.requires_grad)
        return result

    def shapes(self, chain: Chain) -> tuple[str, str]:
        """Input and output of a chain, in words."""
        return _shape(self.seen[chain.operands[0]]), _shape(self.seen[chain.result])


class _Trial:
    """Measures a variant on a copy of the model, so that its buffers and random numbers stay as they are."""

    def __init__(self, model: nn.Module, variant: _Variant, example: tuple[Any, ...]) -> None:
        self.model = copy.deepcopy(model)
        for name, module in self.model.named_modules():
            module.training = variant.flags[name]
        self.variant, self.example = variant, example
        self.training = variant.flags[""]
        self.trace, self.chains = _analyse(self.model, variant.flags)
        self.device = next((tensor.device for tensor in trial.tensors(example)), torch.device("cpu"))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def judged(self) -> _Variant:
        """The variant with times, shapes, and only clear wins fused."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.set_grad_enabled(self.training):
            expected = self._outputs(self.model)
            observer = _Observer(self.model, self.trace, self.chains)
            observer.run(*self.example)
            pairs = zip(self.chains, self.variant.records, strict=True)
            records = [self._judge(chain, record, observer) for chain, record in pairs]
            taken = [chain for chain, record in zip(self.chains, records, strict=True) if record.fused]
            if not taken:
                return replace(self.variant, records=tuple(records))
            plan = _Plan(self.trace, taken)
            whole = functools.partial(self._run, plan)
            if not _same(expected, self._outputs(whole)):
                return self._declined(records, "the rewritten model does not reproduce the model's output")
            stock, fused = (self._step(call, self.example) for call in (self.model, whole))
            times = trial.compare(stock, fused, self.device)
        mode = _in_mode(self.variant.flags)
        note = f"whole model{mode}: {_time(times.stock)} stock, {_time(times.fused)} fused, {times}"
        if not times.clear:
            return self._declined(records, "the whole model does not become clearly faster", note)
        return replace(self.variant, records=tuple(records), notes=(*self.variant.notes, note))

    def _run(self, plan: _Plan, *args: Any) -> Any:
        """What a fused model does at each call."""
        broken = plan.broken()
        assert broken is None, broken
        return plan.run(self.model, *args)

    def _outputs(self, call: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)  # for dropout; the caller's generators are kept apart
        return [output.detach().clone() for output in trial.tensors(call(*self.example))]

    def _step(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Callable[[], Any]:
        return trial.step(call, arguments, self.parameters, self.training)

    def _judge(self, chain: Chain, record: _Record, observer: _Observer) -> _Record:
        """Measure one chain and keep it fused if it wins."""
        input, output = observer.shapes(chain)
        record = replace(record, input=input, output=output)
        if not record.fused:
            return record
        first = observer.seen[chain.operands[0]]
        record = replace(record, dtype=first.dtype, device=first.device)
        arguments = [observer.seen[node] for node in chain.inputs()]
        stock, fused = (
            self._step(functools.partial(pattern.function_of(pattern.isolate(chain, fused)), self.model), arguments)
            for fused in (False, True)
        )
        times = trial.compare(stock, fused, self.device)
        reason = str(times) if times.clear else f"{times}: not clearly faster"
        return replace(record, times=times, fused=times.clear, reason=reason)

    def _declined(self, records: Sequence[_Record], reason: str, *notes: str) -> _Variant:
        kept = tuple(replace(record, fused=False, reason=reason) if record.fused else record for record in records)
        return replace(self.variant, records=kept, notes=(*self.variant.notes, *notes))


def _same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Whether outputs are the same up to rounding.

    A mistake in a rewritten model shows as a difference of the outputs' own size, rounding as one of some units of
    their dtype: the square root of that unit lies far from both.
    """
    return len(expected) == len(actual) and all(
        e.shape == a.shape
        and (
            not e.is_floating_point()
            or bool((a - e).double().norm() <= math.sqrt(torch.finfo(e.dtype).eps) * e.double().norm())
        )
        for e, a in zip(expected, actual, strict=True)
    )


def explain(model: nn.Module, example_input: Any = None) -> Explanation:
    """Tell which implementation each fused operator of a model takes, and why; and what `fuse` would do to the others.

    Args:
        model: any module. Its sites are its `ConvReLUMaxPool2d` and `LinearReLU` layers, what `fuse` has found in it,
            with the times measured, and the stock operators that `fuse` would find.
        example_input: a tensor, or a tuple of the forward's positional arguments. If given, a copy of the model is run
            on it, without gradients, to learn shapes and to decide by the tensors that really arrive; a layer that is
            called more than once shows its first call.

    Returns:
        The sites in order; printing it gives a table. See `Site` for its columns.

    Example:
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
    layers = {
        name or "(model)": layer
        for name, layer in model.named_modules()
        if isinstance(layer, (ConvReLUMaxPool2d, LinearReLU))
    }
    example = None if example_input is None else _arguments(example_input)
    seen = {} if example is None else _observe(model, layers, example)
    sites = [_site_of_layer(name, layer, seen.get(name)) for name, layer in layers.items()]
    notes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _Fused) and module._fastlenet_variants:
            found, remarks = _sites_of_fused(module, example if module is model else None)
            prefix = f"{name}." if name else ""
            sites += [replace(site, name=prefix + site.name) for site in found]
            notes += remarks
    if not isinstance(model, (_Fused, *pattern.OWN)):
        found, remarks = _sites_of_stock(model, example)
        sites, notes = sites + found, notes + remarks
    return Explanation(tuple(sites), tuple(dict.fromkeys(notes)))


def _sites_of_fused(model: _Fused, example: tuple[Any, ...] | None) -> tuple[list[Site], list[str]]:
    """What `fuse` recorded; sites that are alike in training and inference stand once."""
    shapes = {} if example is None else _shapes(model, example)
    sites: dict[Site, str] = {}
    for variant in model._fastlenet_variants:
        for record in variant.records:
            site = _site(record)
            if record.name in shapes:
                site = replace(site, **dict(zip(("input", "output"), shapes[record.name], strict=True)))
            sites[site] = "" if site in sites else variant.mode
    order = {name: number for number, name in enumerate(dict.fromkeys(site.name for site in sites))}
    rows = [replace(site, mode=mode) for site, mode in sites.items()]
    notes = [note for variant in model._fastlenet_variants for note in variant.notes]
    if any(site.stock for site in sites):
        notes.append(trial.RULE)
    broken = [plan.broken() for plan in model._fastlenet_plans if plan.training is model.training]
    if broken and None not in broken:
        notes.append(f"at present the model runs as it was before fuse: {broken[0]}")
    return sorted(rows, key=lambda site: order[site.name]), notes


def _sites_of_stock(model: nn.Module, example: tuple[Any, ...] | None) -> tuple[list[Site], list[str]]:
    """What `fuse` would find in the model's present mode."""
    try:
        variant = _variant(model, {name: module.training for name, module in model.named_modules()}, None)
    except UntraceableError as error:
        return [], [f"cannot be fused: {error}"]
    shapes = {} if example is None else _shapes(model, example)
    sites = []
    for record in variant.records:
        input, output = shapes.get(record.name, ("?", "?"))
        reason = record.reason or "fastlenet.fuse can take it over"
        sites.append(Site(record.name, record.operator, "", input, output, "stock", "", "", reason))
    return sites, list(variant.notes)


def _shapes(model: nn.Module, example: tuple[Any, ...]) -> dict[str, tuple[str, str]]:
    """Run the model once and return input and output of each chain in its present mode."""
    trial_model = copy.deepcopy(model)
    with _as_stock(trial_model), torch.no_grad():
        flags = {name: module.training for name, module in trial_model.named_modules()}
        trace, chains = _analyse(trial_model, flags)
        observer = _Observer(trial_model, trace, chains)
        observer.run(*example)
    return {chain.name: observer.shapes(chain) for chain in chains}


def _observe(
    model: nn.Module, layers: Mapping[str, nn.Module], example: tuple[Any, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model once and return the first input and output of each layer, as empty tensors on the same device."""
    if not layers:
        return {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    model = copy.deepcopy(model)

    def remember(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # The output has the dtype that the operator ran in, under autocast too; nothing is kept alive.
            seen.setdefault(name, (torch.empty_like(args[0], dtype=output.dtype), torch.empty_like(output)))

        return hook

    for name in layers:
        model.get_submodule("" if name == "(model)" else name).register_forward_hook(remember(name))
    with torch.no_grad():
        model(*example)
    return seen


def _site_of_layer(name: str, layer: ConvReLUMaxPool2d | LinearReLU, seen: tuple[Tensor, Tensor] | None) -> Site:
    operand = layer.weight if seen is None else seen[0]
    conv = isinstance(layer, ConvReLUMaxPool2d)
    input, output = ("?", "?") if seen is None else (_shape(seen[0]), _shape(seen[1]))
    if seen is None:
        cells = _cells(layer.pool_size) if isinstance(layer, ConvReLUMaxPool2d) else 1
        implementation, reason = _implementation(operand.dtype, operand.device, cells)
    else:
        implementation, reason = _choice(layer, operand)
    return Site(name, CONV if conv else LINEAR, "", input, output, implementation, "", "", reason)


def _choice(layer: ConvReLUMaxPool2d | LinearReLU, input: Tensor) -> tuple[str, str]:
    """Which implementation a layer takes without gradients for an input like this, and why."""
    weight, bias = (None if p is None else p.detach().to(input.dtype) for p in (layer.weight, layer.bias))
    operator: Any = ops.LINEAR_RELU
    settings = None
    if isinstance(layer, ConvReLUMaxPool2d):
        operator, named = ops.CONV2D_RELU_MAX_POOL2D, isinstance(layer.padding, str)
        settings = ConvPoolGeometry(
            pair("explain", "stride", layer.stride),
            # What is padded before the first row and column; stock keeps both ends, the last dimension first.
            tuple(layer._reversed_padding_repeated_twice[2::-2])
            if named
            else pair("explain", "padding", layer.padding),
            pair("explain", "dilation", layer.dilation),
            layer.groups,
            *(pair("explain", name, getattr(layer, name)) for name in _POOL),
            layer.ceil_mode,
        )
    try:
        choice = selection.choose(operator, settings, (input, weight, bias), differentiable=False)
    except (RuntimeError, NotImplementedError) as error:
        return "none", str(error)
    return choice.forward, choice.reason


_POOL = ("pool_size", "pool_stride", "pool_padding", "pool_dilation")


def _site(record: _Record) -> Site:
    implementation, reason = "stock", record.reason
    if record.fused:
        implementation, reason = _implementation(record.dtype, record.device, record.cells)
        reason = f"{record.reason or 'not measured'}; {reason}"
    stock, fused = ("", "") if record.times is None else (_time(record.times.stock), _time(record.times.fused))
    return Site(record.name, record.operator, "", record.input, record.output, implementation, stock, fused, reason)


def _implementation(dtype: torch.dtype, device: torch.device, cells: int) -> tuple[str, str]:
    """Which implementation a fused operator takes, and why."""
    try:
        choice = selection.choose_by_type(torch.empty(0, dtype=dtype, device=device))
    except (RuntimeError, NotImplementedError) as error:
        return "none", str(error)
    if choice.forward == "triton" and cells > 255:
        return "aten", f"the Triton kernels cover pooling windows of up to 255 cells, not {cells}"
    return choice.forward, choice.reason


def _cells(pool_size: IntOrPair) -> int:
    height, width = pair("explain", "pool_size", pool_size)
    return height * width


def _shape(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


def _time(seconds: float) -> str:
    """Three digits and a unit in which they do not need an exponent."""
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if seconds * factor < 999.5), ("s", 1.0))
    return f"{seconds * factor:.3g} {unit}"


_UNITS = ("us", 1e6), ("ms", 1e3)
