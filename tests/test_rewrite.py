"""`fastlenet.fuse` and `fastlenet.explain`: well-known networks, what must be refused, and what may happen later."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from harness.fuzz import assume, examples, given, settings, st
from harness.judge import assert_as_accurate, assert_same_values, exact_grid
from networks import CASES, OldMnistNet, ResNetStem, TutorialNet
from torch import nn

import fastlenet
from fastlenet import rewrite, trial

pytestmark = pytest.mark.usefixtures("all_functions")
CONV, LINEAR = "conv2d_relu_max_pool2d", "linear_relu"
IMPLEMENTATIONS = ("aten", "triton")


def fused_sites(model, mode):
    """How many sites run fused in a mode: (convolutions, linear maps)."""
    sites = [site for site in fastlenet.explain(model).sites if site.implementation in IMPLEMENTATIONS]
    return tuple(sum(site.operator == name and site.mode in ("", mode) for site in sites) for name in (CONV, LINEAR))


def graph_nodes(output):
    """How many fused operators an output's autograd graph holds: (convolutions, linear maps)."""
    names, nodes, seen = [], [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(type(node).__name__)
        nodes += [onward for onward, _ in node.next_functions]
    return names.count("ConvReLUMaxPool2dFunctionBackward"), names.count("AddmmReLUFunctionBackward")


def reasons(model):
    """Why sites are left as they are."""
    return [site.reason for site in fastlenet.explain(model).sites if site.implementation == "stock"]


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


def assert_same(fused, stock, images):
    """Compare in float64, where rounding is far below PyTorch's own default tolerance."""
    for name, value in results(fused.double(), images.double()).items():
        expected = results(stock.double(), images.double())[name]
        torch.testing.assert_close(value, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_network(name, training):
    """Each network, in both modes: number of sites, output and every gradient, in float64 and in float32."""
    model = CASES[name]()
    fused = fastlenet.fuse(model)
    for network in (model, fused):
        network.train(training)
    case = CASES[name]
    assert fused_sites(fused, "training") == case.training
    assert fused_sites(fused, "inference") == case.inference
    assert graph_nodes(fused(images_of(name))) == (case.training if training else case.inference)
    assert isinstance(fused, type(model))

    keys = list(model.state_dict(keep_vars=True).items())
    assert [key for key, _ in keys] == list(fused.state_dict())
    assert all(value is fused.state_dict(keep_vars=True)[key] for key, value in keys)
    assert type(model) is case.make

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


def test_in_place_rewrites_the_object_itself():
    model = TutorialNet()
    expected = model(images_of("tutorial"))
    assert fastlenet.fuse(model, inplace=True) is model
    assert graph_nodes(model(images_of("tutorial"))) == (2, 2)
    torch.testing.assert_close(model(images_of("tutorial")), expected)


def test_original_is_untouched():
    model = TutorialNet()
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    fastlenet.fuse(model)
    assert before == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    assert graph_nodes(model(images_of("tutorial"))) == (0, 0)


def test_submodules_compute_what_they_did_when_called_by_themselves():
    fused = fastlenet.fuse(CASES["alexnet"]())
    images = images_of("alexnet")
    expected = images
    for layer in fused.features:
        expected = layer(expected)
    assert torch.equal(fused.features(images), expected)


def test_fusing_again_measures_and_fuses_anew():
    fused = fastlenet.fuse(fastlenet.fuse(TutorialNet()))
    assert [c for c in type(fused).__mro__ if issubclass(c, TutorialNet)][1:] == [TutorialNet]
    assert graph_nodes(fused(images_of("tutorial"))) == (2, 2)


class Pooled(nn.Module):
    """Convolution, something in between, max-pool."""

    def __init__(self, between, **conv):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, **conv)
        self.between = between
        self.pool = nn.MaxPool2d(2)

    def forward(self, images):
        return self.pool(self.between(self.conv(images)))


class Shared(nn.Module):
    """The activation is used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(16, 4)

    def forward(self, images):
        maps = F.relu(self.conv(images))
        hidden = self.linear(F.max_pool2d(maps, 3).flatten(1))
        return F.relu(hidden) + hidden + maps.mean()


class SeenBefore(nn.Module):
    """Somebody has looked before relu changed in place what they look at."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        maps = self.conv(images)
        mean = maps.mean()
        F.relu(maps, inplace=True)
        return F.max_pool2d(maps, 2) + mean


class SeenAfter(SeenBefore):
    """They look afterwards, at what the pool sees too."""

    def forward(self, images):
        maps = self.conv(images)
        maps.relu_()
        return F.max_pool2d(maps, 2) + maps.mean()


class Indices(nn.Module):
    """Somebody needs to know where the maxima were."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        maps, index = F.max_pool2d(F.relu(self.conv(images)), 2, return_indices=True)
        return maps + index


class Computed(nn.Module):
    """The window follows from the input's size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv(images)), images.shape[-1] // 4)


class Late(nn.Module):
    """relu after a max-pool whose windows may lie wholly in the padding."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        return F.relu(F.max_pool2d(self.conv(images), 2, 2, padding=1, dilation=9))


def with_hook(kind, where):
    def make():
        model = Pooled(nn.ReLU())
        getattr(model.get_submodule(where), f"register_{kind}")(lambda *_: None)
        return model

    return make


def normalised(**options):
    return lambda: Pooled(nn.Sequential(nn.BatchNorm2d(4, **options), nn.ReLU()))


def spectral():
    model = Pooled(nn.ReLU()).eval()
    nn.utils.spectral_norm(model.conv)
    return model


def patched():
    model = Pooled(nn.ReLU())
    stock = model.conv.forward
    model.conv.forward = lambda images: stock(images) * 2
    return model


REFUSED = {
    "shared_activation": (Shared, "is used by mean too"),
    "seen_before_relu_in_place": (SeenBefore, "the result of conv is used by mean too"),
    "seen_after_relu_in_place": (SeenAfter, "the result of conv is used by mean too"),
    "indices": (Indices, "returns indices"),
    "computed_window": (Computed, "computed in the forward"),
    "relu_after_padded_dilated_pool": (Late, "both padding and dilation"),
    "reflected_padding": (lambda: Pooled(nn.ReLU(), padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "training_batch_norm": (normalised(), "BatchNorm in training mode"),
    "batch_norm_without_statistics": (lambda: normalised(track_running_stats=False)().eval(), "without running stat"),
    "training_dropout": (lambda: Pooled(nn.Sequential(nn.Dropout(), nn.ReLU())), "drops out, in training mode"),
    "forward_hook_on_conv": (with_hook("forward_hook", "conv"), "conv has hooks"),
    "pre_hook_on_relu": (with_hook("forward_pre_hook", "between"), "between has hooks"),
    "backward_hook_on_pool": (with_hook("full_backward_hook", "pool"), "pool has hooks"),
    "forward_on_the_object": (patched, "conv has hooks, or a forward put on the object"),
    "spectral_norm_by_hook": (spectral, "conv has hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    """Before fuse `explain` says why; after it the model computes the same, unfused, in the mode it was in."""
    make, reason = REFUSED[name]
    model = make()
    assert any(reason in found for found in reasons(model)), fastlenet.explain(model)
    fused = fastlenet.fuse(model)
    images = torch.randn(3, 2, 10, 10)
    assert graph_nodes(fused(images)) == (0, 0)
    assert any(reason in found for found in reasons(fused)), fastlenet.explain(fused)
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    torch.testing.assert_close(fused(images), expected)


class Body(nn.Module):
    """A forward with one offending statement before a site."""

    def __init__(self, offend):
        super().__init__()
        self.conv, self.calls, self.offend = nn.Conv2d(2, 4, 3), 0, offend
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images):
        return F.max_pool2d(self.conv(self.offend(self, images)).relu(), 2)


def branch(_, images):
    return -images if images.sum() > 0 else images


def noise(_, images):
    return images + torch.randn(10)


def count_calls(model, images):
    model.calls += 1
    return images


def count_in_buffer(model, images):
    model.count = model.count + 1
    return images * model.count


def without_gradients(_, images):
    with torch.no_grad():
        return images * 2


def cast(_, images):
    with torch.autocast("cpu"):
        return images * 2


UNTRACEABLE = {
    "control_flow": (branch, "control flow"),
    "new_tensor": (noise, "makes a tensor"),
    "attribute": (count_calls, "changes its attribute 'calls'"),
    "buffer": (count_in_buffer, "changes its attribute 'count'"),
    "no_grad": (without_gradients, "switches gradients"),
    "autocast": (cast, "switches gradients or autocast"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_model_is_left_alone(name, caplog):
    offend, reason = UNTRACEABLE[name]
    model = Body(offend)
    with caplog.at_level(logging.WARNING, "fastlenet"):
        fused = fastlenet.fuse(model)
    assert type(fused) is Body
    assert model.calls == fused.calls == 0
    assert reason in caplog.text
    assert len(caplog.records) == 1
    assert reason in str(fastlenet.explain(fused))
    images = torch.randn(1, 2, 10, 10)
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    assert torch.equal(fused(images), expected)


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_submodule_runs_as_it_is(name):
    """Only the module whose forward offends stays single; what stands beside it is fused."""
    offend, reason = UNTRACEABLE[name]
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(1), Body(offend))
    fused = fastlenet.fuse(model)
    assert reason in str(fastlenet.explain(fused))
    images = torch.randn(1, 2, 10, 10)
    assert graph_nodes(fused[:3](images)) == (0, 0)
    for _ in range(2):
        torch.manual_seed(0)
        expected = copy.deepcopy(model)(images)
        torch.manual_seed(0)
        actual = fused(images)
        torch.testing.assert_close(actual, expected)
        model[3].count.copy_(fused[3].count)
    assert sum(graph_nodes(actual)) == (1 if name not in ("no_grad",) else 0)


class Marked(torch.Tensor):
    """A kind of tensor with operators of its own, as quantised and distributed ones are."""


def test_parameters_of_another_kind_are_left_alone():
    model = Pooled(nn.ReLU())
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Marked))
    assert reasons(fastlenet.fuse(model)) == ["its parameters are of type Marked"]


def test_modules_called_again_are_sites_of_their_own(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, rows):
            return self.relu(self.linear(self.relu(self.linear(rows))))

    wins = itertools.chain([trial.WINS, 0], itertools.repeat(trial.WINS))
    monkeypatch.setattr(trial, "compare", lambda *_: trial.Comparison(2e-3, 1e-3, next(wins)))
    model, rows = Twice(), torch.randn(3, 4)
    fused = fastlenet.fuse(model, rows)
    assert {site.name for site in fastlenet.explain(fused).sites} == {"linear > relu", "linear > relu (2)"}
    assert graph_nodes(fused(rows)) == (0, 1)
    assert graph_nodes(fused.eval()(rows)) == (0, 2)
    torch.testing.assert_close(fused(rows), model(rows))


class Asks(nn.Module):
    """Its forward asks what it was given."""

    def forward(self, images):
        return self.first(images)

    def first(self, images):
        return images if isinstance(images, torch.Tensor) else images[0]


def test_a_question_for_a_type_is_not_answered_for_a_stand_in():
    fused = fastlenet.fuse(nn.Sequential(Asks(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)))
    assert "0 runs as it is: its forward asks isinstance" in str(fastlenet.explain(fused))
    assert graph_nodes(fused(torch.randn(1, 1, 8, 8))) == (1, 0)


def test_hooked_container_runs_as_it_is():
    model = CASES["alexnet"]()
    calls = []
    model.features.register_forward_hook(lambda *_: calls.append(1))
    fused = fastlenet.fuse(model)
    calls.clear()
    assert graph_nodes(fused(images_of("alexnet"))) == (0, 2)
    assert calls == [1]
    assert "features runs as it is: has hooks" in str(fastlenet.explain(fused))


def test_hooks_of_the_model_itself_run():
    model, calls = TutorialNet(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    fused = fastlenet.fuse(model)
    calls.clear()
    assert graph_nodes(fused(images_of("tutorial"))) == (2, 2)
    assert calls == [1]


LATER = {
    "hook_on_a_conv": lambda model: model.conv1.register_forward_hook(lambda *_: None),
    "forward_on_the_object": lambda model: setattr(model.conv2, "forward", model.conv2.forward),
    "number_that_the_forward_reads": lambda model: setattr(model, "scale", 3.0),
    "stride_of_a_convolution": lambda model: setattr(model.conv1, "stride", (2, 2)),
    "layer_exchanged": lambda model: setattr(model, "fc3", nn.Linear(84, 3)),
    "layer_added": lambda model: model.add_module("extra", nn.ReLU()),
}


@pytest.mark.parametrize("name", LATER)
def test_what_happens_later_is_seen(name, caplog):
    """The model's own forward runs once the model is no longer what was fused."""

    class Scaled(TutorialNet):
        def __init__(self):
            super().__init__()
            self.scale, self.epoch = 1.0, 0

        def forward(self, images):
            return super().forward(images) * self.scale

    fused = fastlenet.fuse(Scaled())
    fused.epoch += 1  # which no forward reads
    assert graph_nodes(fused(images_of("tutorial"))) == (2, 2)
    assert "at present" not in str(fastlenet.explain(fused))
    LATER[name](fused)
    images = torch.randn(2, 1, 60, 60) if name == "stride_of_a_convolution" else images_of("tutorial")
    with caplog.at_level(logging.DEBUG, "fastlenet"):
        output = fused(images)
    assert graph_nodes(output) == (0, 0)
    assert "runs as it was before fuse" in caplog.text
    assert "at present the model runs as it was before fuse" in str(fastlenet.explain(fused))
    again = fastlenet.fuse(fused)
    assert graph_nodes(again(images))[1] == 2
    torch.testing.assert_close(again(images), output)


def test_a_relu_that_no_longer_works_in_place_is_seen():
    """As a statement it then does nothing, in the stock model and so in the fused one."""
    model = CASES["statements"]()
    fused = fastlenet.fuse(model)
    images = images_of("statements")
    before = fused(images)
    for network in (model, fused):
        network.relu.inplace = False
    assert graph_nodes(fused(images)) == (0, 0)
    assert torch.equal(fused(images), model(images))
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


def test_training_and_eval_mode_take_turns():
    """Statistics are gathered in training mode, used in eval mode, and both modes are fused as they may be."""
    model = CASES["vgg11_bn"]()
    fused, stock = fastlenet.fuse(model), copy.deepcopy(model)
    images = images_of("vgg11_bn")
    for training, sites in ((True, (0, 2)), (False, (5, 2)), (True, (0, 2))):
        fused.train(training)
        stock.train(training)
        torch.manual_seed(1)
        output = fused(images)
        torch.manual_seed(1)
        torch.testing.assert_close(output, stock(images))
        assert graph_nodes(output) == sites
    for name, value in stock.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), value)


