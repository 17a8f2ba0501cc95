"""Where a library is taken though a Triton kernel covers the call: the table's word, and the rule for the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels import configurations, dispatch
from fastlenet.kernels.geometry import ConvPoolGeometry

import fastlenet
from bench.rivals import precision_mode
from bench.work import OTHER_OPERATORS, ConvCase
from fastlenet import ops

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
        return dispatch.convolution(direction, input, weight, case.geometry) is not None
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


def test_the_rule_never_sees_the_number_of_images():
    weight = torch.empty(256, 128, 3, 3, device="meta")
    reasons = {
        dispatch.convolution("forward", torch.empty(n, 128, 16, 16, device="meta"), weight, PLAIN) for n in (1, 9)
    }
    assert len(reasons) == 1


def listed(monkeypatch, design: str, kernel: str, shape) -> None:
    entry = configurations.Configuration(design, {}, "measured on a test")
    table = {(kernel, "sm_90", mode, tuple(shape)): entry for mode in ("tf32", "ieee", "bfloat16")}
    monkeypatch.setattr(configurations, "table", lambda: table)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_table_overrides_the_rule(direction, monkeypatch):
    deep, shallow = CASES["VGG.256"], CASES["MNIST.conv1"]
    kernel = f"conv2d_relu_max_pool2d.{direction}"
    for case, design, expected in ((deep, "general", False), (shallow, "aten", True)):
        input, weight = torch.empty(1, *case.input_shape), torch.empty(case.parameter_shapes["weight"])
        listed(monkeypatch, design, kernel, case.geometry.key(input, weight))
        assert takes_library(case, direction, "tf32") is expected
    # An entry holds for its own geometry only.
    other = case.geometry._replace(padding=(1, 1))
    assert dispatch.convolution(direction, input, weight, other) is None


def test_a_kernel_listed_for_a_gradient_keeps_the_backward(monkeypatch):
    case = CASES["VGG.256"]
    key = case.geometry.key(torch.empty(1, *case.input_shape), torch.empty(case.parameter_shapes["weight"]))
    listed(monkeypatch, "patch_dot", "conv2d_relu_max_pool2d.grad_weight", key)
    assert not takes_library(case, "backward", "tf32")
    assert takes_library(case, "forward", "tf32")


def test_linear_layers():
    def reason(depth, columns, dtype=torch.float32):
        return dispatch.product("forward", torch.empty(2, depth, dtype=dtype), torch.empty(columns, depth).t())

    # Measured: products of float32 go to the library whatever their depth; of 16 bits, shallow ones stay.
    assert None not in (reason(4096, 4096), reason(400, 120), reason(84, 10))
    assert reason(400, 120, torch.bfloat16) is not None
    assert reason(120, 84, torch.bfloat16) is None


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_head_multiplies_exact_numbers_by_the_library(precision):
    """Forward only: of the backward's products the kernels take less than cuBLAS does."""
    with precision_mode(precision):
        assert (dispatch.head("forward", torch.float32) is not None) == (precision == "ieee")
        assert dispatch.head("backward", torch.float32) is None
        assert dispatch.head("forward", torch.bfloat16) is None


class OnAGpu:
    """What `takes_stock` asks of a tensor."""

    is_cuda, shape, dtype = True, (2, 3), torch.float32


def test_stock_computes_what_goes_to_the_library_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(ops, "why_aten", lambda *_: None)
    with caplog.at_level("DEBUG", "fastlenet"):
        assert ops.takes_stock("addmm_relu", OnAGpu, lambda: "it is deep")
    assert "addmm_relu of (2, 3) torch.float32 runs on ATen: it is deep" in caplog.text
    assert not ops.takes_stock("addmm_relu", OnAGpu, lambda: None)
    for name in ("triton", "aten"):
        with fastlenet.use_backend(name):
            assert not ops.takes_stock("addmm_relu", OnAGpu, lambda: "it is deep")
    assert not ops.takes_stock("addmm_relu", torch.empty(2, 3), lambda: "it is deep")


def test_stocks_operators_keep_stocks_derivatives(monkeypatch):
    """To the bit, and without our Functions."""
    monkeypatch.setattr("fastlenet.autograd._takes_stock", lambda *_: True)
    monkeypatch.setattr("fastlenet.autograd.runs_plain", lambda tensor: False)
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    rows, matrix = torch.randn(5, 3), torch.randn(4, 3)
    pairs = [
        (
            lambda *t: fastlenet.functional.conv2d_relu_max_pool2d(*t, padding=1, pool_size=(2, 4)),
            lambda *t: F.max_pool2d(F.relu(F.conv2d(*t, padding=1)), (2, 4)),
            (images, weight, bias),
        ),
        (fastlenet.functional.linear_relu, lambda *t: F.relu(F.linear(*t)), (rows, matrix, bias)),
    ]
    for fused, stock, tensors in pairs:
        results = []
        for function in (fused, stock):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            output = function(*leaves)
            results.append((output, *torch.autograd.grad(output.sum(), leaves)))
            assert "Function" not in type(output.grad_fn).__name__
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_choosing_loads_no_triton():
    argmax = (
        "import sys, torch; from fastlenet.kernels import configurations, dispatch; "
        "configurations.architecture = lambda: 'sm_90'; "
        "print(dispatch.product('forward', torch.empty(2, 4096), torch.empty(4096, 4096)), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", argmax], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("the library is expected to be faster")
    assert done.stdout.endswith("False\n")


def test_a_forced_backend_is_not_asked(monkeypatch, caplog):
    """Auto follows the rule and the log says why; a forced one never does."""
    monkeypatch.setattr(ops, "why_aten", lambda *_: None)  # as on a GPU
    input, weight = torch.empty(2, 4096), torch.empty(4096, 4096).t()
    library = lambda: dispatch.product("forward", input, weight)  # noqa: E731
    with caplog.at_level("DEBUG", "fastlenet"), fastlenet.use_backend("auto"):
        assert ops._implementation("addmm_relu", input, library=library) is ops.aten
    assert "runs on ATen: the library is expected to be faster" in caplog.text
    with fastlenet.use_backend("triton"):
        assert ops._implementation("addmm_relu", input, library=library) is not ops.aten


def test_the_committed_table_can_be_read():
    for entry in json.loads(configurations._COMMITTED.read_text(encoding="utf-8")):
        assert entry["evidence"]
        assert entry["design"] in ("general", "patch_dot", "patch_fma", "column_fma", dispatch.LIBRARY)


def test_another_table_is_noticed(monkeypatch):
    """What follows from the table is remembered, until another one is in force; so tuning and tests see their own."""
    mat1, mat2 = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((7, 5), (5, 4)))
    assert dispatch.product("forward", mat1, mat2) is None
    listed(monkeypatch, dispatch.LIBRARY, "addmm_relu.forward", (5, 4))
    assert "measured on a test" in str(dispatch.product("forward", mat1, mat2))
    listed(monkeypatch, "general", "addmm_relu.forward", (5, 4))
    assert dispatch.product("forward", mat1, mat2) is None
