"""The same work under pytest-benchmark: ``pytest bench --benchmark-only [-k TEXT]``.

pytest-benchmark times one implementation after the other, so a busy machine may favour one of them. ``fastlenet bench``
interleaves them; quote its results. The accuracy check comes first here too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.baselines import FASTLENET, Call, competitors, precision_mode
from bench.run import Row, check
from bench.workloads import CALL, Work, suite

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKS = [replace(work, memory=False) for work in suite("quick", DEVICE.type) if work.level == CALL]


@functools.lru_cache(maxsize=1)
def _checked(work: Work) -> tuple[dict[str, Call], dict[str, Row]]:
    """Set up each comparison once for all its implementations, which follow each other."""
    return check(work, DEVICE)


def _cases() -> Iterator[Any]:
    for work in WORKS:
        for implementation in competitors(work, DEVICE):
            yield pytest.param(work, implementation.name, id=f"{work.label} {implementation.name}".replace(" ", "-"))


@pytest.mark.parametrize(("work", "name"), _cases())
def test_speed(benchmark: Any, work: Work, name: str) -> None:
    with precision_mode(work.precision):
        calls, rows = _checked(work)
        if name not in calls:
            (pytest.fail if name == FASTLENET.name else pytest.skip)(f"{name}: {rows[name]['why']}")
        call = calls[name]
        benchmark.group = work.label
        benchmark.extra_info |= {"saved_bytes_per_image": rows[name]["saved_bytes_per_image"]}

        def run(prepared: Any) -> None:
            with torch.set_grad_enabled(call.needs_grad):
                call.run(prepared)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        def prepare() -> tuple[tuple[Any], dict[str, Any]]:
            with torch.set_grad_enabled(call.needs_grad):
                return (call.prepare(0),), {}

        benchmark.pedantic(run, setup=prepare, rounds=10, warmup_rounds=1)
