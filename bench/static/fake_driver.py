"""Real launchers, really compiled, for a GPU that is not there.

Triton asks its *active driver* for the target and for the device's limits, and hands it the finished binary. A driver
that answers for an architecture of our choice and launches nothing lets the shipped launchers run on CPU tensors: with
their own configurations, their own specialisation (alignment, divisibility, value 1), and `OutOfResources` where a
kernel needs more shared memory than the architecture has. What was launched is recorded, with registers and spills.

Works in a process without ``TRITON_INTERPRET``; Triton 3.6 to 3.8.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "TARGETS",
    "Argument",
    "CompiledKernelRecord",
    "FakeDriver",
    "Launch",
    "OutOfResources",
    "Resources",
    "assert_no_spills",
    "compiling_for",
    "opcodes",
    "sass",
    "table",
]

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""The architectures that every launcher must compile for."""

_SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx942": 304}
# Far above any real ordinal. Triton caches compiled kernels by device number, so a number of its own per driver keeps
# drivers from seeing each other's kernels, or those of a real GPU.
_ordinals = itertools.count(1_000_000)


@dataclass(frozen=True)
class Resources:
    """What one thread of a compiled kernel needs; ``spill_bytes`` counts all local (scratch) memory."""

    registers: int
    spill_bytes: int
    details: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Argument:
    """A run-time argument of a launch: a number, or where a tensor lies (the tensor itself is not kept alive).

    Attributes:
        name: as the kernel calls it; elements of tuples carry their index.
        type: Triton's name for it, such as ``i32`` or ``*fp16``.
        value: the number, or the tensor's address; None for an optional tensor that was not given.
        shape, strides: of a tensor, else None.
        storage: address and bytes of the memory behind a tensor.
    """

    name: str
    type: str
    value: Any
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    itemsize: int = 0
    storage: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Launch:
    """One launch: programs along each axis, and the arguments that are not constants of the compilation."""

    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass
class CompiledKernelRecord:
    """One compiled kernel that was launched: what it was compiled from and what came out."""

    name: str
    target: GPUTarget
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    attributes: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int
    hash: str
    files: dict[str, Path]
    module: str = ""
    calls: list[Launch] = field(default_factory=list)

    def __str__(self) -> str:
        constants = ", ".join(f"{k}={v}" for k, v in self.constexprs.items())
        return f"{self.name}[{_arch(self.target)}]({constants}, num_warps={self.num_warps})"

    @property
    def launches(self) -> list[tuple[int, int, int]]:
        """The grids of all launches, in order."""
        return [call.grid for call in self.calls]

    @property
    def asm(self) -> dict[str, str | bytes]:
        """Every stage that Triton kept, by extension: ``ttir ttgir llir ptx cubin`` or ``... amdgcn hsaco``."""
        binary = ("cubin", "hsaco")
        return {ext: p.read_bytes() if ext in binary else p.read_text() for ext, p in self.files.items()}

    def text(self, extension: str) -> str:
        """One textual stage, e.g. ``ptx`` or ``amdgcn``."""
        if extension not in self.files:
            raise KeyError(f"{self} has no {extension!r}, only {', '.join(sorted(self.files))}")
        return self.files[extension].read_text()

    @property
    def assembly(self) -> str:
        """PTX on NVIDIA, GCN assembly on AMD."""
        return self.text("ptx" if self.target.backend == "cuda" else "amdgcn")

    def count(self, pattern: str) -> int:
        r"""How many times the regular expression occurs in `assembly` (``r"max\.NaN\.f32"``)."""
        return len(re.findall(pattern, self.assembly))

    @functools.cached_property
    def resources(self) -> Resources:
        """Registers and spills, read from the binary (NVIDIA) or the assembly's metadata (AMD)."""
        return _nvidia_resources(self) if self.target.backend == "cuda" else _amd_resources(self)

    @property
    def registers(self) -> int:
        """Registers per thread (vector registers on AMD)."""
        return self.resources.registers

    @property
    def spill_bytes(self) -> int:
        """Bytes of local (scratch) memory per thread: spilled registers, or a stack, which is no better."""
        return self.resources.spill_bytes


