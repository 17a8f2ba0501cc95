"""Where a library is taken though a Triton kernel covers the call: the table's word, and the rule for the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from fastlenet.kernels import configurations
from fastlenet.kernels.geometry import ConvPoolGeometry

from bench.baselines import precision_mode
from bench.workloads import OTHER_OPERATORS, ConvCase
from fastlenet import library

pytestmark = pytest.mark.cheap

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
CASES = {case.name: case for case in OTHER_OPERATORS if isinstance(case, ConvCase)}
MODES = {"tf32": torch.float32, "ieee": torch.float32, "half": torch.bfloat16}


@pytest.fixture(autouse=True)
def _some_gpu(monkeypatch):
    monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")


def takes_library(case: ConvCase, direction: str, mode: str) -> bool:
    input = torch.empty(2, *case.input_shape, dtype=MODES[mode], device="meta")
    weight = torch.empty(case.parameter_shapes["weight"], dtype=MODES[mode], device="meta")
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if mode == "tf32" else "ieee"
    try:
        return library.convolution(direction, input, weight, case.geometry) is not None
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        # Shallow, or narrow: the kernels. Deep: the library, in tf32 only from 1024 (forward) or 768 products on.
        "MNIST.conv1": {},
        "kernel.1x1": {},
        "AlexNet.conv1": {"tf32", "ieee", "half"},
        "VGG.64": {"ieee", "half"},
        "VGG.256": {"tf32", "ieee", "half"},
    }.items(),
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_rule_at_benchmarked_shapes(name, expected, direction):
    assert {mode for mode in MODES if takes_library(CASES[name], direction, mode)} == set(expected)


def few_channels(**changed: int) -> ConvCase:
    return ConvCase("CIFAR's tutorial", **({"channels": 3, "size": 32, "out_channels": 6, "kernel": 5} | changed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_few_channels_on_fma_units_stay_there(direction, mode):
    """The rule of variants is asked first: 75 products of 3 channels are `patch_fma`'s, whose depth does not matter."""
    assert not takes_library(few_channels(), direction, mode)
    # A library's tiles are full from 64 output channels on.
    assert not takes_library(few_channels(out_channels=63), direction, mode)
    assert takes_library(few_channels(out_channels=64), direction, mode)
    # So with 16 to 31 channels, which FMA units compute too; from 32 on matrix units do.
    wider = {"size": 14, "kernel": 3, "out_channels": 64}
    assert [takes_library(few_channels(channels=n, **wider), direction, mode) for n in (7, 8, 16, 28)] == [False] + [
        True
    ] * 3
    assert not takes_library(few_channels(channels=28, **wider | {"out_channels": 63}), direction, mode)
    # What the rule leaves to the general kernels goes by its depth.
    assert takes_library(few_channels(kernel=12), direction, mode)


def test_few_channels_backward_where_the_weights_gradient_is_the_general_kernels(monkeypatch):
    monkeypatch.setattr(configurations, "architecture", lambda: "gfx942")
    assert not takes_library(few_channels(), "forward", "ieee")
    assert takes_library(few_channels(), "backward", "ieee")


def test_the_rule_never_sees_the_number_of_images():
    weight = torch.empty(256, 128, 3, 3, device="meta")
    reasons = {
        library.convolution("forward", torch.empty(n, 128, 16, 16, device="meta"), weight, PLAIN) for n in (1, 9)
    }
    assert len(reasons) == 1


