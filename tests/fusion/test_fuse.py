"""`fastlenet.fuse`: well-known networks, models as people write them, and what may happen to them later."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness.judge import assert_as_accurate, exact_grid
from networks import CASES, OldMnistNet, ResNetStem, TutorialNet
from torch import nn
from torch.nn.utils import prune

import fastlenet
from fastlenet import timing
from fastlenet.functional import linear_relu
from fastlenet.fusion.fuse import handle_of


def results(model, images):
    """Output and the gradients of all parameters and of the images, the same random numbers in every call."""
    images = images.clone().requires_grad_()
    torch.manual_seed(3)
    output = model(images)
    upstream = exact_grid(tuple(output.shape), output.dtype, torch.Generator().manual_seed(4))
    sources = {"input": images, **dict(model.named_parameters())}
    grads = torch.autograd.grad(output, list(sources.values()), upstream)
    return {"output": output.detach(), **dict(zip(sources, grads, strict=True))}


def images_of(name, dtype=torch.float32):
    return torch.randn(CASES[name].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_network(name, training, ran):
    """Each network, in both modes: number of sites, output and every gradient, in float64 and in float32."""
    model, case = CASES[name](), CASES[name]
    fused = fastlenet.fuse(model)
    for network in (model, fused):
        network.train(training)
    assert ran(fused, images_of(name)) == (case.training if training else case.inference)
    assert type(fused) is type(model) is case.make
    keys = list(model.state_dict(keep_vars=True).items())
    assert [key for key, _ in keys] == list(fused.state_dict())
    assert all(value is fused.state_dict(keep_vars=True)[key] for key, value in keys)

    single = [results(network, images_of(name)) for network in (fused, model)]
    for network in (fused, model):  # their parameters are shared, and so must their statistics be
        network.double()
    exact = results(model, images_of(name).double())
    double = results(fused, images_of(name).double())
    for key, value in exact.items():
        torch.testing.assert_close(double[key], value, msg=lambda m, key=key: f"{key}: {m}")
    assert_as_accurate(single[0]["output"], single[1]["output"], exact["output"], dtype=torch.float32, name="output")
    joined = [
        torch.cat([value.flatten() for key, value in some.items() if key != "output"]) for some in (*single, exact)
    ]
    assert_as_accurate(*joined, dtype=torch.float32, name="gradients")


class Small(nn.Module):
    """One linear map, in float64 so that rounding does not matter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=torch.float64)


ROWS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class OptionalMask(Small):
    def forward(self, x, mask=None):
        h = F.relu(self.fc(x))
        return h if mask is None else h * mask


class OptionalPair(Small):
    def forward(self, x, y=None):
        h = F.relu(self.fc(x))
        return h if y is None else (h, y)


class Loop(Small):
    def __init__(self, container):
        super().__init__()
        self.layers = container([self.fc, nn.ReLU()])

    def forward(self, x):
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x


class Part(Small):
    def __init__(self):
        super().__init__()
        self.drop, self.scale = nn.Dropout(), 1.0

    def forward(self, x):
        return self.drop(F.relu(self.fc(x))) * self.scale

    encode = forward


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.sub = Part()

    def forward(self, x):
        return self.sub.forward(x)


class CallsEncode(CallsForward):
    def forward(self, x):
        return self.sub.encode(x)


class Generated(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)])
        self.scale = 1.0

    def forward(self, x):
        return sum(self.scale * F.relu(b(x)) for b in self.blocks)


class NoGradInside(Small):
    def __init__(self):
        super().__init__()
        self.back = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x):
        with torch.no_grad():
            h = F.relu(self.back(x))
        return F.relu(self.fc(h))


@pytest.mark.parametrize("make", [OptionalMask, OptionalPair])
def test_optional_arguments(make, ran):
    model = fastlenet.fuse(make(), inplace=True)
    stock = make()
    stock.load_state_dict(model.state_dict())
    for args in ((ROWS,), (ROWS, ROWS), (ROWS,)):
        assert_same(model(*args), stock(*args))
        assert ran(model, *args) == (0, 1)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_layers_in_a_loop_are_exchanged(container, ran):
    def make():
        make_container = {
            nn.Sequential: lambda layers: nn.Sequential(*layers),
            nn.ModuleDict: lambda layers: nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)}),
        }.get(container, container)
        return Loop(make_container)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = fastlenet.fuse(make(), inplace=True)
    assert ran(model, ROWS) == (0, 1)
    key = (lambda i: str(i)) if container is nn.ModuleDict else (lambda i: i)
    model.layers[key(1)] = nn.ELU()
    assert_same(model(ROWS), F.elu(model.fc(ROWS)))
    doubled = Doubled(4, 4, dtype=torch.float64)
    model.layers[key(0)] = doubled
    assert_same(model(ROWS), F.elu(2 * F.linear(ROWS, doubled.weight, doubled.bias)))


