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
from .conv2d_relu_max_pool2d import Grads
from .memory import empty, on_cpu
from .plan import LANES, window_cells

LAST = torch.channels_last

# What the workers of one call share: names for the places of a table of integers.
(
    TAKEN,  # counter: tasks that a worker has taken
    TASKS,
    VECTORS,  # of channels that a task computes at most
    IMAGES,
    CHANNELS,
    PADDED,  # channels, rounded up to whole vectors
    PIXELS,  # of the input
    WINDOWS,  # pixels of the output
    CELLS,  # of a window
    CELL,  # table: for each window and cell the offset of its pixel, or -1
    MOMENTUM,  # a float64
    EPS,  # likewise
    WEIGHT,  # 0 if there is none, here and below; in a backward its gradient
    BIAS,  # likewise
    RUNNING_MEAN,
    RUNNING_VAR,
    INPUT,
    SUMS,  # three rows of float64 for each image
    PIVOTS,  # a row of float32 for each image
    FACTORS,  # rows of float32, one number for each channel
    SLOPES,  # likewise
    POOLED,  # the output, or its gradient
    ARGMAX,
    GRAD_INPUT,
    SIZE,
) = range(25)

MINUS_MEAN, INVERSE, SCALE, SHIFT = range(4)
"""Rows of factors: the inverse is that of the standard deviation, and the normalised batch ``scale * x + shift``."""
SLOPE, LEVEL = range(2)
"""Rows of slopes: the input's gradient has ``slope * (x - mean) + level``."""


LITTLE = 1 << 16
"""Numbers of a batch below which calling the kernels takes as long as PyTorch's own operators."""


_TASK = 4
"""Vectors of channels in a task. So many side by side are read as one stream; threads share few images by channels."""


def batch_norm_relu_max_pool2d_covers(geometry: ConvPoolGeometry, input: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot compute a call; None if they can."""
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (input, *others)):
        return "the compiled kernels compute in float32"
    if geometry.window_size > 255 or geometry.window_may_be_empty:
        return "the compiled kernels pool windows of 1 to 255 cells"
    if input.dim() != 4 or input.numel() <= input.shape[1]:
        return "the compiled kernels normalise batches of more than one number for each channel"
    return None


def batch_norm_relu_max_pool2d_rejects(input: Tensor) -> str | None:
    """Why the kernels are not expected to win; None if they are."""
    return None if input.numel() >= LITTLE else f"stock operators are as fast for {input.numel():,} numbers"


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
        input: (N, C, H, W), float32, any strides.
        running_mean: (C,), float32, as all that follow, or None.
        running_var: likewise.
        weight: likewise.
        bias: likewise.
        momentum: the weight of this batch in the running statistics.
        eps: is added to the variance.
        geometry: of the pool; what it says of a convolution is not used.

    Returns:
        The pooled output in channels_last. Then, for the backward, the argmax (see `ConvPoolGeometry`), whose channels
        come last and are padded to whole vectors, and the channels' factors, a row of each kind.
    """
    kernels = [address("norm", name) for name in ("moments", "factors", "pool")]
    input, cells = input.contiguous(memory_format=LAST), _cells(input.shape, geometry)
    images, channels, height, width = input.shape
    layout = LAST if channels > 1 else torch.contiguous_format  # the same memory, and stock's strides
    output = empty((images, channels, *geometry.pooled_size((height, width))), torch.float32, layout)
    job = _job(input, output, cells)
    argmax = empty((images, *output.shape[2:], job[PADDED]), torch.uint8)
    sums = empty((images, 3, job[PADDED]), torch.float64).zero_()
    pivots, factors = (empty((rows, job[PADDED]), torch.float32) for rows in (images, 4))
    job[MOMENTUM : EPS + 1] = array("q", struct.pack("dd", momentum, eps))
    operands = [None if each is None else each.contiguous() for each in (weight, bias, running_mean, running_var)]
    job[WEIGHT : RUNNING_VAR + 1] = _addresses(*operands)
    job[SUMS : FACTORS + 1] = _addresses(sums, pivots, factors)
    job[ARGMAX] = argmax.data_ptr()
    for kernel, tasks in zip(kernels, (job[TASKS], 1, job[TASKS]), strict=True):
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
    output_mask: Sequence[bool],
) -> Grads:
    """Return the gradients of input, weight and bias, None where `output_mask` does not ask for one."""
    kernels = [address("norm", name) for name in ("sums", "slopes", "grad")]
    input, grad_output = input.contiguous(memory_format=LAST), grad_output.contiguous(memory_format=LAST)
    argmax, factors, cells = argmax.contiguous(), factors.contiguous(), _cells(input.shape, geometry)
    images, channels = input.shape[:2]
    job = _job(input, grad_output, cells)
    sums = empty((images, 3, job[PADDED]), torch.float64).zero_()
    slopes = empty((2, job[PADDED]), torch.float32)
    grad_weight, grad_bias = (empty((channels,), torch.float32) for _ in range(2))
    job[WEIGHT : BIAS + 1] = _addresses(grad_weight, grad_bias)
    job[SUMS], job[FACTORS], job[SLOPES] = sums.data_ptr(), factors.data_ptr(), slopes.data_ptr()
    job[ARGMAX] = argmax.data_ptr()
    _run(kernels[0], job, job[TASKS])
    _run(kernels[1], job, 1)
    grad_input = None
    if output_mask[0]:
        grad_input = empty(input.shape, torch.float32, LAST)
        job[GRAD_INPUT] = grad_input.data_ptr()
        _run(kernels[2], job, job[TASKS])
    return grad_input, grad_weight if output_mask[1] else None, grad_bias if output_mask[2] else None


def _addresses(*tensors: Tensor | None) -> array[int]:
    return array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _job(input: Tensor, pooled: Tensor, cells: Tensor) -> array[int]:
    """Begin the table of a call."""
    job = array("q", bytes(8 * SIZE))
    images, channels, height, width = input.shape
    vectors = -(-channels // LANES)
    most = _TASK if images >= 2 * threads.workers(images) else 1
    job[TASKS : PADDED + 1] = array("q", [images * -(-vectors // most), most, images, channels, LANES * vectors])
    job[PIXELS], (job[WINDOWS], job[CELLS]) = height * width, cells.shape
    job[CELL], job[INPUT], job[POOLED] = cells.data_ptr(), input.data_ptr(), pooled.data_ptr()
    return job


@functools.lru_cache(maxsize=32)
@on_cpu
def _cells(shape: torch.Size, geometry: ConvPoolGeometry) -> Tensor:
    """Make the table of the windows' cells. Its user holds it while a kernel reads it."""
    _, channels, height, width = shape
    cells = window_cells((height, width), geometry.pooled_size((height, width)), geometry)
    return torch.where(cells >= 0, 4 * channels * cells, -1)


def _run(kernel: int, job: array[int], tasks: int) -> None:
    job[TAKEN] = 0
    threads.run(kernel, job, threads.workers(tasks))
