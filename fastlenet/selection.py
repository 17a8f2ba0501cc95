"""The decision which implementation computes a call, and the user's setting.

There are three implementations: ``"triton"``, the kernels in `fastlenet.kernels`; ``"cpu"``, the compiled kernels in
`fastlenet.cpu`; and ``"aten"``, stock operators (`fastlenet.reference`). `ORDER` says which ones a device tries, in
order. `REJECTS` says why one does not take a call.

One table maps the key of a kind of call to an entry. The entry says that the arguments are legal, which implementation
was chosen, and what runs forward and backward. On a GPU it also has the launches that the first call recorded.
`fastlenet.explain`, the log and the benchmarks read the table. No other code decides, and reading changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlenet import library, ops
from fastlenet.errors import KernelError
from fastlenet.kernels import configurations
from fastlenet.ops.registration import Operator, count_flops, decomposition, differentiate_again, implement
from fastlenet.private import (
    dispatch_modes,
    forward_mode,
    fp32_precision,
    is_batched,
    profiler_enabled,
    proxied,
    runs_eagerly,
    tracing_state,
    transforms_active,
)

BACKENDS = ("auto", "triton", "cpu", "aten")

logger = logging.getLogger("fastlenet")


# --- the user's setting ---------------------------------------------------------------------------------------------


def _validated(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, but got {name!r}")
    return name


# Every call looks the variable up. os.environ takes ten times as long for that as the dictionary behind it.
_variables, _VARIABLE = os.environ._data, os.environ.encodekey("FASTLENET_BACKEND")  # type: ignore[attr-defined]

# Process-wide on purpose, like PyTorch's precision switches.
_chosen: str | None = None


def backend(input: Tensor | None = None) -> str:
    """Tell which implementation runs.

    Args:
        input: a tensor whose device and dtype decide under ``"auto"``.

    Returns:
        Without `input`, the setting in force: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"aten"``. With `input`, the
        implementation that an operator would take for it, as far as device and dtype decide.

    Raises:
        ValueError: if the environment variable ``FASTLENET_BACKEND`` holds anything else.
        RuntimeError: with `input`, if a forced backend cannot run there. The message says what to do.
        NotImplementedError: with `input`, if a forced backend has no kernel for the dtype.

    Examples:
        >>> import torch, fastlenet
        >>> fastlenet.backend(torch.empty(2, dtype=torch.float64))
        'aten'
    """
    if input is not None:
        return choose_by_type(input).implementation
    if _chosen is not None:
        return _chosen
    if not _variables.get(_VARIABLE):
        return "auto"
    return _validated(os.environ["FASTLENET_BACKEND"], "FASTLENET_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force an implementation within a ``with`` block. This overrides ``FASTLENET_BACKEND``.

    The setting holds for the whole process, as PyTorch's precision switches do. A backward pass uses the implementation
    of its forward pass.

    * ``"auto"``: Triton on a GPU that Triton drives; on a CPU the compiled kernels, if they are installed and faster;
      otherwise PyTorch's own operators.
    * ``"triton"``: the Triton kernels.
    * ``"cpu"``: the compiled CPU kernels.
    * ``"aten"``: PyTorch's own operators.

    A forced backend that cannot run raises an error. It never falls back silently.

    Args:
        name: one of the four.

    Raises:
        ValueError: if `name` is none of these.

    Examples:
        >>> import fastlenet
        >>> with fastlenet.use_backend("aten"):
        ...     print(fastlenet.backend())
        aten
    """
    global _chosen
    before, _chosen = _chosen, _validated(name, "backend")
    try:
        yield
    finally:
        _chosen = before


