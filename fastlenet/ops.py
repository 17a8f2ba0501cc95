"""The raw operators, ``torch.ops.fastlenet.*``: schemas, shape functions, and the choice of implementation.

They know nothing of autograd; `fastlenet.autograd` wraps them. Each is opaque to torch.compile, so that a Triton
kernel is launched by its own launcher whatever surrounds it.

``conv2d_relu_max_pool2d`` returns the pooled output and its argmax (an empty tensor unless `return_argmax`);
``mlp`` its output and what relu gave of both hidden layers (empty tensors unless `return_hidden`).
A backward operator returns one gradient per differentiable input, an empty tensor where `output_mask` asks for none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlenet import aten
from fastlenet.backend import backend, logger, runs_plain, why_aten
from fastlenet.kernels import dispatch
from fastlenet.kernels.geometry import ConvPoolGeometry, memory_format

Size = Sequence[int]
Implementation = TypeVar("Implementation", bound=Callable[..., Any])

# The fields of ConvPoolGeometry, in its order.
_GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool ceil_mode"
)

# The package's own name, so that a copy of it under another name has operators of its own, beside these.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
library = torch.library.Library(NAMESPACE, "DEF")
operators = getattr(torch.ops, NAMESPACE)
library.define(
    f"conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, bool return_argmax)"
    " -> (Tensor output, Tensor argmax)"
)
library.define(
    f"conv2d_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor argmax, {_GEOMETRY},"
    " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
library.define("addmm_relu(Tensor? input, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha) -> Tensor")
library.define(
    "addmm_relu_backward(Tensor grad_output, Tensor output, Tensor mat1, Tensor mat2, SymInt[] input_size,"
    " Scalar beta, Scalar alpha, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_mat1, Tensor grad_mat2)"
)
library.define(
    "mlp(Tensor input, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3,"
    " bool return_hidden) -> (Tensor output, Tensor hidden1, Tensor hidden2)"
)
library.define(
    "mlp_backward(Tensor grad_output, Tensor input, Tensor hidden1, Tensor hidden2, Tensor weight1, Tensor weight2,"
    " Tensor weight3, bool[7] output_mask) -> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1,"
    " Tensor grad_weight2, Tensor grad_bias2, Tensor grad_weight3, Tensor grad_bias3)"
)


def _implements(
    name: str, geometry_at: int | None = None, finish: Callable[..., Any] | None = None
) -> Callable[[Implementation], Implementation]:
    """Register a function as the operator `name` on every device, with autograd and autocast off inside.

    Both have acted before: autograd is `fastlenet.autograd`'s, and `fastlenet.functional` has cast; a second cast
    inside would change a backward's dtype.

    Args:
        name: of the operator.
        geometry_at: which argument is a `ConvPoolGeometry`, the last but one; the operator takes its fields one by one.
        finish: makes the operator's result of the function's and its arguments: an operator must return tensors, while
            who is called past the dispatcher need not allocate what nobody asked for.
    """

    def register(function: Implementation) -> Implementation:
        @functools.wraps(function)
        def below_autograd(*args: Any) -> Any:
            if geometry_at is not None:
                args = *args[:geometry_at], _geometry(args[geometry_at:-1]), args[-1]
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            autocast = torch.is_autocast_enabled(device)
            with torch._C._AutoDispatchBelowAutograd():
                with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
                    result = function(*args)
                return result if finish is None else finish(result, *args)

        library.impl(name, below_autograd, "CompositeExplicitAutograd")
        operator = getattr(operators, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if not _dispatcher_matters(args):
                return function(*args)
            return operator(*args) if geometry_at is None else operator(*args[:geometry_at], *args[-2], args[-1])

        return call  # type: ignore[return-value]

    return register


def _dispatcher_matters(args: tuple[Any, ...]) -> bool:
    """Whether calling the registered operator differs from calling its function, which saves some 30 us.

    It does for tracers and profilers, and under autocast, which must be off inside.
    """
    return is_traced(args) or _is_any_autocast_enabled() or _profiler_enabled()


def is_traced(args: tuple[Any, ...]) -> bool:
    """Whether somebody records, maps or replaces operators.

    Compilers do, tracers, dispatch modes, transforms, tensor subclasses.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    ):
        return True
    for arg in args:  # a generator takes longer
        if type(arg) in _PLAIN_TENSORS:
            # torch.autograd.grad(is_grads_batched=True) maps by another kind of tensor, whose type does not tell.
            if _is_batched(arg):
                return True
        elif isinstance(arg, Tensor):
            return True
    return False


