"""``python -m bench.kernels``: the time of each kernel of LeNet on this GPU, in the order of launch.

PyTorch's profiler (CUPTI) times every kernel of some inferences and training steps, of fastlenet and of stock eager.
The sets of data rotate as in the benchmarks. The time that `bench.static` models stands beside fastlenet's kernels. A
profiled kernel takes a microsecond or two more than within a CUDA graph. The benchmarks measure a whole call, this
command shows its parts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.baselines import EAGER, FASTLENET, Call, Implementation, precision_mode
from bench.run import ROOT
from bench.static.committed import RESULTS, modelled_kernels
from bench.timing import in_short
from bench.workloads import FORWARD, LENET, TRAIN_STEP, Work, cache_bytes, setup
from fastlenet import environment
from fastlenet.files import write_json

MODES = ((torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "bf16"))
STEPS = 20

Row = dict[str, Any]


def timeline(call: Call, steps: int = STEPS) -> tuple[list[tuple[str, list[float]]], float]:
    """Profile some runs of a call.

    Returns:
        The kernels (copies and fills too) of one run in order, each with its microseconds in every run; and for each
        run the microseconds from the first kernel's start to the last one's end. The difference to the kernels' sum is
        the time that the GPU waits for launches.

    Raises:
        RuntimeError: if not every run launched as many kernels.
    """
    with torch.set_grad_enabled(call.needs_grad):
        for number in range(3):
            call.run(call.prepare(number))
        prepared = [call.prepare(number) for number in range(steps)]
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for each in prepared:
                call.run(each)
            torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    events.sort(key=lambda event: event.time_range.start)
    count, rest = divmod(len(events), steps)
    if rest or not count:
        raise RuntimeError(f"{len(events)} kernels in {steps} runs")
    kernels = [
        (first.name, [event.time_range.elapsed_us() for event in events[position::count]])
        for position, first in enumerate(events[:count])
    ]
    return kernels, (events[-1].time_range.end - events[0].time_range.start) / steps


def rows(work: Work, implementation: Implementation, device: torch.device) -> list[Row]:
    """Profile one implementation of a work: a row for each of its kernels."""
    with precision_mode(work.precision):
        data = setup(work, device, cache_bytes(device), choose=False)
        kernels, span = timeline(Call(work, implementation, data))
    model = modelled_kernels(work, [name for name, _ in kernels]) if implementation is FASTLENET else {}
    about = {
        "name": work.name,
        "impl": implementation.name,
        "direction": work.direction,
        "batch": work.batch,
        "dtype": str(work.dtype).removeprefix("torch."),
        "precision": work.precision,
        "span_us": span,
    }
    return [
        about
        | {
            "position": position,
            "kernel": name,
            "median": statistics.median(times),
            "min": min(times),
            "n": len(times),
            "unit": "us",
            "ns_per_image": statistics.median(times) * 1e3 / work.batch,
            "modelled_ns_per_image": model.get(position),
        }
        for position, (name, times) in enumerate(kernels)
    ]


def show(some: list[Row]) -> None:
    """Print the kernels of one work and implementation."""
    first, total = some[0], sum(row["median"] for row in some)
    print(
        f"\n{first['name']} {first['direction']} {first['batch']} {first['precision']} {first['impl']}: {len(some)} "
        f"kernels, {total:.1f} us in them, {first['span_us']:.1f} us from start to end"
    )
    print("      us  ns/image  modelled  kernel")
    for row in some:
        modelled = "" if row["modelled_ns_per_image"] is None else f"{row['modelled_ns_per_image']:.2f}"
        print(f"{row['median']:8.1f}  {row['ns_per_image']:8.3f}  {modelled:>8}  {row['kernel'][:80]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, print and save."""
    description = "Time each kernel of LeNet's inference and training step on this GPU."
    images = "images in a call (may be repeated; default: 8192 and 64)"
    folder = "folder for the results (default: bench/results in the checkout)"
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=description)
    parser.add_argument("--batch", type=int, action="append", metavar="N", help=images)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=folder)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels: PyTorch sees no GPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    device, about = torch.device("cuda"), environment.collect()
    moment = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    path = options.results / about["device_slug"] / "kernels" / f"{moment}-{(about['commit'] or 'unknown')[:10]}.json"
    found: list[Row] = []
    failed = 0
    for batch in options.batch or (8192, 64):
        for dtype, precision in MODES:
            for direction in (TRAIN_STEP, FORWARD):
                for implementation in (FASTLENET, EAGER):
                    work = Work(LENET, batch, dtype, precision, direction)
                    try:
                        some = rows(work, implementation, device)
                    except RuntimeError as error:  # one that cannot run must not hide the others
                        print(f"{work.label} {implementation.name}: {in_short(error)}")
                        failed += 1
                        continue
                    show(some)
                    found += some
                    write_json(path, {"environment": about | {"date": moment}, "rows": found})
    print(f"\nresults: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
