"""A throughput model of a GPU: what one launch of a compiled kernel costs by its machine code.

The model knows no latency, no cache, no uncoalesced access, no bank conflict, no operand read of a matrix unit, no
launch cost and no half-empty GPU, so a time is what the busiest unit of a full GPU needs at least.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.static import sass
from bench.static.fake_driver import CompiledKernelRecord, Launch
from bench.static.fake_driver import sass as disassemble

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