_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}
# Named here, as looking them up through `torch` takes as long as they do.
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_get_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch._C._autograd._profiler_enabled


def _implementation(
    operator: str, input: Tensor, cells: int = 1, width: int = 1, library: Callable[[], str | None] | None = None
) -> ModuleType:
    """Return the module that implements `operator` for this call: its Triton launchers, or `fastlenet.aten`.

    Where a kernel covers the call and none is forced, `library` says why ATen is taken all the same, or None.
    """
    if runs_plain(input):
        return aten
    reason = _why_aten(input, cells, width, library)
    if reason is None:
        return _launchers(operator)
    _log(operator, input, reason)
    return aten


def _log(operator: str, input: Tensor, reason: str) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s of %s %s runs on ATen: %s", operator, tuple(input.shape), input.dtype, reason)


def _why_aten(input: Tensor, cells: int, width: int, library: Callable[[], str | None] | None) -> str | None:
    reason = why_aten(input, cells, width)
    return library() if reason is None and library is not None and backend() == "auto" else reason


def takes_stock(operator: str, input: Tensor, library: Callable[[], str | None], cells: int = 1) -> bool:
    """Whether stock's own operators and derivatives compute a call: ATen was chosen on a GPU, and nobody forced it.

    The formulations of `fastlenet.aten` are a CPU's: on an H100 they took up to 2.2 times stock's time.
    """
    if not input.is_cuda or backend() != "auto":
        return False
    reason = _why_aten(input, cells, 1, library)
    if reason is not None:
        _log(operator, input, reason)
    return reason is not None


@functools.cache
def _launchers(operator: str) -> ModuleType:
    """Import an operator's launchers: only when a kernel is first needed, for they import triton."""
    if operator == "addmm_relu":
        from fastlenet.kernels import addmm_relu

        return addmm_relu
    if operator == "mlp":
        from fastlenet.kernels import mlp

        return mlp
    from fastlenet.kernels import conv2d_relu_max_pool2d

    return conv2d_relu_max_pool2d


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Keep cuDNN from summing gradients by atomics, in an order that changes from run to run."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _geometry(fields: Sequence[Any]) -> ConvPoolGeometry:
    """Make a geometry of an operator's arguments, in which pairs are lists."""
    return ConvPoolGeometry(*(tuple(field) if isinstance(field, list) else field for field in fields))


def _or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Stand an empty tensor in for each None: an operator must return tensors."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _with_argmax(
    result: tuple[Tensor, Tensor | None], input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    (output, argmax), (geometry, _) = result, args
    return output, input.new_empty(0, dtype=geometry.argmax_dtype) if argmax is None else argmax


@_implements("conv2d_relu_max_pool2d", geometry_at=3, finish=_with_argmax)
def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry, return_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled output and, if asked for, its argmax."""
    module = _implementation(
        "conv2d_relu_max_pool2d",
        input,
        geometry.window_size,
        library=lambda: dispatch.convolution("forward", input, weight, geometry),
    )
    return module.conv2d_relu_max_pool2d(input, weight, bias, geometry, return_argmax)


@torch.library.register_fake(f"{NAMESPACE}::conv2d_relu_max_pool2d", lib=library)
def _conv2d_relu_max_pool2d_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    *fields, return_argmax = args
    geometry = ConvPoolGeometry(*fields)
    output = torch.empty(
        geometry.output_shape(input, weight),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    )
    return output, torch.empty_like(output, dtype=geometry.argmax_dtype) if return_argmax else output.new_empty(
        0, dtype=geometry.argmax_dtype
    )


@_implements("conv2d_relu_max_pool2d_backward", geometry_at=4)
def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return grad_input, grad_weight and grad_bias."""
    module = _implementation(
        "conv2d_relu_max_pool2d",
        input,
        geometry.window_size,
        library=lambda: dispatch.convolution("backward", input, weight, geometry),
    )
    args = grad_output, input, weight, argmax, geometry, output_mask
    if module is not aten:
        return _or_empty(input, *module.conv2d_relu_max_pool2d_backward(*args))
    with _deterministic() if input.is_cuda else contextlib.nullcontext():
        first, second, third = aten.conv2d_relu_max_pool2d_backward(*args)
    # ATen's convolutions choose layouts of their own; the shape function promises these.
    layout = memory_format(input, weight)
    first = first if first is None else first.contiguous(memory_format=layout)
    second = second if second is None else second.contiguous(memory_format=layout)
    return _or_empty(input, first, second, third)


