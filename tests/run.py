"""Run the whole test-suite: ``python tests/run.py [--only SUITE] [--jobs N] [pytest options]``.

Triton interprets kernels in one process and compiles them in another, so the suite is three:

* ``plain``: everything in ``tests/`` but the two folders below;
* ``kernels``: ``tests/interpreted``, with ``TRITON_INTERPRET=1``, or natively where there is a GPU;
* ``compiled``: ``tests/compiled``, kernels cross-compiled for GPUs that need not be there.

They run side by side, long suites split over several processes. Unknown options go to every pytest. The last line is
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
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SUITES = ("plain", "kernels", "compiled")
MOST_JOBS, MANY_JOBS = 12, 8
PROGRESS_SECONDS = 30.0
NOTHING_COLLECTED = 5


@dataclass
class Job:
    """One pytest process."""

    suite: str
    shard: int
    shards: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    returncode: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("passed", "failed", "skipped"), 0))
    note: str = ""

    @property
    def name(self) -> str:
        """The suite's name, numbered where it runs in several processes."""
        return self.suite if self.shards == 1 else f"{self.suite} {self.shard}/{self.shards}"

    @property
    def log(self) -> Path:
        """Where the process's output goes."""
        return self.folder / f"{self.suite}-{self.shard}.log"

    @property
    def report(self) -> Path:
        """Where pytest's junit report goes."""
        return self.folder / f"{self.suite}-{self.shard}.xml"

    @property
    def progress(self) -> Path:
        """Where the process says how far it is."""
        return self.folder / f"{self.suite}-{self.shard}.progress"


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_available() -> bool:
    """Whether PyTorch sees a GPU; asked in a process of its own, which keeps CUDA out of this one."""
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cannot import torch with {sys.executable}:\n{done.stderr}")
    return done.stdout.strip().endswith("True")


