"""Chains: a row of operators as one, with the results and derivatives of the row."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastlenet
from fastlenet.functional import chain

pytestmark = pytest.mark.usefixtures("either")

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
OTHER = PLAIN._replace(padding=(1, 0), pool_size=(3, 2), pool_stride=(2, 2))
ROWS = {
    "one convolution": ((PLAIN,), [(3, 2, 3, 3)]),
    "two": ((PLAIN, OTHER), [(3, 2, 3, 3), (4, 3, 3, 2)]),
    "and a linear map": ((PLAIN, "linear"), [(3, 2, 3, 3), (5, 90)]),
    "a network": (
        (PLAIN, OTHER, "linear_relu", "linear_relu", "linear"),
        [(3, 2, 3, 3), (4, 3, 3, 2), (6, 16), (5, 6), (2, 5)],
    ),
    "relu last": ((PLAIN, "linear_relu"), [(3, 2, 3, 3), (5, 90)]),
    "linear maps": (("linear_relu", "linear_relu", "linear_relu"), [(5, 6), (4, 5), (3, 4)]),
}
rows = pytest.mark.parametrize("row", ROWS)


def made(row, dtype=torch.float64, images=3, bias=True):
    torch.manual_seed(0)
    links, shapes = ROWS[row]
    size = (2, 14, 13) if isinstance(links[0], ConvPoolGeometry) else (shapes[0][1],)
    input = torch.randn(*(() if images is None else (images,)), *size, dtype=dtype, requires_grad=True)
    parameters = []
    for shape in shapes:
        parameters.append(torch.randn(shape, dtype=dtype, requires_grad=True))
        parameters.append(torch.randn(shape[0], dtype=dtype, requires_grad=True) if bias else None)
    return input, parameters, links


def stock(input, parameters, links):
    convolved = False
    for link, weight, bias in zip(links, parameters[::2], parameters[1::2], strict=True):
        if isinstance(link, ConvPoolGeometry):
            input, convolved = F.max_pool2d(F.relu(F.conv2d(input, weight, bias, *link[:4])), *link[4:]), True
        else:
            input = F.linear(input.flatten(-3) if convolved else input, weight, bias)
            input, convolved = input if link == "linear" else F.relu(input), False
    return input


def agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@rows
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("images", [None, 0, 1, 3])
def test_values_and_gradients(row, images, bias):
    input, parameters, links = made(row, images=images, bias=bias)
    leaves = [tensor for tensor in (input, *parameters) if tensor is not None]
    results = []
    for function in (chain, stock):
        output = function(input, parameters, links)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    agree(*results)
    # F.linear of a single sample is one, which may be modified all the same.
    assert chain(input, parameters, links)._is_view() <= stock(input, parameters, links)._is_view()


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(range(11), n)], ids=str)
def test_each_set_of_gradients(wanted):
    input, parameters, links = made("a network")
    leaves = [input, *parameters]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    chosen = [leaves[index] for index in wanted]
    agree(*(torch.autograd.grad(f(input, parameters, links).square().sum(), chosen) for f in (chain, stock)))


@rows
def test_derivatives_to_second_order_and_forward_mode(row):
    input, parameters, links = made(row, images=2)

    def function(*tensors):
        return chain(tensors[0], tensors[1:], links)

    assert torch.autograd.gradcheck(
        function, (input, *parameters), check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(function, (input, *parameters), fast_mode=True)


def test_per_sample_gradients():
    fused, plain = fastlenet.LeNet().double(), fastlenet.StockLeNet().double()
    plain.load_state_dict(fused.state_dict())
    images, labels = torch.randn(3, 1, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])

    def per_sample(network):
        parameters = {name: value.detach() for name, value in network.named_parameters()}

        def loss(parameters, image, label):
            return F.cross_entropy(functional_call(network, parameters, (image[None],)), label[None])

        return vmap(grad(loss), (None, 0, 0))(parameters, images, labels)

    agree(per_sample(fused), per_sample(plain))


def test_a_graph_made_before_may_be_mapped():
    """A Jacobian by vmap over `torch.autograd.grad`."""
    input, parameters, links = made("a network")

    def jacobian(function):
        output = function(input, parameters, links)
        basis = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
        return vmap(lambda v: torch.autograd.grad(output, input, v, retain_graph=True)[0])(basis)

    agree(jacobian(chain), jacobian(stock))


@pytest.mark.cheap
def test_batched_gradients():
    """`is_grads_batched` maps with tensors of its own kind, which kernels cannot read."""
    input, parameters, links = made("a network")
    results = []
    for function in (chain, stock):
        output = function(input, parameters, links)
        basis = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
        results.append(torch.autograd.grad(output, [input, *parameters], basis, is_grads_batched=True))
    agree(*results)


@pytest.mark.parametrize("row", ["two", "a network"])
def test_an_output_may_be_modified_in_place(row):
    """Where no relu is last, as in stock."""
    input, parameters, links = made(row)
    results = []
    for function in (chain, stock):
        output = function(input, parameters, links)
        output += 1
        results.append(torch.autograd.grad(output.square().sum(), [input, *parameters]))
    agree(*results)


@rows
def test_flops_are_counted_as_stocks(row):
    input, parameters, links = made(row)
    totals = []
    for function in (chain, stock):
        with FlopCounterMode(display=False) as counter:
            function(input, parameters, links).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_one_node_says_which_operators_stand_there(either):
    input, parameters, links = made("relu last")
    name = type(chain(input, parameters, links).grad_fn).__name__
    assert name == ("ConvReLUMaxPool2d_LinearReLUChainBackward" if either == "kernels" else "ReluBackward0")


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ((), "links are convolutions"),
        (("linear_relu", PLAIN), "links are convolutions"),
        (("linear", "linear_relu"), "links are convolutions"),
        (("softmax",), "links are convolutions"),
        ((PLAIN, PLAIN), "2 links have 4 parameters, but got 2"),
    ],
)
def test_links_that_do_not_fit(links, message):
    with pytest.raises(RuntimeError, match=message):
        chain(torch.randn(2, 1, 8, 8), [torch.randn(3, 1, 3, 3), None], links)


def test_operands_that_do_not_fit():
    input, parameters, links = made("a network")
    with pytest.raises(TypeError, match=r"argument 'weight2' must be Tensor, not NoneType"):
        chain(input, [*parameters[:2], None, *parameters[3:]], links)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied.*weight3 of size \[6, 17\]"):
        chain(input, [*parameters[:4], torch.randn(6, 17, dtype=torch.float64), *parameters[5:]], links)
    with pytest.raises(RuntimeError, match=r"bias5 to have a number for each.*bias5 of size \[3\]"):
        chain(input, [*parameters[:9], torch.randn(3, dtype=torch.float64)], links)
    with pytest.raises(RuntimeError, match=r"3D \(unbatched\) or 4D"):
        chain(input[0, 0], parameters, links)
    with pytest.raises(RuntimeError, match="same dtype"):
        chain(input.float(), parameters, links)


class Doubled(nn.Module):
    """Used as a parametrization."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("what", [
    "nothing", "hook", "pre-hook", "backward hook", "parametrization", "another layer", "another forward",
    "global hook", "a geometry that is a list",
])  # fmt: skip
def test_lenet_is_a_chain_unless_a_layer_is_watched_or_changed(what, either):
    torch.manual_seed(0)
    fused, plain = fastlenet.LeNet().double(), fastlenet.StockLeNet().double()
    plain.load_state_dict(fused.state_dict())
    seen, handle = [], None
    if what == "hook":
        fused.conv2.register_forward_hook(lambda *_: seen.append(1))
    elif what == "pre-hook":
        fused.fc1.register_forward_pre_hook(lambda *_: seen.append(1))
    elif what == "backward hook":
        fused.fc3.register_full_backward_hook(lambda *_: seen.append(1))
    elif what == "parametrization":
        for network in (fused, plain):
            nn.utils.parametrize.register_parametrization(network.fc1, "weight", Doubled())
    elif what == "another layer":
        fused.fc2 = nn.Sequential(nn.Linear(120, 84).double(), nn.ReLU())
        fused.fc2[0].load_state_dict(plain.fc2.state_dict())
    elif what == "another forward":
        forward = fused.conv1.forward
        fused.conv1.forward = lambda input: seen.append(1) or forward(input)
    elif what == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    elif what == "a geometry that is a list":
        fused.conv1.pool_size = [2, 2]
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    try:
        output = fused(images)
    finally:
        if handle is not None:
            handle.remove()
    expected = plain(images)
    whole = type(output.grad_fn).__name__.endswith("ChainBackward")
    assert whole == (what == "nothing" and either == "kernels")
    for result in (output, expected):
        result.square().sum().backward()
    agree([output], [expected])
    if what != "parametrization":
        agree(list(grads(fused)), list(grads(plain)))
    assert bool(seen) == (what.endswith(("hook", "another forward")))


