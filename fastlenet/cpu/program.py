"""Programs: lists of steps, each a kernel and its arguments, which `network.steps` works off.

A program is made once for each shape and kept. A call only fills a table of addresses and numbers, the *bases*; an
argument is a base, an offset from it, and a distance from unit to unit. A unit is a block of 16 images, or one image.

Workers share the tasks, each some units in a row, by a counter. The steps stand in four parts: a worker's before its
first task, a task's before its units, a unit's, and a task's after its units.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry

from . import threads
from .compiled import address
from .plan import BYTES, Gradients, Plan

Link: TypeAlias = ConvPoolGeometry | str
"""A convolution with relu and pool, ``"linear_relu"`` or ``"linear"``."""

(
    ZERO,
    OWN,  # address of a worker's copy of the table, at the start of its scratch
    STEPS,  # address of the program
    SIZE,  # of the table
    WORKERS,  # counter: workers that have begun
    TAKEN,  # counter: tasks that a worker has taken
    TASKS,
    UNITS_EACH,  # of a task
    UNITS,
    IMAGES,
    COUNT,  # of images in a block: the last may have fewer than 16
    SCRATCH,  # of all workers; in a worker's copy its own
    SCRATCH_BYTES,
    SUMS,  # of all tasks; in a worker's copy those of its task. Without a size they are memory that all tasks share
    SUMS_BYTES,
    PARTS,  # tasks whose sums are added up
    INPUT,
    OUTPUT,  # or its gradient
    RECORD,  # what is kept for the backward
    GRAD_INPUT,
    PARAMETERS,
) = range(21)
"""Names for the places of the table of bases.

Behind these stand, link by link, weight, bias and their gradients, 0 where there is none; then a number.
"""
EACH = 5

PARTS_OF_STEPS = 4
STEP = 1 + 3 * 10
"""Integers of a step: a kernel's address, then for each of ten arguments a base, an offset, and a distance.

A C function ignores arguments that it does not take.
"""

PIECES = 16
"""Parts of a parameter, some rows each, that workers share when they add up its gradient."""


class At(NamedTuple):
    """An argument that a call decides: a base, an offset from it, and what is added from unit to unit."""

    base: int
    offset: int = 0
    step: int = 0

    def plus(self, offset: int) -> At:
        """Return a place so many bytes further on."""
        return self._replace(offset=self.offset + offset)


NOTHING = At(ZERO)
UNIT = At(ZERO, 0, 1)


def parameters_of(link: int) -> list[At]:
    """Weight, bias and their gradients of a link, and its number."""
    return [At(PARAMETERS + EACH * link + i) for i in range(EACH)]


class Space:
    """Gives out places one after the other, by default each at the start of a cache line."""

    def __init__(self, unit: int = BYTES) -> None:
        self.size, self.unit = 0, unit

    def take(self, size: int) -> int:
        """Return the offset of the next place, of so many bytes."""
        place = self.size
        self.size += -(-size // self.unit) * self.unit
        return place


class Scratch(Space):
    """Gives out places in a worker's scratch, behind its table."""

    def __init__(self, links: int) -> None:
        super().__init__()
        self.take(8 * (PARAMETERS + EACH * links))

    def at(self, size: int) -> At:
        """Return the next place, of so many bytes."""
        return At(SCRATCH, self.take(size))


Step = list[int]


def step(module: str, kernel: str | tuple[str | int, ...], *arguments: int | At) -> Step:
    """Return a step; a kernel that is compiled for some constants is a tuple with these."""
    name, *constants = (kernel,) if isinstance(kernel, str) else kernel
    row = [address(module, name, *constants)]
    for argument in arguments:
        row += At(ZERO, argument) if isinstance(argument, int) else argument
    return row + [0] * (STEP - len(row))


def exchange(to_lanes: int, size: int, images: At, distance: int, count: int | At, lanes: At, numbers: int) -> Step:
    """Return the step that turns images into lanes, or back: see `convolution.exchange`."""
    return step("convolution", "exchange", to_lanes, size, images, distance, count, lanes, numbers)


def listed(*parts: list[Step]) -> array[int]:
    """Return the steps of all parts as one table: the parts' numbers of steps first."""
    values = array("q", [len(part) for part in parts])
    for part in parts:
        for row in part:
            values.extend(row)
    return values


class Program(NamedTuple):
    """Steps, and the memory they need.

    Attributes:
        steps: see `listed`.
        scratch_bytes: of a worker.
        record_bytes: what a unit keeps for the backward; in the scratch where nothing is kept.
        sums_bytes: of a task.
        output_shape: of an image.
        plans: their tables must stay.
    """

    steps: array[int]
    scratch_bytes: int
    record_bytes: int
    sums_bytes: int
    output_shape: tuple[int, ...]
    plans: tuple[Plan | Gradients, ...]


def run(steps: array[int], workers: int, tasks: int, units_each: int, units: int, rest: Sequence[int]) -> None:
    """Work a program off; `rest`: the table of bases from the number of images on."""
    table = array("q", (0, 0, steps.buffer_info()[0], IMAGES + len(rest), 0, 0, tasks, units_each, units, *rest))
    threads.run(address("network", "steps"), table, workers)


def place(tensor: Tensor | None) -> int:
    """Return a tensor's address, 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()
