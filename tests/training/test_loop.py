"""The loop: batches, steps, evaluation, and runs that resume."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from runs import IMAGES, TEST, TRAIN, WithDropout, assert_same_weights, quick
from torch import nn

import fastlenet
from fastlenet.training import checkpoint, data, demo, loop


def test_each_epoch_has_every_image_once_in_a_new_order(digits: data.Dataset) -> None:
    batches = loop.Batches(digits.train_images, torch.arange(TRAIN), batch_size=40, seed=3)
    epochs = [[labels.tolist() for _, labels, _ in batches.epoch(epoch)] for epoch in (0, 1, 0)]
    assert [len(some) for some in epochs[0]] == [40, 40, 16]
    assert len(batches) == 3
    assert sorted(label for labels in epochs[0] for label in labels) == list(range(TRAIN))
    assert epochs[0] == epochs[2], "an epoch's batches depend on seed and number alone"
    assert epochs[0] != epochs[1]
    other = loop.Batches(digits.train_images, torch.arange(TRAIN), batch_size=40, seed=4)
    assert [labels.tolist() for _, labels, _ in other.epoch(0)] != epochs[0]


def test_shifts_move_whole_images() -> None:
    images = torch.zeros(400, 2, 32, 32)
    images[:, 0, 10:20, 12:18] = 1.0
    images[:, 1, 15, 15] = 5.0
    seen = set()
    for some, *_ in loop.Batches(images, torch.arange(400), batch_size=50, seed=0, max_shift=2).epoch(0):
        assert some.is_contiguous()
        for image in some:
            down, right = ((image[1] == 5).nonzero().squeeze(0) - 15).tolist()
            seen.add((down, right))
            assert torch.equal(image, images[0].roll((down, right), dims=(1, 2)))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


# ------------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("optimizer", "lion", "optimizer must be one of sgd, nesterov, adam, rmsprop, got 'lion'"),
        ("loss", "hinge", "loss must be one of cross-entropy, mse"),
        ("dtype", "int8", "dtype must be one of float32, bfloat16, float16, float64"),
        ("epochs", 0, "epochs must be a whole number from 1"),
        ("epochs", 1.5, "epochs must be a whole number"),
        ("epochs", True, "epochs must be a whole number"),
        ("batch_size", -1, "batch_size must be"),
        ("max_shift", 9, "max_shift must be a whole number from 0 to 8"),
        ("seed", -1, "seed must be"),
        ("lr", 0.0, "lr must be a number above 0"),
        ("lr", float("nan"), "lr must be"),
        ("lr", float("inf"), "lr must be"),
        ("lr_decay", 1.1, "lr_decay must be a number above 0 and at most 1"),
    ],
)
def test_impossible_options_are_named(option: str, value: object, message: str) -> None:
    with pytest.raises(loop.ConfigError, match=message):
        quick(**{option: value})


@pytest.mark.cheap
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_float16_is_refused_where_it_cannot_work(optimizer: str) -> None:
    with pytest.raises(loop.ConfigError, match=f"{optimizer} cannot step float16"):
        quick(optimizer=optimizer, dtype="float16")


@pytest.mark.cheap
@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta"])
def test_impossible_devices_are_named(device: str) -> None:
    with pytest.raises(loop.ConfigError, match=f"device '{device}'"):
        quick(device=device).torch_device()


def test_a_forced_backend_that_cannot_run_is_an_option_error(digits: data.Dataset) -> None:
    with fastlenet.use_backend("triton"), pytest.raises(loop.ConfigError, match="'triton' is forced"):
        loop.train(quick(dtype="float64"), dataset=digits)


@pytest.mark.parametrize("loss", loop.LOSSES)
@pytest.mark.parametrize("dtype", loop.DTYPES)
def test_every_dtype_and_loss_trains(digits: data.Dataset, dtype: str, loss: str) -> None:
    result = loop.train(quick(dtype=dtype, loss=loss, optimizer="sgd", epochs=3), dataset=digits)
    assert {parameter.dtype for parameter in result.model.parameters()} == {loop.DTYPES[dtype]}
    assert len(result.losses) == 9
    assert sum(result.losses[-3:]) < sum(result.losses[:3])


@pytest.mark.parametrize("optimizer", loop.OPTIMIZERS)
def test_a_step_is_what_plain_pytorch_does(digits: data.Dataset, optimizer: str) -> None:
    config = quick(optimizer=optimizer, lr_decay=0.5)
    weights = demo.initial_weights(0)
    learner = demo.learner_from(fastlenet.StockLeNet(), weights, config)
    by_hand = fastlenet.StockLeNet()
    by_hand.load_state_dict(weights)
    made = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1),
        "nesterov": lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.002),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001),
    }[optimizer](by_hand.parameters())
    first_rate = made.param_groups[0]["lr"]
    for epoch in range(2):
        learner.start_epoch(epoch)
        made.param_groups[0]["lr"] = first_rate * 0.5**epoch
        loss = learner.step(digits.train_images[:32], digits.train_labels[:32])
        made.zero_grad()
        expected = nn.functional.cross_entropy(by_hand(digits.train_images[:32]), digits.train_labels[:32])
        expected.backward()
        made.step()
        assert torch.equal(loss, expected.detach())
    assert_same_weights(learner.model, by_hand)


def test_learners_take_turns_on_the_same_batches(digits: data.Dataset) -> None:
    config = quick(max_shift=2)
    weights = demo.initial_weights(0)
    learners = [demo.learner_from(fastlenet.StockLeNet(), weights, config) for _ in range(2)]
    batches = loop.Batches(digits.train_images, digits.train_labels, batch_size=40, seed=0, max_shift=2)
    steps = list(demo.train_in_turns(learners, batches, 0))
    assert [index for index, _, _ in steps] == [0, 1, 1, 0, 0, 1]
    assert all(seconds > 0 for _, _, seconds in steps)
    left, right = ([loss for index, loss, _ in steps if index == learner] for learner in (0, 1))
    assert left == right
    alone = demo.learner_from(fastlenet.StockLeNet(), weights, config)
    reported = []
    assert loop.run_epoch(alone, batches, 0, lambda number, loss: reported.append((number, loss.item()))) == left
    assert reported == list(enumerate(left, start=1))


def test_evaluation_counts_right_answers(digits: data.Dataset) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.eye(10)[3])

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return self.logits.expand(len(input), 10)

    model = Constant()
    found = loop.evaluate(model, digits.test_images, digits.test_labels, batch_size=10)
    threes = int((digits.test_labels == 3).sum())
    assert found.accuracy == threes / TEST
    assert found.predictions.tolist() == [3] * TEST
    logits = torch.eye(10)[3].expand(TEST, 10)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, digits.test_labels).item())
    assert model.training


def test_metrics_and_callbacks(digits: data.Dataset, tmp_path: Path) -> None:
    records: list[dict[str, object]] = []
    config = quick(epochs=3)
    result = loop.train(config, dataset=digits, output=tmp_path / "deep" / "out", on_epoch=records.append)
    metrics = json.loads((tmp_path / "deep" / "out" / "metrics.json").read_text())
    assert metrics["config"] == dataclasses.asdict(config)
    assert metrics["epochs"] == result.history == records
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert metrics["steps"] == 9
    assert metrics["test_accuracy"] == result.evaluation.accuracy
    assert metrics["data"]["train"] == TRAIN
    assert metrics["environment"]["torch"] == torch.__version__
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == [
        "checkpoint.safetensors",
        "metrics.json",
    ]


def test_the_callers_generator_is_left_alone(digits: data.Dataset) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loop.train(quick(epochs=1), dataset=digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_matter_and_repeat(digits: data.Dataset) -> None:
    losses = [loop.train(quick(epochs=1, seed=seed), dataset=digits).losses for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    digits: data.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop.train(quick(epochs=1), dataset=digits, output=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert not caplog.records
    with pytest.raises(loop.TrainingDivergedError, match="diverged in epoch 1"):
        loop.train(quick(epochs=3, lr=1e30), dataset=digits, output=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert "will replace the checkpoint" in caplog.text


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("optimizer", loop.OPTIMIZERS)
@pytest.mark.parametrize("model", [None, WithDropout])
def test_resuming_is_exact(digits: data.Dataset, tmp_path: Path, optimizer: str, model: type[nn.Module] | None) -> None:
    def run(name: str, epochs: int, resume: bool = False) -> loop.TrainResult:
        config = quick(epochs=epochs, optimizer=optimizer)
        # Weights of a resumed model must all come from the checkpoint.
        torch.manual_seed(epochs + resume)
        made = None if model is None else model()
        if made is not None and not resume:
            made.load_state_dict(demo.initial_weights(0))
        return loop.train(config, dataset=digits, model=made, output=tmp_path / name, resume=resume)

    whole = run("whole", 4)
    first = run("parts", 2)
    second = run("parts", 4, resume=True)
    assert first.losses + second.losses == whole.losses
    assert second.history == whole.history
    assert_same_weights(second.model, whole.model)
    # Everything there is to know about a run is in its checkpoint, so this says it all once more.
    parts, at_once = (tmp_path / name / "checkpoint.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == at_once.read_bytes()


@pytest.mark.wide
def test_resuming_in_another_process_is_exact(folder: Path, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> None:
        command = [sys.executable, "-m", "fastlenet", "train", "--data", str(folder), "--device", "cpu"]
        subprocess.run(
            [*command, "--output", str(tmp_path / name), *options],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    run("whole", "--epochs", "3", "--optimizer", "adam")
    run("parts", "--epochs", "1", "--optimizer", "adam")
    run("parts", "--epochs", "3", "--resume")
    parts, at_once = (tmp_path / name / "checkpoint.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == at_once.read_bytes()


def test_an_interrupted_epoch_is_repeated_exactly(digits: data.Dataset, tmp_path: Path) -> None:
    config = quick(epochs=3, optimizer="adam")

    def stop_in_the_second_epoch(number: int, _: torch.Tensor) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, dataset=digits, output=tmp_path, on_step=stop_in_the_second_epoch)
    resumed = loop.train(config, dataset=digits, output=tmp_path, resume=True)
    whole = loop.train(config, dataset=digits)
    assert resumed.losses == whole.losses[3:]
    assert_same_weights(resumed.model, whole.model)


def test_resuming_a_finished_run_changes_nothing(digits: data.Dataset, tmp_path: Path) -> None:
    whole = loop.train(quick(), dataset=digits, output=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    again = loop.train(quick(), dataset=digits, output=tmp_path, resume=True)
    assert again.losses == []
    assert again.evaluation.accuracy == whole.evaluation.accuracy
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "trained with optimizer nesterov, not adam"),
        ({"lr": 0.5}, "trained with lr 0.03, not 0.5"),
        ({"seed": 1}, "trained with seed 0, not 1"),
        ({"dtype": "float64"}, "trained with dtype float32, not float64"),
        ({"epochs": 1}, "finished 2 epochs already"),
    ],
)
def test_a_resumed_run_keeps_its_options(
    digits: data.Dataset, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    loop.train(quick(), dataset=digits, output=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        loop.train(quick(**changes), dataset=digits, output=tmp_path, resume=True)


def test_a_resumed_run_keeps_its_data_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    loop.train(quick(folder, epochs=1), output=tmp_path / "out")
    moved = folder.rename(tmp_path / "moved")
    loop.train(quick(moved, epochs=2), output=tmp_path / "out", resume=True)
    images = (moved / IMAGES).read_bytes()
    (moved / IMAGES).write_bytes(images[:-1] + bytes([255 - images[-1]]))
    with pytest.raises(checkpoint.CheckpointError, match="other data"):
        loop.train(quick(moved, epochs=3), output=tmp_path / "out", resume=True)
