"""PyTorch's private names that this package uses: all of them, with what stands in where a release lacks one.

A stand-in is the public way to the same answer. Where there is none it gives the careful answer: the one on which stock
PyTorch runs. A test reads the sources and finds private names nowhere else. Importing `fastlenet` warns of names that
are missing, and of a PyTorch that is newer than those tested.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

NEWEST_TESTED = (2, 14)
"""The newest release of PyTorch that the tests have run with."""
missing: list[str] = []
"""Names that this PyTorch lacks, of those looked up so far."""


def _find(module: str, name: str, otherwise: Any) -> Any:
    """Look a private name up, or take what stands in for it."""
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        if (path := f"{module}.{name}") not in missing:
            missing.append(path)
        return otherwise


def warn_if_untested() -> None:
    """Warn once of what the tests have not seen: called when the package is imported."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version > NEWEST_TESTED or missing:
        lacking = f"; it lacks {', '.join(missing)}, without which stock operators may run instead" if missing else ""
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(f"fastlenet is tested up to PyTorch {newest}, this is {torch.__version__}{lacking}", stacklevel=3)


# --- what is going on: asked at every call ----------------------------------------------------------------------------


def _public_precision(backend: str, op: str) -> str:
    # Six times as slow, which is why it is not what runs.
    switch = torch.backends.cudnn.conv if op == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return str(switch.fp32_precision)


fp32_precision: Callable[[str, str], str] = _find("torch._C", "_get_fp32_precision_getter", _public_precision)
"""The fp32 precision of ``("cuda", "conv")`` or ``("cuda", "matmul")``."""
any_autocast: Callable[[], bool] = _find(
    "torch._C", "_is_any_autocast_enabled", lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps")))
)
"""Whether autocast is on for some kind of device."""
tracing_state: Callable[[], Any] = _find("torch._C", "_get_tracing_state", lambda: torch.jit.is_tracing() or None)  # type: ignore[attr-defined]
"""What `torch.jit.trace` is at, or None."""
dispatch_modes: Callable[[], int] = _find("torch._C", "_len_torch_dispatch_stack", lambda: 1)
"""How many modes see every operator. Careful: one may."""
transforms_active: Callable[[], bool] = _find("torch._C", "_are_functorch_transforms_active", lambda: True)
"""Whether a transform of `torch.func` is at work. Careful: yes."""
is_batched: Callable[[Tensor], bool] = _find("torch._C", "_functorch.is_legacy_batchedtensor", lambda tensor: True)
"""Whether a tensor stands for a batch that ``is_grads_batched`` maps over. Careful: yes."""
profiler_enabled: Callable[[], bool] = _find("torch._C", "_autograd._profiler_enabled", lambda: False)
"""Whether a profiler records; it only adds a name to what is recorded."""
has_global_hook: Callable[[], bool] = _find("torch.nn.modules.module", "_has_any_global_hook", lambda: True)
"""Whether hooks are registered on all modules. Careful: they are."""
below_autograd: Callable[[], Any] = _find("torch._C", "_AutoDispatchBelowAutograd", torch.no_grad)
"""A context in which operators are recorded by nothing."""
_find("torch.autograd", "forward_ad._current_level", None)  # read anew each time; this only notes that it is there


def forward_mode() -> bool:
    """Whether forward-mode differentiation is at work. Careful: yes."""
    return bool(getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0)


_dispatch_mode: Callable[[Any], Any] | None = _find("torch._C", "_get_dispatch_mode", None)
_PROXY: Any = _find("torch._C", "_TorchDispatchModeKey.PROXY", None)


def proxied() -> bool:
    """Whether `make_fx` traces operators."""
    if _dispatch_mode is None or _PROXY is None:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        return get_proxy_mode() is not None
    return dispatch_modes() > 0 and _dispatch_mode(_PROXY) is not None


_function_modes: Callable[[], int] = _find("torch._C", "_len_torch_function_stack", lambda: 1)
_function_mode: Callable[[int], Any] = _find("torch._C", "_get_function_stack_at", lambda place: None)
_DEVICE_MODE: Any = _find("torch.utils._device", "DeviceContext", ())


def intercepted() -> bool:
    """Whether a mode sees every function of PyTorch that is called, other than the one that sets a default device."""
    count = _function_modes()
    return count > 0 and any(not isinstance(_function_mode(place), _DEVICE_MODE) for place in range(count))


# --- containers -------------------------------------------------------------------------------------------------------


