"""Finding the sites in a graph that a fused operator can compute, and replacing them.

The graph comes from TorchDynamo. It has only functions and tensor methods, however the model is written, and parameters
are inputs. Python values that the forward read are constants in it, which Dynamo guards. So this module sees one fixed
program, and answers one question: which nodes can one call compute without a change for any other node?
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlenet import cpu, functional, ops, private, selection
from fastlenet.checks import pair
from fastlenet.errors import KernelError
from fastlenet.kernels.geometry import LINEAR as LAST
from fastlenet.kernels.geometry import LINEAR_RELU as LINEAR
from fastlenet.kernels.geometry import ConvPoolGeometry, Links, memory_format
from fastlenet.ops.batch_norm_relu_max_pool2d import Settings as NormSettings

CONV, ADDMM, CHAIN = "conv2d_relu_max_pool2d", "addmm_relu", "chain"
NORM = "batch_norm_relu_max_pool2d"
"""Behind a convolution that stays stock's: BatchNorm that takes its statistics from the batch, in channels_last."""
# A linear map without relu can end a chain. It is not a site by itself.
OPERATORS: dict[str, Any] = {
    CONV: ops.CONV2D_RELU_MAX_POOL2D, LINEAR: ops.LINEAR_RELU, ADDMM: ops.ADDMM_RELU, CHAIN: ops.CHAIN,
    NORM: ops.BATCH_NORM_RELU_MAX_POOL2D,
}  # fmt: skip

_STARTS = {torch.conv2d: CONV, **dict.fromkeys(private.linears, LINEAR), torch.addmm: ADDMM, "addmm": ADDMM}
# The kinds of the nodes after a site's first one.
_RELU, _POOL, _NORM, _NOTHING = "relu", "pool", "norm", "nothing"

_ARGUMENTS = {
    CONV: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    LINEAR: ("input", "weight", "bias"),
    ADDMM: ("input", "mat1", "mat2"),
    _RELU: ("input", "inplace"),
    _POOL: ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    _NORM: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    _NOTHING: ("input", "p", "training", "inplace"),
}
_STAGES: dict[Any, str] = {
    F.relu: _RELU, torch.relu: _RELU, torch.relu_: _RELU, "relu": _RELU, "relu_": _RELU,
    F.max_pool2d: _POOL, torch.max_pool2d: _POOL, F.max_pool2d_with_indices: _POOL,
    F.batch_norm: _NORM,
    F.dropout: _NOTHING, F.dropout2d: _NOTHING,
}  # fmt: skip
_FLATTENS = (torch.flatten, "flatten", "view", "reshape", torch.reshape)


class Call(NamedTuple):
    """The data that decides which implementation an operator takes.

    Attributes:
        operator: a function of `fastlenet.functional`.
        settings: its arguments other than tensors, as `fastlenet.selection` takes them; None if not known.
        operands: sizes, dtype and device of each tensor, or of the first alone if sizes are not known.
        differentiable: whether a backward may follow.
    """

    operator: str
    settings: Any
    operands: tuple[tuple[tuple[int, ...], torch.dtype, torch.device] | None, ...]
    differentiable: bool


def implementation(call: Call) -> tuple[str, str]:
    """Tell which implementation runs for a call, and why; ``"none"`` if a forced backend would raise."""
    operator_ = OPERATORS[call.operator]
    tensors = [  # of one element each, whatever their sizes
        None if operand is None else torch.empty((), dtype=operand[1], device=operand[2]).expand(operand[0])
        for operand in call.operands
    ]
    try:
        if len(tensors) == 1 or (call.operator == CONV and call.settings is None):
            choice = selection.choose_by_type(tensors[0])  # type: ignore[arg-type]
        else:
            choice = selection.choose(operator_, call.settings, tensors, call.differentiable)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return "none", str(error)
    fused = call.operator == NORM and choice.implementation != "aten"
    return choice.implementation, choice.reason + ("; the convolution before it is stock's" if fused else "")


class Norm(NamedTuple):
    """A BatchNorm between a convolution and its relu."""

    mean: fx.Node | None
    variance: fx.Node | None
    scale: fx.Node | None
    shift: fx.Node | None
    eps: float
    momentum: float | None
    """None in eval mode."""


