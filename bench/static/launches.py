"""What is compiled and counted: LeNet, the other shapes, and a row of figures for each of their launches."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastlenet
from bench.baselines import precision_mode
from bench.static.fake_driver import CompiledKernelRecord, Launch, compiling_for
from bench.static.model import DEVICES, LABEL, cost
from bench.workloads import OTHER_OPERATORS, ConvCase, LinearCase
from fastlenet import environment, functional, selection

BATCH = 8192
INFERENCE, STEP = "lenet_inference", "lenet_train_step"
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The goals on an H100, nanoseconds per image.
GOALS = {
    ("sm_90", "ieee"): {INFERENCE: 18.0, STEP: 48.0},
    ("sm_90", "tf32"): {INFERENCE: 7.0, STEP: 20.0},
    ("sm_90", "bf16"): {INFERENCE: 4.5, STEP: 11.0},
}
COMPILE_GOAL = 20.0
# Other shapes that the kernels must serve, at few images: costs are per image.
OTHER = [
    replace(case, batch=batch)
    for case in OTHER_OPERATORS
    for name, batch in (("CIFAR.conv2", 64), ("VGG.256", 16), ("AlexNet.conv1", 8), ("linear.4096", 512))
    if case.name == name
]

Row = dict[str, Any]


@contextlib.contextmanager
def compiling_fastlenet(arch: str, precision: str) -> Iterator[list[CompiledKernelRecord]]:
    """Compile what fastlenet launches on CPU tensors in this context; the Triton backend is forced."""
    driven = selection.triton_drives_everything()
    with precision_mode(precision), fastlenet.use_backend("triton"), driven, compiling_for(arch) as records:
        yield records


def run_lenet(use: str, dtype: torch.dtype) -> None:
    """LeNet as a user runs it, on numbers that do not matter."""
    network = fastlenet.LeNet(dtype=dtype)
    images = torch.empty(BATCH, 1, 32, 32, dtype=dtype)
    if use == INFERENCE:
        with torch.no_grad():
            network.eval()(images)
    else:
        logits = network.train()(images)
        logits.backward(torch.empty_like(logits))


def run_operator(case: ConvCase | LinearCase, batch: int, dtype: torch.dtype, backward: bool) -> None:
    """One operator as a user runs it."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    input = empty(batch, *case.input_shape)
    weight, bias = (empty(*case.parameter_shapes[name]).requires_grad_(backward) for name in ("weight", "bias"))
    input.requires_grad_(backward and case.input_grad)
    if isinstance(case, ConvCase):
        sizes = {"pool_size": case.pool, "pool_stride": case.pool_stride, "pool_padding": case.pool_padding}
        output = functional.conv2d_relu_max_pool2d(input, weight, bias, case.stride, case.padding, **sizes)
    else:
        output = functional.linear_relu(input, weight, bias)
    if backward:
        output.backward(torch.empty_like(output))


# --- rows ------------------------------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _shape(launch: Launch) -> str:
    """Name the tensors of a launch with their sizes; numbered neighbours of equal size share one entry."""
    sizes = [(re.sub("_(ptr|box)$", "", a.name), a.shape) for a in launch.arguments if a.shape is not None]
    told = []
    for (name, shape), group in itertools.groupby(sizes, lambda found: (found[0].rstrip("0123456789"), found[1])):
        names = [each for each, _ in group]
        numbers = f"{names[0]}-{names[-1].removeprefix(name)}" if len(names) > 1 else names[0]
        told.append(f"{numbers} {'x'.join(map(str, shape or ()))}")
    return ", ".join(told)


