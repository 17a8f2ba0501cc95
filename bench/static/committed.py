"""The committed report: completed by today's, compared with it, and held against what a GPU measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from bench.static.fake_driver import TARGETS
from bench.static.launches import (
    BATCH,
    INFERENCE,
    PRECISIONS,
    STEP,
    Row,
    compiling_fastlenet,
    identity_of,
    run_lenet,
    run_operator,
)
from bench.static.model import cost
from bench.workloads import BACKWARD, FORWARD, LENET_OPERATORS, OTHER_OPERATORS, TRAIN_STEP, Work

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
TOLERANCE = 0.05
REFRESH = "python -m bench.static --compile-times --save"


def committed_path() -> Path:
    """Where the figures of the installed Triton version are kept."""
    return RESULTS / "static" / f"{triton.__version__}.json"


def completed(today: dict[str, Any], committed: dict[str, Any] | None) -> dict[str, Any]:
    """Complete a report of some architectures by what a committed one says of the others.

    ``commits`` then tells for each architecture which commit was looked at.
    """
    looked_at = {row["arch"] for row in today["rows"]}
    commits = dict.fromkeys(looked_at, today["environment"]["commit"])
    document = today | {"commits": commits}
    if committed is not None:
        others = {row["arch"] for row in committed["rows"]} - looked_at
        before = committed.get("commits", {})
        document["commits"] = {arch: before.get(arch, committed["environment"]["commit"]) for arch in others} | commits
        for part in ("totals", "compile", "rows"):
            document[part] = [line for line in committed[part] if line["arch"] in others] + today[part]
    for part in ("totals", "compile", "rows"):
        document[part] = sorted(document[part], key=lambda line: list(TARGETS).index(line["arch"]))
    document["commits"] = {arch: document["commits"][arch] for arch in TARGETS if arch in document["commits"]}
    return document


def compare(today: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """List what got worse, vanished or is new, against a committed report; only what `today` looked at counts.

    Worse is more than 5% more instructions or issue time, of a row or of a total, and any spill of a LeNet kernel on
    sm_80 and sm_90.
    """
    problems = []

    def group(row: Row) -> tuple[Any, ...]:
        return row["arch"], row["precision"], bool(row["used_by"])

    looked_at = {group(row) for row in today["rows"]}
    before = {identity_of(row): row for row in committed["rows"] if group(row) in looked_at}
    now = {identity_of(row): row for row in today["rows"]}
    for identity, row in now.items():
        name = " | ".join(identity)
        if row["spill_bytes"] and row["used_by"] and row["arch"] in ("sm_80", "sm_90"):
            problems.append(f"spills {row['spill_bytes']} bytes: {name}")
        if identity not in before:
            problems.append(f"not in the committed file: {name}")
        else:
            problems += _worse(name, before[identity], row)
    problems += [f"only in the committed file: {' | '.join(identity)}" for identity in before if identity not in now]
    old = {(t["arch"], t["precision"], t["use"]): t for t in committed["totals"]}
    for total in today["totals"]:
        key = (total["arch"], total["precision"], total["use"])
        if key in old:
            problems += _worse(f"total of {' | '.join(key)}", old[key], total)
    return problems


def _worse(name: str, before: Row, now: Row) -> list[str]:
    found = []
    for figure in ("instructions", "issue_ns_per_image"):
        old, new = before[figure], now[figure]
        if old is not None and new is not None and new > old * (1 + TOLERANCE):
            found.append(f"{figure} {old:.4g} -> {new:.4g} (+{new / old - 1:.0%}): {name}")
    return found


def measured(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The rows of fastlenet in the newest results of each GPU, by device; empty where no GPU was measured yet."""
    found = {}
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = sorted(device.glob("*.json"))
        if device.name != "static" and not device.name.startswith("cpu-") and files:
            rows = json.loads(files[-1].read_text(encoding="utf-8"))["rows"]
            found[device.name] = [row for row in rows if row["impl"] == "fastlenet" and row["ok"]]
    return found


def model_of(row: Row, arch: str) -> float | None:
    """Model what a measured row timed, in nanoseconds per image; None where the model does not know the work."""
    precision = row["precision"]
    case = next((c for c in (*LENET_OPERATORS, *OTHER_OPERATORS) if row["name"].endswith(f" {c.name}")), None)
    lenet = {FORWARD: INFERENCE, TRAIN_STEP: STEP}.get(row["direction"]) if row["name"] == "LeNet" else None
    if precision not in PRECISIONS or (case is None and (lenet is None or row["batch"] != BATCH)):
        return None
    dtype = PRECISIONS[precision]
    with compiling_fastlenet(arch, precision) as records:
        skipped: dict[str, int] = {}
        if case is None:
            run_lenet(str(lenet), dtype)
        else:
            run_operator(case, row["batch"], dtype, row["direction"] != FORWARD)
            if row["direction"] == BACKWARD:  # the forward that came before was not timed
                with compiling_fastlenet(arch, precision) as forward:
                    run_operator(case, row["batch"], dtype, False)
                skipped = {record.name: len(record.calls) for record in forward}
        launches = [(r, call) for r in records for call in r.calls[skipped.get(r.name, 0) :]]
        return sum(cost(record, launch).ns for record, launch in launches) / row["batch"]


def modelled_kernels(work: Work, names: Sequence[str]) -> dict[int, float]:
    """Find LeNet's kernels in the committed rows, where they are for this GPU.

    Args:
        work: inference or a training step at the batch that the rows are of.
        names: the kernels that one call launches, in order.

    Returns:
        Modelled nanoseconds per image, by position in `names`; the n-th launch of a name is the n-th row of it.
    """
    use = INFERENCE if work.direction == FORWARD else STEP
    files = sorted((RESULTS / "static").glob("*.json"))
    if not files or work.batch != BATCH or not torch.cuda.is_available():
        return {}
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    queues: dict[str, list[float]] = {}
    for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"]:
        if row["arch"] == arch and row["precision"] == work.precision and use in row["used_by"]:
            queue = queues.setdefault(row["kernel"].rpartition(".")[2], [])
            queue += [row["modelled_ns_per_image"]] * row["launches"][use]
    found = {}
    for position, name in enumerate(names):
        if queues.get(name):
            found[position] = queues[name].pop(0)
    return found
