"""The differentiable operators: ``torch.autograd.Function``s around the raw operators.

A call takes a Function only where a derivative may be asked for. Per operator there are two: the operator itself, and
its backward, differentiable in turn by plain ATen formulas, which serves double backward and torch.func. A subclass of
each adds forward-mode derivatives; they stand apart because torch.compile refuses a Function that defines `jvp`.

Under torch.vmap a convolution folds the mapped dimension into the batch or into its groups and stays fused; a linear
map becomes a batched matrix product in ATen.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet import ops
from fastlenet.aten import Grads, column_major, max_gather, max_scatter, requested, small_conv2d_relu_max_pool2d
from fastlenet.backend import runs_plain
from fastlenet.kernels import dispatch
from fastlenet.kernels.geometry import ConvPoolGeometry


def forward_mode() -> bool:
    """Whether forward-mode derivatives may be asked for."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def apply(function: Any, *args: Any) -> Any:
    """Call ``function.apply``, in eager mode without what it does for torch.func and for default arguments.

    That part binds the arguments to forward's signature, for some 50 us.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(
        *[_unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
    )


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def _needs_function(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for, or torch.func maps the call; else autograd's bookkeeping is skipped."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _compiled_transform() -> bool:
    """Whether torch.compile traces a transform of torch.func: it cannot see through our Functions, but through ATen."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _takes_stock(operator: str, input: Tensor, weight: Tensor, geometry: ConvPoolGeometry | None = None) -> bool:
    """Whether stock's own operators and derivatives compute a call: the library was chosen for it on a GPU.

    A compiler keeps the operator whole, and shall not trace how it is chosen.
    """
    if torch.compiler.is_compiling() or not input.is_cuda:
        return False
    if geometry is None:
        return ops.takes_stock(operator, input, functools.partial(dispatch.product, "forward", input, weight))
    library = functools.partial(dispatch.convolution, "forward", input, weight, geometry)
    return ops.takes_stock(operator, input, library, geometry.window_size)


def conv2d_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvPoolGeometry) -> Tensor:
    """Return the pooled output for a batched input, differentiable."""
    if _compiled_transform() or _takes_stock("conv2d_relu_max_pool2d", input, weight, geometry):
        return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, *geometry[:4])), *geometry[4:])
    if forward_mode():
        output, _ = ConvReLUMaxPool2dForwardAD.apply(input, weight, bias, tuple(geometry))
        return output
    differentiable = _needs_function(input, weight, bias)
    if input.is_cpu and not ops.is_traced((input, weight, bias)) and runs_plain(input):
        plain = small_conv2d_relu_max_pool2d(input, weight, bias, geometry, differentiable)
        if plain is not None:
            return plain
    if differentiable:
        output, _ = apply(ConvReLUMaxPool2dFunction, input, weight, bias, tuple(geometry))
    else:
        output, _ = ops.conv2d_relu_max_pool2d(input, weight, bias, geometry, False)
    return output


def addmm_relu(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """Return relu(beta * input + alpha * (mat1 @ mat2)) of matrices, differentiable."""
    if _compiled_transform() or _takes_stock("addmm_relu", mat1, mat2):
        if input is None:
            return F.relu(torch.mm(mat1, mat2) * alpha)
        return F.relu(torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha))
    if forward_mode():
        return AddmmReLUForwardAD.apply(input, mat1, mat2, beta, alpha)
    if _needs_function(mat1, mat2, input):
        return apply(AddmmReLUFunction, input, mat1, mat2, beta, alpha)
    return ops.addmm_relu(input, mat1, mat2, beta, alpha)


