"""Fixtures for all tests, and what can run in this kind of process (see ``harness/modes.py``)."""

from __future__ import annotations

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that the runner gives unless it is asked for everything."""
    parser.addoption("--quick", action="store_true", help="as few combinations of parameters as show every value once")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under ``--quick`` leave out tests marked ``thorough``, and combinations whose every value others show.

    Of a test's combinations, in order, those are kept that show a value of some parameter for the first time. So each
    value of each parameter runs, but not with each value of the others.
    """
    if not config.getoption("--quick"):
        return
    seen: set[tuple[str, int, str]] = set()
    kept, left = [], []
    for item in items:
        # One id for each parametrisation of the test; pytest has no public name for them.
        ids = getattr(getattr(item, "callspec", None), "_idlist", ())
        values = {(item.nodeid.partition("[")[0], place, name) for place, name in enumerate(ids)}
        chosen = item.get_closest_marker("thorough") is None and (not values or not values <= seen)
        seen |= values if chosen else set()
        (kept if chosen else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(params=["stock", "kernels"])
def either(request: pytest.FixtureRequest) -> str:
    """Once with stock's operators, once with the Functions around stand-ins for compiled CPU kernels."""
    request.getfixturevalue("cpu_kernels" if request.param == "kernels" else "no_cpu_kernels")
    return str(request.param)


@pytest.fixture
def no_cpu_kernels() -> Iterator[None]:
    """Let calls on a CPU run as where no compiled kernels are installed."""
    from harness.plain_cpu import plain_cpu

    with plain_cpu() as module:
        module.missing = "numba is not installed"
        yield


@pytest.fixture
def cpu_kernels() -> Iterator[Any]:
    """Let calls on a CPU take their operators' Functions, by stand-ins for compiled kernels."""
    from harness.plain_cpu import plain_cpu

    with plain_cpu() as module:
        yield module


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known: pytest-xdist's too, which groups tests where it is installed."""
    config.addinivalue_line("markers", "thorough: left out of the quick run; ``make test-all`` runs it")
    config.addinivalue_line("markers", "xdist_group(name): run by the same process as all others of that name")


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
