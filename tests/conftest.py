"""Fixtures for all tests, and what can run in this kind of process (see ``harness/modes.py``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
if str(HERE) not in sys.path:  # so that `import harness` works under every import mode of pytest
    sys.path.insert(0, str(HERE))

pytest.register_assert_rewrite("harness")

from harness import fuzz, modes  # noqa: E402

fuzz.load_profile()


def pytest_report_header() -> list[str]:
    """Say what this process runs, and what not and why."""
    how = "interpreted" if modes.interpreting() else "native" if torch.cuda.is_available() else "not run here"
    lines = [f"fastlenet: kernels {how}, torch {torch.__version__}, {torch.get_num_threads()} threads"]
    lines += [f"fastlenet: not collecting tests/{name}: {why}" for name, why in modes.refused_folders().items()]
    return lines


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folders that cannot run in this process."""
    refused = [HERE / name for name in modes.refused_folders()]
    return True if any(folder == collection_path or folder in collection_path.parents for folder in refused) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every n-th test where the runner splits a suite over processes (``FASTLENET_SHARD=1/2``).

    Tests marked ``together(name)`` count as one: they share what would be dear to make in every process.
    """
    shard = os.environ.get("FASTLENET_SHARD")
    if not shard:
        return
    number, count = map(int, shard.split("/"))
    places: dict[str, int] = {}
    kept, left = [], []
    for item in items:
        marker = item.get_closest_marker("together")
        place = places.setdefault(f"together {marker.args[0]}" if marker else item.nodeid, len(places))
        (kept if place % count == number - 1 else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(params=["stock", "kernels"])
def either(request: pytest.FixtureRequest) -> str:
    """Once with stock's operators, once with the Functions around stand-ins for compiled CPU kernels."""
    if request.param == "kernels":
        request.getfixturevalue("cpu_kernels")
    return str(request.param)


@pytest.fixture
def cpu_kernels() -> Iterator[Any]:
    """Let calls on a CPU take their operators' Functions, by stand-ins for compiled kernels."""
    from harness.plain_cpu import plain_cpu

    with plain_cpu() as module:
        yield module


class _Progress:
    """Writes how far this process is to a file that the runner reads."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.total = self.done = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.path.write_text(f"{self.done} of {self.total} done, in {nodeid}")

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and install the progress report where the runner asks for one."""
    config.addinivalue_line("markers", "together(name): run by the same process as all others of that name")
    path = os.environ.get("FASTLENET_PROGRESS_FILE")
    if path:
        config.pluginmanager.register(_Progress(path), "fastlenet-progress")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of kernel tests live: ``cuda`` when kernels run natively, else ``cpu``."""
    return modes.kernel_device()


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU random generator with a fixed seed, new for every test."""
    return torch.Generator().manual_seed(20240131)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Start every test from the same global seed, whatever ran before it."""
    torch.manual_seed(20240131)
