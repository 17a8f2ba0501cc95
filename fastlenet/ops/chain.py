"""A chain: several fused operators computed as one. No other code sees the results between them.

Its links are convolutions with relu and max-pool, then linear maps with relu, then perhaps one linear map without relu.
Each sample is flattened before the first linear map.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlenet import checks, reference
from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry, Links
from fastlenet.ops import addmm_relu as linear
from fastlenet.ops import conv2d_relu_max_pool2d as conv
from fastlenet.ops.registration import (
    HELD,
    SAVED,
    VIEW,
    Operator,
    Registered,
    define,
    gradients,
    keep,
    kept,
    operators,
    or_empty,
    shaped,
)
from fastlenet.private import runs_eagerly

_NAME = "chain"


# --- the operators: schemas, shapes, cost ---------------------------------------------------------------------------


def spec_of(links: Links) -> str:
    """Write links as the registered operator takes them: the text of a list of tuples and names."""
    return str([link if isinstance(link, str) else tuple(link) for link in links])


@functools.lru_cache(maxsize=512)
def links_of(spec: str) -> Links:
    """Read the links from the text that `spec_of` wrote."""
    return tuple(link if isinstance(link, str) else ConvPoolGeometry(*link) for link in ast.literal_eval(spec))


def _fake(input: Tensor, parameters: Sequence[Tensor | None], spec: str, save: bool) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []
    for link, weight in zip(links_of(spec), parameters[::2], strict=True):
        assert weight is not None
        if isinstance(link, ConvPoolGeometry):
            input = conv.empty_output(input, weight, link)
            saved.append(torch.empty_like(input, dtype=link.argmax_dtype))
        else:
            input = input.new_empty(input.shape[0], weight.shape[0])
        saved.append(input)
    return saved.pop(), saved if save and not _recomputes(input) else []


def _recomputes(tensor: Tensor) -> bool:
    """Whether a graph's backward computes the forward again: what CPU kernels save has no shape that a graph knows."""
    return tensor.device.type == "cpu"


def _backward_fake(grad_output: Tensor, output: Tensor, input: Tensor, parameters: Any, *args: Any) -> list[Tensor]:
    return [
        torch.empty_like(tensor) if needed and tensor is not None else input.new_empty(0)
        for tensor, needed in zip((input, *parameters), args[-1], strict=True)
    ]


