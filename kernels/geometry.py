"""The window arithmetic of a convolution followed by a max-pool, and sizes that every implementation must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Pair = tuple[int, int]

WIDEST_LAYER = 128
"""Features that a layer of a multilayer perceptron may have for the Triton kernels: they hold layers in registers."""


class ConvPoolGeometry(NamedTuple):
    """Hyper-parameters of ``max_pool2d(relu(conv2d(input, weight, bias)))``, each pair in (height, width) order.

    The fields stand in the order in which the raw operators take them, so that ``op(input, weight, bias, *geometry)``
    is a call. Names and meanings are those of ``torch.nn.functional.conv2d`` and ``max_pool2d``.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    pool_size: Pair
    pool_stride: Pair
    pool_padding: Pair
    pool_dilation: Pair
    ceil_mode: bool

    @property
    def window_size(self) -> int:
        """Number of cells of a pooling window."""
        return self.pool_size[0] * self.pool_size[1]

    @property
    def argmax_dtype(self) -> torch.dtype:
        """Type of the argmax: one byte for windows of up to 255 cells.

        An argmax is the window cell, in scan order, that won the maximum, or `no_winner` of this type where relu closed
        the cell, so that no gradient passes.
        """
        return torch.uint8 if self.window_size <= 255 else torch.int32

    @property
    def no_winner(self) -> int:
        """The argmax of a pooled cell through which no gradient passes."""
        return torch.iinfo(self.argmax_dtype).max

    @property
    def window_may_be_empty(self) -> bool:
        """Whether a window may lie wholly in the padding: its maximum is then -inf, as in stock."""
        return max(self.pool_dilation) > 1 and max(self.pool_padding) > 0

    def key(self, input: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
        """Sizes by which the table of configurations knows a call: all but the number of images.

        The geometry stands behind the shapes, unless it is the plain one: stride 1 and 2x2 windows side by side.
        """
        shape = (*input.shape[1:], *weight.shape)
        if self == _PLAIN:
            return shape
        return (*shape, *(int(n) for field in self for n in (field if isinstance(field, tuple) else (field,))))

    def conv_size(self, input_size: Pair, kernel_size: Pair) -> Pair:
        """Height and width of the convolution's output."""
        (height, width), (kernel_h, kernel_w) = input_size, kernel_size
        (pad_h, pad_w), (gap_h, gap_w), (step_h, step_w) = self.padding, self.dilation, self.stride
        return (
            (height + 2 * pad_h - gap_h * (kernel_h - 1) - 1) // step_h + 1,
            (width + 2 * pad_w - gap_w * (kernel_w - 1) - 1) // step_w + 1,
        )

    def pooled_size(self, conv_size: Pair) -> Pair:
        """Height and width of the max-pool's output, by PyTorch's rule.

        With `ceil_mode` a last window may overhang, as long as it starts inside the input or its left padding.
        """
        return self._pooled_length(conv_size[0], 0), self._pooled_length(conv_size[1], 1)

    def _pooled_length(self, length: int, i: int) -> int:
        stride, padding = self.pool_stride[i], self.pool_padding[i]
        room = length + 2 * padding - self.pool_dilation[i] * (self.pool_size[i] - 1) - 1
        if not self.ceil_mode:
            return room // stride + 1
        windows = (room + stride - 1) // stride + 1
        return windows - 1 if (windows - 1) * stride >= length + padding else windows

    def output_shape(self, input: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int, int]:
        """Shape of the pooled output for a batched `input` (N, C, H, W) and `weight` (O, C / groups, KH, KW)."""
        conv = self.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
        return (input.shape[0], weight.shape[0], *self.pooled_size(conv))


LINEAR_RELU, LINEAR = "linear_relu", "linear"
"""Links of a chain that are no convolutions."""

Links = tuple[ConvPoolGeometry | str, ...]
"""The operators of a chain, in order: the geometry of each convolution, then `LINEAR_RELU` or `LINEAR`."""

_HEAD = (LINEAR_RELU, LINEAR_RELU, LINEAR)


def head_of(links: Links, parameters: Sequence[Any]) -> int:
    """Return at which link of a chain the head's kernels begin; the number of links if nowhere.

    They compute three linear maps with relu between them, of at most `WIDEST_LAYER` features, each with a bias.
    """
    first = len(links) - len(_HEAD)
    if first < 0 or links[first:] != _HEAD:
        return len(links)
    weights, biases = parameters[2 * first :: 2], parameters[2 * first + 1 :: 2]
    narrow = all(weight.shape[0] <= WIDEST_LAYER for weight in weights)
    return first if narrow and all(bias is not None for bias in biases) else len(links)


_PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """The layout that PyTorch's convolution gives its result: channels_last if an operand is, else contiguous."""
    for tensor in tensors:
        if _like_channels_last(tensor):
            return torch.channels_last
    return torch.contiguous_format


def output_format(input: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The layout that stock gives the pooled output: its pool takes a single channel for plainly laid out."""
    return torch.contiguous_format if weight.shape[0] == 1 else memory_format(input, weight)


def _like_channels_last(tensor: torch.Tensor) -> bool:
    """PyTorch's own rule (``suggest_memory_format``), by strides alone: it also holds for parts of such a tensor."""
    # These two tell most tensors apart, in a fraction of the time.
    if tensor.stride(3) < tensor.stride(1):
        return False
    sizes, strides = tensor.shape, tensor.stride()
    least = 0
    for dim in (1, 3, 2, 0):
        ambiguous = dim == 0 and least == strides[1]  # nothing but images: both layouts are the same
        if sizes[dim] == 0 or strides[dim] < least or strides[1] == 0 or ambiguous:
            return False
        least = strides[dim] * sizes[dim]
    return True