def test_frozen_batch_norm_in_training():
    """Fine-tuning: the model trains while its batch norm stays in eval mode."""
    model = CASES["resnet_stem"]()
    model.train()
    model.bn1.eval()
    fused = fastlenet.fuse(model)
    assert graph_nodes(fused(images_of("resnet_stem"))) == (1, 0)
    assert_same(fused, model, images_of("resnet_stem"))
    fused.bn1.train()
    assert graph_nodes(fused(images_of("resnet_stem").double())) == (0, 0)


def test_modes_mixed_within_a_model_run_as_they_are():
    model = nn.Sequential(OldMnistNet(), nn.Linear(10, 3), nn.ReLU())
    fused = fastlenet.fuse(model)
    fused[0].eval()
    assert graph_nodes(fused(images_of("old_mnist"))) == (0, 0)
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


def test_parametrised_weight_is_computed_at_each_call():
    model = Pooled(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model.conv)
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 2, 10, 10)
    assert graph_nodes(fused(images)) == (1, 0)
    with torch.no_grad():
        model.conv.parametrizations.weight.original0.mul_(2)
    assert_same(fused, model, images)


def test_fused_layers_and_functions_in_a_model():
    """Models that already use fastlenet are traced too, and its layers listed."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fastlenet.ConvReLUMaxPool2d(1, 2, 3), nn.Conv2d(2, 3, 3)
            self.matrix = nn.Parameter(torch.randn(4, 12))

        def forward(self, images):
            maps = F.max_pool2d(self.second(self.first(images)).relu(), 2)
            return fastlenet.functional.linear_relu(maps.flatten(1), self.matrix)

    model = Mixed()
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 1, 14, 14)
    assert graph_nodes(fused(images)) == (2, 1)
    torch.testing.assert_close(fused(images), model(images))
    assert [site.name for site in fastlenet.explain(fused).sites] == ["first", "second > relu > max_pool2d"]


def test_fused_model_within_a_fused_model():
    inner = fastlenet.fuse(TutorialNet())
    outer = fastlenet.fuse(nn.Sequential(inner, nn.Linear(10, 5), nn.ReLU()))
    assert graph_nodes(outer(images_of("tutorial"))) == (2, 3)
    names = [site.name for site in fastlenet.explain(outer).sites]
    assert "0.fc1 > relu_2" in names
    assert "1 > 2" in names


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_apart(how):
    fused = fastlenet.fuse(CASES["vgg11_bn"]())
    twin = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    images = images_of("vgg11_bn")
    twin.eval(), fused.eval()
    assert torch.equal(twin(images), fused(images))
    assert graph_nodes(twin(images)) == (5, 2)
    assert str(fastlenet.explain(twin)) == str(fastlenet.explain(fused))
    with torch.no_grad():
        twin.features[0].weight.zero_()
    assert fused.features[0].weight.any()
    twin.features[0].register_forward_hook(lambda *_: None)
    assert graph_nodes(twin(images)) == (0, 0)
    assert graph_nodes(fused(images)) == (5, 2)


def test_saved_and_loaded(tmp_path):
    fused = fastlenet.fuse(TutorialNet())
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    TutorialNet().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert graph_nodes(loaded(images_of("tutorial"))) == (2, 2)


@pytest.mark.parametrize("name", ["tutorial", "old_mnist", "resnet_stem"])
def test_compile_and_export(name):
    """One graph, the same numbers, in eval mode too; an exported program holds the fused operators."""
    fused = fastlenet.fuse(CASES[name]()).eval()
    images = images_of(name)
    code = []

    def backend(graph, inputs):
        code.append(graph.code)
        return graph.forward

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), fused(images))
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), fused(images))
    assert len(code) == 2
    assert "conv2d_relu_max_pool2d" in code[1]
    for strict in (False, True) if name == "old_mnist" else (False,):
        exported = torch.export.export(fused, (images,), strict=strict)
        torch.testing.assert_close(exported.module()(images), fused(images))
        graphs = [module for module in exported.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
        assert any("conv2d_relu_max_pool2d" in graph.code for graph in graphs)


def test_compiled_model_follows_its_mode():
    fused = fastlenet.fuse(OldMnistNet())
    compiled = torch.compile(fused, backend="eager")
    images = images_of("old_mnist")
    fused.train()
    compiled(images)
    fused.eval()
    torch.testing.assert_close(compiled(images), fused(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["resnet_stem", "vgg11_bn"])
def test_folded_batch_norm_is_as_accurate_as_stock(name, dtype):
    """The weights are scaled instead of the convolution's result; in 16 bits, too, that loses no accuracy."""
    model = CASES[name]().eval()
    stem = nn.Sequential(*list(model.children())[:4]) if name == "resnet_stem" else model.features[:4]
    stem = copy.deepcopy(stem).to(dtype).requires_grad_(False)
    exact, images = copy.deepcopy(stem).double(), images_of(name, dtype)
    fused = fastlenet.fuse(stem)
    assert fused_sites(fused, "inference") == (1, 0)
    assert_as_accurate(fused(images), stem(images), exact(images.double()), dtype=dtype)


