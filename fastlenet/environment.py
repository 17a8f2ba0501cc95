"""A record of the machine and the installation, for `fastlenet env`, bug reports and result files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastlenet
from fastlenet import selection
from fastlenet.errors import ROOT

# Variables that change what runs, how fast or how exactly. Others are not recorded, because they may hold secrets.
_VARIABLES = re.compile(
    r"(FASTLENET|TRITON|TORCHINDUCTOR|TORCHDYNAMO|OMP|MKL|GOMP|KMP|ONEDNN|DNNL)_\w+|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|"
    r"MODULE_LOADING)|(CUBLAS|CUDNN|NVIDIA_TF32|HIP_VISIBLE|ROCR_VISIBLE)\w*|PYTORCH\w*ALLOC_CONF|TORCH_(COMPILE|LOGS)\w*"
)
# Optional packages that matter if they are installed.
_PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "torchvision",
    "mlxtend",
    "safetensors",
    "kernels",
    "onnx",
    "onnxruntime",
    "pytest",
    "hypothesis",
)

# nvidia-smi's names for what `clocks` reports: MHz, W and degrees Celsius.
_CLOCKS = {
    "sm_mhz": "clocks.current.sm",
    "memory_mhz": "clocks.current.memory",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def collect() -> dict[str, Any]:
    """Describe this machine and installation in JSON values, with None for unknown ones.

    Returns:
        A dict with the keys ``device`` (name of the GPU, or of the CPU where there is none), ``device_slug``,
        ``driver``, ``cuda``, ``hip``, ``torch``, ``triton``, ``fastlenet``, ``python``, ``platform``, ``commit`` (from
        the variable ``FASTLENET_COMMIT`` or else git), ``dirty``, ``precision`` (PyTorch's fp32 switches), ``threads``,
        ``cpu`` and ``clocks`` (as seen now: MHz, W, degrees Celsius); also ``backend`` (the setting and what a float32
        tensor of this device takes, and why), ``gpus`` (each with its architecture and memory), ``cudnn``,
        ``variables`` (those of the environment that change what runs) and ``packages`` (versions of optional ones).

    Examples:
        >>> import fastlenet.environment
        >>> fastlenet.environment.collect()["fastlenet"] == fastlenet.__version__
        True
    """
    commit, dirty = _commit()
    smi = _nvidia_smi()
    return {
        "device": device_name(),
        "device_slug": device_slug(),
        "driver": smi.pop("driver", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastlenet": fastlenet.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "dirty": dirty,
        "precision": precision(),
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "cpu": {"model": cpu_model(), "count": os.cpu_count(), "vectors": torch.backends.cpu.get_cpu_capability()},
        "clocks": smi or None,
        "backend": _backend(),
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "cudnn": torch.backends.cudnn.version(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def precision() -> dict[str, str]:
    """Read PyTorch's fp32 precision switches.

    Only the new API is read, because the old ``allow_tf32`` raises once the new one was used.
    """
    return {
        "cudnn.conv": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
    }


def device_name() -> str:
    """Name the device that computes here: the current GPU, or the CPU where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()


def device_slug() -> str:
    """Name the device as a folder name: ``nvidia-h100-80gb-hbm3``, or ``cpu-<model>`` where there is no GPU."""
    name = device_name() if torch.cuda.is_available() else f"cpu-{cpu_model()}"
    name = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cpu_model() -> str:
    """Name the CPU as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _backend() -> dict[str, str]:
    """The setting in force, and which implementation a float32 tensor of this device takes and why."""
    try:
        setting = fastlenet.backend()
        choice = selection.choose_by_type(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError, NotImplementedError) as error:  # an invalid setting, which the report must show
        return {"setting": os.environ.get("FASTLENET_BACKEND", "auto"), "takes": f"none: {error}"}
    return {"setting": setting, "takes": f"{choice.implementation}: {choice.reason}"}


def _gpu(number: int) -> dict[str, Any]:
    """A GPU's name, architecture and memory."""
    properties = torch.cuda.get_device_properties(number)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return {
        "name": properties.name,
        "architecture": architecture or f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _version(package: str) -> str | None:
    """Version of an installed package, without importing it: importing triton would fix its interpreter mode."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package runs from, and whether its files were changed since."""
    # A copy of the files may have no repository, or an outdated one. FASTLENET_COMMIT then names the commit. Git would
    # compare with another commit, so changes are unknown.
    if commit := os.environ.get("FASTLENET_COMMIT"):
        return commit, None
    # An installed package may lie inside some other project's repository, whose commit says nothing about it.
    if not (ROOT / ".git").exists():
        return None, None
    # Without optional locks `git status` writes nothing, so it cannot disturb a git command running beside it.
    git = "git", "--no-optional-locks", "-C", str(ROOT)
    # Files that git does not track, such as new results, do not affect a measurement.
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return _output(*git, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _nvidia_smi() -> dict[str, Any]:
    """The current GPU's driver version and clocks, or an empty dict."""
    if not torch.cuda.is_available() or torch.version.hip:
        return {}
    # By UUID, because nvidia-smi counts all GPUs and PyTorch only those in CUDA_VISIBLE_DEVICES.
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = ",".join(("driver_version", *_CLOCKS.values()))
    line = _output("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    driver, *values = [value.strip() for value in (line or "").split(",")]
    if len(values) != len(_CLOCKS):
        return {}
    # Some values may be "[N/A]" or "[Not Supported]".
    numbers = (float(value) if value.replace(".", "").isdigit() else None for value in values)
    return {"driver": driver, **dict(zip(_CLOCKS, numbers, strict=True))}


def _output(*command: str) -> str | None:
    """Return a command's output, or None if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
