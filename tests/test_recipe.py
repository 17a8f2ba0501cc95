"""CONTRIBUTING's recipe, followed: a small operator in four places, and what it gets for that without a further line.

The operator is ``relu(input * scale)``. Its places stand here one after the other; in the package each is a file, or a
function in one.
"""

from __future__ import annotations

import logging
import types

import pytest
import torch
from torch.func import grad, vmap

import fastlenet
from fastlenet import checks, selection
from fastlenet.ops.registration import (
    Operator,
    Registered,
    composed_backward,
    define,
    no_autocast,
    operators,
    or_empty,
)

# --- 1. kernels/scale_relu.py: the launchers (here of a CPU, in NumPy's place) ---------------------------------------


def _forward(input, scale):
    kernels.calls.append("forward")
    return (input * scale).clamp_(min=0)


def _backward(grad_output, output, input, scale, output_mask):
    kernels.calls.append("backward")
    grad = grad_output * (output > 0)
    return grad * scale if output_mask[0] else None, (grad * input).sum(0) if output_mask[1] else None


kernels = types.SimpleNamespace(calls=[], scale_relu=_forward, scale_relu_backward=_backward)


# --- 2. reference.py: the composition, and its gradients in plain operators ------------------------------------------


def reference_scale_relu(input, scale):
    return torch.relu(input * scale)


def reference_scale_relu_backward(grad_output, output, input, scale, output_mask):
    grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
    return grad * scale if output_mask[0] else None, (grad * input).sum(0) if output_mask[1] else None


# --- 3. ops/scale_relu.py: the operator as PyTorch sees it -----------------------------------------------------------

define(
    "scale_relu(Tensor input, Tensor scale) -> Tensor",
    lambda input, scale: torch.empty_like(input),
)
define(
    "scale_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor scale, bool[2] output_mask)"
    " -> (Tensor grad_input, Tensor grad_scale)",
    lambda grad_output, output, input, scale, mask: tuple(
        torch.empty_like(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in zip((input, scale), mask, strict=True)
    ),
)


class ScaleReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, scale, known):
        output = (operators.scale_relu if known is None else known.forward)(input, scale)
        ctx.save_for_backward(output, input, scale)
        ctx.known = known
        return output

    @staticmethod
    def backward(ctx, grad_output):
        output, *operands = ctx.saved_tensors
        args = grad_output, output.detach(), *operands, ctx.needs_input_grad[:2]
        if composed_backward(grad_output):
            with no_autocast(output.device.type):
                return *reference_scale_relu_backward(*args), None
        return *(operators.scale_relu_backward if ctx.known is None else ctx.known.backward)(*args), None


class ScaleReLU(Operator):
    name = "scale_relu"

    def check(self, settings, *tensors):
        input, scale = tensors
        checks.same_type(self.name, ("input", input), scale=scale)
        if scale.shape != input.shape[1:]:
            raise RuntimeError(f"{self.name}: expected scale of size {list(input.shape[1:])}, got {list(scale.shape)}")

    def composition(self, settings, *tensors, run=None):
        return reference_scale_relu(*tensors)

    def fused(self, settings, known, differentiable, *tensors):
        if differentiable:
            return ScaleReLUFunction.apply(*tensors, known)
        return (operators.scale_relu if known is None else known.forward)(*tensors)

    def uncovered(self, implementation, settings, *tensors):
        return None if tensors[0].dim() == 2 else "its kernels take matrices"

    def implementation(self, name, library=False):
        if name == "cpu":
            return kernels.scale_relu, kernels.scale_relu_backward
        return reference_scale_relu, reference_scale_relu_backward

    def registered(self):
        return {
            "scale_relu": Registered(
                lambda input, scale: (None, (input, scale), False),
                lambda known, *args: known.forward(*args),
            ),
            "scale_relu_backward": Registered(
                lambda grad_output, output, input, scale, mask: (None, (input, scale), True),
                lambda known, *args: or_empty(args[0], known.backward(*args)),
            ),
        }


SCALE_RELU = ScaleReLU()
selection.register(SCALE_RELU)


# --- 4. functional.py: the public function ---------------------------------------------------------------------------


def scale_relu(input, scale):
    checks.tensors("scale_relu", ("input", input), ("scale", scale))
    return selection.run(SCALE_RELU, None, input, scale)


# --- what it gets ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("either")


@pytest.fixture
def tensors():
    kernels.calls.clear()
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 4), (4,))]


def test_the_choice_and_its_reasons(tensors, either, caplog):
    scale_relu(*tensors).sum().backward()
    assert kernels.calls == (["forward", "backward"] if either == "kernels" else [])
    choice = selection.choose(SCALE_RELU, None, tensors)
    assert choice.implementation == ("cpu" if either == "kernels" else "aten")
    with caplog.at_level(logging.DEBUG, logger="fastlenet"):
        output = scale_relu(tensors[0].reshape(3, 2, 2), tensors[1].reshape(2, 2))
    assert "scale_relu of (3, 2, 2) torch.float64 runs on ATen" in caplog.text
    assert output.shape == (3, 2, 2)
    with fastlenet.use_backend("cpu"), pytest.raises((RuntimeError, NotImplementedError), match="'cpu' is forced, but"):
        scale_relu(tensors[0].reshape(3, 1, 4), tensors[1].reshape(1, 4))


def test_derivatives_of_any_order_and_transforms(tensors):
    assert torch.autograd.gradcheck(scale_relu, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scale_relu, tensors)
    rows, scale = (tensor.detach() for tensor in tensors)
    slopes = vmap(grad(lambda row, scale: scale_relu(row[None], scale).sum(), 1), (0, None))(rows, scale)
    torch.testing.assert_close(slopes, (rows * scale > 0) * rows)


def test_compilers_see_one_operator(tensors):
    torch._dynamo.reset()
    compiled = torch.compile(scale_relu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), scale_relu(*tensors))
    input, scale = (tensor.detach() for tensor in tensors)
    torch.library.opcheck(operators.scale_relu.default, (input, scale))
    args = input, input.relu(), input, scale, [True, True]
    torch.library.opcheck(operators.scale_relu_backward.default, args)


def test_errors_and_saved_graphs(tensors, tmp_path):
    with pytest.raises(RuntimeError, match=r"expected scale of size \[4\], got \[3\]"):
        scale_relu(tensors[0], torch.randn(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="argument 'scale' must be Tensor, not int"):
        scale_relu(tensors[0], 2)
    torch.jit.trace(scale_relu, tuple(tensors)).save(str(tmp_path / "traced.pt"))
