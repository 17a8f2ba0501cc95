"""What tests with the fake driver share: logs of what was launched."""

from __future__ import annotations

from typing import Any

import pytest
from fastlenet.kernels import runtime
from harness.fake_driver import CompiledKernelRecord

from bench.static import fake_driver


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompiledKernelRecord, Any]]:
    """All launches in their order, each as its kernel and the call with grid and arguments."""
    log, record_launch = [], fake_driver._Launcher.__call__

    def logged(self: Any, *args: Any) -> None:
        record_launch(self, *args)
        log.append((self._record, self._record.calls[-1]))

    monkeypatch.setattr(fake_driver._Launcher, "__call__", logged)
    return log


@pytest.fixture
def reasoned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that launchers launched themselves."""
    log, launch = [], runtime._launch_on
    monkeypatch.setattr(runtime, "_launch_on", lambda *args: (log.append(args[2]), launch(*args)))
    return log