def plain_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Try relu(input @ weight^T + bias) by stock's operators and derivatives; None where that cannot be, or goes wrong.

    On ATen there is nothing to fuse, and for a small layer a Function takes as long as its products. Compilers and a
    forced backend keep it. Checks come after: whoever gets None finds out what was wrong.
    """
    try:
        if weight.dim() == 2 and not torch.compiler.is_compiling() and runs_plain(input):
            product = F.linear(input, weight, bias)
            # Of anything but a matrix it is a view, which in-place operators leave a longer graph for.
            return product.relu_() if input.dim() == 2 else product.relu()
    except (AttributeError, TypeError, RuntimeError):
        pass
    return None


def mlp(
    input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, weight3: Tensor, bias3: Tensor
) -> Tensor:
    """Return three linear layers with relu between them, of a matrix, differentiable in reverse mode."""
    args = input, weight1, bias1, weight2, bias2, weight3, bias3
    if _needs_function(*args):
        output, *_ = apply(MLPFunction, *args)
    else:
        output, *_ = ops.mlp(*args, False)
    return output


def _apply_backward(plain: Any, forward_ad: Any, *args: Any) -> tuple[Tensor, ...]:
    """Run a backward: bare, or as a Function where its own derivatives may be asked for."""
    if forward_mode():
        return forward_ad.apply(*args)
    return plain.apply(*args) if torch.is_grad_enabled() else plain.forward(*args)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Add up those terms that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _defined(tangents: tuple[Any, ...], shapes: tuple[Any, ...], needs: tuple[bool, ...], like: Tensor) -> Any:
    """Stand zeros in for tangents that are not there: PyTorch takes no None from a `jvp` with several outputs."""
    return tuple(
        like.new_zeros(shape if needed else 0) if tangent is None or not needed else tangent
        for tangent, shape, needed in zip(tangents, shapes, needs, strict=True)
    )


def _to_front(tensor: Any, dim: int | None, size: int) -> Any:
    """Move a mapped dimension to the front, or add one of `size` where the tensor is not mapped."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class ConvReLUMaxPool2dFunction(torch.autograd.Function):
    """``max_pool2d(relu(conv2d(input, weight, bias)))``.

    Saves the input, the weight and the argmax, of which `ConvPoolGeometry.no_winner` tells where relu was off:
    nothing at the convolution's resolution, and not the output, which its user may therefore modify in place.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take a batched input and the fields of a `ConvPoolGeometry`; return the pooled output and the argmax."""
        return ops.conv2d_relu_max_pool2d(input, weight, bias, ConvPoolGeometry(*geometry), True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward needs."""
        input, weight, _, ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        if grad_output is None or not any(needs):
            return None, None, None, None
        args = grad_output, *ctx.saved_tensors, ctx.geometry, needs
        grads = _apply_backward(ConvReLUMaxPool2dBackward, ConvReLUMaxPool2dBackwardForwardAD, *args)
        return *requested(grads, needs), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the batch, or into the groups where each sample has its own weights."""
        (input, weight, bias, geometry), size = args, info.batch_size
        function = ConvReLUMaxPool2dForwardAD if forward_mode() else ConvReLUMaxPool2dFunction
        if in_dims[1] is None and in_dims[2] is None:
            input = _to_front(input, in_dims[0], size)
            output, argmax = function.apply(input.flatten(0, 1), weight, bias, geometry)
            return (output.unflatten(0, (size, -1)), argmax.unflatten(0, (size, -1))), (0, 0)
        input, weight, bias = (_to_front(arg, dim, size) for arg, dim in zip(args[:3], in_dims[:3], strict=True))
        output, argmax = function.apply(
            input.movedim(0, 1).flatten(1, 2),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            _grouped(geometry, size),
        )
        return (output.unflatten(1, (size, -1)), argmax.unflatten(1, (size, -1))), (1, 1)


class ConvReLUMaxPool2dForwardAD(ConvReLUMaxPool2dFunction):
    """The same with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save for both modes."""
        ConvReLUMaxPool2dFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[1], output[1])

    @staticmethod
    def jvp(ctx: Any, input_tangent: Any, weight_tangent: Any, bias_tangent: Any, _: None) -> tuple[Any, None]:
        """Push tangents through the cells that won."""
        input, weight, argmax = ctx.saved_tensors
        return _conv_tangent(input, weight, argmax, ctx.geometry, input_tangent, weight_tangent, bias_tangent), None