@dataclass(frozen=True)
class Match:
    """Nodes, first to last, that one call can compute, or the reason why it must not.

    Attributes:
        name: the paths of its modules and the names of its functions.
        operator: a function of `fastlenet.functional`, ``"linear"``, which only a chain may contain, or `NORM`.
        nodes: the nodes to replace. The result of each except the last is used by the next one only.
        result: the node with the result. It is the last one, or the one that a last relu modifies as a statement
            (``F.relu(x, inplace=True)``).
        operands: the fused function's positional arguments; of `NORM` the convolution's.
        options: its keyword arguments.
        norms: the BatchNorm to fold into each weight and bias, or None; of `NORM` the BatchNorm itself.
        refusal: why the nodes must stay as they are, or None.
    """

    name: str
    operator: str
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    operands: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[Norm | None, ...] = (None,)
    refusal: str | None = None

    @property
    def input(self) -> fx.Node:
        """The operand that carries the data."""
        return self.operands[1 if self.operator == ADDMM else 0]

    @property
    def links(self) -> Links | None:
        """The match as links of a chain; None if it cannot be part of one, or its geometry is not known."""
        if self.operator == CHAIN:
            return self.operands[2]
        if self.operator == CONV:
            geometry = _geometry(self.options, _value(self.operands[1]))
            return None if geometry is None else (geometry,)
        return (self.operator,) if self.operator in (LINEAR, LAST) else None

    def call(self, differentiable: bool) -> Call:
        """The data that decides which implementation it takes."""
        result = _value(self.result)
        operands: list[Any] = []
        for node in self.tensors:
            value = None if node is None else _value(node)
            sizes = () if value is None else tuple(hint(size) for size in value.shape)
            if None in sizes:
                return Call(self.operator, None, (((), result.dtype, result.device),), differentiable)
            # Autocast converts operands to the type of the stock operators' result.
            operands.append(None if value is None else (sizes, result.dtype, value.device))
        settings: Any = None
        if self.operator == ADDMM:
            settings = self.options.get("beta", 1), self.options.get("alpha", 1)
        elif self.operator == NORM:
            settings = self.options["settings"]
        elif self.operator != LINEAR and (links := self.links) is not None:
            settings = links if self.operator == CHAIN else links[0]
        return Call(self.operator, settings, tuple(operands), differentiable)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The operands that are tensors, in the operator's order; None for one that is not given."""
        if self.operator == NORM:
            return (self.nodes[0], *(self.norms[0] or ())[:4])
        return (self.operands[0], *self.operands[1]) if self.operator == CHAIN else self.operands

    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside of the match whose results it uses, each once."""
        feeding = (source for node in self.nodes for source in node.all_input_nodes if source not in self.nodes)
        return tuple(dict.fromkeys(feeding))


def find(graph: fx.Graph, kinds: Mapping[fx.Node, type]) -> list[Match]:
    """Find every site of a graph, in order, with refused sites, and single linear maps.

    Args:
        graph: Dynamo's graph.
        kinds: types of the tensors of the graph's inputs.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: list[Match] = []
    calls: Counter[str] = Counter()
    for node in graph.nodes:
        match = _match(node, order, kinds)
        if match is not None:
            calls[match.name] += 1
            number = calls[match.name]
            found.append(replace(match, name=f"{match.name} ({number})") if number > 1 else match)
    return found


def chains(matches: Sequence[Match]) -> Iterator[tuple[Match, list[Match]]]:
    """Join matches that follow each other to chains, each with its members, the longest first.

    Each match takes the result of the one before it. No other node uses that result, except a flatten, or a dropout
    that does nothing. The convolutions at the start of a row are a chain too.
    """
    for row in _rows(matches):
        convolutions = [match for match in row if match.operator == CONV]
        for members in (row, convolutions) if 0 < len(convolutions) < len(row) else (row,):
            chain = _chain(members)
            if chain is not None:
                yield chain, members


def _rows(matches: Sequence[Match]) -> list[list[Match]]:
    found: list[list[Match]] = []
    for match in matches:
        if match.refusal is not None or match.links is None or _value(match.input).dim() != _DIM[match.operator]:
            continue
        row = next((row for row in found if _between(match, row[-1]) is not None), None)
        if row is None:
            found.append([match])
        else:
            row.append(match)
    return found


