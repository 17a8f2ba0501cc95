"""Checkpoints: whole or refused, and files that are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from runs import CPU, quick
from torch import nn

import fastlenet
from fastlenet import errors, files
from fastlenet.training import checkpoint, data, distributed, loop


def test_any_safetensors_reader_can_take_the_weights(saved: Path) -> None:
    from safetensors.torch import load_file

    weights = {key.removeprefix("model."): value for key, value in load_file(saved).items() if key[:6] == "model."}
    fastlenet.StockLeNet().load_state_dict(weights)


def test_damaged_checkpoints_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    positions = torch.linspace(0, len(content) - 1, 40).long().tolist()
    for position in positions:
        saved.write_bytes(content[:position])
        with pytest.raises(checkpoint.CheckpointError, match=r"run\.safetensors"):
            checkpoint.load(saved)
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        saved.write_bytes(flipped)
        with pytest.raises(checkpoint.CheckpointError, match=r"run\.safetensors"):
            checkpoint.load(saved)
    saved.write_bytes(content)
    assert checkpoint.load(saved).epoch == 1


def test_tensors_of_other_names_or_shapes_are_refused(saved: Path) -> None:
    """Their bytes are the same."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    weight, bias = tensors["model.fc1.weight"], tensors["model.fc1.bias"]
    first, second = tensors["model.conv1.bias"], tensors["model.conv2.bias"]
    for changed in (
        {"model.fc1.weight": weight.reshape(weight.shape[::-1])},
        {"model.fc1.bias": bias.view(torch.int32)},
        {"model.conv1.bias": second, "model.conv2.bias": first},
    ):
        save_file(tensors | changed, saved, metadata)
        with pytest.raises(checkpoint.CheckpointError, match="its content does not match its digest"):
            checkpoint.load(saved)
    save_file(tensors, saved, metadata)
    assert checkpoint.load(saved).epoch == 1


def test_foreign_files_are_refused(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="no fastlenet-checkpoint"):
        checkpoint.load(tmp_path / "other.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "missing.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="is damaged or no safetensors file"):
        checkpoint.load(tmp_path)
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(checkpoint.CheckpointError, match="has version 1; this fastlenet reads version 2"):
        checkpoint.load(saved)


def test_a_checkpoint_that_does_not_fit_touches_nothing(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    model = fastlenet.StockLeNet(num_classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(
        checkpoint.CheckpointError, match=r"fc3\.weight is float32 \[10, 84\], expected float32 \[7, 84\]"
    ):
        loaded.restore(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(checkpoint.CheckpointError, match=r"no weight, no bias, unexpected conv\d\.\w+, and 9 more"):
        loaded.restore(nn.Linear(2, 2), optimizer)
    model = fastlenet.StockLeNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(list(model.parameters())[1:])):
        with pytest.raises(checkpoint.CheckpointError, match="optimizer is of another kind or steps other parameters"):
            loaded.restore(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_restored_checkpoint_stays_as_it_was(saved: Path, digits: data.Dataset) -> None:
    loaded = checkpoint.load(saved)
    losses = []
    for _ in range(2):
        learner = loop.Learner(fastlenet.StockLeNet(), quick(optimizer="adam"), CPU)
        loaded.restore(learner.model, learner.optimizer)
        losses.append([learner.step(digits.train_images, digits.train_labels).item() for _ in range(3)])
    assert losses[0] == losses[1]


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = {"epoch": 0, "step": 0, "config": {}, "history": []}
    checkpoint.save(tmp_path / "tied", model, optimizer, checkpoint.rng_states(distributed.ALONE), **state)
    assert torch.equal(checkpoint.load(tmp_path / "tied").model["1.weight"], model[0].weight)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    files.atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        expected = errors.InputError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
            files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    files.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.wide
def test_a_process_killed_while_writing_leaves_the_old_file(saved: Path, folder: Path) -> None:
    before = saved.read_bytes()
    program = (
        "import os, sys; from fastlenet.training import loop\n"
        "os.replace = lambda *_: os._exit(9)\n"  # the last moment before the new file takes the name
        "config = loop.TrainConfig(data=sys.argv[1], epochs=1, device='cpu')\n"
        "loop.train(config, checkpoint_file=sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(saved)], check=False)
    assert done.returncode == 9
    assert saved.read_bytes() == before
    assert checkpoint.load(saved).epoch == 1


def test_writing_through_a_link_replaces_the_file_behind_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "file")
    files.atomic_write(link, b"content")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"content"


def test_a_generator_state_of_another_pytorch_is_an_error_in_one_line() -> None:
    before = torch.get_rng_state()
    for state in (torch.zeros(7, dtype=torch.uint8), torch.zeros(len(before))):
        with pytest.raises(checkpoint.CheckpointError, match="generator state does not fit this PyTorch"):
            checkpoint.set_rng_states({"cpu": state}, distributed.ALONE)
    assert torch.equal(torch.get_rng_state(), before)
