"""`fastlenet.explain`: what it tells before and after `fuse`, and that it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import CASES, TutorialNet
from test_fuse import ROWS, Loop, Remembers, Small, TargetsInTraining, assert_same, images_of
from torch import nn

import fastlenet
from fastlenet import timing
from fastlenet.fusion.explain import COMPILED, NO_SITES


def names(table):
    return [site.name for site in table.sites]


def test_without_an_example_nothing_is_known_before_the_first_call():
    model = TutorialNet()
    for network in (model, fastlenet.fuse(model)):
        table = fastlenet.explain(network)
        assert table.sites == ()
        assert "nothing is known" in str(table)
        assert "example" in str(table)
    fused = fastlenet.fuse(model)
    fused(images_of("tutorial"))
    assert len(fastlenet.explain(fused).sites) == 4
    assert "nothing is known" not in str(fastlenet.explain(fused))


@pytest.mark.parametrize("measured", [False, True])
def test_a_model_without_sites_is_told_so(measured):
    model, images = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.AvgPool2d(2)), torch.randn(2, 1, 8, 8)
    fused = fastlenet.fuse(model, images if measured else None)
    assert ("nothing is known" in str(fastlenet.explain(fused))) is not measured
    fused(images)
    for table in (fastlenet.explain(fused), fastlenet.explain(fused, images), fastlenet.explain(model, images)):
        assert table.notes == (NO_SITES,)


def test_a_compiled_model_is_told_what_its_model_is(cpu_kernels):
    """torch.compile's module hides what its backend did, so the sites are those that fuse would find."""
    model, images = TutorialNet(), images_of("tutorial")
    table = fastlenet.explain(torch.compile(model, backend="fastlenet"), images)
    assert table.sites == fastlenet.explain(model, images).sites
    assert table.notes == (COMPILED,)


def test_a_lenet_is_one_chain_where_it_runs_as_one(cpu_kernels):
    """Also within a model; a layer with a hook runs by itself."""
    images = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    network = fastlenet.LeNet(dtype=torch.float64)
    for model, path in ((network, ""), (nn.Sequential(network), "0.")):
        [site] = fastlenet.explain(model, images).sites
        assert site.name == " > ".join(f"{path}{layer}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3"))
        assert (site.operator, site.implementation) == ("chain", "cpu")
        assert (site.input, site.output) == ("3x1x32x32 float64", "3x10 float64")
    network.fc1.register_forward_hook(lambda *_: None)
    assert names(fastlenet.explain(network, images)) == ["conv1", "conv2", "fc1", "fc2"]


def test_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, but got int"):
        fastlenet.explain(3)


def test_a_stock_model_is_told_what_fuse_would_do():
    table = fastlenet.explain(TutorialNet(), images_of("tutorial"))
    assert [(site.operator, site.implementation, site.reason) for site in table.sites] == [
        (operator, "stock", "fastlenet.fuse can take it over")
        for operator in ("conv2d_relu_max_pool2d",) * 2 + ("linear_relu",) * 2
    ]
    assert names(table)[0] == "conv1 > relu > max_pool2d"
    assert table.sites[0].input == "3x1x32x32 float32"
    assert table.sites[0].output == "3x6x14x14 float32"


def test_a_fused_model_is_told_what_runs():
    fused = fastlenet.fuse(CASES["resnet_stem"]())
    images = images_of("resnet_stem")
    fused(images)
    with torch.no_grad():
        fused.eval()(images)
    training, inference = fastlenet.explain(fused).sites
    assert (training.mode, training.implementation) == ("training", "stock")
    assert "BatchNorm takes its statistics from the whole batch" in training.reason
    assert (inference.mode, inference.implementation) == ("inference", "aten")
    assert inference.reason.startswith("not measured; the input is on cpu, which Triton does not drive; ")
    with fastlenet.use_backend("aten"):
        assert "backend 'aten' is forced" in str(fastlenet.explain(fused))


def test_an_example_of_another_shape():
    fused = fastlenet.fuse(TutorialNet())
    fused(images_of("tutorial"))
    table = fastlenet.explain(fused, torch.randn(7, 1, 32, 32))
    assert [site.input.split()[0] for site in table.sites] == ["7x1x32x32", "7x6x14x14", "7x400", "7x120"]
    assert fastlenet.explain(fused).sites[0].input.split()[0] == "3x1x32x32"


