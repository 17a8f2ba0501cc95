"""``make gpu``: tests, sanitizer smoke and benchmarks on a machine with a GPU, with the Python found there.

Nothing is installed and no network is used. The package is linked into a temporary folder as an installed wheel has it
(`kernels/` under `fastlenet/`), and PYTHONPATH names that folder. Checks (the tests, and each tool of the sanitizer)
run side by side. Measurements follow, one at a time. Each has its own log and its own line in the summary. If one
fails, the others still run. All together end within ``--seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS, MEASUREMENTS = ("tests", "sanitize"), ("kernels", "bench")
TOOLS = ("memcheck", "racecheck")
# The largest part of the time for checks, if measurements follow, and the least seconds for each measurement.
CHECKS_SHARE, TAIL_SECONDS = 0.45, 25
# Seconds in which a part that is asked to end may report its progress, before it is killed.
GRACE_SECONDS = 10
# Running commands. Each has its own session, so that a Ctrl-C does not reach it directly.
RUNNING: list[subprocess.Popen[str]] = []


def lay_out(folder: Path) -> None:
    """Link the package into `folder` as it is laid out when installed."""
    package = folder / "fastlenet"
    package.mkdir()
    for entry in (ROOT / "fastlenet").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")


def commands(part: str, results: Path, seconds: float) -> dict[str, list[str]]:
    """Return the commands of a part by name; raise SystemExit with a clear line if the part cannot run here."""
    module = [sys.executable, "-m"]
    if part == "tests":
        return {"tests": [sys.executable, "tests/run.py", "--tier", "wide", "--only", "kernels", "--only", "plain"]}
    if part == "kernels":
        return {"kernels": [*module, "bench.kernels", "--results", str(results)]}
    if part == "bench":
        limit = str(max(0, round(seconds - TAIL_SECONDS)))
        return {"bench": [*module, "fastlenet", "bench", "--limit", limit, "--results", str(results)]}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not on PATH; it is part of the CUDA toolkit")
    return {
        tool: [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "bench/smoke.py"] for tool in TOOLS
    }


def end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Send a signal to a command and all its processes, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def run(name: str, command: list[str], results: Path, environment: dict[str, str], seconds: float) -> str:
    """Run a command, copying its output to the terminal and to a log; return "ok" or the fault."""
    begin = time.monotonic()
    with open(results / f"gpu-{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.append(process)
        # They end the command even if it prints nothing.
        late = max(0.0, seconds - GRACE_SECONDS)
        watchdogs = [
            threading.Timer(late, end, (process, signal.SIGTERM)),
            threading.Timer(late + GRACE_SECONDS, end, (process, signal.SIGKILL)),
        ]
        for watchdog in watchdogs:
            watchdog.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{name:9} | {line}", end="", flush=True)
            log.write(line)
        code = process.wait()
        for watchdog in watchdogs:
            watchdog.cancel()
        RUNNING.remove(process)
    took = time.monotonic() - begin
    verdict = "ok" if code == 0 else f"ran past its {seconds:.0f} s" if took >= late else f"exit code {code}"
    return f"{verdict} ({took:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for and print a summary; the exit code is 0 only if all went well."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    known = (*CHECKS, *MEASUREMENTS)
    parser.add_argument(
        "--parts",
        default=",".join(known),
        metavar="PART,PART",
        help=f"what to run, of {', '.join(known)} (default: all)",
    )
    folder = "folder for the results (default: bench/results in the checkout)"
    seconds = "seconds for all parts together (default: 540)"
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER", help=folder)
    parser.add_argument("--seconds", type=float, default=540, metavar="SECONDS", help=seconds)
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(known):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose of {', '.join(known)}")

    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} of {sys.executable} sees no GPU", file=sys.stderr)
        return 2
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    outcome: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fastlenet-") as folder:
        lay_out(Path(folder))
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")])),
            # Otherwise `python -m` would look into the checkout first, and its fastlenet/ has no kernels/ inside.
            PYTHONSAFEPATH="1",
            PYTHONUNBUFFERED="1",
        )

        def start(part: str, seconds: float) -> list[threading.Thread]:
            own = dict(environment)
            if part == "sanitize":
                # Without the caching allocator every tensor has its own allocation, so the sanitizer knows its bounds.
                own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            try:
                found = commands(part, results, seconds)
            except SystemExit as reason:
                outcome[part] = str(reason)
                return []

            def follow(name: str, command: list[str]) -> None:
                try:
                    outcome[name] = run(name, command, results, own, seconds)
                except OSError as error:
                    outcome[name] = f"did not run: {error}"

            threads = [threading.Thread(target=follow, args=each) for each in found.items()]
            for thread in threads:
                thread.start()
            return threads

        measurements = [part for part in MEASUREMENTS if part in parts]
        checking = options.seconds * (CHECKS_SHARE if measurements else 1)
        try:
            for thread in [t for part in CHECKS if part in parts for t in start(part, checking)]:
                thread.join()
            for part in measurements:
                left = deadline - time.monotonic()
                if left < TAIL_SECONDS:
                    outcome[part] = "no time was left"
                    continue
                for thread in start(part, left):
                    thread.join()
        except KeyboardInterrupt:
            for process in list(RUNNING):
                end(process, signal.SIGTERM)
            raise
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {results}")
    for name, verdict in outcome.items():
        print(f"{name:9} {verdict}")
    return 0 if all(verdict.startswith("ok") for verdict in outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
