"""Hypothesis with the project's settings, or skips where hypothesis is not installed.

Import ``given``, ``settings`` and ``st`` from here. ``FASTLENET_FUZZ=N`` multiplies every example count that was
written as ``examples(n)``; `make test` sets 0.2. For N above 1 each run draws fresh examples instead of fixed ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, assume, given, note, settings
    from hypothesis import strategies as st

    HAVE_HYPOTHESIS = True
except ImportError:  # a GPU machine without network may lack it: those tests then skip, the rest still runs
    HAVE_HYPOTHESIS = False

    class _Absent:
        """Stands in for hypothesis's objects at import time; whatever is asked of it is itself."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
            return self

        def __iter__(self):
            return iter(())

    HealthCheck = assume = note = st = _Absent()  # type: ignore[assignment]

    def given(*args: Any, **kwargs: Any) -> Callable:  # type: ignore[misc]
        """Replace the test by one that skips."""

        def replace(test: Callable) -> Callable:
            def skipped() -> None:
                pytest.skip("hypothesis is not installed")

            skipped.__name__, skipped.__doc__, skipped.__module__ = test.__name__, test.__doc__, test.__module__
            skipped.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
            # A parametrised test keeps its parameters in its marks, but the replacement takes no arguments.
            skipped.pytestmark = [m for m in skipped.pytestmark if m.name not in ("parametrize", "usefixtures")]
            return skipped

        return replace

    def settings(*args: Any, **kwargs: Any) -> Callable:  # type: ignore[misc]
        """Leave the test as it is."""
        return lambda test: test


__all__ = ["HAVE_HYPOTHESIS", "HealthCheck", "assume", "examples", "given", "load_profile", "note", "settings", "st"]


def multiplier() -> float:
    """``FASTLENET_FUZZ`` as a positive number, 1 where unset."""
    text = os.environ.get("FASTLENET_FUZZ", "1") or "1"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise pytest.UsageError(f"FASTLENET_FUZZ must be a positive number, got {text!r}")
    return value


def examples(count: int) -> int:
    """``count`` at normal depth, others under ``FASTLENET_FUZZ``: write ``@settings(max_examples=examples(20))``."""
    return max(1, round(count * multiplier()))


def load_profile() -> None:
    """Register and load the profile: no deadline, reproduction blobs, the same examples on every run of CI."""
    if not HAVE_HYPOTHESIS:
        return
    settings.register_profile(
        "fastlenet",
        deadline=None,
        derandomize=multiplier() <= 1,
        database=None,
        print_blob=True,
        max_examples=examples(50),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("fastlenet")
