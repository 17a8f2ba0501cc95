"""Images laid out anew by a compiled kernel: bit for bit what PyTorch does, and when the kernel is not asked."""

from __future__ import annotations

import pytest
import torch
from harness.judge import assert_bitwise_equal
from harness.poison import poisoned_outputs

import fastlenet
from fastlenet import cpu
from fastlenet.fusion.patterns import lay_out

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

PLAIN, LAST = torch.contiguous_format, torch.channels_last
SHAPES = [(2, 32, 16, 16), (7, 17, 19, 11), (1, 16, 1024, 1), (70, 16, 4, 4), (5, 50, 3, 23)]


def images(shape, layout=PLAIN):
    """Random numbers, and some that arithmetic would change."""
    made = torch.randn(shape)
    made.view(torch.int32).flatten()[:3] = torch.tensor([0x7F800001, -(2**31), 1])  # a NaN that signals, -0, the least
    made.flatten()[3:5] = torch.tensor([float("inf"), float("-inf")])
    return made.to(memory_format=layout)


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the kernel is asked."""
    calls, original = [], cpu.lay_out
    monkeypatch.setattr(cpu, "lay_out", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("layout", [PLAIN, LAST], ids=["to plain", "to channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pytorch_s_own_result(shape, layout, kernel_calls):
    input = images(shape, LAST if layout is PLAIN else PLAIN)
    with poisoned_outputs(allocators=("fastlenet.cpu.layout:empty",)) as poison:
        output = lay_out(input, layout)
        poison.assert_guards_intact()
    assert kernel_calls
    expected = input.to(memory_format=layout)
    assert output.stride() == expected.stride()
    assert_bitwise_equal(output.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        input = torch.randn(3, 33, 17, 19)
        assert_bitwise_equal(cpu.lay_out(input, LAST), input.to(memory_format=LAST))
    finally:
        torch.set_num_threads(before)


def test_gradients_of_both_orders(kernel_calls):
    """The gradient arrives as the input lies; a second derivative passes both ways."""
    input = torch.randn(4, 16, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(lay_out(input, LAST).pow(3).sum(), input, create_graph=True)
    assert len(kernel_calls) == 2
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, 3 * input**2)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), input)[0], 6 * input.detach())


def test_batched_and_expanded_gradients():
    input = torch.randn(4, 16, 16, 16, requires_grad=True)
    output = lay_out(input, LAST)
    upstream = torch.randn(3, *output.shape)
    (grads,) = torch.autograd.grad(output, input, upstream, is_grads_batched=True, retain_graph=True)
    assert_bitwise_equal(grads, upstream)
    mapped = torch.func.vmap(lambda grad: torch.autograd.grad(output, input, grad, retain_graph=True)[0])(upstream)
    assert_bitwise_equal(mapped, upstream)
    output.sum().backward()
    assert_bitwise_equal(input.grad, torch.ones_like(input))


NOT_COVERED = {
    "few numbers": lambda: torch.randn(2, 16, 8, 8),
    "few channels": lambda: torch.randn(64, 3, 16, 16),
    "few pixels": lambda: torch.randn(64, 64, 3, 3),
    "float64": lambda: torch.randn(4, 16, 16, 16, dtype=torch.float64),
    "sliced": lambda: torch.randn(8, 16, 16, 16)[::2],
    "lazily negated": lambda: torch._neg_view(torch.randn(4, 16, 16, 16)),
    "as wanted": lambda: torch.randn(4, 16, 16, 16).to(memory_format=LAST),
    "another device": lambda: torch.empty(4, 16, 16, 16, device="meta"),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_other_tensors_are_laid_out_by_pytorch(name, kernel_calls):
    input = NOT_COVERED[name]()
    output, expected = lay_out(input, LAST), input.to(memory_format=LAST)
    assert not kernel_calls
    assert output.stride() == expected.stride()
    if not input.is_meta:
        assert_bitwise_equal(output, expected)


def test_other_implementations_do_not_ask(kernel_calls, monkeypatch):
    input = torch.randn(4, 16, 16, 16)
    with fastlenet.use_backend("aten"):
        lay_out(input, LAST)
    monkeypatch.setattr(cpu.layout, "unavailable", lambda: "for a test")
    lay_out(input, LAST)
    assert not kernel_calls
