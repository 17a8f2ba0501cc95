"""Whole calls on the Triton path, with a driver that launches nothing: what they launch, and what a key must tell."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels import configurations, plans
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.fake_driver import compiling_for
from harness.operators import fp32_precision

import fastlenet
from fastlenet import functional, selection

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


@pytest.fixture
def gpu():
    """Triton drives the CPU's tensors, and launches nothing."""
    with selection.triton_drives_everything(), compiling_for("sm_90") as records, fastlenet.use_backend("triton"):
        yield records


def lenet_step(network, images):
    logits = network(images)
    logits.backward(torch.zeros_like(logits))
    return logits


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_lenet_is_three_launches_forward_and_few_backward(precision, gpu, launched, reasoned):
    network = fastlenet.LeNet()
    with fp32_precision(precision):
        for images in (torch.zeros(16, 1, 32, 32), torch.ones(16, 1, 32, 32)):
            launched.clear()
            reasoned.clear()
            with torch.no_grad():
                network(images)
            assert len(launched) == 3
            launched.clear()
            logits = network(images)
            assert len(launched) == 3
            logits.backward(torch.zeros_like(logits))
            # Gradients of the head's hidden layers and input; of conv2's input; of all weights; and one sum for all.
            assert len(launched) == 3 + 4
        assert reasoned == [], "the second call of each kind follows its plan"
    assert type(logits.grad_fn).__name__ == (
        "ConvReLUMaxPool2d_ConvReLUMaxPool2d_LinearReLU_LinearReLU_LinearChainBackward"
    )


@pytest.mark.wide  # it compiles for 20 s
def test_a_chain_whose_matrices_a_library_multiplies_has_a_plan_too(gpu, launched, reasoned, monkeypatch):
    """In exact float32 cuBLAS is faster than the head's forward kernel; the convolutions and the backward stay."""
    monkeypatch.setattr(selection, "ORDER", {"cpu": ("triton", "aten")})
    network, called = fastlenet.LeNet(), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args[1].shape) or linear(*args))
    with fp32_precision("ieee"), fastlenet.use_backend("auto"):
        for _ in range(2):
            launched.clear()
            called.clear()
            reasoned.clear()
            logits = lenet_step(network, torch.zeros(16, 1, 32, 32))
            assert called[-3:] == [(120, 400), (84, 120), (10, 84)]  # the first check of the kind asks stock, too
            assert len(launched) == 2 + 4
        assert reasoned == []
        choice = selection.choose(
            fastlenet.ops.CHAIN, (PLAIN, PLAIN, "linear_relu", "linear_relu", "linear"),
            (torch.zeros(16, 1, 32, 32), *network.parameters()),
        )  # fmt: skip
        assert choice.implementation == "triton"
        assert "a library multiplies its matrices: exact float32" in choice.reason
    assert logits.shape == (16, 10)


@pytest.mark.wide
@pytest.mark.parametrize("links", [1, 2])
def test_chains_of_other_lengths(links, gpu, launched):
    """Without a head of three: linear maps with relu are the operator's kernels where Triton is forced."""
    tensors = [torch.randn(6, 1, 5, 5, requires_grad=True), None, torch.randn(7, 6 * 14 * 14, requires_grad=True), None]
    chain = (PLAIN, "linear_relu")[:links]
    for _ in range(2):
        output = functional.chain(torch.zeros(3, 1, 32, 32), tensors[: 2 * links], chain)
        assert output.shape == ((3, 6, 14, 14), (3, 7))[links - 1]
        output.backward(torch.zeros_like(output))
        assert tensors[0].grad.shape == tensors[0].shape
    assert launched


def calls():
    """Calls of one operator that a key must tell apart, by what is special about each."""
    input = torch.zeros(4, 6, 14, 14)
    weight, bias = torch.zeros(16, 6, 5, 5), torch.zeros(16)
    unaligned = torch.zeros(input.numel() + 1)[1:].view(input.shape)
    spread = torch.zeros(8, 6, 14, 14)[::2]
    loose = torch.zeros(weight.numel() + 1)[1:].view(weight.shape)
    return {
        "plain": (input, weight, bias),
        "unaligned": (unaligned, weight, bias),
        "unaligned weight": (input, loose, bias),
        "every second image": (spread, weight, bias),
        "channels_last": (input.to(memory_format=torch.channels_last), weight, bias),
        "fewer images": (input[:3], weight, bias),
        "no bias": (input, weight, None),
        "float16": (input.half(), weight.half(), bias.half()),
    }


def linear_calls():
    """Likewise for a linear map."""
    input, weight, bias = torch.zeros(32, 64), torch.zeros(48, 64), torch.zeros(48)
    return {
        "plain": (input, weight, bias),
        "unaligned": (torch.zeros(input.numel() + 1)[1:].view(input.shape), weight, bias),
        "unaligned weight": (input, torch.zeros(weight.numel() + 1)[1:].view(weight.shape), bias),
        "every second row": (torch.zeros(64, 64)[::2], weight, bias),
        "column by column": (input, torch.zeros(64, 48).t(), bias),
        "two leading dimensions": (torch.zeros(4, 2, 64), weight, bias),
        "copied to rows": (torch.zeros(2, 4, 64).transpose(0, 1), weight, bias),
        "no bias": (input, weight, None),
        "float16": (input.half(), weight.half(), bias.half()),
    }


class Memory:
    """A workspace, of which a plan passes an address alone; it is equal to a tensor of any form."""

    def __eq__(self, other):
        return other is not None

    def __hash__(self):
        return 0


