"""How fast can LeNet be trained from scratch? A speed run over MNIST, fastlenet beside stock PyTorch.

In the manner of the CIFAR-10 speed runs: the data lie on the device, are shuffled and shifted there, every step is one
CUDA graph replay where there is a GPU, and several seeds are run. The clock covers training only: not loading the data,
not compiling, not evaluating. On a CPU it runs too, eagerly, and says so.

    python examples/speedrun.py                      # the sample of 5,000 digits, all implementations
    python examples/speedrun.py --data torchvision   # full MNIST, where torchvision has it

The log (JSON) holds this file, the environment, and every seed's time and accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlenet
from fastlenet import environment
from fastlenet.graphs import GraphedTrainStep
from fastlenet.timing import synchronize
from fastlenet.training import data

IMPLEMENTATIONS = ("fastlenet", "stock", "compiled")
"""fastlenet's LeNet and stock's, each step one graph replay on a GPU; and stock compiled in the best mode."""


class Run:
    """One implementation with its model, optimizer and step, used for seed after seed.

    A graph reads fixed memory, so a new seed's start is copied into the same parameters and optimizer state.
    """

    def __init__(self, name: str, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        self.model: nn.Module = (fastlenet.LeNet if name == "fastlenet" else fastlenet.StockLeNet)(device=device)
        # A GPU reads the learning rate from memory, so that a graph can follow its schedule.
        rate: Any = torch.tensor(0.0, device=device) if device.type == "cuda" else 0.0
        fused = True if device.type == "cuda" else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, nesterov=True, fused=fused)
        batch = (
            torch.zeros(options.batch, 1, 32, 32, device=device),
            torch.zeros(options.batch, dtype=torch.long, device=device),
        )
        if name == "compiled":
            mode = "max-autotune" if device.type == "cuda" else "default"
            forward = torch.compile(self.model, mode=mode)
            self.step: Callable[[Tensor, Tensor], Tensor] = lambda images, labels: self._plain(forward, images, labels)
        else:
            self.step = GraphedTrainStep(self.model, F.cross_entropy, self.optimizer, batch)
        self.graphed = isinstance(self.step, GraphedTrainStep) and self.step.graphed

    def _plain(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def reset(self, seed: int) -> None:
        """Start anew from a seed: the same weights whatever the implementation."""
        torch.manual_seed(seed)
        fresh = fastlenet.StockLeNet()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(fresh.get_parameter(name))
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def set_rate(self, progress: float) -> None:
        """Rise to the peak over the first fifth of training, then fall to zero, both in straight lines."""
        peak, turn = self.options.lr, 0.2
        rate = peak * (progress / turn if progress < turn else (1 - progress) / (1 - turn))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def train(self, images: Tensor, labels: Tensor, seed: int, epochs: int) -> float:
        """Train from scratch and return the seconds it took."""
        self.reset(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        steps = len(images) // self.options.batch
        if steps == 0:
            raise SystemExit(f"--batch {self.options.batch} is larger than the {len(images)} training images")
        self.model.train()
        synchronize(self.device)
        start = time.perf_counter()
        for epoch in range(epochs):
            order = torch.randperm(len(images), device=self.device, generator=generator)
            for number in range(steps):
                chosen = order[number * self.options.batch : (number + 1) * self.options.batch]
                self.set_rate((epoch * steps + number + 0.5) / (epochs * steps))
                self.step(shifted(images[chosen], self.options.shift, generator), labels[chosen])
        synchronize(self.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that are classified rightly."""
        self.model.eval()
        return float((self.model(images).argmax(1) == labels).float().mean())


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to `most` pixels each way; what leaves one side enters at the other, both blank."""
    if most == 0:
        return images
    count, _, height, width = images.shape
    moves = torch.randint(-most, most + 1, (2, count, 1), device=images.device, generator=generator)
    rows = (torch.arange(height, device=images.device) + moves[0]) % height
    columns = (torch.arange(width, device=images.device) + moves[1]) % width
    image = torch.arange(count, device=images.device)[:, None, None]
    return images[image, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in words."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} +- {deviation:.2g}"


def main(arguments: list[str] | None = None) -> int:
    """Run all implementations on several seeds, print a table and write the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    source = "the images: sample, torchvision[:FOLDER] or a folder of IDX files (default: sample)"
    only = "the only implementation to run (may be repeated; default: all)"
    parser.add_argument("--device", default=here, help="where to run (default: a GPU if there is one, else cpu)")
    parser.add_argument("--data", default="sample", metavar="SOURCE", help=source)
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="epochs of a run (default: 8)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images in a step (default: 64)")
    parser.add_argument("--lr", type=float, default=0.08, metavar="RATE", help="peak learning rate (default: 0.08)")
    parser.add_argument("--shift", type=int, default=1, metavar="PIXELS", help="most pixels of a shift (default: 1)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs, each with its own seed (default: 5)")
    parser.add_argument("--only", choices=IMPLEMENTATIONS, action="append", help=only)
    log = "file for the results (default: out/speedrun.json)"
    parser.add_argument("--log", type=Path, default=Path("out/speedrun.json"), metavar="FILE", help=log)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        dataset = data.load(options.data)
    except data.DataError as error:
        print(error, file=sys.stderr)
        return 2
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    test = dataset.test_images.to(device), dataset.test_labels.to(device)
    print(f"{dataset.name}: {len(images)} for training, {len(test[0])} held out; {environment.device_name()}")
    if device.type != "cuda":
        print("no GPU is used: steps run eagerly, and no time here says anything about a GPU")
    runs: list[dict[str, Any]] = []
    for name in options.only or IMPLEMENTATIONS:
        run = Run(name, device, options)
        run.train(images[: 4 * options.batch], labels[: 4 * options.batch], seed=0, epochs=1)  # compiles and captures
        for seed in range(options.seeds):
            seconds = run.train(images, labels, seed, options.epochs)
            runs.append(
                {
                    "impl": name,
                    "seed": seed,
                    "seconds": seconds,
                    "accuracy": run.accuracy(*test),
                    "graphed": run.graphed,
                }
            )
    log = {
        "environment": environment.collect(),
        "data": dataset.name,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "code": Path(__file__).read_text(encoding="utf-8"),
        "runs": runs,
    }
    options.log.parent.mkdir(parents=True, exist_ok=True)
    partial = options.log.with_suffix(".partial")
    partial.write_text(json.dumps(log, indent=1), encoding="utf-8")
    os.replace(partial, options.log)
    print(f"{'':12}{'training, ms':>20}{'held-out accuracy, %':>24}")
    for name in options.only or IMPLEMENTATIONS:
        mine = [entry for entry in runs if entry["impl"] == name]
        times = spread([1000 * entry["seconds"] for entry in mine])
        print(f"{name:12}{times:>20}{spread([100 * entry['accuracy'] for entry in mine]):>24}")
    print(f"{options.seeds} seeds each; log in {options.log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
