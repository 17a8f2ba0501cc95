"""The kernels of three fused linear layers against stock PyTorch in float64, and LeNet with and without them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels import joint, runtime
from fastlenet.kernels import mlp as kernels
from harness.bounds import sanitized
from harness.cases import dtypes, wide_and_narrow
from harness.judge import assert_as_accurate, assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import double, far_apart, fp32_precision, run, saved_for_backward, upstream
from harness.strides import awkward, kinds_for

import fastlenet
from fastlenet.functional import mlp

NAMES = ("input", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3")


@dataclass(frozen=True)
class Case:
    """A call: rows, features, widths of the hidden layers, outputs."""

    name: str
    m: int
    k: int
    p: int
    q: int
    r: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        layers = ((self.p, self.k), (self.q, self.p), (self.r, self.q))
        shapes = {"input": (self.m, self.k)}
        for number, (rows, columns) in enumerate(layers, 1):
            shapes |= {f"weight{number}": (rows, columns), f"bias{number}": (rows,)}
        return shapes

    def random(self, dtype: torch.dtype, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Normally distributed numbers, weights scaled so that the layers neither grow nor fade."""
        return {
            name: (torch.randn(shape) / (shape[1] ** 0.5 if name[0] == "w" else 1)).to(device, dtype)
            for name, shape in self.shapes.items()
        }

    def exact(self, dtype: torch.dtype, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Few small integers, so that every order of every sum gives the same numbers in any of the dtypes."""
        return {
            name: ((torch.rand(shape) < 2.5 / max(1, shape[-1])) * torch.randint(-1, 2, shape)).to(device, dtype)
            if name[0] == "w"
            else exact_grid(shape, dtype, terms=1, device=device).round()
            for name, shape in self.shapes.items()
        }


LENET = Case("LeNet", 6, 400, 120, 84, 10)
SMALL = Case("small", 7, 19, 11, 13, 5)
CASES = [
    LENET,
    SMALL,
    Case("one of everything", 1, 1, 1, 1, 1),
    Case("one row", 1, 33, 17, 9, 3),
    Case("rows of four elements", 5, 8, 12, 4, 8),
    Case("no features", 3, 0, 5, 4, 2),
    Case("as wide as it gets", 9, 300, 128, 128, 128),
    Case("wide middle", 4, 6, 3, 100, 2),
    Case("one slice", 4, 20, 40, 30, 20),
]
SHIPPED = [
    Case("several tiles, partial everywhere", 70, 37, 35, 37, 18),
    Case("as wide as it gets, several tiles", 67, 68, 128, 128, 36),
    Case("LeNet, several parts", 560, 400, 120, 84, 10),
]


def cases(chosen=CASES):
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


def stock_mlp(input, weight1, bias1, weight2, bias2, weight3, bias3):
    """The composition that the fused operator replaces."""
    return F.linear(F.relu(F.linear(F.relu(F.linear(input, weight1, bias1)), weight2, bias2)), weight3, bias3)


def layers(tensors, masks=None, grad_output=None):
    """Compute forward, or forward and gradients, with relu's decisions given: linear but for the products."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    hidden = leaves["input"]
    for number in (1, 2):
        hidden = F.linear(hidden, leaves[f"weight{number}"], leaves[f"bias{number}"])
        hidden = hidden * masks[number - 1] if masks is not None else F.relu(hidden)
    output = F.linear(hidden, leaves["weight3"], leaves["bias3"])
    if grad_output is None:
        return output.detach(), {}
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output.dtype))
    return output.detach(), dict(zip(NAMES, grads, strict=True))


def absolutes(tensors):
    return {name: tensor.abs() for name, tensor in double(tensors).items()}


def judge(tensors, grad_output, result, masks, precision="ieee"):
    """Judge the output, and the gradients for the decisions that the fused forward took (see `harness.operators`)."""
    masks = [mask.to(torch.float64) for mask in masks]
    options = {"dtype": result.output.dtype, "precision": precision, "allow_zero": True, "allow_empty": True}
    found = [
        layers({n: t.to(dtype) for n, t in values.items()}, [m.to(dtype) for m in masks], grad.to(dtype))
        for values, dtype, grad in (
            (tensors, result.output.dtype, grad_output),
            (tensors, torch.float64, grad_output),
            (absolutes(tensors), torch.float64, grad_output.abs()),
        )
    ]
    (stock, stocks), (reference, references), (magnitude, magnitudes) = found
    assert_as_accurate(result.output, stock, reference, magnitude=magnitude, name="output", **options)
    for name, grad in result.grads.items():
        if grad is not None:
            wanted = stocks[name], references[name]
            assert_as_accurate(grad, *wanted, magnitude=magnitudes[name], name=f"gradient of {name}", **options)


