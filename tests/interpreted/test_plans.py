"""What a plan computes; `tests/compiled/test_plans.py` checks without a GPU what it launches."""

from __future__ import annotations

import pytest
import torch
from fastlenet.kernels import plans
from harness import modes
from harness.judge import assert_bitwise_equal
from harness.operators import fp32_precision

import fastlenet


@pytest.mark.skipif(modes.interpreting(), reason="launchers have no plans in the interpreter")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_plans_results_are_its_launchers(precision, device, monkeypatch):
    """A network's training step, on new images each time, after one that made the plans."""
    torch.manual_seed(0)
    model = fastlenet.LeNet().to(device)

    def step(images):
        images = images.clone().requires_grad_()
        output = model(images)
        return [output, *torch.autograd.grad(output.square().sum(), [images, *model.parameters()])]

    with fp32_precision(precision):
        step(torch.randn(3, 1, 32, 32).to(device))
        for _ in range(2):
            images = torch.randn(3, 1, 32, 32).to(device)
            planned = step(images)
            with monkeypatch.context() as patch:
                patch.setattr(plans, "ENABLED", False)
                launched = step(images)
            for number, (one, other) in enumerate(zip(planned, launched, strict=True)):
                assert_bitwise_equal(one, other, name=f"result {number}")