@pytest.mark.parametrize("make", [CallsForward, CallsEncode])
def test_parts_called_by_their_methods(make):
    model = fastlenet.fuse(make(), inplace=True)
    model.train()
    model(ROWS)
    model.sub.eval()
    expected = F.relu(model.sub.fc(ROWS))
    assert_same(model(ROWS), expected)
    model.sub.scale = 3.0
    assert_same(model(ROWS), expected * 3)


def test_a_number_read_in_a_generator(ran):
    model = fastlenet.fuse(Generated(), inplace=True)
    first = model(ROWS)
    model.scale = 2.0
    assert_same(model(ROWS), 2 * first)


class Remembers(Small):
    def __init__(self):
        super().__init__()
        self.feats, self.d, self.st = [], {}, {"n": 0}

    def forward(self, x):
        h = F.relu(self.fc(x))
        self.feats.append(h)
        self.d["h"] = h
        self.st["n"] += 1
        return h


def test_lists_dicts_and_counters_are_kept_up():
    model = fastlenet.fuse(Remembers(), inplace=True)
    for count in (1, 2, 3):
        output = model(ROWS)
        assert model.st == {"n": count}
        assert len(model.feats) == count
        assert type(model.feats[-1]) is torch.Tensor
        assert_same(model.feats[-1], output)
        assert_same(model.d["h"], output)


def test_gradients_follow_what_is_switched_inside(ran):
    """Also where the first call came while gradients were off."""
    model = fastlenet.fuse(NoGradInside(), inplace=True)
    with torch.no_grad():
        assert ran(model, ROWS) == (0, 2)
    model(ROWS).sum().backward()
    assert model.back.weight.grad is None
    assert model.fc.weight.grad is not None


def test_scripted_submodules_are_left_alone():
    scripted = torch.jit.script(nn.Linear(4, 4, dtype=torch.float64))
    for make in (
        lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.ReLU(), scripted),
        lambda: nn.Sequential(scripted, nn.ReLU()),
    ):
        model = make()
        fused = fastlenet.fuse(model)
        assert_same(fused(ROWS), model(ROWS))


def test_global_hooks_are_seen():
    model = fastlenet.fuse(Loop(nn.ModuleList), inplace=True)
    model(ROWS)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        model(ROWS)
    finally:
        handle.remove()
    assert set(calls) == {nn.Linear, nn.ReLU, Loop}


class Doubles(torch.overrides.TorchFunctionMode):
    """Doubles what linear maps give."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return output * 2 if getattr(function, "__name__", "") == "linear" else output


def test_function_modes_are_applied_once(ran):
    model = Loop(nn.ModuleList)
    fused = fastlenet.fuse(model)
    fused(ROWS)
    with Doubles():
        assert_same(fused(ROWS), model(ROWS))
    with torch.device("cpu"):
        assert ran(fused, ROWS) == (0, 1)


class TargetsInTraining(Small):
    def forward(self, x, targets=None):
        h = F.relu(self.fc(x))
        return F.mse_loss(h, targets.sin()) if self.training else h


@pytest.mark.parametrize("case", ["batch_of_one", "missing_target", "inference_tensor"])
def test_a_mode_that_cannot_run_is_skipped(case, monkeypatch):
    monkeypatch.setattr(timing, "compare", lambda *_: timing.Comparison(2e-3, 1e-3, timing.WINS))
    model, example = TargetsInTraining(), ROWS
    if case == "batch_of_one":
        model, example = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4)
    elif case == "inference_tensor":
        model = Loop(nn.ModuleList)
        with torch.inference_mode():
            example = torch.randn(3, 4, dtype=torch.float64)
    fused = fastlenet.fuse(model.eval(), example)
    notes = fastlenet.explain(fused).notes
    skipped = [note for note in notes if note.startswith("in training mode the model cannot run the example")]
    assert len(skipped) == (0 if case == "inference_tensor" else 1)
    assert handle_of(fused).modes == (("inference", "training") if case == "inference_tensor" else ("inference",))
    with torch.no_grad():
        torch.testing.assert_close(fused(example), model(example))
    if case == "missing_target":
        fused.train(), model.train()
        assert_same(fused(ROWS, ROWS), model(ROWS, ROWS))


def test_an_example_that_runs_in_no_mode_raises_the_models_own_error():
    with pytest.raises(RuntimeError, match="channels"):
        fastlenet.fuse(TutorialNet(), torch.randn(1, 3, 32, 32))


def test_spectral_norm_is_not_moved():
    """Neither by fuse with an example nor by explain; a call moves it as often as a stock call."""
    stock = Loop(nn.ModuleList)
    nn.utils.spectral_norm(stock.fc)
    model = copy.deepcopy(stock)
    before = model.fc.weight_u.clone()
    fastlenet.explain(model, ROWS)
    fused = fastlenet.fuse(model, ROWS)
    fastlenet.explain(fused, ROWS)
    assert torch.equal(model.fc.weight_u, before)
    fastlenet.fuse(model, inplace=True)
    for _ in range(3):
        assert_same(model(ROWS), stock(ROWS))
        assert_same(model.fc.weight_u, stock.fc.weight_u)


def test_a_class_with_demands_on_its_subclasses():
    class Registered(Small):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)

        def forward(self, x):
            return F.relu(self.fc(x))

    model = Registered()
    for fused in (fastlenet.fuse(model), fastlenet.fuse(model, ROWS)):
        assert type(fused) is Registered
        assert_same(fused(ROWS), model(ROWS))


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda _, args, output: output * 2),
    "forward_pre": lambda module: module.register_forward_pre_hook(lambda _, args: (args[0] * 3,)),
    "full_backward": lambda module: module.register_full_backward_hook(lambda _, grads, outputs: (grads[0] * 2,)),
    "full_backward_pre": lambda module: module.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 2,)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["", "0", "0.1", "1"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run(kind, where, when):
    """Hooks on the model, a container or a layer, registered before or after the first call, and removed again."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU()).double()
    stock, fused = copy.deepcopy(model), fastlenet.fuse(model, inplace=True)
    if when == "after":
        fused(ROWS)
    handles = [HOOKS[kind](network.get_submodule(where)) for network in (stock, fused)]
    for name, value in results(stock, ROWS).items():
        torch.testing.assert_close(results(fused, ROWS)[name], value, msg=lambda m, name=name: f"{name}: {m}")
    for handle in handles:
        handle.remove()
    assert_same(results(fused, ROWS), results(stock, ROWS))