def run_watched(watched, tensors, grad_kind="contiguous", wanted=None):
    """Run forward and backward; also tell where relu was on."""
    grad_output = upstream(stock_mlp(**tensors), grad_kind)
    with saved_for_backward() as saved:
        mlp(**{name: tensor.detach().requires_grad_() for name, tensor in tensors.items()})
    hidden1, hidden2 = saved[-2:]
    result = watched(mlp, tensors, {}, grad_output, wanted)
    return grad_output, result, (hidden1 > 0, hidden2 > 0)


@pytest.fixture
def launched(monkeypatch, unplanned):
    """Names and constants of the kernels launched."""
    log: list[tuple[str, dict[str, Any]]] = []
    launch = kernels.launch

    def logged(kernel, grid, *args, **constants):
        log.append((kernel.fn.__name__, constants))
        launch(kernel, grid, *args, **constants)

    for module in (kernels, joint, runtime):
        monkeypatch.setattr(module, "launch", logged)
    return log


# --- accuracy ------------------------------------------------------------------------------------------------------


@cases()
@dtypes
def test_grid_is_as_accurate_as_stock(case, dtype, watched, device):
    tensors = case.random(dtype, device)
    grad_output, result, masks = run_watched(watched, tensors)
    judge(tensors, grad_output, result, masks)


@cases()
@dtypes
def test_grid_equals_stock_where_arithmetic_is_exact(case, dtype, watched, device):
    tensors = case.exact(dtype, device)
    grad_output = torch.randint(-1, 2, (case.m, case.r)).to(device, dtype)
    result = watched(mlp, tensors, {}, grad_output)
    reference = run(stock_mlp, double(tensors), {}, grad_output.double())
    for (name, actual), (_, expected) in zip(result.tensors(), reference.tensors(), strict=True):
        assert_same_values(actual, expected.to(dtype), allow_empty=True, name=name)


@cases(SHIPPED)
@dtypes
def test_shipped_tiles(case, dtype, watched, device, shipped_tiles, launched):
    """The compiled configuration's own tiles: several, partial ones, and several parts of a sum."""
    tensors = case.random(dtype, device)
    grad_output, result, masks = run_watched(watched, tensors)
    judge(tensors, grad_output, result, masks)
    assert {c["BLOCK_M"] for _, c in launched if "BLOCK_M" in c} == {64}


def test_tf32_is_as_accurate_as_stock_in_tf32(watched, device, launched, shipped_tiles):
    """The precision switch reaches every kernel (the interpreter itself knows no tf32)."""
    with fp32_precision("tf32"):
        tensors = SMALL.random(torch.float32, device)
        grad_output, result, masks = run_watched(watched, tensors)
        judge(tensors, grad_output, result, masks, "tf32")
    assert {c["PRECISION"] for _, c in launched if "PRECISION" in c} == {"tf32"}


@pytest.mark.parametrize("kind", kinds_for(torch.empty(2, 2)))
@pytest.mark.parametrize("name", [*NAMES, "grad"])
def test_awkward_layouts(name, kind, watched, device):
    """One tensor at a time in each layout; `scalar` is the gradient that ``.sum()`` sends, of strides 0."""
    tensors = SMALL.random(torch.float32, device)
    if name != "grad" and kind in kinds_for(tensors[name]):
        tensors[name] = awkward(tensors[name], kind)
    grad_output, result, masks = run_watched(watched, tensors, kind if name == "grad" else "contiguous")
    judge(tensors, grad_output, result, masks)


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(leading, watched, device):
    tensors = replace(SMALL, m=1).exact(torch.float32, device)
    tensors["input"] = torch.randint(-1, 2, (*leading, SMALL.k)).to(device, torch.float32)
    expected, result = run(stock_mlp, tensors, {}), watched(mlp, tensors, {})
    for (name, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, allow_empty=True, name=name)


# --- special values ------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "grad"])
def test_nan_and_infinities_travel_as_in_stock(name, value, dtype, watched, device, shipped_tiles):
    """Also where widths are padded to a tile: a zero of the padding must not meet an infinity."""
    tensors = SMALL.exact(dtype, device)
    grad_output = torch.randint(-1, 2, (SMALL.m, SMALL.r)).to(device, dtype)
    (grad_output if name == "grad" else tensors[name]).view(-1)[3] = value
    result = watched(mlp, tensors, {}, grad_output)
    expected = run(stock_mlp, tensors, {}, grad_output)
    for (label, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=label)


