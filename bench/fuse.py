"""The cost of `fastlenet.fuse` itself: ``python -m bench.fuse [--json]``.

Two figures of plain PyTorch's LeNet on a CPU, with one image and without gradients, where the operators are smallest:

- The microseconds by which a call of the fused model is longer than one of the plain model. They are measured with
  every site left to stock, which shows guards and bookkeeping, and with every site fused. The networks take turns.
- The seconds of the first call, once TorchDynamo is imported. Each sample is a separate process. The first graph that a
  process captures takes longer than later ones, so the first call of a second model is shown beside it.

Least and median of all samples are printed. Background load only adds, so the least says most about the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastlenet

ROUNDS, CALLS, PROCESSES = 100, 100, 5
LIMITS = {"call": 15.0, "first_call": 1.0}
"""Limits of the two figures, in microseconds and seconds, for the least sample."""

FIRST_CALL = """
import time, torch, torch._dynamo, fastlenet
images, times = torch.ones(1, 1, 32, 32), []
for _ in range(2):
    model = fastlenet.StockLeNet().eval()
    with torch.no_grad():
        model(images)
        begin = time.perf_counter()
        fastlenet.fuse(model, inplace=True)(images)
        times.append(time.perf_counter() - begin)
print(*times)
"""


def declined(model: nn.Module) -> nn.Module:
    """Make a model whose graph is captured and guarded, with every site left to stock."""
    from fastlenet.fusion.backend import Backend
    from fastlenet.fusion.fuse import Fused

    class Declines(Backend):
        def rewrite(self, *_: Any) -> list[Any]:
            return []

    Fused(model, Declines()).install()
    return model


def calls(rounds: int = ROUNDS, repeats: int = CALLS) -> dict[str, list[float]]:
    """Microseconds of a call: of the plain model, and the excess of the others, by round."""
    networks = {
        "plain": fastlenet.StockLeNet().eval(),
        "declined": declined(fastlenet.StockLeNet().eval()),
        "fused": fastlenet.fuse(fastlenet.StockLeNet().eval(), inplace=True),
    }
    images = torch.ones(1, 1, 32, 32)
    samples: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for network in networks.values():
            network(images), network(images)
        for number in range(rounds):
            for name in sorted(networks, reverse=bool(number % 2)):
                samples[name].append(_microseconds(networks[name], images, repeats))
    return samples


def _microseconds(network: Callable[[Tensor], Tensor], images: Tensor, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        network(images)
    return (time.perf_counter() - begin) / repeats * 1e6


def first_calls(processes: int = PROCESSES) -> tuple[list[float], list[float]]:
    """Seconds of the first call of a process's first fused model, and of its second's."""
    command = [sys.executable, "-c", FIRST_CALL]
    lines = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(processes)]
    first, second = zip(*(map(float, line.split()) for line in lines), strict=True)
    return list(first), list(second)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values)}


def measure() -> dict[str, dict[str, float]]:
    """Both figures, least and median."""
    samples = calls()
    plain = samples["plain"]
    found = {"plain_us": _summary(plain)}
    for name in ("declined", "fused"):
        beyond = [value - base for value, base in zip(samples[name], plain, strict=True)]
        found[f"{name}_beyond_us"] = {
            "min": min(samples[name])
            - min(plain),  # the least calls are compared, because the load may differ between two calls
            "median": statistics.median(beyond),
        }
    first, second = first_calls()
    return {**found, "first_call_s": _summary(first), "second_model_s": _summary(second)}


ROWS = {
    "plain_us": "a call of the plain model",
    "declined_beyond_us": "beyond it: captured, every site stock",
    "fused_beyond_us": "beyond it: captured, every site fused",
    "first_call_s": "first call, Dynamo imported",
    "second_model_s": "a second model's first call",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or the figures as JSON."""
    description = "Measure what fastlenet.fuse adds to a call of LeNet on a CPU, and to the first call."
    parser = argparse.ArgumentParser(prog="python -m bench.fuse", description=description)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"StockLeNet, one image, CPU, one thread, torch {torch.__version__}")
    print(f"{'':40}{'least':>10}{'median':>10}")
    for key, label in ROWS.items():
        unit = key.rpartition("_")[2]
        print(f"{label:40}{found[key]['min']:8.2f} {unit}{found[key]['median']:8.2f} {unit}")
    print(f"Goals: at most {LIMITS['call']:g} us beyond a plain call, {LIMITS['first_call']:g} s for a first call.")


if __name__ == "__main__":
    main()
