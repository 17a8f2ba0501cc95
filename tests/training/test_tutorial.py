"""Every step of PyTorch's classic tutorial, with fused layers, against the stock network from the same state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.judge import assert_as_accurate

import fastlenet

ROOT = Path(__file__).resolve().parent.parent.parent
# Adam and RMSprop divide a gradient by its own size: by default they move a weight whose gradient is nothing but
# rounding as far as any other, in stock as well, so that an update would tell luck from luck. Their eps keeps it still.
OPTIMIZERS = {
    "manual": None,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.001, eps=1e-4),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001, eps=1e-4),
}


@pytest.fixture
def networks():
    """Fused, stock, and stock in float64, all in the same state."""
    fused, stock, exact = fastlenet.LeNet(), fastlenet.StockLeNet(), fastlenet.StockLeNet().double()
    stock.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    return fused, stock, exact


@pytest.fixture
def image():
    return torch.randn(1, 1, 32, 32)


def test_children_and_parameters():
    """The network prints the tutorial's layers and has its ten parameters."""
    network = fastlenet.LeNet()
    assert [name for name, _ in network.named_children()] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    text = repr(network)
    for line in ("(1, 6, kernel_size=(5, 5), stride=(1, 1)", "(6, 16, kernel_size=(5, 5), stride=(1, 1)"):
        assert line in text
    for line in (
        "in_features=400, out_features=120",
        "in_features=120, out_features=84",
        "in_features=84, out_features=10",
    ):
        assert line in text
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    expected = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    assert shapes == expected
    assert next(network.parameters()).size() == torch.Size([6, 1, 5, 5])


def test_output_of_one_image(networks, image):
    outputs = [network(image.to(next(network.parameters()).dtype)) for network in networks]
    assert outputs[0].shape == (1, 10)
    assert_as_accurate(*outputs, dtype=torch.float32)


def test_zeroed_then_random_gradient(networks, image):
    gradient = torch.randn(1, 10)
    for network in networks:
        dtype = next(network.parameters()).dtype
        network.zero_grad()
        network(image.to(dtype)).backward(gradient.to(dtype))
    assert_parameters_as_accurate(networks, lambda parameter: parameter.grad)


def test_unbatched_image_as_stock_handles_it(networks, image):
    outputs = [network(image[0].to(next(network.parameters()).dtype)) for network in networks]
    assert outputs[0].shape == outputs[1].shape == (10,)
    assert_as_accurate(*outputs, dtype=torch.float32)


def test_graph_leads_from_the_loss_through_the_fused_nodes(networks, image, cpu_kernels):
    loss = torch.nn.MSELoss()(networks[0](image), torch.randn(10).view(1, -1))
    names, nodes = [], [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [onward for onward, _ in node.next_functions if onward is not None]
    assert names[0] == "MseLossBackward0"
    assert names.count("ConvReLUMaxPool2d_ConvReLUMaxPool2d_LinearReLU_LinearReLU_LinearChainBackward") == 1
    assert names.count("AccumulateGrad") == 10


def test_bias_gradient_before_and_after_backward(networks, image):
    network = networks[0]
    network.zero_grad()
    assert network.conv1.bias.grad is None or not network.conv1.bias.grad.any()
    torch.nn.MSELoss()(network(image), torch.randn(1, 10)).backward()
    assert network.conv1.bias.grad.shape == (6,)
    assert network.conv1.bias.grad.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_equals_stock(name, networks, image):
    """Two steps, so that momentum and running averages matter."""
    target = torch.randn(1, 10)
    for network in networks:
        dtype = next(network.parameters()).dtype
        make = OPTIMIZERS[name]
        optimizer = None if make is None else make(network.parameters())
        for _ in range(2):
            network.zero_grad()
            torch.nn.MSELoss()(network(image.to(dtype)), target.to(dtype)).backward()
            if optimizer is not None:
                optimizer.step()
                continue
            for parameter in network.parameters():
                parameter.data.sub_(parameter.grad.data * 0.01)
    assert_parameters_as_accurate(networks, lambda parameter: parameter.detach())


@pytest.mark.wide
def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "tutorial.py")], capture_output=True, text=True, check=True
    )
    assert "MseLossBackward0" in done.stdout
    # By compiled kernels the whole network is one node, by stock's operators it is theirs.
    assert "LinearChainBackward" in done.stdout or "ThresholdBackward0" in done.stdout
    assert "RMSProp" in done.stdout


def assert_parameters_as_accurate(networks, read):
    """Judge what `read` gives for all parameters together: one near-zero bias has no scale of its own."""
    joined = [torch.cat([read(parameter).flatten() for parameter in network.parameters()]) for network in networks]
    assert_as_accurate(*joined, dtype=torch.float32)
