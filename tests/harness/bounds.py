"""A bounds checker for kernels that run in Triton's interpreter.

Each tensor argument of a launch is given a *virtual* base address, far from all others. Pointer arithmetic in the
kernel carries it along, so that at a load, store or atomic the address itself tells which argument it was derived
from: an access that runs off one tensor and happens to land in another is still caught. Before memory is touched every
active lane is checked (inside the tensor, aligned, and on one of the view's own elements where the view has gaps) and
translated back to the real address.

Only the interpreter can be watched in this way; elsewhere `bounds_checked` does nothing and says so (``active``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.modes import has_triton, interpreting
from harness.poison import Poison, poison_bits, poisoned_outputs

__all__ = ["BoundsError", "BoundsReport", "bounds_checked", "sanitized"]

_SLOT_BITS = 44  # 16 TiB of virtual addresses for each argument, its tensor in the middle
_SLOT_MIDDLE = 1 << (_SLOT_BITS - 1)
_PAGE = 4096
_LARGEST_MAP = 1 << 24


class BoundsError(AssertionError):
    """A kernel accessed memory that it must not access."""


@dataclass
class BoundsReport:
    """What the checker saw; ``reads`` and ``writes`` name arguments by kernel."""

    active: bool
    launches: int = 0
    accesses: int = 0
    lanes: int = 0
    reads: dict[str, set[str]] = field(default_factory=dict)
    writes: dict[str, set[str]] = field(default_factory=dict)


class _Region:
    """One tensor argument of the launch in progress."""

    def __init__(self, name: str, tensor: torch.Tensor, slot: int) -> None:
        self.name = name
        self.tensor = tensor
        self.itemsize = tensor.element_size()
        self.base = tensor.data_ptr()
        self.virtual = (slot << _SLOT_BITS) + _SLOT_MIDDLE + self.base % _PAGE
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        self.elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if tensor.numel() else 0
        self.members: np.ndarray | None = None
        # Stride-0 dimensions repeat addresses, gaps skip some: where not every address belongs to the view, keep a map.
        distinct = 1
        for n, s in zip(shape, strides, strict=True):
            distinct *= n if s else min(n, 1)
        if 0 < self.elements <= _LARGEST_MAP and distinct != self.elements:
            self.members = np.zeros(self.elements, dtype=bool)
            offsets = np.zeros(1, dtype=np.int64)
            for n, s in zip(shape, strides, strict=True):
                if s:
                    offsets = np.unique((offsets[:, None] + np.arange(n, dtype=np.int64) * s).reshape(-1))
            self.members[offsets] = True

    def __str__(self) -> str:
        t = self.tensor
        return f"argument {self.name!r} ({tuple(t.shape)}, strides {tuple(t.stride())}, {t.dtype})"

    def problem(self, offsets: np.ndarray, size: int) -> tuple[str, np.ndarray] | None:
        """What is wrong with accesses of ``size`` bytes at these byte offsets, and where; None if nothing is."""
        end = self.elements * self.itemsize
        outside = (offsets < 0) | (offsets + size > end)
        if outside.any():
            first = int(offsets[outside][0])
            if end == 0:
                return "the tensor is empty", outside
            if first < 0:
                return f"{-first / self.itemsize:g} elements before its start", outside
            return f"{(first + size - end) / self.itemsize:g} elements past its end", outside
        crooked = offsets % size != 0
        if crooked.any():
            return "not aligned to the element size", crooked
        if self.members is not None and size == self.itemsize:
            gap = ~self.members[offsets // size]
            if gap.any():
                return "in a gap of the view, on memory that is not one of its elements", gap
        return None


class _Checker:
    """State of one `bounds_checked` context and the replacements it installs in the interpreter."""

    def __init__(self, report: BoundsReport, poison: Poison | None, writable: Callable[[torch.Tensor], bool] | None):
        self.report = report
        self.poison = poison
        self.writable = writable
        self.kernel = ""
        self.regions: list[_Region] = []
        self.names: dict[int, str] = {}
        self.error: BoundsError | None = None

    def begin(self, fn: Callable, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn the argument names of a launch from the tensors that the interpreter is about to hand over."""
        self.names = {}

        def visit(name: str, value: Any) -> None:
            if isinstance(value, (tuple, list)):
                for position, item in enumerate(value):
                    visit(f"{name}[{position}]", item)
            elif hasattr(value, "data_ptr"):
                self.names[id(value)] = name
            elif hasattr(value, "base"):  # a tensor descriptor
                visit(name, value.base)

        for name, value in inspect.getcallargs(fn, *args, **kwargs).items():
            visit(name, value)

    def convert(self, original: Callable, arg: Any) -> Any:
        """Convert an argument as the interpreter does, but to a virtual address if it is a tensor."""
        result = original(arg)
        if not hasattr(arg, "data_ptr"):
            return result
        tensor = getattr(arg, "base", arg) if not isinstance(arg, torch.Tensor) else arg
        region = _Region(self.names.get(id(arg), f"#{len(self.regions)}"), tensor, len(self.regions) + 1)
        self.regions.append(region)
        result.handle.data = np.array([region.virtual], dtype=np.uint64)
        return result

    def fail(self, message: str) -> None:
        from triton.runtime.interpreter import interpreter_builder

        program = getattr(interpreter_builder, "grid_idx", None)
        self.error = BoundsError(f"kernel {self.kernel!r}, program {program}: {message}")
        raise self.error

    def translate(self, pointers: Any, mask: np.ndarray, what: str) -> tuple[Any, list[_Region]]:
        """Check the active lanes; return pointers with real addresses and the regions they lie in."""
        from triton.runtime.interpreter import TensorHandle

        addresses = np.atleast_1d(pointers.data)
        active = np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)
        self.report.accesses += 1
        real = np.zeros_like(addresses)
        touched = []
        if active.any():
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            slots = (addresses >> np.uint64(_SLOT_BITS)).astype(np.int64)
            for slot in np.unique(slots[active]).tolist():
                if not 1 <= slot <= len(self.regions):
                    self.fail(f"{what} at address {int(addresses[active][0]):#x}, which is derived from no argument")
                region = self.regions[slot - 1]
                lanes = active & (slots == slot)
                offsets = addresses[lanes].astype(np.int64) - region.virtual
                problem = region.problem(offsets, size)
                if problem is not None:
                    text, bad = problem
                    where = tuple(int(i) for i in np.argwhere(lanes)[np.flatnonzero(bad)[0]])
                    self.fail(
                        f"{what} outside {region}: {text}; element offset "
                        f"{int(offsets[bad][0]) / region.itemsize:g}, lane {where} of block {addresses.shape}, "
                        f"{int(bad.sum())} of {int(active.sum())} active lanes"
                    )
                if what != "load" and self.writable is not None and not self.writable(region.tensor):
                    self.fail(f"{what} to {region}, which is an input and must not be modified")
                log = self.report.reads if what == "load" else self.report.writes
                log.setdefault(self.kernel, set()).add(region.name)
                real[lanes] = (offsets + region.base).astype(np.uint64)
                self.report.lanes += len(offsets)
                touched.append(region)
        return TensorHandle(real.reshape(np.shape(pointers.data)), pointers.dtype), touched

    def check_initialised(self, values: np.ndarray, mask: np.ndarray, regions: list[_Region]) -> None:
        """Refuse a float load that read the exact poison pattern of an output that is not yet written."""
        if self.poison is None:
            return
        for region in regions:
            dtype = region.tensor.dtype
            if not dtype.is_floating_point or values.itemsize != region.itemsize or not self.poison.owns(region.tensor):
                continue
            pattern = poison_bits(dtype, self.poison.byte)
            raw = np.atleast_1d(values).view({1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[values.itemsize])
            stale = (raw == pattern) & np.broadcast_to(mask, raw.shape)
            if stale.any():
                where = tuple(int(i) for i in np.argwhere(stale)[0])
                self.fail(f"load from {region} of {int(stale.sum())} elements never written, first in lane {where}")


def _everything_active(pointers: Any) -> np.ndarray:
    return np.ones_like(pointers.data, dtype=bool)


@contextlib.contextmanager
def _installed(checker: _Checker) -> Iterator[None]:
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")
    originals: dict[str, Any] = {name: getattr(builder, name) for name in names}
    call, prepare, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt

    # Unmasked loads and stores, block pointers and descriptors all end in the masked forms.
    def masked_load(self: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        real, regions = checker.translate(ptrs, mask.data, "load")
        result = originals["create_masked_load"](self, real, mask, *args, **kwargs)
        checker.check_initialised(result.data, mask.data, regions)
        return result

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        real, _ = checker.translate(ptrs, mask.data, "store")
        return originals["create_masked_store"](self, real, value, mask, *args, **kwargs)

    def atomic_cas(self: Any, ptr: Any, *args: Any, **kwargs: Any) -> Any:
        real, _ = checker.translate(ptr, _everything_active(ptr), "atomic")
        return originals["create_atomic_cas"](self, real, *args, **kwargs)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        real, _ = checker.translate(ptr, mask.data, "atomic")
        return originals["create_atomic_rmw"](self, op, real, val, mask, *args, **kwargs)

    def init_args(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args_hst, kwargs_hst = prepare(self, args_dev, kwargs)
        checker.begin(self.fn, args_hst, kwargs_hst)
        return args_hst, kwargs_hst

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        checker.kernel, checker.regions, checker.error = self.fn.__name__, [], None
        checker.report.launches += 1
        try:
            return call(self, *args, **kwargs)
        except Exception:
            # The interpreter wraps every error of a kernel in one of its own. Raise the finding itself.
            if checker.error is not None:
                raise checker.error from None
            raise
        finally:
            checker.regions = []

    replacements = (masked_load, masked_store, atomic_cas, atomic_rmw)
    try:
        for name, replacement in zip(names, replacements, strict=True):
            setattr(builder, name, functools.wraps(originals[name])(replacement))
        executor.__call__, executor._init_args_hst = launch, init_args
        interpreter._implicit_cvt = functools.partial(checker.convert, convert)
        yield
    finally:
        for name, original in originals.items():
            setattr(builder, name, original)
        executor.__call__, executor._init_args_hst = call, prepare
        interpreter._implicit_cvt = convert


@contextlib.contextmanager
def bounds_checked(
    *,
    writable: Callable[[torch.Tensor], bool] | None = None,
    poison: Poison | None = None,
    require_launch: bool = True,
) -> Iterator[BoundsReport]:
    """Check every pointer of every kernel launched in this context.

    Args:
        writable: says of a tensor argument whether kernels may write to it; None allows all.
        poison: the outputs in flight: only they may be written (unless ``writable`` says otherwise), and reading an
            element of theirs that was never written is an error.
        require_launch: fail if no kernel ran at all (turn off for empty inputs).

    Yields:
        What was seen. ``active`` is False where kernels are not interpreted: nothing is checked then.

    Raises:
        BoundsError: (an ``AssertionError``) naming kernel, program, argument, offset and lane.
    """
    if not (has_triton() and interpreting()):
        yield BoundsReport(active=False)
        return
    if writable is None and poison is not None:
        writable = poison.owns
    report = BoundsReport(active=True)
    with _installed(_Checker(report, poison, writable)):
        yield report
    if require_launch and report.launches == 0:
        raise BoundsError("no kernel was launched, so nothing was checked")


@contextlib.contextmanager
def sanitized(*, require_launch: bool = True, **poison_options: Any) -> Iterator[tuple[Poison, BoundsReport]]:
    """Everything at once: poisoned and guarded outputs, inputs read-only, every pointer checked.

    On a clean exit the guards are checked; call ``poison.assert_all_written()`` for the rest.
    """
    with (
        poisoned_outputs(**poison_options) as poison,
        bounds_checked(poison=poison, require_launch=require_launch) as report,
    ):
        yield poison, report
