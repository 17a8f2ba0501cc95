"""Finding the places in a model that a fused operator can take over.

A model is traced symbolically into a graph, in which a chain of nodes such as convolution, relu, max-pool is a
candidate. What tracing would get wrong without a word (tensors made in a forward, switched gradients, attributes that
change, questions for a type) is refused here, module by module: such a module stays a single node that runs as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fastlenet import functional
from fastlenet.checks import pair
from fastlenet.functional import __all__ as functions
from fastlenet.functional import conv2d_relu_max_pool2d, linear_relu
from fastlenet.lenet import LeNet
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU

HOOKS = "has hooks, or a forward put on the object"
# What is made of fused operators already.
OWN = (ConvReLUMaxPool2d, LinearReLU, LeNet)
CONV, LINEAR = "conv2d_relu_max_pool2d", "linear_relu"


class UntraceableError(Exception):
    """A model cannot be traced; the message says why."""


class _OpaqueError(Exception):
    """A submodule cannot be traced, and must stay a single node."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module, self.reason = module, reason


@dataclass(frozen=True)
class Trace:
    """A model's graph, the modules that were traced through (itself among them), and why others were not."""

    graph: fx.Graph
    entered: tuple[nn.Module, ...]
    opaque: Mapping[str, str]


@dataclass(frozen=True)
class Chain:
    """Nodes, first to last, that one fused operator can take over, or the reason why it must not.

    Attributes:
        name: where it is: its modules' paths, or its functions' names in the graph.
        operator: `CONV` or `LINEAR`.
        nodes: the chain; what every node but the last computes is used by the next one only.
        result: the node that stands for what the chain computes: its last one, or the one that a last relu modifies
            without a name of its own (``F.relu(x, inplace=True)`` as a statement).
        operands: input, weight and bias: nodes, or for weight and bias the path of a module's parameter.
        options: keyword arguments of the fused operator.
        norm: path of the BatchNorm to fold into weight and bias.
        modules: the modules that the chain stands for.
        frozen: those of them that must be in eval mode.
        refusal: why the chain must stay as it is, or None.
    """

    name: str
    operator: str
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    operands: tuple[Any, Any, Any]
    options: dict[str, Any] = field(default_factory=dict)
    norm: tuple[str, nn.BatchNorm2d] | None = None
    modules: tuple[nn.Module, ...] = ()
    frozen: tuple[nn.Module, ...] = ()
    refusal: str | None = None

    @property
    def cells(self) -> int:
        """Number of cells of the pooling window."""
        height, width = pair("fuse", "pool_size", self.options.get("pool_size", 1))
        return height * width

    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside of the chain that feed it, each once."""
        feeding = (source for node in self.nodes for source in node.all_input_nodes if source not in self.nodes)
        return tuple(dict.fromkeys(feeding))


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` does not just run its class's forward: hooks, or a forward put on the object itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """A module's plain values that a graph holds as they are now; of a user's module those that its forward reads."""
    names = _READ if type(module).__module__.startswith("torch.") else _names(type(module)) - {"training"}
    return tuple((name, value) for name, value in vars(module).items() if name in names and _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def trace(model: nn.Module, leaves: tuple[type, ...] = ()) -> Trace:
    """Trace `model` in its present state, leaving it as it was.

    Args:
        model: what to trace; modules of ``torch.nn`` and fused layers stay single nodes.
        leaves: further types of modules to leave single.

    Raises:
        UntraceableError: if the model's own forward cannot be traced. A submodule that cannot stays a single node.
    """
    if isinstance(model, OWN):
        raise UntraceableError("it is made of fused operators already")
    if hasattr(model, "_orig_mod"):
        raise UntraceableError("it is compiled already: fuse first, then torch.compile")
    if isinstance(model, torch.jit.ScriptModule) or "forward" in vars(model):
        raise UntraceableError("its forward is not its class's: fuse the model before it is scripted or patched")
    opaque: dict[nn.Module, str] = {}
    while True:
        tracer = _Tracer(opaque, leaves)
        before = [(module, [dict(some) for some in _attributes(module)]) for module in model.modules()]
        try:
            if tracer.is_leaf_module(model, ""):
                raise UntraceableError(f"a {type(model).__name__} has no forward of its own to rewrite")
            tracer.enter(model)
            graph = tracer.trace(model)
        except _OpaqueError as stop:
            opaque[stop.module] = stop.reason
            continue
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(_reason(error)) from error
        finally:
            changed = _restore(before)
        if changed is None:
            paths = {module: name for name, module in model.named_modules()}
            left = {**tracer.hooked, **opaque}
            return Trace(graph, tuple(tracer.entered), {paths[module]: reason for module, reason in left.items()})
        module, attribute = changed
        reason = f"its forward changes its attribute {attribute!r}"
        if module is model or module in opaque:
            raise UntraceableError(reason)
        opaque[module] = reason


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps what a forward may assign."""
    return vars(module), module._parameters, module._buffers, module._modules


