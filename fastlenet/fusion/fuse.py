"""`fuse`: the backend of ``torch.compile`` as one call on any module."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet import private, timing
from fastlenet.fusion import copies
from fastlenet.fusion.backend import Backend
from fastlenet.lenet import LeNet
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU
from fastlenet.selection import logger

MODES = ("training", "inference")
OWN = (ConvReLUMaxPool2d, LinearReLU, LeNet)
"""Modules that consist of fused operators already."""
_numbers = itertools.count()


class Fused:
    """The facts of a fused model. It is an attribute of the model, so that copies and pickles are fused too.

    Attributes:
        backend: compiles the model's graphs, and remembers sites and times.
        modes: the modes in which the model is compiled.
        notes: sentences for `explain`.
        refused: by mode, why the model runs unfused though it was compiled.
        compiled: what runs in its place; None if it is compiled in no mode.
    """

    def __init__(
        self, model: nn.Module, backend: Backend, modes: Sequence[str] = MODES, notes: Sequence[str] = ()
    ) -> None:
        self.model = weakref.ref(model)
        self.backend, self.modes, self.notes = backend, tuple(modes), list(notes)
        self.refused: dict[str, str] = {}
        self.compiled: Callable[..., Any] | None = None

    def install(self) -> Fused:
        """Make the model's ``__call__`` run the compiled model, and return these facts."""
        model = self.model()
        assert model is not None
        # Not with setattr: a model may override it, and a model that is being copied has no attributes yet.
        model.__dict__[copies.HANDLE] = self
        model.__dict__.pop("_compiled_call_impl", None)
        if self.modes:
            model.__dict__["_compiled_call_impl"] = self._entry(model)
        return self

    def _entry(self, model: nn.Module) -> Callable[..., Any]:
        compiler_error = private.dynamo_error()
        # Each model has its own limit of recompilations, if this PyTorch has such limits.
        limits: dict[str, Any] = {"isolate_recompiles": True}
        limits = limits if limits.keys() <= inspect.signature(torch.compile).parameters.keys() else {}
        self.compiled = compiled = torch.compile(_caller(model), backend=self.backend, **limits)
        plain = model._call_impl
        active = {training: mode in self.modes for training, mode in zip((True, False), MODES, strict=True)}
        recording, tracing, hooked = torch.is_grad_enabled, private.tracing_state, private.has_global_hook
        compiling, waiting = torch.compiler.is_compiling, True

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal waiting
            if compiling():
                return plain(*args, **kwargs)
            if waiting:
                waiting = _has_lazy(model)  # not before: a model that is being copied has no parameters yet
                if waiting:
                    # Dynamo would draw the weights while it captures, and would then set the random generator back.
                    return plain(*args, **kwargs)
            # Dynamo does not guard hooks on all modules, applies function modes twice, and torch.jit.trace refuses it.
            if not active[recording()] or hooked() or private.intercepted() or tracing() is not None:
                return plain(*args, **kwargs)
            # An error while capturing is the model's own, which it raises below when it runs as it is.
            private.quiet.on = True
            try:
                return compiled(*args, **kwargs)
            except compiler_error as error:
                reason = first_line(error)
            finally:
                private.quiet.on = False
            # Dynamo also reports the model's own errors, such as a wrong shape, as errors of Dynamo.
            result = plain(*args, **kwargs)
            active[recording()] = False
            mode = MODES[0 if recording() else 1]
            self.refused[mode] = f"TorchDynamo's graph cannot be used: {reason}"
            logger.warning("fuse leaves %s as it is in %s: %s", type(model).__name__, mode, self.refused[mode])
            return result

        return call

    def limit(self) -> str | None:
        """A sentence if PyTorch captures nothing more of this model; else None."""
        most = private.most_captures()
        if private.captures(self.compiled, self.backend.codes) < most:
            return None
        return (
            f"PyTorch has captured this model {most:.0f} times, its limit, and runs it unfused with other inputs and "
            "in other modes: raise torch.compiler.config.recompile_limit, then call torch.compiler.reset()"
        )

    def __reduce__(self) -> Any:
        return _restored, (self.model(), self.backend, self.modes, self.notes)


