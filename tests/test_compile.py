"""torch.compile: one graph, no recompilation beyond the first dynamic batch, stock's numbers, several modes."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.judge import assert_as_accurate
from networks import TutorialNet
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import fastlenet
from fastlenet import functional


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """Graphs that dynamo has handed to the compiler."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def networks():
    fused, stock = fastlenet.LeNet(), fastlenet.StockLeNet()
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def captured(network):
    """The fused operators in TorchDynamo's graph of a network, by name."""
    names = []

    def compiler(graph_module, example_inputs):
        names.extend(str(node.target) for node in graph_module.graph.nodes if "fastlenet" in str(node.target))
        return graph_module.forward

    torch.compile(network, backend=compiler, fullgraph=True)(torch.randn(3, 1, 32, 32))
    return names


def test_lenet_is_a_chain_unless_a_layer_was_changed(networks):
    """One operator runs faster than five, and a hook must see its layer."""
    if torch.compile(lambda: torch.compiler.is_exporting(), backend="eager")():
        pytest.skip("this PyTorch takes compiling for exporting, so that the layers run one by one (2.11)")
    fused, _ = networks
    with torch.no_grad():
        assert captured(fused) == ["fastlenet.chain"]
        fused.fc1.register_forward_hook(lambda *_: None)
        torch._dynamo.reset()
        assert captured(fused) == ["fastlenet.conv2d_relu_max_pool2d"] * 2 + ["fastlenet.addmm_relu"] * 2


def gradients(call, network, size):
    images, labels = torch.randn(size, 1, 32, 32), torch.arange(size) % 10
    network.zero_grad()
    loss = F.cross_entropy(call(images), labels)
    loss.backward()
    return images, labels, loss.detach(), [parameter.grad for parameter in network.parameters()]


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_changing_batch_is_compiled_for_twice(mode, networks):
    """Once for the first size and once for any; each once more without gradients."""
    fused, stock = networks
    compiled = torch.compile(fused, fullgraph=True, mode=mode)

    def check(size):
        torch.manual_seed(size)
        *_, ours, our_grads = gradients(compiled, fused, size)
        torch.manual_seed(size)
        images, _, theirs, their_grads = gradients(stock, stock, size)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_grads, their_grads)
        return images

    check(4)
    assert graphs() == 1
    check(5)
    assert graphs() == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (9, 17, 64):
            images = check(size)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), stock(images))
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(images[:33]), stock(images[:33]))
    assert graphs() == 3
    assert not counters["graph_break"]


def test_a_fused_model_trains_compiled():
    """torch.compile on a fused model: one graph for any batch after the first, gradients as in the stock model.

    PyTorch itself guards whether a batch has 16 images, so that all have here.
    """
    stock = TutorialNet()
    model = fastlenet.fuse(stock)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(size):
        found = []
        for network, call in ((model, compiled), (stock, stock)):
            torch.manual_seed(size)
            *_, loss, grads = gradients(call, network, size)
            found.append((loss, grads))
        torch.testing.assert_close(*found)

    check(24)
    check(25)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (19, 17, 64):
            check(size)
    assert graphs() == 2
    assert not counters["graph_break"]


