"""Several kernels in one launch: each program runs one of them, and none waits for another.

A chain's weight gradients wait for nothing but the gradients of their layers' outputs, and nothing waits for them but
the sum of their parts. So they are noted while the backward goes on, and launched together at its end: one launch
instead of three, and units that one of them leaves idle are busy with another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .runtime import INTERPRETED, Sum, all_registers, launch, sum_partials

_KERNELS, _TENSORS, _NUMBERS = 3, 5, 8
"""The most kernels of one launch, and tensors and numbers of each."""


class Job(NamedTuple):
    """A kernel to launch, alone or beside others.

    Its parameters are tensors, `before` (how many programs of the launch stand before its own), numbers, INDEX, and
    constants. It looks at the grid's first axis only.

    Attributes:
        kernel: compiled by `triton.jit`.
        warps: which numbers of warps its programs may have.
        tensors: the kernel's first arguments.
        index: what it computes addresses in.
        work: tells by the number of warps how many programs there are, numbers, and constants by name.
        registers: of a thread; 255 or fewer.
    """

    kernel: Any
    warps: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    index: tl.dtype
    work: Callable[[int], tuple[int, tuple[int, ...], Mapping[str, Any]]]
    registers: int = 255


class Later:
    """What a backward leaves to its end: kernels that nothing waits for, and sums over their parts."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.sums: list[Sum] = []

    def finish(self) -> None:
        """Launch all that was noted, and forget it."""
        # The first layers' kernels were noted last. Their programs take longest, so they start first.
        for group, warps in _groups(self.jobs[::-1]):
            _launch(group, warps)
        sum_partials(*self.sums)
        self.jobs.clear()
        self.sums.clear()


def launch_job(job: Job, sum: Sum, later: Later | None) -> None:
    """Launch a kernel and the sum over its parts, or note them."""
    noted = Later() if later is None else later
    noted.jobs.append(job)
    noted.sums.append(sum)
    if later is None:
        noted.finish()


def _groups(jobs: list[Job]) -> list[tuple[list[Job], int]]:
    """Put kernels that can have equally many warps into groups of up to three; return these and the warps of each."""
    groups: list[tuple[list[Job], tuple[int, ...]]] = []
    for job in jobs:
        for place, (members, warps) in enumerate(groups):
            common = tuple(n for n in warps if n in job.warps)
            if common and len(members) < _KERNELS:
                groups[place] = [*members, job], common
                break
        else:
            groups.append(([job], job.warps))
    return [(members, min(warps)) for members, warps in groups]


def _launch(jobs: list[Job], warps: int) -> None:
    """Launch some kernels with `warps` warps a program."""
    options: dict[str, int] = {}
    if not INTERPRETED:
        options = {"num_warps": warps, "num_stages": 1}
        if all_registers():
            options["maxnreg"] = max(job.registers for job in jobs)
    if len(jobs) == 1:
        (job,) = jobs
        programs, numbers, constants = job.work(warps)
        launch(job.kernel, (programs,), *job.tensors, 0, *numbers, INDEX=job.index, **constants, **options)
        return
    tensors: list[Tensor] = []
    all_numbers: list[int] = []
    ends: list[int] = []
    described: dict[str, Any] = {}
    for place in range(_KERNELS):
        if place < len(jobs):
            job = jobs[place]
            programs, numbers, constants = job.work(warps)
            ends.append(programs + sum(ends[-1:]))
            known = len(job.tensors) + 1 + len(numbers) + 1
            listed: Any = [constants[name] for name in job.kernel.arg_names[known:]]
            if not INTERPRETED:  # which makes tensors of a tuple's numbers, and leaves a list as it is
                listed = tuple(tl.constexpr(value) for value in listed)
            found = job.kernel, len(job.tensors), len(numbers), listed
        else:
            job, numbers, found = jobs[0]._replace(tensors=()), (), (None, 0, 0, ())
        # What no kernel looks at is filled up.
        tensors += [*job.tensors, *[jobs[0].tensors[0]] * (_TENSORS - len(job.tensors))]
        all_numbers += [*numbers, *[0] * (_NUMBERS - len(numbers))]
        for name, value in zip(("KERNEL", "TENSORS", "NUMBERS", "CONSTANTS"), found, strict=True):
            described[f"{name}{place}"] = value
    index = tl.int64 if any(job.index == tl.int64 for job in jobs) else tl.int32
    launch(
        _joint_kernel,
        (ends[-1],),
        *tensors,
        ends[0],
        ends[1],
        *all_numbers,
        INDEX=index,
        **described,
        **options,
    )


@triton.jit(do_not_specialize=["end0", "end1", *(f"number{i}" for i in range(_KERNELS * _NUMBERS))])
def _joint_kernel(
    tensor0_ptr,
    tensor1_ptr,
    tensor2_ptr,
    tensor3_ptr,
    tensor4_ptr,
    tensor5_ptr,
    tensor6_ptr,
    tensor7_ptr,
    tensor8_ptr,
    tensor9_ptr,
    tensor10_ptr,
    tensor11_ptr,
    tensor12_ptr,
    tensor13_ptr,
    tensor14_ptr,
    end0,
    end1,
    number0,
    number1,
    number2,
    number3,
    number4,
    number5,
    number6,
    number7,
    number8,
    number9,
    number10,
    number11,
    number12,
    number13,
    number14,
    number15,
    number16,
    number17,
    number18,
    number19,
    number20,
    number21,
    number22,
    number23,
    INDEX: tl.constexpr,
    KERNEL0: tl.constexpr,
    TENSORS0: tl.constexpr,
    NUMBERS0: tl.constexpr,
    CONSTANTS0,
    KERNEL1: tl.constexpr,
    TENSORS1: tl.constexpr,
    NUMBERS1: tl.constexpr,
    CONSTANTS1,
    KERNEL2: tl.constexpr,
    TENSORS2: tl.constexpr,
    NUMBERS2: tl.constexpr,
    CONSTANTS2,
):
    """Two or three kernels side by side: the first `end0` programs run KERNEL0, those up to `end1` KERNEL1, and so on.

    KERNELi takes the first TENSORSi of the five tensors from tensor5*i_ptr on, how many programs stand before its own,
    the first NUMBERSi of the eight numbers from number8*i on, INDEX, and CONSTANTSi, a tuple of constants. Without a
    third kernel TENSORS2 is 0. Maths, tiles and costs are the kernels' own; the launch takes registers and shared
    memory for the one that needs most.
    """
    program = tl.program_id(0)
    if program < end0:
        tensors0 = (tensor0_ptr, tensor1_ptr, tensor2_ptr, tensor3_ptr, tensor4_ptr)
        numbers0 = (number0, number1, number2, number3, number4, number5, number6, number7)
        KERNEL0(*tensors0[:TENSORS0], 0, *numbers0[:NUMBERS0], INDEX, *CONSTANTS0)
    elif program < end1:
        tensors1 = (tensor5_ptr, tensor6_ptr, tensor7_ptr, tensor8_ptr, tensor9_ptr)
        numbers1 = (number8, number9, number10, number11, number12, number13, number14, number15)
        KERNEL1(*tensors1[:TENSORS1], end0, *numbers1[:NUMBERS1], INDEX, *CONSTANTS1)
    elif TENSORS2 > 0:
        tensors2 = (tensor10_ptr, tensor11_ptr, tensor12_ptr, tensor13_ptr, tensor14_ptr)
        numbers2 = (number16, number17, number18, number19, number20, number21, number22, number23)
        KERNEL2(*tensors2[:TENSORS2], end1, *numbers2[:NUMBERS2], INDEX, *CONSTANTS2)
