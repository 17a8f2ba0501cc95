"""A stand-in for `fastlenet.cpu`: kernels for CPU tensors that are stock's operators, of any dtype and shape.

With it in place, calls on a CPU take the operators' Functions, as they do where compiled kernels are installed. What it
saves for a chain's backward is its own, in an order of its own.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import fastlenet
from fastlenet import reference, selection


class PlainCPU(types.ModuleType):
    """The module; `calls` lists the names of what was called."""

    def __init__(self) -> None:
        super().__init__("fastlenet.cpu")
        self.calls: list[str] = []
        self.reason: str | None = None
        self.missing: str | None = None

    def unavailable(self) -> str | None:
        return self.missing

    def covers(self, dtype: Any, input: Any, weight: Any, geometry: Any) -> str | None:
        assert len(input) == 4
        return self.reason

    def rejects(self, input: Any, weight: Any, geometry: Any, save: bool) -> str | None:
        assert input.dim() == 4
        return None

    def batch_norm_relu_max_pool2d_covers(self, geometry: Any, input: Any, *others: Any) -> str | None:
        return "this stand-in has no kernel of BatchNorm"

    def batch_norm_relu_max_pool2d(self, *args: Any) -> Any:
        raise AssertionError("not covered")

    batch_norm_relu_max_pool2d_backward = batch_norm_relu_max_pool2d

    def chain_covers(self, input: Any, parameters: Any, links: Any) -> str | None:
        assert input.dim() in (2, 4)
        return self.reason

    def chain_rejects(self, input: Any, parameters: Any, links: Any, save: bool) -> str | None:
        return None

    def conv2d_relu_max_pool2d(self, input: Any, weight: Any, bias: Any, geometry: Any, return_argmax: bool) -> Any:
        self.calls.append("conv2d_relu_max_pool2d")
        output, argmax = reference.conv2d_relu_max_pool2d_with_argmax(input, weight, bias, geometry)
        return output, argmax if return_argmax else None

    def conv2d_relu_max_pool2d_backward(self, *args: Any) -> Any:
        self.calls.append("conv2d_relu_max_pool2d_backward")
        return reference.conv2d_relu_max_pool2d_backward(*args)

    def chain(self, input: Any, parameters: Any, links: Any, save: bool) -> Any:
        self.calls.append("chain")
        assert input.dim() in (2, 4)
        output, saved = reference.chain_with_saved(input, parameters, links)
        # The user may modify the output in place, unless relu is last.
        own = [*saved, output if links[-1] == "linear_relu" else output.new_empty(0)]
        return output, own[::-1] if save else []

    def chain_backward(
        self, grad_output: Any, input: Any, parameters: Any, links: Any, saved: Any, output_mask: Any
    ) -> Any:
        self.calls.append("chain_backward")
        *inner, output = saved[::-1]
        return list(reference.chain_backward(grad_output, output, input, parameters, inner, links, output_mask))


@contextlib.contextmanager
def plain_cpu() -> Iterator[PlainCPU]:
    """Put the stand-in in place."""
    missing = object()
    before, module = (sys.modules.get("fastlenet.cpu", missing), fastlenet.__dict__.get("cpu", missing)), PlainCPU()
    sys.modules["fastlenet.cpu"] = fastlenet.cpu = module  # type: ignore[attr-defined]
    selection.forget()
    try:
        yield module
    finally:
        del sys.modules["fastlenet.cpu"], fastlenet.cpu  # type: ignore[attr-defined]
        if before[0] is not missing:
            sys.modules["fastlenet.cpu"] = before[0]  # type: ignore[assignment]
        if before[1] is not missing:
            fastlenet.cpu = before[1]  # type: ignore[attr-defined]
        selection.forget()