# --- the decision ---------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call to decide about.

    The values of its tensors do not count, nor, for a library's rule, the number of images.

    Attributes:
        operator: what is computed; None to decide by device and dtype alone.
        settings: its arguments other than tensors, see `fastlenet.ops.registration.Operator`.
        tensors: its operands, in order.
        differentiable: whether a backward may follow.
    """

    operator: Operator | None
    settings: Any
    tensors: Sequence[Any]
    differentiable: bool

    @property
    def main(self) -> Tensor:
        """The first operand that is not None."""
        return next(tensor for tensor in self.tensors if tensor is not None)


class Choice(NamedTuple):
    """The implementation of a call, forward and backward, and the reason that `explain` and the log give."""

    implementation: str
    reason: str


class Rejection(NamedTuple):
    """Why an implementation does not take a call, and the error if it is forced; with None it then runs."""

    reason: str
    error: type[Exception] | None


ORDER = {"cuda": ("triton", "aten"), "cpu": ("cpu", "aten")}
"""The implementations that a device tries under ``"auto"``, in order. Other devices run stock operators."""

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_everything_driven = False


def _rejected_by_triton(call: Call) -> Rejection | None:
    if (unreachable := _unreachable(call.main.device)) is not None:
        return Rejection(unreachable, RuntimeError)
    if call.main.dtype not in TRITON_DTYPES:
        covered = ", ".join(str(dtype) for dtype in TRITON_DTYPES)
        return Rejection(f"the Triton kernels cover {covered}, not {call.main.dtype}", NotImplementedError)
    if call.operator is None:
        return None
    uncovered = call.operator.uncovered("triton", call.settings, *call.tensors)
    if uncovered is not None:
        return Rejection(uncovered, NotImplementedError)
    operands = call.operator.operands(*call.tensors)
    better = library.why(call.operator.name, call.settings, operands, call.differentiable)
    return None if better is None else Rejection(better, None)


def _unreachable(device: torch.device) -> str | None:
    """Why Triton cannot drive `device`, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if device.type == "cuda" or _everything_driven or (device.type == "cpu" and interpreted):
        return None
    return (
        f"Triton does not drive {device.type} tensors: move them to a GPU, or set TRITON_INTERPRET=1 before "
        "importing triton to interpret the kernels on the CPU"
    )


def _rejected_by_cpu(call: Call) -> Rejection | None:
    if call.main.device.type != "cpu":
        return Rejection(f"the compiled CPU kernels do not run on {call.main.device.type} tensors", RuntimeError)
    try:
        from fastlenet import cpu
    except ImportError:
        return Rejection("this installation has no compiled CPU kernels", RuntimeError)
    uncovered = slower = None
    if call.operator is None:
        if call.main.dtype != torch.float32:
            uncovered = f"the compiled CPU kernels cover torch.float32, not {call.main.dtype}"
    else:
        uncovered = call.operator.uncovered("cpu", call.settings, *call.tensors)
        slower = uncovered or call.operator.slower(call.settings, call.differentiable, *call.tensors)
    # Shapes come first: under "auto" the compiler is looked for only if the call could use it.
    if (backend() != "auto" or not (uncovered or slower)) and (unavailable := cpu.unavailable()) is not None:
        return Rejection(unavailable, RuntimeError)
    if uncovered is not None:
        return Rejection(uncovered, NotImplementedError)
    return None if slower is None else Rejection(slower, None)


REJECTS: dict[str, Callable[[Call], Rejection | None]] = {
    "triton": _rejected_by_triton,
    "cpu": _rejected_by_cpu,
    "aten": lambda call: None,
}
"""The reason why an implementation does not take a call; None if it does."""

_REASONS = {"triton": "a Triton kernel covers it", "cpu": "a compiled CPU kernel covers it"}


def _walk(call: Call) -> Choice:
    """Take the first implementation that does not reject the call."""
    setting, device = backend(), call.main.device.type
    if setting != "auto":
        rejection = REJECTS[setting](call)
        if rejection is not None and rejection.error is not None:
            what = f"fastlenet: backend {setting!r} is forced, but {rejection.reason}"
            raise rejection.error(f"{what}; choose backend 'auto' to run this elsewhere")
        return Choice(setting, f"backend {setting!r} is forced")
    reasons = []
    for name in ORDER.get(device, ("aten",)):
        rejection = REJECTS[name](call)
        if rejection is None:
            break
        reasons.append(rejection.reason)
    if name != "aten":
        return Choice(name, _REASONS[name])
    if device != "cuda":
        reasons.insert(0, f"the input is on {device}, which Triton does not drive")
    return Choice("aten", "; ".join(reasons))


# --- what is known of a kind of call --------------------------------------------------------------------------------


Form = tuple[Callable[..., Tensor] | None, bool]
"""The form that a call takes (see `fastlenet.ops.registration`): its composition or None, and, of other forms, whether
a backward may follow."""


