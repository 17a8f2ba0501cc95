"""A stock model fused for Triton: its three linear layers become one call, and the numbers stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlenet
from fastlenet import functional


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "seen"])
def test_three_linear_layers_are_one_call(kept, monkeypatch, device):
    """Unless a result between them is used elsewhere."""

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

    for name in ("conv2d_relu_max_pool2d", "linear_relu", "mlp"):
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))
    model = Net().to(device)
    images = torch.randn(2, 1, 32, 32, device=device)
    with fastlenet.use_backend("triton"):
        fused = fastlenet.fuse(model)
        output = fused(images)
        linear = ["linear_relu"] * 2 if kept else ["mlp"]
        assert called == ["conv2d_relu_max_pool2d"] * 2 + linear
        assert fastlenet.explain(fused).sites[-1].operator == linear[-1]
        output.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = model(images)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for actual, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-3, atol=1e-4)
