"""Checks of the functional forms' arguments.

Each check raises the exception that the stock operator raises for the same mistake; tests compare the types. The
message names the argument, its value and what was expected. For a kind of call that was legal once, only the Python
types of the arguments are checked again (`fastlenet.selection`).
"""

from __future__ import annotations

import numbers
import operator as op
import sys
from typing import Any

import torch
from torch import Tensor

from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry, Links, Pair


def tensors(operator: str, *required: tuple[str, Any], **optional: Any) -> None:
    """Require tensors; an optional one may be None."""
    for name, value in (*required, *optional.items()):
        if not (isinstance(value, Tensor) or (value is None and name in optional)):
            raise TypeError(f"{operator}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def same_type(operator: str, reference: tuple[str, Tensor], **others: Tensor | None) -> None:
    """Require that all have one real dtype and one device."""
    name, tensor = reference
    for kind in ("dtype", "device"):
        for other_name, other in others.items():
            if other is not None and getattr(other, kind) != getattr(tensor, kind):
                raise RuntimeError(
                    f"{operator}: expected {name} and {other_name} to have the same {kind}, but got {name} of {kind} "
                    f"{getattr(tensor, kind)} and {other_name} of {kind} {getattr(other, kind)}"
                )
    if tensor.is_complex():
        raise NotImplementedError(
            f"{operator}: relu is not defined for complex numbers, but got {name} of {tensor.dtype}"
        )


def _index(value: Any) -> int | None:
    """Read a value that stock accepts as an int, such as NumPy's and tensors of one element; else return None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return op.index(value)
    except TypeError:
        return None


def pair(operator: str, name: str, value: Any) -> Pair:
    """Read an int, or one or two of them, as (height, width)."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    found = [_index(v) for v in (value if isinstance(value, (tuple, list)) else [value])]
    read = [number for number in found if number is not None]
    if len(read) != len(found):
        raise TypeError(f"{operator}(): argument '{name}' must be int or tuple of ints, but got {value!r}")
    if len(read) not in (1, 2):
        raise RuntimeError(f"{operator}: {name} must be a single int or a tuple of two ints, but got {name}={value!r}")
    return read[0], read[-1]


def geometry(operator: str, fields: ConvPoolGeometry) -> None:
    """Require hyper-parameters that stock accepts."""
    for name in ("stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding", "pool_dilation"):
        value, low = getattr(fields, name), 0 if name.endswith("padding") else 1
        if min(value) < low:
            raise RuntimeError(f"{operator}: {name} must be at least {low} in both dimensions, but got {name}={value}")
    if any(padding > size // 2 for padding, size in zip(fields.pool_padding, fields.pool_size, strict=True)):
        raise RuntimeError(
            f"{operator}: pool_padding should be at most half of pool_size, but got "
            f"pool_padding={fields.pool_padding} and pool_size={fields.pool_size}"
        )


def conv_shapes(
    operator: str, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, batched: bool = True
) -> None:
    """Require shapes that fit each other. `input` is batched; `batched` says whether the user's input was."""
    if weight.dim() != 4:
        raise RuntimeError(
            f"{operator}: expected weight of 4 dimensions (out_channels, in_channels / groups, kernel height, kernel "
            f"width), but got weight of size {list(weight.shape)}"
        )
    if groups < 1:
        raise RuntimeError(f"{operator}: groups must be at least 1, but got groups={groups}")
    out_channels, in_channels, *kernel = weight.shape
    shape = list(input.shape if batched else input.shape[1:])
    if out_channels == 0 or out_channels % groups != 0:
        raise RuntimeError(
            f"{operator}: given groups={groups}, expected weight of a size at dimension 0 that is a positive multiple "
            f"of {groups}, but got weight of size {list(weight.shape)}"
        )
    if input.shape[1] != in_channels * groups:
        raise RuntimeError(
            f"{operator}: given groups={groups} and weight of size {list(weight.shape)}, expected input{shape} to have "
            f"{in_channels * groups} channels, but got {input.shape[1]} channels instead"
        )
    if in_channels == 0 or 0 in kernel or 0 in input.shape[2:]:
        raise RuntimeError(
            f"{operator}: only the batch dimension may be empty, but got input of size {shape} and weight of size "
            f"{list(weight.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_channels):
        raise RuntimeError(
            f"{operator}: given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
            f"{out_channels} elements, but got bias of size {list(bias.shape)} instead"
        )


def pooled_size(operator: str, input: Tensor, weight: Tensor, fields: ConvPoolGeometry) -> None:
    """Require that at least one kernel fits into the input, and one window into the convolution's output."""
    kernel = (weight.shape[2], weight.shape[3])
    size = (input.shape[2], input.shape[3])
    conv = fields.conv_size(size, kernel)
    if conv[0] < 1 or conv[1] < 1:
        padded = tuple(size[i] + 2 * fields.padding[i] for i in (0, 1))
        reach = tuple(fields.dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1))
        raise RuntimeError(
            f"{operator}: the kernel does not fit: padded input size per channel is {padded[0]} x {padded[1]}, kernel "
            f"size with dilation is {reach[0]} x {reach[1]}, from weight of size {list(weight.shape)}"
        )
    pooled = fields.pooled_size(conv)
    if pooled[0] < 1 or pooled[1] < 1:
        raise RuntimeError(
            f"{operator}: pool_size={fields.pool_size} does not fit: given a convolution output of size "
            f"{weight.shape[0]} x {conv[0]} x {conv[1]}, the pooled size of {pooled[0]} x {pooled[1]} is too small"
        )


def matrices(operator: str, input: Tensor | None, mat1: Tensor, mat2: Tensor) -> None:
    """Require two matrices that multiply, and an input that broadcasts to their product."""
    for name, matrix in (("mat1", mat1), ("mat2", mat2)):
        if matrix.dim() != 2:
            raise RuntimeError(f"{operator}: {name} must be a matrix, but got {name} of size {list(matrix.shape)}")
    if mat1.shape[1] != mat2.shape[0]:
        raise RuntimeError(
            f"{operator}: mat1 and mat2 shapes cannot be multiplied: mat1 is {list(mat1.shape)} and mat2 is "
            f"{list(mat2.shape)}, expected mat2 of {mat1.shape[1]} rows"
        )
    if input is not None:
        _broadcasts(operator, "input", input, (mat1.shape[0], mat2.shape[1]))


def linear_shapes(operator: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Require what F.linear requires of a matrix `weight`."""
    if weight.dim() not in (1, 2) or (weight.dim() == 1 and bias is not None):
        raise RuntimeError(
            f"{operator}: expected weight of size (out_features, in_features), or (in_features) without bias, but got "
            f"weight of size {list(weight.shape)}"
        )
    if input.dim() == 0:
        raise RuntimeError(f"{operator}: expected input of at least 1 dimension, but got a scalar")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{operator}: expected input of {weight.shape[-1]} features in its last dimension, as weight of size "
            f"{list(weight.shape)} has, but got input of size {list(input.shape)}"
        )
    # A single sample is accepted too: stock computes it as a batch of one.
    if bias is not None and not (input.dim() == 1 and bias.shape == (1, weight.shape[0])):
        _broadcasts(operator, "bias", bias, (*input.shape[:-1], weight.shape[0]))


def chain(operator: str, links: Links, input: Tensor, *parameters: Tensor | None) -> None:
    """Require links in the order of a chain, and weights and biases that fit them."""
    kinds = [*links[:-1], *(LINEAR_RELU if link == LINEAR else link for link in links[-1:])]
    linear = next((i for i, link in enumerate(kinds) if not isinstance(link, ConvPoolGeometry)), len(kinds))
    if not links or any(link != LINEAR_RELU for link in kinds[linear:]):
        raise RuntimeError(
            f"{operator}: links are convolutions, then {LINEAR_RELU!r}, and {LINEAR!r} at most once, at the end; "
            f"but got {links}"
        )
    if len(parameters) != 2 * len(links):
        raise RuntimeError(
            f"{operator}: {len(links)} links have {2 * len(links)} parameters, but got {len(parameters)}"
        )
    named = {f"{('weight', 'bias')[i % 2]}{i // 2 + 1}": parameter for i, parameter in enumerate(parameters)}
    for name, parameter in named.items():
        if name.startswith("weight") and not isinstance(parameter, Tensor):
            raise TypeError(f"{operator}(): argument '{name}' must be Tensor, not {type(parameter).__name__}")
    same_type(operator, ("input", input), **named)
    before, shape = "input", tuple(input.shape)
    if linear and len(shape) not in (3, 4):
        raise RuntimeError(
            f"{operator}: expected 3D (unbatched) or 4D (batched) input, but got input of size {list(shape)}"
        )
    if not shape:
        raise RuntimeError(f"{operator}: expected input of at least 1 dimension, but got a scalar")
    images = input.unsqueeze(0) if linear and len(shape) == 3 else input
    pairs = iter(named.items())
    for index, (link, (name, weight), (bias_name, bias)) in enumerate(zip(links, pairs, pairs, strict=True)):
        assert weight is not None
        if isinstance(link, ConvPoolGeometry):
            conv_shapes(operator, images, weight, bias, link.groups)
            geometry(operator, link)
            pooled_size(operator, images, weight, link)
            shape = link.output_shape(images, weight)
            images = weight.new_empty((0, *shape[1:]))
            continue
        width = shape[-1] if index > linear or not linear else shape[1] * shape[2] * shape[3]
        if weight.dim() != 2 or weight.shape[1] != width:
            raise RuntimeError(
                f"{operator}: expected {name} of size (out_features, {width}), as {before} has {width} features, "
                f"but got {name} of size {list(weight.shape)}"
            )
        before, shape = name, (weight.shape[0],)
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            raise RuntimeError(
                f"{operator}: expected {bias_name} of size ({weight.shape[0]},), as {name} has {weight.shape[0]} rows, "
                f"but got {bias_name} of size {list(bias.shape)}"
            )


def _broadcasts(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    sizes = list(tensor.shape)
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False))
    if not fits:
        raise RuntimeError(
            f"{operator}: expected {name} to broadcast to size {list(shape)}, but got {name} of size {sizes}"
        )


def boolean(operator: str, name: str, value: Any) -> None:
    """Require a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{operator}(): argument '{name}' must be bool, not {type(value).__name__}")


def integer(operator: str, name: str, value: Any) -> int:
    """Require an int, and return it."""
    read = _index(value)
    if read is None:
        raise TypeError(f"{operator}(): argument '{name}' must be int, not {type(value).__name__}")
    return read


def scalar(operator: str, name: str, value: Any) -> float:
    """Require a real number, or a tensor with one element, and return it."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return int(value) if isinstance(value, bool) else value  # type: ignore[return-value]
    if isinstance(value, complex):
        raise RuntimeError(f"{operator}: {name} must be a real number, but got {name}={value!r}")
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        return scalar(operator, name, value.item())
    # To Python, NumPy's bool is not a number, unlike its other types. Without NumPy imported it cannot occur.
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].bool_):
        return int(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{operator}(): argument '{name}' must be Number, not {type(value).__name__}")
