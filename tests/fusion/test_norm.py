"""Convolution, BatchNorm in training mode, relu and max-pool: stock's numbers, strides and running statistics."""

from __future__ import annotations

import copy
import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness.judge import assert_as_accurate
from harness.operators import saved_for_backward
from harness.poison import poisoned_outputs
from torch import nn

import fastlenet
from fastlenet import cpu, private
from fastlenet.fusion.patterns import NORM

IMAGES = torch.randn(4, 3, 13, 11, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution of a few channels, a BatchNorm whose scales are of both signs and zero, relu and a pool."""

    def __init__(self, channels=21, late=False, inplace=False, pool=None, **norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels, **norm)
        self.relu, self.pool, self.late = nn.ReLU(inplace), nn.MaxPool2d(**(pool or {"kernel_size": 2})), late
        if self.norm.affine:
            with torch.no_grad():
                self.norm.weight.copy_(torch.linspace(-1, 1, channels))
                self.norm.weight[channels // 2] = 0
                self.norm.bias.uniform_(-1, 1)

    def forward(self, images):
        maps = self.norm(self.conv(images))
        return self.relu(self.pool(maps)) if self.late else self.pool(self.relu(maps))


class Two(nn.Module):
    """Two such rows and a view of the result, which needs stock's strides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(8), Net(5)
        self.second.conv = nn.Conv2d(8, 5, 3)

    def forward(self, images):
        return self.second(self.first(images)).view(-1, 10)


class Shared(nn.Module):
    """One BatchNorm behind two convolutions, called as a function with one tensor for scale and shift."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.norm.bias = None

    def forward(self, images):
        for convolution in (self.first, self.second):
            norm = self.norm
            maps = F.batch_norm(
                convolution(images), norm.running_mean, norm.running_var, norm.weight, norm.weight, self.training
            )
            images = F.max_pool2d(F.relu(maps), 2)
        return images


FORMS = {
    "plain": Net,
    "shared": Shared,
    "weight_frozen": lambda: _frozen(Net(), "norm.weight"),
    "deep": lambda: _convolving(24, 40, 5, padding=2),
    "groups": lambda: _convolving(24, 21, 3, groups=3, padding=1),
    "relu_behind": lambda: Net(late=True),
    "in_place": lambda: Net(inplace=True),
    "whole_vectors": lambda: Net(32),
    "one_channel": lambda: Net(1),
    "without_weight": lambda: Net(affine=False),
    "without_statistics": lambda: Net(track_running_stats=False),
    "another_momentum": lambda: Net(momentum=0.7, eps=0.1),
    "no_momentum": lambda: Net(momentum=0.0),
    "overlap": lambda: Net(pool={"kernel_size": 3, "stride": (2, 1), "padding": 1, "ceil_mode": True}),
    "dilation": lambda: Net(pool={"kernel_size": (2, 3), "stride": 1, "dilation": (2, 1)}),
    "gaps": lambda: Net(pool={"kernel_size": 1, "stride": 3}),
    "one_window": lambda: Net(pool={"kernel_size": (13, 11)}),
    "channels_last": lambda: Net().to(memory_format=torch.channels_last),
    "bias_frozen": lambda: _frozen(Net(), "norm.bias"),
    "weights_frozen": lambda: _frozen(Net(), "conv.weight", "conv.bias"),
    "two": Two,
}


def _convolving(between, channels, kernel, **options):
    """Two convolutions, the second one as given."""
    model = Net(channels)
    model.conv = nn.Sequential(nn.Conv2d(3, between, 3, padding=1), nn.Conv2d(between, channels, kernel, **options))
    return model


def _frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def outcome(model, images=IMAGES):
    """Output, gradients and running statistics of one step."""
    images = in_dtype_of(model, images).clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(images)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    wanted = {"input": images, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(output, list(wanted.values()), upstream)
    return {
        "output": output.detach(),
        **dict(zip(wanted, grads, strict=True)),
        **copy.deepcopy(dict(model.named_buffers())),
    }


def in_dtype_of(net, tensor):
    return tensor.to(next(net.parameters()).dtype)


def judge(compute, fused, stock):
    """Hold the tensors that `compute` makes of a model, by name, against stock's and against stock's in float64."""
    exact, magnitudes = copy.deepcopy(stock).double(), {}
    for name, module in exact.named_modules() if compute is outcome else ():
        if isinstance(module, nn.Conv2d):
            # BatchNorm takes the mean away: the bias's gradient is what rounding leaves of a sum of these.
            module.register_full_backward_hook(
                lambda _, __, grads, name=f"{name}.bias": magnitudes.update({name: grads[0].abs().sum((0, 2, 3))})
            )
    actual, expected, reference = (compute(net) for net in (fused, stock, exact))
    assert list(actual) == list(expected)
    for name, value in actual.items():
        if name.endswith("num_batches_tracked"):
            assert value == expected[name]
            continue
        assert_as_accurate(
            value.detach(), expected[name].detach(), reference[name].detach(), dtype=torch.float32,
            magnitude=magnitudes.get(name), allow_zero=True, name=name,
        )  # fmt: skip


def sites(model):
    return [(site.operator, site.implementation) for site in fastlenet.explain(model, IMAGES).sites]


@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_stock(form, compiled):
    stock = FORMS[form]()
    fused = fastlenet.fuse(copy.deepcopy(stock), inplace=True)
    number = 2 if form in ("two", "shared") else 1
    assert sites(fused) == [(NORM, "cpu")] * number
    with poisoned_outputs(allocators=("fastlenet.cpu.memory:empty",)) as poison:
        judge(outcome, fused, stock)
        poison.assert_guards_intact()
    assert fused(IMAGES).stride() == stock(IMAGES).stride()


LAYOUTS = {
    "few": ({"out_channels": 32, "kernel_size": 3}, True, True),
    "long_sums": ({"out_channels": 31, "kernel_size": (3, 32)}, True, False),
    "long_sums_of_the_gradient": ({"out_channels": 33, "kernel_size": 3}, True, False),
    "without_a_gradient": ({"out_channels": 33, "kernel_size": 3}, False, True),
    "groups": ({"out_channels": 21, "kernel_size": 3, "groups": 3}, True, False),
    "strided": ({"out_channels": 21, "kernel_size": 3, "stride": 2}, True, True),
    "strided_pixels": ({"out_channels": 21, "kernel_size": 1, "stride": (1, 2)}, True, False),
    "strided_columns": ({"out_channels": 21, "kernel_size": (3, 1), "stride": (2, 1)}, True, False),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_convolution_changes_its_layout_only_where_that_is_as_good(case, compiled, graphs):
    """In channels_last long sums and groups are less accurate, and stock's strided narrow kernels overrun memory."""
    options, needed, relaid = LAYOUTS[case]
    model = Net(options["out_channels"], pool={"kernel_size": 1})
    model.conv = nn.Conv2d(3, **options)
    images = torch.randn(2, 3, 6, 40).requires_grad_(needed)
    judge(lambda net: {"output": net(in_dtype_of(net, images))}, fastlenet.fuse(model), model)
    [code] = graphs
    before, _, after = code.partition("torch.conv2d")
    assert (before.count("channels_last"), after.count("channels_last")) == ((2, 0) if relaid else (0, 1))


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_checkpoints(momentum, compiled):
    """Around the fused model and inside it: the statistics are updated as often as in stock."""
    from torch.utils.checkpoint import checkpoint

    class Inside(Net):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    for make, call in ((Inside, Net.__call__), (Net, partial(checkpoint, use_reentrant=False))):

        def step(net, call=call):
            call(net, in_dtype_of(net, IMAGES)).sum().backward()
            return {"weight": net.norm.weight.grad, **dict(net.named_buffers())}

        stock = make(momentum=momentum)
        judge(step, fastlenet.fuse(copy.deepcopy(stock), inplace=True), stock)
        assert stock.norm.num_batches_tracked == 2


def test_momentum_none_is_the_average_of_all_batches(compiled):
    stock = Net(momentum=None)
    fused = fastlenet.fuse(copy.deepcopy(stock), inplace=True)
    for number in (1, 2, 3):
        for net in (stock, fused):
            net(number * IMAGES)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(stock.named_buffers()))


