"""Which variant and which tile a specialised kernel runs with: a table per architecture, dtype, precision and shape.

`configurations.json` is committed. Each entry says what it rests on: a measurement, or figures modelled from the
machine code. The variant "general" names the general kernels, "aten" the library. For what the table does not list,
`rules` chooses the kernel, and `fastlenet.library` says whether the library computes it. Nothing is tried out at run
time: the same call takes the same kernel on every machine of an architecture.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_COMMITTED = Path(__file__).with_name("configurations.json")


class Configuration(NamedTuple):
    """How a kernel is launched: its variant, its constants and launch options, and what that choice rests on."""

    variant: str
    options: dict[str, int]
    evidence: str


def architecture() -> str:
    """Name the current device's architecture as the table does.

    The interpreter has entries of its own: its cost is by operation, so it wants large tiles, and no `patch_fma`.
    """
    return _ask_device()()


@functools.cache
def _ask_device() -> Callable[[], str]:
    """Import what knows the architecture: only when asked for, because readers of the table must not load triton."""
    from .runtime import architecture as of_device

    return of_device


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


class TableCache:
    """What `remembered` gives out, by architecture, and the table that it follows from."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.results: dict[str, dict[Any, Any]] = {}


_remembered = TableCache(None)


def remembered() -> dict[Any, Any]:
    """Return where to keep what follows from the table for the current device, by a key of whatever it follows from.

    It is empty again when another table is in force. Keys start with the name of what they lead to.
    """
    global _remembered
    current, found = table(), _remembered
    if found.table is not current:
        found = _remembered = TableCache(current)
    results = found.results.setdefault(architecture(), {})
    if len(results) >= _MOST_RESULTS:
        results.clear()
    return results


_MOST_RESULTS = 4096
"""As many as a program's shapes and geometries may have before memory matters."""


@functools.cache
def table() -> dict[tuple[Any, ...], Configuration]:
    """Read the entries, by kernel, architecture, mode and shape."""
    return {
        (entry["kernel"], entry["architecture"], mode, tuple(entry["shape"])): Configuration(
            entry["variant"], entry["options"], entry["evidence"]
        )
        for entry in json.loads(_COMMITTED.read_text(encoding="utf-8"))
        for mode in entry["modes"]
    }
