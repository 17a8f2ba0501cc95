"""Plans: what a launcher did for one kind of call, done again for the next without asking why.

A launcher turns shapes, layouts, types, places in memory and settings into allocations, grids, tiles and constants,
which takes Python longer than LeNet's kernels run. All of that but the addresses is the same for the next call of the
same kind. So a `planned` launcher runs once as it is written, while `Recording` notes what it allocates and launches,
and from then on the notes are carried out. There is no second way to write a launcher.

What may be noted is narrow, so that nothing can be carried out wrongly: every tensor that a kernel gets is an operand,
a copy of one by `runtime.contiguous`, or comes from `runtime.empty`. A launcher that does anything else with tensors
has no plan, and runs each time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch import empty_strided as empty_strided  # by a name of this module, so that tests can poison
from torch.nn import Parameter

from . import configurations, runtime
from .geometry import ConvPoolGeometry

ENABLED = True
"""Whether plans are kept: tests that replace a launcher's parts turn it off, as a plan would go past them."""

_MOST_PLANS = 4096


class _Launch(NamedTuple):
    """One launch of a plan.

    Attributes:
        kernel: as it is written.
        run: starts the compiled kernel, which it keeps alive.
        grid: programs along three axes.
        binary: what `run` takes behind the stream.
        tensors: picks the kernel's tensors out of operands and allocations.
        rest: numbers and constants, in the kernel's order.
    """

    kernel: Any
    run: Callable[..., Any]
    grid: tuple[int, int, int]
    binary: tuple[Any, ...]
    tensors: Callable[[list[Any]], tuple[Any, ...]]
    rest: tuple[Any, ...]


class _Plan(NamedTuple):
    """What to make, to launch and to return.

    Attributes:
        memory: what stands behind the operands: shape, strides and type of what is allocated, or the place of the
            operand that is copied, None, and the copy's memory format.
        launches: in order.
        results: the place of each, or None.
    """

    memory: list[tuple[Any, Any, Any]]
    launches: list[_Launch]
    results: list[int | None]


class Recording:
    """Notes of what a launcher does; `runtime` reports to the one that is in force in the thread."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._operands = len(args)
        self._tensors = list(args)
        self._memory: list[tuple[Any, Any, Any]] = []
        self._launches: list[_Launch] = []
        given = [id(arg) for arg in args if isinstance(arg, Tensor)]
        # Of a tensor that is two operands nobody can tell which of them a kernel is meant to get.
        self._complete = len(given) == len(set(given))

    def allocated(self, tensor: Tensor) -> None:
        """Note what `runtime.empty` returns."""
        self._add(tensor, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def copied(self, tensor: Tensor, copy: Tensor, memory_format: Any) -> None:
        """Note a copy by `runtime.contiguous`. What a kernel has written cannot be copied before all launches."""
        place = self._place(tensor)
        self._complete &= place is not None and place < self._operands
        self._add(copy, place, None, memory_format)

    def _add(self, tensor: Tensor, *made: Any) -> None:
        self._tensors.append(tensor)
        self._memory.append(made)  # type: ignore[arg-type]
        self._complete &= tensor.data_ptr() % 16 == 0

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, int, int], args: Any, rest: Any) -> None:
        """Note a launch: of a compiled kernel with `args`, tensors first, and the `rest` of its arguments."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        places = [self._place(tensor) for tensor in tensors]
        if None in places or len(places) < 2 or any(isinstance(arg, Tensor) for arg in args[len(tensors) :]):
            self._complete = False
            return
        binary = compiled.function, compiled.packed_metadata, None, None, None
        rest = *args[len(tensors) :], *rest
        self._launches.append(_Launch(kernel, compiled.run, grid, binary, operator.itemgetter(*places), rest))

    def went_past(self) -> None:
        """Note that something was launched of which the compiled kernel is not known."""
        self._complete = False

    def _place(self, tensor: Any) -> int | None:
        return next((place for place, known in enumerate(self._tensors) if known is tensor), None)

    def plan(self, results: tuple[Any, ...]) -> _Plan | None:
        """Return what was noted, or None if that is not all that matters."""
        places = [None if result is None else self._place(result) for result in results]
        known = [place for place in places if place is not None]
        if not self._complete or len(known) < sum(result is not None for result in results):
            return None
        return _Plan(self._memory, self._launches, places)


def planned(precision: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a launcher's calls follow a plan.

    The launcher takes tensors, the first of them one to be written like, truth values, and tuples of numbers, all by
    position; returns a tuple of tensors and None; and depends on nothing else but the current device, the table of
    configurations and `precision`. In the interpreter it stays as it is.

    Args:
        precision: where PyTorch keeps the precision of its products, ``torch.backends.cudnn.conv`` for one.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        if runtime.INTERPRETED.value:
            return launcher

        @functools.wraps(launcher)
        def call(*args: Any) -> Any:
            found = runtime.of_driver()
            device = found.driver.get_current_device()
            table = configurations.table()
            if found.table is not table:
                found.table, found.plans = table, {}
            key = _key(launcher, precision.fp32_precision, device, args)
            if key is None or not ENABLED or runtime.observed():
                return launcher(*args)
            plans = found.plans
            if key in plans:
                plan = plans[key]
                return launcher(*args) if plan is None else _follow(plan, found.driver, device, launcher, args)
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            with runtime.reporting_to(recording := Recording(args)):
                results = launcher(*args)
            plans[key] = recording.plan(results)
            return results

        return call

    return decorate


def _key(launcher: Any, precision: str, device: int, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return all that a launcher's doing depends on, or None where it is not to be repeated."""
    key = [launcher, precision, device]
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if arg.get_device() not in (device, -1):  # -1: on the CPU, where only a driver without a device launches
                return None
            key += arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16
        elif kind is bool or kind is ConvPoolGeometry or arg is None:
            key.append(arg)
        elif kind is tuple or kind is list:
            key.append(tuple(arg))
        else:
            return None
    return tuple(key)


def _follow(plan: _Plan, driver: Any, device: int, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Do for `args` what `launcher` would do."""
    tensors, place = [*args], args[0].device
    for what, strides, form in plan.memory:
        if strides is None:
            tensor = tensors[what].contiguous(memory_format=form)
        else:
            tensor = empty_strided(what, strides, dtype=form, device=place)
        if tensor.data_ptr() % 16:  # an allocator of the user's own; the kernels are compiled for aligned memory
            return launcher(*args)
        tensors.append(tensor)
    for launch in plan.launches:
        if launch.kernel.pre_run_hooks:
            return launcher(*args)
    stream = driver.get_current_stream(device)
    for _, run, grid, binary, pick, rest in plan.launches:
        run(*grid, stream, *binary, *pick(tensors), *rest)
    return tuple([None if i is None else tensors[i] for i in plan.results])
