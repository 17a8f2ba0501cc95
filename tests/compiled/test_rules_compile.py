"""What the rule of variants takes, compiled for every architecture: no spills, and few variants."""

from __future__ import annotations

import math

import pytest
import torch
from fastlenet.kernels import conv2d_relu_max_pool2d as conv
from harness.cases import conv_case
from harness.fake_driver import TARGETS, assert_shipped_without_spills, compiling_for

import fastlenet
from bench.static import launches

every_target = pytest.mark.parametrize("target", TARGETS)

pytestmark = pytest.mark.thorough

RULED = {
    "CIFAR's tutorial": conv_case("", (8192, 3, 32, 32), (6, 3, 5, 5)),
    "digits": conv_case("", (8192, 1, 28, 28), (32, 1, 3, 3)),
    "sixteen channels": conv_case("", (8192, 16, 14, 14), (32, 16, 3, 3)),
    "padded, overlapping windows": conv_case(
        "", (1024, 3, 32, 32), (32, 3, 5, 5), padding=2, pool_size=3, pool_stride=2
    ),
}


def run_ruled(case, dtype, images=None, kind=torch.contiguous_format):
    """A training step's kernels, with and without argmax."""
    shape = (images or case.input[0], *case.input[1:])
    input, weight = torch.empty(shape, dtype=dtype, memory_format=kind), torch.empty(case.weight, dtype=dtype)
    bias, geometry = torch.empty(case.weight[0], dtype=dtype), case.geometry
    output, argmax = conv.conv2d_relu_max_pool2d(input, weight, bias, geometry, True)
    conv.conv2d_relu_max_pool2d(input, weight, bias, geometry, False)
    conv.conv2d_relu_max_pool2d_backward(output, input, weight, argmax, geometry, (True, True, True))


@every_target
@pytest.mark.parametrize("case", RULED.values(), ids=RULED)
def test_what_the_rule_takes_spills_nothing(target, case):
    with compiling_for(target) as records:
        run_ruled(case, torch.float32)
        assert_shipped_without_spills(records)
        specialised = [record for record in records if record.module.endswith("patch_fma")]
        # Forward twice and both gradients, but for the weight's on gfx942; the rest sums parts.
        assert len(specialised) == (3 if target == "gfx942" else 4)
        others = {record.name for record in records if record not in specialised}
        assert others - {"_grad_weight_kernel" if target == "gfx942" else ""} == {"_sum_partials_kernel"}


def test_the_number_of_images_compiles_nothing_new():
    """Nor does their size: a training compiles four kernels of a layer and the sum, and two more for odd rows."""
    case = RULED["digits"]
    with compiling_for("sm_90") as records:
        counts = []
        for images in (8192, 5000, 8191):
            run_ruled(case, torch.float32, images)
            counts.append(len(records))
        assert counts == [5] * 3
        run_ruled(conv_case("", (8192, 1, 26, 30), case.weight), torch.float32)
        assert len(records) == 5
        run_ruled(conv_case("", (8192, 1, 27, 27), case.weight), torch.float32)
        assert len(records) == 9  # rows of odd length are loaded number by number


SLIDING = {
    "digits": conv_case("", (8192, 1, 28, 28), (32, 1, 3, 3), pool_size=3, pool_stride=2),
    "sixteen channels": conv_case("", (8192, 16, 16, 16), (32, 16, 3, 3), padding=1, pool_size=3, pool_stride=2),
}


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
@pytest.mark.parametrize("case", SLIDING.values(), ids=SLIDING)
def test_weight_gradients_under_overlapping_windows_spill_nothing(target, case):
    input, weight = torch.empty(case.input), torch.empty(case.weight)
    grad = torch.empty(case.geometry.output_shape(input, weight))
    argmax = torch.empty(grad.shape, dtype=torch.uint8)
    with compiling_for(target) as records:
        conv.conv2d_relu_max_pool2d_backward(grad, input, weight, argmax, case.geometry, (False, True, True))
        assert_shipped_without_spills(records)
        few_registers = target == "sm_100" and case.weight[1] > 1
        wanted = "_grad_weight_kernel" if few_registers else "_sliding_grad_weight_kernel"
        assert {record.name for record in records} == {wanted, "_sum_partials_kernel"}


MANY = {
    "overlapping windows": conv_case("", (8192, 32, 16, 16), (32, 32, 5, 5), padding=2, pool_size=3, pool_stride=2),
    "full tiles": conv_case("", (8192, 64, 8, 8), (64, 64, 3, 3), padding=1, pool_size=3, pool_stride=2),
    "windows of nine cells": conv_case("", (8192, 48, 12, 12), (40, 48, 3, 3), padding=1, pool_size=3),
    "stride": conv_case("", (8192, 64, 14, 14), (64, 64, 3, 3), stride=2, padding=1),
    "windows a cell apart": conv_case("", (8192, 32, 16, 16), (32, 32, 3, 3), padding=1, pool_size=3, pool_stride=1),
    "few output channels": conv_case("", (8192, 48, 40, 40), (10, 48, 5, 5)),
    "addresses of 64 bits": conv_case("", (700_000, 64, 8, 8), (64, 64, 3, 3), padding=1, pool_size=3, pool_stride=2),
}


@every_target
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_blocks_and_gradients_by_a_workspace_spill_nothing(target, precision, case):
    dtype = launches.PRECISIONS[precision]
    input, weight = torch.empty(case.input, dtype=dtype), torch.empty(case.weight, dtype=dtype)
    grad = torch.empty(case.geometry.output_shape(input, weight), dtype=dtype)
    argmax = torch.empty(grad.shape, dtype=torch.uint8)
    with launches.compiling_fastlenet(target, precision) as records:
        conv.conv2d_relu_max_pool2d(input, weight, torch.empty(case.weight[0], dtype=dtype), case.geometry, True)
        assert [record.name for record in records] == ["_pack_kernel", "_forward_kernel"]
        assert records[1].module.endswith("block_dot")
        conv.conv2d_relu_max_pool2d_backward(grad, input, weight, argmax, case.geometry, (True, True, True))
        assert_shipped_without_spills(records)
        names = {record.name for record in records if record.module.endswith("spread_dot")}
        overlaps, cells = case.geometry.pool_size > case.geometry.pool_stride, math.prod(case.geometry.pool_stride)
        blocks = target == "sm_90" or not (overlaps or cells > 4)
        workspace = overlaps and not blocks
        assert names == {"_spread_kernel", "_product_kernel"} | ({"_weight_product_kernel"} if workspace else set())
        found = {record.module.split(".")[-1] for record in records if record.name == "_grad_weight_kernel"}
        assert found == ({"block_dot"} if blocks else set() if workspace else {"general"})


@every_target
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_weight_gradients_side_by_side_spill_nothing(target, precision):
    """CIFAR's tutorial network, whose convolutions no table lists: not more registers together than each has alone."""
    with launches.compiling_fastlenet(target, precision) as records:
        logits = fastlenet.LeNet(in_channels=3)(torch.empty(8192, 3, 32, 32))
        logits.backward(torch.empty_like(logits))
        assert_shipped_without_spills(records)
        joint = [record for record in records if record.name == "_joint_kernel"]
        # The general kernels, which gfx942 takes for weight gradients, are launched one by one.
        assert len(joint) == (0 if target == "gfx942" else 1)
