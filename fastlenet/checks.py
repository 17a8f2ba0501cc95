"""Checks of the functional forms' arguments.

Each check raises the exception that the stock operator raises for the same mistake; tests compare the types. The
message names the argument, its value and what was expected. For a kind of call that was legal once, only the Python
types of the arguments are checked again (`fastlenet.selection`).
"""

from __future__ import annotations

import contextlib
import numbers
import operator as op
import sys
from collections.abc import Callable, Sequence
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
    if tensor.is_complex() or tensor.is_quantized:
        raise NotImplementedError(
            f"{operator}: this is not defined for complex or quantized numbers, but got {name} of {tensor.dtype}"
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


def links(operator: str, links: Links, parameters: Sequence[Tensor | None]) -> None:
    """Require links in the order of a chain, a weight for each, and biases of linear links that need no broadcast."""
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
    for index, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        tensors(operator, (f"weight{index + 1}", weight))
        assert weight is not None
        if index < linear:
            continue
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise RuntimeError(
                f"{operator}: expected weight{index + 1} to be a matrix and bias{index + 1} to have a number for each "
                f"of its rows, but got weight{index + 1} of size {list(weight.shape)} and bias{index + 1} of size "
                f"{None if bias is None else list(bias.shape)}"
            )


def by_stock(
    operator: str, small: Callable[..., Any], whole: Callable[..., Any], settings: Any = "", **operands: Tensor | None
) -> None:
    """Require what stock's operators require, and raise their error with all arguments behind its text.

    Args:
        operator: its name, for the message.
        small: computes so little with the operands that it costs nothing, and raises an error if they may not fit.
        whole: computes all with stock's operators, or raises the error before it does.
        settings: the other arguments, for the message.
        **operands: the tensors.
    """
    standing = [
        None if tensor is None else torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        for tensor in operands.values()
    ]
    with torch.no_grad():
        with contextlib.suppress(Exception):
            small(*standing)
            return
        try:
            # Stock's answer may depend on strides, which the stand-ins do not have.
            whole(*operands.values())
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            given = [f"{name} of size {list(tensor.shape)}" for name, tensor in operands.items() if tensor is not None]
            raise type(error)(f"{operator}: {reason}; got {', '.join(given)} {settings}".rstrip()) from None


def without_images(compose: Callable[..., Any], links: Links) -> Callable[..., None]:
    """Make a function that computes links, a chain or one convolution alone, for a batch without images."""

    def small(input: Tensor, *parameters: Tensor | None) -> None:
        convolutions = [link for link in links if isinstance(link, ConvPoolGeometry)]
        dimensions = 3 if convolutions else 1
        sizes = [parameter.shape for parameter in parameters if parameter is not None]
        if any(0 in size for size in (*sizes, input.shape[-dimensions:], *(link.dilation for link in convolutions))):
            raise ValueError("without images stock overlooks sizes and dilations of 0")
        compose((input if input.dim() > dimensions else input.unsqueeze(0))[:0], *parameters)

    return small


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