def launch_row(record: CompiledKernelRecord, launch: Launch, arch: str, precision: str, images: int) -> Row:
    """What one launch costs."""
    row: Row = {
        "kernel": f"{record.module.removeprefix('fastlenet.kernels.')}.{record.name}",
        "shape": _shape(launch),
        "dtype": str(PRECISIONS[precision]).removeprefix("torch."),
        "precision": precision,
        "arch": arch,
        "used_by": [],
        "launches": {},
        "images": images,
        "constants": {name: str(value) for name, value in record.constexprs.items()},
        "grid": list(launch.grid),
        "registers": record.registers,
        "spill_bytes": record.spill_bytes,
        "shared_bytes": record.shared,
        "num_warps": record.num_warps,
    }
    nothing = ("occupancy", "instructions", "by_class", "issue_ns_per_image", "ns_per_image", "modelled_ns_per_image")
    if arch not in DEVICES:
        return row | dict.fromkeys((*nothing, "bound", "memory_bytes_per_image", "loops", "rare_paths"))
    found = cost(record, launch, images)
    return row | {
        "occupancy": found.occupancy,
        "instructions": rounded(found.execution.total / images),
        "by_class": {name: rounded(times / images) for name, times in found.by_class.items()},
        "issue_ns_per_image": rounded(found.times["issue"] / images),
        "ns_per_image": {unit: rounded(ns / images) for unit, ns in found.times.items()},
        "modelled_ns_per_image": rounded(found.ns / images),
        "bound": found.bound,
        "memory_bytes_per_image": rounded(found.memory_bytes / images),
        "loops": [
            {"address": f"{loop.address:#06x}", "instructions": loop.instructions, "trips": rounded(loop.trips)}
            for loop in found.execution.loops
        ],
        "rare_paths": [
            {
                "address": f"{path.address:#06x}",
                "instructions": path.instructions,
                "times_per_warp": rounded(path.times),
            }
            for path in found.execution.rare_paths
        ],
    }


def identity_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("kernel", "shape", "dtype", "precision", "arch"))


def rows_of(arch: str, precision: str, only: str = "", operators: bool = True) -> list[Row]:
    """The rows of one architecture and precision: LeNet's kernels, then the kernels at other shapes.

    Args:
        arch: a name in `TARGETS`.
        precision: a name in `PRECISIONS`.
        only: part of the kernel's name or shape; the rest is compiled, but not counted.
        operators: with the other shapes.
    """
    dtype = PRECISIONS[precision]
    rows: dict[Any, Row] = {}
    works: list[tuple[str, Any]] = [(INFERENCE, None), (STEP, None)]
    for use, case in works + [("", case) for case in OTHER if operators]:
        images = case.batch if case else BATCH
        with compiling_fastlenet(arch, precision) as records:
            if case:
                run_operator(case, images, dtype, True)
            else:
                run_lenet(use, dtype)
            for record in records:
                for launch in record.calls:
                    name = f"{record.module}.{record.name} {_shape(launch)}"
                    if only not in name:
                        continue
                    # Launches that differ in addresses alone are one row.
                    plain = tuple((a.shape, a.strides) if a.shape else a.value for a in launch.arguments)
                    key = (record.hash, launch.grid, plain)
                    if key not in rows:
                        rows[key] = launch_row(record, launch, arch, precision, images)
                    row = rows[key]
                    if use:
                        row["used_by"] = sorted({*row["used_by"], use})
                        row["launches"][use] = row["launches"].get(use, 0) + 1
    seen: Counter[tuple[str, ...]] = Counter()
    for row in rows.values():
        identity = identity_of(row)
        seen[identity] += 1
        if seen[identity] > 1:  # the same tensors in other roles, as far as one can see from here
            row["shape"] += f" ({seen[identity]})"
    return list(rows.values())


def totals(rows: Iterable[Row]) -> list[Row]:
    """Sums over LeNet's launches, per architecture, precision and use."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row["instructions"] is None:
            continue
        for use, launches in row["launches"].items():
            key = (row["arch"], row["precision"], use)
            total = found.setdefault(
                key,
                {
                    **dict(zip(("arch", "precision", "use"), key, strict=True)),
                    "launches": 0,
                    "instructions": 0.0,
                    "issue_ns_per_image": 0.0,
                    "modelled_ns_per_image": 0.0,
                    "goal_ns_per_image": GOALS.get(key[:2], {}).get(use),
                },
            )
            total["launches"] += launches
            for name in ("instructions", "issue_ns_per_image", "modelled_ns_per_image"):
                total[name] = rounded(total[name] + launches * row[name])
    return list(found.values())


def report(archs: Sequence[str], precisions: Sequence[str], only: str = "", operators: bool = True) -> dict[str, Any]:
    """The report as it is written to ``bench/results/static``; arguments as of `rows_of`."""
    rows = [row for arch in archs for precision in precisions for row in rows_of(arch, precision, only, operators)]
    return {
        "environment": environment.collect(),
        "note": LABEL,
        "model": {name: vars(device) for name, device in DEVICES.items()},
        "totals": totals(rows),
        "compile": [],
        "rows": rows,
    }
