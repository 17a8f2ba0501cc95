"""Code that all operators share: the library that registers them, and the facts that `fastlenet.selection` needs.

A call takes one of three forms. As a *composition*, stock operators compute it, with stock's derivatives. As *kernels*,
the operator's Function calls the implementation that was chosen for its kind. As a *registered operator*,
``torch.ops.fastlenet.*``, it is one node for compilers, exporters and dispatch modes, and the implementation is chosen
when the node runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlenet import private
from fastlenet.errors import KernelError

# The package's own name, so that a copy under another name registers other operators.
NAMESPACE = "_".join(__name__.split(".")[:-2])
library = torch.library.Library(NAMESPACE, "DEF")
operators = getattr(torch.ops, NAMESPACE)
implementations: dict[str, Callable[..., Any]] = {}
"""By the name of a registered operator, the function that runs it."""


class Registered(NamedTuple):
    """How a registered operator runs.

    Attributes:
        call: from the arguments returns settings, operands and whether a backward will follow.
        run: from the entry of such a call, and the arguments, returns the results.
    """

    call: Callable[..., tuple[Any, tuple[Any, ...], bool]]
    run: Callable[..., Any]


class Operator(ABC):
    """The facts of an operator that `fastlenet.selection` needs.

    `tensors` are a call's operands in order. `settings` are all its other arguments, as one value that can be a key.

    Attributes:
        name: of the operator, in messages.
        main: which operand the log describes.
        traceable: whether torch.jit.trace can record the registered operator; otherwise it records the parts.
    """

    name: str
    main: int = 0
    traceable: bool = True

    def operands(self, *tensors: Any) -> tuple[Any, ...]:
        """Return the operands as the library's rule takes them."""
        return tensors

    @abstractmethod
    def check(self, settings: Any, *tensors: Any) -> None:
        """Raise stock's error if the operands do not fit each other or the settings."""

    @abstractmethod
    def composition(self, settings: Any, *tensors: Any, run: Callable[..., Tensor] | None = None) -> Tensor:
        """Compute a call with stock operators, or each of its parts with `run` if that is given."""

    def quick(self, settings: Any, *tensors: Any) -> Tensor:
        """Compute a call of plain tensors on a CPU with stock operators, in the order that is fastest there."""
        return self.composition(settings, *tensors)

    @abstractmethod
    def fused(self, settings: Any, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        """Compute a call with the kernels of the entry `known`, or with the registered operator if that is None."""

    @abstractmethod
    def uncovered(self, implementation: str, settings: Any, *tensors: Any) -> str | None:
        """Why kernels of ``"triton"`` or ``"cpu"`` do not cover a call of a dtype that they cover; None if they do."""

    def slower(self, settings: Any, differentiable: bool, *tensors: Any) -> str | None:
        """Why the compiled CPU kernels would be slower than stock operators; None if they are expected to win."""
        return None

    @abstractmethod
    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return an implementation's forward and backward; with `library`, a library computes linear maps."""

    def parts(self, settings: Any, *tensors: Any) -> Iterator[tuple[Operator, Any, tuple[Any, ...]]]:
        """Yield the calls of other operators that this call consists of, with tensors of the right shapes."""
        yield from ()

    def registered(self) -> dict[str, Registered]:
        """Return, by name, how the operators that graphs have run once an implementation is chosen."""
        return {}


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Make an operator known to PyTorch: its schema, and its shape function.

    Args:
        schema: as `torch.library.Library.define` takes it.
        fake: from tensors without memory returns results without memory.
    """
    library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{schema.partition('(')[0]}", fake, lib=library)


def count_flops(operator: Operator) -> None:
    """Let `torch.utils.flop_counter` count as many FLOPs for the registered operators as for the composition.

    The formulas are registered once another import loads it. It imports triton, which few programs need.
    """

    def register(module: Any) -> None:
        for name, registered in operator.registered().items():
            formula = functools.partial(_flops, operator, registered, name.endswith("_backward"))
            module.register_flop_formula(getattr(operators, name), get_raw=True)(formula)

    class Finder(importlib.abc.MetaPathFinder):
        """Lets the other finders find the module, and registers the formulas after it was executed."""

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name != _COUNTER:
                return None
            sys.meta_path.remove(self)
            spec: Any = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register
            return spec

    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, Finder())


_COUNTER = "torch.utils.flop_counter"


def _flops(operator: Operator, registered: Registered, backward: bool, *args: Any, **_: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    settings, operands, _differentiable = registered.call(*args)
    needs = args[-1] if backward else [False] * len(operands)
    tensors = [
        None if tensor is None else torch.empty_like(tensor, device="meta", requires_grad=needed)
        for tensor, needed in zip(operands, needs, strict=True)
    ]
    with torch.overrides.enable_reentrant_dispatch(), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        output = operator.composition(settings, *tensors)
        forward = counter.get_total_flops()
        if not backward:
            return forward
        wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        torch.autograd.grad(output, wanted, torch.empty_like(output))
    return counter.get_total_flops() - forward


def implement(name: str, function: Callable[..., Any]) -> None:
    """Let `function` run where the registered operator is called, with autograd and autocast off inside.

    Both have acted before: the Function is autograd's part, and `fastlenet.functional` has cast. A second cast would
    change the dtype of a backward.
    """
    implementations[name] = function

    @private.runs_eagerly
    def below_autograd(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with private.below_autograd(), no_autocast(device):
            return function(*args)

    library.impl(name, below_autograd, "CompositeExplicitAutograd")


def decomposition(operator: Operator, registered: Registered) -> Callable[..., Any]:
    """Return a function of a registered operator's arguments that computes it by plain ATen operators."""
    forward, backward = operator.implementation("aten")
    return functools.partial(registered.run, SimpleNamespace(forward=forward, backward=backward))


def differentiate_again(name: str, function: Callable[..., Any]) -> None:
    """Let `function` compute a registered backward that is itself differentiated.

    TorchDynamo's graph of a Function calls the backward as a registered operator. It has no derivatives of its own, so
    that second derivatives would be lost without a word.
    """

    @private.runs_eagerly
    def above_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(getattr(leaf, "requires_grad", False) for leaf in private.tree_leaves(args)):
            with no_autocast(args[0].device.type):
                return function(*args)
        with private.below_autograd():
            return getattr(operators, name)(*args)

    library.impl(name, above_autograd, "Autograd")


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off for a while, if it is on."""
    enabled = private.any_autocast() and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def or_empty(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Replace each None by an empty tensor, because an operator must return tensors."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def shaped(output: Tensor, shape: Sequence[int], known: Any) -> Tensor:
    """Give a kernel's output another shape, in place, because a view could not be modified in place by the user.

    It is laid out plainly then: stock's pool has no channels_last for an unbatched image.
    """
    if known is None:
        view = output.reshape(shape)
        if torch.compiler.is_compiling():
            return view.contiguous()
        return view.clone(memory_format=torch.contiguous_format)
    return output.squeeze_(0).contiguous() if output.shape[1:] == shape else output.resize_(shape)


HELD, SAVED, VIEW = range(3)
"""How a Function keeps an operand.

Stock's operators do not save a `HELD` one, so the user may modify it: kernels do not read its values. They do save a
`SAVED` one: after a modification the backward raises. Of a `VIEW` they save a view, which keeps its values also if the
operand's `data` becomes another tensor.
"""


def keep(ctx: Any, operands: Sequence[Any], ways: Sequence[int], *others: Tensor) -> None:
    """Keep operands for a backward that kernels compute, each in its way, and other tensors."""
    saved = [t.detach() if way == VIEW else t for t, way in zip(operands, ways, strict=True) if way]
    ctx.save_for_backward(*saved, *others)
    held = [None if way == SAVED else t for t, way in zip(operands, ways, strict=True)]
    ctx.kept = ways, held, _versions(held)


def kept(ctx: Any, composed: bool = False) -> list[Any]:
    """Return what `keep` was given, with the values that the forward saw.

    With `composed` plain operators go on from the operands themselves, whose values and graphs they all read.

    Raises:
        RuntimeError: if they would read what was modified.
    """
    ways, held, versions = ctx.kept
    found = iter(ctx.saved_tensors)
    seen = [next(found) if way else t for t, way in zip(held, ways, strict=True)]
    if composed:
        views = [(t, s) for t, s, way in zip(held, seen, ways, strict=True) if way == VIEW]
        if versions != _versions(held) or any(t.data_ptr() != s.data_ptr() for t, s in views):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation, or "
                "its data became another tensor: derivatives of higher order compute the forward again"
            )
        seen = [s if t is None else t for t, s in zip(held, seen, strict=True)]
    return [*seen, *found]


def _versions(tensors: Sequence[Any]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def gradients(
    known: Any,
    grad_output: Tensor,
    kernels: Callable[[], Sequence[Tensor | None]],
    recorded: Callable[[], Sequence[Tensor | None]],
    composed: Callable[[], Sequence[Tensor | None]],
) -> Sequence[Tensor | None]:
    """Compute a Function's gradients in one of three ways.

    Args:
        known: the entry of the call; None in a graph.
        grad_output: the gradient of the output.
        kernels: computes them by the kernels of the entry.
        recorded: computes them by the registered operator.
        composed: computes them by plain operators: if they are themselves differentiated, or a kernel fails.
    """
    if not composed_backward(grad_output):
        if known is None:
            return recorded()
        try:
            return kernels()
        except KernelError:
            known.give_up()
    with no_autocast(grad_output.device.type):
        return composed()


def composed_backward(grad_output: Tensor) -> bool:
    """Whether a Function's backward must consist of plain operators, because it is itself differentiated or mapped."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or private.transforms_active()
        or private.forward_mode()
        # torch.autograd.grad(is_grads_batched=True) maps with a kind of tensor that only this test finds.
        or private.is_batched(grad_output)
    )
