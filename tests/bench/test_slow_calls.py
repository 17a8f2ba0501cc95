"""No legal call takes much longer than stock's: the slowest ones that were found, and the search for others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from harness.fuzz import examples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # bench/ is no part of the package

import fastlenet
from bench import slowest
from bench.slowest import ChainCall, ConvCall


def call(input, weight, pool, pool_stride=None, *, dtype=torch.float32, input_grad=False):
    conv = {"stride": (1, 1), "padding": (0, 0), "dilation": 1, "groups": 1}
    window = {"size": pool, "stride": pool_stride or pool, "padding": (0, 0), "dilation": 1, "ceil_mode": False}
    return ConvCall(input, weight, conv, window, dtype, False, input_grad)


SLOW = {
    "window_of_18x18": call((16, 16, 20, 20), (32, 16, 3, 3), (18, 18)),
    "window_as_large_as_the_image": call((8, 64, 56, 56), (32, 64, 3, 3), (54, 54)),
    "window_of_one_row": call((16, 1, 40, 400), (8, 1, 40, 5), (1, 396)),
    "overlapping_windows": call((8, 4, 28, 28), (8, 4, 3, 3), (16, 16), (1, 1)),
    "tall_kernel": call((16, 1, 4000, 8), (4, 1, 64, 1), (2, 2), input_grad=True),
    "one_image_float16": call((1, 1, 32, 32), (6, 1, 5, 5), (2, 2), dtype=torch.float16),
    "one_image_bfloat16": call((1, 1, 32, 32), (6, 1, 5, 5), (2, 2), dtype=torch.bfloat16),
    "one_image_float64": call((1, 1, 32, 32), (6, 1, 5, 5), (2, 2), dtype=torch.float64),
    "matrices_alone": ChainCall((4, 1200), [(1024, 1200), (512, 1024)], True),
    "large_matrix_of_two_images": ChainCall((2, 1, 28, 28), [(32, 1, 3, 3), (512, 6272), (120, 512)], True),
    "large_matrix": ChainCall((512, 1, 28, 28), [(16, 1, 5, 5), (32, 16, 5, 5), (512, 800), (10, 512)], True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SLOW)
def test_a_call_that_was_slow(name):
    """Timed in turns with stock; a machine's hiccup is given two more chances."""
    for seconds in (0.2, 1.0, 2.0):
        fused, stock = slowest.compare(SLOW[name], seconds)
        if fused <= slowest.FACTOR * stock + slowest.SLACK_US:
            return
    pytest.fail(f"{fused:.0f} us, stock {stock:.0f} us")


@pytest.mark.parametrize("name", ["window_of_18x18", "window_as_large_as_the_image", "window_of_one_row"])
def test_wide_windows_are_stock_own_operators(name):
    fused = SLOW[name].fused(*SLOW[name].tensors())
    assert "ConvReLUMaxPool2d" not in type(fused.grad_fn).__name__
    torch.testing.assert_close(fused.shape, SLOW[name].stock(*SLOW[name].tensors()).shape)


def test_the_search_draws_legal_calls():
    """What it draws has stock's result: in float64, where rounding is far below the tolerance."""
    import random

    rng = random.Random(1)
    for draw in (slowest.draw, slowest.draw_chain):
        for _ in range(examples(20)):
            drawn = draw(rng)
            tensors = [tensor.detach().double() for tensor in drawn.tensors()]
            torch.testing.assert_close(drawn.fused(*tensors), drawn.stock(*tensors))


@pytest.mark.thorough
def test_drawn_calls_are_not_slow():
    assert slowest.main(["--draws", "60", "--seed", "7"]) == 0


def test_outputs_may_be_changed_in_place():
    """The report's own line, and what follows a layer in networks."""
    for images in (1, 2, 64):
        layer = fastlenet.ConvReLUMaxPool2d(1, 6, 5)
        output = layer(torch.randn(images, 1, 32, 32))
        output += 1
        torch.nn.functional.dropout(output, 0.5, inplace=True)
        torch.relu_(output)
        output.sum().backward()
        assert layer.weight.grad.abs().sum() > 0
