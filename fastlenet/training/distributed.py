"""Several processes as one training run: who takes part, who takes which share, and how numbers are added up.

One process alone is the simplest case and needs no process group: every method then gives back what it got.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fastlenet.errors import InputError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's place among those that train together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things are this process's: shares lie one after the other and differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor` over all processes; the result is on this one's device."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def spread(self, tensor: torch.Tensor) -> None:
        """Give `tensor` the main process's content."""
        if self.size > 1:
            dist.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Collect a value of every process, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = World()


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Join the processes that train together with this one, for the duration of the block.

    An existing process group is used. Where torchrun started this process, a group is made, over nccl on GPUs and over
    gloo elsewhere, and ends with the block. Otherwise this process trains alone.

    Args:
        device: where to compute; ``cuda`` without a number is the GPU of this process's number on its machine.

    Raises:
        InputError: if all processes of a machine would share one numbered GPU, or if there are too few GPUs.
    """
    # PyTorch may be built without torch.distributed.
    begins = not dist.is_available() or not dist.is_initialized()
    if begins and not (dist.is_available() and dist.is_torchelastic_launched()):
        yield World(device=device)
        return
    if device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        device = _own_gpu(device)
    if begins:
        if device.type == "cuda":
            # `set_device` and nccl need a device with a number.
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if begins:
            # DistributedDataParallel is part of a reference cycle and holds the group. Left to the interpreter's end,
            # the group would die after what its threads need, which now and then aborts the process (seen with gloo).
            gc.collect()
            dist.destroy_process_group()


def _own_gpu(device: torch.device) -> torch.device:
    number = int(os.environ["LOCAL_RANK"])
    if device.index not in (None, number):
        raise InputError(f"several processes cannot train on one GPU: choose device 'cuda' instead of '{device}'")
    if number >= torch.cuda.device_count():
        raise InputError(
            f"process {number} of this machine has no GPU, there are {torch.cuda.device_count()}: start as many "
            "processes as GPUs, or choose device 'cpu'"
        )
    return torch.device("cuda", number)
