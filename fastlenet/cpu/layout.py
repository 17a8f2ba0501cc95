"""The launcher of `norm.lay_out`: from the plain layout of images to channels_last, or back."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor
from torch.nn import Parameter

from . import threads
from .compiled import address, unavailable
from .memory import empty
from .plan import LANES

# What the workers of one call share: names for the places of a table of integers.
TAKEN, TASKS, CHANNELS, PIXELS, LAST, SOURCE, TARGET = range(7)

_OTHER = {torch.channels_last: torch.contiguous_format, torch.contiguous_format: torch.channels_last}

_FEW = 2**14
"""Numbers that PyTorch lays out in about the time that a call from Python takes."""


def lay_out_covers(input: Tensor, layout: torch.memory_format) -> bool:
    """Whether the kernel can lay out these images and is faster: dense float32 on a CPU in the other layout."""
    if type(input) not in (Tensor, Parameter) or not input.is_cpu or input.dtype is not torch.float32:
        return False
    if input.dim() != 4 or input.numel() < _FEW or input.is_neg():
        return False
    _, channels, height, width = input.shape
    return (
        min(channels, height * width) >= LANES
        and input.is_contiguous(memory_format=_OTHER[layout])
        and unavailable() is None
    )


def lay_out(input: Tensor, layout: torch.memory_format) -> Tensor:
    """Return the same images in another layout."""
    images, channels, height, width = input.shape
    output = empty(input.shape, torch.float32, layout)
    tasks = images * -(-channels // LANES)
    last = layout is torch.channels_last
    job = array("q", (0, tasks, channels, height * width, last, input.data_ptr(), output.data_ptr()))
    threads.run(address("norm", "lay_out"), job, threads.workers(tasks))
    return output
