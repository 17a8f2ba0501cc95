"""Comparing the times of two implementations, so that only clear wins are kept.

Both run in this process, in turns, so a slow phase of the machine affects both. In a round each gives two samples, in
the order ABBA: the first sample after the other implementation finds that one's data in the caches, and its threads
awake. A candidate wins a round if it was at least `MARGIN` faster. A sequential test (A. Wald, Sequential Tests of
Statistical Hypotheses, 1945) counts 1 for a round won and -`LOSS` for one lost. At `WINS` the candidate is kept, at
-`LOST` it is not. A candidate of equal speed wins a round with a probability of at most one half, and so is kept in one
of 340 trials. One that wins 80% of the rounds, on a noisy machine, is kept in 91%.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlenet.private import tree_leaves

WINS, LOSS, LOST = 12, 2, 6
MOST_ROUNDS = 60
MARGIN = 0.02
RULE = f"Fused is kept once it has won {WINS} rounds, by {MARGIN:.0%}, beyond twice those that it lost."
"""The legend under a table of measured times."""
SAMPLE_SECONDS = 2e-3
"""Seconds of a sample: fast calls are repeated for so long, which is far more than the clock's resolution."""


@dataclass(frozen=True)
class Comparison:
    """Median seconds per call, and how many of the rounds the candidate won."""

    stock: float
    fused: float
    wins: int
    rounds: int = WINS

    @property
    def score(self) -> int:
        """The count of the sequential test."""
        return self.wins - LOSS * (self.rounds - self.wins)

    @property
    def clear(self) -> bool:
        """Whether the win is clear."""
        return self.score >= WINS

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
    times = Comparison(0.0, 0.0, 0, 0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while -LOST < times.score < WINS and times.rounds < MOST_ROUNDS:
            for name in ("fused", "stock", "stock", "fused"):
                samples[name].append(_seconds(calls[name], repeats, device))
            won = sum(samples["fused"][-2:]) < sum(samples["stock"][-2:]) / (1 + MARGIN)
            times = Comparison(0.0, 0.0, times.wins + won, times.rounds + 1)
    finally:
        if collecting:
            gc.enable()
    return replace(times, stock=statistics.median(samples["stock"]), fused=statistics.median(samples["fused"]))


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
