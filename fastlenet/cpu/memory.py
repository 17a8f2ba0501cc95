"""The one place where the compiled kernels' memory is allocated: tests replace it by poisoned and guarded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def on_cpu(make: Callable[..., Made]) -> Callable[..., Made]:
    """Let a function make tensors on the CPU, whatever the default device is."""

    @functools.wraps(make)
    def made(*args: object) -> Made:
        with torch.device("cpu"):
            return make(*args)

    return made


def empty(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Allocate a tensor whose contents are arbitrary, on the CPU whatever the default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)