def _restore(before: list[tuple[nn.Module, list[dict[str, Any]]]]) -> tuple[nn.Module, str] | None:
    """Set attributes back to what they were; return a module and an attribute that had changed, if any had."""
    found = None
    for module, contents in before:
        for now, then in zip(_attributes(module), contents, strict=True):
            changed = [name for name in {*then, *now} if then.get(name, now) is not now.get(name, then)]
            if changed:
                found = module, sorted(changed)[0]
                now.clear()
                now.update(then)
    return found


def _switches() -> tuple[bool, ...]:
    """What a context manager in a forward may switch, which a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _names(kind: type[nn.Module]) -> set[str]:
    """All names that a class's forward uses, and the class's own methods that it calls."""
    names: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = unwrap(getattr(kind, waiting.pop(), None))  # type: ignore[arg-type]
        code = getattr(method, "__code__", None)
        if code is not None and not (method.__module__ or "").startswith("torch."):
            new = set(code.co_names) - names
            names |= new
            waiting += new
    return names


class _Tracer(fx.Tracer):
    """Traces into a model's own modules and stops wherever the graph would not say what the forward does."""

    proxy_buffer_attributes = True  # else a buffer that a forward counts up would be counted up now, and never later

    def __init__(self, opaque: Mapping[nn.Module, str], leaves: tuple[type, ...]) -> None:
        super().__init__(autowrap_functions=tuple(getattr(functional, name) for name in functions))
        self.opaque = opaque
        self.hooked: dict[nn.Module, str] = {}
        self.leaves = (*OWN, *leaves)
        self.entered: list[nn.Module] = []
        self.switches = _switches()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leave a module single if it is stock or fused, or if its forward is not all that a call of it runs."""
        if m in self.opaque or isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name):
            return True
        if hooked(m) and module_qualified_name:
            self.hooked[m] = HOOKS
            return True
        return False

    def enter(self, module: nn.Module) -> None:
        """Note that `module` is traced through, unless its forward asks for types: a stand-in has the wrong one."""
        if "isinstance" in _names(type(module)):
            raise fx.proxy.TraceError("its forward asks isinstance, which tracing would answer wrongly")
        if module not in self.entered:
            self.entered.append(module)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a module, or find that it must stay single."""
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        try:
            self.enter(m)
            return super().call_module(m, forward, args, kwargs)
        except _OpaqueError:
            raise
        except Exception as error:
            raise _OpaqueError(m, _reason(error)) from error

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse operators under a context that the graph would not record."""
        if _switches() != self.switches:
            raise fx.proxy.TraceError("its forward switches gradients or autocast, which a graph does not record")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Refuse tensors made in a forward: the graph would repeat today's for ever."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._keeps(a):
            raise fx.proxy.TraceError("its forward makes a tensor, which tracing would freeze")
        return super().create_arg(a)

    def _keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor is a buffer of the model or a plain attribute, to be read anew at each call."""
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


# What the nodes of a chain do, as `_stage` tells.
RELU, POOL, NORM, NOTHING = "relu", "pool", "norm", "nothing"

# What is read of stock modules.
_READ = {
    "stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "ceil_mode", "return_indices", "eps",
    "inplace",
}  # fmt: skip
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DROPOUT_ARGUMENTS = ("input", "p", "training")
_RELUS = (F.relu, torch.relu, torch.relu_)
_POOLS = (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)
_DROPOUTS = (F.dropout, F.dropout2d)


