"""A row of fused layers as one call on CPU tensors: what is covered, what pays, and in which form it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlenet.kernels.geometry import ConvPoolGeometry

from . import blocks, few, threads
from .conv2d_relu_max_pool2d import DENSE_CHANNELS, covers
from .plan import LANES
from .program import Link

LITTLE_BLOCK = 1 << 24
"""FLOP of a block of 16 images up to which half-filled lanes suffice."""
LARGE_BLOCK = 1 << 27
"""FLOP of a block from which the forward of eight images takes up to 1.7 times stock's time, of ten up to 1.4 times."""

LARGE_MATRIX = 1 << 18
"""Elements of a weight that 16 images at a time read and sum up more slowly than a library multiplies whole batches."""
SMALL_MATRIX = 1 << 16
"""Elements of a weight whose gradients one thread sums up image by image at least as fast, for a few images."""


def chain_covers(input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link]) -> str | None:
    """Why the kernels cannot compute a chain; None if they can."""
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (input, *parameters)):
        return "the compiled kernels compute in float32"
    images, *shape = input.shape
    if not few.takes(images, links):
        images = LANES  # at a time
    for place, weight in zip(links, parameters[::2], strict=True):
        assert weight is not None
        if isinstance(place, ConvPoolGeometry):
            reason = covers(torch.float32, (images, *shape), weight, place)
            if reason is not None:
                return reason
            conv = place.conv_size((shape[1], shape[2]), (weight.shape[2], weight.shape[3]))
            shape = [weight.shape[0], *place.pooled_size(conv)]
        elif weight.shape[1] < LANES:
            return f"a linear layer of a compiled chain has at least {LANES} inputs"
    return None


def chain_rejects(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link], save: bool = True
) -> str | None:
    """Why a chain is not covered, or not expected to win; None if it is. `save`: whether a backward may follow."""
    reason = chain_covers(input, parameters, links)
    if reason is not None:
        return reason
    images, *shape = input.shape
    weights, flop = [weight for weight in parameters[::2] if weight is not None], []
    for place, weight in zip(links, weights, strict=True):
        pixels = 1
        if isinstance(place, ConvPoolGeometry):
            conv = place.conv_size((shape[1], shape[2]), (weight.shape[2], weight.shape[3]))
            pixels = conv[0] * conv[1]
            shape = [weight.shape[0], *place.pooled_size(conv)]
        flop.append(2 * weight.numel() * pixels)
    matrices = [weight.numel() for weight in weights if weight.dim() == 2]
    if len(matrices) == len(weights):
        return "on a CPU PyTorch's own linear layers are as fast"
    largest, few_images = max(matrices, default=0), few.takes(images, links)
    summed = largest * images if save and largest >= SMALL_MATRIX else 0
    if (summed if few_images else largest) >= LARGE_MATRIX:
        return f"PyTorch's own linear layers are faster at a weight of {largest:,} elements"
    if few_images:
        return few.rejects(images, weights, flop, save)
    block = LANES * sum(flop)
    if block <= LITTLE_BLOCK:
        wanted = 0.2 if save else 0.0
    else:
        # Of eight images of smaller blocks, stock is faster only where it reads many channels.
        large = block > LARGE_BLOCK or input.shape[1] >= DENSE_CHANNELS
        wanted = 0.45 if save else 0.3 if large else 0.2
    if images and threads.fill(images, LANES) < wanted:
        return f"{images} images keep too few of the {LANES} lanes of {torch.get_num_threads()} threads busy"
    return None


def chain(
    input: Tensor, parameters: Sequence[Tensor | None], links: Sequence[Link], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the output of a chain and, to be saved, what its backward needs.

    Args:
        input: (N, C, H, W), or (N, K) where the first link is linear; any strides.
        parameters: weight and bias, or None, of each link.
        links: see `Link`; what enters the first linear link is flattened.
        save: whether a backward may follow.
    """
    if few.takes(input.shape[0], links):
        return few.forward(input, parameters, tuple(links), save)
    output, kept = blocks.forward(input, parameters, links, "record" if save else "")
    return output, [] if kept is None else [kept]


def chain_backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    links: Sequence[Link],
    saved: Sequence[Tensor],
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of input and parameters, None where `output_mask` does not ask for one.

    Args:
        grad_output: of the output's shape, any strides.
        input: the forward's.
        parameters: the forward's.
        links: the forward's.
        saved: what the forward returned.
        output_mask: whether to compute the gradient of the input, and of each parameter.
    """
    output_mask = [
        needed and tensor is not None for needed, tensor in zip(output_mask, (input, *parameters), strict=True)
    ]
    if not any(output_mask):
        return [None] * len(output_mask)
    form = few if few.takes(input.shape[0], links) else blocks
    return form.backward(grad_output, input, parameters, tuple(links), saved[0], output_mask)