def _arch(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _limit(table: Mapping[Any, int], target: GPUTarget) -> int:
    try:
        return table[target.arch]
    except KeyError:
        known = ", ".join(map(str, table))
        raise ValueError(f"no device limits are known for {_arch(target)}, only for {known}") from None


def _tool(name: str) -> str:
    return str(getattr(triton.knobs.nvidia, name).path)


def _run_on_cubin(record: CompiledKernelRecord, tool: str, *options: str) -> str:
    if "cubin" not in record.files:
        raise ValueError(f"{record} was not compiled for NVIDIA")
    with tempfile.TemporaryDirectory() as folder:
        # A plain name: the cache's own path may hold anything.
        path = Path(folder, "kernel.cubin")
        path.write_bytes(record.files["cubin"].read_bytes())
        done = subprocess.run([_tool(tool), *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed on {record}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _nvidia_resources(record: CompiledKernelRecord) -> Resources:
    output = _run_on_cubin(record, "cuobjdump", "-res-usage")
    worst: Counter[str] = Counter()
    for line in output.splitlines():
        if "REG:" in line:  # one line per function
            for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line):
                worst[key] = max(worst[key], int(value))
    if "REG" not in worst:
        raise RuntimeError(f"cuobjdump said nothing about {record}: {output!r}")
    return Resources(worst["REG"], worst["STACK"] + worst["LOCAL"], dict(worst))


def _amd_resources(record: CompiledKernelRecord) -> Resources:
    text = record.text("amdgcn")
    details = {}
    for key in ("vgpr_count", "agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        found = re.findall(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        details[key] = max(map(int, found), default=0)
    found = re.findall(r"^\s*\.private_segment_fixed_size:\s*(\d+)", text, re.MULTILINE)
    if not found or not details["vgpr_count"]:
        raise RuntimeError(f"the assembly of {record} has no resource metadata")
    scratch = max(map(int, found))
    details["private_segment_fixed_size"] = scratch
    # Scalar registers spill into lanes of vector registers, which costs no memory. Vector registers spill to scratch,
    # or to accumulation registers: no memory either, but not what a shipped configuration should do.
    return Resources(details["vgpr_count"], scratch or 4 * details["vgpr_spill_count"], details)


def sass(record: CompiledKernelRecord) -> str:
    """The machine code of an NVIDIA kernel as text."""
    return _run_on_cubin(record, "nvdisasm", "-c")


def opcodes(record: CompiledKernelRecord) -> Counter[str]:
    """How often each machine instruction occurs in an NVIDIA kernel, modifiers included (``FFMA``, ``LDG.E.128``)."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass(record), re.MULTILINE)
    if not found:
        raise RuntimeError(f"no instructions recognised in the SASS of {record}")
    return Counter(found)


class _Utils:
    """The part of a driver that loads binaries."""

    def __init__(self, target: GPUTarget) -> None:
        self._properties = {
            "max_shared_mem": _limit(_SHARED_LIMIT, target),
            "max_num_regs": 65536,
            "multiprocessor_count": _limit(_PROCESSORS, target),
            "sm_clock_rate": 1_500_000,
            "mem_clock_rate": 2_000_000,
            "mem_bus_width": 5120,
            "warpSize": target.warp_size,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(self._properties)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Return module, function, registers, spills and the largest block of a kernel that cannot be launched."""
        if not kernel:
            raise RuntimeError(f"kernel {name} was compiled to an empty binary")
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Forget a module."""

    def set_printf_fifo_size(self, size: int) -> None:
        """Ignore the size of a buffer that does not exist."""


class FakeDriver:
    """Answers Triton's questions for one architecture; `records` lists the kernels launched so far."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = _Utils(target)
        self.device = next(_ordinals)
        self.records: list[CompiledKernelRecord] = []
        self._functions: dict[int, Any] = {}

    @classmethod
    def is_active(cls) -> bool:
        """Whether there is such a device: always."""
        return True

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """The device's number."""
        return self.device

    def set_current_device(self, device: int) -> None:
        """There is only one."""

    def get_current_stream(self, device: int) -> int:
        """There is only one."""
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        """Its version, as PyTorch tells it."""
        return divmod(self.target.arch, 10) if isinstance(self.target.arch, int) else (9, 4)

    def get_device_interface(self) -> Any:
        """The module that would synchronise."""
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        """No C++ is made."""
        return ty

    def assemble_tensormap_to_arg(self, tensormaps_info: Any, args: Any) -> Any:
        """No argument becomes a tensor map."""
        return args

    def get_benchmarker(self) -> Any:
        """An autotuner compiles every configuration, times nothing and takes the first."""

        def benchmark(kernel_call: Any, *, quantiles: Sequence[float] | None = None, **_: Any) -> Any:
            kernel_call()
            return [1.0] * len(quantiles) if quantiles else 1.0

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """There is no cache to fill."""
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no cache to clear."""

    def launcher_cls(self, src: Any, metadata: Any) -> _Launcher:
        """Make what Triton calls instead of launching; it does so once for each compiled kernel."""
        return _Launcher(self, src, metadata)

    def forget_kernels(self) -> None:
        """Drop the kernels that Triton's functions cached for this driver."""
        for function in self._functions.values():
            for kernel in function.device_caches.pop(self.device, ({},))[0].values():
                # Triton 3.8 asks the driver to unload a dying kernel's module, whichever driver is active by then.
                kernel.module = None
        self._functions.clear()


class _Launcher:
    """Records launches of one compiled kernel."""

    def __init__(self, driver: FakeDriver, src: Any, metadata: Any) -> None:
        self._driver = driver
        names = src.fn.arg_names
        # Triton names the files in its cache after the function, cut to 150 characters.
        group = get_cache_manager(metadata.hash).get_group(f"{src.name[:150]}.json") or {}
        self._record = CompiledKernelRecord(
            name=src.name,
            target=metadata.target,
            signature=dict(src.signature),
            constexprs={_path(names, path): value for path, value in src.constants.items()},
            attributes={_path(names, path): value for path, value in src.attrs.items() if value},
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            shared=metadata.shared,
            hash=metadata.hash,
            files={Path(p).suffix[1:]: Path(p) for p in group.values() if not p.endswith(".json")},
            module=src.fn.__module__,
        )
        if not self._record.files:
            raise RuntimeError(f"Triton's cache holds no files for {self._record}")
        driver._functions[id(src.fn)] = src.fn

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *args: Any) -> None:
        record = self._record
        if not record.calls:
            self._driver.records.append(record)
        # The kernel's own arguments come last, constants included.
        names = list(record.signature)
        arguments = zip(names, record.signature.values(), args[len(args) - len(names) :], strict=True)
        grid = (int(grid_x), int(grid_y), int(grid_z))
        record.calls.append(Launch(grid, tuple(_arguments(arguments))))


def _arguments(given: Iterable[tuple[str, Any, Any]]) -> Iterator[Argument]:
    """Flatten arguments (name, Triton's type, value), and leave out what was compiled in."""
    for name, kind, value in given:
        if isinstance(kind, tuple):
            yield from _arguments((f"{name}[{i}]", *pair) for i, pair in enumerate(zip(kind, value, strict=True)))
        elif kind == "constexpr":
            continue
        elif isinstance(value, TensorDescriptor):
            yield from _arguments([(name, kind, value.base)])
            # As Triton's launcher appends them, which a kernel that copies by the descriptor itself does not read.
            sizes = *(("i32", size) for size in value.shape), *(("i64", stride) for stride in value.strides)
            yield from (Argument(f"{name}.{place}", *size) for place, size in enumerate(sizes))
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            place = (storage.data_ptr(), storage.nbytes())
            yield Argument(name, kind, value.data_ptr(), tuple(value.shape), value.stride(), value.itemsize, place)
        else:
            yield Argument(name, kind, value)


def _path(names: Sequence[str], path: Any) -> str:
    path = path if isinstance(path, tuple) else (path,)
    return names[path[0]] + "".join(f"[{i}]" for i in path[1:])


@contextlib.contextmanager
def compiling_for(target: GPUTarget | str) -> Iterator[list[CompiledKernelRecord]]:
    """Compile for ``target`` whatever kernels are launched in this context, and run none of them.

    Launch on CPU tensors. Outputs keep whatever they were allocated with.

    Args:
        target: an architecture, or its name in `TARGETS`.

    Yields:
        The list of compiled kernels, one entry each however often launched; it grows as they are launched.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process cannot compile kernels")
    if isinstance(target, str):
        target = TARGETS[target]
    fake = FakeDriver(target)
    before = getattr(triton_driver, "_active", None)
    triton_driver.set_active(fake)
    try:
        yield fake.records
    finally:
        # With None Triton looks for a real driver again when it next needs one; `reset_active` would look now and fail.
        triton_driver._active = before
        fake.forget_kernels()


def table(records: Sequence[CompiledKernelRecord]) -> str:
    """The records' resources, a line each."""
    lines = [f"{'registers':>9} {'spill':>6} {'shared':>7} {'warps':>5}  kernel"]
    for r in records:
        lines.append(f"{r.registers:>9} {r.spill_bytes:>6} {r.shared:>7} {r.num_warps:>5}  {r}")
    return "\n".join(lines)


def assert_no_spills(records: Sequence[CompiledKernelRecord]) -> None:
    """Assert that kernels were launched and that none uses local memory."""
    if not records:
        raise AssertionError("no kernel was launched, so nothing was checked")
    offenders = [r for r in records if r.spill_bytes]
    if offenders:
        raise AssertionError(f"{len(offenders)} of {len(records)} kernels spill:\n{table(offenders)}")
