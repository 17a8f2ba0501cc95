"""The compiled CPU kernels of one layer, before the same judge and on the same grid as the other implementations."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from harness.cases import BIG_WINDOW, CONV_CASES, TOO_BIG_WINDOW, conv_case, conv_cases
from harness.contract import (  # noqa: F401
    Contract,
    pytest_generate_tests,
    test_a_window_without_a_cell,
    test_as_accurate_as_stock,
    test_awkward_layouts,
    test_bitwise_reproducible_from_run_to_run,
    test_empty_batch,
    test_equal_to_stock_where_arithmetic_is_exact,
    test_nan_and_infinities_in_the_upstream_gradient,
    test_nan_and_infinities_travel_as_in_stock,
    test_no_gradient_where_relu_is_off,
    test_nothing_is_modified,
    test_ties_go_to_the_first_cell_in_scan_order,
)
from harness.draw import conv_calls
from harness.fuzz import assume, examples, given, settings
from harness.judge import assert_as_accurate, assert_bitwise_equal, assert_same_values, exact_grid
from harness.operators import CONV, Result, run, upstream
from harness.poison import assert_fully_written, poisoned_outputs
from harness.strides import awkward
from torch import Tensor

import fastlenet
from fastlenet import cpu, reference
from fastlenet.cpu import few

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ALLOCATORS = ("fastlenet.cpu.memory:empty",)
NAMES = ("input", "weight", "bias")
PLAIN = conv_case("", (1,), (1, 1, 1, 1)).geometry
special = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)

# Names say what each is for. 16 images make a block: these take one lane, some, all, and a second block.
SMALL = conv_case("small", (5, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2)
COVERED = conv_case("covered", (2, 2, 8, 9), (4, 2, 3, 2), pool_size=3, pool_stride=(3, 1))
BLOCKS = [
    conv_case("one block", (16, 2, 10, 12), (4, 2, 5, 5)),
    conv_case("a block and one image", (17, 1, 12, 10), (6, 1, 5, 5)),
    conv_case("two and a half blocks", (40, 3, 9, 8), (5, 3, 2, 3), padding=(1, 0), pool_size=(2, 3), pool_stride=2),
    conv_case("more blocks than parts", (16 * 17 + 3, 2, 4, 4), (4, 2, 3, 3)),
]
ALL_ELSE = conv_case(
    "groups, overlap and all else", (19, 4, 9, 8), (6, 2, 2, 3), groups=2, stride=(1, 2), padding=1,
    dilation=(2, 1), pool_size=3, pool_stride=(2, 1), pool_padding=1, ceil_mode=True,
)  # fmt: skip
MORE = [
    *BLOCKS,
    ALL_ELSE,
    conv_case("a window as large as the image", (3, 2, 8, 9), (4, 2, 1, 1), pool_size=(8, 9)),
    conv_case("a kernel of more taps than a chain", (3, 1, 17, 16), (4, 1, 14, 15)),
    conv_case("channels of several chains", (3, 40, 6, 6), (4, 40, 3, 3)),
    conv_case("long channels of several chains", (2, 3, 15, 15), (2, 3, 13, 13)),
    conv_case("stride and pixels that no tap meets", (3, 2, 12, 13), (4, 2, 2, 2), stride=(3, 4), pool_size=1),
]


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, geometry):
        output, argmax = cpu.conv2d_relu_max_pool2d(input, weight, bias, geometry, True)
        ctx.save_for_backward(input, weight, argmax)
        ctx.geometry = geometry
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, argmax = ctx.saved_tensors
        arguments = grad_output, input, weight, argmax, ctx.geometry, ctx.needs_input_grad[:3]
        grads = cpu.conv2d_relu_max_pool2d_backward(*arguments)
        for needed, grad in zip(ctx.needs_input_grad, grads, strict=False):
            assert needed == (grad is not None)
        return (*grads, None)


def compiled(input: Tensor, weight: Tensor, bias: Tensor | None = None, **keywords) -> Tensor:
    """The kernels as an operator with stock's arguments."""
    geometry = conv_case("", tuple(input.shape), tuple(weight.shape), **keywords).geometry
    if isinstance(keywords.get("padding"), str):
        wanted = [
            d * (k - 1) if keywords["padding"] == "same" else 0
            for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)
        ]
        odd = [n % 2 for n in wanted]
        input = F.pad(input, (0, odd[1], 0, odd[0])) if any(odd) else input
        geometry = geometry._replace(padding=(wanted[0] // 2, wanted[1] // 2))
    batched = input if input.dim() == 4 else input[None]
    output = _Compiled.apply(batched, weight, bias, geometry)
    return output if input.dim() == 4 else output[0]


def watched(function, tensors, keywords, grad_output=None, wanted=None) -> Result:
    """Run with every allocation poisoned and guarded, and the results fully written."""
    with poisoned_outputs(allocators=ALLOCATORS) as poison:
        result = run(function, tensors, keywords, grad_output, wanted)
        poison.assert_guards_intact()
    for name, tensor in result.tensors():
        assert_fully_written(tensor, name=name)
    return result


TRIAL = CONV.__class__(compiled, CONV.stock, CONV.judge, watched)
CONTRACT = Contract(
    grid=[*CONV_CASES, *MORE],
    plain=[BLOCKS[2], ALL_ELSE, SMALL],
    covered=[COVERED, BLOCKS[0]],
    dtypes=(torch.float32,),
)

# The most images that are computed one by one.
FORMS = {"blocks": 0, "one by one": 1000}


@pytest.fixture(params=FORMS)
def either(request, monkeypatch) -> str:
    """Both forms, whatever the number of images."""
    monkeypatch.setattr(few, "MOST_IMAGES", FORMS[request.param])
    return request.param


@pytest.fixture
def trial(either):
    """The kernels' trial, in both forms."""
    return lambda case: TRIAL


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [1, 2, 4, 5, 6, 7])
def test_tiles_of_every_cpu(tiles, filters):
    """A pass of every width, full or not, of the filters and of the input's channels."""
    for channels in (1, 3, 4, 6, 8) if filters == 6 else (2,):
        case = conv_case("", (17, channels, 9, 8), (filters, channels, 2, 3), padding=1)
        TRIAL.random(case, case.random(torch.float32))
        TRIAL.exact(case, case.exact(torch.float32))


def test_long_sums_are_as_accurate_as_stocks(either):
    """Of 1,152 products; by the contract's rule alone, without the allowance that small tensors need.

    One chain of them has five times stock's error.
    """
    case = conv_case("long sums", (64, 128, 6, 6), (16, 128, 3, 3))
    tensors = case.random(torch.float32)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    # A gradient in which no decision of relu or pool has a part.
    everywhere = {"pool_size": 1, "groups": 1}
    tensors["bias"] += 1000.0
    exact["bias"] += 1000.0
    grad = torch.randn(64, 16, 4, 4)
    actual = watched(compiled, tensors, everywhere, grad)
    stock = run(CONV.stock, tensors, everywhere, grad)
    reference = run(CONV.stock, exact, everywhere, grad.double())
    for name in ("input", "weight"):
        trio = (result.grads[name] for result in (actual, stock, reference))
        assert_as_accurate(*trio, dtype=torch.float32, name=name)
    for tensors_of in (tensors, exact):
        tensors_of["bias"] -= 1000.0
    outputs = [compiled(**tensors), CONV.stock(**tensors), CONV.stock(**exact)]
    assert_as_accurate(*outputs, dtype=torch.float32, name="output")


@settings(max_examples=examples(80))
@given(call=conv_calls(dtypes=(torch.float32,)))
def test_drawn_convolutions(call):
    """Any shape and layout, but padded images one pixel wide under a stride: there stock itself fails."""
    geometry = call.case.geometry
    assume(call.case.input[-1] > 1 or geometry.stride[1] == 1 or geometry.padding[1] == 0)
    kind = call.grad_kind(len(call.case.input))
    for most in FORMS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(few, "MOST_IMAGES", most)
            if call.exact:
                TRIAL.exact(call.case, call.tensors(), kind)
            else:
                TRIAL.random(call.case, call.tensors(), kind, allow_zero=True)


@pytest.mark.parametrize("images", [2, 19])
def test_a_gradient_that_is_negated_lazily(images):
    """PyTorch's complex numbers make such tensors: their memory holds the other sign."""
    layer = fastlenet.ConvReLUMaxPool2d(2, 4, 3)
    with fastlenet.use_backend("cpu"):
        output = layer(torch.randn(images, 2, 8, 9))
    upstream = torch.randn(output.shape)
    negated, plain = (
        torch.autograd.grad(output, layer.weight, grad, retain_graph=True)
        for grad in (torch._neg_view(upstream), -upstream)
    )
    assert_bitwise_equal(negated[0], plain[0])


@pytest.mark.parametrize("images", [2, 19])
def test_hooks_on_saved_tensors_may_change_strides(images):
    layer = fastlenet.ConvReLUMaxPool2d(2, 4, 3, padding=1)

    def relaid(tensor: Tensor) -> Tensor:
        argmax = tensor.dtype == torch.uint8  # the others would lay out the gradients likewise
        return tensor.contiguous(memory_format=torch.channels_last) if argmax else tensor

    def grads() -> tuple[Tensor, ...]:
        input = torch.randn(images, 2, 8, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with fastlenet.use_backend("cpu"):
            output = layer(input)
        return torch.autograd.grad(output.square().sum(), (input, layer.weight))

    with torch.autograd.graph.saved_tensors_hooks(relaid, lambda tensor: tensor):
        hooked = grads()
    for actual, expected in zip(hooked, grads(), strict=True):
        assert_same_values(actual, expected)


def test_images_that_lie_apart():
    """Every second image of the input, and every third gradient, with NaN between them."""
    case = BLOCKS[1]
    tensors = case.exact(torch.float32)
    grad = exact_grid(CONV.stock(**tensors, **case.keywords).shape, torch.float32, terms=case.terms)

    def apart(tensor: Tensor, step: int) -> Tensor:
        wider = torch.full((step * len(tensor), *tensor.shape[1:]), float("nan"))
        wider[::step] = tensor
        return wider[::step]

    TRIAL.equal(case, {**tensors, "input": apart(tensors["input"], 2)}, apart(grad, 3))


def test_more_blocks_than_parts():
    """The parts of a batch whose sums are kept apart have several blocks each."""
    TRIAL.exact(BLOCKS[3], BLOCKS[3].exact(torch.float32))


def test_lists_of_several_chains():
    """More winners of a filter in an image, and more filters of a window, than one chain adds."""
    for case in (
        conv_case("windows", (2, 1, 20, 21), (2, 1, 3, 3), pool_size=1),
        conv_case("filters", (2, 1, 3, 3), (3 * 160 + 7, 1, 2, 2), pool_size=1),
    ):
        TRIAL.exact(case, case.exact(torch.float32))
        TRIAL.random(case, case.random(torch.float32))


@pytest.mark.parametrize("name", ["input", "weight"])
@conv_cases([SMALL, ALL_ELSE])
def test_channels_last_comes_out_as_it_went_in(case, name, either):
    """Output and gradients have stock's strides."""
    tensors = case.exact(torch.float32)
    tensors[name] = awkward(tensors[name], "channels_last")
    stock = run(CONV.stock, tensors, case.keywords)
    result = TRIAL.equal(case, tensors, None)
    for (label, actual), (_, expected) in zip(result.tensors(), stock.tensors(), strict=True):
        if label != "gradient of weight":  # autograd accumulates it in the weight's own layout
            assert actual.stride() == expected.stride(), label


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="+".join)
@conv_cases([BLOCKS[1], ALL_ELSE])
def test_some_gradients(case, wanted):
    """Those asked for equal stock's, the others are not computed."""
    tensors = case.exact(torch.float32)
    grad = exact_grid(CONV.stock(**tensors, **case.keywords).shape, torch.float32, terms=case.terms)
    expected = run(CONV.stock, tensors, case.keywords, grad, wanted)
    result = watched(compiled, tensors, case.keywords, grad, wanted)
    for name in wanted:
        assert_same_values(result.grads[name], expected.grads[name], name=name)


def test_inference_is_training_without_argmax():
    """The same values, bit by bit."""
    for case in (BLOCKS[0], ALL_ELSE, BIG_WINDOW):
        tensors = case.random(torch.float32)
        output, argmax = cpu.conv2d_relu_max_pool2d(*tensors.values(), case.geometry, False)
        assert argmax is None
        assert_bitwise_equal(output, cpu.conv2d_relu_max_pool2d(*tensors.values(), case.geometry, True)[0])


# --- special values ------------------------------------------------------------------------------------------------


@special
@conv_cases([COVERED, *BLOCKS[:2]])
def test_nan_and_infinities_in_the_weight(case, value, either):
    """As in stock: no pixel beyond the edge is multiplied by them."""
    tensors = case.exact(torch.float32)
    tensors["weight"][1, 0, 1, 1] = value
    TRIAL.exact(case, tensors)


@special
@pytest.mark.parametrize("name", NAMES)
@conv_cases([ALL_ELSE, BLOCKS[1]])
def test_nan_and_infinities_reach_the_same_outputs(case, name, value, either):
    """With padding and cells outside any window too."""
    tensors = case.exact(torch.float32)
    tensors[name].view(-1)[tensors[name].numel() // 2] = value
    stock = CONV.stock(**{key: tensor.double() for key, tensor in tensors.items()}, **case.keywords)
    assert_same_values(compiled(**tensors, **case.keywords), stock.float())


def test_images_after_one_whose_gradient_is_infinite():
    """Their padding is zero again, whatever the memory held for the first one."""
    case = conv_case("", (5, 3, 9, 8), (5, 3, 3, 3), padding=1)
    tensors = case.exact(torch.float32)
    output = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, torch.float32, terms=case.terms)
    grad[0, 0].view(-1)[int(output[0, 0].argmax())] = float("inf")
    result = TRIAL.equal(case, tensors, grad)
    assert bool(result.grads["weight"][1:].isfinite().all())


def test_what_stays_finite_beside_an_infinity_is_as_accurate_as_stocks():
    """Where something is not finite, all pixels are listed instead of winners: their sums must be no longer chains."""
    case = conv_case("", (2, 1, 24, 24), (160, 1, 5, 5), pool_size=1)
    tensors = case.random(torch.float32)
    tensors["weight"] = tensors["weight"].abs()
    tensors["bias"] += 1000.0  # no decision of relu has a part
    grad = torch.rand(2, 160, 20, 20)
    grad[0, 0, 0, 0] = float("inf")
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    result = watched(compiled, tensors, case.keywords, grad).grads["input"]
    stock = run(CONV.stock, tensors, case.keywords, grad).grads["input"]
    reference = run(CONV.stock, exact, case.keywords, grad.double()).grads["input"]
    assert_as_accurate(result, stock, reference, dtype=torch.float32)


@special
def test_an_image_that_is_not_finite_stays_alone(value):
    """The last image stands for missing lanes: its NaN must reach no gradient of another image."""
    case = BLOCKS[1]
    tensors = case.exact(torch.float32)
    tensors["input"][-1] = value
    TRIAL.exact(case, tensors)


# --- threads, layouts in memory, other implementations ----------------------------------------------------------------


@conv_cases(BLOCKS)
def test_bitwise_equal_for_any_number_of_threads(case):
    """And from run to run."""
    tensors = case.random(torch.float32)
    grad = upstream(CONV.stock(**tensors, **case.keywords))
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(compiled, tensors, case.keywords, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for (name, one), (_, two) in zip(results[0].tensors(), other.tensors(), strict=True):
            assert_bitwise_equal(one, two, name=name)


def test_an_image_does_not_depend_on_its_batch():
    """Bit by bit, wherever in a block it stands."""
    case = BLOCKS[2]
    tensors = case.random(torch.float32)
    whole = compiled(**tensors, **case.keywords)
    for start, end in ((0, 1), (3, 20), (39, 40)):
        part = compiled(tensors["input"][start:end], tensors["weight"], tensors["bias"], **case.keywords)
        assert_bitwise_equal(part, whole[start:end])


def test_several_python_threads():
    """Each computes what it computes alone."""
    case = BLOCKS[3]
    drawn = [case.random(torch.float32) for _ in range(4)]
    grads = [upstream(CONV.stock(**tensors, **case.keywords)) for tensors in drawn]
    alone = [run(compiled, tensors, case.keywords, grad) for tensors, grad in zip(drawn, grads, strict=True)]
    together: list[list[Result]] = [[] for _ in drawn]

    def work(i: int) -> None:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in drawn[i].items()}
        for _ in range(5):
            output = compiled(**leaves, **case.keywords)
            found = torch.autograd.grad(output, list(leaves.values()), grads[i])
            together[i].append(Result(output.detach(), dict(zip(leaves, found, strict=True))))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(drawn))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 5
        for result in results:
            for (name, one), (_, two) in zip(result.tensors(), expected.tensors(), strict=True):
                assert_bitwise_equal(one, two, name=name)