def test_tensors_modified_before_the_backward(compiled):
    """An error for the weight, which is needed; none for the bias and the output, which are not."""

    def modified(name, net):
        output = net(in_dtype_of(net, IMAGES))
        with torch.no_grad():
            (output if name is None else net.get_parameter(name)).mul_(2)
        return {"weight": torch.autograd.grad(output.sum(), net.norm.weight)[0]}

    for net in (Net(), fastlenet.fuse(Net(), inplace=True)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            modified("norm.weight", net)
    for name in ("norm.bias", None):
        judge(partial(modified, name), fastlenet.fuse(Net(), inplace=True), Net())


def test_hooks_on_saved_tensors_may_change_strides(compiled):
    def copied(tensor):
        return tensor if tensor.dim() < 2 else tensor.mT.contiguous().mT

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda tensor: tensor):
        judge(outcome, fastlenet.fuse(Net(), inplace=True), Net())


@pytest.mark.parametrize("only", ["", "slopes"])
def test_a_kernel_that_cannot_be_had_leaves_the_call_to_stock(only, compiled, monkeypatch, caplog):
    """In the forward or the backward: one log line, and the statistics are updated once."""
    from fastlenet.cpu import compiled as compiler

    def broken(module, factory, constants, stem):
        if only in stem:
            raise OSError("broken here")
        return found(module, factory, constants, stem)

    found = compiler._found
    monkeypatch.setattr(compiler, "_found", broken)
    monkeypatch.setattr(compiler, "_failure", None)
    compiler.address.cache_clear()
    fused = fastlenet.fuse(Net(), inplace=True)
    try:
        # Stock's BatchNorm then runs on what the convolution gives, which is channels_last already.
        judge(outcome, fused, Net().to(memory_format=torch.channels_last))
    finally:
        compiler.address.cache_clear()
    assert [record.levelname for record in caplog.records if record.name == "fastlenet"] == ["WARNING"]
    [site] = fastlenet.explain(fused, IMAGES).sites
    assert site.implementation == "stock"
    assert "OSError: broken here" in site.reason


