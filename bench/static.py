"""``python -m bench.static``: what kernels cost by their machine code, without a GPU.

The fake driver compiles whatever fastlenet's public path launches, `bench.sass` counts what each launch executes, and
a throughput model of the GPU turns counts into nanoseconds. **Nothing is measured**: the model knows no latency, no
cache, no uncoalesced access, no bank conflict, no operand read of a matrix unit, no launch cost and no half-empty GPU,
so a time is what the busiest unit of a full GPU needs at least.

What stock PyTorch computes, such as fc3's product where LeNet takes stock's, the loss and the optimizer, is no Triton
kernel and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from fastlenet.kernels import conv2d_relu_max_pool2d as convolution
from fastlenet.kernels.geometry import ConvPoolGeometry
from torch import Tensor

import fastlenet
from bench import sass
from bench.baselines import precision_mode
from bench.fake_driver import TARGETS, CompiledKernelRecord, Launch, compiling_for
from bench.fake_driver import sass as disassemble
from bench.workloads import BACKWARD, FORWARD, LENET_OPERATORS, OTHER_OPERATORS, TRAIN_STEP, ConvCase, LinearCase, Work
from fastlenet import environment, functional, selection
from fastlenet.errors import InputError, import_extra
from fastlenet.files import write_json
from fastlenet.terminal import BAD_INPUT, Parser, print_error

__all__ = ["Cost", "Device", "compare", "cost", "report"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

LABEL = "modelled from machine code, nothing measured"


@dataclass(frozen=True)
class Device:
    """Nominal rates of a GPU: a clock, and per multiprocessor and cycle what each unit does.

    Attributes:
        name: the GPU that stands for its architecture.
        processors: multiprocessors.
        ghz: boost clock.
        tb_per_s: rate of its memory; below the data sheet's, at what copies reach.
        fp32_lanes: multiply-adds per cycle of its FP32 units.
        tf32_macs, half_macs: dense multiply-adds per cycle of a multiprocessor's matrix units.
        mma_sync: part of that rate that warp-level matrix instructions (HMMA) reach.
        shared_bytes: shared memory of a multiprocessor; each program takes 1 KB more than it asks for from sm_80 on.
        parameters: where a kernel's parameters start in constant bank 0; likewise the grid's `sizes` and the `stack`.
    """

    name: str
    processors: int
    ghz: float
    tb_per_s: float
    fp32_lanes: int
    tf32_macs: int
    half_macs: int
    mma_sync: float
    shared_bytes: int
    parameters: int
    sizes: int
    stack: int


# All nominal. Processors, lanes, clocks and matrix rates follow from NVIDIA's white papers and data sheets of these
# GPUs (dense teraflops / processors / clock); integers, conversions and shared memory are taken to be alike on all.
# Memory: what large copies are reported to reach. `mma_sync`: mma.sync is reported at about 62% of wgmma's rate on
# Hopper; on sm_100 it is taken to run at Hopper's rate per multiprocessor. Constant bank offsets: read off compiled
# kernels, and proved by the tests, whose loops end by parameters.
DEVICES: dict[str, Device] = {
    "sm_80": Device("A100 SXM", 108, 1.41, 1.5, 64, 512, 1024, 1.0, 164 << 10, 0x160, 0xC, 0x28),
    "sm_90": Device("H100 SXM", 132, 1.98, 3.0, 128, 1024, 2048, 0.62, 228 << 10, 0x210, 0xC, 0x28),
    "sm_100": Device("B200", 148, 1.85, 7.0, 128, 2048, 4096, 0.31, 228 << 10, 0x380, 0x370, 0x37C),
}

SCHEDULERS = 4  # a multiprocessor issues one warp instruction for each of them a cycle
REGISTERS, MAX_WARPS, MAX_PROGRAMS = 65536, 64, 32  # of a multiprocessor


def _bytes_of(modifiers: Sequence[str]) -> int:
    """Bytes that one thread moves with a load or store."""
    for width in (256, 128, 64, 16, 8):
        if {str(width), f"U{width}", f"S{width}"} & set(modifiers):
            return width // 8
    return 4


_FP32 = ("FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2", "FHADD", "FHFMA", "FSWZADD")
_FP_ALU = ("FSETP", "FSEL", "FMNMX", "FMNMX3", "FCHK", "FSET", "HSETP2", "HSET2", "HMNMX2", "VHMNMX")
_CONTROL = re.compile(
    r"BRA|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BAR|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ERRBAR|NOP|YIELD|NANOSLEEP|BPT|KILL|"
    r"WARPGROUP\w*|SYNCS|CCTL\w*|UTCBAR|ELECT|VOTEU?|ACQBULK|PREEXIT|USETMAXREG|UVIRTCOUNT|UTCATOMSWS|ARRIVES|UCGABAR\w*|"
    r"BMOV|JMP|ENDCOLLECTIVE|PMTRIG|U?REDUX|MATCH"
)
_INTEGER = re.compile(
    r"U?(IMAD|IADD3?|LEA|SHF|LOP3|ISETP|SEL|PLOP3|MOV|IABS|IMNMX|VIMNMX3?|VIADD|VIADDMNMX|SGXT|PRMT|BMSK|POPC|FLO|BREV|IDP|"
    r"IDP4A|P2R|R2P|S2R|R2UR|LDC|LDCU|CS2R|S2UR|B2R|R2B)|ULDC|S2UR|R2UR|I2I|I2IP|VABSDIFF\w*"
)
_CONVERSION = re.compile(r"U?(F2F|F2FP|F2I|F2IP|I2F|I2FP|FRND|F2F16)")


def classify(opcode: str) -> str:
    """Return the class of an instruction: the keys of ``by_class``."""
    base, *modifiers = opcode.split(".")
    if base == "FFMA":
        return "FFMA"
    if base in ("HMMA", "HGMMA", "UTCHMMA"):
        return f"{base}.{modifiers[0]}" if base != "UTCHMMA" else base
    if base in _FP32 or base in _FP_ALU or base == "MUFU":
        return "other FP32"
    if base in ("LDG", "STG", "LD", "ST"):
        return f"{base.ljust(3, 'G')}.{8 * _bytes_of(modifiers)}"
    if base in ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL", "LDTM", "STTM"):
        return base
    if base == "LDGSTS" or base.startswith(("UTMA", "UBLK")):
        return "LDGSTS" if base == "LDGSTS" else "TMA"
    if base.startswith(("ATOM", "RED", "UATOM", "URED")) and "REDUX" not in base:
        return "atomic"
    if _CONVERSION.fullmatch(base):
        return "conversion"
    if _INTEGER.fullmatch(base):
        return "integer"
    if _CONTROL.fullmatch(base):
        return "control"
    return "other"


def _cycles(opcode: str) -> tuple[str, float]:
    """Which pipe an instruction occupies besides the scheduler, and for how many of a multiprocessor's cycles.

    ``fma`` (in units of a plain FP32 instruction), ``heavy`` (the 64 lanes of it that also do IMAD), ``alu`` (64 lanes:
    integers, comparisons, minima, packing), ``xu`` (16 lanes: conversions, reciprocals), ``lsu`` (128 bytes a cycle,
    accesses taken as coalesced and free of conflicts), or none (uniform, control and matrix instructions).
    """
    base, *modifiers = opcode.split(".")
    kind = classify(opcode)
    if base.startswith("U") or kind in ("control", "TMA", "other"):
        return "", 0.0
    if base == "FFMA" or base in _FP32:
        return "fma", 2.0 if base in ("FFMA2", "FADD2", "FMUL2") else 1.0
    if base == "IMAD":
        return "heavy", 0.5
    if base in ("F2FP", "I2FP", "F2IP") or base in _FP_ALU:
        return "alu", 0.5
    if kind == "conversion" or base in ("MUFU", "POPC", "FLO", "BREV"):
        return "xu", 2.0
    if base in ("S2R", "LDC", "CS2R", "R2UR", "B2R", "R2B"):
        return "", 0.0
    if kind == "integer":
        return "alu", 0.5
    if base in ("LDSM", "STSM"):
        return "lsu", float(modifiers[-1]) if modifiers[-1].isdigit() else 1.0
    if base == "SHFL" or kind == "atomic":
        return "lsu", 1.0
    if base in ("LDTM", "STTM"):
        return "", 0.0
    if kind.startswith(("LDG", "STG", "LDS", "STS", "LDL", "STL")):
        return "lsu", max(1.0, _bytes_of(modifiers) / 4)
    return "", 0.0


def _tensor_cycles(opcode: str, macs: float, device: Device) -> float:
    base, *modifiers = opcode.split(".")
    rate = device.tf32_macs if "TF32" in modifiers else device.half_macs
    return macs / (rate * (device.mma_sync if base == "HMMA" else 1.0))


@dataclass(frozen=True)
class Cost:
    """What one launch costs on a nominal device, over all its images; times in nanoseconds.

    Attributes:
        registers, spill_bytes: per thread; the latter counts all local memory.
        shared_bytes: per program.
        programs: of the launch.
        occupancy: programs that a multiprocessor holds at a time.
        images: images of the launch.
        execution: what its warps execute.
        times: by unit (``issue alu fma xu lsu tensor memory``), nanoseconds if that unit were all that mattered.
        memory_bytes: bytes of the distinct tensors that the launch was handed.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    programs: int
    occupancy: int
    images: int
    execution: sass.Execution
    times: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(self.times, key=lambda unit: self.times[unit])

    @property
    def ns(self) -> float:
        """The time of that unit."""
        return self.times[self.bound]

    @property
    def by_class(self) -> dict[str, float]:
        """Warp instructions by class."""
        found: Counter[str] = Counter()
        for opcode, times in self.execution.instructions.items():
            found[classify(opcode)] += times
        return dict(found.most_common())

    def __str__(self) -> str:
        per = {unit: ns / self.images for unit, ns in self.times.items()}
        classes = ", ".join(f"{name} {times / self.images:.2f}" for name, times in self.by_class.items())
        lines = [
            f"{self.ns / self.images:.3f} ns per image by {self.bound} ({LABEL})",
            "ns per image: " + ", ".join(f"{unit} {ns:.3f}" for unit, ns in per.items()),
            f"{self.execution.total / self.images:.2f} warp instructions per image: {classes}",
            f"registers {self.registers}, spills {self.spill_bytes} B, shared {self.shared_bytes} B, "
            f"{self.programs} programs of {self.num_warps} warps, {self.occupancy} at a time on a multiprocessor",
        ]
        for loop in self.execution.loops:
            lines.append(f"loop {loop.address:#06x}: {loop.instructions} instructions, {loop.trips:.1f} trips")
        for path in self.execution.rare_paths:
            lines.append(f"branch on data {path.address:#06x}: {path.instructions} instructions not counted")
        return "\n".join(lines)


