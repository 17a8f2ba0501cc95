"""Small made-up digits, short runs on them, and commands as the tests of this folder call them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlenet
import fastlenet.cli as command_line
from fastlenet.training import loop

CPU = torch.device("cpu")
TRAIN, TEST = 96, 32
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


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
