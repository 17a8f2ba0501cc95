"""Fixtures for tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import quick, write_idx

from fastlenet.training import data, loop


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small only lose by more threads, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_idx(tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def digits(folder: Path) -> data.Dataset:
    return data.load_idx(folder)


@pytest.fixture
def saved(digits: data.Dataset, tmp_path: Path) -> Path:
    loop.train(quick(epochs=1, optimizer="adam"), dataset=digits, checkpoint_file=tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"
