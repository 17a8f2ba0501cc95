"""The command line: what it prints, and what bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")

from runs import assert_one_line, run_command

import fastlenet.cli as command_line
from fastlenet.errors import install_command
from fastlenet.training import checkpoint, demo, loop


def test_train_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--data", folder, "--output", out, "--device", "cpu", "--batch-size", 16, "--optimizer", "rmsprop"]
    assert run_command("train", *options, "--epochs", 2, "--loss", "mse", "--dtype", "float64", "--lr", 0.002) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "a log gets a line an epoch and no progress bars"
    assert lines[1].startswith("epoch 2/2  lr 0.0018  loss ")
    assert "held-out accuracy" in lines[2]
    assert " after 2 epochs; " in lines[2]
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


@pytest.mark.cheap
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


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("missing", "package"), [("rich.console", "rich"), ("safetensors.torch", "safetensors"), ("mlxtend", "mlxtend")]
)
def test_missing_packages_get_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, package: str
) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_command("train", "--output", tmp_path, "--epochs", 1, "--device", "cpu") == 2
    assert_one_line(capsys, f"the package {package} is not installed: {install_command('fastlenet[demo]')}")


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


@pytest.mark.cheap
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["env", "--help"], ["--version"]])
def test_help_is_exit_code_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(*arguments) == 0
    captured = capsys.readouterr()
    assert "fastlenet" in captured.out
    assert captured.err == ""


@pytest.mark.cheap
@pytest.mark.parametrize(("command", "module"), [("bench", "run"), ("report", "report")])
def test_checkout_commands(
    command: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert run_command(command, "--fast") == 2
    assert_one_line(capsys, f"fastlenet {command}: error: runs in a checkout only")
    assert run_command(command, "--help") == 0
    assert "run pip install -e . there" in " ".join(capsys.readouterr().out.split())
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


@pytest.mark.wide
def test_a_reader_that_leaves_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "fastlenet", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate()
    assert (process.returncode, said) == (0, "")


@pytest.mark.wide
def test_module_entry_point(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastlenet", "train", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