def told(log):
    """Launches in words: the kernel as it was compiled, its grid, and shapes and strides of its arguments."""

    def form(argument):
        if argument.shape is None and argument.type.startswith("*") and argument.value is not None:
            return Memory()
        return None if argument.shape is None else (argument.shape, argument.strides)

    return [
        (record.hash, record.attributes, call.grid, [(a.name, a.type, form(a)) for a in call.arguments])
        for record, call in log
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("operator", ["layer", "chain", "linear"])
def test_no_call_follows_the_plan_of_another_kind(operator, backward, gpu, launched, reasoned, monkeypatch):
    """An unaligned view after an aligned call of the same shape, for one, must not run a kernel of 16-byte loads."""
    run, kinds = {
        "layer": (lambda *tensors: functional.conv2d_relu_max_pool2d(*tensors), calls),
        "chain": (lambda input, *parameters: functional.chain(input, parameters, (PLAIN,)), calls),
        "linear": (lambda *tensors: functional.linear_relu(*tensors), linear_calls),
    }[operator]

    def all_calls():
        found = {}
        for name, tensors in kinds().items():
            launched.clear()
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            output = run(*leaves)
            if backward:
                output.backward(torch.zeros_like(output))
            found[name] = told(launched)
        return found

    with fp32_precision("ieee"):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "ENABLED", False)
            expected = all_calls()
        # Two kinds launch alike: a convolution's weight may lie anywhere, and rows are rows after they were copied.
        assert len({str(launches) for launches in expected.values()}) == len(expected) - 1
        for _ in range(3):
            reasoned.clear()
            assert all_calls() == expected
        if operator == "linear":
            assert reasoned == [], "a later call of each kind follows its plan"


def backward_calls():
    """Gradients of one forward that a key must tell apart."""
    shape = (4, 16, 5, 5)
    numel = torch.Size(shape).numel()
    return {
        "plain": torch.zeros(shape),
        "unaligned": torch.zeros(numel + 1)[1:].view(shape),
        "expanded": torch.zeros(()).expand(shape),
        "channels_last": torch.zeros(shape).to(memory_format=torch.channels_last),
    }


def test_no_backward_follows_the_plan_of_another_kind(gpu, launched, monkeypatch):
    input, weight, bias = (t.requires_grad_() for t in calls()["plain"])

    def all_calls():
        found = {}
        for (name, grad), wanted in itertools.product(
            backward_calls().items(), ([input, weight, bias], [weight], [input])
        ):
            output = functional.conv2d_relu_max_pool2d(input, weight, bias)
            launched.clear()
            torch.autograd.grad(output, wanted, grad)
            found[name, len(wanted), wanted[0] is input] = told(launched)
        return found

    with fp32_precision("ieee"):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "ENABLED", False)
            expected = all_calls()
        for _ in range(3):
            assert all_calls() == expected


KEY = ("conv", "matmul", "shape", "stride", "dtype", "device", "alignment", "other")


@pytest.mark.parametrize("dropped", KEY)
def test_every_component_of_a_plans_key_is_needed(dropped):
    """With any one left out, two calls that differ have one key."""
    base = torch.zeros(4, 6)
    tensors = {
        "itself": (base, True),
        "shape": (base[:2], True),
        "stride": (torch.zeros(4, 12)[:, ::2], True),
        "dtype": (base.int(), True),
        "device": (base.to("meta"), True),
        "alignment": (torch.zeros(25)[1:].view(4, 6), True),
        "other": (base, False),
    }

    def keys(drop):
        found = []
        for precision in ("ieee", "tf32"):
            for switch in ("conv", "matmul"):
                with fp32_precision("ieee"):
                    target = torch.backends.cudnn.conv if switch == "conv" else torch.backends.cuda.matmul
                    target.fp32_precision = precision
                    chosen = tensors.values() if (switch, precision) == ("conv", "ieee") else [tensors["itself"]]
                    found += [plans.key_of(args) for args in chosen if (precision, switch) != ("ieee", "matmul")]
        return [tuple(part for name, part in zip(KEY, key, strict=True) if name != drop) for key in found]

    assert len(set(keys(None))) == len(keys(None))
    assert len(set(keys(dropped))) < len(keys(dropped))


@pytest.mark.parametrize("what", ["driver", "table", "hooks"])
def test_a_plan_holds_only_where_it_was_made(what, gpu, launched, reasoned, monkeypatch):
    """For the driver that launched, the table of configurations, and as long as launches have no hooks."""
    layer, images = fastlenet.ConvReLUMaxPool2d(6, 16, 5), torch.zeros(4, 6, 14, 14)
    with torch.no_grad(), fp32_precision("ieee"):
        for _ in range(2):
            layer(images)
        assert len(reasoned) == 1
        if what == "driver":
            with compiling_for("sm_80"):
                layer(images)
                assert launched[-1][0].target.arch == 80
        elif what == "table":
            place = "conv2d_relu_max_pool2d.forward", "sm_90", "ieee", (6, 14, 14, 16, 6, 5, 5)
            listed = {place: configurations.Configuration("general", {}, "for a test")}
            monkeypatch.setattr(configurations, "table", lambda: listed)
            layer(images)
            assert launched[-1][0].module.endswith("general")
        else:
            import triton

            hook = triton.knobs.runtime.launch_enter_hook
            hook.add(print)
            try:
                layer(images)
            finally:
                hook.remove(print)
        assert len(reasoned) == 2