def test_layers_of_fastlenets_own():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fastlenet.ConvReLUMaxPool2d(1, 2, 3), nn.Conv2d(2, 3, 3)

        def forward(self, images):
            return F.max_pool2d(self.second(self.first(images)).relu(), 2)

    model = Mixed().eval()
    assert names(fastlenet.explain(model)) == ["first"]
    table = fastlenet.explain(model, torch.randn(2, 1, 14, 14))
    assert names(table) == ["first", "second > relu > max_pool2d"]
    assert table.sites[0].input == "2x1x14x14 float32"
    assert names(fastlenet.explain(fastlenet.LeNet())) == ["conv1", "conv2", "fc1", "fc2"]


def test_a_module_called_again_is_a_site_of_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, rows):
            return self.relu(self.linear(self.relu(self.linear(rows))))

    table = fastlenet.explain(Twice(), torch.randn(3, 4))
    assert names(table) == ["linear > relu", "linear > relu (2)"]


def test_nested_models_have_their_paths():
    table = fastlenet.explain(nn.Sequential(TutorialNet(), nn.Linear(10, 5), nn.ReLU()), images_of("tutorial"))
    assert names(table)[-2:] == ["0.fc2 > 0.relu", "1 > 2"]


class Counted(nn.Module):
    """A parametrization that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 2


class BatchCounter(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.kept = torch.zeros(4)
        self.config = type("Config", (), {"calls": 0})()

    def forward(self, x):
        self.seen += 1
        self.kept += 1
        self.config.calls += 1
        return F.relu(self.fc(x)) * self.seen


@pytest.mark.parametrize("fused", [False, True])
def test_it_leaves_no_trace(fused):
    parametrized = Loop(nn.ModuleList)
    nn.utils.parametrize.register_parametrization(parametrized.fc, "weight", Counted())
    calls = parametrized.fc.parametrizations.weight[0].calls
    spectral = Loop(nn.ModuleList)
    nn.utils.parametrizations.spectral_norm(spectral.fc)
    models = [
        Remembers(),
        parametrized,
        spectral,
        BatchCounter(),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double(),
    ]
    for model in models:
        model = fastlenet.fuse(model, inplace=True) if fused else model
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        modes = [module.training for module in model.modules()]
        kept = {id(module): set(vars(module)) for module in model.modules()}
        fastlenet.explain(model, ROWS)
        fastlenet.explain(model, ROWS)
        assert torch.equal(torch.get_rng_state(), random)
        assert_same(dict(model.state_dict()), dict(state))
        assert modes == [module.training for module in model.modules()]
        assert kept == {id(module): set(vars(module)) for module in model.modules()}
        assert all(parameter.grad is None for parameter in model.parameters())
    remembers, _, _, counter, _ = models
    assert (remembers.feats, remembers.d, remembers.st) == ([], {}, {"n": 0})
    assert parametrized.fc.parametrizations.weight[0].calls == calls
    assert counter.config.calls == 0
    assert torch.equal(counter.kept, torch.zeros(4))


def test_a_mode_that_cannot_run_is_a_note():
    model = TargetsInTraining()
    assert "in training mode the model cannot run the example" in str(fastlenet.explain(model, ROWS))
    assert names(fastlenet.explain(model.eval(), ROWS)) == ["fc > relu"]


@pytest.mark.parametrize("name", ["tutorial", "vgg11_bn", "nested"])
def test_tables_fit_narrow_terminals(name, monkeypatch):
    """80 columns, all that is known of a site included; a word that is longer by itself may stand out."""
    monkeypatch.setattr(timing, "compare", lambda *_: timing.Comparison(2.36e-3, 12.3456, timing.WINS))
    table = fastlenet.explain(fastlenet.fuse(CASES[name](), images_of(name)))
    lines = str(table).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    text = " ".join(str(table).split())
    for site in table.sites:
        assert site.heading in text
        assert " ".join(filter(None, (site.mode, site.implementation, site.stock, site.fused, site.reason))) in text
    assert "2.36 ms 12.3 s" in text
    assert lines[-1] == timing.RULE


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


def test_several_arguments():
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
    torch.testing.assert_close(fused(*example), model(*example))
    torch.testing.assert_close(fused(*example, scale=3.0), model(*example, scale=3.0))
    sites = fastlenet.explain(model, example).sites
    assert [(site.input, site.output) for site in sites] == [
        ("2x1x8x8 float32", "2x2x3x3 float32"),
        ("3x4 float32", "3x2 float32"),
    ]
