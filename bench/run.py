"""``fastlenet bench``: check, time and record fastlenet and its baselines on this machine.

Every comparison is set up once for all its implementations. Each is compared with a float64 reference. Those that pass
are timed in turns. Results are saved after every comparison.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import memory, report
from bench.baselines import (
    EAGER,
    FASTLENET,
    AnyCall,
    Call,
    Implementation,
    bound,
    competitors,
    precision_mode,
    reference_results,
)
from bench.timing import PROMISED, SAME_THING, Bystanders, Rates, Timing, check_accuracy, in_short, interleave
from bench.workloads import KERNEL, TRAIN_STEP, Data, NetworkCase, Work, cache_bytes, setup, suite
from fastlenet import environment
from fastlenet.errors import InputError
from fastlenet.files import write_json
from fastlenet.terminal import Parser, print_error
from fastlenet.timing import synchronize

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("quick", "networks", "full")
# Seconds after which the quick suite starts no comparison, to end within six minutes (seven on a GPU).
QUICK_LIMIT = {"cpu": 330.0, "cuda": 380.0}
# Seconds of timed rounds for a comparison. Only the least number of rounds may take longer.
BUDGET = {"cpu": 1.5, "cuda": 0.3}
Row = dict[str, Any]


def bind(work: Work, implementation: Implementation, data: Data, device: torch.device) -> tuple[AnyCall, float]:
    """Prepare a call for timing, and return it with the seconds of its first run, which is mostly compilation."""
    begin = time.perf_counter()
    call = bound(work, implementation, data)
    if work.level == KERNEL or implementation.graphed:
        call.capture(together=work.level == KERNEL)
    call.results(0)
    synchronize(device)
    return call, time.perf_counter() - begin


def check(work: Work, device: torch.device) -> tuple[dict[str, AnyCall], dict[str, Row]]:
    """Set one comparison up and check all its implementations; call it in the work's `precision_mode`.

    Returns:
        By implementation, the calls that may be timed; and the rows without times. If the check failed, ``ok`` is false
        and ``why`` gives the fault.
    """
    torch.compiler.reset()
    data = setup(work, device, cache_bytes(device))
    reference = reference_results(work, data)
    sets = range(len(reference))
    eager = Call(work, EAGER, data)
    stock = [eager.results(number) for number in sets]
    calls: dict[str, AnyCall] = {}
    rows: dict[str, Row] = {}
    for implementation in competitors(work, device):
        row = rows[implementation.name] = _row(work, implementation)
        try:
            call, row["compile_seconds"] = bind(work, implementation, data, device)
            factor = PROMISED if implementation is FASTLENET else SAME_THING
            wrong = check_accuracy([call.results(number) for number in sets], stock, reference, work.step, factor)
            row |= _memory(work, implementation, call, device)
        except Exception as error:  # an implementation that cannot run must not end the others' comparison
            wrong = in_short(error)
        if wrong is None:
            calls[implementation.name] = call
            row["ok"] = True
        else:
            row["why"] = wrong
    return calls, rows


def measure(work: Work, device: torch.device, *, budget: float, rounds: int) -> list[Row]:
    """Measure one comparison.

    Args:
        work: the work.
        device: the device.
        budget: seconds of timed rounds.
        rounds: how many rounds there are at least.

    Returns:
        A row for each implementation, still without its floor, and without times if the check failed.
    """
    with precision_mode(work.precision):
        calls, rows = check(work, device)
        bystanders = Bystanders()
        timings = interleave(calls, device, budget=budget, min_rounds=rounds)
        crowded = bystanders.crowded()
        for name, timing in timings.items():
            rows[name] |= _figures(timing, work) | {"crowded": crowded}
    return list(rows.values())


def _row(work: Work, implementation: Implementation) -> Row:
    """A row without figures."""
    level = KERNEL if work.level == KERNEL else "module" if isinstance(work.case, NetworkCase) else "operator"
    return {
        "name": work.name,
        "impl": implementation.name,
        "shape": work.case.shape,
        "batch": work.batch,
        "dtype": str(work.dtype).removeprefix("torch."),
        "precision": work.precision,
        "direction": work.direction,
        "level": level,
        "unit": "us",
        "median": None,
        "iqr": None,
        "min": None,
        "n": 0,
        "ns_per_image": None,
        "floor_ns_per_image": None,
        "saved_bytes_per_image": None,
        "peak_bytes": None,
        "compile_seconds": None,
        "crowded": None,
        "ok": False,
    }


def _figures(timing: Timing, work: Work) -> Row:
    return {
        "median": timing.median * 1e6,
        "iqr": timing.iqr * 1e6,
        "min": timing.min * 1e6,
        "n": timing.n,
        "ns_per_image": timing.median * 1e9 / work.batch,
    }


def _memory(work: Work, implementation: Implementation, call: AnyCall, device: torch.device) -> Row:
    peak = None
    if work.direction == TRAIN_STEP and device.type == "cuda":
        peak = memory.gpu_peak_bytes(call)
    elif work.memory and device.type == "cpu":
        peak = memory.cpu_peak_bytes(work, implementation)
    return {"saved_bytes_per_image": memory.saved_bytes_per_image(call), "peak_bytes": peak}


class Record:
    """The results of a run, and the file with all of them so far."""

    def __init__(self, folder: Path, device: torch.device, options: dict[str, Any]) -> None:
        self.environment = environment.collect()
        self.rows: list[Row] = []
        self._works: list[Work] = []
        self._device = device
        self._rates = Rates.measure(device)
        self._began = time.monotonic()
        self.environment["bench"] = options | {
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "not_measured": [],
            "seconds": None,
        }
        commit = (self.environment["commit"] or "unknown")[:10]
        moment = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
        self.environment["date"] = moment
        self.path = folder / self.environment["device_slug"] / f"{moment}-{commit}.json"
        self.save()

    def add(self, work: Work, rows: list[Row]) -> None:
        """Add a comparison and save."""
        self.rows += rows
        self._works += [work] * len(rows)
        self.save()

    def finish(self, not_measured: list[str]) -> None:
        """Measure the device's rates again, because a busy machine may have lowered them, and save the final file."""
        self._rates = self._rates.best(Rates.measure(self._device))
        bench = self.environment["bench"]
        bench["not_measured"], bench["seconds"] = not_measured, round(time.monotonic() - self._began, 1)
        self.environment["clocks_after"] = environment.collect()["clocks"]
        self.save()

    def save(self) -> None:
        """Write everything, with floors by the rates known now."""
        self.environment["bench"]["rates"] = asdict(self._rates)
        for work, row in zip(self._works, self.rows, strict=True):
            row["floor_ns_per_image"] = self._rates.floor(work.cost, work.batch, work.precision) * 1e9 / work.batch
        write_json(self.path, self.results)

    @property
    def results(self) -> dict[str, Any]:
        """The content of the file."""
        return {"environment": self.environment, "rows": self.rows}


