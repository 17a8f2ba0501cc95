"""A stock model fused for Triton: it becomes one chain, and the numbers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from harness.judge import assert_as_accurate
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
            return self.fc3(second) + (first.mean() if kept else 0)

    called = []

    def counting(name, function):
        def call(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("conv2d_relu_max_pool2d", "linear_relu", "chain"):
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))
    model = Net().to(device)
    images = torch.randn(5, 1, 14, 14, device=device)

    def step(net, images):
        net.zero_grad()
        output = net(images)
        output.square().sum().backward()
        return {"output": output.detach(), **{name: p.grad.clone() for name, p in net.named_parameters()}}

    with fastlenet.use_backend("triton"):
        fused = fastlenet.fuse(model)
        actual = step(fused, images)
        assert called == ["chain"] * (2 if kept else 1)
        assert {site.operator for site in fastlenet.explain(fused).sites} == {"chain"}
    expected, exact = step(model, images), step(copy.deepcopy(model).double(), images.double())
    for name, value in exact.items():
        assert_as_accurate(actual[name], expected[name], value, dtype=torch.float32, allow_zero=True, name=name)
