"""Calls that follow a plan: the same launches as the launcher's own, with the tensors of the call at hand."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import triton
from fastlenet.kernels import addmm_relu as linear
from fastlenet.kernels import configurations, plans, rules, runtime
from fastlenet.kernels import conv2d_relu_max_pool2d as conv
from fastlenet.kernels import mlp as head
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.fake_driver import compiling_for
from harness.operators import fp32_precision

from bench.static import fake_driver

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
PADDED = PLAIN._replace(padding=(2, 1), pool_size=(3, 3), pool_stride=(2, 2))


_kinds: dict = {}


@pytest.fixture(autouse=True)
def _no_plans_yet():
    _kinds.clear()


def run(launcher, *args):
    """Call a launcher as calls of any kind are: the first of each kind is recorded."""
    return _kinds.setdefault(launcher, plans.Kinds(launcher))(*args)


def conv_tensors(images=3, channels=1, size=32, features=6, dtype=torch.float32):
    input, weight = torch.zeros(images, channels, size, size), torch.zeros(features, channels, 5, 5)
    return [tensor.to(dtype) for tensor in (input, weight, torch.zeros(features))]


def conv_step(input, weight, bias, geometry=PLAIN, mask=(True, True, True)):
    output, argmax = run(conv.conv2d_relu_max_pool2d, input, weight, bias, geometry, True)
    grad = torch.zeros_like(output)
    return grad, output, argmax, *run(conv.conv2d_relu_max_pool2d_backward, grad, input, weight, argmax, geometry, mask)


def head_tensors(rows=3, widths=(400, 120, 84, 10), dtype=torch.float32):
    layers = [
        torch.zeros(shape, dtype=dtype)
        for inner, outer in itertools.pairwise(widths)
        for shape in ((outer, inner), (outer,))
    ]
    return [torch.zeros(rows, widths[0], dtype=dtype), *layers]


def head_step(input, *parameters, mask=(True,) * 7):
    output, *hidden = run(head.mlp, input, *parameters, True)
    grad = torch.zeros_like(output)
    return grad, output, *hidden, *run(head.mlp_backward, grad, input, *hidden, *parameters[::2], mask)


def product_tensors(sizes=(32, 48, 64), dtype=torch.float32):
    rows, inner, outer = sizes
    return [torch.zeros(shape, dtype=dtype) for shape in ((outer,), (rows, inner), (inner, outer))]


def product_step(bias, input, mat2):
    factors = (1.0, 1.0)
    (output,) = run(linear.launch_forward, input, mat2, bias, factors)
    grad = torch.zeros_like(output)
    return grad, output, *run(linear.launch_backward, input, mat2, grad, output, factors, ("row", True, True), None)


CALLS = {
    "product": lambda dtype: (product_tensors(dtype=dtype), product_step),
    "product of odd sizes": lambda dtype: (product_tensors((33, 17, 9), dtype), product_step),
    "conv1": lambda dtype: (conv_tensors(dtype=dtype), conv_step),
    "conv2": lambda dtype: (conv_tensors(channels=6, size=14, features=16, dtype=dtype), conv_step),
    "no gradient of the input": lambda dtype: (
        conv_tensors(dtype=dtype),
        lambda *args: conv_step(*args, mask=(False, True, True)),
    ),
    "no bias": lambda dtype: ([*conv_tensors(dtype=dtype)[:2], None], conv_step),
    "general": lambda dtype: (conv_tensors(channels=3, dtype=dtype), lambda *args: conv_step(*args, PADDED)),
    "by a workspace": lambda dtype: (
        conv_tensors(channels=32, size=9, features=16, dtype=dtype),
        lambda *args: conv_step(*args, PADDED),
    ),
    "head": lambda dtype: (head_tensors(dtype=dtype), head_step),
    "head of odd widths": lambda dtype: (head_tensors(widths=(33, 17, 9, 5), dtype=dtype), head_step),
    "gradient of the head's input alone": lambda dtype: (
        head_tensors(dtype=dtype),
        lambda *args: head_step(*args, mask=(True, *[False] * 6)),
    ),
}


@pytest.fixture
def immortal(monkeypatch):
    """Keep what launchers and plans allocate and copy, so that each has an address of its own."""
    kept, empty, recording, copy = [], plans.empty_strided, plans.Recording, torch.Tensor.contiguous

    def keep(made):
        kept.append(made)
        return made

    monkeypatch.setattr(plans, "empty_strided", lambda *args, **kwargs: keep(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: keep(copy(*args, **kwargs)))
    monkeypatch.setattr(plans, "Recording", lambda *args: keep(recording(*args)))


def told(launches, tensors):
    """Launches in words that do not depend on where memory was found.

    `tensors` are told by their number, a workspace by the order in which kernels meet it.
    """
    places = {(t.data_ptr(), t.shape, t.stride()): i for i, t in enumerate(tensors) if t is not None}
    others: dict[int, str] = {}

    def of(argument):
        if not argument.type.startswith(("*", "tensordesc")):
            return argument.name, argument.type, argument.value
        place = places.get((argument.value, argument.shape, argument.strides))
        met = others.setdefault(argument.value, f"other memory {len(others)}") if place is None else place
        return argument.name, argument.type, met

    return [(str(record), record.hash, call.grid, [*map(of, call.arguments)]) for record, call in launches]


def forms(results):
    return [None if r is None else (r.shape, r.stride(), r.dtype, r.requires_grad) for r in results]


@pytest.mark.parametrize("mode", ["ieee", "tf32", "float16"])
@pytest.mark.parametrize("call", CALLS)
def test_a_plan_does_what_its_launcher_does(call, mode, launched, reasoned, immortal, monkeypatch):
    dtype = torch.float16 if mode == "float16" else torch.float32
    with compiling_for("sm_90"), fp32_precision("ieee" if mode == "float16" else mode):
        tensors, function = CALLS[call](dtype)
        results = function(*tensors)
        expected = told(launched, [*tensors, *results])
        reasoned.clear()
        with monkeypatch.context() as patch:
            patch.setattr(plans, "ENABLED", False)
            function(*tensors)
        assert len(expected) == len(reasoned) > 1
        for _ in range(2):
            # Other memory each time.
            others, _ = CALLS[call](dtype)
            launched.clear()
            reasoned.clear()
            found = function(*others)
            assert reasoned == []
            assert told(launched, [*others, *found]) == expected
            assert forms(found) == forms(results)
            pointers = [t.data_ptr() for t in (*others, *found) if t is not None]
            assert len(set(pointers)) == len(pointers)


def different_calls():
    """Calls that a plan must tell apart, by what is special about each."""
    input, weight, bias = conv_tensors(channels=4, features=8)
    unaligned = torch.zeros(input.numel() + 1)[1:].view(input.shape)
    images_last = input.to(memory_format=torch.channels_last)
    spread = torch.zeros(2 * input.shape[0], *input.shape[1:])[::2]
    forward = functools.partial(run, conv.conv2d_relu_max_pool2d)
    return {
        "plain": lambda: forward(input, weight, bias, PADDED, True),
        "no argmax": lambda: forward(input, weight, bias, PADDED, False),
        "no bias": lambda: forward(input, weight, None, PADDED, True),
        "unaligned": lambda: forward(unaligned, weight, bias, PADDED, True),
        "channels_last": lambda: forward(images_last, weight, bias, PADDED, True),
        "every second image": lambda: forward(spread, weight, bias, PADDED, True),
        "fewer images": lambda: forward(input[:2], weight, bias, PADDED, True),
        "another stride": lambda: forward(input, weight, bias, PADDED._replace(stride=(2, 1)), True),
        "float16": lambda: forward(input.half(), weight.half(), bias.half(), PADDED, True),
    }


@pytest.mark.wide  # it compiles for 30 s
def test_calls_that_differ_have_plans_of_their_own(launched, reasoned, monkeypatch):
    with compiling_for("sm_90"), fp32_precision("ieee"):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "ENABLED", False)
            expected = {}
            for name, call in different_calls().items():
                launched.clear()
                expected[name] = (forms(call()), told(launched, ()))
        assert len({str(found) for found in expected.values()}) == len(expected) - 1  # alignment shows in no number
        for _ in range(2):
            reasoned.clear()
            for name, call in different_calls().items():
                launched.clear()
                found = forms(call())
                assert (found, told(launched, ())) == expected[name], name
        assert reasoned == []


def test_precision_table_and_driver_have_plans_of_their_own(launched, monkeypatch):
    tensors = conv_tensors(channels=6, size=14, features=16)

    def kernels():
        launched.clear()
        for _ in range(2):
            run(conv.conv2d_relu_max_pool2d, *tensors, PLAIN, False)
        (first, _), (second, _) = launched
        assert first is second
        return first.module.rpartition(".")[2], first.constexprs.get("PRECISION"), first.target.arch

    with compiling_for("sm_90"):
        with fp32_precision("tf32"):
            assert kernels()[1] == "tf32"
        with fp32_precision("ieee"):
            assert kernels()[0] == "patch_fma"
            with monkeypatch.context() as patch:
                place = "conv2d_relu_max_pool2d.forward", "sm_90", "ieee", (6, 14, 14, 16, 6, 5, 5)
                listed = {place: configurations.Configuration("general", {}, "for a test")}
                patch.setattr(configurations, "table", lambda: listed)
                assert kernels() == ("general", "ieee", 90)
            assert kernels()[0] == "patch_fma"
    with compiling_for("sm_80"), fp32_precision("ieee"):
        assert kernels()[2] == 80


def test_an_operand_is_copied_each_time_anew(monkeypatch, reasoned):
    seen = []
    monkeypatch.setattr(fake_driver._Launcher, "__call__", lambda _, *args: seen.append(args))
    with compiling_for("sm_90"):
        _, *parameters = head_tensors()
        for number in range(3):
            input = torch.full((3, 800), float(number))[:, ::2]
            run(head.mlp, input, *parameters, False)
            copy = next(arg for arg in seen.pop() if isinstance(arg, torch.Tensor))
            assert copy.is_contiguous()
            assert copy.shape == input.shape
            assert bool((copy == number).all())
    assert len(reasoned) == 1


def test_what_a_kernel_wrote_is_copied_after_it(reasoned, monkeypatch):
    """A plan copies before it launches, so a call whose result is laid out anew has none."""
    monkeypatch.setattr(rules, "choose", lambda *_: None)  # the general kernels compile three times as fast
    with compiling_for("sm_90"), fp32_precision("ieee"):
        input, weight, bias = conv_tensors(channels=4, features=8)
        input = input.to(memory_format=torch.channels_last)
        for _ in range(2):
            *_, grad_weight, _ = conv_step(input, weight, bias, PADDED, (False, True, True))
            assert grad_weight.is_contiguous(memory_format=torch.channels_last)
    # The forward, and two launches of each backward.
    assert len(reasoned) == 1 + 2 * 2


def test_a_tensor_that_is_two_operands_has_no_plan(launched, reasoned):
    with compiling_for("sm_90"):
        square = head_tensors(widths=(16, 16, 16, 16))
        square[3] = square[1]
        for _ in range(2):
            run(head.mlp, *square, False)
        assert len(reasoned) == 2
        # The same call with tensors of their own must not follow what was noted of that one.
        apart = head_tensors(widths=(16, 16, 16, 16))
        run(head.mlp, *apart, False)
        (*_, (_, call)) = launched
        assert [argument.value for argument in call.arguments[:7]] == [tensor.data_ptr() for tensor in apart]


def test_hooks_on_launches_see_those_of_plans(reasoned):
    tensors = head_tensors()
    hooks = triton.knobs.runtime.launch_enter_hook
    with compiling_for("sm_90"):
        for _ in range(3):
            run(head.mlp, *tensors, False)
        assert len(reasoned) == 1
        hooks.add(print)
        try:
            run(head.mlp, *tensors, False)
        finally:
            hooks.remove(print)
        assert len(reasoned) == 2
        seen = []
        head._exact_forward_kernel.add_pre_run_hook(lambda *_, **__: seen.append(True))
        try:
            run(head.mlp, *tensors, False)
        finally:
            head._exact_forward_kernel.pre_run_hooks.clear()
        assert (len(reasoned), len(seen)) == (3, 1)
        run(head.mlp, *tensors, False)
        assert len(reasoned) == 3


def test_memory_at_odd_places_is_no_part_of_a_plan(reasoned, monkeypatch):
    """A user's allocator may return it, and the kernels of a plan were compiled for multiples of 16 bytes."""
    tensors = head_tensors()
    with compiling_for("sm_90"):
        for _ in range(2):
            run(head.mlp, *tensors, True)
        assert len(reasoned) == 1

        def unaligned(shape, strides, **options):
            size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            return torch.empty(size + 1, **options)[1:].as_strided(shape, strides)

        monkeypatch.setattr(plans, "empty_strided", unaligned)
        run(head.mlp, *tensors, True)
        assert len(reasoned) == 2


def test_amds_launches_are_never_planned(reasoned):
    """Its backend also specialises on the size of a tensor's memory."""
    with compiling_for("gfx942"):
        for _ in range(3):
            run(head.mlp, *head_tensors(), False)
        assert len(reasoned) == 3


def test_a_call_that_failed_leaves_no_plan(reasoned, monkeypatch):
    with compiling_for("sm_90"):
        tensors = head_tensors()
        with monkeypatch.context() as patch:
            patch.setattr(head, "index_type", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(head.mlp, *tensors, False)
        # What the caller allocates afterwards is not noted.
        assert runtime._of_thread.recording is None
        run(head.mlp, *tensors, False)
        run(head.mlp, *tensors, False)
        assert len(reasoned) == 1