def _parser() -> Parser:
    description = "Check, time and record fastlenet and its baselines on this machine."
    folder = "folder for the results (default: bench/results in the checkout)"
    parser = Parser(prog="fastlenet bench", description=description, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER", help=folder)
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="quick",
        help="what to measure: quick (LeNet and its operators, about 6 minutes), networks (LeNet and seven other small "
        "networks) or full (all, hours) (default: quick)",
    )
    parser.add_argument("--filter", metavar="TEXT", default="", help="run only comparisons whose name contains TEXT")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead of comparing, time the kernels' configurations on this GPU and write the fastest to "
        "kernels/configurations.json (hours)",
    )
    parser.add_argument("--list", action="store_true", help="print the comparisons' names and run none")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of every implementation (default: PyTorch's)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=5, help="least rounds of a comparison (default: 5)")
    defaults = "(default: {cpu:g}, on a GPU {cuda:g}".format
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"seconds of timed rounds in a comparison {defaults(**BUDGET)})",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help=f"seconds after which no further comparison starts {defaults(**QUICK_LIMIT)}; none in the full suite)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Returns:
        0; 1 if fastlenet failed a check or an error ended a comparison; 2 for bad input.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tune:
        if device.type != "cuda":
            return print_error(parser.prog, "--tune measures on a GPU, and PyTorch sees none here", 2)
        from bench import tune  # compiles kernels, which needs triton

        return tune.main(options.filter, device, BUDGET["cuda"] if options.budget is None else options.budget)
    works = [work for work in suite(options.suite, device.type) if options.filter.lower() in work.label.lower()]
    if not works:
        parser.error(f"no comparison's name contains {options.filter!r}; --list shows them")
    for name, least in (("threads", 1), ("rounds", 2), ("budget", 0), ("limit", 0)):
        value = getattr(options, name)
        if value is not None and not (least <= value < math.inf):
            parser.error(f"--{name} must be at least {least}, but is {value}")
    if options.list:
        print("\n".join(work.label for work in works))
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # stock at its best
    try:
        record = Record(options.results, device, {"suite": options.suite, "filter": options.filter})
    except InputError as error:
        return print_error(parser.prog, error, 2)
    budget = BUDGET[device.type] if options.budget is None else options.budget
    limit = math.inf if options.suite != "quick" else QUICK_LIMIT[device.type]
    limit = limit if options.limit is None else options.limit
    broken = _measure_all(works, record, device, budget=budget, rounds=options.rounds, limit=limit)
    print(f"\n{report.heading(record.environment)}\n")
    report.print_tables(record.results)
    if noise := report.noise(record.rows):
        print(f"\n{noise}")
    print(f"\n{report.LEGEND}\nresults: {record.path}; `fastlenet report` makes a page and a picture of them")
    failed = [row for row in record.rows if not row["ok"]]
    for row in failed:
        print(f"not timed: {report.label(row)} {row['impl']}: {row['why']}", file=sys.stderr)
    return 1 if broken or any(row["impl"] == FASTLENET.name for row in failed) else 0


def _measure_all(
    works: list[Work], record: Record, device: torch.device, *, budget: float, rounds: int, limit: float
) -> list[str]:
    """Measure as many comparisons as time allows; report and return those that an error ended."""
    begin = time.monotonic()
    broken: list[str] = []
    progress, say, advance = _display(len(works))
    left = list(works)
    with progress:
        while left and time.monotonic() - begin < limit:
            work = left.pop(0)
            advance(work.label)
            number = f"[{len(works) - len(left):>{len(str(len(works)))}}/{len(works)}]"
            try:
                rows = measure(work, device, budget=budget, rounds=rounds)
            except (RuntimeError, MemoryError) as error:  # too big for this machine, or a fault while timing
                broken.append(work.label)
                say(f"{number} {work.label}: {in_short(error)}")
                continue
            record.add(work, rows)
            say(f"{number} {report.line(rows)}")
        if left:
            say(f"time is up: {len(left)} comparisons not measured, from {left[0].label!r} on (--limit, --filter)")
        record.finish([*broken, *(work.label for work in left)])
    return broken


def _display(total: int) -> tuple[Any, Callable[[str], None], Callable[[str], None]]:
    """A progress bar on a terminal, plain lines elsewhere: a context, how to print, and how to name the next step."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        console = None
    else:
        console = Console(highlight=False, soft_wrap=True)
    if console is None or not console.is_terminal:
        return nullcontext(), lambda text: print(text, flush=True), lambda name: None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    progress = Progress(*columns, console=console)
    task = progress.add_task("", total=total, completed=-1)
    return progress, console.print, lambda name: progress.update(task, advance=1, description=name)


if __name__ == "__main__":
    sys.exit(main())
