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

import fastlenet
from fastlenet import timing
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