# --- what is computed, and what is not -----------------------------------------------------------------------------

FORWARD = "_exact_forward_kernel"
BACKWARD = ["_exact_grad_hidden_kernel", "_grad_weights_kernel", "_sum_partials_kernel"]


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 7) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_only_requested_gradients(wanted, launched, watched, device):
    """What was asked for does not depend on the rest, and takes at most three launches."""
    tensors = SMALL.random(torch.float32, device)
    grad_output = upstream(stock_mlp(**tensors))
    complete = run(mlp, tensors, {}, grad_output)
    launched.clear()
    result = watched(mlp, tensors, {}, grad_output, wanted)
    expected = BACKWARD if wanted != ("input",) else BACKWARD[:1]
    assert [name for name, _ in launched] == [FORWARD, *expected]
    for name in NAMES:
        if name in wanted:
            assert_bitwise_equal(result.grads[name], complete.grads[name])
        else:
            assert result.grads[name] is None


@pytest.mark.parametrize(("dtype", "made"), [(torch.float16, 1), (torch.float32, 2)])
def test_without_gradients_nothing_but_the_output_is_made(dtype, made, launched, device):
    """In exact float32 also the first hidden layer, which goes through memory."""
    tensors = SMALL.random(dtype, device)
    with sanitized() as (poison, _):
        output = mlp(**tensors)
        poison.assert_all_written()
        assert len(poison.tensors) == made
    assert [name for name, _ in launched] == [FORWARD if dtype == torch.float32 else "_forward_kernel"]
    assert_bitwise_equal(output, run(mlp, tensors, {}).output)


def test_saves_the_hidden_layers_once(device):
    tensors = {name: tensor.requires_grad_() for name, tensor in LENET.random(torch.float32, device).items()}
    with saved_for_backward() as saved:
        mlp(**tensors)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    shapes = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in given]
    assert sorted(shapes) == [(LENET.m, LENET.q), (LENET.m, LENET.p)]


# --- reproducibility -----------------------------------------------------------------------------------------------


