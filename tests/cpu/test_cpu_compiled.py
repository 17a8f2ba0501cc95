"""Where compiled code comes from: first use, the files on disk, and machines that cannot compile."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.judge import assert_bitwise_equal

import fastlenet
from fastlenet import cpu, functional, selection
from fastlenet.cpu import compiled, threads
from fastlenet.errors import install_command

needs_numba = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)

PREPARE = """
import sys, time, torch
import fastlenet
from fastlenet import cpu, functional, selection
from fastlenet.kernels.geometry import ConvPoolGeometry
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
input, weight = torch.randn(70, 1, 12, 12), torch.randn(6, 1, 5, 5)
def compute():
    output, argmax = cpu.conv2d_relu_max_pool2d(input, weight, None, plain, True)
    return cpu.conv2d_relu_max_pool2d_backward(output, input, weight, argmax, plain, (True, True, True))
"""


def python(source: str, **environment: str) -> str:
    """Run a program after `PREPARE` in a process of its own and return what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def afresh() -> Iterator[None]:
    """Let what is known of this machine be found out anew, in the test and after it."""
    caches = compiled._obstacle, compiled.folder
    for cache in caches:
        cache.cache_clear()
    before, compiled._failure = compiled._failure, None
    yield
    compiled._failure = before
    selection.forget()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.wide
@needs_numba
def test_a_second_process_imports_no_numba():
    """It loads what is on disk, in a fraction of a second of work."""
    python("compute()")
    seconds = python(
        "compute_time = time.process_time(); compute(); print(time.process_time() - compute_time)\n"
        "assert 'numba' not in sys.modules"
    )
    assert float(seconds) < 0.3


@needs_numba
def test_other_images_compile_nothing(monkeypatch):
    """Neither their number nor their size, nor any geometry of the same kernel."""

    def compute(images: int, size: int, geometry: ConvPoolGeometry) -> None:
        input, weight = torch.randn(images, 1, size, size + 1), torch.randn(6, 1, 5, 5)
        output, argmax = cpu.conv2d_relu_max_pool2d(input, weight, None, geometry, True)
        cpu.conv2d_relu_max_pool2d_backward(output, input, weight, argmax, geometry, (True, True, True))

    asked, found = [], compiled._found
    monkeypatch.setattr(compiled, "_found", lambda *args: asked.append(args) or found(*args))
    compiled.address.cache_clear()
    compute(20, 12, PLAIN._replace(padding=(1, 1)))
    assert asked
    asked.clear()
    compute(40, 17, PLAIN._replace(padding=(1, 2), stride=(2, 1), pool_size=(3, 2)))
    assert not asked


@pytest.mark.usefixtures("afresh")
def test_without_numba(monkeypatch, caplog):
    """One log line, and a reason that says what to do."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with caplog.at_level(logging.WARNING, logger="fastlenet"):
        reasons = {cpu.unavailable() for _ in range(3)}
    (reason,) = reasons
    assert reason is not None
    assert install_command("fastlenet[cpu]") in reason
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("afresh")
def test_with_an_old_numba(monkeypatch):
    """The reason names both versions."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.60.1")
    reason = cpu.unavailable()
    assert reason is not None
    assert "0.60.1" in reason
    assert "0.61" in reason


@pytest.mark.usefixtures("afresh")
def test_without_a_folder(monkeypatch, tmp_path):
    """Where the only folder is a file there is none; the reason names the variable to set."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FASTLENET_CACHE_DIR", str(file / "below"))
    reason = cpu.unavailable()
    assert reason is not None
    assert "FASTLENET_CACHE_DIR" in reason


@pytest.mark.usefixtures("afresh")
def test_a_read_only_installation_has_the_users_folder(monkeypatch, tmp_path):
    """The second place is taken where the first cannot be written."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(compiled, "_folders", lambda: [file / "below", tmp_path / "cache"])
    assert compiled.folder() == tmp_path / "cache"


