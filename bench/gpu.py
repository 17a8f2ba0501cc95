"""``make gpu``: tests, sanitizer smoke and benchmarks on a machine with a GPU, with the Python found there.

Nothing is installed and no network is reached: the package is laid out in a temporary folder by links (`kernels/`
under `fastlenet/`, as an installed wheel has it), which PYTHONPATH then names. Every part has its own time limit, its
own log and its own line in the summary; a part that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 8 * 60


def lay_out(folder: Path) -> None:
    """Link the package into `folder` as it is laid out when installed."""
    package = folder / "fastlenet"
    package.mkdir()
    for entry in (ROOT / "fastlenet").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")


def commands(part: str, results: Path) -> list[list[str]]:
    """Return the commands of a part; raise SystemExit with a clear line if the part cannot run here."""
    if part == "tests":
        return [[sys.executable, "tests/run.py"]]
    if part == "bench":
        return [[sys.executable, "-m", "fastlenet", "bench", "--results", str(results)]]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not on PATH; it is part of the CUDA toolkit")
    return [
        [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "bench/smoke.py"]
        for tool in ("memcheck", "racecheck")
    ]


def run(part: str, results: Path, environment: dict[str, str]) -> str:
    """Run a part, copying its output to the terminal and to a log; return "ok" or what went wrong."""
    deadline = time.monotonic() + LIMIT_SECONDS
    with open(results / f"gpu-{part}.log", "w", encoding="utf-8") as log:
        try:
            for command in commands(part, results):
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                # Ends the part with all its processes, even where it prints nothing.
                watchdog = threading.Timer(deadline - time.monotonic(), os.killpg, (process.pid, signal.SIGKILL))
                watchdog.start()
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
                code = process.wait()
                watchdog.cancel()
                if time.monotonic() >= deadline:
                    return f"ran past its limit of {LIMIT_SECONDS} s"
                if code != 0:
                    return f"exit code {code}"
        except SystemExit as reason:
            log.write(f"{reason}\n")
            return str(reason)
    return "ok"


def main() -> int:
    """Run the parts asked for and print a summary; the exit code is 0 only if all went well."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--parts", default="tests,sanitize,bench", help="comma-separated: tests, sanitize, bench")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - {"tests", "sanitize", "bench"}:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose of tests, sanitize, bench")

    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} of {sys.executable} sees no GPU", file=sys.stderr)
        return 2
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlenet-") as folder:
        lay_out(Path(folder))
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join([folder, str(ROOT)]),
            # Else `python -m` would look into the checkout first, whose fastlenet/ has no kernels/ inside.
            PYTHONSAFEPATH="1",
            PYTHONUNBUFFERED="1",
        )
        # Without the caching allocator every tensor has its own allocation, whose bounds the sanitizer then knows.
        sanitizing = dict(environment, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcome = {}
        for part in parts:
            started = time.monotonic()
            verdict = run(part, results, sanitizing if part == "sanitize" else environment)
            outcome[part] = f"{verdict} ({time.monotonic() - started:.0f} s)"
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {results}")
    for part, verdict in outcome.items():
        print(f"{part:9}{verdict}")
    return 0 if all(verdict.startswith("ok") for verdict in outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
