"""What every test of a kernel starts from: Triton forced, full float32 precision, and all of memory watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastlenet.kernels import addmm_relu, joint, plans, runtime, tiles
from fastlenet.kernels.conv2d_relu_max_pool2d import block_dot, column_fma, general, patch_dot, patch_fma, spread_dot
from harness import modes
from harness.bounds import sanitized
from harness.contract import Case, trial_of
from harness.operators import Result, Trial, fp32_precision, run

import fastlenet


@pytest.fixture(autouse=True)
def _triton_at_full_precision() -> Iterator[None]:
    with fp32_precision("ieee"), fastlenet.use_backend("triton"):
        yield


@pytest.fixture
def watched() -> Callable[..., Result]:
    """`harness.operators.run` with outputs poisoned and guarded, inputs read-only and every pointer checked."""

    def watched_run(function: Callable, tensors: dict, keywords: dict, *args: Any, **options: Any) -> Result:
        empty = any(t is not None and t.numel() == 0 for t in tensors.values())
        # 0xFE is no code of a window of up to 254 cells, so unwritten codes can be told too.
        with sanitized(require_launch=not empty, byte=0xFE) as (poison, _):
            result = run(function, tensors, keywords, *args, **options)
            if not empty and keywords.get("pool_size") != (15, 17):
                poison.assert_all_written()
        return result

    return watched_run


@pytest.fixture
def trial(watched: Callable[..., Result]) -> Callable[[Case], Trial]:
    """The trial of a case's operator, watched."""
    return lambda case: trial_of(case).under(watched)


@pytest.fixture
def place(device: str) -> str:
    """Where tensors of contract tests live."""
    return device


@pytest.fixture
def shipped_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tiles that ship in the interpreter too, which for speed takes larger ones."""
    if modes.interpreting():
        for module in (tiles, addmm_relu):
            monkeypatch.setattr(module, "INTERPRETED", False)
        monkeypatch.setattr(tiles, "all_registers", dict)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run launchers as they are written: a plan, on a GPU, would go past what a test puts in place of their parts."""
    monkeypatch.setattr(plans, "ENABLED", False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, unplanned: None) -> list[tuple[str, dict[str, Any]]]:
    """The kernels launched, each by name with its constants."""
    log: list[tuple[str, dict[str, Any]]] = []
    launch = runtime.launch

    def logged(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if min(grid) > 0:
            log.append((kernel.fn.__name__, constants))
        launch(kernel, grid, *args, **constants)

    for module in (runtime, joint, block_dot, general, column_fma, patch_dot, patch_fma, spread_dot, addmm_relu):
        monkeypatch.setattr(module, "launch", logged)
    return log


@pytest.fixture
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's tl.dot add its terms one after the other, as the tensor's shape must not decide.

    NumPy's matmul adds a row's terms in an order that depends on the row's position in the tile. What is left then
    is the kernel's own order.
    """
    if not modes.interpreting():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data
        for k in range(a.data.shape[1]):
            total = total + a.data[:, k : k + 1] * b.data[k : k + 1]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
