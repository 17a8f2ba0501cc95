"""torch.library.opcheck on every raw operator, over the designed grid, drawn calls, layouts and masks.

It checks that a schema tells the truth (nothing is modified, no output aliases an input), that the shape function gives
the very shapes, dtypes and strides of the real thing, and that torch.compile traces and runs the operator with dynamic
shapes. The last check takes longest and layouts and dtypes do not concern it: it runs once per case of the grid.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.cases import (
    ADDMM_CASES,
    BIG_WINDOW,
    CONV_CASES,
    DTYPES,
    SHIPPED_ADDMM,
    SHIPPED_CONV,
    TOO_BIG_WINDOW,
    addmm_cases,
    conv_cases,
)
from harness.draw import addmm_calls, conv_calls
from harness.fuzz import assume, examples, given, settings
from torch.library import opcheck

import fastlenet  # noqa: F401  (registers the operators)
from fastlenet.ops.chain import spec_of

OPERATORS = torch.ops.fastlenet
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
QUICK = ALL[:3]
MASKS = [list(mask) for mask in itertools.product((True, False), repeat=3)]


def check_conv(case, tensors, checks, masks=MASKS):
    """Both operators on the same tensors; the forward also without argmax, the backward for these masks."""
    input, weight, bias = tensors["input"], tensors["weight"], tensors["bias"]
    input = input if input.dim() == 4 else input[None]
    forward = OPERATORS.conv2d_relu_max_pool2d.default
    opcheck(forward, (input, weight, bias, *case.geometry, True), test_utils=checks)
    opcheck(forward, (input, weight, bias, *case.geometry, False), test_utils=QUICK)
    output, argmax = forward(input, weight, bias, *case.geometry, True)
    for mask in masks:
        args = (torch.ones_like(output), input, weight, argmax, *case.geometry, mask)
        opcheck(OPERATORS.conv2d_relu_max_pool2d_backward.default, args, test_utils=checks)


def check_addmm(case, tensors, checks, masks=MASKS):
    input, mat1, mat2 = tensors["input"], tensors["mat1"], tensors["mat2"]
    forward = OPERATORS.addmm_relu.default
    opcheck(forward, (input, mat1, mat2, case.beta, case.alpha), test_utils=checks)
    output = forward(input, mat1, mat2, case.beta, case.alpha)
    size = () if input is None else input.shape
    for mask in masks:
        if not (mask[0] and input is None):
            args = (torch.ones_like(output), output, mat1, mat2, size, case.beta, case.alpha, mask)
            opcheck(OPERATORS.addmm_relu_backward.default, args, test_utils=checks)


@conv_cases([*CONV_CASES, TOO_BIG_WINDOW, *SHIPPED_CONV])
def test_convolution(case, generator):
    check_conv(case, case.random(torch.float32, generator), ALL, masks=[[True] * 3])


@addmm_cases([*ADDMM_CASES, *SHIPPED_ADDMM])
def test_addmm(case, generator):
    check_addmm(case, case.random(torch.float32, generator), ALL, masks=[[case.addend is not None, True, True]])


LENET = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


@pytest.mark.parametrize("checks", [ALL, QUICK], ids=["all", "every mask"])
@pytest.mark.parametrize("links", [(LENET, LENET), (LENET, "linear_relu"), (LENET, "linear_relu", "linear")], ids=str)
def test_chain(links, checks):
    spec = spec_of(links)
    shapes = [(3, 2, 3, 3), (4, 3, 3, 3)] if links.count(LENET) == 2 else [(3, 2, 3, 3), (5, 108), (2, 5)]
    shapes = shapes[: len(links)]
    parameters = [torch.randn(size) for shape in shapes for size in (shape, shape[:1])]
    parameters[1] = None
    input = torch.randn(2, 2, 14, 14)
    for save in (True, False):
        opcheck(OPERATORS.chain.default, (input, parameters, spec, save), test_utils=checks)
    output, saved = OPERATORS.chain(input, parameters, spec, True)
    count = len(parameters) + 1
    masks = (
        [[True] * 2 + [False] + [True] * (count - 3)]
        if checks is ALL
        else itertools.product((True, False), repeat=count)
    )
    for mask in masks:
        if not mask[2]:
            args = (torch.ones_like(output), output, input, parameters, saved, spec, list(mask))
            opcheck(OPERATORS.chain_backward.default, args, test_utils=checks)


@settings(max_examples=examples(25))
@given(call=conv_calls())
def test_drawn_convolutions(call):
    """Every mask, layout and dtype: gradients once came out of ATen in another layout than promised."""
    assume(call.case.keywords["padding"] != "same")  # resolved before the raw operators see it
    check_conv(call.case, call.tensors(), QUICK, masks=MASKS[::3])


@settings(max_examples=examples(15))
@given(call=addmm_calls())
def test_drawn_addmm(call):
    check_addmm(call.case, call.tensors(), QUICK, masks=MASKS[::3])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_layouts_and_dtypes(layout, dtype, generator):
    tensors = BIG_WINDOW.random(dtype, generator)
    for name in ("input", "weight"):
        check_conv(BIG_WINDOW, tensors | {name: tensors[name].contiguous(memory_format=layout)}, QUICK)