def command(job: Job, options: list[str]) -> list[str]:
    """The pytest command line of a job."""
    target = {
        "plain": [str(TESTS), f"--ignore={TESTS / 'interpreted'}", f"--ignore={TESTS / 'compiled'}"],
        "kernels": [str(TESTS / "interpreted")],
        "compiled": [str(TESTS / "compiled")],
    }[job.suite]
    line = [sys.executable, "-m", "pytest", "-q", *target, f"--junitxml={job.report}", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # The project's settings name that plugin's option; without the plugin, strict configuration would refuse it.
        line += ["-o", "addopts=-ra --strict-markers"]
    return line + options


def environment(job: Job, native: bool, jobs: int) -> dict[str, str]:
    """The environment of a job."""
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    env.pop("FASTLENET_SHARD", None)
    if job.suite == "kernels" and not native:
        env["TRITON_INTERPRET"] = "1"
    if job.shards > 1:
        env["FASTLENET_SHARD"] = f"{job.shard}/{job.shards}"
    threads = str(max(1, cpus() // jobs))
    # The last is torch.compile's, which else starts as many helpers as there are CPUs in every process.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        env.setdefault(variable, threads)
    env["FASTLENET_PROGRESS_FILE"] = str(job.progress)
    env["PYTHONUNBUFFERED"] = "1"
    return env


def start(job: Job, options: list[str], native: bool, jobs: int) -> None:
    """Start a job's process."""
    job.started = time.monotonic()
    with job.log.open("wb") as log:
        job.process = subprocess.Popen(
            command(job, options),
            cwd=ROOT,
            env=environment(job, native, jobs),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"[{job.name}] started", flush=True)


def finish(job: Job) -> None:
    """Read the outcome of a process that has ended, and print its output."""
    assert job.process is not None
    job.seconds = time.monotonic() - job.started
    job.returncode = job.process.returncode
    output = job.log.read_text(errors="replace").rstrip()
    print(f"\n===== {job.name}: exit code {job.returncode} after {job.seconds:.0f} s =====\n{output}\n", flush=True)
    try:
        suite = next(ElementTree.parse(job.report).iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        suite = None
    if suite is not None:
        number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        job.counts["failed"] = number["failures"] + number["errors"]
        job.counts["skipped"] = number["skipped"]
        job.counts["passed"] = max(0, number["tests"] - job.counts["failed"] - job.counts["skipped"])
    if job.returncode == NOTHING_COLLECTED:
        job.note = "no tests"
    elif job.returncode < 0:
        job.note = f"killed by signal {signal.Signals(-job.returncode).name}"
        job.counts["failed"] += 1
    elif job.returncode and not job.counts["failed"]:
        job.note = f"pytest ended with code {job.returncode}"
        job.counts["failed"] += 1
    elif suite is None:
        job.note = "no report"
        job.counts["failed"] += 1


def stop(running: list[Job]) -> None:
    """End the processes that are still running, with what they started."""
    for job in running:
        if job.process is not None and job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGTERM)
    for job in running:
        if job.process is not None:
            try:
                job.process.wait(timeout=5)  # whoever ends this program may be impatient, too
            except subprocess.TimeoutExpired:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()


def run_all(waiting: list[Job], options: list[str], native: bool, jobs: int) -> None:
    """Run all jobs, at most ``jobs`` at a time, with a sign of life every half minute."""
    running: list[Job] = []
    begun = spoken = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                start(waiting[0], options, native, jobs)
                running.append(waiting.pop(0))
            time.sleep(0.2)
            for job in [j for j in running if j.process is not None and j.process.poll() is not None]:
                running.remove(job)
                finish(job)
                spoken = time.monotonic()
            if running and time.monotonic() - spoken >= PROGRESS_SECONDS:
                spoken = time.monotonic()
                for job in running:
                    state = job.progress.read_text() if job.progress.exists() else "collecting"
                    print(f"[{spoken - begun:4.0f} s] [{job.name}] {state}", flush=True)
    except BaseException:
        stop(running)
        for job in running:
            print(f"\n===== {job.name}: interrupted =====\n{job.log.read_text(errors='replace')[-4000:]}", flush=True)
        raise


def summary(finished: list[Job], filtered: bool) -> int:
    """Print the table and the last line; return the exit code."""
    width = max(len("suite"), *(len(job.name) for job in finished))
    print(f"{'suite':<{width}}  {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}  note")
    total = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for job in finished:
        for key in total:
            total[key] += job.counts[key]
        numbers = " ".join(f"{job.counts[key]:>7}" for key in total)
        print(f"{job.name:<{width}}  {numbers} {job.seconds:>8.1f}  {job.note}".rstrip())
    suites = {job.suite for job in finished}
    empty = sorted(s for s in suites if not any(sum(j.counts.values()) for j in finished if j.suite == s))
    # With a filter such as `-k` a suite may rightly have nothing to run, but not all of them.
    nothing = bool(empty) and (not filtered or len(empty) == len(suites))
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", choices=sorted(SUITES), action="append", help="run only this suite (may be repeated)")
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=os.environ.get("FASTLENET_TEST_JOBS") or min(MOST_JOBS, cpus()),
        help=f"processes at a time (default: one for each CPU, at most {MOST_JOBS}; FASTLENET_TEST_JOBS)",
    )
    parser.add_argument("--interpret", action="store_true", help="interpret kernels even where there is a GPU")
    known, options = parser.parse_known_args(arguments)
    if options[:1] == ["--"]:
        options = options[1:]
    native = not known.interpret and gpu_available()
    chosen = [suite for suite in SUITES if not known.only or suite in known.only]
    print(
        f"suites: {', '.join(chosen)}; kernels {'run natively on the GPU' if native else 'interpreted'}; "
        f"{known.jobs} processes at a time on {cpus()} CPUs",
        flush=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="fastlenet-tests-") as folder:
        jobs = []
        for suite in chosen:
            # Tests of kernels are many and alike; in the plain suite more start-ups pay only where CPUs are many.
            few = suite == "plain" and known.jobs < MANY_JOBS
            shards = max(1, known.jobs // 2) if few else known.jobs
            jobs += [Job(suite, shard, shards, Path(folder)) for shard in range(1, shards + 1)]
        run_all(list(jobs), options, native, known.jobs)
        return summary(jobs, bool(options))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
