"""Fixtures for all tests, and what can run in this kind of process (see ``harness/modes.py``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# pytest-xdist's first process runs no test, and starts the others sooner without PyTorch.
if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
FOLDERS = ("interpreted", "compiled")
if str(HERE) not in sys.path:  # so that `import harness` works under every import mode of pytest
    sys.path.insert(0, str(HERE))

pytest.register_assert_rewrite("harness")

from harness import fuzz, modes  # noqa: E402
from run import TIERS  # noqa: E402

fuzz.load_profile()


def pytest_report_header() -> list[str]:
    """Say what this process runs, and what not and why."""
    import torch

    how = "interpreted" if modes.interpreting() else "native" if modes.has_gpu() else "not run here"
    lines = [f"fastlenet: kernels {how}, torch {torch.__version__}, {torch.get_num_threads()} threads"]
    reasons = {name: modes.refused(name) for name in FOLDERS}
    return lines + [f"fastlenet: not collecting tests/{name}: {why}" for name, why in reasons.items() if why]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folders that cannot run in this process."""
    for name in FOLDERS:
        if HERE / name in (collection_path, *collection_path.parents) and modes.refused(name):
            return True
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that the runner gives; without them every test is run."""
    parser.addoption("--tier", choices=TIERS, default="all", help="how much is run: see tests/run.py")
    parser.addoption("--rest", action="store_true", help="leave out what the tier before runs")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the tier, or with ``--rest`` those that it adds to the one before."""
    tier = TIERS.index(config.getoption("--tier"))
    before = tier - 1 if config.getoption("--rest") else -1
    chosen = [before < place <= tier for place in _tiers(items)]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, chosen, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, chosen, strict=True) if kept]


def _tiers(items: list[pytest.Item]) -> list[int]:
    """The first tier that runs each test, as a place in `run.TIERS`.

    ``quick`` runs each test function once for each implementation and operator, ``wide`` each value of each parameter
    once, ``all`` each combination. Marks leave tests to later tiers: ``wide`` from quick, ``thorough`` from quick and
    wide. Of a test marked ``cheap`` quick runs every combination: its values are behaviours, such as messages, and take
    no time.
    """
    seen: set[tuple[str, int, str]] = set()
    functions: set[tuple[str, ...]] = set()
    tiers = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        spec = getattr(item, "callspec", None)
        # One id for each parametrisation of the test; pytest has no public name for them.
        values = {(name, place, value) for place, value in enumerate(getattr(spec, "_idlist", ()))}
        params = spec.params if spec else {}
        function = name, str(params.get("either")), type(params.get("case")).__name__
        later = [mark for mark in ("thorough", "wide") if item.get_closest_marker(mark) is not None]
        if not later and item.get_closest_marker("cheap") is not None:
            tiers.append(0)
            seen |= values
            continue
        if "thorough" in later or (values and values <= seen):
            tiers.append(2)
            continue
        tiers.append(int(function in functions or bool(later)))
        functions.add(function)
        seen |= values
    return tiers


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
    config.addinivalue_line("markers", "cheap: ``make test`` runs it with every value of every parameter")
    config.addinivalue_line("markers", "wide: left out of ``make test``; ``make test-wide`` runs it")
    config.addinivalue_line("markers", "thorough: left out of both; ``make test-all`` runs it")
    config.addinivalue_line("markers", "xdist_group(name): run by the same process as all others of that name")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of kernel tests live: ``cuda`` when kernels run natively, else ``cpu``."""
    return modes.kernel_device()


@pytest.fixture
def trial() -> Any:
    """What gives the trial of a case's operator: see `harness.contract`."""
    from harness.contract import trial_of

    return trial_of


@pytest.fixture
def place() -> str:
    """Where tensors of contract tests live."""
    return "cpu"


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU random generator with a fixed seed, new for every test."""
    import torch

    return torch.Generator().manual_seed(20240131)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Start every test from the same global seed, whatever ran before it."""
    if "torch" in sys.modules:  # the runner's own tests do without
        sys.modules["torch"].manual_seed(20240131)