def _restored(*facts: Any) -> Fused:
    return Fused(*facts).install()


def _has_lazy(model: nn.Module) -> bool:
    """Whether a lazy module of the model has not seen its first input yet."""
    return any(map(torch.nn.parameter.is_lazy, itertools.chain(model.parameters(), model.buffers())))


def _caller(model: nn.Module) -> Callable[..., Any]:
    """A function that calls the model.

    Dynamo skips frames of ``torch.nn``, so it would not look into an ``nn.Sequential`` without such a function.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    # Dynamo counts recompilations by code object, and remembers by name which sizes have varied: one for each model.
    call.__code__ = call.__code__.replace(co_name=f"fused_model_{next(_numbers)}")
    return call


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or of the error that Dynamo wrapped."""
    text = str(getattr(error, "inner_exception", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def handle_of(model: nn.Module) -> Fused | None:
    """The facts that `fuse` keeps on a model, if the model itself was fused."""
    handle = vars(model).get(copies.HANDLE)
    return handle if isinstance(handle, Fused) and handle.model() is model else None


def unusable(model: nn.Module) -> str | None:
    """Why a model cannot be fused, whatever its forward; else None."""
    if isinstance(model, OWN):
        return "it is made of fused operators already"
    if isinstance(model, torch.jit.ScriptModule):
        return "it is scripted: fuse the model first"
    if hasattr(model, "_orig_mod"):
        return "it is compiled already: fuse first, then torch.compile"
    return None


def fuse(model: nn.Module, example_input: Any = None, *, inplace: bool = False) -> nn.Module:
    """Let fused operators compute a model's convolution-relu-max-pool and linear-relu sites.

    A site is a place in the forward where these operators follow each other. TorchDynamo captures the forward at the
    first call, fastlenet replaces the sites in the captured graph, and the graph runs eagerly. Dynamo's guards see
    later changes (an attribute, a hook, another layer, the mode of a part); then the model is captured again. The model
    keeps its class, its submodules, ``state_dict`` and hooks.

    A site stays as it is if fusing is not safe: a result in between is used elsewhere, or the max-pool returns indices.
    With BatchNorm in training mode it is fused only on a CPU, by the compiled kernels. `explain` gives the reasons.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of the forward's positional arguments, of your usual size. With it each site
            is measured, fused and stock, in training mode with the backward and in eval mode without gradients. Only
            clear wins are kept. If the whole model with its guards does not become clearly faster in a mode, it runs as
            before in that mode. Without an example every safe site is fused, which for small inputs on a CPU may be
            slower.
        inplace: whether to fuse the model itself. Otherwise a copy is fused, which shares parameters and buffers with
            the model.

    Returns:
        The fused model. A deep copy or a pickle of it is fused too.

    Raises:
        TypeError: if `model` is not a module.
        Exception: the model's own error for `example_input`, if it raises in both modes.

    Examples:
        >>> import torch, fastlenet
        >>> layers = torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        >>> net = torch.nn.Sequential(*layers)
        >>> fused = fastlenet.fuse(net)
        >>> fused(torch.ones(64, 1, 32, 32)).shape
        torch.Size([64, 6, 14, 14])
        >>> fused[0].weight is net[0].weight
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse(): argument 'model' must be a torch.nn.Module, but got {type(model).__name__}")
    reason = unusable(model)
    if reason is not None:
        logger.warning("fuse leaves %s as it is: %s", type(model).__name__, reason)
        return model
    if not inplace:
        model = copies.sharing(model)
    if example_input is None:
        Fused(model, Backend(faithful=True)).install()
        return model
    model.__dict__.pop("_compiled_call_impl", None)
    _judged(model, arguments(example_input)).install()
    return model


def arguments(example_input: Any) -> tuple[Any, ...]:
    """Copy the example as positional arguments, also if it was made under inference mode."""

    def apart(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with torch.inference_mode(False):
            return value.detach().clone().requires_grad_(value.requires_grad)

    return private.tree_map(apart, example_input if isinstance(example_input, tuple) else (example_input,))


def _judged(model: nn.Module, example: tuple[Any, ...]) -> Fused:
    """Run copies of a model on the example in both modes, and decide in which modes it is fused."""
    handle, errors = Fused(model, Backend(measure=True, faithful=True), ()), []
    present = MODES[0 if model.training else 1]
    for mode in (present, *(other for other in MODES if other != present)):
        try:
            _judge(handle, model, example, mode)
        except Exception as error:  # any error of the user's forward, in a mode that it was not written for
            errors.append(error)
            handle.notes.append(f"in {word(mode)} mode the model cannot run the example: {first_line(error)}")
    if len(errors) == len(MODES):
        raise errors[0]
    return handle


def _judge(handle: Fused, model: nn.Module, example: tuple[Any, ...], mode: str) -> None:
    """Decide for one mode, and add to the facts of the model what was found."""
    training, backend = mode == "training", handle.backend
    stock, fused = copies.apart(model), copies.apart(model)
    if model.training != training:
        for copied in (stock, fused):
            copied.train(training)
    trial = Fused(fused, Backend(measure=True, decisions=backend.decisions, faithful=True)).install()
    with undisturbed(example) as device, torch.set_grad_enabled(training):
        if _has_lazy(model):
            for copied in (stock, fused):
                _outputs(copied, example)
        expected = _outputs(stock, example)
        actual = _outputs(fused, example)
        backend.called |= trial.backend.called
        records = [record for record in trial.backend.records.values() if record.mode == mode]
        reason, note = trial.refused.get(mode), None
        backend.records.update((record.key, record) for record in records)
        if reason is None and not any(record.fused for record in records):
            return
        if reason is None and not _same(expected, actual):
            reason = "the fused model does not reproduce the model's output"
        if reason is None:
            before, after = (timing.step(copied, example, copied.parameters(), training) for copied in (stock, fused))
            times = timing.compare(before, after, device)
            note = (
                f"whole model in {word(mode)} mode: {timing.readable(times.stock)} stock, "
                f"{timing.readable(times.fused)} fused, {times}"
            )
            if not times.clear:
                reason = "the whole model does not become clearly faster"
    handle.notes.append(note or f"in {word(mode)} mode: {reason}")
    if reason is None:
        handle.modes += (mode,)
        backend.decisions.update(trial.backend.decisions)
    else:
        declined = (replace(record, fused=False, reason=reason) for record in records if record.fused)
        backend.records.update((record.key, record) for record in declined)


def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)  # for dropout; the caller's generators do not change
    return [output.detach().clone() for output in timing.tensors(model(*arguments(example)))]


def word(mode: str) -> str:
    """Name the mode of a model's ``training`` flag."""
    return "training" if mode == "training" else "eval"


@contextlib.contextmanager
def undisturbed(example: tuple[Any, ...]) -> Iterator[torch.device]:
    """Restore the caller's random generators and modes afterwards; the value is the example's device."""
    device = next((tensor.device for tensor in timing.tensors(example)), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False):
        yield device


def _same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Whether outputs are the same up to rounding.

    A mistake in a fused model makes a difference of the size of the outputs. Rounding makes one of a few units of their
    dtype. The square root of that unit is far from both.
    """
    return len(expected) == len(actual) and all(
        e.shape == a.shape
        and (
            not e.is_floating_point()
            or bool((a - e).double().norm() <= math.sqrt(torch.finfo(e.dtype).eps) * e.double().norm())
        )
        for e, a in zip(expected, actual, strict=True)
    )
