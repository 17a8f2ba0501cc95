"""``fastlenet bench --tune``: measure which variant and tile is the fastest on this GPU, and write the table.

For each benchmarked operator, direction and mode it lists the configurations that are worth trying and drops those that
spill or do not fit. It checks the accuracy of each as the benchmarks do, times those that pass, and writes the fastest
into `kernels/configurations.json`, or "aten" if the library is faster. Entries of other architectures, and of shapes
that were not tuned, stay.

Tuning happens only here. With a fixed table the same call takes the same kernel in every process, and a kernel's order
of summation depends on its configuration alone. So results are the same bit for bit until the table or a kernel
changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from fastlenet.kernels import configurations
from fastlenet.kernels.configurations import Configuration

import fastlenet
from bench.baselines import EAGER, FASTLENET, Call, precision_mode, reference_results
from bench.static.fake_driver import TARGETS
from bench.timing import check_accuracy, in_short, interleave
from bench.workloads import (
    BACKWARD,
    FORWARD,
    KERNEL,
    Case,
    ConvCase,
    Data,
    Work,
    cache_bytes,
    parity_sets,
    setup,
    suite,
)
from fastlenet import environment
from fastlenet.files import atomic_write
from fastlenet.library import LIBRARY
from fastlenet.timing import MARGIN

Say = Callable[[str], None]
Entry = dict[str, Any]


class Clock(Protocol):
    """A way to time calls. Only this part of the tuner needs a GPU."""

    def prepare(self, call: Call) -> None:
        """Prepare a call under the configuration with which it will run."""

    def seconds(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Seconds of each call."""


