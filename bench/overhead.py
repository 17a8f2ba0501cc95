"""The time that Python takes: host microseconds of LeNet on the Triton path, with launches that do nothing.

    python -m bench.overhead [--json] [--against CHECKOUT]

A fake driver (`bench.static.fake_driver`) replaces Triton's. It answers as a GPU's driver would and launches nothing,
so tensors are on the CPU and no kernel runs. The time left is that of a call before the GPU has work: checks, the
decision, autograd's bookkeeping, allocations, and the arguments of launches.

`inference` is LeNet's forward without gradients, `forward_backward` its forward and ``output.backward(gradient)``.
`layers` gives the same for single layers, forward and backward together, to show that chains do not slow them down.

With `--against` a second process measures another checkout, and both take turns. Compare only figures of one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
ROUNDS, CALLS = 12, 150
"""Turns of each checkout, and calls of each kind in a turn."""

Samples = dict[str, list[float]]


# --- the measuring process ------------------------------------------------------------------------------------------


@contextmanager
def silent_gpu() -> Iterator[None]:
    """Make Triton accept CPU tensors, as an H100's driver would, but launch nothing."""
    import fastlenet
    from bench.static import fake_driver

    class Silent(fake_driver.FakeDriver):
        def launcher_cls(self, src: Any, metadata: Any) -> Any:
            return lambda *_: None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fake_driver, "FakeDriver", Silent))
        if "fastlenet.selection" in sys.modules:
            stack.enter_context(sys.modules["fastlenet.selection"].triton_drives_everything())
        else:  # an older checkout without one
            stack.enter_context(mock.patch.object(sys.modules["fastlenet.backend"], "_unreachable", return_value=None))
        stack.enter_context(fake_driver.compiling_for("sm_90"))
        stack.enter_context(fastlenet.use_backend("triton"))
        yield


def calls() -> dict[str, Callable[[], Any]]:
    """The timed calls by name, without their preparation."""
    import torch

    import fastlenet

    network, images = fastlenet.LeNet(), torch.zeros(BATCH, 1, 32, 32)
    upstream = torch.zeros(BATCH, 10)
    conv, pooled = fastlenet.ConvReLUMaxPool2d(6, 16, 5), torch.zeros(BATCH, 6, 14, 14)
    conv_upstream = torch.zeros(BATCH, 16, 5, 5)
    linear, rows, linear_upstream = fastlenet.LinearReLU(400, 120), torch.zeros(BATCH, 400), torch.zeros(BATCH, 120)

    def inference() -> None:
        with torch.no_grad():
            network(images)

    def step(module: Any, input: Any, gradient: Any) -> Callable[[], None]:
        return lambda: module(input).backward(gradient)

    return {
        "inference": inference,
        "forward_backward": step(network, images, upstream),
        "conv2d_relu_max_pool2d": step(conv, pooled, conv_upstream),
        "linear_relu": step(linear, rows, linear_upstream),
    }


def measure() -> None:
    """Answer each line on standard input by one turn's samples, in microseconds."""
    import torch

    torch.set_num_threads(1)
    with silent_gpu():
        timed = calls()
        networks = [cell.cell_contents for call in timed.values() for cell in call.__closure__ or ()]
        parameters = [p for module in networks if isinstance(module, torch.nn.Module) for p in module.parameters()]
        for call in timed.values():
            for _ in range(20):
                call()
        gc.collect()
        gc.disable()
        print("ready", flush=True)
        for _ in sys.stdin:
            samples: Samples = {}
            for name, call in timed.items():
                taken = samples[name] = []
                for _ in range(CALLS):
                    for parameter in parameters:
                        parameter.grad = None
                    begin = time.perf_counter_ns()
                    call()
                    taken.append((time.perf_counter_ns() - begin) / 1e3)
            print(json.dumps(samples), flush=True)
            gc.collect()


# --- the controlling process ------------------------------------------------------------------------------------------


def laid_out(checkout: Path, folder: Path) -> None:
    """Link a checkout's package into `folder` as an installed wheel has it, and this checkout's `bench` beside it."""
    package = folder / "fastlenet"
    package.mkdir()
    for path in (checkout / "fastlenet").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(checkout / "kernels")
    (folder / "bench").symlink_to(ROOT / "bench")


def start(checkout: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a measuring process for a checkout."""
    laid_out(checkout, folder)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    for name in ("TRITON_INTERPRET", "FASTLENET_BACKEND"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", "import fastlenet; from bench import overhead; overhead.measure()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )


def turn(process: subprocess.Popen[str], line: str = "go\n") -> str:
    """Send a line to a measuring process, and return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line)
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"bench.overhead: a measuring process ended with {process.wait()}")
    return answer


def run(checkouts: list[Path], rounds: int = ROUNDS) -> list[dict[str, dict[str, float]]]:
    """Measure checkouts in turns; for each, by name, the least and the median time in microseconds."""
    with ExitStack() as stack:
        processes = []
        for checkout in checkouts:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            processes.append(start(checkout, folder))
            stack.callback(processes[-1].kill)
        for process in processes:
            turn(process, line="")
        samples: list[Samples] = [{} for _ in checkouts]
        for _ in range(rounds):
            for process, found in zip(processes, samples, strict=True):
                for name, taken in json.loads(turn(process)).items():
                    found.setdefault(name, []).extend(taken)
    return [
        {name: {"min": min(taken), "median": statistics.median(taken)} for name, taken in found.items()}
        for found in samples
    ]


def report(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """LeNet's figures by name, with those of single layers separate."""
    whole = ("inference", "forward_backward")
    return {**{name: found[name] for name in whole}, "layers": {n: t for n, t in found.items() if n not in whole}}


def table(names: list[str], results: list[dict[str, dict[str, float]]]) -> str:
    """A line for each call; with a second checkout, its figures and the ratio of the least times."""
    lines = [f"{'microseconds':24}" + "".join(f"{name:>22}" for name in names) + ("  ratio" if len(names) > 1 else "")]
    for call, times in results[0].items():
        line = f"{call:24}" + "".join(f"{r[call]['min']:10.1f} /{r[call]['median']:10.1f}" for r in results)
        lines.append(line + (f"{times['min'] / results[1][call]['min']:7.2f}" if len(names) > 1 else ""))
    return "\n".join([*lines, "(least / median)"])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table or JSON."""
    description = "Measure the time that Python takes in LeNet's calls on a GPU, on any machine: launches do nothing."
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=description)
    against = "also measure the checkout in this folder, in turns with this one (default: this one alone)"
    rounds = "turns of each checkout (default: %(default)s)"
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help=against)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=rounds)
    options = parser.parse_args(arguments)
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    results = run(checkouts, options.rounds)
    if options.json:
        figures = report(results[0])
        print(json.dumps(figures | {"against": report(results[1])} if options.against else figures))
    else:
        print(table(["this checkout", *(["the other"] if options.against else [])], results))


if __name__ == "__main__":
    main()
