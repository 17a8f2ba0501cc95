"""Weight gradients of several layers in one launch: the same numbers as launched one by one."""

from __future__ import annotations

import pytest
import torch
from fastlenet.kernels import configurations, joint
from fastlenet.kernels import conv2d_relu_max_pool2d as conv
from fastlenet.kernels.conv2d_relu_max_pool2d import patch_fma
from harness.cases import conv_case
from harness.judge import assert_bitwise_equal
from harness.modes import interpreting
from harness.operators import CONV, fp32_precision

import fastlenet


@pytest.fixture
def shipped(monkeypatch, unplanned):
    """Take the kernels that ship for an H100, not those that suit the interpreter."""
    if interpreting():
        monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")


def gradients(network, images):
    for tensor in (images, *network.parameters()):
        tensor.grad = None
    network(images).square().sum().backward()
    return [images.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.wide  # a minute in the interpreter
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_chain_launches_its_weight_gradients_together(precision, shipped, launches, device, monkeypatch):
    network = fastlenet.LeNet(device=device)
    images = torch.randn(2, 1, 32, 32, device=device, requires_grad=True)
    with fp32_precision(precision), fastlenet.use_backend("triton"):
        together = gradients(network, images)
        names = [name for name, _ in launches]
        assert [name for name in names if "weight" in name or "joint" in name] == ["_joint_kernel"]
        assert names.count("_sum_partials_kernel") == 1
        launches.clear()
        monkeypatch.setattr(joint, "_groups", lambda jobs: [([job], job.warps[-1]) for job in jobs])
        apart = gradients(network, images)
        names = [name for name, _ in launches]
        assert [name for name in names if "weight" in name or "joint" in name] == [
            "_grad_weight_kernel",
            "_grad_weight_kernel",
            "_grad_weights_kernel",
        ]
    for actual, expected in zip(together, apart, strict=True):
        assert_bitwise_equal(actual, expected)


def test_kernels_that_disagree_in_warps_go_apart():
    def job(*warps):
        return joint.Job(None, warps, (), None, None)

    first, second, third = job(4, 8), job(8), job(1, 2, 4, 8)
    assert joint._groups([first, second, third]) == [([first, second, third], 8)]
    assert joint._groups([second, job(4), third]) == [([second, third], 8), ([job(4)], 4)]
    assert [len(members) for members, _ in joint._groups([third] * 7)] == [3, 3, 1]
    assert joint._groups([third])[0][1] == 1


@pytest.mark.parametrize("warps", [8, 4, 1])
def test_how_many_warps_share_a_program_changes_nothing(warps, device, monkeypatch, unplanned):
    """On whole numbers, which every order of addition sums exactly: stock's gradient, in parts of 32 lanes."""
    case = conv_case("small", (40, 2, 8, 10), (3, 2, 3, 3))
    tensors = {name: tensor.round() for name, tensor in case.random(torch.float32, device=device).items()}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    expected = CONV.stock(**tensors, **case.keywords)
    grad = torch.randint(-3, 4, expected.shape, device=device).float()
    expected.backward(grad)
    input, weight, bias = (tensor.detach() for tensor in tensors.values())
    _, argmax = conv.conv2d_relu_max_pool2d(input, weight, bias, case.geometry, True)
    if interpreting():
        monkeypatch.setattr(patch_fma, "INTERPRETED", False)  # the lanes of a warp, instead of a thousand
    monkeypatch.setattr(joint, "_groups", lambda jobs: [(jobs, warps)])
    later = joint.Later()
    options = {"CHANNELS": 2, "INPUTS": 2}
    found = patch_fma.grad_weight(grad, input, weight, argmax, case.geometry, False, options, later)
    later.finish()
    for actual, name in zip(found, ("weight", "bias"), strict=True):
        assert_bitwise_equal(actual, tensors[name].grad)
