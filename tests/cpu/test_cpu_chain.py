"""Chains in one compiled function: the judge that single layers have, and what is a chain's own."""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.judge import assert_as_accurate, assert_bitwise_equal, assert_same_values
from harness.operators import stock_conv2d_relu_max_pool2d
from harness.poison import assert_fully_written, is_poison, poisoned_outputs
from harness.strides import awkward
from torch import Tensor

import fastlenet
from fastlenet import cpu, functional, ops, selection
from fastlenet.cpu import few, program
from fastlenet.cpu.plan import BYTES

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ALLOCATORS = ("fastlenet.cpu.memory:empty",)
PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
PADDED = PLAIN._replace(padding=(1, 1))
OVERLAPPING = PADDED._replace(groups=2, pool_size=(3, 3), pool_padding=(1, 1), ceil_mode=True)


class Network(NamedTuple):
    """A chain: the shape of an image, its links, and the shapes of the weights; maybe not every bias."""

    image: tuple[int, ...]
    links: tuple[ConvPoolGeometry | str, ...]
    weights: tuple[tuple[int, ...], ...]
    some_biases: bool = False

    def tensors(self, images: int, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        """Random images, and parameters as `torch.nn` would draw them."""
        generator = torch.Generator().manual_seed(seed)
        parameters: list[Tensor | None] = []
        for i, shape in enumerate(self.weights):
            bound = torch.Size(shape[1:]).numel() ** -0.5
            parameters.append((torch.rand(shape, generator=generator) * 2 - 1) * bound)
            bias = (torch.rand(shape[0], generator=generator) * 2 - 1) * bound
            parameters.append(None if self.some_biases and i % 2 else bias)
        return torch.randn(images, *self.image, generator=generator), parameters


NETWORKS = {
    "LeNet": Network(
        (1, 32, 32),
        (PLAIN, PLAIN, "linear_relu", "linear_relu", "linear"),
        ((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)),
    ),
    "three layers, one with padding": Network(
        (3, 12, 13), (PADDED, PADDED, "linear"), ((6, 3, 3, 3), (10, 6, 3, 3), (7, 90)), some_biases=True
    ),
    "overlapping pools and groups": Network(
        (2, 9, 10), (OVERLAPPING, PADDED, "linear_relu"), ((4, 1, 3, 2), (5, 4, 2, 3), (20, 45)), some_biases=True
    ),
    "convolutions": Network((1, 15, 13), (PLAIN, PADDED), ((6, 1, 3, 3), (4, 6, 3, 3))),
    "one convolution": Network((2, 8, 9), (PADDED,), ((4, 2, 3, 3),)),
    "many channels and a padding between": Network(
        (3, 13, 16),
        (
            PADDED._replace(padding=(2, 1)),
            PADDED._replace(padding=(2, 1), stride=(1, 2)),
            PLAIN._replace(padding=(1, 0)),
            "linear_relu",
            "linear",
        ),
        ((33, 3, 3, 3), (18, 33, 3, 3), (35, 18, 2, 1), (21, 70), (3, 21)),
        some_biases=True,
    ),
    "linear layers": Network((100,), ("linear_relu", "linear_relu", "linear"), ((200, 100), (33, 200), (3, 33))),
    "one linear layer with relu": Network((170,), ("linear_relu",), ((18, 170),)),
}
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
some_networks = pytest.mark.parametrize("network", list(NETWORKS.values())[:3], ids=list(NETWORKS)[:3])


def stock(input: Tensor, parameters: list[Tensor | None], links) -> Tensor:
    for i, place in enumerate(links):
        weight, bias = parameters[2 * i : 2 * i + 2]
        if isinstance(place, ConvPoolGeometry):
            g = place
            names = ("pool_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
            input = stock_conv2d_relu_max_pool2d(input, weight, bias, *g[:4], **dict(zip(names, g[4:], strict=True)))
        else:
            input = F.linear(input.flatten(1), weight, bias)
            input = F.relu(input) if place == "linear_relu" else input
    return input


def compiled(input, parameters, links, grad_output, mask=None):
    """Forward and backward with every allocation poisoned and guarded, which leave the operands as they were."""
    operands = [tensor for tensor in (input, *parameters, grad_output) if tensor is not None]
    before = [tensor.clone() for tensor in operands]
    mask = [tensor is not None for tensor in (input, *parameters)] if mask is None else mask
    with poisoned_outputs(allocators=ALLOCATORS) as poison:
        output, saved = cpu.chain(input, parameters, links, True)
        grads = cpu.chain_backward(grad_output, input, parameters, links, saved, mask)
        poison.assert_guards_intact()
    for tensor, values in zip(operands, before, strict=True):
        assert_bitwise_equal(tensor, values)
    assert not output._is_view()
    for name, tensor in (("output", output), *((f"gradient {i}", grad) for i, grad in enumerate(grads))):
        if tensor is not None:
            assert_fully_written(tensor, name=name)
    return output, grads


def stocks(input, parameters, links, grad_output, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (input, *parameters)]
    output = stock(leaves[0], leaves[1:], links)
    output.backward(grad_output.to(output.dtype))
    return output.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def judge(network: Network, input, parameters, grad_output) -> None:
    """As accurate as stock, against float64: the output, the input's gradient, and the parameters' taken together."""
    links = network.links
    trio = [
        compiled(input, parameters, links, grad_output),
        stocks(input, parameters, links, grad_output),
        stocks(input, parameters, links, grad_output, torch.float64),
    ]
    assert trio[0][0].stride() == trio[1][0].stride()
    assert_as_accurate(*(each[0] for each in trio), dtype=torch.float32, name="output")
    assert_as_accurate(*(each[1][0] for each in trio), dtype=torch.float32, name="gradient of input")
    # A few numbers say nothing: stock's error in them is luck. So all parameters' gradients stand in one vector.
    scales = [grad.square().mean().sqrt() for grad in trio[2][1][1:] if grad is not None]
    vectors = []
    for _, grads in trio:
        whole = [grad for grad in grads[1:] if grad is not None]
        dtype = whole[0].dtype
        vectors.append(torch.cat([(g.double() / s).flatten() for g, s in zip(whole, scales, strict=True)]).to(dtype))
    assert_as_accurate(*vectors, dtype=torch.float32, name="gradients of parameters")


@pytest.fixture
def divided(nothing_planned, monkeypatch):
    """Threads share the filters or outputs of any layer of one image, however small."""
    monkeypatch.setattr(few, "DIVIDED_WORK", 0)
    monkeypatch.setattr(few, "DIVIDED_BYTES", 0)


@networks
@pytest.mark.parametrize("images", [1, 3, 16, 37])
def test_chains(network, images):
    """At most twice stock's error, for less than a block, one block, and some."""
    input, parameters = network.tensors(images)
    many = torch.empty(512, *network.image)
    assert cpu.chain_covers(many, parameters, network.links) is None
    assert (cpu.chain_rejects(many, parameters, network.links) is None) == (len(network.image) == 3)
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    judge(network, input, parameters, grad_output)


@pytest.mark.parametrize(
    ("weights", "images", "save", "taken"),
    [
        ([(64, 100), (10, 64)], 32, False, False),  # matrices alone are PyTorch's
        ([(6, 1, 5, 5), (120, 1176), (10, 120)], 32, True, True),
        ([(6, 1, 5, 5), (512, 1176), (10, 512)], 32, False, False),
        ([(6, 1, 5, 5), (512, 1176), (10, 512)], 2, False, True),  # threads share a large matrix then
        ([(6, 1, 5, 5), (512, 1176), (10, 512)], 2, True, False),
        ([(6, 1, 5, 5), (60, 1176), (10, 60)], 2, True, True),
        ([(6, 1, 5, 5), (60, 1176), (10, 60)], 7, True, False),
    ],
)
def test_large_matrices_are_left_to_pytorch(weights, images, save, taken):
    """They took up to 15 times as long as stock's; the convolutions in front of them stay a chain."""
    parameters = [tensor for shape in weights for tensor in (torch.zeros(shape), None)]
    links = [PLAIN if len(shape) == 4 else "linear_relu" for shape in weights[:-1]]
    input = torch.zeros(images, 1, 32, 32) if len(weights[0]) == 4 else torch.zeros(images, weights[0][1])
    reason = cpu.chain_rejects(input, parameters, (*links, "linear"), save)
    assert (reason is None) == taken, reason
    if not taken:
        assert "PyTorch's own linear layers are" in reason


@pytest.mark.parametrize(
    ("weights", "size", "least"),
    [
        ([(6, 1, 5, 5), (16, 6, 5, 5)], 32, 8),  # LeNet's: few operations
        ([(32, 3, 3, 3), (32, 32, 3, 3)], 32, 8),
        ([(32, 3, 5, 5), (64, 32, 5, 5)], 40, 10),  # many
        ([(16, 16, 5, 5), (32, 16, 3, 3)], 24, 10),  # many input channels
    ],
)
def test_how_many_images_of_a_block_are_worth_a_call(weights, size, least, monkeypatch):
    """Eight of 16 lanes, on one of two threads, took up to 1.7 times as long as stock in large networks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    parameters = [tensor for shape in weights for tensor in (torch.zeros(shape), None)]
    input, links = torch.zeros(16, weights[0][1], size, size), [PLAIN] * len(weights)
    taken = [images for images in range(8, 17) if cpu.chain_rejects(input[:images], parameters, links, False) is None]
    assert taken == list(range(least, 17))


def test_the_convolutions_in_front_of_a_large_matrix_stay_a_chain():
    """Also where no graph is rewritten: a call of a chain is decided for its convolutions and its matrices apart."""
    shapes = (6, 1, 5, 5), (16, 6, 5, 5), (1200, 400), (10, 1200)
    parameters = [tensor for shape in shapes for tensor in (torch.randn(shape, requires_grad=True), None)]
    input, links = torch.randn(32, 1, 32, 32), (PLAIN, PLAIN, "linear_relu", "linear")
    output = functional.chain(input, parameters, links)
    waiting, names = [output.grad_fn], []
    for node in waiting:
        names.append(type(node).__name__)
        waiting += [before for before, _ in node.next_functions if before is not None]
    assert "ConvReLUMaxPool2d_ConvReLUMaxPool2dChainBackward" in names
    exact = stock(input.double(), [None if t is None else t.double() for t in parameters], links)
    assert_as_accurate(output, stock(input, parameters, links), exact, dtype=torch.float32, name="output")


@pytest.mark.parametrize("images", [3, 19])
def test_tiles_of_every_cpu(tiles, images):
    """Tiles are chosen by the CPU's registers; every choice is right on any CPU."""
    network = NETWORKS["many channels and a padding between"]
    input, parameters = network.tensors(images)
    judge(network, input, parameters, torch.randn(stock(input, parameters, network.links).shape))


@pytest.mark.parametrize("images", [3, 19])
def test_another_default_device(images, nothing_planned):
    """Tensors tell where a call runs; the device on which others are made does not."""
    network = NETWORKS["three layers, one with padding"]
    input, parameters = network.tensors(images)
    output, saved = cpu.chain(input, parameters, network.links, True)
    everything = [True] * (1 + len(parameters))
    expected = output, *cpu.chain_backward(output, input, parameters, network.links, saved, everything)
    nothing_planned()
    with torch.device("meta"):
        output, saved = cpu.chain(input, parameters, network.links, True)
        found = output, *cpu.chain_backward(output, input, parameters, network.links, saved, everything)
    for one, other in zip(found, expected, strict=True):
        if other is None:  # of a bias that is not there
            assert one is None
        else:
            assert_bitwise_equal(one, other)


@pytest.mark.wide
@networks
@pytest.mark.parametrize("images", [1, 3, 19])
def test_no_step_writes_beside_its_place_in_the_scratch(network, images, divided, monkeypatch):
    """Not even there where another place would begin that is not in use: all places lie apart here."""
    gap, made, seen = 64 * BYTES, [], 0

    class Apart(program.Scratch):
        def __init__(self, links):
            self.gaps: list[int] = []
            super().__init__(links)
            made.append(self)

        def take(self, size):
            self.gaps += [self.size] if self.size else []
            self.size += gap if self.size else 0
            return super().take(size)

    def run(steps, workers, tasks, each, units, rest):
        nonlocal seen
        work_off(steps, workers, tasks, each, units, rest)
        scratch, size = rest[program.SCRATCH - program.IMAGES], rest[program.SCRATCH_BYTES - program.IMAGES]
        assert size == made[-1].size
        for place in (scratch + worker * size + start for worker in range(workers) for start in made[-1].gaps):
            held = torch.frombuffer((ctypes.c_char * gap).from_address(place), dtype=torch.float32)
            assert is_poison(held).all()
            seen += 1

    work_off = program.run
    monkeypatch.setattr(program, "Scratch", Apart)
    monkeypatch.setattr(program, "run", run)
    input, parameters = network.tensors(images)
    compiled(input, parameters, network.links, torch.randn(stock(input, parameters, network.links).shape))
    assert seen


def test_more_blocks_than_parts():
    """The parts of a batch whose sums are kept apart have several blocks each."""
    network = NETWORKS["three layers, one with padding"]
    input, parameters = network.tensors(16 * 17 + 5)
    judge(network, input, parameters, torch.randn(len(input), 7))


@networks
@pytest.mark.parametrize("images", [2, 21])
def test_inference_is_training_without_a_record(network, images):
    """The same values, bit by bit, and nothing saved."""
    input, parameters = network.tensors(images)
    output, saved = cpu.chain(input, parameters, network.links, False)
    assert saved == []
    assert_bitwise_equal(output, cpu.chain(input, parameters, network.links, True)[0])


def test_convolutions_of_a_chain_are_those_of_layers():
    """Bit by bit."""
    network = NETWORKS["convolutions"]
    input, parameters = network.tensors(21)
    expected = input
    for i, geometry in enumerate(network.links):
        expected, _ = cpu.conv2d_relu_max_pool2d(expected, *parameters[2 * i : 2 * i + 2], geometry, False)
    assert_bitwise_equal(cpu.chain(input, parameters, network.links, False)[0], expected)


@some_networks
@pytest.mark.parametrize("images", [2, 21])
def test_some_gradients(network, images):
    """Those asked for equal, bit by bit, those of a call that asks for all; the others are not computed."""
    input, parameters = network.tensors(images)
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    _, everything = compiled(input, parameters, network.links, grad_output)
    there = [tensor is not None for tensor in (input, *parameters)]
    for wanted in itertools.chain(
        [[i] for i, present in enumerate(there) if present], [[0, 1], list(range(1, len(there))), [len(there) - 2]]
    ):
        mask = [present and i in wanted for i, present in enumerate(there)]
        _, grads = compiled(input, parameters, network.links, grad_output, mask)
        for i, grad in enumerate(grads):
            assert (grad is not None) == mask[i]
            if grad is not None:
                assert_bitwise_equal(grad, everything[i])
    _, none = compiled(input, parameters, network.links, grad_output, [False] * len(there))
    assert none == [None] * len(there)


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("which", ["input", "weights", "grad"])
@pytest.mark.parametrize("network", [NETWORKS["LeNet"], NETWORKS["convolutions"]], ids=["LeNet", "convolutions"])
@pytest.mark.parametrize("images", [2, 19])
def test_awkward_layouts(network, which, kind, images):
    """Any strides; a chain that ends in a convolution has stock's."""
    input, parameters = network.tensors(images)
    grad_output = torch.randn(stock(input, parameters, network.links).shape)

    def laid_out(tensor: Tensor) -> Tensor:
        return awkward(tensor, kind) if tensor.dim() == 4 or kind != "channels_last" else tensor

    if which == "input":
        input = laid_out(input)
    elif which == "weights":
        if kind == "expanded":
            pytest.skip("a network of equal filters has nothing but ties")
        parameters = [None if tensor is None else laid_out(tensor) for tensor in parameters]
    else:
        grad_output = laid_out(grad_output)
    judge(network, input, parameters, grad_output)


@pytest.mark.parametrize("images", [2, 19])
def test_a_gradient_that_is_negated_lazily(images):
    """PyTorch's complex numbers make such tensors: their memory holds the other sign."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(images)
    leaves = [tensor.requires_grad_() for tensor in (input, *parameters) if tensor is not None]
    with fastlenet.use_backend("cpu"):
        output = fastlenet.functional.chain(input, parameters, network.links)
    upstream = torch.randn(output.shape)
    negated, plain = (
        torch.autograd.grad(output, leaves, grad, retain_graph=True) for grad in (torch._neg_view(upstream), -upstream)
    )
    for actual, expected in zip(negated, plain, strict=True):
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("filters", [(1, 6), (4, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("pooled", [1, 2])
@pytest.mark.parametrize("which", ["input", "first weight", "second weight"])
@pytest.mark.parametrize("images", [2, 19])
def test_layout_of_what_a_chain_of_convolutions_returns(filters, pooled, which, images):
    """Stock's strides: a single filter loses channels_last, and a pooled image of one pixel keeps its strides.

    Each operand's layout is its own: one weight in channels_last does not make the images be read so.
    """
    size = 4 + 6 * pooled
    network = Network((2, size, size), (PLAIN, PLAIN), ((filters[0], 2, 3, 3), (filters[1], filters[0], 3, 3)))
    input, parameters = network.tensors(images)
    tensors = {"input": input, "first weight": parameters[0], "second weight": parameters[2]}
    laid_out = {name: t.contiguous(memory_format=torch.channels_last) for name, t in tensors.items() if name == which}
    input, parameters[0], parameters[2] = (tensors | laid_out).values()
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    output, grads = compiled(input, parameters, network.links, grad_output)
    expected, expected_grads = stocks(input, parameters, network.links, grad_output)
    assert output.stride() == expected.stride()
    torch.testing.assert_close([output, *grads], [expected, *expected_grads], rtol=1e-4, atol=1e-5)


DIVIDED = NETWORKS["many channels and a padding between"]


@pytest.mark.parametrize(
    ("network", "images"),
    [*itertools.product(list(NETWORKS.values())[:3], [5, 16 * 5 + 3]), (DIVIDED, 1)],
    ids=lambda value: str(value) if isinstance(value, int) else next(n for n in NETWORKS if NETWORKS[n] is value),
)
def test_bitwise_equal_for_any_number_of_threads(network, images, divided):
    """And from run to run. Threads share images, or the filters of one."""
    input, parameters = network.tensors(images)
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(compiled(input, parameters, network.links, grad_output))
    finally:
        torch.set_num_threads(before)
    for output, grads in results[1:]:
        assert_bitwise_equal(output, results[0][0])
        for one, other in zip(grads, results[0][1], strict=True):
            if one is not None:
                assert_bitwise_equal(one, other)


def test_threads_share_the_filters_of_one_image(divided, monkeypatch):
    """A layer of several vectors of filters is a stage of its own, whose last vector has fewer; and a linear layer."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    input, parameters = DIVIDED.tensors(1)
    weights = tuple(weight.shape for weight in parameters[::2])
    stages = few._forward(tuple(input.shape[1:]), weights, DIVIDED.links, True, True).stages
    assert [(stage.units, stage.filters) for stage in stages] == [
        (0, 0),
        (3, 33),
        (0, 0),
        (2, 18),
        (0, 0),
        (3, 35),
        (0, 0),
        (2, 21),
        (0, 0),
        (1, 3),
        (0, 0),
    ]
    judge(DIVIDED, input, parameters, torch.randn(stock(input, parameters, DIVIDED.links).shape))


def test_several_python_threads():
    """Each computes what it computes alone."""
    network = NETWORKS["LeNet"]
    calls = []
    for seed in range(3):
        input, parameters = network.tensors(50, seed)
        calls.append((input, parameters, network.links, torch.randn(50, 10)))
    mask = [True] * 11

    def once(input, parameters, links, grad_output):
        output, saved = cpu.chain(input, parameters, links, True)
        return [output, *cpu.chain_backward(grad_output, input, parameters, links, saved, mask)]

    alone = [once(*call) for call in calls]
    together: list[list[list[Tensor]]] = [[] for _ in calls]

    def work(i: int) -> None:
        together[i] += [once(*calls[i]) for _ in range(4)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 4
        for result in results:
            for one, other in zip(result, expected, strict=True):
                assert_bitwise_equal(one, other)


def test_empty_batch():
    """The output is empty and the gradients of the parameters are zero."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(0)
    output, saved = cpu.chain(input, parameters, network.links, True)
    assert output.shape == (0, 10)
    grads = cpu.chain_backward(output, input, parameters, network.links, saved, [True] * 11)
    for grad, tensor in zip(grads, [input, *parameters], strict=True):
        assert_same_values(grad, torch.zeros_like(tensor), allow_empty=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("images", [3, 18])
def test_an_image_that_is_not_finite_spoils_its_own_results_alone(value, images):
    """NaN stays NaN through relu and pool as in stock, and reaches no other image."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(images)
    input[-1, 0, 10, 10] = value
    expected = stock(input.double(), [p.double() for p in parameters], network.links)
    output, saved = cpu.chain(input, parameters, network.links, True)
    assert torch.equal(output.isfinite(), expected.isfinite())
    grads = cpu.chain_backward(torch.ones(images, 10), input, parameters, network.links, saved, [True] * 11)
    assert bool(grads[0][:-1].isfinite().all())


@pytest.mark.parametrize("images", [1, 5, 64])
def test_what_is_saved(images):
    """At most 12,800 bytes an image, the input included."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(images)
    _, saved = cpu.chain(input, parameters, network.links, True)
    assert sum(t.numel() * t.element_size() for t in (*saved, input)) // images <= 12_800


def test_what_is_rejected(monkeypatch):
    """With a reason each."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(64)
    assert "float32" in cpu.chain_rejects(input.double(), parameters, network.links)
    assert cpu.chain_rejects(input[:1], parameters, network.links) is None
    assert cpu.chain_rejects(input[:1], parameters, network.links, save=False) is None
    wide = Network((32, 40, 40), (PADDED, PADDED), ((64, 32, 3, 3), (32, 64, 3, 3)))
    input, parameters = wide.tensors(4)
    calls = ((1, 1, False), False), ((2, 1, False), False), ((2, 4, False), False)
    calls += ((8, 1, False), True), ((2, 3, False), True), ((2, 1, True), True)
    for (threads, images, save), rejected in calls:
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        reason = cpu.chain_rejects(input[:images], parameters, wide.links, save)
        assert ("MFLOP" in reason) if rejected else reason is None, (threads, images, save)
    small = Network((20,), ("linear_relu", "linear"), ((9, 20), (3, 9)))
    input, parameters = small.tensors(64)
    assert "16 inputs" in cpu.chain_rejects(input, parameters, small.links)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["weight", "gradient", "pixel"])
@pytest.mark.parametrize("network", [NETWORKS["convolutions"]], ids=["convolutions"])
def test_what_is_not_finite_goes_where_stock_has_it(network, where, value):
    """Of one image, too, whose unused lanes hold products of zero with what is not finite."""
    input, parameters = network.tensors(2)
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    {"weight": parameters[2], "gradient": grad_output, "pixel": input}[where][1, 0, 1, 1] = value
    _, grads = compiled(input, parameters, network.links, grad_output)
    _, expected = stocks(input, parameters, network.links, grad_output, torch.float64)
    for one, other in zip(grads, expected, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("images", [2, 19])
def test_a_weight_that_is_not_finite_spoils_only_pixels_that_meet_it(images, value):
    """No pixel of the input is multiplied by it across the edge: those of the first row and column never meet it."""
    network = Network((2, 8, 9), (PLAIN,), ((4, 2, 3, 3),))
    input, parameters = network.tensors(images)
    parameters[0][1, 0, 1, 1] = value
    grad_output = torch.randn(stock(input, parameters, network.links).shape)
    _, (grad, *_) = compiled(input, parameters, network.links, grad_output)
    _, (expected, *_) = stocks(input, parameters, network.links, grad_output, torch.float64)
    assert torch.equal(grad.isfinite(), expected.isfinite())
    assert bool(grad[:, 0, 0].isfinite().all())
    assert not bool(grad[:, 0, 1].isfinite().all())


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("images", [9, 19])
def test_lanes_that_are_no_image_reach_no_gradient(images, where):
    """An image of zeros meets infinite parameters otherwise than a real one: its gradients would be NaN.

    Infinite activations of real images have a gradient above zero, so that stock has infinities and no NaN there; or
    relu stops all real images, so that stock has zeros.
    """
    links, shapes = ("linear_relu", "linear_relu", "linear"), ((20, 18), (33, 20), (5, 33))
    parameters = [torch.ones(shape) / shape[-1] for weight in shapes for shape in (weight, weight[:1])]
    if where == "bias":
        parameters[1][3] = parameters[3][2] = float("inf")
    else:
        parameters[1].zero_()
        parameters[2][4] = -float("inf")
    input, grad_output = torch.ones(images, 18), torch.ones(images, 5)
    output, grads = compiled(input, parameters, links, grad_output)
    expected, expected_grads = stocks(input, parameters, links, grad_output)
    assert not any(bool(grad.isnan().any()) for grad in expected_grads[-4:])
    assert bool(torch.cat([expected.flatten(), *(grad.flatten() for grad in expected_grads)]).isinf().any()) == (
        where == "bias"
    )
    for actual, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert_same_values(actual.isnan(), wanted.isnan())
        assert_same_values(actual.isinf(), wanted.isinf())


def test_lanes_that_are_no_filter_reach_no_gradient():
    """An infinite gradient times the zero weights of missing channels is NaN in lanes that are no filter.

    All weights and pixels are positive, so that stock has infinities in the input's gradient, and no NaN.
    """
    network = Network((1, 14, 14), (PLAIN, PLAIN), ((6, 1, 3, 3), (4, 6, 3, 3)))
    input, parameters = network.tensors(2)
    input, parameters = input.abs(), [tensor.abs() for tensor in parameters]
    grad_output = torch.rand(stock(input, parameters, network.links).shape)
    grad_output[1, 1, 1, 0] = float("inf")
    _, grads = compiled(input, parameters, network.links, grad_output)
    _, expected = stocks(input, parameters, network.links, grad_output, torch.float64)
    assert bool(expected[0].isinf().any())
    for one, other in zip(grads, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.isinf(), other.isinf())


def test_many_images_one_by_one_are_those_of_blocks():
    """To rounding: the two forms are told apart by the number of images alone."""
    network = NETWORKS["LeNet"]
    input, parameters = network.tensors(8)
    assert few.takes(few.MOST_IMAGES, network.links)
    assert not few.takes(8, network.links)
    together, _ = cpu.chain(input, parameters, network.links, False)
    apart = torch.cat([cpu.chain(image, parameters, network.links, False)[0] for image in input.split(3)])
    torch.testing.assert_close(together, apart)
    assert_bitwise_equal(
        apart[3:6], torch.cat([cpu.chain(i, parameters, network.links, False)[0] for i in input[3:6].split(1)])
    )


@pytest.mark.parametrize(
    ("network", "shapes", "apart_at_1"),
    [
        (Network((1, 6, 6), (PLAIN, "linear"), ((3, 1, 3, 3), (2, 12))), [(1, 6, 6)], False),
        # One image of the two convolutions in front is a chain for kernels.
        (
            Network((1, 14, 14), (PLAIN, PLAIN, "linear"), ((4, 1, 3, 3), (3, 4, 3, 3), (2, 12))),
            [(1, 14, 14), (1, 14, 14), (4, 6, 6)],
            True,
        ),
    ],
    ids=["a convolution", "two convolutions"],
)
def test_links_are_decided_for_the_number_of_images_that_they_get(network, shapes, apart_at_1) -> None:
    """A chain that no kernel takes runs part by part only if a kernel takes one of the parts."""
    for images, apart in ((1, apart_at_1), (64, True)):
        input, parameters = network.tensors(images)
        parts = ops.CHAIN.parts(network.links, input, *parameters)
        assert [tuple(tensors[0].shape) for _, _, tensors in parts] == [(images, *shape) for shape in shapes]
        known = selection.find(ops.CHAIN, network.links, (input, *parameters), differentiable=True)
        assert known is not None
        compose, _ = known.form
        assert (compose == ops.CHAIN.quick) != apart