def test_values_that_are_not_numbers(compiled):
    model, images = Net(), IMAGES.clone()
    images[1, 0, 3, 3] = float("nan")
    fused = fastlenet.fuse(copy.deepcopy(model), inplace=True)
    for name, value in outcome(fused, images).items():
        torch.testing.assert_close(value.isnan(), outcome(copy.deepcopy(model), images)[name].isnan(), msg=name)


def test_of_equal_cells_the_first_wins(compiled):
    """Also where the scale is zero, so that all cells are equal."""
    model = Net(late=True)
    nn.init.zeros_(model.norm.weight)
    nn.init.ones_(model.norm.bias)
    fused = fastlenet.fuse(copy.deepcopy(model), inplace=True)
    actual, expected = outcome(fused, IMAGES), outcome(model, IMAGES)
    for name in ("output", "norm.weight", "norm.bias"):
        torch.testing.assert_close(actual[name], expected[name], msg=name)


def test_steps_and_modes_follow_each_other(compiled):
    """Statistics are updated once for each training call, and eval mode uses them; copies do too."""
    stock = Two()
    fused = copy.deepcopy(fastlenet.fuse(copy.deepcopy(stock), inplace=True))
    for training in (True, True, False, True):
        for model in (stock, fused):
            model.train(training)
        torch.testing.assert_close(fused(IMAGES), stock(IMAGES))
    with torch.no_grad():
        torch.testing.assert_close(fused(IMAGES), stock(IMAGES))
    for name, value in fused.named_buffers():
        torch.testing.assert_close(value, stock.get_buffer(name), msg=name)
    assert fused.first.norm.num_batches_tracked == 4


def test_second_derivatives(compiled):
    def penalty(model):
        images = in_dtype_of(model, IMAGES).clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        wanted = {"images": images, "conv": model.conv.weight, "weight": model.norm.weight, "bias": model.norm.bias}
        return dict(zip(wanted, torch.autograd.grad(grad.square().sum(), list(wanted.values())), strict=True))

    judge(penalty, fastlenet.fuse(Net()), Net())


def test_batched_gradients(compiled):
    model = Net(track_running_stats=False)
    upstream = torch.randn(2, 4, 21, 6, 5)

    def batched(name, net):
        output = net(in_dtype_of(net, IMAGES))
        return {
            name: torch.autograd.grad(output, net.get_parameter(name), upstream.to(output), is_grads_batched=True)[0]
        }

    for name in ("conv.weight", "norm.weight", "norm.bias"):
        judge(partial(batched, name), fastlenet.fuse(model), model)


def test_transforms_and_autocast(compiled):
    model = Net(track_running_stats=False)
    fused = fastlenet.fuse(model)

    def grads(net):
        def loss(given):
            return torch.func.functional_call(net, given, in_dtype_of(net, IMAGES)).square().mean()

        found = torch.func.grad(loss)({name: value.detach() for name, value in net.named_parameters()})
        del found["conv.bias"]  # zero but for rounding
        return found

    judge(grads, fused, model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(IMAGES), model(IMAGES)
    assert actual.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()(IMAGES.double())
    assert_as_accurate(actual, expected, exact, dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 3, 13, 11), (0, 3, 13, 11), (1, 3, 1, 1)], ids=str)
def test_few_images(shape, compiled):
    """One image, none, and a single number for each channel, which is an error."""
    model, images = Net(pool={"kernel_size": 1}), torch.randn(shape)
    fused = fastlenet.fuse(copy.deepcopy(model), inplace=True)
    try:
        expected = model(images)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:40]):
            fused(images)
    else:
        torch.testing.assert_close(fused(images), expected)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()), equal_nan=True)