def test_autocast_casts_as_in_the_stock_model():
    model = CASES["vgg11_bn"]().eval()
    fused, images = fastlenet.fuse(model), images_of("vgg11_bn")
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = fused(images), model(images)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_as_accurate(output, expected, model.double()(images.double()), dtype=torch.bfloat16)


@pytest.mark.parametrize("order", ["relu_first", "pool_first"])
def test_order_of_relu_and_pool_makes_no_difference(order):
    """Many ties, zeros and NaN: values and gradients are those of either order in stock, which agree."""

    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, images):
            maps = self.conv(images)
            if order == "relu_first":
                return F.max_pool2d(F.relu(maps), 3, 2, 1)
            return F.relu(F.max_pool2d(maps, 3, 2, 1))

    model = Ordered()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(exact_grid(tuple(parameter.shape), torch.float32, terms=18))
    fused = fastlenet.fuse(model)
    images = exact_grid((4, 2, 12, 12), torch.float32, terms=18)
    images[1, 0, 3, 4] = torch.nan
    images[2, 1, 5, 5] = torch.inf
    assert graph_nodes(fused(images)) == (1, 0)
    actual, expected = results(fused, images), results(model, images)
    for name in ("output", "conv.weight", "conv.bias"):
        assert_same_values(actual[name], expected[name], name=name)
    finite = torch.tensor([0, 3])
    assert_same_values(results(fused, images[finite])["input"], results(model, images[finite])["input"])