def constant_bank(record: CompiledKernelRecord, launch: Launch, device: Device) -> dict[int, int]:
    """What the launch puts into constant bank 0: its parameters and the grid's size, as 32-bit words by offset."""
    words = {device.sizes + 4 * axis: size for axis, size in enumerate(launch.grid)}
    words[device.stack] = 1 << 20  # any address will do
    entry = record.text("ptx").partition(".entry")[2].partition(")")[0]
    sizes = [
        (int(found[2]) // 8, int(found[3] or 1), int(found[1] or 1))
        for found in re.finditer(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)[^\[,]*(?:\[(\d+)\])?", entry)
    ]
    given = list(launch.arguments)
    # Triton appends pointers to scratch memory of its own.
    if not len(given) <= len(sizes) <= len(given) + 2:
        raise NotImplementedError(f"{record} has {len(sizes)} parameters, but was launched with {len(given)} arguments")
    offset = device.parameters
    for (size, count, alignment), argument in zip(sizes, given, strict=False):
        offset = -(-offset // max(size, alignment)) * max(size, alignment)
        if isinstance(argument.value, int) and count == 1:  # a float decides no branch
            number = argument.value & (1 << 8 * size) - 1
            # Small parameters share a word.
            words[offset & ~3] = words.get(offset & ~3, 0) | (number << 8 * (offset & 3)) & sass.MASK
            if size == 8:
                words[offset + 4] = number >> 32
        offset += size * count
    return words


def occupancy(record: CompiledKernelRecord, device: Device) -> int:
    """How many programs a multiprocessor holds at a time."""
    per_warp = -(-32 * record.registers // 256) * 256  # registers are handed out 256 at a time
    by_registers = REGISTERS // per_warp // record.num_warps
    by_shared = device.shared_bytes // (record.shared + 1024)
    return min(by_registers, by_shared, MAX_WARPS // record.num_warps, MAX_PROGRAMS)


def memory_bytes(launch: Launch) -> int:
    """Bytes of the tensors that a launch was handed, each once, no storage more often than it is large."""
    parts: dict[tuple[int, int], dict[Any, int]] = {}
    for argument in launch.arguments:
        if argument.shape is not None and argument.strides is not None:
            size = math.prod(n for n, stride in zip(argument.shape, argument.strides, strict=True) if stride != 0)
            parts.setdefault(argument.storage, {})[argument.value, argument.shape] = size * argument.itemsize
    return sum(min(storage[1], sum(views.values())) for storage, views in parts.items())


_programs: dict[str, sass.Program] = {}


def cost(record: CompiledKernelRecord, launch: Launch | None = None, images: int = 1) -> Cost:
    """Model one launch of a kernel that `compiling_for` recorded.

    Args:
        record: the compiled kernel, for an NVIDIA architecture.
        launch: one of ``record.calls``; the last by default.
        images: what times per image are divided by.

    Raises:
        UnknownTripCountError: if a loop's trip count depends on data.
        ValueError: if the architecture has no model.
    """
    arch = f"sm_{record.target.arch}" if record.target.backend == "cuda" else str(record.target.arch)
    if arch not in DEVICES:
        raise ValueError(f"no model of {arch}, only of {', '.join(DEVICES)}")
    device = DEVICES[arch]
    launch = launch or record.calls[-1]
    if record.hash not in _programs:
        _programs[record.hash] = sass.parse(disassemble(record))
    execution = _programs[record.hash].execute(launch.grid, record.num_warps, constant_bank(record, launch, device))
    pipes: Counter[str] = Counter()
    for opcode, times in execution.instructions.items():
        pipe, cycles_each = _cycles(opcode)
        pipes[pipe] += (times - execution.idle.get(opcode, 0)) * cycles_each
    cycles = {
        "issue": execution.total / SCHEDULERS,
        "alu": pipes["alu"],
        # IMAD runs on 64 lanes at most; the rest of the arithmetic takes what is left of all.
        "fma": max(pipes["heavy"], (pipes["fma"] + 2 * pipes["heavy"]) * 32 / device.fp32_lanes),
        "xu": pipes["xu"],
        "lsu": pipes["lsu"],
        "tensor": sum(_tensor_cycles(opcode, macs, device) for opcode, macs in execution.tensor_macs.items()),
    }
    times = {unit: n / device.processors / device.ghz for unit, n in cycles.items()}
    moved = memory_bytes(launch)
    times["memory"] = moved / device.tb_per_s / 1000
    return Cost(
        registers=record.registers,
        spill_bytes=record.spill_bytes,
        shared_bytes=record.shared,
        num_warps=record.num_warps,
        programs=math.prod(launch.grid),
        occupancy=occupancy(record, device),
        images=images,
        execution=execution,
        times=times,
        memory_bytes=moved,
    )


# --- what is compiled ------------------------------------------------------------------------------------------------

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


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _shape(launch: Launch) -> str:
    sizes = ((a.name.removesuffix("_ptr"), a.shape) for a in launch.arguments if a.shape is not None)
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sizes if shape is not None)


def _row(record: CompiledKernelRecord, launch: Launch, arch: str, precision: str, images: int) -> Row:
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
        "instructions": _rounded(found.execution.total / images),
        "by_class": {name: _rounded(times / images) for name, times in found.by_class.items()},
        "issue_ns_per_image": _rounded(found.times["issue"] / images),
        "ns_per_image": {unit: _rounded(ns / images) for unit, ns in found.times.items()},
        "modelled_ns_per_image": _rounded(found.ns / images),
        "bound": found.bound,
        "memory_bytes_per_image": _rounded(found.memory_bytes / images),
        "loops": [
            {"address": f"{loop.address:#06x}", "instructions": loop.instructions, "trips": _rounded(loop.trips)}
            for loop in found.execution.loops
        ],
        "rare_paths": [
            {
                "address": f"{path.address:#06x}",
                "instructions": path.instructions,
                "times_per_warp": _rounded(path.times),
            }
            for path in found.execution.rare_paths
        ],
    }


def _identity(row: Row) -> tuple[str, ...]:
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
                        rows[key] = _row(record, launch, arch, precision, images)
                    row = rows[key]
                    if use:
                        row["used_by"] = sorted({*row["used_by"], use})
                        row["launches"][use] = row["launches"].get(use, 0) + 1
    seen: Counter[tuple[str, ...]] = Counter()
    for row in rows.values():
        identity = _identity(row)
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
                total[name] = _rounded(total[name] + launches * row[name])
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


# --- any convolution -------------------------------------------------------------------------------------------------

FLOOR_FLOP, FLOOR_BYTES = 60e3, 3e3
"""Rates of a convolution's floor: FLOP and bytes a nanosecond. 60 TFLOP/s is nine tenths of an H100's FMA units."""

FORWARD_PASS, GRAD_INPUT, GRAD_WEIGHT = "forward", "grad_input", "grad_weight"


@dataclass(frozen=True)
class ConvShape:
    """A convolution, relu and max-pool on `batch` images: what ``--conv`` models.

    Attributes:
        batch, channels, size, out_channels, kernel: as of `torch.nn.functional.conv2d`; pairs in (height, width) order.
        geometry: of convolution and pool.
        channels_last: the layout of images, results and gradients.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    geometry: ConvPoolGeometry
    channels_last: bool = False

    def pooled(self) -> tuple[int, int]:
        """Height and width of the result; raises `InputError` where the kernel or the window does not fit."""
        conv = self.geometry.conv_size(self.size, self.kernel)
        pooled = self.geometry.pooled_size(conv)
        if min(*conv, *pooled) < 1:
            raise InputError(f"nothing is left of {self.size[0]}x{self.size[1]} pixels: the result is {pooled}")
        return pooled

    def floor_ns(self, direction: str, itemsize: int) -> float:
        """The least that one pass takes, per image: its products at 60 TFLOP/s, or its tensors at 3 TB/s.

        Products count at the convolution cells that a window looks at, all cells of a window alike. Tensors count once:
        the images or their gradient, the pooled cells and their argmax, and the weight, once a batch.
        """
        cells = 1
        for axis, length in enumerate(self.geometry.conv_size(self.size, self.kernel)):
            step, first = self.geometry.pool_stride[axis], -self.geometry.pool_padding[axis]
            span = range(self.geometry.pool_size[axis] * self.geometry.pool_dilation[axis])
            seen = {first + step * i + k for i in range(self.pooled()[axis]) for k in span}
            cells *= len(seen & set(range(length)))
        depth = self.channels * math.prod(self.kernel)
        flop = 2 * cells * self.out_channels * depth
        pooled = self.out_channels * math.prod(self.pooled())
        moved = (
            self.channels * math.prod(self.size) + pooled
        ) * itemsize + pooled * self.geometry.argmax_dtype.itemsize
        moved += (depth + 1) * self.out_channels * itemsize / self.batch
        return max(flop / FLOOR_FLOP, moved / FLOOR_BYTES)


def conv_rows(shape: ConvShape, arch: str, precision: str, input_grad: bool) -> list[Row]:
    """What the forward of a training step and its gradients cost on one architecture: a row for each.

    A row adds up all launches of its pass, `launches` lists them. Its kernel is the one that takes longest.
    """
    dtype, pooled = PRECISIONS[precision], shape.pooled()
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    input = torch.empty(shape.batch, shape.channels, *shape.size, dtype=dtype, memory_format=layout)
    weight = torch.empty(shape.out_channels, shape.channels, *shape.kernel, dtype=dtype)
    bias = torch.empty(shape.out_channels, dtype=dtype)
    outputs = (shape.batch, shape.out_channels, *pooled)
    grad = torch.empty(outputs, dtype=dtype, memory_format=layout)
    argmax = torch.empty(outputs, dtype=shape.geometry.argmax_dtype, memory_format=layout)
    masks = {GRAD_INPUT: (True, False, False), GRAD_WEIGHT: (False, True, True)}
    rows = []
    for direction in (FORWARD_PASS, *([GRAD_INPUT] if input_grad else []), GRAD_WEIGHT):
        begin = time.process_time() + os.times().children_user
        with compiling_fastlenet(arch, precision) as records:
            if direction == FORWARD_PASS:
                convolution.conv2d_relu_max_pool2d(input, weight, bias, shape.geometry, True)
            else:
                operands = grad, input, weight, argmax, shape.geometry, masks[direction]
                convolution.conv2d_relu_max_pool2d_backward(*operands)
            seconds = time.process_time() + os.times().children_user - begin
            found = [_row(record, call, arch, precision, shape.batch) for record in records for call in record.calls]
        longest = max(found, key=lambda row: row["modelled_ns_per_image"] or row["registers"])
        total = [row["modelled_ns_per_image"] for row in found]
        rows.append(
            {
                "kernel": longest["kernel"],
                "direction": direction,
                "arch": arch,
                "precision": precision,
                "batch": shape.batch,
                "modelled_ns_per_image": None if None in total else _rounded(sum(total)),
                "floor_ns": _rounded(shape.floor_ns(direction, dtype.itemsize)),
                "spill_bytes": max(row["spill_bytes"] for row in found),
                "registers": max(row["registers"] for row in found),
                "compiled": len(records),
                "compile_seconds": round(seconds, 1),
                "note": LABEL,
                "launches": found,
            }
        )
    return rows


def _pair(text: str) -> tuple[int, int]:
    """Read ``5`` or ``5x3``."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number or HEIGHTxWIDTH, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _conv_shape(options: argparse.Namespace) -> ConvShape:
    """Read what ``--conv`` and the options beside it say; raises `InputError`."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)-(\d+)", options.conv)
    if found is None or options.kernel is None:
        raise InputError(f"--conv takes CxHxW-O and needs --kernel, as in --conv 3x32x32-6 --kernel 5: {options.conv}")
    channels, height, width, out_channels = map(int, found.groups())
    pool = options.pool
    geometry = ConvPoolGeometry(
        *(options.stride, options.padding, (1, 1), 1),
        *(pool, options.pool_stride or pool, options.pool_padding, (1, 1), options.ceil_mode),
    )
    if 0 in (channels, height, width, out_channels, options.batch, *options.kernel, *geometry.stride, *pool):
        raise InputError("sizes, strides and the batch are at least 1")
    if 0 in geometry.pool_stride or any(2 * p > size for p, size in zip(geometry.pool_padding, pool, strict=True)):
        raise InputError("a pool's stride is at least 1, and its padding at most half a window")
    if geometry.window_size > 255:
        raise InputError(f"windows have at most 255 cells, got {geometry.window_size}")
    size, last = (height, width), options.channels_last
    return ConvShape(options.batch, channels, size, out_channels, options.kernel, geometry, last)


def _print_conv(rows: Sequence[Row]) -> None:
    print(f"ns per image; {LABEL}")
    head = (
        "arch",
        "precision",
        "pass",
        "kernel",
        "modelled",
        "floor",
        "ratio",
        "regs",
        "spill",
        "kernels",
        "compile s",
    )
    line = "{:7} {:9} {:11} {:44} {:>9} {:>8} {:>6} {:>5} {:>6} {:>7} {:>9}"
    print(line.format(*head))
    for row in rows:
        modelled, floor = row["modelled_ns_per_image"], row["floor_ns"]
        figures = ("", "") if modelled is None else (f"{modelled:.2f}", f"{modelled / floor:.2f}")
        names = row["arch"], row["precision"], row["direction"], row["kernel"].partition(".")[2]
        sizes = row["registers"], row["spill_bytes"], row["compiled"], row["compile_seconds"]
        print(line.format(*names, figures[0], f"{floor:.2f}", figures[1], *sizes))
    print(f"{sum(row['compiled'] for row in rows)} kernels, each of them compiled once for any number of images")


# --- compile time ----------------------------------------------------------------------------------------------------


def measure_compile(arch: str, precision: str) -> Row:
    """Seconds that the kernels of one training step take to compile, from an empty cache and from a full one.

    Each in a process of its own: the seconds count from the first launch to the last, imports left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.static", "--compile-once", arch, precision]
        variables = os.environ | {"TRITON_CACHE_DIR": folder}
        cold, warm = (
            json.loads(
                subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout
            )
            for _ in range(2)
        )
    return {
        "arch": arch,
        "precision": precision,
        "cold_seconds": cold["seconds"],
        "cold_cpu_seconds": cold["cpu_seconds"],
        "cold_compiled": cold["compiled"],
        "warm_seconds": warm["seconds"],
        "warm_compiled": warm["compiled"],
    }


def compile_once(arch: str, precision: str) -> Row:
    """Compile one training step's kernels in this process; count what Triton's cache did not hold."""
    hits = []
    with compiling_fastlenet(arch, precision):
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        begin, before = time.perf_counter(), os.times()
        try:
            run_lenet(STEP, PRECISIONS[precision])
        finally:
            triton.knobs.compilation.listener = None
        seconds, after = time.perf_counter() - begin, os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # with ptxas, which is a process of its own
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "compiled": hits.count(False)}


# --- comparisons -----------------------------------------------------------------------------------------------------

TOLERANCE = 0.05
REFRESH = "python -m bench.static --compile-times --save"


def committed_path() -> Path:
    """Where the figures of the installed Triton version are kept."""
    return RESULTS / "static" / f"{triton.__version__}.json"


def completed(today: dict[str, Any], committed: dict[str, Any] | None) -> dict[str, Any]:
    """Complete a report of some architectures by what a committed one says of the others.

    ``commits`` then tells for each architecture which commit was looked at.
    """
    looked_at = {row["arch"] for row in today["rows"]}
    commits = dict.fromkeys(looked_at, today["environment"]["commit"])
    document = today | {"commits": commits}
    if committed is not None:
        others = {row["arch"] for row in committed["rows"]} - looked_at
        before = committed.get("commits", {})
        document["commits"] = {arch: before.get(arch, committed["environment"]["commit"]) for arch in others} | commits
        for part in ("totals", "compile", "rows"):
            document[part] = [line for line in committed[part] if line["arch"] in others] + today[part]
    for part in ("totals", "compile", "rows"):
        document[part] = sorted(document[part], key=lambda line: list(TARGETS).index(line["arch"]))
    document["commits"] = {arch: document["commits"][arch] for arch in TARGETS if arch in document["commits"]}
    return document


def compare(today: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """List what got worse, vanished or is new, against a committed report; only what `today` looked at counts.

    Worse is more than 5% more instructions or issue time, of a row or of a total, and any spill of a LeNet kernel on
    sm_80 and sm_90.
    """
    problems = []

    def group(row: Row) -> tuple[Any, ...]:
        return row["arch"], row["precision"], bool(row["used_by"])

    looked_at = {group(row) for row in today["rows"]}
    before = {_identity(row): row for row in committed["rows"] if group(row) in looked_at}
    now = {_identity(row): row for row in today["rows"]}
    for identity, row in now.items():
        name = " | ".join(identity)
        if row["spill_bytes"] and row["used_by"] and row["arch"] in ("sm_80", "sm_90"):
            problems.append(f"spills {row['spill_bytes']} bytes: {name}")
        if identity not in before:
            problems.append(f"not in the committed file: {name}")
        else:
            problems += _worse(name, before[identity], row)
    problems += [f"only in the committed file: {' | '.join(identity)}" for identity in before if identity not in now]
    old = {(t["arch"], t["precision"], t["use"]): t for t in committed["totals"]}
    for total in today["totals"]:
        key = (total["arch"], total["precision"], total["use"])
        if key in old:
            problems += _worse(f"total of {' | '.join(key)}", old[key], total)
    return problems


def _worse(name: str, before: Row, now: Row) -> list[str]:
    found = []
    for figure in ("instructions", "issue_ns_per_image"):
        old, new = before[figure], now[figure]
        if old is not None and new is not None and new > old * (1 + TOLERANCE):
            found.append(f"{figure} {old:.4g} -> {new:.4g} (+{new / old - 1:.0%}): {name}")
    return found


def measured(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The rows of fastlenet in the newest results of each GPU, by device; empty where no GPU was measured yet."""
    found = {}
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = sorted(device.glob("*.json"))
        if device.name != "static" and not device.name.startswith("cpu-") and files:
            rows = json.loads(files[-1].read_text(encoding="utf-8"))["rows"]
            found[device.name] = [row for row in rows if row["impl"] == "fastlenet" and row["ok"]]
    return found


def model_of(row: Row, arch: str) -> float | None:
    """Model what a measured row timed, in nanoseconds per image; None where the model does not know the work."""
    precision = row["precision"]
    case = next((c for c in (*LENET_OPERATORS, *OTHER_OPERATORS) if row["name"].endswith(f" {c.name}")), None)
    lenet = {FORWARD: INFERENCE, TRAIN_STEP: STEP}.get(row["direction"]) if row["name"] == "LeNet" else None
    if precision not in PRECISIONS or (case is None and (lenet is None or row["batch"] != BATCH)):
        return None
    dtype = PRECISIONS[precision]
    with compiling_fastlenet(arch, precision) as records:
        skipped: dict[str, int] = {}
        if case is None:
            run_lenet(str(lenet), dtype)
        else:
            run_operator(case, row["batch"], dtype, row["direction"] != FORWARD)
            if row["direction"] == BACKWARD:  # the forward that came before was not timed
                with compiling_fastlenet(arch, precision) as forward:
                    run_operator(case, row["batch"], dtype, False)
                skipped = {record.name: len(record.calls) for record in forward}
        launches = [(r, call) for r in records for call in r.calls[skipped.get(r.name, 0) :]]
        return sum(cost(record, launch).ns for record, launch in launches) / row["batch"]


def modelled_kernels(work: Work, names: Sequence[str]) -> dict[int, float]:
    """Find LeNet's kernels in the committed rows, where they are for this GPU.

    Args:
        work: inference or a training step at the batch that the rows are of.
        names: the kernels that one call launches, in order.

    Returns:
        Modelled nanoseconds per image, by position in `names`; the n-th launch of a name is the n-th row of it.
    """
    use = INFERENCE if work.direction == FORWARD else STEP
    files = sorted((RESULTS / "static").glob("*.json"))
    if not files or work.batch != BATCH or not torch.cuda.is_available():
        return {}
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    queues: dict[str, list[float]] = {}
    for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"]:
        if row["arch"] == arch and row["precision"] == work.precision and use in row["used_by"]:
            queue = queues.setdefault(row["kernel"].rpartition(".")[2], [])
            queue += [row["modelled_ns_per_image"]] * row["launches"][use]
    found = {}
    for position, name in enumerate(names):
        if queues.get(name):
            found[position] = queues[name].pop(0)
    return found


# --- printing --------------------------------------------------------------------------------------------------------


def _print_rows(console: Any, rows: Sequence[Row]) -> None:
    table_module = import_extra("rich.table")
    for arch, precision in dict.fromkeys((row["arch"], row["precision"]) for row in rows):
        device = DEVICES.get(arch)
        title = f"{arch} {precision}" + (f", {device.name}" if device else ": resources only") + f"; {LABEL}"
        table = table_module.Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in ("kernel and shape", "used by"):
            table.add_column(heading, overflow="fold")
        units = ("issue", "alu", "fma", "xu", "lsu", "tensor", "memory")
        headings = ("regs", "spill", "shared", "warps", "fit", "instr/img", *units, "ns/img", "bound")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            if (row["arch"], row["precision"]) != (arch, precision):
                continue
            uses = [
                f"{'inference' if use == INFERENCE else 'step'}{f' x{n}' if n > 1 else ''}"
                for use, n in row["launches"].items()
            ]
            resources = [row["registers"], row["spill_bytes"], row["shared_bytes"], row["num_warps"]]
            cells = [f"{row['kernel']}  {row['shape']}", ", ".join(uses), *map(str, resources)]
            if row["instructions"] is not None:
                cells += [str(row["occupancy"]), f"{row['instructions']:.1f}"]
                cells += [f"{row['ns_per_image'][unit]:.3f}" for unit in units]
                cells += [f"{row['modelled_ns_per_image']:.3f}", row["bound"]]
            table.add_row(*cells)
        console.print(table)
        console.print()


def _print_totals(console: Any, document: dict[str, Any]) -> None:
    table = import_extra("rich.table").Table(
        title=f"LeNet at batch {BATCH}, ns per image; {LABEL}", title_justify="left", title_style="bold", box=None
    )
    for heading in ("arch", "precision", "use", "launches", "instr/img", "issue", "modelled", "goal", ""):
        table.add_column(heading, justify="left" if heading in ("arch", "precision", "use", "") else "right")
    for total in document["totals"]:
        goal = total["goal_ns_per_image"]
        verdict = "" if goal is None else "met" if total["modelled_ns_per_image"] <= goal else "missed"
        figures = [f"{total[name]:.2f}" for name in ("instructions", "issue_ns_per_image", "modelled_ns_per_image")]
        use = "inference" if total["use"] == INFERENCE else "forward + backward"
        head = [total["arch"], total["precision"], use, str(total["launches"])]
        table.add_row(*head, *figures, "" if goal is None else f"{goal:g}", verdict)
    console.print(table)
    console.print(
        "What stock PyTorch computes (fc3 where LeNet takes stock's addmm, loss, optimizer) is not in the sums.\n"
    )


def _print_rest(console: Any, document: dict[str, Any]) -> None:
    for row in document["rows"]:
        for path in row["rare_paths"] or ():
            console.print(
                f"branch on data at {path['address']} of {row['kernel']} ({row['arch']} {row['precision']}): "
                f"{path['instructions']} instructions of its longer side not counted"
            )
    if document["compile"]:
        console.print("Compile time of one training step's kernels, measured on this machine's CPU in a fresh process:")
    for line in document["compile"]:
        verdict = "met" if line["cold_seconds"] <= COMPILE_GOAL else "missed"
        console.print(
            f"  {line['arch']} {line['precision']}: {line['cold_compiled']} kernels in {line['cold_seconds']:.1f} s "
            f"({line['cold_cpu_seconds']:.1f} s of CPU) from an empty cache (goal {COMPILE_GOAL:g} s: {verdict}); "
            f"a second process compiled {line['warm_compiled']} in {line['warm_seconds']:.1f} s"
        )


def _print_measured(console: Any) -> None:
    results = measured()
    if not results:
        console.print(
            "Model against measurement: no GPU results in bench/results, so there is nothing to compare with."
        )
    for device, rows in results.items():
        arch = next((name for name, d in DEVICES.items() if d.name.split()[0].lower() in device), None)
        if arch is None:
            console.print(f"Model against measurement on {device}: no model of it.")
            continue
        console.print(f"Model ({LABEL.partition(',')[0]}) against measurement on {device}, ns per image:")
        for row in rows:
            model = model_of(row, arch)
            if model is not None:
                took = row["ns_per_image"]
                work = f"{row['name']} {row['direction']} {row['batch']} {row['precision']} {row['level']}"
                console.print(f"  {work}: model {model:.3g}, measured {took:.3g}: {took / model:.2f} times the model")


# --- the command -----------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m bench.static", description=f"What kernels cost: {LABEL}.", allow_abbrev=False)
    parser.add_argument("--arch", action="append", choices=TARGETS, help="only this architecture (may be repeated)")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="only this precision (may be repeated)"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name or shape contains NAME")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE as JSON")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write it to {committed_path().relative_to(ROOT)}; other architectures there stay as they are",
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed file; exit code 1 if worse")
    parser.add_argument("--compile-times", action="store_true", help="measure compile times too, on this CPU")
    parser.add_argument("--compile-once", nargs=2, metavar=("ARCH", "PRECISION"), help=argparse.SUPPRESS)
    conv = parser.add_argument_group("any convolution, relu and max-pool, instead of what fastlenet ships figures of")
    conv.add_argument("--conv", metavar="CxHxW-O", help="input channels, height and width, output channels")
    conv.add_argument("--kernel", type=_pair, metavar="K", help="size of the kernel, K or HxW")
    conv.add_argument("--stride", type=_pair, default=(1, 1), metavar="S")
    conv.add_argument("--padding", type=_pair, default=(0, 0), metavar="P")
    conv.add_argument("--pool", type=_pair, default=(2, 2), metavar="Z", help="size of the pool's window (2)")
    conv.add_argument("--pool-stride", type=_pair, metavar="Y", help="the window's size by default")
    conv.add_argument("--pool-padding", type=_pair, default=(0, 0), metavar="Q")
    conv.add_argument("--ceil-mode", action="store_true")
    conv.add_argument("--input-grad", action="store_true", help="with the input's gradient")
    conv.add_argument("--channels-last", action="store_true")
    conv.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"images ({BATCH})")
    conv.add_argument("--json", action="store_true", help="print the rows of --conv as JSON")
    options = parser.parse_args(arguments)
    options.arch = options.arch or list(TARGETS)
    options.precision = options.precision or list(PRECISIONS)
    if options.save and (options.only or len(options.precision) < len(PRECISIONS)):
        parser.error("--save writes whole architectures: leave out --precision and --only")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    if options.compile_once:
        print(json.dumps(compile_once(*options.compile_once)))
        return 0
    try:
        if options.conv:
            works = [(arch, precision) for arch in options.arch for precision in options.precision]
            shape = _conv_shape(options)
            rows = [row for work in works for row in conv_rows(shape, *work, options.input_grad)]
            print(json.dumps(rows, indent=1)) if options.json else _print_conv(rows)
            return 0
        document = report(options.arch, options.precision, options.only)
        if options.compile_times:
            works = [(arch, precision) for arch in options.arch for precision in options.precision]
            document["compile"] = [measure_compile(*work) for work in works]
        path = committed_path()
        committed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if options.output:
            write_json(options.output, document)
        if options.save:
            write_json(path, completed(document, committed))
        console = import_extra("rich.console").Console(highlight=False, markup=False, soft_wrap=False)
        if not console.is_terminal:
            console = import_extra("rich.console").Console(highlight=False, markup=False, width=200)
        _print_rows(console, document["rows"])
        _print_totals(console, document)
        _print_rest(console, document)
        _print_measured(console)
        if not options.check:
            return 0
        if committed is None:
            raise InputError(f"no committed figures for triton {triton.__version__}: {path.name} is not there")
    except InputError as error:
        return print_error("bench.static", error, BAD_INPUT)
    if options.only:
        committed["rows"] = [r for r in committed["rows"] if options.only in f"{r['kernel']} {r['shape']}"]
        document["totals"] = []
    problems = compare(document, committed)
    print("\n".join(["worse than the committed figures:", *problems] if problems else ["as the committed figures"]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