@pytest.mark.parametrize("layouts", itertools.product([torch.contiguous_format, torch.channels_last], repeat=2))
@pytest.mark.parametrize(("inputs", "channels"), [(3, 1), (3, 5), (1, 5)])
def test_outputs_and_gradients_have_stock_s_strides(inputs, channels, layouts, compiled):
    """Also those of the dimension of a single channel. A gradient of a plain weight can be viewed as a vector."""
    convolution, norm = nn.Conv2d(inputs, channels, 3), nn.BatchNorm2d(channels, track_running_stats=False)
    model = nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2))
    model, images = model.to(memory_format=layouts[0]), IMAGES[:, :inputs].to(memory_format=layouts[1])
    fused = fastlenet.fuse(copy.deepcopy(model), inplace=True)
    for name, value in outcome(fused, images).items():
        assert value.stride() == outcome(model, images)[name].stride(), name

    def loss(weight, net):
        return torch.func.functional_call(net, {"0.weight": weight}, images).sum()

    gradients = [torch.func.grad(loss)(model[0].weight.detach(), net) for net in (model, fused)]
    assert gradients[0].stride() == gradients[1].stride()


def test_less_is_saved_for_the_backward(compiled):
    sizes = []
    for model in (Net(), fastlenet.fuse(Net(), inplace=True)):
        model(IMAGES)
        with saved_for_backward() as saved:
            model(IMAGES)
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in saved))
    assert sizes[1] < 0.6 * sizes[0]


class Shown(Net):
    """The normalised maps are returned too."""

    def forward(self, images):
        maps = self.norm(self.conv(images))
        return self.pool(self.relu(maps)), maps


REFUSED = {
    "shown": (Shown, "is used by the output too"),
    "double": (lambda: Net().double(), "statistics from the whole batch; .* float32"),
    "padded_dilated": (
        lambda: Net(late=True, pool={"kernel_size": 2, "padding": 1, "dilation": 2}), "both padding and dilation",
    ),
    "indices": (lambda: Net(pool={"kernel_size": 2, "return_indices": True}), "returns indices"),
    "empty_windows": (
        lambda: Net(pool={"kernel_size": 2, "padding": 1, "dilation": 2}), "windows of 1 to 255 cells",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name, compiled):
    make, reason = REFUSED[name]
    images = IMAGES.to(make().conv.weight.dtype)
    fused, stock = fastlenet.fuse(make(), inplace=True), make()
    actual, expected = fused(images), stock(images)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(stock.named_buffers()))
    [site] = [site for site in fastlenet.explain(fused, images).sites if "pool" in site.name]
    assert site.implementation == "stock"
    assert re.search(reason, site.reason)


def test_another_compiler_gets_stock_operators(monkeypatch):
    monkeypatch.setattr(private, "backend_named", lambda name: lambda graph_module, inputs: graph_module.forward)
    from fastlenet.fusion.backend import Backend

    backend = Backend("inductor")
    torch.compile(Net(), backend=backend)(IMAGES)
    [record] = backend.records.values()
    assert (record.fused, record.reason) == (
        False,
        "BatchNorm takes its statistics from the whole batch; inductor compiles it",
    )


def test_hooks_are_called(compiled):
    model, seen = Net(), []
    fused = fastlenet.fuse(model, inplace=True)
    model(IMAGES)
    model.norm.register_forward_hook(lambda module, args, output: seen.append(F.relu(output)))
    fused(IMAGES)
    assert [maps.shape for maps in seen] == [(4, 21, 13, 11)]


def test_little_is_left_to_stock():
    """A step of one image of 8x8 took up to 1.8 times stock's time, and half of it at 400,000 numbers."""
    for images, expected in ((1, "stock operators are as fast for 512 numbers"), (128, None)):
        input = torch.empty(images, 8, 8, 8)
        assert cpu.batch_norm_relu_max_pool2d_rejects(input) == expected


def test_a_forced_implementation_leaves_stock_operators(compiled):
    """No other implementation has a fused form, and a kernel is not told to run under a setting that forbids it."""
    for name in ("aten", "triton"):
        with fastlenet.use_backend(name):
            torch._dynamo.reset()
            torch.testing.assert_close(fastlenet.fuse(Net())(IMAGES), Net()(IMAGES))


def test_without_compiled_kernels_stock_operators_run():
    fused = fastlenet.fuse(Net())
    assert sites(fused) == [(NORM, "stock")]
    torch.testing.assert_close(fused(IMAGES), Net()(IMAGES), rtol=0, atol=0)
