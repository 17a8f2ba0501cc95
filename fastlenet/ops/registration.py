"""Code that all operators share: the library that registers them, and the facts that `fastlenet.selection` needs.

A call takes one of three forms. As a *composition*, stock operators compute it, with stock's derivatives. As *kernels*,
the operator's Function calls the implementation that was chosen for its kind. As a *registered operator*,
``torch.ops.fastlenet.*``, it is one node for compilers, exporters and dispatch modes, and the implementation is chosen
when the node runs.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlenet import private

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

    def small_composition(self, settings: Any, *tensors: Any) -> Callable[..., Tensor] | None:
        """Return what is faster than `composition` for few plain float32 images on a CPU; None if nothing is."""
        return None

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


def define(schema: str, fake: Callable[..., Any], flops: Callable[..., int]) -> None:
    """Make an operator known to PyTorch: its schema, its shape function, and its cost to FlopCounterMode.

    Args:
        schema: as `torch.library.Library.define` takes it.
        fake: from tensors without memory returns results without memory.
        flops: from the operands' shapes returns the FLOPs that `torch.utils.flop_counter` counts for stock operators.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    packet = getattr(operators, name)
    _when_imported("torch.utils.flop_counter", lambda module: module.register_flop_formula(packet)(flops))


def _when_imported(name: str, then: Callable[[Any], Any]) -> None:
    """Call `then` with a module when another import loads it. It imports triton, which few programs need."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that lets the other finders find a module, and calls a function after the module was executed."""

    def __init__(self, name: str, then: Callable[[Any], Any]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: Any) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def implement(name: str, function: Callable[..., Any]) -> None:
    """Let `function` run where the registered operator is called, with autograd and autocast off inside.

    Both have acted before: the Function is autograd's part, and `fastlenet.functional` has cast. A second cast would
    change the dtype of a backward.
    """
    implementations[name] = function

    def below_autograd(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with private.below_autograd(), no_autocast(device):
            return function(*args)

    library.impl(name, below_autograd, "CompositeExplicitAutograd")


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


class Guard(NamedTuple):
    """Which of a Function's operands are kept in which way, by their places.

    Attributes:
        saved: those that stock's operators save: after a modification the backward raises.
        held: the others, which the user may modify: kernels do not read their values.
    """

    saved: tuple[int, ...]
    held: tuple[int, ...]


def keep(ctx: Any, operands: Sequence[Any], guard: Guard, *others: Tensor) -> None:
    """Keep operands for a backward that kernels compute, and other tensors."""
    ctx.save_for_backward(*[operands[place] for place in guard.saved], *others)
    held = [operands[place] for place in guard.held]
    versions = [None if tensor is None or tensor.is_inference() else tensor._version for tensor in held]
    ctx.kept = guard, held, versions


def kept(ctx: Any, composed: bool = False) -> list[Any]:
    """Return what `keep` was given; `composed`: for plain operators, which read the values of everything.

    Raises:
        RuntimeError: if they would read what was modified.
    """
    guard, held, versions = ctx.kept
    found, count = ctx.saved_tensors, len(guard.saved)
    tensors = [None] * (count + len(held)) + list(found[count:])
    for place, tensor in zip(guard.saved, found, strict=False):
        tensors[place] = tensor
    for place, tensor in zip(guard.held, held, strict=True):
        tensors[place] = tensor
    for tensor, version in zip(held, versions, strict=True) if composed else ():
        if version is not None and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of size {list(tensor.shape)}, whose values derivatives of higher order need"
            )
    return tensors


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
