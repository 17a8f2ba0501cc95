"""Which kind of test process this is.

Triton decides at import whether ``@triton.jit`` interprets or compiles, so one process can do only one of them:

==============  ======================  ==========================================
suite           process                 runs
==============  ======================  ==========================================
``plain``       any                     everything outside the two folders below
``kernels``     ``TRITON_INTERPRET=1``  ``tests/interpreted`` on CPU tensors, or,
                or a GPU                without the variable, natively on the GPU
``compiled``    no ``TRITON_INTERPRET``  ``tests/compiled``, through the fake driver
==============  ======================  ==========================================
"""

from __future__ import annotations

import importlib.util
import os


def interpreting() -> bool:
    """Whether Triton kernels of this process run in Triton's interpreter (asked of the environment, as Triton does)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def has_triton() -> bool:
    """Whether Triton is installed (it is not on every platform PyTorch runs on)."""
    return importlib.util.find_spec("triton") is not None


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch  # see conftest.py

    return torch.cuda.is_available()


def kernel_device() -> str:
    """The device for kernel tests: ``cuda`` when they run natively, ``cpu`` when they are interpreted."""
    return "cuda" if has_gpu() and not interpreting() else "cpu"


def refused(folder: str) -> str | None:
    """Why a folder of ``tests/`` cannot run in this process, and what to do; None if it can."""
    if folder in ("interpreted", "compiled") and not has_triton():
        return "Triton is not installed"
    if folder == "interpreted" and not interpreting() and not has_gpu():
        return "no GPU and TRITON_INTERPRET is not set (run with TRITON_INTERPRET=1)"
    if folder == "compiled" and interpreting():
        return "TRITON_INTERPRET is set (run without it)"
    return None