@st.composite
def chains(draw):
    """A Sequential of random layers, most of them parts of sites."""
    layers, channels = [], 2
    parts = ["conv", "relu", "pool", "norm", "dropout", "identity", "sigmoid", "tuple"]
    for part in draw(st.lists(st.sampled_from(parts), min_size=2, max_size=9)):
        if part == "conv":
            wide = draw(st.integers(1, 4))
            layers.append(nn.Conv2d(channels, wide, draw(st.integers(1, 3)), padding=1, bias=draw(st.booleans())))
            channels = wide
        layers += {
            "conv": [],
            "relu": [nn.ReLU(inplace=draw(st.booleans()))],
            "pool": [nn.MaxPool2d(2, draw(st.integers(1, 2)), padding=1, ceil_mode=draw(st.booleans()))],
            "norm": [nn.BatchNorm2d(channels)],
            "dropout": [nn.Dropout2d(0.5)],
            "identity": [nn.Identity()],
            "sigmoid": [nn.Sigmoid()],
            "tuple": [nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())],
        }[part]
    return nn.Sequential(*layers), draw(st.booleans())


@settings(max_examples=examples(50))
@given(chains())
def test_random_chains(drawn):
    """Whatever is found in a random chain of layers, the numbers stay."""
    model, training = drawn
    model = nn.Sequential(nn.Conv2d(2, 2, 1), *model).double().train(training)
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 2, 14, 14, dtype=torch.float64)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    try:
        expected = results(model, images)
    except RuntimeError:  # relu in place may spoil what the layer before it keeps
        assume(False)
    for name, value in statistics.items():
        model.get_buffer(name).copy_(value)
    for name, value in results(fused, images).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_measured_sites_are_kept_only_if_they_win(monkeypatch):
    """Judged by planted times: one convolution loses, so it stays stock; the rest is fused as long as all wins."""
    asked = []

    def compare(stock, fused, device):
        stock(), fused()
        asked.append(device)
        wins = 5 if len(asked) == 2 else trial.WINS
        return trial.Comparison(2e-3, 1e-3, wins)

    monkeypatch.setattr(trial, "compare", compare)
    fused = fastlenet.fuse(TutorialNet(), images_of("tutorial"))
    assert len(asked) == 10  # four sites and the whole, in both modes
    table = fastlenet.explain(fused)
    by_mode = {(site.name.split()[0], site.mode): site for site in table.sites}
    assert by_mode["conv2", "training"].implementation == "stock"
    assert "not clearly faster" in by_mode["conv2", "training"].reason
    assert by_mode["conv2", "inference"].implementation in IMPLEMENTATIONS
    assert by_mode["conv1", ""].stock == "2 ms"
    assert by_mode["conv1", ""].fused == "1 ms"
    assert by_mode["conv1", ""].input == "3x1x32x32 float32"
    assert "whole model in training mode: 2 ms stock, 1 ms fused" in str(table)
    assert graph_nodes(fused(images_of("tutorial"))) == (1, 2)
    assert graph_nodes(fused.eval()(images_of("tutorial"))) == (2, 2)
    assert fastlenet.fuse(fused).train() is not fused