class Normed(nn.Module):
    """A convolution with BatchNorm, whose gradient its forward may take itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Linear(6 * 14 * 14, 10)

    def maps(self, images):
        return F.max_pool2d(F.relu(self.norm(self.conv(images))), 2)

    def forward(self, images):
        return self.linear(self.maps(images).flatten(1))


class Penalized(Normed):
    def forward(self, images):
        images = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.max_pool2d(F.relu(self.conv(images)), 2).sum(), images)
        return super().forward(images) + slope.square().mean()


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "fastlenet", "fuse"])
@pytest.mark.parametrize("make", [fastlenet.LeNet, fastlenet.StockLeNet, Normed, Penalized])
def test_a_backward_inside_a_compiled_function(make, backend, size):
    """The autograd engine calls kernels then where TorchDynamo would capture their launchers: that crashed."""
    network = make()
    exact = copy.deepcopy(network).double()
    images, labels = torch.randn(size, 1, 32, 32), torch.arange(size) % 10
    model = fastlenet.fuse(network) if backend == "fuse" else network

    def step(network, images, labels):
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss.detach()

    compiled = torch.compile(step, backend="eager" if backend == "fuse" else backend)
    for _ in range(3):
        for each in (network, exact):
            each.zero_grad()
        loss = compiled(model, images, labels)
        torch.testing.assert_close(loss.double(), step(exact, images.double(), labels), rtol=1e-5, atol=1e-5)
        for parameter, wanted in zip(network.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5)


def layers():
    convolution = fastlenet.ConvReLUMaxPool2d(1, 3, 3, pool_size=3)
    return nn.Sequential(convolution, nn.Flatten(-3), fastlenet.LinearReLU(300, 4), nn.Linear(4, 3))


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [fastlenet.LeNet, layers])
def test_second_derivatives_under_the_backend(make, dtype, unbatched):
    """TorchDynamo's graph of a Function switches gradients off in the backward: a penalty on them was lost."""
    torch.manual_seed(0)
    network = make().to(dtype)
    images = torch.randn((1, 32, 32) if unbatched else (5, 1, 32, 32), dtype=dtype)

    def penalty(call):
        given = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(given).logsumexp(-1).sum(), given, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [given, *network.parameters()], allow_unused=True)

    actual, expected = penalty(torch.compile(network, backend="fastlenet")), penalty(network)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_chain_in_a_graph_runs_the_kernels(cpu_kernels):
    """A graph cannot keep what a CPU's kernels save, so its backward computes the forward again, by the kernels too."""
    stock = fastlenet.StockLeNet().double()
    model = copy.deepcopy(stock)
    compiled = torch.compile(lambda *args: chain_of(model)(*args), backend="aot_eager", fullgraph=True)
    images = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    results = []
    for network, call in ((stock, stock), (model, compiled)):
        leaf = images.clone().requires_grad_()
        output = call(leaf)
        output.sin().sum().backward()
        results.append([output, leaf.grad, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(results[1], results[0])
    assert cpu_kernels.calls == ["chain", "chain", "chain_backward"]


def chain_of(network):
    """LeNet's layers as one call."""
    plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
    links = plain, plain, "linear_relu", "linear_relu", "linear"
    return lambda images: functional.chain(images, list(network.parameters()), links)


def loss(network):
    return lambda parameters, images: functional_call(network, parameters, (images,)).square().sum()


def curvature(network):
    def second(parameters, images):
        name = list(parameters)[-1]
        return hessian(lambda bias: loss(network)({**parameters, name: bias}, images))(parameters[name])

    return second


TRANSFORMS = {
    "grad": lambda network: grad(loss(network)),
    "per sample": lambda network: vmap(grad(lambda p, image: loss(network)(p, image[None])), (None, 0)),
    "vmap": lambda network: vmap(lambda p, image: functional_call(network, p, (image[None],)), (None, 0)),
    "jvp": lambda network: lambda p, x: jvp(lambda y: functional_call(network, p, (y,)), (x,), (x.flip(0),)),
    "jacrev": lambda network: lambda p, x: jacrev(lambda y: functional_call(network, p, (y,)))(x[:1]),
    "jacfwd": lambda network: lambda p, x: jacfwd(lambda y: functional_call(network, p, (y,)))(x[:1]),
    "hessian": curvature,
    "penalty": lambda network: grad(lambda p, x: grad(loss(network), 1)(p, x).square().sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_inside_a_compiled_function(name):
    """Where nothing that the compiler sees requires a gradient, and yet one is asked for."""
    fused = nn.Sequential(fastlenet.ConvReLUMaxPool2d(1, 2, 3), nn.Flatten(), fastlenet.LinearReLU(32, 3)).double()
    stock = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3), nn.ReLU()
    ).double()
    stock.load_state_dict(dict(zip(stock.state_dict(), fused.state_dict().values(), strict=True)))
    images = torch.randn(3, 1, 10, 10, dtype=torch.float64)

    def transformed(network):
        parameters = {name: value.detach() for name, value in network.named_parameters()}
        return TRANSFORMS[name](network), parameters

    function, parameters = transformed(fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(parameters, images)
    function, parameters = transformed(stock)
    ours, theirs = tree_leaves(compiled), tree_leaves(function(parameters, images))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_torch_func_through_single_operators(bias):
    """A product without a bias, and three layers in one."""
    layer = fastlenet.LinearReLU(6, 4, bias=bias).double()
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (5,), (3, 5), (3,), (2, 3), (2,))]

    def function(rows):
        return fastlenet.functional.mlp(layer(rows), *weights).square().sum()

    def stock(rows):
        hidden = F.relu(F.linear(rows, layer.weight, layer.bias))
        for index in (0, 2):
            hidden = F.relu(F.linear(hidden, *weights[index : index + 2]))
        return F.linear(hidden, *weights[4:]).square().sum()

    rows = torch.randn(7, 6, dtype=torch.float64)
    compiled = torch.compile(grad(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows), grad(stock)(rows), rtol=1e-10, atol=1e-12)


class Foreign(nn.Module):
    """Somebody's network: a residual branch around one of our layers, and another kept out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.fused = fastlenet.ConvReLUMaxPool2d(4, 4, 3, padding=1, pool_size=3, pool_stride=2, pool_padding=1)
        self.hidden = fastlenet.LinearReLU(4 * 6 * 5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        stem = self.stem(input)
        features = self.fused(stem) + F.avg_pool2d(stem, 2)
        with torch.autocast("cpu", enabled=False):
            hidden = self.hidden(features.to(self.hidden.weight.dtype).flatten(1))
        return self.head(hidden)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float16, "aot_eager"), (torch.bfloat16, "inductor")], ids=["float16", "bfloat16"]
)
def test_our_layers_inside_somebody_elses_compiled_model_under_autocast(dtype, backend):
    """Compiled, the rounding of 16 bits falls elsewhere: what counts is to be as accurate as the model in eager."""
    model, images = Foreign(), torch.randn(6, 2, 12, 10)
    exact = copy.deepcopy(model).double()
    hidden_types = []
    model.hidden.register_forward_hook(lambda *args: hidden_types.append(args[2].dtype))

    def run(network, call, images):
        network.zero_grad()
        with torch.autocast("cpu", dtype):
            output = call(images)
        output.to(images.dtype).square().mean().backward()
        return output.detach(), *(parameter.grad for parameter in network.parameters())

    compiled, eager = (
        run(model, call, images) for call in (torch.compile(model, fullgraph=True, backend=backend), model)
    )
    assert graphs() == 1
    assert hidden_types == [torch.float32] * 2, "the disabled region is respected"
    assert [tensor.dtype for tensor in compiled] == [dtype, *[torch.float32] * (len(eager) - 1)]
    for ours, theirs, reference in zip(compiled, eager, run(exact, exact, images.double()), strict=True):
        assert_as_accurate(ours.to(dtype), theirs.to(dtype), reference, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver for Triton")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_without_a_driver_is_no_obstacle():
    """Operators that show their kernels to the compiler fail here; ours are opaque to it."""
    import triton

    with pytest.raises(RuntimeError, match="0 active drivers"):
        triton.runtime.driver.active.get_current_target()
    layer, images = fastlenet.ConvReLUMaxPool2d(1, 2, 3), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(images), layer(images))
