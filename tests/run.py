"""Run the test-suite: ``python tests/run.py [--tier TIER] [--rest] [--only SUITE] [--jobs N] [pytest options]``.

Triton interprets kernels in one process and compiles them in another, so there are three suites:

* ``plain``: everything in ``tests/`` but the two folders below;
* ``kernels``: ``tests/interpreted``, with ``TRITON_INTERPRET=1``, or natively where there is a GPU;
* ``compiled``: ``tests/compiled``, kernels cross-compiled for GPUs that need not be there.

There are three tiers (see ``conftest.py``), and ``--rest`` leaves out what the tier before runs:

* ``quick``, as ``make test`` runs it: each test once for each implementation;
* ``wide``, as ``.ci/run`` runs it after quick: each value of each parameter once;
* ``all``, as ``make test-all`` runs it: every combination.

Of a test marked ``cheap`` quick runs every combination. The suites run one after the other, each over all CPUs by
pytest-xdist where that is installed. Unknown options go to every pytest. The last line is
``N passed, N failed, N skipped``; the exit code is 0 only if nothing failed and every suite had tests to run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SUITES = ("plain", "kernels", "compiled")
TARGETS = {
    "plain": [str(TESTS), f"--ignore={TESTS / 'interpreted'}", f"--ignore={TESTS / 'compiled'}"],
    "kernels": [str(TESTS / "interpreted")],
    "compiled": [str(TESTS / "compiled")],
}
MOST_JOBS = 12
TIERS = ("quick", "wide", "all")
# Of the tier quick, on two CPUs.
MOST_MINUTES = 5
NOTHING_COLLECTED = 5
Counts = dict[str, int]


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ask_for_gpu(env: dict[str, str]) -> subprocess.Popen[str]:
    """Ask PyTorch whether it sees a GPU, in a process of its own, which runs beside the first suite."""
    code = "import torch; print(torch.cuda.is_available())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, env=env)


def gpu_available(asked: subprocess.Popen[str]) -> bool:
    """What it answers."""
    out, error = asked.communicate()
    if asked.returncode:
        raise SystemExit(f"cannot import torch with {sys.executable}:\n{error}")
    return out.strip().endswith("True")


def command(suite: str, report: Path, jobs: int, tier: list[str], options: list[str]) -> list[str]:
    """The pytest command line of a suite."""
    line = [sys.executable, "-m", "pytest", "-q", *TARGETS[suite], f"--junitxml={report}", "-p", "no:cacheprovider"]
    if jobs > 1 and importlib.util.find_spec("xdist") is not None:
        # Tests of one group share what would be dear to make in every process. A process that dies is not started anew:
        # it would be given the same group, and die again.
        line += ["-n", str(jobs), "--dist", "loadgroup", "--max-worker-restart", "0"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # The project's settings name that plugin's option; without the plugin, strict configuration would refuse it.
        line += ["-o", "addopts=-ra --strict-markers"]
    return [*line, *tier, *options]


def environment(suite: str, native: bool, jobs: int, tier: str, folder: Path) -> dict[str, str]:
    """The environment of a suite; `folder` is there while the suites run."""
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    if env.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Without bytecode every process compiles PyTorch's sources anew, which takes 12 s: it is kept apart instead.
        env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    if suite == "kernels" and not native:
        env["TRITON_INTERPRET"] = "1"
    threads = str(max(1, cpus() // jobs))
    # The last is torch.compile's, which else starts as many helpers as there are CPUs in every process.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        env.setdefault(variable, threads)
    env["PYTHONUNBUFFERED"] = "1"
    if tier == TIERS[0]:
        env.setdefault("FASTLENET_FUZZ", "0.2")
    return env


def run(line: list[str], env: dict[str, str], report: Path) -> tuple[Counts, str]:
    """Run a suite and return its counts and what else is to be said of it."""
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        # The suite's own processes go with it.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    try:
        suite = next(ElementTree.parse(report).iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        suite = None
    if suite is not None:
        number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        counts["failed"] = number["failures"] + number["errors"]
        counts["skipped"] = number["skipped"]
        counts["passed"] = max(0, number["tests"] - counts["failed"] - counts["skipped"])
    if code == NOTHING_COLLECTED:
        return counts, "no tests"
    note = ""
    if code < 0:
        note = f"killed by signal {signal.Signals(-code).name}"
    elif suite is None:
        note = "no report"
    elif code and not counts["failed"]:
        note = f"pytest ended with code {code}"
    if note:
        counts["failed"] += 1
    return counts, note


def summary(finished: dict[str, tuple[Counts, str, float]], filtered: bool) -> int:
    """Print the table and the last line; return the exit code."""
    print(f"\n{'suite':<9} {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}  note")
    total = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for suite, (counts, note, seconds) in finished.items():
        for key in total:
            total[key] += counts[key]
        numbers = " ".join(f"{counts[key]:>7}" for key in total)
        print(f"{suite:<9} {numbers} {seconds:>8.1f}  {note}".rstrip())
    empty = [suite for suite, (counts, *_) in finished.items() if not any(counts.values())]
    # With a filter such as `-k` a suite may rightly have nothing to run, but not all of them.
    nothing = bool(empty) and (not filtered or len(empty) == len(finished))
    if nothing:
        print(f"no tests were collected in: {', '.join(empty)}")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if total["failed"] or nothing else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code."""
    description = "Run the test-suite. Options that are not listed here go to pytest."
    parser = argparse.ArgumentParser(prog="python tests/run.py", description=description, allow_abbrev=False)
    tier = "how much to run: quick (each test once), wide (each value of each parameter once) or all (default: quick)"
    parser.add_argument("--tier", choices=TIERS, default=TIERS[0], help=tier)
    parser.add_argument("--rest", action="store_true", help="leave out what the tier before this one runs")
    only = "the only suite to run (may be repeated; default: all three)"
    parser.add_argument("--only", choices=sorted(SUITES), action="append", help=only)
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=os.environ.get("FASTLENET_TEST_JOBS") or min(MOST_JOBS, cpus()),
        metavar="N",
        help=f"processes at a time (default: the variable FASTLENET_TEST_JOBS, or one for each CPU up to {MOST_JOBS})",
    )
    parser.add_argument(
        "--interpret", action="store_true", help="run the kernels in Triton's interpreter on a GPU machine too"
    )
    known, options = parser.parse_known_args(arguments)
    if options[:1] == ["--"]:
        options = options[1:]
    chosen = [suite for suite in SUITES if not known.only or suite in known.only]
    whole = known.tier == TIERS[0] and not (known.only or options)
    print(
        f"suites: {', '.join(chosen)}, {known.tier}{' without what is run before it' if known.rest else ''}; "
        f"{known.jobs} processes on {cpus()} CPUs" + (f"; at most {MOST_MINUTES} minutes on two CPUs" if whole else ""),
        flush=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    finished = {}
    tier = ["--tier", known.tier, *(["--rest"] if known.rest else [])]
    with tempfile.TemporaryDirectory(prefix="fastlenet-tests-") as folder:
        asked = None
        if "kernels" in chosen and not known.interpret:
            asked = ask_for_gpu(environment("plain", False, known.jobs, known.tier, Path(folder)))
        for suite in chosen:
            native = suite == "kernels" and asked is not None and gpu_available(asked)
            how = "" if suite != "kernels" else " natively on the GPU" if native else " in Triton's interpreter"
            print(f"\n===== {suite}{how} =====", flush=True)
            report, begin = Path(folder) / f"{suite}.xml", time.monotonic()
            line = command(suite, report, known.jobs, tier, options)
            env = environment(suite, native, known.jobs, known.tier, Path(folder))
            counts, note = run(line, env, report)
            finished[suite] = counts, note, time.monotonic() - begin
    return summary(finished, bool(options))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
