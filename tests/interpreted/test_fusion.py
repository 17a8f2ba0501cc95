"""A stock model fused for Triton: it becomes one chain, and the numbers stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlenet
from fastlenet import functional


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "seen"])
def test_a_network_is_one_chain(kept, monkeypatch, device):
    """Where a result in between is used elsewhere, it ends one chain, and another begins."""

    class Net(fastlenet.StockLeNet):
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
    images = torch.randn(2, 1, 32, 32, device=device)
    with fastlenet.use_backend("triton"):
        fused = fastlenet.fuse(model)
        output = fused(images)
        assert called == ["chain"] * (2 if kept else 1)
        assert {site.operator for site in fastlenet.explain(fused).sites} == {"chain"}
        output.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = model(images)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for actual, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-3, atol=1e-4)