def test_a_hook_that_does_nothing_does_not_stop_fusing(ran):
    """Dynamo runs hooks in the graph; one that keeps what it sees keeps its layer's result from being fused away."""
    model = fastlenet.fuse(TutorialNet(), inplace=True)
    model.conv1.register_forward_hook(lambda *_: None)
    assert ran(model, images_of("tutorial")) == (2, 2)
    seen = []
    model.conv1.register_forward_hook(lambda _, args, output: seen.append(output))
    assert ran(model, images_of("tutorial")) == (1, 2)
    assert seen[0].shape == (3, 6, 28, 28)
    assert (seen[0] < 0).any()


def test_in_place_fuses_the_object_itself(ran):
    model = TutorialNet()
    expected = model(images_of("tutorial"))
    assert fastlenet.fuse(model, inplace=True) is model
    assert ran(model, images_of("tutorial")) == (2, 2)
    torch.testing.assert_close(model(images_of("tutorial")), expected)


def test_original_is_untouched(ran):
    model = TutorialNet()
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    fused = fastlenet.fuse(model)
    assert before == {name: (type(module), vars(module)) for name, module in model.named_modules()}
    assert ran(model, images_of("tutorial")) == (0, 0)
    fused.eval()
    assert model.training
    assert model.conv1.training


def test_submodules_compute_what_they_did_when_called_by_themselves():
    fused = fastlenet.fuse(CASES["alexnet"]())
    images = images_of("alexnet")
    expected = images
    for layer in fused.features:
        expected = layer(expected)
    torch.testing.assert_close(fused.features(images), expected)


def test_fusing_again(ran):
    fused = fastlenet.fuse(fastlenet.fuse(TutorialNet()))
    assert type(fused) is TutorialNet
    assert ran(fused, images_of("tutorial")) == (2, 2)


def test_what_cannot_be_copied_is_shared():
    class Odd(Small):
        def __init__(self):
            super().__init__()
            self.lock, self.kept = threading.Lock(), None
            self.again = [self.fc]

        def forward(self, x):
            with self.lock:
                self.kept = F.relu(self.again[0](x))
            return self.kept * 2

    model = Odd()
    model(ROWS)  # keeps a tensor with a history, which cannot be deep-copied
    fused = fastlenet.fuse(model, ROWS)
    assert fused.lock is model.lock
    assert fused.again[0] is fused.fc is not model.fc
    assert_same(fused(ROWS), model(ROWS))


LATER = {
    "forward_on_the_object": lambda model: setattr(
        model.conv2, "forward", lambda x: 2 * F.conv2d(x, model.conv2.weight)
    ),
    "number_that_the_forward_reads": lambda model: setattr(model, "scale", 3.0),
    "stride_of_a_convolution": lambda model: setattr(model.conv1, "stride", (2, 2)),
    "layer_exchanged": lambda model: setattr(model, "fc3", nn.Linear(84, 3, dtype=torch.float64)),
    "layer_added": lambda model: model.add_module("extra", nn.ReLU()),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.conv1),
    "pruning": lambda model: prune.l1_unstructured(model.conv1, "weight", 0.5),
    "spectral_norm": lambda model: nn.utils.parametrizations.spectral_norm(model.fc1),
    "frozen": lambda model: model.conv1.requires_grad_(False),
}