def test_nothing_is_fused_where_the_whole_does_not_win(monkeypatch):
    asked = []

    def compare(stock, fused, device):
        asked.append(device)
        return trial.Comparison(2e-3, 1e-3, 0 if len(asked) % 5 == 0 else trial.WINS)

    monkeypatch.setattr(trial, "compare", compare)
    fused = fastlenet.fuse(TutorialNet(), images_of("tutorial"))
    assert graph_nodes(fused(images_of("tutorial"))) == (0, 0)
    assert set(reasons(fused)) == {"the whole model does not become clearly faster"}


def test_a_rewrite_that_computes_something_else_is_not_used(monkeypatch):
    """Should tracing have gone wrong unnoticed, the example tells."""
    monkeypatch.setattr(trial, "compare", lambda *_: trial.Comparison(2e-3, 1e-3, trial.WINS))
    rate = itertools.count(1)

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, images):
            return F.relu(self.linear(images)) * next(rate)

    fused = fastlenet.fuse(Drifting(), torch.randn(2, 4))
    assert "does not reproduce" in str(fastlenet.explain(fused))
    assert graph_nodes(fused(torch.randn(2, 4))) == (0, 0)


def test_measuring_leaves_no_trace():
    """Parameters, gradients, statistics, modes and the random generator are as they were; an error is the model's."""
    model = CASES["vgg11_bn"]()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    fused = fastlenet.fuse(model, images_of("vgg11_bn"))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in fused.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in fused.modules())
    assert all(site.stock and site.fused for site in fastlenet.explain(fused).sites if site.mode == "inference")
    with pytest.raises(RuntimeError, match="channels"):
        fastlenet.fuse(TutorialNet(), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", CASES)
def test_tables_fit_narrow_terminals(name, monkeypatch):
    """80 columns, all that is known of a site included; a word that is longer by itself may stand out."""
    monkeypatch.setattr(trial, "compare", lambda *_: trial.Comparison(2.36e-3, 12.3456, trial.WINS))
    table = fastlenet.explain(fastlenet.fuse(CASES[name](), images_of(name)))
    lines = str(table).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    text = " ".join(str(table).split())
    for site in table.sites:
        assert site.heading in text
        assert " ".join(filter(None, (site.mode, site.implementation, site.stock, site.fused, site.reason))) in text
    assert "2.36 ms 12.3 s" in text
    assert lines[-1] == trial.RULE


def test_a_site_without_dimensions_has_a_row():
    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, features):
            return F.relu(F.linear(features, self.weight))

    model, features = Score(), torch.arange(3.0)
    assert "linear > relu: linear_relu, 3 -> scalar float32" in str(fastlenet.explain(model, features))
    assert fastlenet.fuse(model)(features) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4e-8, "0.04 us"), (9.99e-4, "999 us"), (9.999e-4, "1 ms"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (123, "123 s")],
)
def test_times_have_units_that_suit_them(seconds, text):
    assert rewrite._time(seconds) == text


