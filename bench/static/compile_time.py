"""Seconds that kernels take to compile, measured on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import triton

from bench.static.committed import ROOT
from bench.static.launches import PRECISIONS, STEP, Row, compiling_fastlenet, run_lenet


def measure_compile(arch: str, precision: str) -> Row:
    """Seconds that the kernels of one training step take to compile, from an empty cache and from a full one.

    Each in a process of its own: the seconds count from the first launch to the last, imports left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.static", "--compile-once", arch, precision]
        variables = os.environ | {"TRITON_CACHE_DIR": folder}
        runs = [subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, check=True) for _ in range(2)]
        cold, warm = (json.loads(run.stdout) for run in runs)
    return {
        "arch": arch,
        "precision": precision,
        "cold_seconds": cold["seconds"],
        "cold_cpu_seconds": cold["cpu_seconds"],
        "cold_compiled": cold["compiled"],
        "warm_seconds": warm["seconds"],
        "warm_compiled": warm["compiled"],
    }


def compile_once(arch: str, precision: str) -> Row:
    """Compile one training step's kernels in this process; count what Triton's cache did not hold."""
    hits = []
    with compiling_fastlenet(arch, precision):
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        begin, before = time.perf_counter(), os.times()
        try:
            run_lenet(STEP, PRECISIONS[precision])
        finally:
            triton.knobs.compilation.listener = None
        seconds, after = time.perf_counter() - begin, os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # with ptxas, which is a process of its own
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "compiled": hits.count(False)}
