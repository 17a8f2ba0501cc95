"""The launchers of `convolution`'s kernels: max_pool2d(relu(conv2d(...))) of whole batches on CPU tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

from . import job, record, threads
from .compiled import address
from .memory import empty
from .plan import BYTES, LANES, Plan, Tile, plan_of

MOST_TASKS = 16
"""Parts of a batch whose sums of a weight's gradient are kept apart: fixed, whatever the number of threads."""

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


THIN = 256
"""Channels times filters up to which a layer is 1.5 to 10 times as fast as stock's, and half-filled lanes suffice.

Wider layers are what oneDNN is made for: up to `WIDE` the kernels are 1.1 to 2 times as fast, with all lanes filled.
"""
WIDE = 3072
ROOMY = 1 << 19
"""Bytes of a block of images up to which wide layers win over channels_last, too: they stay in a core's own cache."""
LARGE = 1 << 22
"""Bytes of a block of images from which half-filled lanes no longer suffice: each pass reads it from memory."""
MOST_BYTES = 1 << 26
"""Scratch that one thread may take."""


def rejects(input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> str | None:
    """Why a call is not covered, or not expected to win; None if it is."""
    reason = covers(input.dtype, input.shape[1:], weight, geometry)
    if reason is not None:
        return reason
    images, _, height, width = input.shape
    filters, channels = weight.shape[0] // geometry.groups, weight.shape[1]
    products = filters * channels
    if products >= WIDE:
        return f"{channels} to {filters} channels: the library's convolution is as fast"
    block = input.shape[1] * height * width * BYTES
    if products > THIN and block > ROOMY and memory_format(input, weight) == torch.channels_last:
        return f"{channels} to {filters} channels of {height}x{width} in channels_last: the library's is as fast"
    wanted = 0.45 if products <= THIN and block <= LARGE else 0.9
    if images and threads.fill(images, LANES) < wanted:
        return f"{images} images keep too few of the {LANES} lanes of {torch.get_num_threads()} threads busy"
    return None


def covers(dtype: torch.dtype, image: Sequence[int], weight: Tensor, geometry: ConvPoolGeometry) -> str | None:
    """Why the kernels cannot compute a call on images of one shape; None if they can."""
    if not (dtype == weight.dtype == torch.float32):
        return "the compiled kernels compute in float32"
    if geometry.window_size > 255:
        return "the compiled kernels pool windows of at most 255 cells"
    channels, height, width = image
    conv = geometry.conv_size((height, width), (weight.shape[2], weight.shape[3]))
    if BYTES * (3 * channels * height * width + (weight.shape[0] + 6) * conv[0] * conv[1]) > MOST_BYTES:
        return "blocks of 16 such images take too much memory"
    return None


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax (see `ConvPoolGeometry`).

    Args:
        input: (N, C, H, W), any strides.
        weight: (O, C / groups, KH, KW), any strides.
        bias: (O,) or None.
        geometry: of the convolution and the pool; windows of up to 255 cells.
        return_argmax: whether to return what a backward needs.
    """
    layout = memory_format(input, weight)
    plan, input = _planned(input, weight, geometry, layout)
    output = empty((input.shape[0], weight.shape[0], *plan.pooled_size), torch.float32, layout)
    argmax = empty(output.shape, geometry.argmax_dtype, layout) if return_argmax else None
    if not output.numel():
        return output, argmax
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks = -(-input.shape[0] // LANES)
    workers = threads.workers(blocks)
    tile = plan.tile
    shared = _job(plan, input, weight, workers, plan.record[record.FORWARD_BYTES])
    shared[job.KERNEL] = address("convolution", "forward_block", tile.filters, tile.pixels, int(return_argmax))
    shared[job.BIAS] = 0 if bias is None else bias.data_ptr()
    shared[job.OUTPUT], shared[job.OUTPUT_STEP] = output.data_ptr(), 4 * output.stride(0)
    if argmax is not None:
        shared[job.ARGMAX], shared[job.ARGMAX_STEP] = argmax.data_ptr(), argmax.stride(0)
    scratch = empty((workers * shared[job.SCRATCH_BYTES] // 4,), torch.float32)
    shared[job.SCRATCH] = scratch.data_ptr()
    threads.run(address("convolution", "forward"), shared, workers)
    return output, argmax


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> Grads:
    """Return grad_input, grad_weight and grad_bias, None where `output_mask` does not ask for one."""
    need_input, need_weight, need_bias = output_mask
    layout = memory_format(input, weight)
    plan, input = _planned(input, weight, geometry, layout)
    images = input.shape[0]
    grad_input = empty(input.shape, torch.float32, layout) if need_input else None
    filters = weight.shape[0]
    if not images:
        grad_weight, grad_bias = (weight.new_zeros(shape) for shape in (weight.shape, (filters,)))
        return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None
    if not any(output_mask):
        return None, None, None
    weight = weight.contiguous()
    grad_output, argmax = dense(grad_output, layout), dense(argmax, layout)
    blocks = -(-images // LANES)
    blocks_each = -(-blocks // MOST_TASKS)
    tasks = -(-blocks // blocks_each)
    workers = threads.workers(tasks)
    tile = plan.tile
    shared = _job(plan, input, weight, workers, plan.record[record.BACKWARD_BYTES])
    shared[job.KERNEL] = backward_kernel(tile, need_input)
    shared[job.TASKS], shared[job.BLOCKS] = tasks, blocks_each
    shared[job.OUTPUT], shared[job.OUTPUT_STEP] = grad_output.data_ptr(), 4 * grad_output.stride(0)
    shared[job.ARGMAX], shared[job.ARGMAX_STEP] = argmax.data_ptr(), argmax.stride(0)
    if grad_input is not None:
        shared[job.GRAD_INPUT], shared[job.GRAD_INPUT_STEP] = grad_input.data_ptr(), 4 * grad_input.stride(0)
    grad_weight, grad_bias = empty(weight.shape, torch.float32), empty((filters,), torch.float32)
    if need_weight or need_bias:
        sums = empty((tasks, weight.numel() + filters), torch.float32)
        shared[job.SUMS], shared[job.SUMS_STEP] = sums.data_ptr(), 4 * sums.stride(0)
        shared[job.GRAD_WEIGHT], shared[job.GRAD_BIAS] = grad_weight.data_ptr(), grad_bias.data_ptr()
    scratch = empty((workers * shared[job.SCRATCH_BYTES] // 4,), torch.float32)
    shared[job.SCRATCH] = scratch.data_ptr()
    threads.run(address("convolution", "backward"), shared, workers)
    return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None


def backward_kernel(tile: Tile, need_input: bool) -> int:
    """Return the address of the kernel of a block's gradients."""
    input_tile = (tile.channels, tile.input_pixels) if need_input else (0, 0)
    return address("convolution", "backward_block", tile.filters, tile.taps, *input_tile)


def _planned(
    input: Tensor, weight: Tensor, geometry: ConvPoolGeometry, layout: torch.memory_format
) -> tuple[Plan, Tensor]:
    """Return the plan of a call, and its input in a layout that the kernels read."""
    input = dense(input, layout)
    last = layout == torch.channels_last
    return plan_of(tuple(input.shape[1:]), tuple(weight.shape), geometry, last, last), input


def dense(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """The tensor with each image dense in `layout`; images may lie apart."""
    _, channels, height, width = tensor.shape
    plain = (height * width, width, 1)
    wanted = (1, width * channels, channels) if layout == torch.channels_last else plain
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    if all(size == 1 or stride == want for size, stride, want in zip(sizes, strides, wanted, strict=True)):
        return tensor
    return tensor.contiguous(memory_format=layout)


def _job(plan: Plan, input: Tensor, weight: Tensor, workers: int, scratch_bytes: int) -> array[int]:
    shared = array("q", bytes(8 * job.SIZE))
    shared[job.PLAN], shared[job.IMAGES] = plan.address, input.shape[0]
    shared[job.INPUT], shared[job.INPUT_STEP] = input.data_ptr(), 4 * input.stride(0)
    shared[job.EXCHANGE] = address("convolution", "exchange")
    shared[job.WEIGHT] = weight.data_ptr()
    shared[job.SCRATCH_BYTES] = scratch_bytes
    return shared
