"""Plans: a launcher's allocations and launches for one kind of call, recorded once and repeated for later calls.

A launcher turns shapes, layouts, types, alignment and settings into allocations, grids, tiles and constants. This takes
Python longer than LeNet's kernels run. All of it but the addresses is the same for the next call of the same kind. So a
`Kind` runs its launcher once as it is written, while a `Recording` notes what it allocates and launches. Later calls
repeat the notes. Launchers need no code for this.

Only launchers whose tensors can all be told apart have a plan. Each tensor that a kernel gets must be an operand, a
copy of one by `runtime.contiguous`, a result of `runtime.empty` or `runtime.by_library`, or a view from the first
element of one of these. A launcher that does anything else with tensors runs each time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import empty_strided as empty_strided  # by a name of this module, so that tests can poison
from torch.nn import Parameter

from fastlenet.private import fp32_precision

from . import configurations, runtime

ENABLED = True
"""Whether plans are kept: tests that replace a launcher's parts turn it off, as a plan would go past them."""

_MOST_PLANS = 4096
_ALIGNMENT = 256
"""Bytes to which each part of a workspace is aligned, as allocators align."""


class Step(NamedTuple):
    """One launch, or one call of a library.

    Attributes:
        kernel: as it is written; None for a library's call.
        run: starts the compiled kernel, which it keeps alive; or is the library's function.
        grid: programs along three axes.
        binary: what `run` takes behind the stream.
        tensors: picks the step's tensors out of operands and allocations.
        rest: numbers and constants, in the kernel's order.
    """

    kernel: Any
    run: Callable[..., Any]
    grid: tuple[int, ...]
    binary: tuple[Any, ...]
    tensors: Callable[[list[Any]], tuple[Any, ...]]
    rest: tuple[Any, ...]


class Plan(NamedTuple):
    """What to make, to do and to return, and what it holds for.

    Attributes:
        memory: what stands behind the operands: shape, strides and type of what is allocated; or the place of the
            operand that is copied, None, and the copy's memory format; or None, None, and an offset in the workspace.
        workspace: bytes of one allocation for all that only kernels see, which get it as addresses.
        steps: in order.
        results: the place of each, or None.
        driver: that launched, on `device`, by `table`'s configurations.
    """

    memory: list[tuple[Any, Any, Any]]
    workspace: int
    steps: list[Step]
    results: list[int | None]
    driver: Any
    device: int
    table: Any


class Recording:
    """Notes of what a launcher does; `runtime` reports to the one that is in force in the thread."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._operands = list(args)
        self._made: list[tuple[Tensor, tuple[Any, Any, Any]]] = []
        self._computed: list[Tensor] = []
        self._as_tensors: list[Tensor] = []  # not only their addresses are read
        self._steps: list[tuple[Any, Callable[..., Any], Any, Any, list[Tensor], tuple[Any, ...]]] = []
        given = [id(arg) for arg in args if isinstance(arg, Tensor)]
        # If one tensor is two operands, it is not known which of them a kernel is meant to get.
        self._complete = len(given) == len(set(given))

    def allocated(self, tensor: Tensor) -> None:
        """Note what `runtime.empty` returns."""
        self._add(tensor, (tuple(tensor.shape), tensor.stride(), tensor.dtype))

    def copied(self, tensor: Tensor, copy: Tensor, memory_format: Any) -> None:
        """Note a copy by `runtime.contiguous`. What a kernel has written cannot be copied before all launches."""
        place = next((place for place, known in enumerate(self._operands) if known is tensor), None)
        self._complete &= place is not None
        self._add(copy, (place, None, memory_format))

    def _add(self, tensor: Tensor, made: tuple[Any, Any, Any]) -> None:
        self._made.append((tensor, made))
        self._complete &= tensor.data_ptr() % 16 == 0

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, int, int], args: Any, rest: Any, boxes: runtime.Boxes
    ) -> None:
        """Note a launch: of a compiled kernel with `args`, tensors first, and the `rest` of its arguments."""
        binary = compiled.function, compiled.packed_metadata, None, None, None
        run = compiled.run
        if boxes:
            before = len((*grid, "stream", *binary))
            # A descriptor holds an address, so each call makes its own.
            run = functools.partial(_described, run, {before + place: box for place, box in boxes.items()})
        self._note(kernel, run, grid, binary, args, rest, as_tensors=bool(boxes))

    def called(self, function: Callable[..., Tensor], args: Any, result: Tensor) -> None:
        """Note a library's call of `args`, tensors first, and its result."""
        self._note(None, function, (), (), args, (), as_tensors=True)
        self._computed.append(result)

    def _note(self, kernel: Any, run: Any, grid: Any, binary: Any, args: Any, rest: Any, *, as_tensors: bool) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self._complete &= bool(tensors) and not any(isinstance(arg, Tensor) for arg in args[len(tensors) :])
        self._steps.append((kernel, run, grid, binary, tensors, (*args[len(tensors) :], *rest)))
        self._as_tensors += tensors if as_tensors else []

    def went_past(self) -> None:
        """Note that something was launched of which the compiled kernel is not known."""
        self._complete = False

    def plan(self, results: tuple[Any, ...], driver: Any, device: int, table: Any) -> Plan | None:
        """Return what was noted, or None if that is not all that matters."""
        known = [*self._operands, *(tensor for tensor, _ in self._made), *self._computed]

        def place(tensor: Tensor) -> int | None:
            for index, other in enumerate(known):
                if other is tensor:
                    return index
            # A kernel reads an address, so a view from the first element does as well as what it is a view of.
            found = [
                index
                for index, other in enumerate(known)
                if isinstance(other, Tensor) and other.dtype is tensor.dtype and other.data_ptr() == tensor.data_ptr()
            ]
            return found[0] if len(found) == 1 and tensor.numel() else None

        steps = []
        for kernel, run, grid, binary, tensors, rest in self._steps:
            places = [place(tensor) for tensor in tensors]
            # A library reads shapes too, which a view has of its own.
            exact = kernel is not None or all(any(t is other for other in known) for t in tensors)
            if not self._complete or None in places or not exact:
                return None
            pick = (
                operator.itemgetter(*places)
                if len(places) > 1
                else operator.itemgetter(slice(places[0], places[0] + 1))
            )
            steps.append(Step(kernel, run, grid, binary, pick, rest))
        returned = [None if r is None else next((i for i, k in enumerate(known) if k is r), -1) for r in results]
        if not self._complete or -1 in returned:
            return None
        # An allocation takes longer than the address of a part of another one.
        seen, workspace, memory = {*returned, *map(place, self._as_tensors)}, 0, []
        for index, (tensor, made) in enumerate(self._made, len(self._operands)):
            if made[1] is not None and index not in seen:
                made = None, None, workspace
                workspace += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            memory.append(made)
        return Plan(memory, workspace, steps, returned, driver, device, table)