def run_for(clock, *milliseconds):
    """A call that takes so long by a planted clock, in turns."""
    lengths = itertools.cycle(milliseconds)

    def call():
        clock[0] += next(lengths) / 1e3

    return call


@pytest.mark.parametrize(
    ("stock", "fused", "clear"),
    [((3,), (1,), True), ((1,), (3,), False), ((1,), (1,), False), ((1.01,), (1,), False), ((1, 2), (2, 1), False)],
    ids=["faster", "slower", "equal", "within_the_margin", "changing"],
)
def test_only_clear_wins_count(stock, fused, clear, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    times = trial.compare(run_for(clock, *stock), run_for(clock, *fused), torch.device("cpu"))
    assert times.clear is clear
    if len(stock) == 1:
        assert (times.stock, times.fused) == pytest.approx((stock[0] / 1e3, fused[0] / 1e3))


@pytest.mark.parametrize(("won", "rounds"), [(0, 3), (5, 8), (12, 15)])
def test_a_lost_cause_is_cut_short(won, rounds, monkeypatch):
    """With three rounds lost 13 of 15 cannot be won any more: a large model's user is not kept waiting."""
    clock, calls = [0.0], itertools.count(-2)  # two calls come before the first round
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trial, "SAMPLE_SECONDS", 0)

    def fused():
        clock[0] += 0.001 if next(calls) < won else 0.003

    times = trial.compare(run_for(clock, 2), fused, torch.device("cpu"))
    assert (times.wins, times.rounds, times.clear) == (won, rounds, False)
    assert str(times) == f"won {won} of {rounds} rounds"


