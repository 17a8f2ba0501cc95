"""Outputs filled with a recognisable pattern before each launch.

Every launcher of ``fastlenet.kernels`` allocates through one helper, ``fastlenet.kernels.runtime.empty``, and every
plan through ``fastlenet.kernels.plans.empty_strided``. Inside `poisoned_outputs` these return memory full of poison
(a NaN with a payload of its own for floats, a repeated byte for integers) with a guard zone on either side. An element
that no kernel writes keeps the poison; a write outside the tensor damages the guard, on a real GPU too, and is reported
when the context ends.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = [
    "Poison",
    "assert_fully_written",
    "assert_writes_everything",
    "is_poison",
    "poison_bits",
    "poisoned_outputs",
]

ALLOCATORS = "fastlenet.kernels.runtime:empty", "fastlenet.kernels.plans:empty_strided"
_GUARD_BYTES = 512
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BYTE = 0xAB


def poison_bits(dtype: torch.dtype, byte: int = _BYTE) -> int:
    """The poison for ``dtype`` as a signed integer of the same size (unsigned for one-byte types)."""
    size = torch.empty((), dtype=dtype).element_size()
    if dtype == torch.bool:
        return byte & 1
    if dtype.is_floating_point and size > 1:
        # A quiet NaN (all exponent bits and the top mantissa bit) whose remaining payload is made of the byte.
        info = torch.finfo(dtype)
        mantissa = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[dtype]
        quiet = ((1 << (info.bits - 1 - mantissa)) - 1) << mantissa | 1 << (mantissa - 1)
        return quiet | int.from_bytes(bytes([byte]) * size, "little") & ((1 << (mantissa - 1)) - 1)
    return int.from_bytes(bytes([byte]) * size, "little", signed=size > 1)


def is_poison(tensor: torch.Tensor, byte: int = _BYTE) -> torch.Tensor:
    """Where ``tensor`` still holds exactly the poison pattern."""
    raw = tensor.detach().view(_INT_OF_SIZE[tensor.element_size()])
    return raw == poison_bits(tensor.dtype, byte)


class Poison:
    """What `poisoned_outputs` allocated: the tensors, and whether they and their guards are as they should be."""

    def __init__(self, byte: int = _BYTE, guard_bytes: int = _GUARD_BYTES) -> None:
        self.byte = byte
        self.tensors: list[torch.Tensor] = []
        self._guard_bytes = guard_bytes
        self._buffers: list[torch.Tensor] = []
        self._storages: set[int] = set()

    def poisoned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape, strides, dtype and device in fresh, poisoned and guarded memory."""
        if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
            return tensor  # a fake tensor of a tracer has no memory to poison
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        guard = self._guard_bytes // tensor.element_size()
        buffer = torch.empty(span + 2 * guard, dtype=tensor.dtype, device=tensor.device)
        buffer.view(_INT_OF_SIZE[tensor.element_size()]).fill_(poison_bits(tensor.dtype, self.byte))
        # `set_` and not `as_strided`: the result must not be a view in autograd's eyes.
        out = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        out.set_(buffer.untyped_storage(), guard, tensor.shape, tensor.stride())
        self.tensors.append(out)
        self._buffers.append(buffer)
        self._storages.add(buffer.untyped_storage().data_ptr())
        return out

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lives in memory allocated here (that is, whether kernels may write to it)."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def assert_guards_intact(self) -> None:
        """Assert that nothing was written before or after any of the tensors."""
        for number, (buffer, out) in enumerate(zip(self._buffers, self.tensors, strict=True)):
            guard = out.storage_offset()
            clean = is_poison(buffer, self.byte)
            before, after = int((~clean[:guard]).sum()), int((~clean[len(clean) - guard :]).sum())
            if before or after:
                raise AssertionError(
                    f"allocation {number}, {tuple(out.shape)} {out.dtype}: {before} elements before and {after} after "
                    "the tensor were overwritten"
                )

    def assert_all_written(self) -> None:
        """Assert that every element of every tensor allocated here was written."""
        if not self.tensors:
            raise AssertionError("nothing was allocated, so nothing was checked")
        for number, out in enumerate(self.tensors):
            assert_fully_written(out, byte=self.byte, name=f"allocation {number}")


def _allocator(path: str) -> tuple[str, Callable[..., torch.Tensor]]:
    module, _, name = path.partition(":")
    return name, getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def poisoned_outputs(
    *,
    byte: int = _BYTE,
    guard_bytes: int = _GUARD_BYTES,
    allocators: Sequence[str] = ALLOCATORS,
    check_guards: bool = True,
) -> Iterator[Poison]:
    """Poison and guard every tensor that launchers allocate in this context.

    An allocation helper is replaced under whatever name any loaded module of its package knows it by, so
    ``from .runtime import empty`` is covered.

    Args:
        byte: the byte that integer poison, and the payload of the NaN, repeat.
        guard_bytes: size of the zone on either side of each tensor (a multiple of 16 keeps the alignment).
        allocators: ``"module:function"`` of each allocation helper.
        check_guards: whether to assert on a clean exit that no guard was overwritten.

    Yields:
        The record of what was allocated.
    """
    poison = Poison(byte, guard_bytes)
    patched: list[tuple[Any, str, Any]] = []

    def wrap(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poison.poisoned_like(original(*args, **kwargs))

    try:
        for path in allocators:
            _, original = _allocator(path)
            wrapper = wrap(original)
            package = path.partition(":")[0].partition(".")[0]
            for name, module in list(sys.modules.items()):
                if module is None or name.partition(".")[0] != package:
                    continue
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        patched.append((module, attribute, original))
                        setattr(module, attribute, wrapper)
        yield poison
    finally:
        for module, attribute, original in patched:
            setattr(module, attribute, original)
    if check_guards:
        poison.assert_guards_intact()


def assert_fully_written(tensor: torch.Tensor, *, byte: int = _BYTE, name: str = "output") -> None:
    """Assert that no element of ``tensor`` still holds the poison.

    Conclusive for floats (the NaN's payload is not one that arithmetic makes) and for integers of two bytes and more.
    A one-byte integer may rightly be ``0xAB`` (171), and a bool is one of two values: use `assert_writes_everything`
    where that matters.
    """
    left = is_poison(tensor, byte)
    if bool(left.any()):
        first = tuple(left.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}, {tuple(tensor.shape)} {tensor.dtype}: {int(left.sum())} of {tensor.numel()} elements were never "
            f"written, the first at {first}"
        )


def assert_writes_everything(
    function: Callable[[], Any], *, allocators: Sequence[str] = ALLOCATORS, require_allocation: bool = True
) -> None:
    """Assert that ``function`` writes every element of everything it allocates, whatever the dtype.

    The function runs twice, under different poison; an element that follows the poison both times was not written.
    """
    runs: list[tuple[int, list[torch.Tensor]]] = []
    for byte in (_BYTE, 0x54):
        with poisoned_outputs(byte=byte, allocators=allocators) as poison:
            function()
        runs.append((byte, poison.tensors))
    (first_byte, first), (second_byte, second) = runs
    if [t.shape for t in first] != [t.shape for t in second]:
        raise AssertionError("two runs of the same function allocated different tensors")
    if require_allocation and not any(t.numel() for t in first):
        raise AssertionError("nothing was allocated, so nothing was checked")
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        left = is_poison(a, first_byte) & is_poison(b, second_byte)
        if bool(left.any()):
            raise AssertionError(
                f"allocation {number}, {tuple(a.shape)} {a.dtype}: {int(left.sum())} of {a.numel()} elements "
                f"were never written, the first at {tuple(left.nonzero()[0].tolist())}"
            )