def test_the_package_has_two_folders(monkeypatch):
    """Beside the sources, then the user's own; a variable overrides both."""
    for name in ("FASTLENET_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    beside, own = compiled._folders()
    assert beside.parent == Path(compiled.__file__).parent
    assert own == Path.home() / ".cache" / "fastlenet"
    monkeypatch.setenv("FASTLENET_CACHE_DIR", "elsewhere")
    assert compiled._folders() == [Path("elsewhere")]


@needs_numba
def test_without_openmp_the_caller_computes_alone(monkeypatch):
    """The same bits."""
    input, weight = torch.randn(70, 1, 12, 12), torch.randn(6, 1, 5, 5)
    expected, _ = cpu.conv2d_relu_max_pool2d(input, weight, None, PLAIN, False)
    monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    assert threads.workers(100) == 1
    assert_bitwise_equal(cpu.conv2d_relu_max_pool2d(input, weight, None, PLAIN, False)[0], expected)


@pytest.mark.wide
@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_computes():
    """With one thread, as PyTorch sets it in a DataLoader's workers; with several stock's operators hang, too."""
    out = python(
        "import os, warnings; warnings.simplefilter('ignore'); compute(); expected = compute()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    torch.set_num_threads(1)\n"
        "    same = all(torch.equal(one, other) for one, other in zip(compute(), expected))\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert out.strip() == "0"


# --- kernels that cannot be had ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled(afresh, nothing_planned, monkeypatch, tmp_path):
    """An empty folder for compiled code, and no kernel in memory."""
    monkeypatch.setenv("FASTLENET_CACHE_DIR", str(tmp_path))
    compiled.address.cache_clear()
    selection.forget()
    yield
    compiled.address.cache_clear()


def _breaks(stage: str, monkeypatch, only: str = "") -> None:
    """Let a stage on the way to machine code fail, for kernels whose name holds `only`."""
    real = getattr(compiled, stage)

    def broken(*args):
        if stage != "_compile" or only in args[1]:
            raise OSError(f"{stage} is broken here\nand more")
        return real(*args)

    monkeypatch.setattr(compiled, stage, broken)


def _network_call(kind: str):
    """A call of enough images for the compiled kernels, and its operands."""
    torch.manual_seed(0)
    if kind == "network":
        model = fastlenet.LeNet()
        return model, [torch.randn(64, 1, 32, 32), *model.parameters()]
    operands = [torch.randn(64, 1, 12, 12, requires_grad=True), torch.randn(6, 1, 5, 5, requires_grad=True)]
    return (lambda images: functional.conv2d_relu_max_pool2d(images, operands[1])), operands


@needs_numba
@pytest.mark.parametrize("kind", ["network", "layer"])
@pytest.mark.parametrize(
    ("stage", "only"), [("_compile", ""), ("_loaded", ""), ("_digest", ""), ("_compile", "gradients")]
)
def test_a_kernel_that_cannot_be_had_leaves_the_call_to_stock(stage, only, kind, nothing_compiled, monkeypatch, caplog):
    """Forward or backward: with stock's results, one log line, the reason in the choice, and no second try."""
    call, (images, *parameters) = _network_call(kind)
    with fastlenet.use_backend("aten"):
        expected = call(images)
        grads = torch.autograd.grad(expected.square().sum(), parameters)
    _breaks(stage, monkeypatch, only)
    with caplog.at_level(logging.WARNING, logger="fastlenet"):
        output = call(images)
        ours = torch.autograd.grad(output.square().sum(), parameters)
        again = call(images)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(ours, grads, rtol=1e-3, atol=1e-3)
    assert len(caplog.records) == 1
    choice = selection.choose(
        fastlenet.ops.CONV2D_RELU_MAX_POOL2D, PLAIN, (torch.randn(64, 1, 12, 12), torch.randn(6, 1, 5, 5), None)
    )
    assert choice.implementation == "aten"
    assert f"could not be compiled or loaded (OSError: {stage} is broken here)" in choice.reason


@needs_numba
@pytest.mark.parametrize("only", ["", "gradients"])
def test_a_forced_kernel_that_cannot_be_had_raises(only, nothing_compiled, monkeypatch):
    """What failed, and what to do; at the first call and at later ones."""
    _breaks("_compile", monkeypatch, only)
    call, (images, *_) = _network_call("network")
    with fastlenet.use_backend("cpu"):
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"could not be compiled or loaded \(OSError: .*choose backend 'auto'"
            ):
                call(images).sum().backward()


@needs_numba
def test_a_registered_operator_falls_back_too(nothing_compiled, monkeypatch):
    """A graph's call is not lost either."""
    _breaks("_compile", monkeypatch)
    images, weight = torch.randn(64, 1, 12, 12), torch.randn(6, 1, 5, 5)
    output, _ = torch.ops.fastlenet.conv2d_relu_max_pool2d(images, weight, None, *PLAIN, False)
    with fastlenet.use_backend("aten"):
        torch.testing.assert_close(output, functional.conv2d_relu_max_pool2d(images, weight))


@needs_numba
def test_a_file_that_cannot_be_loaded_is_compiled_again(nothing_compiled, monkeypatch):
    """What is on disk may be damaged."""
    compiled.address("convolution", "exchange")
    (file,) = compiled.folder().glob("*.o")
    file.write_bytes(b"no machine code")
    compiled.address.cache_clear()
    real, tried = compiled._loaded, []

    def loaded(code: bytes) -> int:
        tried.append(code)
        if code == b"no machine code":
            raise RuntimeError("not an object file")
        return real(code)

    monkeypatch.setattr(compiled, "_loaded", loaded)
    assert compiled.address("convolution", "exchange")
    assert len(tried) == 2
    assert file.read_bytes() == tried[1]