@conv_cases([BLOCKS[1], ALL_ELSE, SMALL])
def test_backward_after_another_implementations_forward(case, either):
    """The argmax has one meaning: aten's serves the kernels' backward, and the kernels' serves aten's."""
    tensors = case.exact(torch.float32)
    input, weight, bias = tensors.values()
    output, argmax = cpu.conv2d_relu_max_pool2d(input, weight, bias, case.geometry, True)
    expected_output, expected = reference.conv2d_relu_max_pool2d_with_argmax(input, weight, bias, case.geometry)
    assert_same_values(output, expected_output)
    assert torch.equal(argmax, expected)
    grad = exact_grid(output.shape, torch.float32, terms=case.terms)
    mask = (True, True, True)
    first = cpu.conv2d_relu_max_pool2d_backward(grad, input, weight, expected, case.geometry, mask)
    second = reference.conv2d_relu_max_pool2d_backward(grad, input, weight, argmax, case.geometry, mask)
    for one, other in zip(first, second, strict=True):
        assert_same_values(one, other)


@pytest.mark.parametrize(
    ("images", "shape", "weight", "count", "reason"),
    [
        (32, (1, 32, 32), (6, 1, 5, 5), 2, None),
        (16, (6, 14, 14), (16, 6, 5, 5), 2, None),
        (8, (6, 14, 14), (16, 6, 5, 5), 2, "lanes"),
        (8, (6, 14, 14), (16, 6, 5, 5), 1, None),
        (1, (6, 14, 14), (16, 6, 5, 5), 2, "in training: KFLOP"),
        (7, (6, 14, 14), (16, 6, 5, 5), 2, None),
        (3, (64, 28, 28), (64, 64, 3, 3), 2, "MFLOP"),
        (64, (32, 13, 13), (64, 32, 3, 3), 2, None),
        (48, (32, 13, 13), (64, 32, 3, 3), 2, "lanes"),
        (17, (16, 64, 64), (6, 16, 5, 3), 2, None),
        (17, (16, 112, 112), (6, 16, 5, 3), 2, "lanes"),
        (32, (16, 112, 112), (6, 16, 5, 3), 2, None),
        (512, (64, 14, 14), (64, 64, 3, 3), 2, "in inference: library"),
        (512, (64, 14, 14), (64, 64, 1, 1), 2, None),
        (512, (128, 14, 14), (256, 128, 3, 3), 2, "library"),
        (16, (8, 32, 32), (16, 8, 15, 15), 2, "in inference: lanes"),
        (9, (1, 32, 32), (6, 1, 5, 5), 1, None),
        (16, (16, 32, 32), (16, 16, 7, 7), 2, "lanes"),
        (32, (16, 32, 32), (16, 16, 7, 7), 2, None),
        (0, (1, 32, 32), (6, 1, 5, 5), 2, None),
        (16, (64, 224, 224), (8, 64, 3, 3), 1, "memory"),
        (4, (3, 224, 224), (64, 3, 7, 7), 2, "in training: MFLOP"),
        (4, (64, 600, 600), (8, 64, 3, 3), 2, "memory"),
    ],
)
def test_what_is_rejected_by_its_size(images, shape, weight, count, reason):
    """With a reason each; more threads need more images."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    mode, _, expected = (reason or "").rpartition(": ")
    try:
        for save in (True, False):
            found = cpu.rejects(torch.empty(1).expand(images, *shape), torch.empty(weight), PLAIN, save)
            declined = reason is not None and mode != ("in inference" if save else "in training")
            assert expected in found if declined else found is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "declined"), [(7, False), (8, True)])
def test_what_is_rejected_by_its_layout(channels, declined):
    """In channels_last oneDNN reads 8 channels at a time, and then half-filled lanes are too few."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for images, format in ((16, torch.contiguous_format), (16, torch.channels_last), (32, torch.channels_last)):
            input = torch.empty(images, channels, 32, 32, memory_format=format)
            found = cpu.rejects(input, torch.empty(16, channels, 3, 3), PLAIN, True)
            assert (found is not None) is (declined and images == 16 and format == torch.channels_last)
        input = torch.empty(4, channels, 32, 32, memory_format=torch.channels_last)
        found = cpu.rejects(input, torch.empty(16, channels, 3, 3), PLAIN, False)
        assert (found is not None) is declined
        input = torch.empty(32, 64, 14, 14, memory_format=torch.channels_last)
        assert cpu.rejects(input, torch.empty(64, 64, 1, 1), PLAIN, False) is not None
    finally:
        torch.set_num_threads(before)


def test_what_is_rejected_by_its_kind():
    """With a reason each."""
    tensors = TOO_BIG_WINDOW.random(torch.float32)
    assert "255 cells" in cpu.rejects(tensors["input"], tensors["weight"], TOO_BIG_WINDOW.geometry, True)
    double = {name: tensor.double() for name, tensor in BLOCKS[2].random(torch.float32).items()}
    assert "float32" in cpu.rejects(double["input"], double["weight"], BLOCKS[2].geometry, True)


def test_another_default_device():
    """The kernels' own memory and tables lie on the CPU."""
    images, weight = torch.randn(17, 2, 11, 13), torch.randn(3, 2, 4, 3)
    with torch.device("meta"):
        actual, _ = cpu.conv2d_relu_max_pool2d(images, weight, None, PLAIN, False)
    torch.testing.assert_close(actual, F.max_pool2d(F.relu(F.conv2d(images, weight)), 2), rtol=1e-4, atol=1e-4)
