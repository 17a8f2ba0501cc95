"""The rule that gives a call to cuDNN or cuBLAS, though a Triton kernel covers it.

`configurations.json` decides first: an entry with the variant "aten" takes the library, any other the kernel. Without
an entry a rule decides. Convolutions with few input channels ask `kernels/rules.py`: what a kernel on FMA units
computes stays there, unless there are enough output channels to fill a library's tiles. For all other calls the depth
decides, which is the number of products that one element of the result sums. A library keeps matrix units busier. The
kernels save passes over memory for relu, its mask and the pool. The first gain grows with the depth, the second does
not. The number of images never decides, so a sample's result does not depend on its batch.

The limits of convolutions are modelled, and corrected by the factors between model and clock that an H100 showed for
other shapes. Those of matrix products were measured there.
`docs/design/library.md` has the figures. `fastlenet bench --tune` measures and writes entries that override the rule.

This module does not load triton, except to name the current architecture where Triton drives the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlenet.kernels import configurations, rules
from fastlenet.kernels.geometry import LINEAR, ConvPoolGeometry, Links, head_of

CONV, ADDMM = "conv2d_relu_max_pool2d", "addmm_relu"

LIBRARY = "aten"
"""The variant of an entry that takes the library."""

_DEEPEST = {
    (CONV, "forward"): {"ieee": 256, "tf32": 1024, "half": 256},
    (CONV, "backward"): {"ieee": 256, "tf32": 768, "half": 256},
    (ADDMM, "forward"): {"ieee": 1, "tf32": 1, "half": 256},
    (ADDMM, "backward"): {"ieee": 1, "tf32": 1, "half": 256},
}
"""Depth from which the library is expected to be faster, for exact float32, tf32 and 16-bit products."""

_FEW_CHANNELS, _DEEPEST_OF_FEW = 16, 64
"""Input channels below which the general kernels read the depth one number at a time, and the limit of depth then.

The same limit holds for the kernels on FMA units, which compute up to `rules.MOST_CHANNELS` in every precision. An H100
took 1.4 to 2 times their modelled 1.2 to 1.5 of the floor: some 25 TFLOP/s, half of what a library reaches in exact
float32.
"""

_FEW_COLUMNS = 64
"""Output channels below which a library's tiles are half empty, so that the rule keeps a convolution's kernels.

General kernels of few input channels are slower than even that.
"""


def why_library(
    operator: str,
    direction: str,
    dtype: torch.dtype,
    precision: str,
    shape: Sequence[int],
    depth: int,
    deepest: float | None = None,
) -> str | None:
    """Say why the library computes a call, or None if a Triton kernel does.

    Args:
        operator: `CONV` or `ADDMM`.
        direction: ``"forward"`` or ``"backward"``.
        dtype: of the tensors.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``.
        shape: the call's key in the table.
        depth: products summed for an element of the forward's result.
        deepest: the depth from which the library is expected to be faster, if it is not as in `_DEEPEST`.
    """
    names = [direction] if direction == "forward" else _BACKWARD[operator]
    listed = [configurations.find(f"{operator}.{name}", dtype, precision, shape) for name in names]
    if entries := [entry for entry in listed if entry is not None]:
        evidence = next((entry.evidence for entry in entries if entry.variant == LIBRARY), None)
        return None if evidence is None else f"the table of configurations takes the library: {evidence}"
    if deepest is None:
        deepest = _DEEPEST[operator, direction][precision if dtype == torch.float32 else "half"]
    if depth >= deepest:
        return f"the library is expected to be faster from {deepest} products an element on, and this call has {depth}"
    return None


# An entry for the whole backward, then those for its parts.
_BACKWARD = {CONV: ("backward", "grad_input", "grad_weight"), ADDMM: ("backward",)}


def why(name: str, settings: Any, tensors: Sequence[Any], differentiable: bool) -> str | None:
    """Say why a library computes a whole call, or None if kernels do.

    If a backward follows and the library should compute it, the library computes the forward too. The arguments are
    those of a `fastlenet.selection.Call`.
    """
    for direction in ("forward", "backward") if differentiable else ("forward",):
        reason = None  # of other operators: the kernels compute them
        if name == ADDMM:
            reason = product(direction, tensors[1], tensors[2])
        elif name == CONV:
            reason = convolution(direction, tensors[0], tensors[1], settings)
        elif name == "chain":
            reason = _link(direction, settings, tensors)
        if reason is not None:
            return reason
    return None


def _link(direction: str, links: Links, tensors: Sequence[Any]) -> str | None:
    """Say why a library computes a convolution of a chain, or None. If one does, the links run one by one."""
    images = tensors[0]
    for link, weight in zip(links, tensors[1::2], strict=True):
        if not isinstance(link, ConvPoolGeometry):
            break
        images = images.new_empty((0, *images.shape[-3:]))
        if (reason := convolution(direction, images, weight, link)) is not None:
            return reason
        images = images.new_empty(link.output_shape(images, weight))
    return None


def convolution(direction: str, input: Tensor, weight: Tensor, geometry: ConvPoolGeometry) -> str | None:
    """Say why cuDNN computes a convolution with its pool, or None if a Triton kernel does; see `why_library`."""
    precision = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    exact = input.dtype == torch.float32 and precision == "ieee"
    sizes = weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3])
    # Whatever gradients a call needs: a first layer's images have none.
    name = "forward" if direction == "forward" else "grad_weight"
    rule = None
    if weight.shape[1] <= rules.MOST_CHANNELS:
        rule = rules.choose(name, geometry, *sizes, exact, configurations.architecture())
    few = weight.shape[1] < _FEW_CHANNELS
    narrow = weight.shape[0] // geometry.groups < _FEW_COLUMNS and not (few and rule is None)
    deepest = math.inf if narrow else _DEEPEST_OF_FEW if few or rule is not None else None
    depth = math.prod(weight.shape[1:])
    return why_library(CONV, direction, input.dtype, precision, geometry.key(input, weight), depth, deepest)


def product(direction: str, mat1: Tensor, mat2: Tensor) -> str | None:
    """Say why cuBLAS computes a matrix product with its relu, or None if a Triton kernel does; see `why_library`."""
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    depth, columns = mat2.shape
    return why_library(ADDMM, direction, mat1.dtype, precision, (depth, columns), depth)


def inside(name: str, settings: Any, tensors: Sequence[Any]) -> str | None:
    """Say why a library computes a chain's linear maps while kernels compute the rest, or None.

    That is the forward. Of the backward's products the kernels take less time than cuBLAS does.
    """
    if name != "chain" or isinstance(settings[-1], ConvPoolGeometry):
        return None
    if head_of(settings, tensors[1:]) == len(settings):
        return "linear layers other than a head of three" if LINEAR not in settings else "linear layers of other widths"
    if tensors[0].dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "exact float32: cuBLAS takes 48 us where the kernel takes 98 (LeNet on an H100, batch 8192)"
    return None