def grads(network):
    return (parameter.grad for parameter in network.parameters())


@pytest.mark.parametrize("row", ["a network", "relu last", "linear maps"])
@pytest.mark.parametrize("wanted", ["all", "input", "biases", "last", "linear"])
def test_a_backward_raises_after_a_modification_if_stocks_does(row, wanted):
    """Stock saves no bias, and of what is frozen next to nothing."""
    count = len(made(row)[1])
    needs = {
        "all": range(count + 1),
        "input": [0],
        "biases": range(2, count + 1, 2),
        "last": [count - 1],
        "linear": range(count - 3, count + 1),
    }[wanted]
    for modified in range(count + 1):
        raised = []
        for function in (chain, stock):
            input, parameters, links = made(row)
            operands = [input, *parameters]
            for place, operand in enumerate(operands):
                operand.requires_grad_(place in needs)
            output = function(input, parameters, links)
            with torch.no_grad():
                operands[modified].mul_(1.0)
            try:
                torch.autograd.grad(output.sum(), [operands[place] for place in needs])
                raised.append(None)
            except RuntimeError as error:
                raised.append("modified by an inplace operation" in str(error))
        assert raised[0] == raised[1], modified


def test_derivatives_of_higher_order_notice_a_modified_bias(either):
    """They compute the forward again; stock's own do not."""
    input, parameters, links = made("a network")
    output = chain(input, parameters, links)
    with torch.no_grad():
        parameters[1].add_(1.0)
    raises = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with raises if either == "kernels" else contextlib.nullcontext():
        torch.autograd.grad(output.sum(), input, create_graph=True)


