"""The fake driver, which lives in `bench`: the static cost report needs it where no tests are."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # pytest puts the tests' folders on the path, not the checkout's
    sys.path.append(str(ROOT))

from bench.static.fake_driver import *  # noqa: E402, F403
from bench.static.fake_driver import CompiledKernelRecord, assert_no_spills  # noqa: E402


def pinned_triton() -> str:
    """The version of Triton that `make` installs."""
    (version,) = re.findall(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return version


def assert_shipped_without_spills(records: Sequence[CompiledKernelRecord]) -> None:
    """Assert that kernels were launched and, with the pinned Triton, that none uses local memory.

    Every Triton that the package admits must compile what ships into what the device can run, and has done so when this
    is called. But each allocates registers in its own way, and tiles were chosen by what the pinned one does.
    """
    assert records, "no kernel was launched, so nothing was checked"
    if triton.__version__ == pinned_triton():
        assert_no_spills(records)
    else:
        warnings.warn(f"triton {triton.__version__} is not the pinned one: spills are not judged", stacklevel=2)
