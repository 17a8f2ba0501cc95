"""The operators in ATen, by the judge and over the grid that the Triton kernels pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness.cases import (
    ADDMM_CASES,
    BIG_WINDOW,
    CONV_CASES,
    TOO_BIG_WINDOW,
    addmm_cases,
    conv_case,
    conv_cases,
    dtypes,
    wide_and_narrow,
)
from harness.draw import addmm_calls, conv_calls
from harness.fuzz import examples, given, settings
from harness.judge import assert_bitwise_equal, assert_same_values
from harness.operators import ADDMM, CONV, run, saved_for_backward
from harness.strides import awkward, kinds_for

import fastlenet
from fastlenet import aten

ALL_ELSE = conv_case(
    "groups, overlap and all else", (7, 4, 9, 8), (6, 2, 2, 3), groups=2, stride=(1, 2), padding=1,
    dilation=(2, 1), pool_size=3, pool_stride=(2, 1), pool_padding=1, ceil_mode=True,
)  # fmt: skip
PHASES = conv_case("one convolution per window cell", (7, 2, 11, 10), (3, 2, 5, 5), padding=(1, 2))


@pytest.fixture(autouse=True)
def _aten():
    with fastlenet.use_backend("aten"):
        yield


@pytest.fixture(params=["whole batch", "single images"])
def slices(request, monkeypatch):
    """With the batch in one slice, and cut into as many as there are images."""
    if request.param == "single images":
        monkeypatch.setattr(aten, "_SLICE_BYTES", 1)


# --- accuracy ------------------------------------------------------------------------------------------------------


@conv_cases()
@dtypes
def test_conv_grid_is_as_accurate_as_stock(case, dtype):
    CONV.random(case, case.random(dtype))


@conv_cases()
@wide_and_narrow
def test_conv_grid_equals_stock_where_arithmetic_is_exact(case, dtype, slices):
    CONV.exact(case, case.exact(dtype))


@addmm_cases()
@dtypes
def test_addmm_grid_is_as_accurate_as_stock(case, dtype):
    ADDMM.random(case, case.random(dtype))


@addmm_cases()
@wide_and_narrow
def test_addmm_grid_equals_stock_where_arithmetic_is_exact(case, dtype):
    ADDMM.exact(case, case.exact(dtype))


@settings(max_examples=examples(60))
@given(call=conv_calls())
def test_drawn_conv_calls(call):
    judge = CONV.exact if call.exact else CONV.random
    judge(
        call.case, call.tensors(), call.grad_kind(len(call.case.input)), **({} if call.exact else {"allow_zero": True})
    )


@settings(max_examples=examples(60))
@given(call=addmm_calls())
def test_drawn_addmm_calls(call):
    judge = ADDMM.exact if call.exact else ADDMM.random
    judge(call.case, call.tensors(), call.grad_kind(2), **({} if call.exact else {"allow_zero": True}))


@pytest.mark.parametrize("case", [BIG_WINDOW, TOO_BIG_WINDOW], ids=lambda case: case.name)
def test_windows_about_and_beyond_a_byte(case, slices):
    CONV.exact(case, case.exact(torch.float32))
    assert case.geometry.code_dtype == (torch.uint8 if case is BIG_WINDOW else torch.int32)


@pytest.mark.parametrize("name", ["input", "weight", "grad"])
@pytest.mark.parametrize("kind", kinds_for(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("case", [ALL_ELSE, PHASES], ids=lambda case: case.name)
def test_awkward_layouts(case, name, kind, slices):
    tensors = case.exact(torch.float32)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    CONV.exact(case, tensors, kind if name == "grad" else "contiguous")


def test_float64_runs_here_under_auto():
    with fastlenet.use_backend("auto"):
        CONV.exact(ALL_ELSE, ALL_ELSE.exact(torch.float64))
        ADDMM.exact(ADDMM_CASES[0], ADDMM_CASES[0].exact(torch.float64))


# --- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["input", "bias", "weight"])
@pytest.mark.parametrize("case", [ALL_ELSE, PHASES, CONV_CASES[0]], ids=lambda case: case.name)
def test_nan_and_infinities_travel_as_in_stock(case, name, value, slices):
    """Also where the formulation with one kernel per window cell would multiply an infinite input by zero."""
    tensors = case.exact(torch.float32)
    tensors[name].view(-1)[tensors[name].numel() // 2] = value
    stock = run(CONV.stock, tensors, case.keywords)
    assert_same_values(run(CONV.fused, tensors, case.keywords).output, stock.output)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_infinite_gradients_reach_only_what_their_cell_reaches(value):
    tensors = PHASES.exact(torch.float32)
    output = CONV.stock(**tensors, **PHASES.keywords)
    grad = torch.ones_like(output)
    grad.view(-1)[int(output.argmax())] = value
    CONV.equal(PHASES, tensors, grad)


@pytest.mark.parametrize("bias", [-1000.0, 0.0])
def test_no_gradient_where_every_cell_is_closed(bias, slices):
    tensors = PHASES.exact(torch.float32)
    tensors["bias"] = torch.full_like(tensors["bias"], bias)
    if bias == 0:
        tensors["weight"] = torch.zeros_like(tensors["weight"])
    for _, tensor in CONV.exact(PHASES, tensors).tensors():
        assert_same_values(tensor, torch.zeros_like(tensor))


# --- formulations --------------------------------------------------------------------------------------------------


def test_the_formulations_under_test_are_taken(monkeypatch):
    """Guards the tests above: PHASES takes the one with a kernel per window cell, ALL_ELSE does not."""
    weight = PHASES.exact(torch.float32)["weight"]
    assert aten._phases_pay(weight, PHASES.geometry)
    assert not aten._phases_pay(ALL_ELSE.exact(torch.float32)["weight"], ALL_ELSE.geometry)
    monkeypatch.setattr(aten, "_SLICE_BYTES", 1)
    assert len(list(aten._slices(PHASES.exact(torch.float32)["input"], weight, PHASES.geometry))) == 7


@pytest.mark.parametrize(
    "mask", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("case", [ALL_ELSE, PHASES], ids=lambda case: case.name)
def test_only_requested_gradients(case, mask, slices):
    tensors = case.exact(torch.float32)
    for tensor, needed in zip(tensors.values(), mask, strict=True):
        tensor.requires_grad_(needed)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    grads, expected = (
        torch.autograd.grad(function(**tensors, **case.keywords).sum(), leaves) for function in (CONV.fused, CONV.stock)
    )
    for grad, stock in zip(grads, expected, strict=True):
        assert_same_values(grad, stock)


def test_sums_over_slices_are_as_accurate_as_stock(slices):
    """In bfloat16 too, where a sum kept in the operand's type would lose digits with every slice."""
    case = conv_case("many images", (64, 3, 8, 8), (16, 3, 3, 3))
    for dtype in (torch.float32, torch.bfloat16):
        CONV.random(case, case.random(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_results_is_stock_s(layout):
    input = torch.randn(2, 3, 12, 12).to(memory_format=layout).requires_grad_()
    layer = fastlenet.ConvReLUMaxPool2d(3, 4, 3)
    output = layer(input)
    assert output.is_contiguous(memory_format=layout)
    output.sum().backward()
    assert input.grad.is_contiguous(memory_format=layout)


def test_bitwise_reproducible_from_run_to_run():
    tensors = ALL_ELSE.random(torch.float32)
    first, second = (run(CONV.fused, tensors, ALL_ELSE.keywords) for _ in range(2))
    for (_, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other)


# --- autograd's bookkeeping ----------------------------------------------------------------------------------------


def test_lenet_saves_at_most_12800_bytes_an_image():
    """Input, pooled outputs as the next layer's inputs, codes and hidden activations; nothing larger."""
    network, images = fastlenet.LeNet(), torch.randn(8, 1, 32, 32)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    with saved_for_backward() as saved:
        network(images)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    total = sum(size for pointer, size in storages.items() if pointer not in parameters)
    assert total / 8 == 12_792
    assert max(t.numel() for t in saved if t.data_ptr() not in parameters) < 8 * 6 * 28 * 28


def test_the_output_may_be_modified_and_what_is_saved_may_not():
    layer = fastlenet.ConvReLUMaxPool2d(1, 2, 3)
    input = torch.randn(2, 1, 8, 8).mul(1)
    layer(input).mul_(2).sum().backward()  # stock's max_pool2d does not save its output either
    output = layer(input)
    input.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    hidden = fastlenet.LinearReLU(4, 3)(torch.randn(2, 4))
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_version_counters_and_values_of_inputs_stay():
    tensors = ALL_ELSE.random(torch.float32)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = CONV.fused(**leaves, **ALL_ELSE.keywords)
    grad, version = torch.randn_like(output), output._version
    output.backward(grad)
    assert output._version == version
    assert grad._version == 0
    for name, tensor in tensors.items():
        assert tensor._version == 0
        assert_bitwise_equal(tensor.detach(), copies[name])


def test_threads_do_not_change_what_is_right():
    """One thread and several: the same judge."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            CONV.random(PHASES, PHASES.random(torch.float32))
    finally:
        torch.set_num_threads(threads)


def test_integers_compute_as_in_stock():
    input, weight = torch.randint(-5, 5, (1, 1, 6, 6)), torch.randint(-5, 5, (2, 1, 3, 3))
    expected = F.max_pool2d(F.relu(F.conv2d(input, weight)), 2)
    assert torch.equal(fastlenet.functional.conv2d_relu_max_pool2d(input, weight), expected)