define(
    f"{_NAME}(Tensor input, Tensor?[] parameters, str spec, bool save) -> (Tensor output, Tensor[] saved)",
    _fake,
)
define(
    f"{_NAME}_backward(Tensor grad_output, Tensor output, Tensor input, Tensor?[] parameters, Tensor[] saved, str spec,"
    " bool[] output_mask) -> Tensor[]",
    _backward_fake,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class ChainFunction(torch.autograd.Function):
    """A whole chain. It saves its operands and what its implementation needs, nothing of a convolution's size."""

    @staticmethod
    def forward(
        ctx: Any, known: Any, links: Links, leading: tuple[int, ...] | None, input: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        """Take a batched input, and weight and bias of each link; `leading` sizes, if given, are the output's."""
        if known is None:
            output, saved = operators.chain(input, parameters, spec_of(links), True)
        else:
            output, saved = known.forward(input, parameters, links, True)
        if leading is not None:
            output = shaped(output, (*leading, *output.shape[1:]), known)
        ctx.known, ctx.links = known, links
        # The sign of the output is the last relu's mask. After any other last link the output may be modified.
        others = *saved, *((output,) if links[-1] == LINEAR_RELU else ())
        if known is None:
            ctx.save_for_backward(input, *parameters, *others)
        else:
            keep(ctx, (input, *parameters), _ways(links, ctx.needs_input_grad[3:]), *others)
        return output

    @staticmethod
    @runs_eagerly
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those operands that need one."""
        links, needs = ctx.links, ctx.needs_input_grad[3:]
        count = 1 + 2 * len(links)
        tensors = ctx.saved_tensors if ctx.known is None else kept(ctx)
        (input, *parameters), saved, output = tensors[:count], tensors[count:], None
        size = input.shape[0], *grad_output.shape[-3 if isinstance(links[-1], ConvPoolGeometry) else -1 :]
        grad_output = (grad_output if grad_output.shape == size else grad_output.reshape(size)).resolve_neg()
        if links[-1] == LINEAR_RELU:
            *saved, output = saved
            output = output.reshape(size)

        def recorded() -> reference.Grads:
            like = grad_output if output is None else output  # its values are not read then
            args = grad_output, like, input, parameters, list(saved), spec_of(links), needs
            return reference.requested(operators.chain_backward(*args), needs)

        def composed() -> reference.Grads:
            operands = tensors[:count] if ctx.known is None else kept(ctx, composed=True)[:count]
            return _composed_grads(grad_output, links, needs, *operands)

        grads = gradients(
            ctx.known,
            grad_output,
            lambda: ctx.known.backward(grad_output, output, input, parameters, saved, links, needs),
            recorded,
            composed,
        )
        return None, None, None, *grads


@functools.lru_cache(maxsize=512)
def _ways(links: Links, needs: tuple[bool, ...]) -> list[int]:
    """How to keep the input and the parameters, of which some need a gradient."""
    ways, passed = [HELD] * len(needs), needs[0]
    for index, link in enumerate(links):
        place = 1 + 2 * index
        passes = passed or needs[place] or needs[place + 1]
        if isinstance(link, ConvPoolGeometry):
            reads_input, ways[place] = passes, SAVED if passes else HELD
        else:
            reads_input, ways[place] = needs[place], VIEW if passed else HELD
        if index == 0 and reads_input:
            ways[0] = SAVED
        passed = passes
    return ways


def _composed_grads(
    grad_output: Tensor, links: Links, needs: Sequence[bool], *operands: Tensor | None
) -> reference.Grads:
    """Gradients in plain operators. They compute the results between links again, so they are differentiable."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [tensor for tensor, needed in zip(operands, needs, strict=True) if tensor is not None and needed]
        input, *parameters = operands
        assert input is not None
        output = reference.chain(input, parameters, links)
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return tuple(next(grads) if needed else None for needed in needs)


@functools.lru_cache(maxsize=512)
def function_of(links: Links) -> type[torch.autograd.Function]:
    """Make a chain's Function. Its name, and so the node's, lists the operators."""
    names = ["ConvReLUMaxPool2d" if isinstance(link, ConvPoolGeometry) else _LINEAR_NAMES[link] for link in links]
    return type(f"{'_'.join(names)}Chain", (ChainFunction,), {"__doc__": ChainFunction.__doc__})


_LINEAR_NAMES = {LINEAR_RELU: "LinearReLU", LINEAR: "Linear"}


# --- what `fastlenet.selection` must know ---------------------------------------------------------------------------


class _Operator(Operator):
    name = _NAME
    traceable = False  # lists of optional tensors are not

    def check(self, settings: Links, *tensors: Any) -> None:
        input, *parameters = tensors
        checks.links(_NAME, settings, parameters)
        named = {f"{('weight', 'bias')[i % 2]}{i // 2 + 1}": tensor for i, tensor in enumerate(parameters)}
        checks.same_type(_NAME, ("input", input), **named)
        compose = functools.partial(self.composition, settings)
        checks.by_stock(_NAME, checks.without_images(compose, settings), compose, settings, input=input, **named)

    def composition(self, settings: Links, *tensors: Any, run: Callable[..., Tensor] | None = None) -> Tensor:
        input, *parameters = tensors
        if run is None:
            return reference.chain(input, parameters, settings)
        if inner := _convolutions(settings):
            count = 2 * len(inner)
            input = run(self, inner, input, *parameters[:count]).flatten(-3)
            parameters, settings = parameters[count:], settings[len(inner) :]

        def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry) -> Tensor:
            return run(conv.CONV2D_RELU_MAX_POOL2D, geometry, input, weight, bias)

        return reference.chain(input, parameters, settings, convolve, functools.partial(run, linear.LINEAR_RELU, None))

    def quick(self, settings: Links, *tensors: Any) -> Tensor:
        return self.composition(settings, *tensors, run=lambda operator, *args: operator.quick(*args))

    def fused(self, settings: Links, known: Any, differentiable: bool, *tensors: Any) -> Tensor:
        input, *parameters = tensors
        leading, tail = None, 3 if isinstance(settings[0], ConvPoolGeometry) else 1
        if input.dim() != tail + 1:
            leading = tuple(input.shape[:-tail])
            input = input.reshape(math.prod(leading), *input.shape[-tail:])
        if differentiable:
            function = ChainFunction if torch.compiler.is_compiling() else function_of(settings)
            return function.apply(known, settings, leading, input, *parameters)
        if known is None:
            output = operators.chain(input, parameters, spec_of(settings), False)[0]
        else:
            output = known.forward(input, parameters, settings, False)[0]
        return output if leading is None else shaped(output, (*leading, *output.shape[1:]), known)

    def uncovered(self, implementation: str, settings: Links, *tensors: Any) -> str | None:
        input, *parameters = tensors
        if implementation == "triton":
            cells = max((link.window_size for link in settings if isinstance(link, ConvPoolGeometry)), default=0)
            return f"the Triton kernels cover pooling windows of up to 255 cells, not {cells}" if cells > 255 else None
        from fastlenet import cpu

        return cpu.chain_covers(_batched(input, settings), parameters, settings)

    def slower(self, settings: Links, differentiable: bool, *tensors: Any) -> str | None:
        from fastlenet import cpu

        input, *parameters = tensors
        return cpu.chain_rejects(_batched(input, settings), parameters, settings, differentiable)

    def implementation(self, name: str, library: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if name == "triton":
            from fastlenet.kernels import chain as launchers

            return launchers.forward(library), launchers.backward(library)
        if name == "cpu":
            from fastlenet import cpu

            return cpu.chain, _cpu_backward
        return _reference_forward, reference.chain_backward

    def parts(self, settings: Links, *tensors: Any) -> Iterator[tuple[Operator, Any, tuple[Any, ...]]]:
        input, *parameters = tensors
        if inner := _convolutions(settings):
            yield self, inner, (input, *parameters[: 2 * len(inner)])
        for index, link in enumerate(settings):
            weight, bias = parameters[2 * index : 2 * index + 2]
            if isinstance(link, ConvPoolGeometry):
                input = input if input.dim() == 4 else input.unsqueeze(0)
                yield conv.CONV2D_RELU_MAX_POOL2D, link, (input, weight, bias)
                # Without memory, but with the number of images, which decides too.
                input = input.new_empty(()).expand(link.output_shape(input, weight))
            elif link == LINEAR_RELU:
                input = input.new_empty((0, weight.shape[1]))
                yield linear.LINEAR_RELU, None, (input, weight, bias)

    def registered(self) -> dict[str, Registered]:
        return {_NAME: Registered(_call, _run), f"{_NAME}_backward": Registered(_backward_call, _run_backward)}


def _convolutions(links: Links) -> Links:
    """The convolutions in front, if they are a shorter chain: matrices may be all that a kernel does not take."""
    inner = tuple(link for link in links if isinstance(link, ConvPoolGeometry))
    return inner if 1 < len(inner) < len(links) else ()


def _batched(input: Tensor, links: Links) -> Tensor:
    """The input with one leading dimension."""
    if isinstance(links[0], ConvPoolGeometry):
        return input if input.dim() == 4 else input.unsqueeze(0)
    return input if input.dim() == 2 else input.reshape(-1, input.shape[-1])


def _call(input: Tensor, parameters: Sequence[Tensor | None], spec: str, save: bool) -> Any:
    return links_of(spec), (input, *parameters), save


def _run(
    known: Any, input: Tensor, parameters: Sequence[Tensor | None], spec: str, save: bool
) -> tuple[Tensor, list[Tensor]]:
    save = save and not _recomputes(input)
    output, saved = known.forward(input, parameters, links_of(spec), save)
    return output, list(saved)


def _backward_call(grad_output: Tensor, output: Tensor, input: Tensor, parameters: Any, *args: Any) -> Any:
    return links_of(args[1]), (input, *parameters), True


def _run_backward(
    known: Any,
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    spec: str,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    links = links_of(spec)
    if _recomputes(input) or torch.is_grad_enabled():  # a second derivative goes through what the forward saved
        output, saved = known.forward(input, parameters, links, True)
    return list(
        or_empty(input, known.backward(grad_output, output, input, parameters, saved, links, tuple(output_mask)))
    )


def _cpu_backward(
    grad_output: Tensor, output: Tensor | None, input: Tensor, parameters: Any, saved: Any, links: Links, mask: Any
) -> Sequence[Tensor | None]:
    from fastlenet import cpu

    return cpu.chain_backward(grad_output, input, parameters, links, saved, mask)


def _reference_forward(
    input: Tensor, parameters: Sequence[Tensor | None], links: Links, save: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    if save:
        return reference.chain_with_saved(input, parameters, links)
    return reference.chain(input, parameters, links), ()


CHAIN = _Operator()