def _runs(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether `module` is of a stock type, or of a subclass that computes the same."""
    return isinstance(module, stock) and all(
        getattr(type(module), name, None) is getattr(stock, name, None) for name in ("forward", "_conv_forward")
    )


def _bound(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def chains(model: nn.Module, graph: fx.Graph) -> list[Chain]:
    """Find every chain in `graph`, in order, those that must stay as they are included."""
    found: list[Chain] = []
    for node in graph.nodes:
        chain = _chain(node, model)
        if chain is not None:
            # The same modules may be called again.
            calls = sum(other.nodes[0].target == node.target and other.name.startswith(chain.name) for other in found)
            found.append(replace(chain, name=f"{chain.name} ({calls + 1})") if calls else chain)
    return found


def _module(node: fx.Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _chain(head: fx.Node, model: nn.Module) -> Chain | None:
    start = _head(head, model)
    if start is None:
        return None
    wanted = {RELU, POOL} if start.operator == CONV else {RELU}
    nodes, problems, modules, frozen = [head], [start.refusal], list(start.modules), list(start.frozen)
    options, norm = dict(start.options), None
    done: list[str] = []
    result = head
    while set(done) != wanted:
        users = [user for user in result.users if user not in nodes]
        step = next(((user, stage) for user in users if (stage := _stage(user, model, result))), None)
        if step is None:
            return None
        node, (what, detail) = step
        if what in done or (what == POOL and POOL not in wanted) or (what == NORM and (done or norm)):
            return None
        module = _module(node, model)
        # A statement such as `F.relu(x, inplace=True)`: whoever comes after it sees what it made of x.
        nameless = what == RELU and not node.users and _in_place(node, module)
        others = [user.name for user in (users[: users.index(node)] if nameless else users) if user is not node]
        if others:
            problems.append(f"the result of {result.name} is used by {', '.join(others)} too")
        if what == NORM:
            if start.operator == LINEAR:
                return None
            norm = str(node.target), detail
            problems.append(_norm_problem(detail))
            frozen.append(detail)
        elif what == NOTHING and module is not None and not isinstance(module, nn.Identity):
            problems.append(f"{node.target} drops out, in training mode" if module.training else None)
            frozen.append(module)
        elif what == POOL:
            problems += _pool_problems(detail, RELU in done)
            options.update(
                pool_size=detail.get("kernel_size"),
                pool_stride=detail.get("stride"),
                pool_padding=detail.get("padding", 0),
                pool_dilation=detail.get("dilation", 1),
                ceil_mode=detail.get("ceil_mode", False),
            )
        if module is not None:
            modules.append(module)
            problems.append(f"{node.target} {HOOKS}" if hooked(module) else None)
        nodes.append(node)
        result = result if nameless else node
        if what in wanted:
            done.append(what)
    refusal = next((problem for problem in problems if problem), None)
    return replace(
        start,
        name=" > ".join(str(node.target) if node.op == "call_module" else node.name for node in nodes),
        nodes=tuple(nodes),
        options=options,
        norm=norm,
        modules=tuple(modules),
        frozen=tuple(frozen),
        refusal=refusal,
        result=result,
    )


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a relu modifies what it is given."""
    if module is not None:
        return bool(module.inplace)
    return node.target in (torch.relu_, "relu_") or bool(_bound(node, ("input", "inplace")).get("inplace"))


def _head(node: fx.Node, model: nn.Module) -> Chain | None:
    """A chain's first node: a convolution or a linear map."""
    module = _module(node, model)
    if module is not None and len(node.args) == 1 and not node.kwargs:
        weight, bias = f"{node.target}.weight", None if getattr(module, "bias", None) is None else f"{node.target}.bias"
        operands = node.args[0], weight, bias
        common = {"name": "", "nodes": (node,), "result": node, "operands": operands, "modules": (module,)}
        refusal = f"{node.target} {HOOKS}" if hooked(module) else None
        if _runs(module, nn.Linear):
            return Chain(operator=LINEAR, refusal=refusal or _kind_problem(module), **common)  # type: ignore[arg-type]
        if _runs(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                refusal = f"{node.target} pads with padding_mode={module.padding_mode!r}"
            options = {name: getattr(module, name) for name in _CONV_ARGUMENTS[3:]}
            return Chain(operator=CONV, options=options, refusal=refusal or _kind_problem(module), **common)  # type: ignore[arg-type]
    if node.op == "call_function" and node.target in (F.linear, F.conv2d):
        given = _bound(node, _CONV_ARGUMENTS)
        operands = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        name = LINEAR if node.target is F.linear else CONV
        return Chain("", name, (node,), node, operands, options=given, refusal=_computed(node, given))
    return None


def _kind_problem(module: nn.Module) -> str | None:
    """Whether a layer's parameters are tensors of a kind with operators of its own: quantised, distributed."""
    kinds = [type(parameter) for parameter in (module.weight, module.bias) if parameter is not None]
    other = next((kind for kind in kinds if kind not in (Tensor, nn.Parameter)), None)
    return f"its parameters are of type {other.__name__}" if other is not None else None


def _stage(node: fx.Node, model: nn.Module, source: fx.Node) -> tuple[str, Any] | None:
    """What a node does with the result of `source`, and its details; None if nothing that a chain may hold."""
    if not node.args or node.args[0] is not source:
        return None
    module = _module(node, model)
    if module is not None:
        if _runs(module, nn.ReLU):
            return RELU, None
        if _runs(module, nn.MaxPool2d):
            return POOL, {name: getattr(module, name) for name in _POOL_ARGUMENTS[1:]}
        if _runs(module, nn.BatchNorm2d):
            return NORM, module
        if any(_runs(module, stock) for stock in (nn.Identity, nn.Dropout, nn.Dropout2d)):
            return NOTHING, None
    if node.target in _RELUS or (node.op == "call_method" and node.target in ("relu", "relu_")):
        return RELU, None
    if node.target in _POOLS:
        given = _bound(node, _POOL_ARGUMENTS)
        indices = node.target is F.max_pool2d_with_indices
        return POOL, {**given, "return_indices": indices, "computed": _computed(node, given)}
    if node.target in _DROPOUTS and _bound(node, _DROPOUT_ARGUMENTS).get("training", True) is False:
        return NOTHING, None
    return None


def _computed(node: fx.Node, given: Mapping[str, Any]) -> str | None:
    """Whether a call's options are known only when it runs."""
    for name, value in given.items():
        if name != "input" and any(isinstance(leaf, fx.Node) for leaf in tree_leaves(value)):
            return f"the argument {name!r} of {node.name} is computed in the forward"
    return None


def _norm_problem(norm: nn.BatchNorm2d) -> str | None:
    needs = "needs the whole batch's convolution"
    if norm.training:
        return f"BatchNorm in training mode {needs}"
    return f"BatchNorm without running statistics {needs}" if norm.running_mean is None else None


def _pool_problems(pool: Mapping[str, Any], after_relu: bool) -> Iterator[str]:
    if pool.get("return_indices"):
        yield "the max-pool returns indices"
    if pool.get("computed"):
        yield pool["computed"]
    elif not after_relu and pool.get("padding") not in (0, (0, 0), None) and pool.get("dilation", 1) not in (1, (1, 1)):
        # Only there may a window lie wholly in the padding: stock's order gives relu(-inf) = 0, the fused one -inf.
        yield "relu follows a max-pool with both padding and dilation"


def fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution followed by BatchNorm in eval mode.

    Computed anew at every call, so that it always follows the parameters and autograd reaches them.
    """
    factor = (variance + eps).rsqrt()
    if scale is not None:
        factor = factor * scale
    offset = (-mean if bias is None else bias - mean) * factor
    if shift is not None:
        offset = offset + shift
    return (weight * factor[:, None, None, None]).to(weight.dtype), offset.to(weight.dtype)


def rewrite(graph: fx.Graph, taken: list[Chain]) -> fx.Graph:
    """Copy `graph` with the chains `taken` replaced by fused operators."""
    rewritten, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    output = rewritten.graph_copy(graph, copies)
    rewritten.output(output)
    for chain in taken:
        _replace(rewritten, chain, copies)
    return rewritten


def isolate(chain: Chain, fused: bool) -> fx.Graph:
    """A graph of the chain alone, its inputs as placeholders in the order of `Chain.inputs`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in chain.inputs()}
    for node in chain.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[chain.result])
    if fused:
        _replace(graph, chain, copies)
    return graph