def test_a_hiccup_does_not_hide_a_win(monkeypatch):
    clock, calls = [0.0], itertools.count()
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trial, "SAMPLE_SECONDS", 0)

    def fused():
        clock[0] += 0.1 if next(calls) in (4, 9) else 0.001

    assert trial.compare(run_for(clock, 2), fused, torch.device("cpu")).wins == trial.ROUNDS - 2
    assert trial.WINS == trial.ROUNDS - 2


def test_model_of_several_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(4, 2)

        def forward(self, images, extra, scale=2.0):
            maps = F.max_pool2d(F.relu(self.conv(images)), 2)
            return maps, {"extra": F.relu(self.linear(extra)) * scale}

    model = Two()
    example = torch.randn(2, 1, 8, 8), torch.randn(3, 4)
    fused = fastlenet.fuse(model, example)
    for actual, expected in zip(trial.tensors(fused(*example)), trial.tensors(model(*example)), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(fused(*example, scale=3.0)[1]["extra"], model(*example, scale=3.0)[1]["extra"])
    sites = fastlenet.explain(model, example).sites
    assert [(site.input, site.output) for site in sites] == [
        ("2x1x8x8 float32", "2x2x3x3 float32"),
        ("3x4 float32", "3x2 float32"),
    ]


def test_arguments_that_are_no_models():
    with pytest.raises(TypeError, match=r"'model' must be a torch\.nn\.Module, but got list"):
        fastlenet.fuse([])
    compiled = torch.compile(TutorialNet(), backend="eager")
    assert "fuse first, then torch.compile" in str(fastlenet.explain(compiled))
    assert type(fastlenet.fuse(fastlenet.LeNet())) is fastlenet.LeNet
    assert "no forward of its own" in str(fastlenet.explain(nn.Conv2d(1, 2, 3)))
    assert isinstance(fastlenet.fuse(ResNetStem(8)), ResNetStem)
