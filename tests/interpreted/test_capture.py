"""What lets the operators be captured in a CUDA graph: between kernels, nothing asks what a tensor holds.

Each raw operator's implementation is run under a mode that sees every ATen call it makes, kernels launched as usual.
The test runs natively on a GPU too; there `tests/test_graphs.py` captures the real thing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlenet
from fastlenet import ops
from fastlenet.ops import registration

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NeverWaits(TorchDispatchMode):
    """Looks inside our operators, and refuses what a GPU would have to be waited for: values, other devices' copies."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == ops.NAMESPACE:
            self.ours.add(function._opname)
            with self:
                return registration.implementations[function._opname](*args)
        if WAITS & set(function.tags):
            raise AssertionError(f"{function} reads what a tensor holds")
        result = function(*args, **kwargs)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) <= 1, f"{function} goes from device to device"
        return result


@pytest.fixture(autouse=True)
def _never_synchronises(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the GPU is waited for")

    for module, name in ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.Tensor, "cpu")):
        monkeypatch.setattr(module, name, refuse)


def test_the_mode_sees_what_it_should():
    for wrong in (torch.Tensor.item, torch.nonzero, lambda t: t[t > 0], lambda t: torch.equal(t, t), bool):
        with pytest.raises(AssertionError, match="reads what a tensor holds"), NeverWaits():
            wrong(torch.ones(()))


@pytest.mark.wide
def test_no_operator_waits(device):
    """A training step and inference; and what LeNet does not use: overlapping windows, groups, an image's gradient."""
    model = fastlenet.LeNet().to(device)
    images, labels = torch.randn(2, 1, 32, 32).to(device), torch.arange(2).to(device)
    with NeverWaits() as mode:
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            model(images)
    layer = fastlenet.ConvReLUMaxPool2d(4, 6, 3, groups=2, pool_size=3, pool_stride=2, pool_padding=1).to(device)
    image = torch.randn(2, 4, 11, 10).to(device).requires_grad_()
    with mode:
        layer(image).sum().backward()
        fastlenet.functional.addmm_relu(image[0, 0, :, :1], image[0, 0], image[0, 1, :10, :10].t()).sum().backward()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{ops.NAMESPACE}::")}
    assert {f"{ops.NAMESPACE}::{name}" for name in mode.ours} == registered