def _plain_tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)((key, _plain_tree_map(function, value)) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_plain_tree_map(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain_tree_map(function, value) for value in tree)
    return function(tree)


def _plain_tree_leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = []
    _plain_tree_map(leaves.append, tree)
    return leaves


tree_map: Callable[..., Any] = _find("torch.utils._pytree", "tree_map", _plain_tree_map)
tree_leaves: Callable[[Any], list[Any]] = _find("torch.utils._pytree", "tree_leaves", _plain_tree_leaves)
"""These two go through nests of containers."""

unfold_and_multiply: Callable[..., Tensor] = _find("torch._C", "_nn.thnn_conv2d", torch.ops.aten.thnn_conv2d)
"""A convolution as a matrix product. The public name takes some 3 us longer to call."""


# --- graphs -----------------------------------------------------------------------------------------------------------

OpOverload: Any = type(torch.ops.aten.relu.default)
OpOverloadPacket: Any = type(torch.ops.aten.relu)
HigherOrderOperator: Any = _find("torch._ops", "HigherOrderOperator", object)
"""Operators on functions. Careful: all are."""
linears: tuple[Any, ...] = (F.linear, _find("torch._C", "_nn.linear", F.linear))
"""The names under which a graph of TorchDynamo's has `F.linear`."""
enter_autocast: Any = _find("torch.amp.autocast_mode", "_enter_autocast", object())
exit_autocast: Any = _find("torch.amp.autocast_mode", "_exit_autocast", object())
"""What a graph calls where an autocast region begins and ends."""

set_grad_enabled: Any = _find("torch._C", "_set_grad_enabled", object())
"""What a graph calls where gradients are switched on or off."""


def dynamo_error() -> Any:
    """The class of TorchDynamo's own errors."""
    return _find("torch._dynamo.exc", "TorchDynamoException", RuntimeError)


def backend_named(name: str) -> Callable[..., Any]:
    """The backend of that name for `torch.compile`."""

    def compiled(graph_module: Any, example_inputs: Any) -> Any:
        return torch.compile(graph_module, backend=name)

    lookup = _find("torch._dynamo.backends.registry", "lookup_backend", None)
    return compiled if lookup is None else lookup(name)


def captured_code() -> Any:
    """The code object whose graph TorchDynamo is compiling; None if that is unknown."""
    try:
        return _find("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx", None)().f_code
    except (AttributeError, TypeError):  # the backend was called by hand, or the name is missing
        return None


def captures(compiled: Any, codes: Iterable[Any]) -> int:
    """How often a compiled function has captured that one of the code objects which it captured most often."""
    entries = _find("torch._dynamo.eval_frame", "_debug_get_cache_entry_list", lambda code: ())
    own = getattr(compiled, "_isolate_recompiles_id", -1)
    counts = (
        sum(getattr(entry, "isolate_recompiles_id", own) == own for entry in entries(code)) for code in codes if code
    )
    return max(counts, default=0)


def most_captures() -> float:
    """How often TorchDynamo captures one code object at most."""
    return float(_find("torch.compiler", "config.recompile_limit", math.inf))


class _Quiet(threading.local):
    on = False


quiet = _Quiet()
"""Whether this thread drops the errors that operators on stand-ins for tensors log, before they raise them."""
logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda record: not quiet.on)


Called = TypeVar("Called", bound=Callable[..., Any])
_set_strategy: Any = _find("torch._C", "_dynamo.eval_frame.set_code_exec_strategy", None)
_Strategy: Any = _find("torch._C", "_dynamo.eval_frame._FrameExecStrategy", None)
_SKIP: Any = _find("torch._C", "_dynamo.eval_frame._FrameAction.SKIP", None)


def runs_eagerly(function: Called) -> Called:
    """Let TorchDynamo capture neither a function nor what it calls, if it is not called by what is captured.

    The autograd engine calls a backward so in the middle of a compiled function. Captured launchers of kernels would
    free memory whose address they have passed on. Part of a larger capture the function can be all the same.
    """
    if None not in (_set_strategy, _Strategy, _SKIP):
        _set_strategy(function.__code__, _Strategy(_SKIP, _SKIP))
    return function


def guard_hooks() -> None:
    """Let the graph that is being compiled be captured anew once a hook is registered on one of its modules.

    Dynamo notes that a module has no hooks, but skips that guard unless it is configured otherwise.

    Raises:
        NotImplementedError: if this PyTorch has no such guards by the names known.
    """
    builder = _find("torch._dynamo.guards", "GuardBuilder", None)
    context = _find("torch._guards", "TracingContext.try_get", lambda: None)()
    if context is None:  # the backend was called by hand
        return
    try:
        guards = context.guards_context.dynamo_guards
        for guard in list(guards):
            if guard.create_fn is builder.EMPTY_NN_MODULE_HOOKS_DICT:
                guards.add(guard.originating_source.make_guard(builder.SEQUENCE_LENGTH))
    except AttributeError as error:
        raise NotImplementedError(f"this PyTorch guards hooks in another way: {error}") from error


def guard_attributes() -> None:
    """Let graphs see changed attributes on Python 3.13.0, where dictionaries do not report them (CPython issue 125608).

    PyTorch 2.11 skips the guards of a module whose dictionary reports no change, here and for other backends.
    """
    config = _find("torch._dynamo", "config", None)
    if sys.version_info[:3] == (3, 13, 0) and hasattr(config, "use_recursive_dict_tags_for_guards"):
        config.use_recursive_dict_tags_for_guards = False


@contextlib.contextmanager
def not_compiling() -> Iterator[None]:
    """Run as after compilation: PyTorch says meanwhile that it compiles, and operators then take the form to record."""
    before = _find("torch.compiler", "_is_compiling_flag", None)
    if before is None:
        yield
        return
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