class Known:
    """The entry of a kind of call in the table.

    Attributes:
        choice: what runs it.
        form: the form that it takes.
        forward: the implementation's forward; on a GPU it follows the launches that its first call recorded.
        backward: likewise, for any gradient of the output.
        forced: whether the user's setting left no choice.
    """

    __slots__ = ("backward", "choice", "forced", "form", "forward", "logged")

    def __init__(self, call: Call, choice: Choice) -> None:
        operator, settings, tensors, differentiable = call
        assert operator is not None
        auto = backend() == "auto"
        self.forced, self.logged = not auto, False
        by_library = (
            library.inside(operator.name, settings, tensors) if auto and choice.implementation == "triton" else None
        )
        if by_library is not None:
            choice = choice._replace(reason=f"{choice.reason}; a library multiplies its matrices: {by_library}")
        self.forward, self.backward = operator.implementation(choice.implementation, by_library is not None)
        compose: Callable[..., Tensor] | None = None
        if choice.implementation == "aten":
            compose = operator.composition
            parts = operator.parts(settings, *tensors) if auto else ()
            if any(_walk(Call(*part, differentiable)).implementation != "aten" for part in parts):
                # Kernels take parts of the call, but not the whole call: each part is decided for itself.
                compose = functools.partial(compose, run=run)
            elif auto and call.main.device.type == "cpu":
                compose = operator.quick
        self.choice, self.form = choice, (compose, differentiable)

    def give_up(self) -> None:
        """Decide every kind of call anew after a compiled kernel failed, or raise the error again if it is forced.

        The compiled kernels are unavailable from then on.
        """
        if self.forced:
            raise
        forget()


_known: dict[Any, Known] = {}
_MOST_KNOWN = 4096
_table: Any = None


def forget() -> None:
    """Empty the table: every kind of call is decided again."""
    _known.clear()


@contextlib.contextmanager
def triton_drives_everything() -> Iterator[None]:
    """Assume that Triton drives tensors on any device, for a driver that stands in for an absent GPU."""
    global _everything_driven
    before, _everything_driven = _everything_driven, True
    forget()
    try:
        yield
    finally:
        _everything_driven = before
        forget()


# Named here, because a look-up through `torch` takes as long as the call.
_is_grad_enabled, _num_threads = torch.is_grad_enabled, torch.get_num_threads


def find(operator: Operator, settings: Any, tensors: Sequence[Any], differentiable: bool | None = None) -> Known | None:
    """Return the entry of a kind of call; for its first call, check and decide.

    Args:
        operator: what is computed.
        settings: its arguments other than tensors.
        tensors: its operands.
        differentiable: whether a backward may follow; None to derive it from the operands and PyTorch's mode.

    Returns:
        None for operands that are not plain tensors. The table has no entries for these.

    Raises:
        Exception: stock's error for operands that do not fit, or the error of a forced backend that cannot run.
    """
    global _table
    precisions = fp32_precision("cuda", "conv"), fp32_precision("cuda", "matmul")
    key: list[Any] = [operator, settings, backend(), precisions, _num_threads()]
    grad_enabled = differentiable is None and _is_grad_enabled()
    required = bool(differentiable)
    try:
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                continue
            kind = type(tensor)
            if kind is not Parameter and kind is not Tensor:
                return None
            if grad_enabled and tensor.requires_grad:
                required = True
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15, tensor.is_neg())
    except RuntimeError:  # sparse or batched: without strides or memory
        return None
    key.append(required)
    if (table := configurations.table()) is not _table:  # which the library's rule depends on
        _table = table
        forget()
    known = _known.get(whole := tuple(key))
    return _learn(whole, Call(operator, settings, tensors, required)) if known is None else known


def _learn(key: Any, call: Call) -> Known:
    """Check and decide the first call of a kind."""
    assert call.operator is not None
    call.operator.check(call.settings, *call.tensors)
    if any(tensor is not None and tensor.is_neg() for tensor in call.tensors):
        known = Known(call, Choice("aten", "a tensor is a lazy negative, which kernels cannot read"))
    else:
        with torch.cuda.device_of(call.main):
            known = Known(call, _walk(call))
    if len(_known) >= _MOST_KNOWN:
        forget()
    _known[key] = known
    return known