class Kind:
    """Calls of one kind of one launcher: the first runs it as it is written, the others follow their plan.

    All calls of a kind have operands of the same shapes, strides, types and alignment on the same device, and the same
    other arguments; PyTorch's precision switches are set alike. The caller ensures that, by a key.

    The launcher takes tensors and other arguments, all by position, and returns a tuple of tensors and None. What it
    allocates lies on the first tensor's device. It may depend on the driver, the current device and the table of
    configurations, which are compared here, and on nothing else. The interpreter has no plans.
    """

    __slots__ = ("launcher", "plan", "tried")

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.plan: Plan | None = None
        self.tried: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Do for `args` what the launcher would do."""
        plan = self.plan
        if plan is not None and runtime.unobserved() and ENABLED:
            driver = runtime.active_driver()
            if (
                driver is plan.driver
                and driver.get_current_device() == plan.device
                and configurations.table() is plan.table
            ):
                return _follow(plan, driver, self.launcher, args)
        return self._record(args)

    def _record(self, args: tuple[Any, ...]) -> Any:
        if runtime.INTERPRETED.value or not ENABLED or not runtime.unobserved():
            return self.launcher(*args)
        driver = runtime.active_driver()
        found = driver, driver.get_current_device(), configurations.table()
        # Tried before, here: there is no plan. A tensor elsewhere than on the current device has none.
        if self.plan is None and self.tried and all(a is b or a == b for a, b in zip(self.tried, found, strict=True)):
            return self.launcher(*args)
        if next(arg for arg in args if isinstance(arg, Tensor)).get_device() not in (found[1], -1):
            return self.launcher(*args)
        with runtime.reporting_to(recording := Recording(args)):
            results = self.launcher(*args)
        self.plan, self.tried = recording.plan(results, *found), found
        return results


class Kinds:
    """Calls of any kind of one launcher, told apart by everything that decides what it does."""

    __slots__ = ("launcher", "table")

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.table: dict[tuple[Any, ...], Kind] = {}

    def __call__(self, *args: Any) -> Any:
        """Do for `args` what the launcher would do."""
        key = key_of(args)
        if key is None:
            return self.launcher(*args)
        kind = self.table.get(key)
        if kind is None:
            if len(self.table) >= _MOST_PLANS:
                self.table.clear()
            kind = self.table[key] = Kind(self.launcher)
        return kind(*args)


def key_of(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return everything of a call that decides what a launcher does, or None where a tensor is not a plain one."""
    key: list[Any] = [fp32_precision("cuda", "conv"), fp32_precision("cuda", "matmul")]
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            key += (arg.shape, arg.stride(), arg.dtype, arg.device, arg.data_ptr() & 15)
        elif isinstance(arg, Tensor):
            return None
        else:
            key.append(arg)
    return tuple(key)


def _described(run: Callable[..., Any], boxes: runtime.Boxes, *args: Any) -> None:
    """Start a compiled kernel with descriptors in the place of some of its arguments."""
    run(*runtime.describe(args, boxes))


def _follow(plan: Plan, driver: Any, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Do for `args` what `launcher` would do."""
    tensors, place = [*args], args[0].device
    if plan.workspace:
        workspace = empty_strided((plan.workspace,), (1,), dtype=torch.uint8, device=place)
        if (address := workspace.data_ptr()) & 15:
            return launcher(*args)
    for what, strides, form in plan.memory:
        if what is None:
            tensors.append(address + form)
            continue
        if strides is None:
            tensor = tensors[what].contiguous(memory_format=form)
        else:
            tensor = empty_strided(what, strides, dtype=form, device=place)
        if tensor.data_ptr() & 15:  # an allocator of the user's own; the kernels are compiled for aligned memory
            return launcher(*args)
        tensors.append(tensor)
    for step in plan.steps:
        if step.kernel is not None and step.kernel.pre_run_hooks:
            return launcher(*args)
    stream = driver.get_current_stream(plan.device)
    for kernel, run, grid, binary, pick, rest in plan.steps:
        if kernel is None:
            tensors.append(run(*pick(tensors), *rest))
        else:
            run(*grid, stream, *binary, *pick(tensors), *rest)
    return tuple([None if i is None else tensors[i] for i in plan.results])