@pytest.mark.wide
@wide_and_narrow
def test_bitwise_reproducible_from_run_to_run(dtype, device, shipped_tiles):
    tensors = SHIPPED[2].random(dtype, device)
    grad_output = upstream(stock_mlp(**tensors))
    first, second = (run(mlp, tensors, {}, grad_output) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@pytest.mark.wide
def test_several_parts_do_occur(device, shipped_tiles, monkeypatch, unplanned):
    """Guards the test above: its shape must give both two-stage sums more than one part."""
    empty, parts = kernels.empty, []

    def noted(shape, like, *dtype):
        if dtype == (torch.float32,):
            parts.append(shape[0])
        return empty(shape, like, *dtype)

    monkeypatch.setattr(kernels, "empty", noted)
    run(mlp, SHIPPED[2].random(torch.float16, device), {})
    assert len(parts) == 2
    assert min(parts) > 1


@dtypes
def test_a_row_does_not_depend_on_its_batch(dtype, device, shipped_tiles, sums_in_order):
    tensors = Case("batch", 70, 50, 20, 40, 6).random(dtype, device)
    rows = tensors.pop("input")
    whole = mlp(rows, **tensors)
    for batch, first in ((1, 0), (1, 69), (2, 62), (7, 5)):
        assert_bitwise_equal(mlp(rows[first : first + batch], **tensors), whole[first : first + batch])


@pytest.mark.parametrize(("forward", "backward"), [("triton", "aten"), ("aten", "triton")])
def test_one_implementation_may_follow_the_other(forward, backward, device):
    tensors = SMALL.exact(torch.float32, device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with fastlenet.use_backend(forward):
        output = mlp(**leaves)
    grad_output = torch.randint_like(output, -1, 2)
    with fastlenet.use_backend(backward):
        output.backward(grad_output)
    expected = run(stock_mlp, tensors, {}, grad_output)
    for name, leaf in leaves.items():
        assert_same_values(leaf.grad, expected.grads[name], name=name)


@pytest.mark.parametrize("name", ["input", "grad"])
def test_addresses_beyond_two_to_the_31(name, watched, device):
    """Memory is reserved, not touched."""
    tensors = SMALL.exact(torch.float16, device)
    grad_output = torch.randint(-1, 2, (SMALL.m, SMALL.r)).to(device, torch.float16)
    expected = run(stock_mlp, tensors, {}, grad_output)
    if name == "grad":
        grad_output = far_apart(grad_output)
    else:
        tensors[name] = far_apart(tensors[name])
    result = watched(mlp, tensors, {}, grad_output)
    for (label, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=label)


def test_wider_layers_run_one_by_one(device):
    tensors = Case("too wide", 2, 3, 4, 5, 129).exact(torch.float32, device)
    assert_same_values(mlp(**tensors), stock_mlp(**tensors))
    with fastlenet.use_backend("aten"):
        assert_same_values(mlp(**tensors), stock_mlp(**tensors))


# --- in LeNet ------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(device):
    return fastlenet.LeNet().to(device)


def step(network, images):
    """Output and gradients of one pass."""
    network.zero_grad()
    output = network(images)
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.wide
def test_lenet_takes_one_kernel_for_its_head(network, launched, device):
    images = torch.randn(3, 1, 32, 32, device=device)
    fused = step(network, images)
    # Convolutions add up their partial sums by the same kernel.
    assert [name for name, _ in launched if name != BACKWARD[-1]] == [FORWARD, *BACKWARD[:-1]]
    launched.clear()
    handle = network.fc2.register_forward_hook(lambda *_: None)
    layered = step(network, images)
    handle.remove()
    assert all(name == BACKWARD[-1] for name, _ in launched)
    launched.clear()
    torch.testing.assert_close(fused, layered)
    with torch.no_grad():
        network(images[0])
    assert [name for name, _ in launched] == [FORWARD]


@pytest.mark.parametrize("child", ["fc1", "fc2", "fc3"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_on_the_linear_layers_fire(child, register, network, device):
    seen = []
    getattr(getattr(network, child), register)(lambda *_: seen.append(child))
    step(network, torch.randn(2, 1, 32, 32, device=device))
    assert seen == [child]


def test_global_hooks_fire_for_every_layer(network, device):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        network(torch.randn(2, 1, 32, 32, device=device))
    finally:
        handle.remove()
    assert set(seen) == set(network.modules())


def test_changed_layers_are_respected(network, device, launched):
    """Parametrized, replaced, without bias, with a forward of its own, and with more classes than the kernels take."""
    images = torch.randn(2, 1, 32, 32, device=device)
    torch.nn.utils.parametrizations.spectral_norm(network.fc1)
    assert network(images).shape == (2, 10)
    for name, layer, width in (
        ("fc3", torch.nn.Identity(), 84),
        ("fc2", torch.nn.Linear(120, 84), 10),
        ("fc3", torch.nn.Linear(84, 10, bias=False), 10),
        ("fc3", torch.nn.Linear(84, 129), 129),
    ):
        other = fastlenet.LeNet()
        setattr(other, name, layer)
        assert other.to(device)(images).shape == (2, width)
    replaced = fastlenet.LeNet().to(device)
    replaced.fc3.forward = lambda hidden: hidden * 0
    assert not replaced(images).any()
    assert not launched


@pytest.mark.wide
def test_torch_func_maps_lenet(network, device):
    """Per-sample gradients and forward mode, as in a loop over the samples."""
    images = torch.randn(2, 1, 32, 32, device=device)
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(values, image):
        return torch.func.functional_call(network, values, (image[None],)).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i in range(2):
        single = step(network, images[i : i + 1])[1]
        torch.testing.assert_close([grads[i] for grads in mapped.values()], single)
    value, tangent = torch.func.jvp(network, (images,), (images,))
    assert value.shape == tangent.shape == (2, 10)


@pytest.mark.wide
def test_double_backward_through_the_head(device):
    """A gradient penalty: the fused backward gives way to a differentiable one.

    Biases have few elements, of which stock may hit one by luck; so several draws are judged together.
    """

    def penalty(function, tensors):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        (slope,) = torch.autograd.grad(function(**leaves).square().sum(), leaves["input"], create_graph=True)
        slope.square().sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    draws = [SMALL.random(torch.float32, device) for _ in range(8)]
    exact = [double(tensors) for tensors in draws]
    results = [[penalty(f, t) for t in some] for f, some in ((mlp, draws), (stock_mlp, draws), (stock_mlp, exact))]
    for number, name in enumerate(NAMES):
        actual, stock, reference = (torch.stack([grads[number] for grads in result]) for result in results)
        assert_as_accurate(actual, stock, reference, dtype=torch.float32, name=f"gradient of {name}")
