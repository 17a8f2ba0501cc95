"""Rows of sites that become one call: which, and that values and gradients stay those of the stock model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import CASES
from test_fuse import images_of, results
from torch import nn

import fastlenet


class Net(nn.Module):
    """Two convolutions and three linear layers around what a test puts between them."""

    def __init__(self, flatten=lambda maps: maps.flatten(1), between=lambda hidden: hidden):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, padding="same")
        self.norm = nn.BatchNorm2d(6)
        self.fc1, self.fc2, self.fc3 = nn.Linear(96, 20), nn.Linear(20, 18), nn.Linear(18, 5)
        self.drop = nn.Dropout()
        self.flatten, self.between = flatten, between
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, images):
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.norm(self.conv2(maps))), 2)
        hidden = self.between(F.relu(self.fc1(self.flatten(maps))))
        return self.fc3(self.drop(F.relu(self.fc2(hidden))))


def chained(model, graphs, images):
    """The links of every chain in the graphs that a call of the model compiles."""
    graphs.clear()
    model(images)
    return [code.count("fastlenet_functional_chain(") for code in graphs]


def check(model, images, calls, kernels):
    """Compare with stock, in float64, and see that the kernels of a chain ran forward and backward."""
    stock, images = copy.deepcopy(model).double(), images.double()
    fused = fastlenet.fuse(model.double(), inplace=True)
    kernels.calls.clear()
    actual = results(fused, images)
    assert [call for call in kernels.calls if call.startswith("chain")] == calls
    expected = results(stock, images)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


IMAGES = torch.randn(3, 1, 18, 18, generator=torch.Generator().manual_seed(2))
FLATTENS = {
    "flatten": lambda maps: maps.flatten(1),
    "view": lambda maps: maps.view(-1, 96),
    "reshape_by_size": lambda maps: maps.reshape(maps.size(0), -1),
    "function": lambda maps: torch.flatten(maps, 1),
}


@pytest.mark.parametrize("flatten", FLATTENS)
def test_a_network_is_one_chain(flatten, cpu_kernels):
    """BatchNorm and dropout in eval mode are no obstacles; gradients reach BatchNorm's parameters."""
    check(Net(FLATTENS[flatten]).eval(), IMAGES, ["chain", "chain_backward"], cpu_kernels)


@pytest.mark.parametrize("flatten", FLATTENS)
def test_an_open_batch_size_is_one_chain_too(flatten, cpu_kernels, graphs):
    model = Net(FLATTENS[flatten]).eval()
    expected = [model(IMAGES[:size]) for size in (3, 2)]
    fused = fastlenet.fuse(model)
    for size, wanted in zip((3, 2), expected, strict=True):
        assert chained(fused, graphs, IMAGES[:size]) == [1]
        torch.testing.assert_close(fused(IMAGES[:size]), wanted)


def test_other_models_with_other_sizes_leave_a_network_one_chain(cpu_kernels, graphs):
    """TorchDynamo takes a size for open that has varied before, in what it takes for the same function."""
    first = fastlenet.fuse(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(75, 4))
    )
    first(torch.ones(1, 2, 12, 12))
    assert chained(fastlenet.fuse(Net().eval()), graphs, IMAGES) == [1]


def test_the_tutorial_network_is_one_chain(cpu_kernels, graphs):
    fused = fastlenet.fuse(CASES["tutorial"]())
    assert chained(fused, graphs, images_of("tutorial")) == [1]
    name = type(fused(images_of("tutorial")).grad_fn).__name__
    assert name == "ConvReLUMaxPool2d_ConvReLUMaxPool2d_LinearReLU_LinearReLU_LinearChainBackward"
    [site] = fastlenet.explain(fused, images_of("tutorial")).sites
    assert (site.operator, site.implementation) == ("chain", "cpu")


APART = {
    "images_mixed": (lambda maps: maps.reshape(6, -1).repeat(1, 2), lambda hidden: hidden),
    "seen_between": (lambda maps: maps.flatten(1) + maps.mean(), lambda hidden: hidden),
    "another_activation": (lambda maps: maps.flatten(1), torch.tanh),
    "transposed": (lambda maps: maps.transpose(2, 3).flatten(1), lambda hidden: hidden),
}


@pytest.mark.parametrize("name", APART)
def test_what_stands_between_parts_a_chain(name, cpu_kernels):
    """What comes before it and what comes behind it are chains of their own."""
    check(Net(*APART[name]).eval(), IMAGES, ["chain"] * 2 + ["chain_backward"] * 2, cpu_kernels)


def test_training_batch_norm_and_dropout_part_a_chain(cpu_kernels):
    model = Net().double()
    fused = fastlenet.fuse(model)
    cpu_kernels.calls.clear()
    fused(IMAGES.double())
    # conv1 stands alone, conv2 has no fused form, dropout stands between fc2 and fc3.
    assert cpu_kernels.calls == ["conv2d_relu_max_pool2d", "chain"]


def test_a_hook_between_parts_a_chain(cpu_kernels, graphs):
    model, seen = Net().eval(), []
    expected = model(IMAGES)
    fused = fastlenet.fuse(model, inplace=True)
    assert chained(fused, graphs, IMAGES) == [1]
    model.fc2.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(fused(IMAGES), expected)
    assert [output.shape for output in seen] == [(3, 18)]


def test_the_compiled_kernels_run_a_chain(compiled):
    """In float32, as they are: enough images to fill their lanes."""
    torch.manual_seed(5)
    model = Net().eval()
    images = torch.randn(64, 1, 18, 18)
    fused = fastlenet.fuse(copy.deepcopy(model))
    [site] = fastlenet.explain(fused, images).sites
    assert (site.operator, site.implementation) == ("chain", "cpu")
    actual, expected = results(fused, images), results(model, images)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
