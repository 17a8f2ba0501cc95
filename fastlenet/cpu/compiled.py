"""Kernels as machine code: compiled once by numba, kept on disk, loaded by llvmlite alone.

numba turns a kernel's Python into LLVM's language, LLVM turns that into an object file of a few kilobytes, and the file
is kept. A later process loads it in about a millisecond and never imports numba, which alone takes 0.3 s; numba's own
cache would need it. The file's name is a digest of everything that the code depends on: this package's sources, the
versions of numba and llvmlite, the CPU and its features. So a file is never out of date, and several machines may
share a folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastlenet.errors import KernelError, install_command

LEAST_NUMBA = (0, 61)
"""The first numba whose llvmlite (0.44) has the LLVM 15 that these kernels were checked to need."""

_log = logging.getLogger("fastlenet")
_lock = threading.RLock()
_engines: list[object] = []  # machine code lives as long as its engine
_failure: str | None = None


def unavailable() -> str | None:
    """Why compiled kernels cannot run here, and what to do about it; None if they can. Imports no numba.

    One kernel that cannot be compiled or loaded turns all of them off, as the next would take as long to fail.
    """
    return _failure or _obstacle()


@functools.cache
def _obstacle() -> str | None:
    reason = _missing()
    if reason is not None:
        _log.warning("compiled CPU kernels are off: %s", reason)
    return reason


def _failed(kernel: str, error: BaseException) -> KernelError:
    """Note that a kernel cannot be had, and return the error that says so."""
    global _failure
    if _failure is None:
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _failure = f"the kernel {kernel} could not be compiled or loaded ({cause})"
        _log.warning("compiled CPU kernels are off: %s", _failure)
    return KernelError(f"fastlenet: {_failure}; choose backend 'auto' or 'aten' to run without it")


def _missing() -> str | None:
    try:
        version = importlib.metadata.version("numba")
        importlib.metadata.version("llvmlite")
    except importlib.metadata.PackageNotFoundError:
        return f"numba is not installed ({install_command('fastlenet[cpu]')})"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_NUMBA:
        least = ".".join(map(str, LEAST_NUMBA))
        return f"numba {version} is older than {least} (pip install 'numba>={least}')"
    if sys.maxsize < 2**32:
        return "this Python is a 32-bit one"
    if sys.byteorder != "little":
        return f"{platform.machine()} is big-endian"
    if folder() is None:
        return "no folder for compiled code can be written (set FASTLENET_CACHE_DIR to one)"
    return None


def _folders() -> list[Path]:
    """Where compiled code may be kept, best first."""
    chosen = os.environ.get("FASTLENET_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return [Path(chosen)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [Path(__file__).parent / "__pycache__", Path(home) / "fastlenet"]


@functools.cache
def folder() -> Path | None:
    """The first folder that can be written, None if there is none."""
    for candidate in _folders():
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=candidate):
                return candidate
        except OSError:
            continue
    return None


@functools.cache
def _machine() -> tuple[str, str]:
    """Name and features of this CPU, as LLVM has them."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@functools.cache
def register_vectors() -> int:
    """How many vectors of 16 float32 the CPU's registers hold: 32 of AVX-512, 8 of AVX2 or NEON."""
    return 32 if "+avx512f" in _machine()[1] else 8


@functools.cache
def _digest() -> str:
    """What all compiled code depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for package in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(repr(_machine()).encode())
    return digest.hexdigest()[:24]


@functools.cache
def address(module: str, factory: str, *constants: int) -> int:
    """Return the address of a kernel's machine code, compiled or loaded at the first request.

    Args:
        module: the module of this package that holds the kernel.
        factory: its function that returns the kernel, when called with `constants`.
        constants: what the kernel is compiled for.
    """
    with _lock:
        stem = "-".join([module, factory, *map(str, constants)])
        try:
            return _found(module, factory, constants, stem)
        except Exception as error:  # whatever numba, LLVM, the linker or the disk raise
            raise _failed(stem, error) from error


def _found(module: str, factory: str, constants: tuple[int, ...], stem: str) -> int:
    """Load a kernel from disk; compile it where there is none, or none that can be loaded."""
    place = folder()
    if place is None:
        raise OSError(_missing())
    file = place / f"{stem}-{_digest()}.o"
    if file.exists():
        with contextlib.suppress(Exception):
            return _loaded(file.read_bytes())
    code = _compile(importlib.import_module(f"{__package__}.{module}"), factory, constants)
    _keep(file, code)
    return _loaded(code)


def _target_machine() -> object:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _machine()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", jit=True)


def _compile(module: ModuleType, factory: str, constants: tuple[int, ...]) -> bytes:
    """Return a kernel's name and object file."""
    import llvmlite.binding as llvm

    with _little_optimization():
        kernel = getattr(module, factory)(*constants)
        parsed = llvm.parse_assembly(kernel.inspect_llvm())
    code: bytes = _target_machine().emit_object(parsed)  # type: ignore[attr-defined]
    return kernel.native_name.encode() + b"\n" + code


@contextlib.contextmanager
def _little_optimization() -> Iterator[None]:
    """Compile at level 1 of 3: kernels spell their vectors out, so more takes twice as long and changes nothing."""
    from numba.core import config

    before = config.OPT
    config.OPT = type(before)(1)
    try:
        yield
    finally:
        config.OPT = before


def _keep(file: Path, code: bytes) -> None:
    """Write a file in one step, so that no other process sees half of it; failing to costs only time later."""
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(code)
        os.replace(temporary, file)
    except OSError as error:
        _log.warning("compiled code cannot be kept: %s", error)


def _loaded(code: bytes) -> int:
    """Bring machine code into memory and return its address."""
    import llvmlite.binding as llvm

    name, _, binary = code.partition(b"\n")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
    engine.finalize_object()
    _engines.append(engine)
    found: int = engine.get_function_address(name.decode())
    if not found:
        raise RuntimeError(f"the compiled kernel {name.decode()} has no address")
    return found