class ConvReLUMaxPool2dBackward(torch.autograd.Function):
    """Gradients of `ConvReLUMaxPool2dFunction`, linear in grad_output; their own derivatives are plain ATen."""

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, geometry: tuple[Any, ...], needs: Any
    ) -> tuple[Tensor, ...]:
        """Return grad_input, grad_weight and grad_bias, empty where not needed."""
        return ops.conv2d_relu_max_pool2d_backward(
            grad_output, input, weight, argmax, ConvPoolGeometry(*geometry), needs
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the second derivative needs."""
        *tensors, ctx.geometry, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients by grad_output, input and weight."""
        grad_output, input, weight, argmax = ctx.saved_tensors
        to_input, to_weight, to_bias = requested(cotangents, ctx.needs)
        grad_grad = by_input = by_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad = _conv_tangent(input, weight, argmax, ctx.geometry, to_input, to_weight, to_bias)
        if ctx.needs_input_grad[1] and to_weight is not None:
            by_input = _conv_grads(grad_output, input, to_weight, argmax, ctx.geometry, (True, False, False))[0]
        if ctx.needs_input_grad[2] and to_input is not None:
            by_weight = _conv_grads(grad_output, to_input, weight, argmax, ctx.geometry, (False, True, False))[1]
        return grad_grad, by_input, by_weight, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the groups: each sample then has weight gradients of its own."""
        *tensors, geometry, needs = args
        size = info.batch_size
        grad_output, input, weight, argmax = (
            _to_front(arg, dim, size) for arg, dim in zip(tensors, in_dims[:4], strict=True)
        )
        function = ConvReLUMaxPool2dBackwardForwardAD if forward_mode() else ConvReLUMaxPool2dBackward
        grad_input, grad_weight, grad_bias = function.apply(
            *(tensor.movedim(0, 1).flatten(1, 2) for tensor in (grad_output, input)),
            weight.flatten(0, 1),
            argmax.movedim(0, 1).flatten(1, 2),
            _grouped(geometry, size),
            needs,
        )
        grads = (
            grad_input.unflatten(1, (size, -1)).movedim(1, 0) if needs[0] else grad_input.expand(size, 0),
            grad_weight.unflatten(0, (size, -1)) if needs[1] else grad_weight.expand(size, 0),
            grad_bias.unflatten(0, (size, -1)) if needs[2] else grad_bias.expand(size, 0),
        )
        return grads, (0, 0, 0)


class ConvReLUMaxPool2dBackwardForwardAD(ConvReLUMaxPool2dBackward):
    """The same with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes."""
        ConvReLUMaxPool2dBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Any, input_tangent: Any, weight_tangent: Any, *_: None) -> tuple[Any, ...]:
        """Differentiate each gradient along the tangents: it is linear in each of the three."""
        grad_output, input, weight, argmax = ctx.saved_tensors

        def grads(grad: Any, image: Any, kernel: Any, mask: tuple[bool, ...]) -> Grads:
            if grad is None or image is None or kernel is None:
                return None, None, None
            return _conv_grads(grad, image, kernel, argmax, ctx.geometry, mask)

        needs = tuple(ctx.needs)
        by_grad = grads(grad_tangent, input, weight, needs)
        by_weight = grads(grad_output, input, weight_tangent, (needs[0], False, False))
        by_input = grads(grad_output, input_tangent, weight, (False, needs[1], False))
        tangents = _sum(by_grad[0], by_weight[0]), _sum(by_grad[1], by_input[1]), by_grad[2]
        return _defined(tangents, (input.shape, weight.shape, weight.shape[:1]), needs, input)


def _grouped(geometry: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Multiply the groups of a geometry by the size of a mapped dimension."""
    fields = ConvPoolGeometry(*geometry)
    return tuple(fields._replace(groups=fields.groups * size))


def _conv_grads(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, fields: tuple[Any, ...], mask: tuple[bool, ...]
) -> Grads:
    """Gradients of the operator for given argmax, in differentiable ATen."""
    geometry = ConvPoolGeometry(*fields)
    size = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    grads = torch.ops.aten.convolution_backward(
        max_scatter(grad_output, argmax, size, geometry),
        input,
        weight,
        [weight.shape[0]],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        mask,
    )
    return requested(grads, mask)


def _conv_tangent(
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    fields: tuple[Any, ...],
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> Tensor | None:
    """Directional derivative of the pooled output: that of the convolution, at the cells that won."""
    geometry = ConvPoolGeometry(*fields)
    hyper = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    convolve = F.conv2d
    by_input = None if input_tangent is None else convolve(input_tangent, weight, None, *hyper)
    by_weight = None if weight_tangent is None else convolve(input, weight_tangent, None, *hyper)
    tangent = _sum(by_input, by_weight)
    size = geometry.conv_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    if bias_tangent is not None:
        by_bias = bias_tangent.reshape(1, -1, 1, 1).expand(input.shape[0], -1, *size)
        tangent = by_bias if tangent is None else tangent + by_bias
    return None if tangent is None else max_gather(tangent, argmax, geometry)


class AddmmReLUFunction(torch.autograd.Function):
    """``relu(beta * input + alpha * (mat1 @ mat2))``; saves mat1, mat2 and the output, whose sign is relu's mask."""

    @staticmethod
    def forward(input: Tensor | None, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
        """Take matrices mat1 (M, K) and mat2 (K, N) and an input that broadcasts to (M, N); return (M, N)."""
        return ops.addmm_relu(input, mat1, mat2, beta, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the backward needs."""
        input, mat1, mat2, ctx.beta, ctx.alpha = inputs
        ctx.input_size = () if input is None else tuple(input.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, mat1, mat2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad[:3]
        if grad_output is None or not any(needs):
            return None, None, None, None, None
        args = grad_output, *ctx.saved_tensors, ctx.input_size, ctx.beta, ctx.alpha, needs
        grads = _apply_backward(AddmmReLUBackward, AddmmReLUBackwardForwardAD, *args)
        return *requested(grads, needs), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Compute a batched matrix product."""
        (input, mat1, mat2, beta, alpha), size = args, info.batch_size
        product = torch.matmul(_to_front(mat1, in_dims[1], size), _to_front(mat2, in_dims[2], size)) * alpha
        if input is not None and beta != 0:
            input = _to_front(input, in_dims[0], size)
            product = product + beta * input.reshape(size, *(1,) * (3 - input.dim()), *input.shape[1:])
        return product.relu(), 0


class AddmmReLUForwardAD(AddmmReLUFunction):
    """The same with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save for both modes."""
        AddmmReLUFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output, inputs[1], inputs[2])

    @staticmethod
    def jvp(ctx: Any, input_tangent: Any, mat1_tangent: Any, mat2_tangent: Any, *_: None) -> Any:
        """Push tangents through where relu was on."""
        output, mat1, mat2 = ctx.saved_tensors
        return _addmm_tangent(output, mat1, mat2, ctx.beta, ctx.alpha, input_tangent, mat1_tangent, mat2_tangent)


class AddmmReLUBackward(torch.autograd.Function):
    """Gradients of `AddmmReLUFunction`, linear in grad_output; their own derivatives are plain ATen."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        output: Tensor,
        mat1: Tensor,
        mat2: Tensor,
        input_size: tuple[int, ...],
        beta: float,
        alpha: float,
        needs: Any,
    ) -> tuple[Tensor, ...]:
        """Return grad_input, grad_mat1 and grad_mat2, empty where not needed."""
        return ops.addmm_relu_backward(grad_output, output, mat1, mat2, input_size, beta, alpha, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the second derivative needs."""
        *tensors, _, ctx.beta, ctx.alpha, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients by grad_output, mat1 and mat2."""
        grad_output, output, mat1, mat2 = ctx.saved_tensors
        to_input, to_mat1, to_mat2 = requested(cotangents, ctx.needs)
        grad_grad = by_mat1 = by_mat2 = None
        if ctx.needs_input_grad[0]:
            grad_grad = _addmm_tangent(output, mat1, mat2, ctx.beta, ctx.alpha, to_input, to_mat1, to_mat2)
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0) * ctx.alpha
        if ctx.needs_input_grad[2] and to_mat2 is not None:
            by_mat1 = grad @ to_mat2.t()
        if ctx.needs_input_grad[3] and to_mat1 is not None:
            by_mat2 = to_mat1.t() @ grad
        return grad_grad, None, by_mat1, by_mat2, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Compute batched matrix products."""
        *tensors, input_size, beta, alpha, needs = args
        size = info.batch_size
        grad_output, output, mat1, mat2 = (
            _to_front(arg, dim, size) for arg, dim in zip(tensors, in_dims[:4], strict=True)
        )
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
        none = grad.new_empty(size, 0)
        # A sum over broadcast dimensions sees the mapped one as one more leading dimension that stays.
        sized = (size, *(1,) * (2 - len(input_size)), *input_size)
        grads = (
            (grad.sum_to_size(sized) * beta).reshape(size, *input_size) if needs[0] else none,
            torch.matmul(grad, mat2.mT) * alpha if needs[1] else none,
            torch.matmul(mat1.mT, grad) * alpha if needs[2] else none,
        )
        return grads, (0, 0, 0)


class AddmmReLUBackwardForwardAD(AddmmReLUBackward):
    """The same with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes."""
        AddmmReLUBackward.setup_context(ctx, inputs, output)
        ctx.input_size = inputs[4]
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Any, _output_tangent: Any, mat1_tangent: Any, mat2_tangent: Any, *_: None
    ) -> tuple[Any, ...]:
        """Differentiate each gradient along the tangents; relu's mask has no derivative."""
        grad_output, output, mat1, mat2 = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0) * ctx.alpha
        along = None if grad_tangent is None else torch.ops.aten.threshold_backward(grad_tangent, output, 0)
        by_input = None if along is None else along.sum_to_size(ctx.input_size) * ctx.beta
        by_mat1 = _sum(
            None if along is None else along @ mat2.t() * ctx.alpha,
            None if mat2_tangent is None else grad @ mat2_tangent.t(),
        )
        by_mat2 = _sum(
            None if along is None else mat1.t() @ along * ctx.alpha,
            None if mat1_tangent is None else mat1_tangent.t() @ grad,
        )
        shapes = ctx.input_size, mat1.shape, mat2.shape
        *tangents, by_mat2 = _defined((by_input, by_mat1, by_mat2), shapes, tuple(ctx.needs), mat1)
        if ctx.needs[2] and column_major(mat2):
            # PyTorch wants a tangent laid out as its gradient, where views of the gradient are taken.
            by_mat2 = by_mat2.t().contiguous().t()
        return *tangents, by_mat2


def _addmm_tangent(
    output: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    beta: float,
    alpha: float,
    input_tangent: Tensor | None,
    mat1_tangent: Tensor | None,
    mat2_tangent: Tensor | None,
) -> Tensor | None:
    """Directional derivative of the output: that of the product and sum, where relu was on."""
    tangent = _sum(
        None if input_tangent is None else (input_tangent * beta).expand(mat1.shape[0], mat2.shape[1]),
        None if mat1_tangent is None else alpha * (mat1_tangent @ mat2),
        None if mat2_tangent is None else alpha * (mat1 @ mat2_tangent),
    )
    return None if tangent is None else torch.ops.aten.threshold_backward(tangent, output, 0)


class MLPFunction(torch.autograd.Function):
    """Three linear layers with relu between them; saves what relu gave and what the caller handed in.

    Where more than first derivatives may be asked for, `fastlenet.functional` composes layers of the operators above,
    and so does this backward, in a graph of its own; so there is no rule for vmap, forward mode or second derivatives.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        weight3: Tensor,
        bias3: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Take a matrix (N, in_features); return (N, out_features) and both hidden layers."""
        return ops.mlp(input, weight1, bias1, weight2, bias2, weight3, bias3, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward needs."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of those inputs that need one."""
        needs = ctx.needs_input_grad
        if grad_output is None or not any(needs):
            return (None,) * len(needs)
        *inputs, hidden1, hidden2 = ctx.saved_tensors
        input, weight1, _, weight2, _, weight3, _ = inputs
        differentiable = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_mode()
        if differentiable and not torch.compiler.is_compiling():
            return _mlp_grads(grad_output, *inputs, needs=needs)
        grads = ops.mlp_backward(grad_output, input, hidden1, hidden2, weight1, weight2, weight3, needs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _mlp_grads(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    *,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `MLPFunction`, differentiable to any order: the hidden layers are computed once more for that."""
    function = AddmmReLUForwardAD if forward_mode() else AddmmReLUFunction
    hidden1 = function.apply(bias1, input, weight1.t(), 1, 1)
    hidden2 = function.apply(bias2, hidden1, weight2.t(), 1, 1)
    grad2 = torch.ops.aten.threshold_backward(grad_output @ weight3, hidden2.detach(), 0)
    grad1 = torch.ops.aten.threshold_backward(grad2 @ weight2, hidden1.detach(), 0)
    return (
        grad1 @ weight1 if needs[0] else None,
        grad1.t() @ input if needs[1] else None,
        grad1.sum(0) if needs[2] else None,
        grad2.t() @ hidden1 if needs[3] else None,
        grad2.sum(0) if needs[4] else None,
        grad_output.t() @ hidden2 if needs[5] else None,
        grad_output.sum(0) if needs[6] else None,
    )


for _function in (
    ConvReLUMaxPool2dFunction,
    ConvReLUMaxPool2dBackward,
    AddmmReLUFunction,
    AddmmReLUBackward,
    MLPFunction,
):
    # Function.apply reads forward's signature at every call; reading it once saves some 10 us a call.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
