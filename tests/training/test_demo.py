"""The demo: what agreement means, what it counts, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from runs import CPU, assert_one_line, quick
from torch import nn

import fastlenet
from fastlenet.training import data, demo, loop


def judged(model: nn.Module, digits: data.Dataset, steps: int = 10) -> demo.Agreement:
    """Train `model` for some steps and judge its losses."""
    config = quick(batch_size=16, max_shift=0)
    batches = loop.Batches(digits.train_images, digits.train_labels, batch_size=16, seed=0)
    weights = demo.initial_weights(0)
    learner = demo.learner_from(model, weights, config)
    learner.start_epoch(0)
    losses = [learner.step(*batch).item() for _, batch in zip(range(steps), batches.epoch(0), strict=False)]
    return demo.judge(losses, batches, weights, config)


def test_right_networks_agree(digits: data.Dataset) -> None:
    for model in (fastlenet.LeNet(), fastlenet.StockLeNet()):
        found = judged(model, digits)
        assert found.ok, found


class Stuck(fastlenet.StockLeNet):
    """A wrong backward: the first bias never learns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1.bias.requires_grad_(False)


class Rough(fastlenet.StockLeNet):
    """A forward that rounds to bfloat16 on the way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.bfloat16().float())


@pytest.mark.parametrize("model", [Stuck, Rough])
def test_wrong_networks_do_not_agree(digits: data.Dataset, model: type[nn.Module]) -> None:
    found = judged(model(), digits)
    assert not found.ok, found


def test_nan_never_agrees() -> None:
    assert not demo.Agreement(1, float("nan"), 1.0, 1.0).ok
    assert demo.largest_difference([1.0, float("nan")], [1.0, 2.0]) != 0


def test_saved_bytes_are_counted_by_hand(digits: data.Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    learner = loop.Learner(model, quick(), CPU)
    images, labels = digits.train_images[:64].clone(), digits.train_labels[:64].clone()
    # The images (kept for the weight's gradient), the log-probabilities, the labels; a number for the whole batch.
    assert demo.saved_bytes_per_image(learner, images, labels) == pytest.approx(4 * 1024 + 4 * 10 + 8, abs=0.5)


def test_fused_layers_save_less(digits: data.Dataset) -> None:
    fused, stock = (
        demo.saved_bytes_per_image(
            loop.Learner(model, quick(), CPU), digits.train_images[:64].clone(), digits.train_labels[:64].clone()
        )
        for model in (fastlenet.LeNet(), fastlenet.StockLeNet())
    )
    # Per image: input, the two pooled outputs with a byte an argmax, two hidden layers, the loss's own.
    assert fused == pytest.approx(12_792 + 48, abs=0.5)
    assert stock > 3 * fused


@pytest.mark.wide
def test_demo_fails_where_the_networks_have_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("matplotlib")
    arguments = ["--output", tmp_path, "--epochs", 3, "--device", "cpu", "--part", "training"]
    assert demo.main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert len(printed.splitlines()) < 40, "progress bars stay out of logs"
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["steps"] == 120
    assert record["agreement"]["ok"]
    assert 0.5 < record["accuracy"][0] < 0.97
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_curves_of_networks_that_never_differ() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    demo.draw_losses(figure.subfigures(), [[4.0, 2.0, 1.0]] * 2, steps_per_epoch=4)
    upper, lower = figure.axes
    assert [list(line.get_ydata()) for line in upper.lines] == [[4.0, 3.0, 1.5]] * 2
    assert lower.get_yscale() == "linear"  # zero has no place on a scale of logarithms
    assert "exactly zero at 3 of 3 steps" in lower.get_title()


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--epochs", "0"], "epochs must be"),
        (["--part", "half"], "invalid choice: 'half'"),
        (["--device", "warp"], "device 'warp'"),
        (["--part", "kernels", "--device", "cpu"], "set TRITON_INTERPRET=1"),
    ],
)
def test_demo_refuses_bad_input(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert demo.main([*arguments, "--output", str(tmp_path)]) == 2
    assert_one_line(capsys, part)
