"""Small kernels, sound and broken on purpose, that the harness is tested with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate an output; stands for ``fastlenet.kernels.runtime.empty``."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


@triton.jit
def _halve(x):
    return x * 0.5


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, limit, first, BLOCK: tl.constexpr):
    """Compute ``out[first:limit] = x + y`` row by row; sound if ``first == 0`` and ``limit == n``."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offset < limit) & (offset >= first)
    total = tl.load(x_ptr + offset, mask=mask) + tl.load(y_ptr + offset, mask=mask)
    tl.store(out_ptr + offset, total, mask=mask)


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Halve the sum without a mask: sound only where ``BLOCK`` divides ``n``."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, _halve(tl.load(x_ptr + offset) + tl.load(y_ptr + offset)))


@triton.jit
def window_kernel(x_ptr, out_ptr, n, stride, WINDOW: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``out[i] = sum(x[i : i + WINDOW])`` in loops through a helper; ``SHIFT`` moves the loads out of place."""
    for start in range(0, n, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < n
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(WINDOW):
            total += _halve(tl.load(x_ptr + (offset + tap + SHIFT) * stride, mask=mask, other=0.0))
        tl.store(out_ptr + offset, total * 2.0, mask=mask)


@triton.jit
def in_place_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """Double ``x`` in place."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    tl.store(x_ptr + offset, tl.load(x_ptr + offset, mask=mask) * 2.0, mask=mask)


@triton.jit
def maximum_kernel(x_ptr, out_ptr, n, NAN: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``relu``, with or without propagation of NaN."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n)
    if NAN:  # noqa: SIM108 (Triton compiles branches on constants, not every conditional expression)
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = tl.maximum(x, 0.0)
    tl.store(out_ptr + offset, y, mask=offset < n)


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, K, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Multiply two matrices tile by tile: large tiles need much shared memory, or more registers than there are."""
    row = tl.arange(0, SIZE)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, DEPTH):
        x = tl.load(x_ptr + row[:, None] * K + (k + depth)[None, :])
        y = tl.load(y_ptr + (k + depth)[:, None] * SIZE + row[None, :])
        total = tl.dot(x, y, total)
    tl.store(out_ptr + row[:, None] * SIZE + row[None, :], total)


def add(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    excess: int = 0,
    first: int = 0,
    block: int = 64,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add two vectors; ``excess`` shifts the mask's end (an off-by-one), ``first`` leaves elements unwritten."""
    out = empty(tuple(x.shape), x, dtype)
    n = x.numel()
    add_kernel[(triton.cdiv(n, block),)](x, y, out, n, n + excess, first, BLOCK=block)
    return out


def average(x: torch.Tensor, y: torch.Tensor, *, block: int = 64) -> torch.Tensor:
    """Average two vectors with a kernel that has no mask."""
    out = empty(tuple(x.shape), x)
    unmasked_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


def window_sum(x: torch.Tensor, window: int, *, shift: int = 0, block: int = 32) -> torch.Tensor:
    """Sum a sliding window over a vector of any stride."""
    out = empty((x.numel() - window + 1,), x, torch.float32)
    window_kernel[(1,)](x, out, out.numel(), x.stride(0), WINDOW=window, SHIFT=shift, BLOCK=block)
    return out


def double_in_place(x: torch.Tensor) -> None:
    """Modify the input, as no launcher may."""
    in_place_kernel[(1,)](x, x.numel(), BLOCK=64)


def relu(x: torch.Tensor, *, nan: bool) -> torch.Tensor:
    """Compute ``relu``, right or wrong about NaN."""
    out = empty(tuple(x.shape), x)
    maximum_kernel[(1,)](x, out, x.numel(), NAN=nan, BLOCK=64)
    return out


def product(size: int, depth: int, **options: int) -> torch.Tensor:
    """Multiply ``size x 1024`` by ``1024 x size`` in one program."""
    x = torch.zeros(size, 1024, dtype=torch.float16)
    out = empty((size, size), x, torch.float32)
    product_kernel[(1,)](x, torch.zeros(1024, size, dtype=torch.float16), out, 1024, SIZE=size, DEPTH=depth, **options)
    return out
