"""What every operator shares: the library that registers it, and what `fastlenet.selection` must know of it.

A call takes one of three forms. By *composition* stock's own operators compute it, with stock's derivatives. By
*kernels* an operator's Function calls an implementation that was chosen once. By its *registered operator*,
``torch.ops.fastlenet.*``, it stays whole for compilers, exporters and dispatch modes; the choice is then made when the
operator runs.
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

# The package's own name, so that a copy of it under another name has operators of its own, beside these.
NAMESPACE = "_".join(__name__.split(".")[:-2])
library = torch.library.Library(NAMESPACE, "DEF")
operators = getattr(torch.ops, NAMESPACE)
implementations: dict[str, Callable[..., Any]] = {}
"""What runs where a registered operator is called, by its name."""

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_transforms_active = torch._C._are_functorch_transforms_active


class Registered(NamedTuple):
    """How a registered operator runs.

    Attributes:
        call: from its arguments makes settings and operands, and tells whether a backward will follow.
        run: from what is known of such a call, and the arguments, makes the results.
    """

    call: Callable[..., tuple[Any, tuple[Any, ...], bool]]
    run: Callable[..., Any]


class Operator(ABC):
    """What `fastlenet.selection` must know of an operator.

    Tensors are the call's operands in order, `settings` all its other arguments: one value that can be a key.

    Attributes:
        name: of the operator, in messages.
        main: which operand the log describes.
        traceable: whether torch.jit.trace can record the registered operator; else it records the parts.
    """

    name: str
    main: int = 0
    traceable: bool = True

    def operands(self, *tensors: Any) -> tuple[Any, ...]:
        """Return the operands as the library's rule takes them."""
        return tensors

    @abstractmethod
    def check(self, settings: Any, *tensors: Any) -> None:
        """Raise, as stock does, if the operands do not fit each other or the settings."""

    @abstractmethod
    def composition(self, settings: Any, *tensors: Any, run: Callable[..., Tensor] | None = None) -> Tensor:
        """Compute a call by stock's operators; where `run` is given, it takes each of the call's parts."""

    def small_composition(self, settings: Any, *tensors: Any) -> Callable[..., Tensor] | None:
        """Return what is faster than `composition` for few plain float32 images on a CPU; None if nothing is."""
        return None

    @abstractmethod
    def fused(self, settings: Any, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        """Compute a call by kernels that are `known`, or by the registered operator where that is None."""

    @abstractmethod
    def uncovered(self, implementation: str, settings: Any, *tensors: Any) -> str | None:
        """Why no kernel of ``"triton"`` or ``"cpu"`` covers a call whose dtype they cover; None if one does."""

    def slower(self, settings: Any, differentiable: bool, *tensors: Any) -> str | None:
        """Why the compiled CPU kernels would be slower than stock's operators; None if they are expected to win."""
        return None

    @abstractmethod
    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return an implementation's forward and backward; `library`: one multiplies the matrices of linear maps."""

    def parts(self, settings: Any, *tensors: Any) -> Iterator[tuple[Operator, Any, tuple[Any, ...]]]:
        """Yield the calls of other operators that a call is made of, with tensors of the right shapes."""
        yield from ()

    @abstractmethod
    def registered(self) -> dict[str, Registered]:
        """Return, by name, what the registered operators do once an implementation is chosen."""


def define(schema: str, fake: Callable[..., Any], flops: Callable[..., int]) -> None:
    """Make an operator known to PyTorch: its schema, its shape function, and its cost to FlopCounterMode.

    Args:
        schema: as `torch.library.Library.define` takes it.
        fake: from tensors without memory makes results without memory.
        flops: from the operands' shapes counts what `torch.utils.flop_counter` counts for stock's operators.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    packet = getattr(operators, name)
    _when_imported("torch.utils.flop_counter", lambda module: module.register_flop_formula(packet)(flops))


def _when_imported(name: str, then: Callable[[Any], Any]) -> None:
    """Call `then` with a module once it is there: importing this one loads triton, which few programs need."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and is told when it has been executed."""

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

    Both have acted before: autograd is the Function's, and `fastlenet.functional` has cast; a second cast inside would
    change a backward's dtype.
    """
    implementations[name] = function

    def below_autograd(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch._C._AutoDispatchBelowAutograd(), no_autocast(device):
            return function(*args)

    library.impl(name, below_autograd, "CompositeExplicitAutograd")


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Leave autocast for a while, where it is on."""
    enabled = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def or_empty(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Stand an empty tensor in for each None: an operator must return tensors."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def shaped(output: Tensor, shape: Sequence[int], known: Any) -> Tensor:
    """Give a kernel's output another shape, in place: a view would not let its user modify it, as stock's does."""
    if known is None:
        view = output.reshape(shape)
        return view if torch.compiler.is_compiling() else view.clone()
    return output.squeeze_(0) if output.shape[1:] == shape else output.resize_(shape)


def composed_backward(grad_output: Tensor) -> bool:
    """Whether a Function's backward is to be plain operators: it is differentiated in turn, or mapped."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or _transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        # torch.autograd.grad(is_grads_batched=True) maps by a kind of tensor that nothing else tells.
        or _is_batched(grad_output)
    )
