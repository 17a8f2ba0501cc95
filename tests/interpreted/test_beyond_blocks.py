"""Sizes beyond every block that a kernel takes at a time: more rows, columns, depth and partial sums than one holds.

A kernel whose loop stops after its first block, or whose mask forgets the last, is right for every smaller size. All
numbers are small integers, so that any order of summation gives the same.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.runtime import empty, sum_partials
from harness import modes
from harness.judge import assert_same_values
from harness.operators import stock_addmm_relu, stock_conv2d_relu_max_pool2d

from fastlenet import functional

LARGEST = 1024 if modes.interpreting() else 128
"""The widest block of rows; of columns and depth it is a quarter."""


def integers(*shape, device="cpu"):
    return torch.randint(-1, 2, shape, device=device).float()


def assert_equal(ours, stock, *tensors):
    """Compare outputs and all gradients with float64's."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, expected = ours(*leaves), stock(*exact)
    upstream = integers(*output.shape, device=output.device)
    grads = torch.autograd.grad(output, leaves, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for actual, reference in zip((output, *grads), (expected, *wanted), strict=True):
        assert reference.abs().max() < 2**24, "float32 holds these exactly"
        assert_same_values(actual.detach(), reference.detach().float(), allow_empty=False)


@pytest.mark.parametrize("parts", [1, 2, 127, 128, 129, 256, 300, 513])
@pytest.mark.parametrize("size", [1, 33, 4097])
def test_sums_of_partial_sums(parts, size, device):
    """Once only the first 128 were tested."""
    rows = torch.randint(-100, 101, (parts, size), device=device).float()
    total = empty((size,), rows)
    sum_partials((rows, (total,), 2.0))
    assert_same_values(total, 2 * rows.sum(0))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_sums_of_many_matrices(count, device, launches):
    """Four matrices a launch, each with up to four outputs, whose sizes, parts, factors and alignment differ."""
    shapes = [((8, 12, 4), 3), ((5, 1), 200), ((4096, 3, 2, 7), 1), ((6,), 33), ((16, 8, 4, 4), 129)]
    sums, expected = [], []
    for number, (sizes, parts) in enumerate((shapes * 2)[:count]):
        rows = torch.randint(-100, 101, (parts, sum(sizes)), device=device).float()
        outputs = [empty((size,), rows) for size in sizes]
        sums.append((rows, outputs, number + 1.0))
        expected += (rows.sum(0) * (number + 1.0)).split(sizes)
    sum_partials(*sums)
    assert len(launches) == -(-count // 4)
    for actual, wanted in zip((output for _, outputs, _ in sums for output in outputs), expected, strict=True):
        assert_same_values(actual, wanted)


def test_sums_of_several_types(device, launches):
    """Outputs of one launch are of one type."""
    rows = torch.randint(-100, 101, (5, 8), device=device).float()
    outputs = [empty((8,), rows, dtype) for dtype in (torch.float32, torch.float16, torch.float32)]
    sum_partials(*((rows, (output,), 1.0) for output in outputs))
    assert len(launches) == 2
    for output in outputs:
        assert_same_values(output.float(), rows.sum(0))


def test_sums_that_wait_are_launched_by_the_caller(device, launches):
    later = []
    rows = torch.ones(3, 4, device=device)
    output = torch.full((4,), 7.0, device=device)
    sum_partials((rows, (output,), 1.0), later=later)
    assert not launches
    sum_partials(*later)
    assert len(launches) == 1
    assert_same_values(output, rows.sum(0))


@pytest.mark.parametrize(
    "size", [(2 * LARGEST + 300, 5, 7), (40, 600, 7), (40, 5, 530)], ids=["rows", "depth", "columns"]
)
def test_products(size, device):
    m, k, n = size
    tensors = integers(n, device=device), integers(m, k, device=device), integers(k, n, device=device)
    assert_equal(functional.addmm_relu, stock_addmm_relu, *tensors)


@pytest.mark.wide
def test_a_product_with_many_partial_sums(device):
    """Rows of a gradient's sum beyond what 128 programs take."""
    rows = 520 * (LARGEST // 4)
    tensors = integers(2, device=device), integers(rows, 3, device=device), integers(3, 2, device=device)
    assert_equal(functional.addmm_relu, stock_addmm_relu, *tensors)


@pytest.mark.parametrize(
    ("input", "weight"),
    [
        ((2, 40, 9, 8), (5, 40, 3, 3)),
        ((2, 2, 9, 8), (300, 2, 3, 3)),
        ((300, 1, 9, 8), (3, 1, 2, 2)),
        ((1, 1, 20, 19), (2, 1, 17, 16)),
    ],
    ids=["depth", "columns", "rows", "a large kernel"],
)
def test_convolutions(input, weight, device):
    tensors = integers(*input, device=device), integers(*weight, device=device), integers(weight[0], device=device)
    assert_equal(functional.conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d, *tensors)


@pytest.mark.skipif(modes.interpreting(), reason="minutes in the interpreter; sums of partial sums are tested above")
def test_a_convolution_with_many_partial_sums(device):
    tensors = [integers(*size, device=device) for size in ((700, 1, 17, 17), (2, 1, 2, 2), (2,))]
    assert_equal(functional.conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d, *tensors)


@pytest.mark.wide
def test_overlapping_windows_beyond_a_block(device):
    options = {"pool_size": (3, 5), "pool_stride": (2, 1), "pool_padding": (1, 2), "padding": 2}
    tensors = integers(2, 2, 20, 23, device=device), integers(70, 2, 3, 3, device=device), integers(70, device=device)
    assert_equal(
        lambda *t: functional.conv2d_relu_max_pool2d(*t, **options),
        lambda *t: stock_conv2d_relu_max_pool2d(*t, **options),
        *tensors,
    )


@pytest.mark.parametrize("rows", [1, 9 * LARGEST + 5], ids=["one row", "many partial sums"])
@pytest.mark.parametrize("widths", [(700, 120, 84, 10), (30, 128, 127, 128)], ids=str)
def test_the_head(rows, widths, device):
    input = integers(rows, widths[0], device=device)
    parameters = []
    for inner, outer in itertools.pairwise(widths):
        # Few terms a row, so that sums stay small.
        sparse = integers(outer, inner, device=device) * (torch.rand(outer, inner, device=device) < 0.04)
        parameters += [sparse, integers(outer, device=device)]

    def stock(input, *parameters):
        for index in (0, 2):
            input = F.relu(F.linear(input, *parameters[index : index + 2]))
        return F.linear(input, *parameters[4:])

    assert_equal(functional.mlp, stock, input, *parameters)
