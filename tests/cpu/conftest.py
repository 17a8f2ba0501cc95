"""What tests of the compiled CPU kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fastlenet.cpu import blocks, few, plan


def _forget() -> None:
    plan.plan_of.cache_clear()
    plan.gradients_of.cache_clear()
    for form in (blocks, few):
        for table in (form._layers, form._forward, form._backward):
            table.cache_clear()


@pytest.fixture
def nothing_planned() -> Iterator[Callable[[], None]]:
    """No plan and no program is known, as in a new process, and none stays; the value forgets them once more."""
    _forget()
    yield _forget
    _forget()


@pytest.fixture(params=[8, 32], ids=["AVX2", "AVX-512"])
def tiles(request, nothing_planned, monkeypatch) -> None:
    """Tiles of any CPU: LLVM splits their vectors for the CPU at hand."""
    monkeypatch.setattr(plan, "register_vectors", lambda: request.param)
