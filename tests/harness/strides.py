"""Tensors with awkward strides, and proof that nothing around them was touched.

``awkward(t, kind)`` returns a tensor of the same shape and, for all kinds but the expanded ones, the same values:

==================  ===================================================================================
``contiguous``      row-major, storage offset 0
``channels_last``   4-D (or 5-D) only: channels innermost
``transposed``      dimensions stored in reversed order (a permuted view of contiguous storage)
``sliced``          every second element of a larger buffer whose other elements are NaN, with an offset
``padded``          rows inside a wider NaN-filled buffer: unit inner stride, odd pitch
``unaligned``       row-major but starting one element into its storage: no 16-byte alignment
``expanded``        the first slice along ``dim`` seen ``size`` times: stride 0, **values change**
``scalar``          the first element seen everywhere: stride 0 in all dimensions, **values change**
==================  ===================================================================================

PyTorch has no negative strides, so there is no flipped kind. A test must feed the returned tensor to both sides.
"""

from __future__ import annotations

import torch

__all__ = ["KINDS", "SAME_VALUES", "assert_surroundings_intact", "awkward", "kinds_for"]

SAME_VALUES = ("contiguous", "channels_last", "transposed", "sliced", "padded", "unaligned")
KINDS = SAME_VALUES + ("expanded", "scalar")

_GARBAGE = 0x55


def _surround(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)
    return torch.full(shape, True if like.dtype == torch.bool else _GARBAGE, dtype=like.dtype, device=like.device)


def kinds_for(tensor: torch.Tensor) -> tuple[str, ...]:
    """The kinds that are legal for this tensor and differ from plain contiguous."""
    kinds = [k for k in KINDS if k != "contiguous"]
    if tensor.dim() not in (4, 5):
        kinds.remove("channels_last")
    if tensor.dim() < 2:
        kinds.remove("transposed")
    if tensor.dim() < 1:
        kinds.remove("expanded")
    return tuple(kinds)


def awkward(tensor: torch.Tensor, kind: str, *, dim: int = 0) -> torch.Tensor:
    """Return ``tensor``'s shape and values in the memory layout ``kind`` (see the module's docstring).

    The result is detached and shares no memory with ``tensor``; set ``requires_grad_`` on it where needed.

    Args:
        tensor: the values.
        kind: one of ``KINDS``.
        dim: the repeated dimension of ``expanded``.
    """
    tensor = tensor.detach()
    if kind == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if kind == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if tensor.dim() not in formats:
            raise ValueError(f"channels_last needs 4 or 5 dimensions, got shape {tuple(tensor.shape)}")
        return tensor.clone(memory_format=formats[tensor.dim()])
    if kind == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if kind in ("sliced", "padded"):
        step = 2 if kind == "sliced" else 1
        buffer = _surround(tuple(step * size + 3 for size in tensor.shape) or (3,), tensor)
        view = buffer
        for axis, size in enumerate(tensor.shape):
            view = view.narrow(axis, 1, step * size)
            view = view[(slice(None),) * axis + (slice(None, None, step),)]
        view = view[1] if tensor.dim() == 0 else view
        view.copy_(tensor)
        return view
    if kind == "unaligned":
        buffer = _surround((tensor.numel() + 2,), tensor)
        view = buffer[1 : 1 + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        return view
    if kind == "expanded":
        return tensor.narrow(dim, 0, min(1, tensor.shape[dim])).clone().expand(tensor.shape)
    if kind == "scalar":
        first = tensor.reshape(-1)[:1].clone() if tensor.numel() else tensor.new_zeros(1)
        return first.reshape(()).expand(tensor.shape)
    raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")


def assert_surroundings_intact(view: torch.Tensor) -> None:
    """Assert that nothing was written around a ``sliced``, ``padded`` or ``unaligned`` view made by `awkward`."""
    buffer = view._base
    if buffer is None:
        raise ValueError("this tensor is not a view into a larger buffer made by awkward()")
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    intact = buffer.isnan() if buffer.dtype.is_floating_point else buffer == _surround((), buffer)
    touched = int((outside & ~intact).sum())
    if touched:
        raise AssertionError(f"{touched} elements around a {tuple(view.shape)} view were overwritten")