@pytest.mark.parametrize("name", LATER)
def test_what_happens_later_is_seen(name):
    class Scaled(TutorialNet):
        def __init__(self):
            super().__init__()
            self.scale, self.epoch = 1.0, 0

        def forward(self, images):
            return super().forward(images) * self.scale

    stock = Scaled().double()
    fused = fastlenet.fuse(copy.deepcopy(stock), inplace=True)
    fused(images_of("tutorial").double())
    fused.epoch += 1  # which no forward reads
    for model in (stock, fused):
        torch.manual_seed(5)
        LATER[name](model)
    images = torch.randn(2, 1, 60, 60) if name == "stride_of_a_convolution" else images_of("tutorial")
    for _ in range(2):
        torch.testing.assert_close(fused(images.double()), stock(images.double()))
    stock(images.double()).square().mean().backward()
    fused(images.double()).square().mean().backward()
    for (key, actual), expected in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), key
    stock.eval(), fused.eval()
    torch.testing.assert_close(fused(images.double()), stock(images.double()))


def test_a_relu_that_no_longer_works_in_place_is_seen(ran):
    """As a statement it then does nothing, in the stock model and so in the fused one."""
    model = CASES["statements"]()
    fused = fastlenet.fuse(model)
    images = images_of("statements")
    before = fused(images)
    for network in (model, fused):
        network.relu.inplace = False
    assert ran(fused, images) == (2, 0)
    torch.testing.assert_close(fused(images), model(images))
    assert not torch.allclose(fused(images), before)


def test_parameters_that_change_are_followed():
    """Nothing is folded ahead: updates in place, through .data, by load_state_dict and of statistics all count."""
    model = CASES["resnet_stem"]().eval()
    fused = fastlenet.fuse(model)
    images = images_of("resnet_stem")
    other = CASES["resnet_stem"]().state_dict()
    with torch.no_grad():
        for change in (
            lambda: model.conv1.weight.mul_(1.5),
            lambda: model.bn1.running_mean.add_(1),
            lambda: setattr(model.bn1.weight, "data", -model.bn1.weight.data),
            lambda: fused.load_state_dict(other),
        ):
            before = fused(images)
            change()
            assert not torch.allclose(fused(images), before)
            torch.testing.assert_close(fused(images), model(images))
    assert torch.equal(model.conv1.weight, other["conv1.weight"])


def test_training_and_eval_mode_take_turns(ran):
    """Statistics are gathered in training mode, used in eval mode, and both modes are fused as they may be."""
    model = CASES["vgg11_bn"]()
    fused, stock = fastlenet.fuse(model), copy.deepcopy(model)
    images = images_of("vgg11_bn")
    for training, sites in ((True, (0, 2)), (False, (5, 2)), (True, (0, 2))):
        fused.train(training)
        stock.train(training)
        torch.manual_seed(1)
        output = stock(images)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(images), output)
        assert ran(fused, images) == sites
        stock(images)
    for name, value in stock.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), value)


def test_frozen_batch_norm_in_training(ran):
    """Fine-tuning: the model trains while its batch norm stays in eval mode."""
    model = CASES["resnet_stem"]()
    model.train()
    model.bn1.eval()
    fused = fastlenet.fuse(model)
    assert ran(fused, images_of("resnet_stem")) == (1, 0)
    for network in (model, fused):  # their parameters are shared, and so must their statistics be
        network.double()
    stock, images = copy.deepcopy(model), images_of("resnet_stem").double()
    for name, value in results(stock, images).items():
        torch.testing.assert_close(results(fused, images)[name], value)
    fused.bn1.train()
    assert ran(fused, images) == (0, 0)


def test_modes_mixed_within_a_model(ran):
    model = nn.Sequential(OldMnistNet(), nn.Linear(10, 3), nn.ReLU())
    fused = fastlenet.fuse(model)
    fused[0].eval()
    assert ran(fused, images_of("old_mnist")) == (2, 2)
    torch.testing.assert_close(fused(images_of("old_mnist")), fused[2](fused[1](fused[0](images_of("old_mnist")))))


def test_training_step_moves_the_shared_parameters():
    model = TutorialNet()
    fused = fastlenet.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.conv1.weight.clone()
    F.cross_entropy(fused(images_of("tutorial")), torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    assert not torch.equal(fused.conv1.weight, before)


def test_tied_weights_stay_tied():
    model = TutorialNet()
    model.tied = model.conv1
    fused = fastlenet.fuse(model)
    assert fused.tied is fused.conv1
    assert fused.conv1.weight is model.conv1.weight


def test_parametrised_weight_is_computed_at_each_call(ran):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    nn.utils.parametrizations.weight_norm(model[0])
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 2, 10, 10, dtype=torch.float64)
    assert ran(fused, images) == (1, 0)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    for name, value in results(model, images).items():
        torch.testing.assert_close(results(fused, images)[name], value)


