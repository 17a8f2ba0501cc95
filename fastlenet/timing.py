"""Comparing the times of two implementations, so that only clear wins are kept.

Both run in this process, in turns, so a slow phase of the machine affects both. Each round gives one ratio. A win is
clear if the candidate was at least `MARGIN` faster in at least `WINS` of `ROUNDS` rounds. A candidate of equal speed
wins a round with a probability of at most one half, and so gets a clear win in one of 270 trials. Two rounds may be
lost. If more are lost, the rest are not run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlenet.private import tree_leaves

ROUNDS, WINS = 15, 13
MARGIN = 0.02
RULE = f"Fused is kept if it is {MARGIN:.0%} faster in {WINS} of {ROUNDS} rounds; else timing stops early."
"""The legend under a table of measured times."""
SAMPLE_SECONDS = 2e-3
"""Seconds of a sample: fast calls are repeated for so long, which is far more than the clock's resolution."""


@dataclass(frozen=True)
class Comparison:
    """Median seconds per call, and how many of the rounds the candidate won."""

    stock: float
    fused: float
    wins: int
    rounds: int = ROUNDS

    @property
    def clear(self) -> bool:
        """Whether the win is clear."""
        return self.wins >= WINS

    def __str__(self) -> str:
        return f"won {self.wins} of {self.rounds} rounds"


def tensors(values: Any) -> list[Tensor]:
    """All tensors in a nest of containers."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def compare(stock: Callable[[], Any], fused: Callable[[], Any], device: torch.device) -> Comparison:
    """Time the present implementation and a candidate in turns. The clock stops when `device` has finished."""
    calls = {"stock": stock, "fused": fused}
    # The first calls compile, allocate and choose algorithms. The second ones show how many calls fill a sample.
    for call in calls.values():
        _seconds(call, 1, device)
    longest = max(_seconds(call, 1, device) for call in calls.values())
    repeats = max(1, int(SAMPLE_SECONDS / max(longest, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    wins = rounds = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < ROUNDS and rounds - wins <= ROUNDS - WINS:
            # The second call of a pair finds warm caches, so the order alternates.
            for name in sorted(calls, reverse=bool(rounds % 2)):
                samples[name].append(_seconds(calls[name], repeats, device))
            rounds += 1
            wins += samples["fused"][-1] < samples["stock"][-1] / (1 + MARGIN)
    finally:
        if collecting:
            gc.enable()
    return Comparison(statistics.median(samples["stock"]), statistics.median(samples["fused"]), wins, rounds)


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds per call over `repeats` calls, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def step(function: Callable[..., Any], arguments: Iterable[Any], parameters: Iterable[Tensor], training: bool) -> Any:
    """A call to be timed: the forward and, if `training`, the backward to all tensors that need a gradient.

    autograd returns the gradients and does not accumulate them.
    """
    arguments, parameters = tuple(arguments), tuple(parameters)

    def inference() -> Any:
        with torch.no_grad():
            return function(*arguments)

    sources = [value for value in (*tensors(arguments), *parameters) if value.requires_grad]
    if not training or not sources:
        return inference

    def forward_and_backward() -> Any:
        with torch.enable_grad():
            outputs = [output for output in tensors(function(*arguments)) if output.requires_grad]
        return torch.autograd.grad(outputs, sources, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return forward_and_backward


def readable(seconds: float) -> str:
    """Format a time with three digits, in a unit that needs no exponent."""
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if seconds * factor < 999.5), ("s", 1.0))
    return f"{seconds * factor:.3g} {unit}"


_UNITS = ("us", 1e6), ("ms", 1e3)
