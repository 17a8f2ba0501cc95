"""The launchers of `norm`'s kernels: max_pool2d(relu(batch_norm(...))) with the batch's own statistics."""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry

from . import threads
from .compiled import address
from .memory import empty
from .plan import LANES

LAST = torch.channels_last

# What the workers of one call share: names for the places of a table of integers.
(
    TAKEN,  # counter: images that a worker has taken
    IMAGES,
    CHANNELS,
    PADDED,  # channels, rounded up to whole vectors
    HEIGHT,
    WIDTH,
    POOLED_HEIGHT,
    POOLED_WIDTH,
    CELLS,  # of a window
    CELL,  # table: for each window and cell the offset of its pixel, or -1
    MOMENTUM,  # a float
    EPS,  # likewise
    WEIGHT,  # 0 if there is none, here and below; in a backward its gradient
    BIAS,  # likewise
    RUNNING_MEAN,
    RUNNING_VAR,
    INPUT,
    SUMS,  # two rows of floats for each image
    FACTORS,  # rows of floats, one for each channel
    SLOPES,  # likewise
    POOLED,  # the output, or its gradient
    ARGMAX,
    GRAD_INPUT,
    SIZE,
) = range(24)

SCALE, SHIFT, MINUS_MEAN, INVERSE = range(4)
"""Rows of factors: the output is ``scale * x + shift``; the inverse is that of the standard deviation."""
SLOPE, LEVEL = range(2)
"""Rows of slopes: the input's gradient has ``slope * (x - mean) + level``."""


def batch_norm_relu_max_pool2d_covers(geometry: ConvPoolGeometry, input: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot compute a call; None if they can."""
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (input, *others)):
        return "the compiled kernels compute in float32"
    if geometry.window_size > 255 or geometry.window_may_be_empty:
        return "the compiled kernels pool windows of 1 to 255 cells"
    if input.dim() != 4 or input.numel() <= input.shape[1]:
        return "the compiled kernels normalise batches of more than one number for each channel"
    return None


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    geometry: ConvPoolGeometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise a batch and update the running statistics, in place.

    Args:
        input: (N, C, H, W), float32.
        running_mean: (C,), float32, as all that follow, or None.
        running_var: likewise.
        weight: likewise.
        bias: likewise.
        momentum: the weight of this batch in the running statistics.
        eps: is added to the variance.
        geometry: of the pool; what it says of a convolution is not used.

    Returns:
        The pooled output in channels_last, then the argmax and the factors that a backward needs.
    """
    kernels = [address("norm", name) for name in ("moments", "factors", "pool")]
    input = input.contiguous(memory_format=LAST)
    images, channels, height, width = input.shape
    output = empty((images, channels, *geometry.pooled_size((height, width))), torch.float32, LAST)
    job = _job(input, output, geometry)
    argmax = empty((images, *output.shape[2:], job[PADDED]), torch.uint8)
    sums, factors = (empty((rows, job[PADDED]), torch.float32) for rows in (2 * images, 4))
    job[MOMENTUM], job[EPS] = (struct.unpack("<i", struct.pack("<f", value))[0] for value in (momentum, eps))
    operands = [None if each is None else each.contiguous() for each in (weight, bias, running_mean, running_var)]
    job[WEIGHT : RUNNING_VAR + 1] = _addresses(operands)
    job[SUMS], job[FACTORS], job[ARGMAX] = sums.data_ptr(), factors.data_ptr(), argmax.data_ptr()
    for kernel, tasks in zip(kernels, (images, 1, images), strict=True):
        _run(kernel, job, tasks)
    for given, changed in zip((running_mean, running_var), operands[2:], strict=True):
        if given is not None and changed is not None and given is not changed:
            given.copy_(changed)
    return output, argmax, factors


def batch_norm_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    argmax: Tensor,
    factors: Tensor,
    geometry: ConvPoolGeometry,
    need_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of the input, unless it needs none, of weight and of bias."""
    kernels = [address("norm", name) for name in ("sums", "slopes", "grad")]
    input, grad_output = input.contiguous(memory_format=LAST), grad_output.contiguous(memory_format=LAST)
    images, channels = input.shape[:2]
    job = _job(input, grad_output, geometry)
    sums, slopes = (empty((rows, job[PADDED]), torch.float32) for rows in (2 * images, 2))
    grad_weight, grad_bias = (empty((channels,), torch.float32) for _ in range(2))
    grad_input = empty(input.shape, torch.float32, LAST) if need_input else None
    job[WEIGHT : BIAS + 1] = _addresses((grad_weight, grad_bias))
    job[SUMS : ARGMAX + 1] = _addresses((sums, factors, slopes, grad_output, argmax))
    _run(kernels[0], job, images)
    _run(kernels[1], job, 1)
    if grad_input is not None:
        job[GRAD_INPUT] = grad_input.data_ptr()
        _run(kernels[2], job, images)
    return grad_input, grad_weight, grad_bias


def _addresses(tensors: Sequence[Tensor | None]) -> array[int]:
    return array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _job(input: Tensor, pooled: Tensor, geometry: ConvPoolGeometry) -> array[int]:
    job = array("q", bytes(8 * SIZE))
    images, channels, height, width = input.shape
    padded = -(-channels // LANES) * LANES
    job[IMAGES : CELLS + 1] = array(
        "q", [images, channels, padded, height, width, *pooled.shape[2:], geometry.window_size]
    )
    job[CELL] = _cells(channels, height, width, geometry).data_ptr()
    job[INPUT], job[POOLED] = input.data_ptr(), pooled.data_ptr()
    return job


@functools.lru_cache(maxsize=256)
def _cells(channels: int, height: int, width: int, geometry: ConvPoolGeometry) -> Tensor:
    """Make the table of the windows' cells."""
    pooled = geometry.pooled_size((height, width))

    def places(i: int) -> Tensor:
        cells = geometry.pool_dilation[i] * torch.arange(geometry.pool_size[i])
        return geometry.pool_stride[i] * torch.arange(pooled[i])[:, None] - geometry.pool_padding[i] + cells

    rows, columns = places(0)[:, None, :, None], places(1)[:, None]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside, 4 * channels * (rows * width + columns), -1)


def _run(kernel: int, job: array[int], tasks: int) -> None:
    job[TAKEN] = 0
    threads.run(kernel, job, threads.workers(tasks))
