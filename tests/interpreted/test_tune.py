"""The tuner, all but its clock: what it drops, what it takes, and that the decision then follows the table it wrote."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import partial

import pytest
import torch
from fastlenet.kernels import configurations
from fastlenet.kernels.configurations import Configuration
from fastlenet.kernels.conv2d_relu_max_pool2d import general
from harness import modes

import fastlenet
from bench import tune
from bench.workloads import ConvCase, LinearCase
from fastlenet import functional, library
from fastlenet.errors import InputError

pytestmark = pytest.mark.skipif(not modes.interpreting(), reason="a GPU's clock is not injected")
CASE = ConvCase("tiny", 2, 6, 3, 3, padding=1)
WRONG, BROKEN, SMALL = {"BLOCK_K": 64}, {"BLOCK_K": 128}, {"BLOCK_N": 32}
AS_RULED, LIBRARY = Configuration("general", {}, ""), Configuration("aten", {}, "")


class StoppedClock:
    """Tells the times it was given, by a part of a configuration's name."""

    def __init__(self, **times: float) -> None:
        self.times = times

    def prepare(self, call) -> None:
        """Nothing is captured."""

    def seconds(self, calls):
        """1, unless told otherwise."""
        return {name: next((t for part, t in self.times.items() if part in name), 1.0) for name in calls}


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A copy of the committed table, which alone is read and written."""
    path = tmp_path / "configurations.json"
    shutil.copy(configurations._COMMITTED, path)
    monkeypatch.setattr(configurations, "_COMMITTED", path)
    configurations.table.cache_clear()
    yield path
    configurations.table.cache_clear()


@pytest.fixture
def offered(monkeypatch):
    """Offer these configurations for every slot."""

    def offer(*options) -> None:
        found = [AS_RULED, *(Configuration("general", some, "") for some in options), LIBRARY]
        monkeypatch.setattr(tune, "candidates", lambda _: found)

    return offer


def entries(path):
    """What was tuned here: the interpreter's own lines are modelled."""
    lines = [e for e in json.loads(path.read_text()) if e["architecture"] == "interpreted"]
    return [e for e in lines if e["evidence"].startswith("measured on")]


def tuned(case=CASE, **times):
    said: list[str] = []
    written = tune.tune([(case, 64)], ["ieee"], torch.device("cpu"), StoppedClock(**times), said.append)
    return written, "\n".join(said)


@pytest.mark.wide
def test_the_fastest_is_written_and_taken(table, offered, launches):
    before = json.loads(table.read_text())
    offered(SMALL)
    written, _ = tuned(BLOCK_N=0.5)
    assert written == 4
    found = entries(table)
    assert [e["kernel"].rpartition(".")[2] for e in found] == ["forward", "grad_input", "grad_weight", "backward"]
    for entry in found:
        assert (entry["architecture"], entry["modes"], entry["variant"]) == ("interpreted", ["ieee"], "general")
        assert entry["options"] == SMALL
    # All other lines stand as they stood.
    assert json.loads(table.read_text())[: len(before)] == before
    launches.clear()
    call = partial(functional.conv2d_relu_max_pool2d, torch.randn(5, 2, 6, 6), padding=1)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    call(weight=weight).sum().backward()
    tiles = [(name, c["BLOCK_N"]) for name, c in launches if "BLOCK_M" in c]
    assert tiles == [("_forward_kernel", 32), ("_grad_weight_kernel", 32)]


@pytest.mark.wide
@pytest.mark.parametrize("case", [CASE, LinearCase("tiny", 5, 4)], ids=["convolution", "linear"])
def test_the_library_is_written_where_it_wins(case, table, offered):
    offered()
    tuned(case, aten=0.5)
    forward = next(e for e in entries(table) if e["kernel"].endswith(".forward"))
    assert (forward["variant"], forward["options"]) == ("aten", {})
    if isinstance(case, ConvCase):
        input, weight = torch.empty(7, *case.input_shape), torch.empty(case.parameter_shapes["weight"])
        reasons = [library.convolution(way, input, weight, case.geometry) for way in ("forward", "backward")]
    else:
        mat1, mat2 = torch.empty(7, 5), torch.empty(5, 4)
        reasons = [library.product(way, mat1, mat2) for way in ("forward", "backward")]
    assert all(reason.startswith("the table of configurations takes the library: measured on") for reason in reasons)


@pytest.mark.wide
def test_what_computes_something_else_is_never_taken(table, offered, monkeypatch):
    forward = general.forward

    def slightly_wrong(*args):
        if args[-1] == BROKEN:
            raise RuntimeError("out of resources")
        output, code = forward(*args)
        return (output * 1.001 if args[-1] == WRONG else output), code

    monkeypatch.setattr(general, "forward", slightly_wrong)
    offered(WRONG, BROKEN)
    _, said = tuned(BLOCK_K=0.1)
    found = next(e for e in entries(table) if e["kernel"].endswith(".forward"))
    assert (found["variant"], found["options"]) == ("general", {})
    assert "dropped general {'BLOCK_K': 64}: output: largest error" in said
    assert "dropped general {'BLOCK_K': 128}: RuntimeError: out of resources" in said


@pytest.mark.wide
def test_a_hair_is_no_win(table, offered):
    offered(SMALL)
    tuned(BLOCK_N=0.99)
    assert {json.dumps(e["options"]) for e in entries(table)} == {"{}"}


@pytest.mark.wide
def test_tuning_again_replaces_the_line(table, offered):
    offered(SMALL)
    tuned(BLOCK_N=0.5)
    tuned(BLOCK_N=2.0)
    assert len(entries(table)) == 4
    assert {json.dumps(e["options"]) for e in entries(table)} == {"{}"}


def test_a_table_that_cannot_be_written_stays_whole(table, offered, monkeypatch):
    before = table.read_bytes()
    offered()

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(InputError):
        tuned()
    assert table.read_bytes() == before
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_every_space_holds_what_ships():
    """What the table lists for LeNet on an H100 is among what would be tried, as are our own rule and the library."""
    from bench.workloads import LENET_OPERATORS

    listed = [e for e in json.loads(configurations._COMMITTED.read_text()) if e["architecture"] == "sm_90"]
    found = 0
    for case, mode in itertools.product(LENET_OPERATORS[:2], tune.MODES):
        for slot in tune.slots(case, mode)[:-1]:
            space = [(tried.variant, tried.options) for tried in tune.candidates(slot)]
            assert space[0] == ("general", {})
            assert ("aten" in dict(space)) == slot.kernel.endswith(".forward")
            for entry in listed:
                if (entry["kernel"], entry["shape"]) == (slot.kernel, list(tune.shape_of(case))) and mode in entry[
                    "modes"
                ]:
                    assert (entry["variant"], entry["options"]) in space
                    found += 1
    assert found == 15  # five kernels in three modes


def test_it_tunes_what_is_benchmarked():
    names = [case.name for case, _ in tune.works("")]
    assert {"LeNet.conv1", "LeNet.fc1", "VGG.256", "linear.4096"} <= set(names)
    assert [case.name for case, _ in tune.works("vgg.256")] == ["VGG.256"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    from bench import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with fastlenet.use_backend("auto"):
        assert run.main(["--tune"]) == 2
    assert capsys.readouterr().err.strip() == (
        "fastlenet bench: error: --tune measures on a GPU, and PyTorch sees none here"
    )
