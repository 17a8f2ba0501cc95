"""A stock model fused for Triton: it becomes one chain, and the numbers stay."""

from __future__ import annotations

import pytest
import torch
from harness.judge import assert_same_values
from torch import nn

import fastlenet
from fastlenet import functional


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "seen"])
def test_a_network_is_one_chain(kept, monkeypatch, device):
    """Where a result in between is used elsewhere, it ends one chain, and another begins."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 9), nn.Linear(9, 7), nn.Linear(7, 5)

        def forward(self, images):
            features = nn.functional.max_pool2d(self.conv1(images).relu(), 2)
            features = nn.functional.max_pool2d(self.conv2(features).relu(), 2)
            first = self.fc1(features.flatten(1)).relu()
            second = self.fc2(first).relu()
            return self.fc3(second) + (first.sum() if kept else 0)

    called = []

    def counting(name, function):
        def call(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("conv2d_relu_max_pool2d", "linear_relu", "chain"):
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))
    model = Net().to(device)
    # Small integers: every sum is exact, whatever its order is.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    images = torch.randint(-2, 3, (5, 1, 14, 14), device=device).float()

    def step(net, images):
        net.zero_grad()
        output = net(images)
        output.sum().backward()
        return {"output": output.detach(), **{name: p.grad.clone() for name, p in net.named_parameters()}}

    with fastlenet.use_backend("triton"):
        fused = fastlenet.fuse(model)
        actual = step(fused, images)
        assert called == ["chain"] * (2 if kept else 1)
        assert {site.operator for site in fastlenet.explain(fused).sites} == {"chain"}
    for name, value in step(model, images).items():
        assert (value != 0).any()
        assert_same_values(actual[name], value, name=name)