def test_fused_layers_and_functions_in_a_model(ran):
    """Models that already use fastlenet are captured too, its operators and their derivatives unchanged."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fastlenet.ConvReLUMaxPool2d(1, 2, 3), nn.Conv2d(2, 3, 3)
            self.matrix = nn.Parameter(torch.randn(4, 12))

        def forward(self, images):
            maps = F.max_pool2d(self.second(self.first(images)).relu(), 2)
            return linear_relu(maps.flatten(1), self.matrix)

    model = Mixed().double()
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 1, 14, 14, dtype=torch.float64)
    with torch.no_grad():
        assert ran(fused, images) == (1, 0)  # what the model calls itself is not counted
    # With gradients Dynamo would make a graph of each autograd.Function that has no second derivatives.
    assert ran(fused, images) == (0, 0)
    assert "autograd.Function" in str(fastlenet.explain(fused))
    for name, value in results(model, images).items():
        torch.testing.assert_close(results(fused, images)[name], value)
    first, second = (
        torch.autograd.grad(
            torch.autograd.grad(network(images).square().sum(), network.first.weight, create_graph=True)[0].sum(),
            network.second.weight,
        )[0]
        for network in (model, fused)
    )
    torch.testing.assert_close(first, second)


def test_fused_model_within_a_fused_model(ran):
    inner = fastlenet.fuse(TutorialNet())
    outer = fastlenet.fuse(nn.Sequential(inner, nn.Linear(10, 5), nn.ReLU()))
    assert ran(outer, images_of("tutorial")) == (2, 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_fused_and_apart(how, ran, tmp_path):
    fused = fastlenet.fuse(CASES["vgg11_bn"]()).eval()
    images = images_of("vgg11_bn")
    fused(images)
    if how == "save":
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert str(fastlenet.explain(twin)) == str(fastlenet.explain(fused))
    assert ran(twin, images) == (5, 2)
    assert torch.equal(twin(images), fused(images))
    with torch.no_grad():
        twin.features[0].weight.zero_()
    assert fused.features[0].weight.any()
    assert not torch.equal(twin(images), fused(images))
    again = copy.copy(fused)
    assert ran(again, images) == (0, 0)  # shallow: it runs as the stock model
    torch.testing.assert_close(again(images), fused(images))
    torch.testing.assert_close(copy.deepcopy(again)(images), fused(images))


def test_state_dict_is_the_stock_models(tmp_path):
    fused = fastlenet.fuse(TutorialNet())
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    TutorialNet().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_changed_batch_is_captured_once_more_at_most(graphs):
    """An epoch with a last, smaller batch is two graphs.

    PyTorch itself tells batches of one, and on a CPU those of fewer than 16, from others: one more graph each.
    """
    fused = fastlenet.fuse(TutorialNet())
    sizes = (64, 1), (64, 1), (20, 2), (64, 2), (20, 2), (33, 2), (128, 2), (3, 3), (15, 3), (1, 4), (1, 4), (2, 4)
    for size, count in sizes:
        images = torch.randn(size, 1, 32, 32)
        torch.testing.assert_close(fused(images), TutorialNet.forward(fused, images))
        assert len(graphs) <= count, f"batch of {size}"


def test_an_unbatched_image():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2))
    fused = fastlenet.fuse(net)
    for shape in ((4, 1, 8, 8), (1, 8, 8), (0, 1, 8, 8)):
        torch.testing.assert_close(fused(torch.ones(shape)), net(torch.ones(shape)))


@pytest.mark.wide
def test_many_models_of_one_class(ran):
    """Dynamo limits recompilations by code object; models must not use up each other's."""
    models = [fastlenet.fuse(nn.Sequential(Loop(nn.ModuleList), nn.Linear(4, 4).double())) for _ in range(10)]
    assert [ran(model, ROWS) for model in models] == [(0, 1)] * 10
    models = [fastlenet.fuse(Loop(nn.ModuleList)) for _ in range(20)]
    assert [ran(model, ROWS) for model in models] == [(0, 1)] * 20


class Renamed(Small):
    name = ""

    def forward(self, x):
        return F.relu(self.fc(x)) * len(self.name)


class Branching(Renamed):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return F.relu(self.fc(x)) * len(self.name)


@pytest.mark.parametrize("kind", [Renamed, Branching])
def test_beyond_the_limit_of_recompilations_the_model_runs_as_it_is(kind, monkeypatch):
    """It computes what it should, and explain tells once nothing more is captured; copies capture anew."""
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 3)
    model = fastlenet.fuse(kind(), inplace=True)
    for number in range(6):
        model.name = "x" * number
        assert_same(model(ROWS), F.relu(model.fc(ROWS)) * number)
        assert ("captured this model 3 times, its limit" in str(fastlenet.explain(model))) == (number >= 2), number
    for other in (copy.deepcopy(model), fastlenet.fuse(kind())):
        assert_same(other(ROWS), F.relu(other.fc(ROWS)) * len(other.name))
        assert "limit" not in str(fastlenet.explain(other))
    torch.compiler.reset()
    model(ROWS)
    assert "limit" not in str(fastlenet.explain(model))


def test_control_flow_is_fused_in_pieces(ran):
    class Branch(Small):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            h = F.relu(self.fc(x))
            if h.sum() > 1000:
                return h
            return F.relu(self.other(h)) if h.sum() > 0 else -h

    model = Branch()
    fused = fastlenet.fuse(model)
    assert ran(fused, ROWS) == (0, 2)
    for scale in (1, 1e6, 0):
        assert_same(fused(ROWS * scale), model(ROWS * scale))


