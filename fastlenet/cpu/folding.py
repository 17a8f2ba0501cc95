"""The launcher of `norm.fold`: BatchNorm in eval mode, folded into the convolutions in front of it."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import threads
from .compiled import address, unavailable
from .memory import empty
from .program import place

EACH = 6
"""Tensors of a fold: weight and bias of the convolution; running mean and variance, scale and shift of the norm."""

# What the kernel is told of each fold: names for the places of a table of integers.
(
    WEIGHT,
    BIAS,  # 0 if there is none
    MEAN,
    VARIANCE,
    SCALE,  # 0 if there is none
    SHIFT,  # likewise
    EPS,  # a float64
    FILTERS,
    ROW_BYTES,  # of a filter
    FOLDED_WEIGHT,
    FOLDED_BIAS,
    SIZE,
) = range(12)


def fold_covers(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernel can read these tensors: dense float32 on a CPU, and no gradient is asked for."""
    grad_enabled = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if (kind is not Parameter and kind is not Tensor) or not tensor.is_cpu or tensor.dtype is not torch.float32:
            return False
        if (grad_enabled and tensor.requires_grad) or tensor.is_neg() or not tensor.is_contiguous():
            return False
    return unavailable() is None


def fold(epsilons: Sequence[float], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return weight and bias for each eps; `tensors`: `EACH` for each."""
    table, folded = array("q", [len(epsilons)]), list[Tensor]()
    for i, eps in enumerate(epsilons):
        weight, *others = tensors[EACH * i : EACH * i + EACH]
        assert weight is not None
        filters = weight.shape[0]
        # With the weight's strides, by which a convolution lays out its result: those of a size of 1 may be any.
        new_weight = empty(weight.shape, torch.float32).as_strided(weight.shape, weight.stride())
        new = new_weight, empty((filters,), torch.float32)
        folded += new
        (bits,) = struct.unpack("q", struct.pack("d", eps))
        row = 4 * weight.numel() // filters if filters else 0
        table.extend((weight.data_ptr(), *map(place, others), bits, filters, row, *map(place, new)))
    threads.run(address("norm", "fold"), table, 1)
    return folded