@pytest.mark.cheap
def test_data_that_becomes_another_tensor_after_the_forward():
    """Gradients are stock's, whose linear maps use the data that the forward saw."""
    for changed in range(len(made("a network")[1])):
        results = []
        for function in (chain, stock):
            input, parameters, links = made("a network")
            output = function(input, parameters, links)
            parameters[changed].data = torch.ones_like(parameters[changed])
            results.append(torch.autograd.grad(output.sum(), [input, *parameters]))
        agree(*results)


@pytest.mark.parametrize("shape", [(1,), (3, 84), (1, 84), ()], ids=str)
def test_lenet_with_a_bias_that_stock_broadcasts(shape):
    torch.manual_seed(0)
    fused, stock_network, images = fastlenet.LeNet(), fastlenet.StockLeNet(), torch.randn(3, 1, 32, 32)
    stock_network.load_state_dict(fused.state_dict())
    fused.fc2.bias = nn.Parameter(torch.randn(shape))
    stock_network.fc2.bias = nn.Parameter(fused.fc2.bias.detach().clone())
    for network in (fused, stock_network):
        network(images).sum().backward()
    torch.testing.assert_close(fused(images), stock_network(images))
    torch.testing.assert_close(fused.fc2.bias.grad, stock_network.fc2.bias.grad)


@pytest.mark.parametrize("images", [1, 3])
def test_few_images_behind_a_weight_in_channels_last(images):
    """Its results are in channels_last, which matrix products of the convolution behind it do not take."""
    input, parameters, links = made("two", torch.float32, images)
    parameters[0] = parameters[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [input, *parameters]
    results = []
    for function in (chain, stock):
        output = function(input, parameters, links)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
