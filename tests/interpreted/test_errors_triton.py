"""What a forced Triton backend refuses, where it could run otherwise."""

from __future__ import annotations

import pytest
import torch

import fastlenet
from fastlenet import functional


def test_float64_is_not_covered(device):
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64, device=device)
    with pytest.raises(NotImplementedError, match=r"forced.*float32.*not torch.float64.*'auto'"):
        functional.conv2d_relu_max_pool2d(x, x[..., :3, :3])
    with pytest.raises(NotImplementedError, match=r"not torch.float64"):
        functional.linear_relu(x[0, 0], x[0, 0])


def test_windows_beyond_a_byte_are_not_covered(device):
    x, weight = torch.randn(1, 1, 16, 16, device=device), torch.ones(1, 1, 1, 1, device=device)
    with pytest.raises(NotImplementedError, match=r"255 cells, not 256"):
        functional.conv2d_relu_max_pool2d(x, weight, pool_size=16)
    with fastlenet.use_backend("auto"):
        output = functional.conv2d_relu_max_pool2d(x.requires_grad_(), weight, pool_size=16)
        output.backward()
    assert output.item() == x.max().relu().item()
    assert x.grad.sum() == 1
    assert x.grad.flatten()[x.argmax()] == 1