_DIM = {CONV: 4, LINEAR: 2, LAST: 2}


def _between(match: Match, earlier: Match) -> list[fx.Node] | None:
    """The nodes between one match's result and the next one's input; None if the next does not follow."""
    if earlier.operator == LAST or (match.operator == CONV and earlier.operator != CONV):
        return None
    path: list[fx.Node] = []
    source, own = match.input, (*earlier.nodes, *match.nodes)
    while source is not earlier.result:
        given = source.args[0] if source.args else None
        # A flatten of a linear map's rows would give another matrix.
        flattens = source.target in _FLATTENS and earlier.operator == CONV and _same_rows(source, earlier.result)
        if not (flattens or _does_nothing(source)) or not isinstance(given, fx.Node) or len(source.users) > 1:
            return None
        path.append(source)
        source = given
    allowed = {*own, *path}
    return path[::-1] if all(user in allowed for user in earlier.result.users) else None


def _same_rows(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node flattens each image of `source` to a row."""
    rows, images = _value(node), _value(source)
    sizes = [size for size in images.shape[1:] if isinstance(size, int)]
    return rows.dim() == 2 and len(sizes) == 3 and isinstance(rows.shape[1], int) and rows.shape[1] == math.prod(sizes)


def _does_nothing(node: fx.Node) -> bool:
    """Whether a node is a dropout in eval mode."""
    return _STAGES.get(node.target) == _NOTHING and _given(node, _NOTHING).get("training", True) is False


def _chain(members: Sequence[Match]) -> Match | None:
    """Join members of a row to one match; None if there is nothing to join, or a node in between prevents it."""
    if len(members) < 2:
        return None
    nodes = list(members[0].nodes)
    for earlier, later in itertools.pairwise(members):
        nodes += [*(_between(later, earlier) or ()), *later.nodes]
    parameters = [operand for match in members for operand in match.operands[1:3]]
    links = tuple(link for match in members for link in match.links or ())
    order = {node: index for index, node in enumerate(nodes[0].graph.nodes)}
    norms = tuple(match.norms[0] for match in members)
    late = [node for node in (*parameters, *(part for norm in norms for part in (norm or ())[:4])) if node is not None]
    nodes.sort(key=order.__getitem__)
    name = " > ".join(match.name for match in members)
    operands = members[0].input, parameters, links
    chain = Match(name, CHAIN, tuple(nodes), members[-1].result, operands, norms=norms)
    return chain if _disturbed(chain, late, order) is None else None


def _geometry(options: Mapping[str, Any], weight: Tensor) -> ConvPoolGeometry | None:
    """The geometry of a convolution's and a pool's options; None for uneven padding."""
    names = [name for name in ConvPoolGeometry._fields if name not in ("groups", "ceil_mode")]
    given: dict[str, Any] = {name: 0 if name.endswith("padding") else 1 for name in names} | dict(options)
    given["pool_stride"] = options.get("pool_stride") or options["pool_size"]
    if isinstance(given["padding"], str):
        dilation = pair(CONV, "dilation", given["dilation"])
        kernel = [1, 1] if given["padding"] == "valid" else map(int, weight.shape[2:])
        total = [reach * (size - 1) for reach, size in zip(dilation, kernel, strict=True)]
        if total[0] % 2 or total[1] % 2:
            return None
        given["padding"] = total[0] // 2, total[1] // 2
    sizes = {name: pair(CONV, name, given[name]) for name in names}
    return ConvPoolGeometry(groups=options.get("groups", 1), ceil_mode=options.get("ceil_mode", False), **sizes)


def _match(first: fx.Node, order: Mapping[fx.Node, int], kinds: Mapping[fx.Node, type]) -> Match | None:
    start = _start(first)
    if start is None:
        return None
    wanted = {_RELU, _POOL} if start.operator == CONV else {_RELU}
    nodes, problems = [first], [start.refusal]
    options, norm = dict(start.options), None
    done: list[str] = []
    result = first
    while set(done) != wanted:
        users = sorted((user for user in result.users if user not in nodes), key=order.__getitem__)
        step = next(((user, stage) for user in users if (stage := _stage(user, result))), None)
        if step is None:
            alone = start.operator == LINEAR and start.refusal is None
            return replace(start, operator=LAST, name=_place(first)) if alone else None
        node, stage = step
        if stage in done or (stage == _POOL and _POOL not in wanted):
            return None
        given = _given(node, stage)
        # A relu in place as a statement changes the value that later nodes read under the old name.
        statement = stage == _RELU and not node.users and _in_place(node, given)
        others = [user for user in (users[: users.index(node)] if statement else users) if user is not node]
        if others:
            names = ", ".join("the output" if user.op == "output" else user.name for user in others)
            problems.append(f"the result of {result.name} is used by {names} too")
        if stage == _NORM:
            if start.operator != CONV or done or norm is not None:
                return None
            momentum = None if given.get("training", False) is False else given.get("momentum", 0.1)
            mean, variance, scale, shift = (given.get(name) for name in _ARGUMENTS[_NORM][1:5])
            norm = Norm(mean, variance, scale, shift, given.get("eps", 1e-5), momentum)
            problems += _norm_problems(node, given)
        elif stage == _NOTHING and given.get("training", True) is not False:
            problems.append(f"{_place(node)} drops out, in training mode")
        elif stage == _POOL:
            problems += _pool_problems(node, given, _RELU in done)
            options.update(
                pool_size=given.get("kernel_size"),
                pool_stride=given.get("stride"),
                pool_padding=given.get("padding", 0),
                pool_dilation=given.get("dilation", 1),
                ceil_mode=given.get("ceil_mode", False),
            )
        nodes.append(node)
        result = result if statement else node
        if stage in wanted:
            done.append(stage)
    name = " > ".join(_place(node) for node in nodes)
    match = replace(start, name=name, nodes=tuple(nodes), options=options, norms=(norm,), result=result)
    # The call stands where the first node stood, so that only what is read later can have changed until then.
    late = [operand for operand in norm[:4] if operand is not None] if norm and norm.momentum is None else ()
    problems += [*_operand_problems(match, kinds), _disturbed(match, late, order)]
    refusal = next((problem for problem in problems if problem), None)
    if norm is None or norm.momentum is None or refusal is not None:
        return replace(match, refusal=refusal)
    pooling = {name: value for name, value in options.items() if name.startswith(("pool", "ceil"))}
    settings = NormSettings(norm.momentum, norm.eps, _geometry(pooling, _value(start.operands[1])))
    return replace(match, operator=NORM, options={"settings": settings, "relaid": _may_be_relaid(start)})


def _may_be_relaid(convolution: Match) -> bool:
    """Whether a convolution is as safe and as accurate in channels_last as in the plain layout.

    There oneDNN adds all products of a number in one sequence, and with groups the errors of the weight's gradient were
    up to six times as large. A strided kernel that is one pixel wide has a gradient that is written beyond its memory.
    """
    filters, channels, *kernel = _value(convolution.operands[1]).shape
    strides = private.tree_leaves(convolution.options.get("stride", 1))
    widest = max(filters, channels) if _value(convolution.input).requires_grad else channels
    return (
        convolution.options.get("groups", 1) == 1
        and widest * math.prod(kernel) <= LONG_SUM
        and (min(kernel) > 1 or max(strides) == 1)
    )


LONG_SUM = 288
"""Products of a sum up to which its error in channels_last is below twice that in the plain layout (measured: 1.3)."""


def _start(node: fx.Node) -> Match | None:
    """What begins at a node: a convolution, a linear map or an addmm."""
    kind = _STARTS.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None:
        return None
    names, given = _ARGUMENTS[kind], _given(node, kind)
    operands = tuple(given.pop(name, None) for name in names[:3])
    if not all(isinstance(operand, fx.Node) for operand in operands[: 3 if kind == ADDMM else 2]):
        return None
    refusal = _computed(node, given)
    if set(given) - set(names) - {"beta", "alpha"} or len(node.args) > len(names):
        refusal = f"{node.name} is called with other arguments than expected"
    return Match("", kind, (node,), node, operands, given, refusal=refusal)


def _stage(node: fx.Node, source: fx.Node) -> str | None:
    """The kind of a node that takes the result of `source`; None if a site cannot contain it."""
    if node.op not in ("call_function", "call_method"):
        return None
    stage = _STAGES.get(node.target)
    return stage if stage is not None and _given(node, stage).get("input") is source else None


def _given(node: fx.Node, kind: str) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(_ARGUMENTS[kind], node.args, strict=False)), **node.kwargs}


def _in_place(node: fx.Node, given: Mapping[str, Any]) -> bool:
    return node.target in (torch.relu_, "relu_") or bool(given.get("inplace"))


def _norm_problems(node: fx.Node, given: Mapping[str, Any]) -> Iterator[str | None]:
    if _value(node).dim() != 4:
        yield "BatchNorm of an unbatched image takes its rows for channels"
    yield _computed(node, {name: given[name] for name in ("training", "momentum", "eps") if name in given})


def _pool_problems(node: fx.Node, pool: Mapping[str, Any], after_relu: bool) -> Iterator[str | None]:
    if pool.get("return_indices") or node.target is F.max_pool2d_with_indices:
        yield "the max-pool returns indices"
    yield _computed(node, pool)
    if not after_relu and _any(pool.get("padding"), 0) and _any(pool.get("dilation"), 1):
        # Only then can a window lie wholly in the padding. Stock's order gives relu(-inf) = 0, the fused order -inf.
        yield "relu follows a max-pool with both padding and dilation"


def _any(value: Any, default: int) -> bool:
    """Whether an option, an int or a pair, differs from its default."""
    return value is not None and any(leaf != default for leaf in private.tree_leaves(value))


def _computed(node: fx.Node, given: Mapping[str, Any]) -> str | None:
    """Whether some of a call's options are known only when it runs."""
    for name, value in given.items():
        if name != "input" and any(isinstance(leaf, (fx.Node, torch.SymInt)) for leaf in private.tree_leaves(value)):
            return f"the argument {name!r} of {node.name} is computed in the forward"
    return None


def _operand_problems(match: Match, kinds: Mapping[fx.Node, type]) -> Iterator[str | None]:
    """Why a fused operator cannot take these tensors: a type with its own operators, another dtype or layout."""
    operands = [operand for operand in (*match.operands, *(match.norms[0] or ())[:4]) if isinstance(operand, fx.Node)]
    for operand in operands:
        value, kind = _value(operand), kinds.get(operand, Tensor)
        if not isinstance(value, Tensor):
            yield f"the operand {operand.name} is not a tensor"
        elif kind not in _PLAIN or type(value).__name__ not in ("FakeTensor", "Tensor", "Parameter"):
            other = kind if kind not in _PLAIN else type(value)
            yield f"its parameters are of type {other.__name__}"
        elif value.layout is not torch.strided or value.dtype not in (*selection.TRITON_DTYPES, torch.float64):
            yield f"the operand {operand.name} is of dtype {value.dtype} and layout {value.layout}"


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _disturbed(match: Match, late: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> str | None:
    """Why a node between a match's first and last one forbids computing all of it at the first; else None."""
    first, last = order[match.nodes[0]], order[match.nodes[-1]]
    late = tuple(late)
    if any(order[operand] > first for operand in late):
        return "an operand is computed after the site has begun"
    for node, index in order.items():
        if first < index < last and node not in match.nodes:
            if _switches(node):
                return f"{node.name} stands in between, which may switch gradients or autocast"
            if late and _mutates(node):
                return f"{node.name} stands in between, which may change an operand"
    return None


def _switches(node: fx.Node) -> bool:
    """Whether a node neither takes nor returns a tensor or a number, so that its purpose is to change a state."""
    known = [source for source in node.all_input_nodes if _value(source) is not None]
    return node.op == "call_function" and _value(node) is None and not known


def _mutates(node: fx.Node) -> bool:
    """Whether a node may change one of its arguments."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    stage = _STAGES.get(node.target) if node.op != "get_attr" else None
    if stage in (_RELU, _NOTHING) and _in_place(node, _given(node, stage)):
        return True
    spelled = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "__setitem__")
    written = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    in_place = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i") and name != "index"
    overloads: list[Any] = [node.target] if isinstance(node.target, private.OpOverload) else []
    if isinstance(node.target, private.OpOverloadPacket):
        overloads = [getattr(node.target, name) for name in node.target.overloads()]
    opaque = isinstance(node.target, private.HigherOrderOperator) or any(o._schema.is_mutable for o in overloads)
    return node.op != "get_attr" and (spelled or written or in_place or opaque)


def writes_to_input(node: fx.Node) -> bool:
    """Whether a node may change an input of its graph, other than by an operator of torch.nn.functional."""
    return any(source.op == "placeholder" for source in node.all_input_nodes[:1]) and _mutates(node)


def _value(node: Any) -> Any:
    """The tensor without data, or the number, that Dynamo computed for a node; else None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def hint(size: Any) -> int | None:
    """A size as a number, without making Dynamo's graph depend on it; None if it is not known."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def describe(value: Tensor) -> str:
    """Format shape and dtype."""
    shape = "x".join("?" if size is None else str(size) for size in map(hint, value.shape)) or "scalar"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"


def _place(node: fx.Node) -> str:
    """The origin of a node: the path of a stock layer, or a function's name after the path of its module."""
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return function
    path, kind = re.sub(r"^L\['\w+'\]\.?", "", stack[-1][0]), stack[-1][1]
    if not path:
        return function
    own = getattr(kind, "__module__", "").startswith("torch.nn.") and "container" not in kind.__module__
    return path if own else f"{path}.{function}"


def fold(epsilons: Sequence[float], *tensors: Tensor | None) -> Sequence[Tensor]:
    """Weight and bias of each convolution that equals a convolution followed by BatchNorm in eval mode.

    Computed anew at every call, so that they always follow the parameters and autograd reaches them. A compiled kernel
    does it where no gradient is asked for: stock's ten operators take as long as a convolution of one image.

    Args:
        epsilons: of each BatchNorm.
        tensors: for each of them the convolution's weight and bias, running mean and variance, weight and bias.
    """
    if selection.backend() in ("auto", "cpu") and selection.unwatched() and cpu.fold_covers(tensors):
        with contextlib.suppress(KernelError):
            return cpu.fold(epsilons, tensors)
    each = len(tensors) // len(epsilons)
    return [tensor for i, eps in enumerate(epsilons) for tensor in _folded(eps, *tensors[each * i : each * (i + 1)])]


def _folded(
    eps: float,
    weight: Any,
    bias: Tensor | None,
    mean: Any,
    variance: Any,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = weight.dtype
    if variance.dtype in (torch.float16, torch.bfloat16):
        # In 16 bits eps could be lost, and then a small variance could not be told from zero.
        variance = variance.float()
    factor = torch.rsqrt(variance + eps)
    if scale is not None:
        factor = factor * scale
    offset = -mean if bias is None else bias - mean
    offset = offset * factor if shift is None else torch.addcmul(shift, offset, factor)
    return (weight * factor.view(-1, 1, 1, 1)).to(dtype), offset.to(dtype)


def lay_out(input: Tensor, layout: torch.memory_format) -> Tensor:
    """Return ``input.to(memory_format=layout)``, by a compiled kernel if it is faster.

    The gradient has the input's layout, as that of a stock convolution has: the gradient of ``to`` would keep another.
    Where no kernel may run, the input stays as it is, and stock operators find the layout that they expect.
    """
    if selection.backend() not in ("auto", "cpu") or not selection.unwatched() or private.is_batched(input):
        return input
    if input.requires_grad and torch.is_grad_enabled() and memory_format(input) != layout:
        laid_out: Tensor = _LayOut.apply(input, layout)
        return laid_out
    return _laid_out(input, layout)


def _laid_out(input: Tensor, layout: torch.memory_format) -> Tensor:
    if cpu.lay_out_covers(input, layout):
        with contextlib.suppress(KernelError):
            return cpu.lay_out(input, layout)
    # `contiguous` would keep the strides of a single channel, by which a convolution tells layouts apart.
    return input.to(memory_format=layout)


class _LayOut(torch.autograd.Function):
    """A change of layout, and back in the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.before = memory_format(input)
        return _laid_out(input, layout)

    @staticmethod
    @private.runs_eagerly
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return lay_out(grad_output, ctx.before), None


def batch_norm_relu_max_pool2d(
    momentum: float, eps: float, geometry: ConvPoolGeometry, *tensors: Tensor | None
) -> Tensor:
    """Compute a `NORM`; the tensors are a convolution's result, running statistics, weight and bias."""
    return selection.run(ops.BATCH_NORM_RELU_MAX_POOL2D, NormSettings(momentum, eps, geometry), *tensors)


def replace_all(graph: fx.Graph, taken: Iterable[Match]) -> None:
    """Replace matches by fused calls, in place."""
    fused: dict[fx.Node, fx.Node] = {}
    for match in taken:
        # The result of an earlier match may be an operand.
        fused[match.result] = _replace(graph, match, lambda node: fused.get(node, node))


def isolate(match: Match, fused: bool) -> fx.GraphModule:
    """Make a module of the match alone, with inputs in the order of `Match.inputs`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in match.inputs()}
    for node in match.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[match.result])
    if fused:
        _replace(graph, match, copies.__getitem__)
    return fx.GraphModule(nn.Module(), graph)


def _replace(graph: fx.Graph, match: Match, copy: Callable[[fx.Node], fx.Node]) -> fx.Node:
    nodes, result = [copy(node) for node in match.nodes], copy(match.result)
    fused = (_norm_call if match.operator == NORM else _fused_call)(graph, match, nodes, copy)
    fused.meta["example_value"] = _value(match.result)
    result.replace_all_uses_with(fused)
    # The convolution in front of a BatchNorm stays.
    for node in reversed(nodes[1 if match.operator == NORM else 0 :]):
        graph.erase_node(node)
    return fused


def _fused_call(graph: fx.Graph, match: Match, nodes: list[fx.Node], copy: Callable[[fx.Node], fx.Node]) -> fx.Node:
    # Before the first node, not at the last: nodes in between may change the input in place.
    with graph.inserting_before(nodes[0]):
        tensors = list(fx.node.map_arg(match.tensors, copy))
        norms = [(1 + 2 * index, norm) for index, norm in enumerate(match.norms) if norm is not None]
        if norms:
            given: list[Any] = [tuple(norm.eps for _, norm in norms)]
            for place, norm in norms:
                given += *tensors[place : place + 2], *fx.node.map_arg(norm[:4], copy)
            folded = graph.call_function(fold, tuple(given))
            for number, (place, _) in enumerate(norms):
                for part in (0, 1):
                    tensors[place + part] = graph.call_function(operator.getitem, (folded, 2 * number + part))
        operands = (tensors[0], tensors[1:], match.links) if match.operator == CHAIN else tuple(tensors)
        return graph.call_function(getattr(functional, match.operator), operands, dict(match.options))


def _norm_call(graph: fx.Graph, match: Match, nodes: list[fx.Node], copy: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Call BatchNorm, relu and pool, and let the convolution in front of them run in channels_last if it may.

    Each new node stands where the stock one stood that reads the same tensors.
    """
    convolution, norm, *_ = nodes
    plain = memory_format(_value(match.nodes[0])) == torch.contiguous_format  # else it runs in channels_last by itself
    operands = [copy(operand) for operand in match.operands[:2] if plain and match.options["relaid"]]
    with graph.inserting_before(convolution):
        relaid = {operand: _relaid(graph, _as_computed(operand), torch.channels_last) for operand in operands}
    convolution.args = fx.node.map_arg(convolution.args, lambda node: relaid.get(node, node))
    convolution.kwargs = fx.node.map_arg(convolution.kwargs, lambda node: relaid.get(node, node))
    for operand in operands:
        if _as_computed(operand) is not operand and not operand.users:
            graph.erase_node(operand)
    with graph.inserting_before(norm):
        tensors = fx.node.map_arg((match.norms[0] or ())[:4], copy)
        input = convolution if operands else _relaid(graph, convolution, torch.channels_last)
        fused = graph.call_function(batch_norm_relu_max_pool2d, (*match.options["settings"], input, *tensors))
        if memory_format(_value(match.result)) == torch.contiguous_format:
            fused = _relaid(graph, fused, torch.contiguous_format)
    return fused


def _relaid(graph: fx.Graph, node: fx.Node, layout: torch.memory_format) -> fx.Node:
    return graph.call_function(lay_out, (node, layout))


def _as_computed(node: fx.Node) -> fx.Node:
    """The node whose result this one only lays out anew."""
    if node.target is lay_out and node.args[1] is torch.contiguous_format:
        (source, _) = node.args
        assert isinstance(source, fx.Node)
        return source
    return node
