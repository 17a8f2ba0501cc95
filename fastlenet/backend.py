"""Which implementation runs: the user's choice, and what follows from it for a given call."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from fastlenet.kernels.geometry import WIDEST_LAYER

BACKENDS = ("auto", "triton", "aten")

logger = logging.getLogger("fastlenet")


def _validated(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, but got {name!r}")
    return name


# The variable is looked up at every call, and os.environ's own look-up takes ten times as long as its dictionary's.
_variables, _VARIABLE = os.environ._data, os.environ.encodekey("FASTLENET_BACKEND")  # type: ignore[attr-defined]

# Process-wide on purpose, like PyTorch's own precision switches: autograd runs a GPU's backward on a thread of its own,
# and that thread must see what the forward's caller chose.
_chosen: str | None = None


def backend(input: torch.Tensor | None = None) -> str:
    """Tell which implementation runs.

    Args:
        input: a tensor whose device and dtype decide under ``"auto"``.

    Returns:
        Without `input`, the setting in force: ``"auto"``, ``"triton"`` or ``"aten"``. With `input`, the implementation
        that an operator would take for it: ``"triton"`` or ``"aten"``.

    Raises:
        ValueError: if the environment variable ``FASTLENET_BACKEND`` holds anything else.
        RuntimeError: with `input`, if ``"triton"`` is forced and cannot run there; the message says what to do.
        NotImplementedError: with `input`, if ``"triton"`` is forced and no kernel covers the dtype.

    Example:
        >>> import torch, fastlenet
        >>> fastlenet.backend(torch.empty(2, dtype=torch.float64))
        'aten'
    """
    if input is not None:
        return "triton" if use_triton(input) else "aten"
    if _chosen is not None:
        return _chosen
    if not _variables.get(_VARIABLE):
        return "auto"
    return _validated(os.environ["FASTLENET_BACKEND"], "FASTLENET_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force an implementation within a ``with`` block; it overrides ``FASTLENET_BACKEND``.

    The setting is process-wide, as PyTorch's precision switches are: a backward pass inside the block follows it too,
    except that of a linear layer whose forward ran on a CPU under ``"auto"``, which is stock's own.

    Args:
        name: ``"auto"`` (Triton for tensors on a GPU that Triton drives, ATen elsewhere), ``"triton"`` or ``"aten"``.
            A forced backend that cannot run raises; it never falls back silently.

    Raises:
        ValueError: if `name` is none of these.

    Example:
        >>> import fastlenet
        >>> with fastlenet.use_backend("aten"):
        ...     print(fastlenet.backend())
        aten
    """
    global _chosen
    before, _chosen = _chosen, _validated(name, "backend")
    try:
        yield
    finally:
        _chosen = before


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _unreachable(device: torch.device) -> str | None:
    """Why Triton cannot drive `device`, or None if it can."""
    if not _triton_installed():
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and not (device.type == "cpu" and triton_interpreted()):
        return (
            f"Triton does not drive {device.type} tensors: move them to a GPU, or set TRITON_INTERPRET=1 before "
            "importing triton to interpret the kernels on the CPU"
        )
    return None


def _uncovered(input: torch.Tensor, cells: int, width: int) -> str | None:
    """Why no Triton kernel covers a call, or None if one does."""
    if input.dtype not in TRITON_DTYPES:
        covered = ", ".join(str(dtype) for dtype in TRITON_DTYPES)
        return f"the Triton kernels cover {covered}, not {input.dtype}"
    if cells > 255:
        return f"the Triton kernels cover pooling windows of up to 255 cells, not {cells}"
    if width > WIDEST_LAYER:
        return f"the Triton kernels cover layers of up to {WIDEST_LAYER} features, not {width}"
    return None


def use_triton(input: torch.Tensor, cells: int = 1, width: int = 1) -> bool:
    """Decide between the Triton kernels and ATen for one call.

    Args:
        input: the call's main operand.
        cells: number of cells of the pooling window, where there is one.
        width: features of the widest layer, where several are computed as one.

    Raises:
        RuntimeError: if ``"triton"`` is forced and cannot drive the device.
        NotImplementedError: if ``"triton"`` is forced and no kernel covers the call.
    """
    return not runs_plain(input) and why_aten(input, cells, width) is None


def runs_plain(input: torch.Tensor) -> bool:
    """Whether a call is on a CPU, nothing is forced and nobody listens: then it runs on ATen, told fast."""
    return input.is_cpu and backend() == "auto" and not logger.isEnabledFor(logging.DEBUG)


def why_aten(input: torch.Tensor, cells: int = 1, width: int = 1) -> str | None:
    """Say why a call runs on ATen, or None if it runs on Triton; raises as `use_triton` does."""
    setting = backend()
    if setting == "aten":
        return "backend 'aten' is forced"
    if setting == "auto" and input.device.type != "cuda":
        # `auto` takes the interpreter only when it is forced: it is there to check the kernels, not to be fast.
        return f"the input is on {input.device.type}, which Triton does not drive"
    unreachable, uncovered = _unreachable(input.device), _uncovered(input, cells, width)
    if setting == "triton":
        if unreachable is not None:
            raise RuntimeError(f"fastlenet: backend 'triton' is forced, but {unreachable}; or choose backend 'auto'")
        if uncovered is not None:
            raise NotImplementedError(
                f"fastlenet: backend 'triton' is forced, but {uncovered}; choose backend 'auto' to run this on ATen"
            )
        return None
    return unreachable or uncovered
