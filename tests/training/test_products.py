"""What `fastlenet train` writes beside its checkpoint: the picture, the ONNX file, the exported program."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import torch
from runs import assert_one_line, quick, run_command, write_idx

import fastlenet
from fastlenet.errors import install_command
from fastlenet.training import checkpoint, data, loop, picture, products

pytestmark = pytest.mark.xdist_group("LeNet")  # see test_predict.py
RECORD: dict[str, object] = {"fastlenet": fastlenet.__version__, "input": "(n, 1, 32, 32)"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products") / "digits"
    write_idx(folder)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> loop.TrainResult:
    return loop.train(quick(folder))


def outputs_of_onnx(content: bytes, images: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.wide
def test_the_trainer_writes_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three at once, in folders that were not there; each holds the checkpoint's network."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("matplotlib")
    names = {"plot": "a/run.png", "onnx": "b/net.onnx", "export": "c/net.pt2"}
    wanted = [part for kind, name in names.items() for part in (f"--{kind}", tmp_path / name)]
    options = ["--data", folder, "--device", "cpu", "--output", tmp_path, "--epochs", 1]
    assert run_command("train", *options, *wanted) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[-3:] == [f"{kind}: {tmp_path / name}" for kind, name in names.items()]
    assert (tmp_path / "a" / "run.png").read_bytes().startswith(b"\x89PNG\r\n")

    stock, digits = fastlenet.StockLeNet(), data.load_idx(folder)
    stock.load_state_dict(checkpoint.load(tmp_path / "checkpoint.safetensors").model)
    expected = stock(digits.test_images).detach()
    content = (tmp_path / "b" / "net.onnx").read_bytes()
    torch.testing.assert_close(outputs_of_onnx(content, digits.test_images), expected)
    import onnx

    stored = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    record = RECORD | {"mean": digits.mean, "std": digits.std}
    assert {name: str(value) for name, value in record.items()}.items() <= stored.items()

    torch.save(digits.test_images, tmp_path / "images.pt")
    program = (
        "import json, sys, torch\n"
        "sys.modules['fastlenet'] = None  # importing it fails, as where it is not installed\n"
        "record = {'fastlenet.json': ''}\n"
        "loaded = torch.export.load('c/net.pt2', extra_files=record)\n"
        "torch.save(loaded.module()(torch.load('images.pt')), 'outputs.pt')\n"
        "print(record['fastlenet.json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == record
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), expected)
    assert (tmp_path / "c" / "net.pt2").stat().st_size < 1 << 20, "weights and a small example, not the data set"


def test_a_finished_run_can_be_asked_later(folder: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--output", tmp_path]
    assert run_command("train", "--data", folder, "--epochs", 1, *options) == 0
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert run_command("train", "--resume", *options, "--export", tmp_path / "net.pt2") == 0
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.zeros(3, 1, 32, 32)).shape == (3, 10)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype(folder: Path, dtype: str) -> None:
    """A program keeps its dtype; ONNX gets float32."""
    pytest.importorskip("onnxscript")
    digits = data.load_idx(folder)
    model = fastlenet.LeNet(dtype=loop.DTYPES[dtype])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = products.program_bytes(model, digits.test_images, RECORD)
    assert content
    outputs = outputs_of_onnx(products.onnx_bytes(model, digits.test_images, RECORD), digits.test_images)
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.float()(digits.test_images))
    assert all(torch.equal(value, before[name].float()) for name, value in model.state_dict().items())


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["export", "onnx"])
def test_a_wrong_network_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The old file stays, and the other files are written all the same."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("matplotlib")
    exported = torch.export.export

    def off_by_little(model: fastlenet.LeNet, *args: Any, **options: Any) -> torch.export.ExportedProgram:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.conv1.bias += 1e-4
        return exported(model, *args, **options)

    monkeypatch.setattr(torch.export, "export", off_by_little)
    (tmp_path / "net").write_bytes(b"old")
    options = ["--data", folder, "--device", "cpu", "--output", tmp_path / "out", "--epochs", 1]
    assert run_command("train", *options, f"--{kind}", tmp_path / "net", "--plot", tmp_path / "run.svg") == 1
    assert (tmp_path / "net").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "out", "run.svg"]
    error = capsys.readouterr().err
    assert "nothing was written" in error
    assert error.count("\n") == 1


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "run.bmp"], "--plot: run.bmp must end in .png, .svg, .pdf"),
        (["--plot", "run"], "--plot: run must end in"),
        (["--onnx", "."], "--onnx: . is a folder"),
        (["--export", "."], "--export: . is a folder"),
    ],
)
def test_impossible_files_are_refused_before_training(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    assert run_command("train", "--data", folder, "--device", "cpu", *arguments) == 2
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("kind", "missing", "extra"),
    [("plot", "matplotlib.figure", "demo"), ("onnx", "onnxruntime", "export"), ("onnx", "onnxscript", "export")],
)
def test_missing_packages_are_named_before_training(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    missing: str,
    extra: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_command("train", "--data", folder, "--device", "cpu", f"--{kind}", "run.png") == 2
    assert_one_line(capsys, f"{missing.partition('.')[0]} is not installed: {install_command(f'fastlenet[{extra}]')}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("right", [0, 3, 29, 32])
def test_pictures_of_good_and_bad_networks(folder: Path, result: loop.TrainResult, right: int) -> None:
    """Few mistakes or few right answers: half of the digits shown are mistaken where there are so many."""
    pytest.importorskip("matplotlib")
    digits = data.load_idx(folder)
    predictions = digits.test_labels.clone()
    predictions[right:] = (predictions[right:] + 1) % 10
    found = loop.Evaluation(accuracy=right / 32, loss=1.0, predictions=predictions)
    text = picture.draw_run(result.history, found, digits, "svg").decode()
    assert text.count("<!-- 3 (is 2) -->") <= 15
    mistakes = sum(text.count(f"<!-- {(digit + 1) % 10} (is {digit}) -->") for digit in range(10))
    assert mistakes == {0: 30, 3: 27, 29: 3, 32: 0}[right]
    assert f"Confusion matrix: {32 - right} of 32 wrong" in text
