"""The one place where the compiled kernels' memory is allocated: tests replace it by poisoned and guarded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Allocate a tensor whose contents are arbitrary."""
    return torch.empty(shape, dtype=dtype, memory_format=layout)