@torch.library.register_fake(f"{NAMESPACE}::conv2d_relu_max_pool2d_backward", lib=library)
def _conv2d_relu_max_pool2d_backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    layout = memory_format(input, weight)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(
        (input.new_empty(shape).contiguous(memory_format=layout) if len(shape) == 4 else input.new_empty(shape))
        if needed
        else input.new_empty(0)
        for needed, shape in zip(args[-1], shapes, strict=True)
    )


@_implements("addmm_relu")
def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """Return relu(beta * input + alpha * (mat1 @ mat2))."""
    module = _implementation("addmm_relu", mat1, library=lambda: dispatch.product("forward", mat1, mat2))
    return module.addmm_relu(input, mat1, mat2, beta, alpha)


@torch.library.register_fake(f"{NAMESPACE}::addmm_relu", lib=library)
def _addmm_relu_fake(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    return mat1.new_empty(mat1.shape[0], mat2.shape[1])


@_implements("addmm_relu_backward")
def addmm_relu_backward(
    grad_output: Tensor, output: Tensor, mat1: Tensor, mat2: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Take input's size, beta, alpha and `output_mask`; return grad_input, grad_mat1 and grad_mat2."""
    module = _implementation("addmm_relu", mat1, library=lambda: dispatch.product("backward", mat1, mat2))
    grads = module.addmm_relu_backward(grad_output, output, mat1, mat2, *args)
    return _or_empty(mat1, *grads)


@torch.library.register_fake(f"{NAMESPACE}::addmm_relu_backward", lib=library)
def _addmm_relu_backward_fake(
    grad_output: Tensor,
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    input_size: Size,
    beta: float,
    alpha: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    need_input, need_mat1, need_mat2 = output_mask
    transposed = aten.column_major(mat2)
    return _or_empty(
        mat1,
        mat1.new_empty(input_size) if need_input else None,
        mat1.new_empty(mat1.shape) if need_mat1 else None,
        (mat1.new_empty(mat2.shape[::-1]).t() if transposed else mat1.new_empty(mat2.shape)) if need_mat2 else None,
    )


@_implements("mlp", finish=lambda result, input, *_: _or_empty(input, *result))
def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    return_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return three linear layers with relu between them and, if asked for, what relu gave."""
    module = _mlp_implementation("forward", input, weight1, weight2, weight3)
    return module.mlp(input, weight1, bias1, weight2, bias2, weight3, bias3, return_hidden)


def _mlp_implementation(direction: str, input: Tensor, *weights: Tensor) -> ModuleType:
    width = max(weight.shape[0] for weight in weights)
    return _implementation("mlp", input, width=width, library=lambda: dispatch.head(direction, input.dtype))


@torch.library.register_fake(f"{NAMESPACE}::mlp", lib=library)
def _mlp_fake(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    return_hidden: bool,
) -> tuple[Tensor, ...]:
    output, *hiddens = (input.new_empty(input.shape[0], weight.shape[0]) for weight in (weight3, weight1, weight2))
    return _or_empty(input, output, *(hidden if return_hidden else None for hidden in hiddens))


@_implements("mlp_backward")
def mlp_backward(
    grad_output: Tensor,
    input: Tensor,
    hidden1: Tensor,
    hidden2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, and of weight and bias of each layer."""
    module = _mlp_implementation("backward", input, weight1, weight2, weight3)
    grads = module.mlp_backward(grad_output, input, hidden1, hidden2, weight1, weight2, weight3, output_mask)
    return _or_empty(input, *grads)


@torch.library.register_fake(f"{NAMESPACE}::mlp_backward", lib=library)
def _mlp_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    hidden1: Tensor,
    hidden2: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    parameters = (shape for weight in (weight1, weight2, weight3) for shape in (weight.shape, weight.shape[:1]))
    shapes = input.shape, *parameters
    return tuple(input.new_empty(shape if needed else 0) for shape, needed in zip(shapes, output_mask, strict=True))