def choose(operator: Operator, settings: Any, tensors: Sequence[Any], differentiable: bool | None = None) -> Choice:
    """Tell which implementation would run a call, and why, without running it. See `find`."""
    known = find(operator, settings, tensors, differentiable)
    if known is not None:
        return known.choice
    required = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _walk(Call(operator, settings, tensors, required if differentiable is None else differentiable))


def choose_by_type(input: Tensor) -> Choice:
    """Tell which implementation an operator takes, as far as an operand's device and dtype decide."""
    return _walk(Call(None, None, (input,), False))


# --- calls ----------------------------------------------------------------------------------------------------------


@runs_eagerly
def run(operator: Operator, settings: Any, *tensors: Any) -> Tensor:
    """Compute a call as the entry of its kind says."""
    known = find(operator, settings, tensors) if unwatched() else None
    compose, differentiable = _watched(operator, settings, tensors) if known is None else known.form
    if compose is not None:
        if known is not None:
            _log(known, operator, tensors)
        return compose(settings, *tensors)
    try:
        if known is not None and profiler_enabled():  # which names stock operators likewise
            with torch.profiler.record_function(f"{ops.NAMESPACE}::{operator.name}"):
                return operator.fused(settings, known, differentiable, *tensors)
        return operator.fused(settings, known, differentiable, *tensors)
    except KernelError:
        if known is None:
            raise
        known.give_up()
    return run(operator, settings, *tensors)


def unwatched() -> bool:
    """Whether no compiler, tracer, mode or transform has to see what is computed."""
    return not (
        torch.compiler.is_compiling()
        or dispatch_modes()
        or transforms_active()
        or tracing_state() is not None
        or forward_mode()
    )


def _watched(operator: Operator, settings: Any, tensors: Sequence[Any]) -> Form:
    """Tell how to compute a call that is traced, mapped or replaced, or that has operands other than plain tensors."""
    compiling = torch.compiler.is_compiling()
    required = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    composed = operator.composition, False
    if transforms_active() or (not compiling and forward_mode()):
        return composed
    if (torch.compiler.is_exporting() or tracing_state() is not None) and torch.onnx.is_in_onnx_export():
        return composed  # ONNX has the parts only
    if not compiling and not proxied():
        if tracing_state() is not None:
            # A trace records operators below autograd, so stock operators must compute gradients. A call that needs
            # none is recorded whole. PyTorch's check of a trace runs without gradients, so the mode must not decide.
            if required or operator.traceable:
                return composed if required else (None, False)
            return functools.partial(operator.composition, run=run), False
        operator.check(settings, *tensors)
        batched = any(tensor is not None and is_batched(tensor) for tensor in tensors)
        if batched or choose(operator, settings, tensors).implementation == "aten":
            return composed
    return None, required and torch.is_grad_enabled()


def _log(known: Known, operator: Operator, tensors: Sequence[Any]) -> None:
    """Log once for a kind of call why stock operators run it."""
    if not logger.isEnabledFor(logging.DEBUG):
        known.logged = False
    elif not known.logged:
        known.logged = True
        input = operator.operands(*tensors)[operator.main]
        message = "%s of %s %s runs on ATen: %s"
        logger.debug(message, operator.name, tuple(input.shape), input.dtype, known.choice.reason)


# --- registered operators -------------------------------------------------------------------------------------------


def _run_registered(operator: Operator, registered: Any, *args: Any) -> Any:
    """Run a graph's call of ``torch.ops.fastlenet.*``."""
    settings, tensors, differentiable = registered.call(*args)
    known = find(operator, settings, tensors, differentiable)
    if known is None:
        call = Call(operator, settings, tensors, differentiable)
        known = Known(call, Choice("aten", "an operand is not a plain tensor"))
    if known.choice.implementation == "aten":
        _log(known, operator, tensors)
    try:
        return registered.run(known, *args)
    except KernelError:
        known.give_up()
    return _run_registered(operator, registered, *args)


def register(operator: Operator) -> None:
    """Register for each operator a function that chooses and runs an implementation when a graph calls it."""
    count_flops(operator)
    for name, registered in operator.registered().items():
        implement(name, functools.partial(_run_registered, operator, registered))
        if name.endswith("_backward"):
            differentiate_again(name, decomposition(operator, registered))


for _operator in (ops.CONV2D_RELU_MAX_POOL2D, ops.ADDMM_RELU, ops.CHAIN):
    register(_operator)
