"""What each process of `test_distributed.py` runs, under torchrun: ``distributed_worker.py FOLDER``.

No test module: it is a program, leaves its findings in FOLDER, and ends in a death.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlenet
from fastlenet.training import distributed, loop

CPU = torch.device("cpu")
IMAGES = 5  # two shares of different size


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The joined batch, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(IMAGES, 1, 32, 32, generator=generator).double(), torch.arange(IMAGES)


def network() -> fastlenet.LeNet:
    """The same network in every process."""
    torch.manual_seed(2)
    return fastlenet.LeNet().double()


class Normalised(torch.nn.Sequential):
    """Running statistics that every process gathers on its own, and dropout that draws from its own generator."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(
            fastlenet.ConvReLUMaxPool2d(1, 2, 5, pool_size=4),
            torch.nn.BatchNorm2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(98, 10),
        )


def gradients(world: distributed.World, folder: Path) -> None:
    """Gradients of shares of a batch under DDP, through the trainer's own parts, and under FSDP2."""
    images, labels = batch()
    found = {}
    for size in (IMAGES, 1):  # of a batch of one image the first process has no part
        config = loop.TrainConfig(dtype="float64", batch_size=size)
        learner = loop.Learner(network(), config, CPU, world=world)
        batches = loop.Batches(images[:size], labels[:size], batch_size=size, seed=0, world=world)
        learner.loss(*next(batches.epoch(0))).backward()
        found[f"ddp of {size}"] = [parameter.grad for parameter in learner.model.parameters()]

    sharded = network()
    for layer in sharded.children():
        fully_shard(layer)
    fully_shard(sharded)
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
    share = world.share(IMAGES)
    mean = F.cross_entropy(sharded(images[share]), labels[share])
    (mean * (share.stop - share.start) * world.size / IMAGES).backward()
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    found["fsdp"] = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
    optimizer.step()
    found["fsdp, stepped"] = [parameter.detach().full_tensor() for parameter in sharded.parameters()]
    if world.main:
        torch.save(found, folder / "gradients.pt")


def resumed(world: distributed.World, folder: Path) -> None:
    """A run that stops and goes on, against one that does not, with a model that draws and gathers statistics."""

    def run(name: str, epochs: int, resume: bool = False) -> loop.TrainResult:
        config = loop.TrainConfig(data=str(folder / "digits"), epochs=epochs, batch_size=40, device="cpu")
        return loop.train(config, model=Normalised(), output=folder / name, resume=resume)

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    torch.save(
        {
            "history": [whole.history, parts.history],
            "predictions": whole.evaluation.predictions,
            "weights": [list(run.model.state_dict().values()) for run in (whole, parts)],
        },
        folder / f"resumed-{world.rank}.pt",
    )


def killed(world: distributed.World, folder: Path) -> None:
    """The trainer's own run, once to its end, and once until the last process dies in the middle of an epoch."""

    def die(number: int, _: torch.Tensor) -> None:
        if number == 5 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    config = loop.TrainConfig(data=str(folder / "digits"), epochs=3, batch_size=40, device="cpu")
    loop.train(config, output=folder / "unbroken")
    loop.train(config, output=folder / "killed", on_step=die)


if __name__ == "__main__":
    with distributed.join(CPU) as joined:
        assert dist.get_world_size() == joined.size == int(os.environ["WORLD_SIZE"])
        for task in (gradients, resumed, killed):
            task(joined, Path(sys.argv[1]))