def test_a_model_that_dynamo_refuses_runs_as_it_is(caplog, monkeypatch):
    from fastlenet.fusion import patterns

    def broken(*_):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(patterns, "find", broken)
    model = Loop(nn.ModuleList)
    fused = fastlenet.fuse(model)
    with caplog.at_level(logging.WARNING, "fastlenet"):
        assert_same(fused(ROWS), model(ROWS))
        assert_same(fused(ROWS), model(ROWS))
    assert len([record for record in caplog.records if record.name == "fastlenet"]) == 1
    assert "planted" in caplog.text
    assert "planted" in str(fastlenet.explain(fused))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 40, 40)], ids=["a convolution's", "a linear layer's"])
def test_the_models_own_errors_stay_its_own(shape, ran, monkeypatch):
    """And PyTorch logs no error of its own before."""
    logged = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "callHandlers", logged.append)
    model = TutorialNet()
    fused = fastlenet.fuse(model)
    for _ in range(2):
        with pytest.raises(RuntimeError) as expected:
            model(torch.randn(shape))
        with pytest.raises(RuntimeError) as actual:
            fused(torch.randn(shape))
        assert type(actual.value) is type(expected.value)
        assert str(actual.value) == str(expected.value)
        assert actual.value.__context__ is None
    assert logged == []
    assert ran(fused, images_of("tutorial")) == (2, 2)


@pytest.mark.parametrize("disabled", [True, False])
def test_pytorchs_log_stays_as_its_user_has_it(disabled, monkeypatch):
    """During a call too, for what other threads log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "disabled", disabled)
    logged, seen = [], []
    monkeypatch.setattr(log, "callHandlers", logged.append)

    def look(*_):
        seen.append(log.disabled)
        other = threading.Thread(target=log.error, args=("another thread's",))
        other.start()
        other.join()

    images = ROWS.clone().requires_grad_()
    fused = fastlenet.fuse(Small().fc)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (look(), tensor)[1], lambda tensor: tensor):
        fused(images)
    assert seen
    assert set(seen) == {disabled}
    assert len(logged) == (0 if disabled else len(seen))
    assert log.disabled == disabled


def test_compiled_graphs_may_be_forgotten():
    model = TutorialNet()
    fused = fastlenet.fuse(model)
    fused(images_of("tutorial"))
    torch._dynamo.reset()
    torch.testing.assert_close(fused(images_of("tutorial")), model(images_of("tutorial")))
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(fused(images_of("tutorial")), model(images_of("tutorial")))


def test_threads():
    model = TutorialNet()
    fused, images = fastlenet.fuse(model), images_of("tutorial")
    expected, outputs = model(images), []
    threads = [threading.Thread(target=lambda: outputs.append(fused(images))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    for output in outputs:
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["tutorial", "old_mnist", "resnet_stem"])
def test_compile_and_export(name):
    """A fused model is one graph to torch.compile on top, and can be exported and traced."""
    fused = fastlenet.fuse(CASES[name]()).eval()
    images = images_of(name)
    expected = fused(images)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    for strict in (False, True):
        exported = torch.export.export(fused, (images,), strict=strict)
        torch.testing.assert_close(exported.module()(images), expected)
    torch.testing.assert_close(torch.jit.trace(fused, images)(images), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(images), expected)


def test_compiled_on_top_by_fastlenet(ran):
    fused = fastlenet.fuse(OldMnistNet())
    compiled = torch.compile(fused, backend="fastlenet")
    images = images_of("old_mnist")
    assert ran(compiled, images) == (1, 1)
    fused.eval()
    assert ran(compiled, images) == (2, 1)
    torch.testing.assert_close(compiled(images), fused(images))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_checkpointing(where, reentrant, ran):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TutorialNet()

        def forward(self, images):
            return torch.utils.checkpoint.checkpoint(self.net, images, use_reentrant=reentrant)

    model = (Inside() if where == "inside" else TutorialNet()).double()
    fused = fastlenet.fuse(model)
    images = images_of("tutorial").double().requires_grad_()

    def call(network):
        if where == "inside":
            return network(images)
        return torch.utils.checkpoint.checkpoint(network, images, use_reentrant=reentrant)

    for actual, expected in (
        zip(
            torch.autograd.grad(call(fused).sum(), list(fused.parameters())),
            torch.autograd.grad(call(model).sum(), list(model.parameters())),
            strict=True,
        )
        if not reentrant
        else []
    ):
        torch.testing.assert_close(actual, expected)
    if reentrant:
        call(fused).sum().backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        call(model).sum().backward()
        for actual, expected in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(actual, expected.grad)
    if where == "around" or not reentrant:
        assert ran(call, fused) == (2, 2)


def test_functional_transforms():
    model = TutorialNet().double()
    fused, images = fastlenet.fuse(model), images_of("tutorial").double()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(network):
        def call(parameters, image):
            return torch.func.functional_call(network, parameters, (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(call), in_dims=(None, 0))(parameters, images)

    for name, value in loss(model).items():
        torch.testing.assert_close(loss(fused)[name], value)
    other = {name: value * 2 for name, value in parameters.items()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, (images,)), torch.func.functional_call(model, other, (images,))
    )
    torch.testing.assert_close(fused(images), model(images))


@pytest.mark.wide
def test_autocast_with_a_scaler():
    """Half precision, a scaled loss and the scaler's step give the stock model's weights up to its own error."""
    stock = CASES["vgg11_bn"]().eval()
    fused = fastlenet.fuse(stock, inplace=False)
    weights = []
    for model, dtype in ((fused, torch.bfloat16), (stock, torch.bfloat16), (stock, torch.float64)):
        network = copy.deepcopy(model)
        images = images_of("vgg11_bn")
        if dtype == torch.float64:
            network, images = network.double(), images.double()
        optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = network(images)
                assert output.dtype == dtype
            loss = (output.float() if dtype == torch.bfloat16 else output).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        before = torch.cat([value.flatten() for value in model.parameters()])
        weights.append(torch.cat([value.flatten() for value in network.parameters()]) - before)
    assert_as_accurate(*weights, dtype=torch.float32, name="the steps' sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["resnet_stem", "vgg11_bn"])
def test_folded_batch_norm_is_as_accurate_as_stock(name, dtype, ran):
    """The weights are scaled instead of the convolution's result; in 16 bits, too, that loses no accuracy."""
    model = CASES[name]().eval()
    stem = nn.Sequential(*list(model.children())[:4]) if name == "resnet_stem" else model.features[:4]
    stem = copy.deepcopy(stem).to(dtype).requires_grad_(False)
    exact, images = copy.deepcopy(stem).double(), images_of(name, dtype)
    fused = fastlenet.fuse(stem)
    assert ran(fused, images) == (1, 0)
    assert_as_accurate(fused(images), stem(images), exact(images.double()), dtype=dtype)