def _replace(graph: fx.Graph, chain: Chain, copies: dict[fx.Node, fx.Node]) -> None:
    """Replace the copy of a chain; `copies` then leads from the chain's result to the fused one."""
    nodes = [copies[node] for node in chain.nodes]
    # Before the first node, not at the last: whatever stands between might change the chain's input in place.
    with graph.inserting_before(nodes[0]):
        input, weight, bias = (
            graph.create_node("get_attr", operand) if isinstance(operand, str) else fx.node.map_arg(operand, copies.get)
            for operand in chain.operands
        )
        if chain.norm is not None:
            path, norm = chain.norm
            names = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}
            statistics = {
                key: None if getattr(norm, name) is None else graph.create_node("get_attr", f"{path}.{name}")
                for key, name in names.items()
            }
            folded = graph.call_function(fold, (weight, bias), {**statistics, "eps": norm.eps})
            weight, bias = (graph.call_function(operator.getitem, (folded, i)) for i in (0, 1))
        function = conv2d_relu_max_pool2d if chain.operator == CONV else linear_relu
        fused = graph.call_function(function, (input, weight, bias), dict(chain.options))
    copies[chain.result].replace_all_uses_with(fused)
    copies[chain.result] = fused
    for node in reversed(nodes):
        graph.erase_node(node)


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """Compile a graph to a function of the model and its inputs."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fastlenet.fuse>", "exec"), namespace)
    return namespace["forward"]