def listed(monkeypatch, variant: str, kernel: str, shape) -> None:
    entry = configurations.Configuration(variant, {}, "measured on a test")
    table = {(kernel, "sm_90", mode, tuple(shape)): entry for mode in ("tf32", "ieee", "bfloat16")}
    monkeypatch.setattr(configurations, "table", lambda: table)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_table_overrides_the_rule(direction, monkeypatch):
    deep, shallow = CASES["VGG.256"], CASES["MNIST.conv1"]
    kernel = f"conv2d_relu_max_pool2d.{direction}"
    for case, variant, expected in ((deep, "general", False), (shallow, "aten", True)):
        input, weight = torch.empty(1, *case.input_shape), torch.empty(case.parameter_shapes["weight"])
        listed(monkeypatch, variant, kernel, case.geometry.key(input, weight))
        assert takes_library(case, direction, "tf32") is expected
    # An entry holds for its own geometry only.
    other = case.geometry._replace(padding=(1, 1))
    assert library.convolution(direction, input, weight, other) is None


def test_a_kernel_listed_for_a_gradient_keeps_the_backward(monkeypatch):
    case = CASES["VGG.256"]
    key = case.geometry.key(torch.empty(1, *case.input_shape), torch.empty(case.parameter_shapes["weight"]))
    listed(monkeypatch, "patch_dot", "conv2d_relu_max_pool2d.grad_weight", key)
    assert not takes_library(case, "backward", "tf32")
    assert takes_library(case, "forward", "tf32")


def test_linear_layers():
    def reason(depth, columns, dtype=torch.float32):
        return library.product("forward", torch.empty(2, depth, dtype=dtype), torch.empty(columns, depth).t())

    # Measured: products of float32 go to the library whatever their depth; of 16 bits, shallow ones stay.
    assert None not in (reason(4096, 4096), reason(400, 120), reason(84, 10))
    assert reason(400, 120, torch.bfloat16) is not None
    assert reason(120, 84, torch.bfloat16) is None


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_head_multiplies_exact_numbers_by_the_library(precision):
    def inside(dtype: torch.dtype) -> str | None:
        operands = [torch.empty(2, 400, dtype=dtype)]
        for rows, columns in ((120, 400), (84, 120), (10, 84)):
            operands += torch.empty(rows, columns, dtype=dtype), torch.empty(rows, dtype=dtype)
        return library.inside("chain", ("linear_relu", "linear_relu", "linear"), operands)

    with precision_mode(precision):
        assert (inside(torch.float32) is not None) == (precision == "ieee")
        assert inside(torch.bfloat16) is None


def test_choosing_loads_no_triton():
    code = (
        "import sys, torch; from fastlenet import library; from fastlenet.kernels import configurations; "
        "configurations.architecture = lambda: 'sm_90'; "
        "print(library.product('forward', torch.empty(2, 4096), torch.empty(4096, 4096)), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the library is expected to be faster")
    assert done.stdout.endswith("False\n")


def test_the_committed_table_can_be_read():
    for entry in json.loads(configurations._COMMITTED.read_text(encoding="utf-8")):
        assert entry["evidence"]
        assert entry["variant"] in ("general", "patch_dot", "patch_fma", "spread_dot", "column_fma", library.LIBRARY)


def test_forward_and_backward_never_part_ways():
    """Of tf32 convolutions of 768 to 1023 products only the backward is the library's by itself."""
    input, weight = torch.empty(2, 96, 16, 16, device="meta"), torch.empty(64, 96, 3, 3, device="meta")
    with precision_mode("tf32"):
        assert library.convolution("forward", input, weight, PLAIN) is None
        assert library.convolution("backward", input, weight, PLAIN) is not None
        assert library.why(library.CONV, PLAIN, (input, weight, None), differentiable=False) is None
        assert "768 products" in str(library.why(library.CONV, PLAIN, (input, weight, None), differentiable=True))


def test_a_chain_is_the_librarys_if_one_of_its_convolutions_is():
    input, first = torch.empty(2, 1, 32, 32, device="meta"), torch.empty(6, 1, 5, 5, device="meta")
    for features, expected in ((64, True), (16, False)):  # LeNet's own are listed
        operands = input, first, None, torch.empty(features, 6, 5, 5, device="meta"), None
        assert (library.why("chain", (PLAIN, PLAIN), operands, differentiable=True) is not None) is expected