def test_a_small_variance_in_16_bits_is_told_from_zero():
    """The sum of variance and eps underflows in float16; stock's BatchNorm adds them in float32."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    model[1].running_var.zero_()
    model, images = model.half().requires_grad_(False), torch.rand(2, 1, 8, 8).half()
    exact = copy.deepcopy(model).double()
    assert_as_accurate(
        fastlenet.fuse(model)(images), model(images), exact(images.double()), dtype=torch.float16, name="output"
    )


def test_autocast_casts_as_in_the_stock_model():
    model = CASES["vgg11_bn"]().eval()
    fused, images = fastlenet.fuse(model), images_of("vgg11_bn")
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = fused(images), model(images)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_as_accurate(output, expected, model.double()(images.double()), dtype=torch.bfloat16)
    torch.testing.assert_close(fused.double()(images.double()), model(images.double()))


@dataclass
class Answer:
    """What a model may return."""

    maps: torch.Tensor
    extra: torch.Tensor


@pytest.mark.parametrize("form", ["dict", "dataclass", "keywords"])
def test_outputs_and_arguments_of_other_kinds(form, ran):
    class Several(Small):
        def forward(self, x, *, scale=2.0, **others):
            h = F.relu(self.fc(x)) * scale + sum(others.values())
            return {"maps": h, "extra": h * 2} if form == "dict" else Answer(h, h * 2) if form == "dataclass" else h

    model = Several()
    fused = fastlenet.fuse(model)
    keywords = {"scale": 3.0, "shift": ROWS} if form == "keywords" else {}
    actual, expected = fused(ROWS, **keywords), model(ROWS, **keywords)
    assert ran(fused, ROWS, **keywords) == (0, 1)
    assert type(actual) is type(expected)
    if form == "dataclass":
        actual, expected = vars(actual), vars(expected)
    assert_same(actual, expected)


def test_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2))
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 3, 8, 8)
    output = fused(images)
    assert type(fused[0]) is nn.Conv2d
    torch.testing.assert_close(output, F.max_pool2d(F.relu(F.conv2d(images, fused[0].weight, fused[0].bias)), 2))


def test_lazy_modules_draw_as_stocks():
    """The random numbers after the first call are others than those of the weights."""
    results = []
    for fused in (False, True):
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3))
        model = fastlenet.fuse(model) if fused else model
        torch.manual_seed(0)
        first = model(torch.ones(20, 1, 10, 10))
        results.append([first, torch.rand(5), model(torch.rand(20, 1, 10, 10))])
    torch.testing.assert_close(*results)
    assert "0 > 1 > 2" in str(fastlenet.explain(model))


def test_lazy_modules_are_measured_with_an_example():
    model = nn.Sequential(
        nn.LazyConv2d(6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)
    )
    fused = fastlenet.fuse(model, torch.rand(20, 1, 28, 28))
    assert all(map(torch.nn.parameter.is_lazy, (model[0].weight, model[3].weight, model[3].running_mean)))
    text = str(fastlenet.explain(fused))
    assert "0 > 1 > 2" in text
    assert "  training " in text
    assert "  inference " in text
    assert fused(torch.rand(20, 1, 28, 28)).shape == (20, 3)


def test_quantised_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    fused, rows = fastlenet.fuse(quantised), torch.randn(3, 4)
    torch.testing.assert_close(fused(rows), quantised(rows))


def test_arguments_that_are_no_models():
    with pytest.raises(TypeError, match=r"'model' must be a torch\.nn\.Module, but got list"):
        fastlenet.fuse([])
    compiled = torch.compile(TutorialNet(), backend="eager")
    assert fastlenet.fuse(compiled) is compiled
    assert type(fastlenet.fuse(fastlenet.LeNet())) is fastlenet.LeNet
    assert isinstance(fastlenet.fuse(ResNetStem(8)), ResNetStem)


WON = timing.Comparison(2e-3, 1e-3, timing.WINS)


def test_measured_sites_are_kept_only_if_they_win(monkeypatch, ran):
    """Judged by planted times: one convolution loses, so it stays stock; the rest is fused as long as all wins."""
    asked = []

    def compare(stock, fused, device):
        stock(), fused()
        asked.append(device)
        return timing.Comparison(2e-3, 1e-3, 5 if len(asked) == 2 else timing.WINS)

    monkeypatch.setattr(timing, "compare", compare)
    fused = fastlenet.fuse(TutorialNet(), images_of("tutorial"))
    assert len(asked) == 10  # four sites and the whole, in both modes
    table = fastlenet.explain(fused)
    by_mode = {(site.name.split()[0], site.mode): site for site in table.sites}
    assert by_mode["conv2", "training"].implementation == "stock"
    assert "not clearly faster" in by_mode["conv2", "training"].reason
    assert by_mode["conv2", "inference"].implementation == "aten"
    assert by_mode["conv1", "training"].stock == "2 ms"
    assert by_mode["conv1", "training"].fused == "1 ms"
    assert by_mode["conv1", "training"].input == "3x1x32x32 float32"
    assert "whole model in training mode: 2 ms stock, 1 ms fused" in " ".join(str(table).split())
    for size in (3, 5):  # what was measured holds for another batch
        assert ran(fused, torch.randn(size, 1, 32, 32)) == (1, 2)
    with torch.no_grad():
        assert ran(fused.eval(), images_of("tutorial")) == (2, 2)
    assert len(asked) == 10
    twin = copy.deepcopy(fused.train())
    assert ran(twin, images_of("tutorial")) == (1, 2)
    assert len(asked) == 10


@pytest.mark.parametrize("mode", ["both", "training"])
def test_nothing_is_fused_where_the_whole_does_not_win(mode, monkeypatch, ran):
    asked = []

    def compare(stock, fused, device):
        asked.append(device)
        lost = len(asked) % 5 == 0 and (mode == "both" or len(asked) == 5)
        return timing.Comparison(2e-3, 1e-3, 0 if lost else timing.WINS)

    monkeypatch.setattr(timing, "compare", compare)
    fused = fastlenet.fuse(TutorialNet(), images_of("tutorial"))
    assert ran(fused, images_of("tutorial")) == (0, 0)
    reasons = {site.reason for site in fastlenet.explain(fused).sites if site.implementation == "stock"}
    assert reasons == {"the whole model does not become clearly faster"}
    with torch.no_grad():
        assert ran(fused.eval(), images_of("tutorial")) == ((0, 0) if mode == "both" else (2, 2))
    assert (fused._compiled_call_impl is None) == (mode == "both")
    at_another_size = fastlenet.explain(fused.train(), torch.randn(7, 1, 32, 32))
    assert {site.reason for site in at_another_size.sites if site.mode != "inference"} == reasons
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert ran(twin, images_of("tutorial")) == (0, 0)


def test_a_model_that_computes_something_else_is_not_fused(monkeypatch, ran):
    """Should capturing go wrong unnoticed, the example tells."""
    monkeypatch.setattr(timing, "compare", lambda *_: WON)
    rate = itertools.count(1)

    class Drifting(Small):
        def forward(self, x):
            return F.relu(self.fc(x)) * torch._dynamo.disable(lambda: next(rate))()

    fused = fastlenet.fuse(Drifting(), ROWS)
    assert "does not reproduce" in str(fastlenet.explain(fused))
    assert ran(fused, ROWS) == (0, 0)


def test_measuring_leaves_no_trace():
    """Parameters, gradients, statistics, lists, modes and the random generator are as they were."""
    model = nn.Sequential(CASES["vgg11_bn"](), Remembers().float())
    model[1].fc = nn.Linear(10, 4)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    example = images_of("vgg11_bn")
    fused = fastlenet.fuse(model, example)
    fastlenet.explain(model, example)
    assert torch.equal(torch.get_rng_state(), random)
    for network in (model, fused):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(module.training for module in network.modules())
        assert (network[1].feats, network[1].d, network[1].st) == ([], {}, {"n": 0})
    assert torch.equal(example, images_of("vgg11_bn"))