@dataclass
class GraphClock:
    """Replays a CUDA graph of each call, in turns. A graph keeps the kernels with which it was captured."""

    device: torch.device
    budget: float

    def prepare(self, call: Call) -> None:
        """Capture."""
        call.capture(together=True)

    def seconds(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Medians of interleaved rounds."""
        timings = interleave(dict(calls), self.device, budget=self.budget)
        return {name: timing.median for name, timing in timings.items()}


class Slot(NamedTuple):
    """A line of the table to fill: a kernel for a case in a mode."""

    kernel: str
    case: Case
    mode: str
    direction: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.case.name} {self.mode}"


MODES = {"tf32": torch.float32, "ieee": torch.float32, "bfloat16": torch.bfloat16}


def slots(case: Case, mode: str) -> list[Slot]:
    """The lines of a case: its forward, the kernels of its backward, and whether kernels are used at all."""
    if not isinstance(case, ConvCase):
        names = {"addmm_relu.forward": FORWARD, "addmm_relu.backward": BACKWARD}
    else:
        gradients = ["grad_input", "grad_weight"] if case.input_grad else ["grad_weight"]
        names = {"conv2d_relu_max_pool2d.forward": FORWARD}
        names |= {f"conv2d_relu_max_pool2d.{name}": BACKWARD for name in (*gradients, "backward")}
    return [Slot(name, case, mode, direction) for name, direction in names.items()]


def shape_of(case: Case) -> tuple[int, ...]:
    """A case's key in the table."""
    weight = torch.empty(case.parameter_shapes["weight"], device="meta")
    if isinstance(case, ConvCase):
        return case.geometry.key(torch.empty(1, *case.input_shape, device="meta"), weight)
    return tuple(weight.t().shape)


def candidates(slot: Slot) -> list[Configuration]:
    """The configurations for a slot, that of an untuned table first."""
    part = slot.kernel.rpartition(".")[2]
    library = Configuration(LIBRARY, {}, "")
    if part == "backward" or not isinstance(slot.case, ConvCase):
        return [Configuration("general", {}, ""), library]
    from fastlenet.kernels.conv2d_relu_max_pool2d import search

    input = torch.empty(1, *slot.case.input_shape, dtype=MODES[slot.mode])
    weight = torch.empty(slot.case.parameter_shapes["weight"], dtype=MODES[slot.mode])
    found = search.candidates(part, slot.case.geometry, input, weight, exact=slot.mode == "ieee")
    tiles = [Configuration(variant, options, "") for variant, options in found]
    return tiles + ([library] if part == "forward" else [])


@contextmanager
def trying(slot: Slot, configuration: Configuration) -> Iterator[None]:
    """Make the slot use this configuration, and only Triton or only the library."""
    table = dict(configurations.table())
    table[slot.kernel, configurations.architecture(), slot.mode, shape_of(slot.case)] = configuration
    before = configurations.table
    configurations.table = lambda: table  # type: ignore[assignment]
    try:
        with fastlenet.use_backend("aten" if configuration.variant == LIBRARY else "triton"):
            yield
    finally:
        configurations.table = before


def unfit(slot: Slot, configuration: Configuration) -> str | None:
    """Say why a configuration must not be used on this architecture (it spills, or needs too much memory), or None.

    It is compiled for the architecture and not launched.
    """
    architecture = configurations.architecture()
    if configuration.variant == LIBRARY or architecture not in TARGETS:
        return None
    from bench.static.launches import compiling_fastlenet, run_operator

    precision = {"bfloat16": "bf16"}.get(slot.mode, slot.mode)
    with compiling_fastlenet(architecture, precision) as records, trying(slot, configuration):
        try:
            run_operator(slot.case, 2, MODES[slot.mode], slot.direction == BACKWARD)
        except Exception as error:  # refused by the compiler, or too large
            return in_short(error)
        spills = max((record.spill_bytes for record in records), default=0)
    return f"spills {spills} bytes" if spills else None


class Bench:
    """A case's data and the check of its results, made once for all configurations of a work."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.data: Data = setup(work, device, cache_bytes(device) if device.type == "cuda" else 0)
        self.reference = reference_results(work, self.data)
        self.sets = range(parity_sets(work))
        stock = Call(work, EAGER, self.data)
        self.stock = [stock.results(number) for number in self.sets]

    def call(self, clock: Clock) -> tuple[Call, str | None]:
        """Bind fastlenet as it is configured now, and return the fault of its results, or None."""
        call = Call(self.work, FASTLENET, self.data)
        results = [call.results(number) for number in self.sets]
        wrong = check_accuracy(results, self.stock, self.reference, self.work.step)
        if wrong is None:
            clock.prepare(call)
        return call, wrong


def choose(slot: Slot, bench: Bench, clock: Clock, say: Say) -> Configuration | None:
    """Return the fastest of the configurations that fit and are accurate; None if there is none.

    The configuration of an untuned table is kept unless another is clearly faster.
    """
    calls: dict[str, Call] = {}
    found: dict[str, Configuration] = {}
    for configuration in candidates(slot):
        name = f"{configuration.variant} {configuration.options}"
        wrong = unfit(slot, configuration)
        if wrong is None:
            try:
                with trying(slot, configuration):
                    call, wrong = bench.call(clock)
            except Exception as error:  # an error of one configuration must not end the trial of the others
                wrong = in_short(error)
        if wrong is not None:
            say(f"  dropped {name}: {wrong}")
            continue
        calls[name], found[name] = call, configuration
    if not calls:
        return None
    seconds = clock.seconds(calls)
    first, best = next(iter(calls)), min(seconds, key=lambda name: seconds[name])
    if seconds[first] <= seconds[best] * (1 + MARGIN):
        best = first
    say(f"  takes {best}: {seconds[best] * 1e6:.1f} us; {first}: {seconds[first] * 1e6:.1f} us")
    return found[best]


def tune(works: Sequence[tuple[Case, int]], modes: Sequence[str], device: torch.device, clock: Clock, say: Say) -> int:
    """Fill the slots of cases (with their batch) in some modes, writing the table after each; return how many."""
    written = 0
    evidence = _evidence(device)
    for case, batch in works:
        for mode in modes:
            precision = "bf16" if mode == "bfloat16" else mode
            with precision_mode(precision):
                benches: dict[str, Bench] = {}
                for slot in slots(case, mode):
                    say(str(slot))
                    work = Work(case, batch, MODES[mode], precision, slot.direction, KERNEL)
                    if slot.direction not in benches:
                        benches[slot.direction] = Bench(work, device)
                    chosen = choose(slot, benches[slot.direction], clock, say)
                    if chosen is not None:
                        write(slot, chosen._replace(evidence=evidence))
                        written += 1
    return written


def _evidence(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else environment.cpu_model()
    commit = (environment.collect()["commit"] or "unknown")[:10]
    return f"measured on {name}, {datetime.now(timezone.utc):%Y-%m-%d}, {commit}"


def write(slot: Slot, configuration: Configuration) -> None:
    """Put a slot's line into the table, atomically, and keep all other lines."""
    path: Path = configurations._COMMITTED
    architecture, shape = configurations.architecture(), list(shape_of(slot.case))
    entries: list[Entry] = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        if (entry["kernel"], entry["architecture"], entry["shape"]) == (slot.kernel, architecture, shape):
            entry = entry | {"modes": [mode for mode in entry["modes"] if mode != slot.mode]}
        if entry["modes"]:
            entries.append(entry)
    line = {"kernel": slot.kernel, "architecture": architecture, "modes": [slot.mode], "shape": shape}
    entries.append(line | configuration._asdict())
    text = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    atomic_write(path, f"[\n{text}\n]\n".encode())
    configurations.table.cache_clear()


def works(text: str) -> list[tuple[Case, int]]:
    """The benchmarked operators with `text` in their name, and their batch on a GPU."""
    full = suite("full", "cuda")
    found = {work.case.name: (work.case, work.batch) for work in full if work.direction == BACKWARD}
    return [pair for name, pair in found.items() if text.lower() in name.lower()]


def main(text: str, device: torch.device, budget: float, say: Say = print) -> int:
    """Tune the operators that match `text` on this GPU, and name the table's file."""
    chosen = works(text)
    written = tune(chosen, list(MODES), device, GraphClock(device, budget), say)
    say(f"{written} entries of {configurations._COMMITTED}: run `make test`, read the difference, commit")
    return 0 if written else 1
