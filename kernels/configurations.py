"""Which design and which tile a specialised kernel runs with: a table per architecture, dtype, precision and shape.

`configurations.json` is committed. Each entry says what it rests on: a measurement, or figures modelled from the
machine code. The design "general" names the general kernels, "aten" the library (see `dispatch`). What the table does
not list runs on the general kernels, whose tiles follow rules of their own, or on the library by `dispatch`'s rule.
Nothing is tried out at run time: the same call takes the same kernel on every machine of an architecture.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_COMMITTED = Path(__file__).with_name("configurations.json")


class Configuration(NamedTuple):
    """How a kernel is launched: its design, its constants and launch options, and what that choice rests on."""

    design: str
    options: dict[str, int]
    evidence: str


def architecture() -> str:
    """Name the current device's architecture as the table does.

    The interpreter has entries of its own: its cost is by operation, so it wants large tiles, and no `patch_fma`.
    """
    # Imported here, as the table is read by who must not load triton.
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreted"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def find(kernel: str, dtype: torch.dtype, precision: str, shape: Sequence[int]) -> Configuration | None:
    """Look up a kernel's configuration for the current device.

    Args:
        kernel: operator and direction, such as ``"conv2d_relu_max_pool2d.forward"``.
        dtype: of the tensors.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``.
        shape: what the kernel compiles in.
    """
    mode = precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return table().get((kernel, architecture(), mode, tuple(shape)))


@functools.cache
def table() -> dict[tuple[Any, ...], Configuration]:
    """Read the entries, by kernel, architecture, mode and shape."""
    return {
        (entry["kernel"], entry["architecture"], mode, tuple(entry["shape"])): Configuration(
            entry["design"], entry["options"], entry["evidence"]
        )
        for entry in json.loads(_COMMITTED.read_text(encoding="utf-8"))
        for mode in entry["modes"]
    }
