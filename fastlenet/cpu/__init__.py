"""Compiled kernels for CPU tensors: see `convolution` for the mathematics, `lanes` for how it is written."""

from .batch_norm_relu_max_pool2d import (
    batch_norm_relu_max_pool2d,
    batch_norm_relu_max_pool2d_backward,
    batch_norm_relu_max_pool2d_covers,
    batch_norm_relu_max_pool2d_rejects,
)
from .chain import chain, chain_backward, chain_covers, chain_rejects
from .compiled import unavailable
from .conv2d_relu_max_pool2d import conv2d_relu_max_pool2d, conv2d_relu_max_pool2d_backward, covers, rejects
from .folding import fold, fold_covers
from .layout import lay_out, lay_out_covers

__all__ = [
    "batch_norm_relu_max_pool2d",
    "batch_norm_relu_max_pool2d_backward",
    "batch_norm_relu_max_pool2d_covers",
    "batch_norm_relu_max_pool2d_rejects",
    "chain",
    "chain_backward",
    "chain_covers",
    "chain_rejects",
    "conv2d_relu_max_pool2d",
    "conv2d_relu_max_pool2d_backward",
    "covers",
    "fold",
    "fold_covers",
    "lay_out",
    "lay_out_covers",
    "rejects",
    "unavailable",
]
