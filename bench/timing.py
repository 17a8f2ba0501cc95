"""Accuracy checks, interleaved timing, and the device's rates for the floor."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import AnyCall, elapsed, precision_mode
from bench.workloads import Cost, Results

# Tensors of fewer elements than this are judged together with other small ones, because the largest error over a few
# elements is a matter of chance, also for stock.
SMALL = 256


# fastlenet promises an error of at most twice stock eager's. A baseline, which is stock PyTorch in another form, does
# not: channels_last convolutions are often 3 to 5 times less accurate in float32. To refuse its time would hide a
# strong baseline, so its check only shows that it computes the same thing.
PROMISED, SAME_THING = 2.0, 16.0


def check_accuracy(
    actual: Sequence[Results],
    stock: Sequence[Results],
    reference: Sequence[Results],
    step: float = 0.0,
    factor: float = PROMISED,
) -> str | None:
    """Judge results by the contract's rule: error <= factor x stock's error + one rounding step, against float64.

    The error is computed in the maximum norm and in the Euclidean norm, over all sets together.

    Args:
        actual: results of the implementation on trial, one dict for each set of data.
        stock: stock eager's from the same data in the same dtype and precision.
        reference: stock eager's from the same data in float64.
        step: relative size of a rounding step, if that of the products is coarser than that of the results. For a
            shallow convolution cuDNN computes exact products also with tf32, so stock's error does not show this step.
        factor: `PROMISED` for fastlenet, `SAME_THING` for its baselines.

    Returns:
        The fault, or None.
    """
    small: list[list[Tensor]] = []
    for name in reference[0]:
        trio = [torch.cat([some[name].flatten() for some in results]) for results in (actual, stock, reference)]
        if trio[2].numel() >= SMALL:
            if wrong := _less_accurate(*trio, step, factor):
                return f"{name}: {wrong}"
        else:
            scale = trio[2].square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
            small.append([(values.double() / scale).to(torch.float64) for values in trio])
    if not small:
        return None
    dtype = next(iter(actual[0].values())).dtype
    wrong = _less_accurate(*(torch.cat(values) for values in zip(*small, strict=True)), step, factor, dtype)
    return f"small tensors: {wrong}" if wrong else None


def _less_accurate(
    actual: Tensor, stock: Tensor, reference: Tensor, step: float, factor: float, dtype: torch.dtype | None = None
) -> str | None:
    """Apply the rule to one vector. `dtype` is the type to which it was rounded before a conversion."""
    if actual.shape != reference.shape:
        return f"{actual.numel()} elements, expected {reference.numel()}"
    if not bool(actual.isfinite().all()):
        return "not finite"
    step = max(step, torch.finfo(dtype or actual.dtype).eps)
    for norm, order in (("largest error", math.inf), ("l2 error", 2)):
        error, allowed, size = (
            float(torch.linalg.vector_norm(values, order))
            for values in (actual.double() - reference, stock.double() - reference, reference)
        )
        if not error <= factor * allowed + step * size:
            return f"{norm} {error:.3g}, stock's {allowed:.3g}, one rounding step {step * size:.3g}"
    return None


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, interquartile range, shortest, number of samples."""

    median: float
    iqr: float
    min: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise samples."""
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, high - low, min(samples), len(samples))


class Bystanders:
    """Watches how much CPU time other processes take, from its creation on.

    Scattered timings are a sign of them, but not a reliable one. PyTorch's threads wait for each other at barriers, so
    a neighbour that takes one CPU makes every round equally slow, many times over.
    """

    def __init__(self) -> None:
        self._begin = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds that all CPUs were busy and existed, and that this process used."""
        try:
            fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        except OSError:
            return None
        _, _, _, idle, waiting, *_ = ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        return sum(ticks) - idle - waiting, sum(ticks), time.process_time()

    def crowded(self) -> bool | None:
        """Whether others took a twentieth of the CPUs' time, and hardly any was left; None if unknown."""
        now = self._read()
        if now is None or self._begin is None:
            return None
        busy, total, own = (after - before for after, before in zip(now, self._begin, strict=True))
        return busy - own > 0.05 * total and busy > 0.9 * total


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the measurements."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    calls: dict[str, AnyCall],
    device: torch.device,
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = 2e-3,
) -> dict[str, Timing]:
    """Time calls against each other: rounds in which each gives one sample, in a random order, the same in each run.

    So other load on the machine affects all alike, and so does what the call before leaves behind: caches, and threads
    that sleep. If the order only rotated, each call would always follow the same other one.

    Args:
        calls: by name; they have run before, so that everything is compiled.
        device: their device.
        budget: seconds for all rounds.
        min_rounds: the least number of rounds, even beyond the budget.
        max_rounds: the largest number of rounds.
        sample_seconds: seconds for which a sample of the fastest call repeats it.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        # The second of two runs counts, because the first may still initialise something.
        once = {
            name: [call.seconds(1, 0, device) for _ in range(2)][1] * call.calls_per_run for name, call in calls.items()
        }
        # All repeat their call equally often: the first of a sample finds cold caches and sleeping threads.
        repeats = max(1, min(1000, round(sample_seconds / max(min(once.values(), default=1.0), 1e-7))))
        if any(call.work.direction == "backward" and call.calls_per_run == 1 for call in calls.values()):
            repeats = min(repeats, 16)  # a backward pass keeps every prepared forward alive
        begin = time.perf_counter()
        for turn in range(max_rounds):
            if not names or (turn >= min_rounds and time.perf_counter() - begin > budget):
                break
            for name in random.Random(turn).sample(names, len(names)):
                samples[name].append(calls[name].seconds(repeats, turn * repeats, device))
    return {name: Timing.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Rates:
    """The rates that the device reaches in PyTorch, measured in this process. The floor is computed from them.

    Attributes:
        copy: bytes per second (read and written together) of a copy, by bytes touched.
        matrix: FLOP per second of torch.mm, on a CPU of a convolution too if that is faster, by precision (``"ieee"``,
            ``"tf32"``, ``"bf16"``).
        fma: FLOP per second of plain float32 multiply-adds; None if not measured separately (on a CPU the matrix
            product consists of them).
    """

    copy: dict[int, float]
    matrix: dict[str, float]
    fma: float | None

    def floor(self, cost: Cost, batch: int, precision: str) -> float:
        """The least seconds of a call: the longer of its memory traffic and its arithmetic."""
        total_bytes = batch * cost.bytes + cost.fixed_bytes
        # Small copies stay in caches, so copies of up to a quarter of the call's bytes do not count.
        rates = [rate for size, rate in self.copy.items() if size > total_bytes / 4] or [self.copy[max(self.copy)]]
        arithmetic = [self.matrix[precision]] + ([self.fma] if precision == "ieee" and self.fma else [])
        return max(total_bytes / max(rates), batch * cost.flops / max(arithmetic))

    def best(self, other: Rates) -> Rates:
        """Join two measurements of one device: the best of each rate counts."""

        def join(mine: dict, theirs: dict) -> dict:
            return {key: max(value, theirs[key]) for key, value in mine.items()}

        fma = max(self.fma, other.fma) if self.fma and other.fma else self.fma
        return Rates(join(self.copy, other.copy), join(self.matrix, other.matrix), fma)

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Measure this device; takes about a second."""
        gpu = device.type == "cuda"
        copy = {}
        for exponent in range(20, 32 if gpu else 29, 2):
            source = torch.ones(2**exponent // 8, device=device)
            target = torch.empty_like(source)
            copy[2**exponent] = 2**exponent / _best(lambda s=source, t=target: t.copy_(s), device)
        matrix = {}
        for precision in ("ieee", "tf32", "bf16") if gpu else ("ieee", "bf16"):
            size = 8192 if precision != "ieee" and gpu else 4096 if gpu else 1024
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            square = torch.randn(size, size, device=device, dtype=dtype)
            with precision_mode(precision):
                matrix[precision] = 2 * size**3 / _best(lambda x=square: torch.mm(x, x), device)
                if not gpu:
                    # oneDNN's convolutions may be much faster than a BLAS that was made for another vendor's CPU.
                    matrix[precision] = max(matrix[precision], _convolution_rate(device, dtype))
        return cls(copy, matrix, _fma_rate(device) if gpu else None)


def _best(function: Callable[[], object], device: torch.device, seconds: float = 0.15) -> float:
    """The shortest of repeated timings, which gives the best rate."""
    function()
    repeats = max(1, round(1e-3 / max(elapsed(function, device), 1e-6)))
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds or best == math.inf:
        best = min(best, elapsed(lambda: [function() for _ in range(repeats)], device) / repeats)
    return best


def _convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a 3x3 convolution of many channels, in its best layout."""
    images, size, channels, filters = 16, 16, 128, 256
    shapes = ((images, channels, size, size), (filters, channels, 3, 3))
    input, weight = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last) for shape in shapes
    )
    with torch.no_grad():
        seconds = _best(lambda: F.conv2d(input, weight, padding=1), device)
    return 2 * images * size**2 * channels * filters * 9 / seconds


def _fma_rate(device: torch.device) -> float | None:
    """FLOP per second of chains of multiply-adds in registers, by an elementwise kernel that NVRTC compiles."""
    chains, turns, elements = 8, 512, 2**21
    body = " ".join(f"x{i} = x{i} * a + x{i};" for i in range(chains))
    code = (
        "template <typename T> T fma_chains(T x, T a) { "
        + " ".join(f"T x{i} = x + T({i});" for i in range(chains))
        + f" for (int turn = 0; turn < {turns}; ++turn) {{ {body} }} return "
        + " + ".join(f"x{i}" for i in range(chains))
        + "; }"
    )
    try:
        function = torch.cuda.jiterator._create_jit_fn(code, a=1e-9)
        values = torch.ones(elements, device=device)
        return 2 * chains * turns * elements / _best(lambda: function(values), device)
    except RuntimeError:  # no NVRTC, or not NVIDIA's
        return None


def in_short(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
