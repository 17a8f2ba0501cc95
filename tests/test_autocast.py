"""Autocast and gradient scaling: the casting rules of F.conv2d, F.linear and torch.addmm, and training in 16 bits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from harness.operators import stock_addmm_relu, stock_conv2d_relu_max_pool2d, stock_linear_relu

import fastlenet
from fastlenet import functional

WIDE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64
CALLS = {
    "conv": (functional.conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d, [(2, 3, 8, 8), (4, 3, 3, 3), (4,)]),
    "linear": (functional.linear_relu, stock_linear_relu, [(5, 6), (4, 6), (4,)]),
    "addmm": (functional.addmm_relu, stock_addmm_relu, [(4,), (5, 6), (6, 4)]),
}


def outcome(function, tensors):
    """The output's and the gradients' dtypes, or the kind of error."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    try:
        output = function(*tensors)
    except RuntimeError:
        return RuntimeError
    output.float().sum().backward()
    return output.dtype, [tensor.grad.dtype for tensor in tensors]


@pytest.mark.parametrize("region", [HALF, BRAIN])
@pytest.mark.parametrize("call", CALLS)
def test_casting_rules_are_stocks(call, region):
    """For every mix of input, weight and bias types: what is cast, what is left alone, and what is refused."""
    ours, stock, shapes = CALLS[call]
    seen = set()
    for dtypes in itertools.product((WIDE, HALF, BRAIN, DOUBLE), repeat=3):
        tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        with torch.autocast("cpu", region):
            wanted = outcome(stock, tensors)
            assert outcome(ours, tensors) == wanted, dtypes
        seen.add(wanted if wanted is RuntimeError else wanted[0])
    assert seen == {region, DOUBLE, RuntimeError}


def test_nested_and_disabled_regions(monkeypatch):
    """The innermost region decides, from the outside in and back, as it does for stock."""

    def observe(network):
        seen = []

        def note():
            output = network(torch.ones(1, 1, 32, 32))
            seen.append((output.dtype, outcome(network.fc1, [torch.ones(2, 400)])))

        with torch.autocast("cpu", BRAIN):
            note()
            with torch.autocast("cpu", HALF, cache_enabled=False):
                note()
                with torch.autocast("cpu", enabled=False):
                    note()
                    with torch.autocast("cpu", BRAIN):
                        note()
                note()
            note()
        note()
        return seen

    seen = observe(fastlenet.LeNet())
    assert seen == observe(fastlenet.StockLeNet())
    assert [dtype for dtype, _ in seen] == [BRAIN, HALF, WIDE, BRAIN, HALF, BRAIN, WIDE]


def test_a_decorated_forward_casts():
    """`torch.autocast` as a decorator, and a layer in the middle of one of stock's."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), fastlenet.ConvReLUMaxPool2d(2, 3, 3), torch.nn.Flatten())
    assert torch.autocast("cpu", BRAIN)(model.forward)(torch.randn(2, 1, 12, 12)).dtype == BRAIN


def scaled_steps(network, scaler, count):
    """Steps under fp16 autocast: for each its loss, gradients' norm, the scale after it, and whether it was taken."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    records = []
    for _ in range(count):
        images, labels = torch.randn(16, 1, 32, 32, generator=generator), torch.arange(16) % 10
        before = network.fc3.bias.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", HALF):
            loss = F.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        records.append((loss.detach(), norm, scaler.get_scale(), not torch.equal(network.fc3.bias.detach(), before)))
    return records


def test_gradient_scaling():
    """From a scale at which gradients overflow: steps are skipped until it fits, exactly when they are with stock."""
    torch.manual_seed(6)
    fused, stock = fastlenet.LeNet(), fastlenet.StockLeNet()
    stock.load_state_dict(fused.state_dict())
    exact = copy.deepcopy(stock).double()
    ours, theirs = (
        scaled_steps(network, torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3), 12)
        for network in (fused, stock)
    )
    assert [(scale, taken) for *_, scale, taken in ours] == [(scale, taken) for *_, scale, taken in theirs]
    taken = [taken for *_, taken in ours]
    assert not taken[0], "the scale was too large"
    assert taken[-1]
    assert any(later > earlier for (*_, earlier, _), (*_, later, _) in itertools.pairwise(ours)), "and it grew again"
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {WIDE}
    # The first step that is taken: its loss and gradient norm, against float64.
    first = taken.index(True)
    images = torch.Generator().manual_seed(5)
    batch = [torch.randn(16, 1, 32, 32, generator=images) for _ in range(first + 1)][-1].double()
    loss = F.cross_entropy(exact(batch), torch.arange(16) % 10)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in exact.parameters()])
    for mine, wanted, reference in zip(ours[first][:2], theirs[first][:2], (loss.detach(), norm), strict=True):
        rounding = 2.0**-10 * reference.abs()
        assert (mine - reference).abs() <= 2 * (wanted - reference).abs() + rounding
