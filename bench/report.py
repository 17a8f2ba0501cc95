"""``fastlenet report``: a results file as a Markdown page and a picture."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastlenet import environment
from fastlenet.errors import InputError, MissingPackageError, import_extra
from fastlenet.files import atomic_write
from fastlenet.terminal import Parser, print_error

ROOT = Path(__file__).resolve().parent.parent
OWN, EAGER = "fastlenet", "eager"
# The fields that rows of one comparison share.
KEY = ("name", "level", "direction", "batch", "dtype", "precision")
DIRECTIONS = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}
OF_NETWORKS = {"train_step": "training step", "forward": "inference"}
LEGEND = (
    "Times are medians of interleaved rounds in one process, with the interquartile range. A baseline's column says "
    "how many times as long it takes as fastlenet: above 1x fastlenet is faster; ~ marks ranges that overlap, so no "
    "clear difference. 'floor' is how many times as long fastlenet takes as the least memory traffic and arithmetic "
    "would at the rates measured on this device. 'red' means that the accuracy check failed, so there is no time."
)

Row = dict[str, Any]


class Goal(NamedTuple):
    """The project's goal for one comparison of LeNet.

    Attributes:
        direction: of the comparison.
        batch: of the comparison.
        eager: the least speed as a multiple of stock eager's, or the largest part of its memory.
        best: the same for the best of `baselines`, or None.
        memory: whether the goal is about peak memory, not time.
        graphed: whether a CUDA graph of fastlenet is compared with one of eager's, and with the baselines as they are.
    """

    direction: str
    batch: int
    eager: float
    best: float | None = None
    memory: bool = False
    graphed: bool = False


@dataclass(frozen=True)
class Goals:
    """A kind of device's goals; `precision` and `baselines` (which "the best" is chosen from) hold for all."""

    precision: str
    baselines: tuple[str, ...]
    goals: tuple[Goal, ...]
    saved_bytes: int = 12_800
    worst_operator: float = 0.95
    networks: tuple[float, float] | None = None
    worst_network: tuple[float, float] | None = None


CPU_GOALS = Goals(
    "ieee",
    (EAGER, "channels_last", "compiled"),
    (
        Goal("train_step", 1024, 4.0, 2.5),
        Goal("train_step", 64, 2.5, 2.0),
        Goal("train_step", 32, 2.0, 1.6),
        Goal("train_step", 1, 1.3, 1.1),
        Goal("forward", 1024, 4.0, 2.5),
        Goal("forward", 64, 2.5, 1.8),
        Goal("forward", 1, 1.3, 1.1),
        Goal("train_step", 8192, 0.3, memory=True),
    ),
    networks=(2.5, 1.8),
    worst_network=(1.0, 0.97),
)
GPU_GOALS = Goals(
    "tf32",
    ("compiled", "compiled reduce-overhead", "compiled max-autotune"),
    (
        Goal("train_step", 8192, 4.5, 3.0),
        Goal("train_step", 8192, 4.5, 3.0, graphed=True),
        Goal("forward", 8192, 5.0, 3.0),
        Goal("forward", 8192, 5.0, 3.0, graphed=True),
        Goal("train_step", 64, 3.0, 2.5, graphed=True),
    ),
    worst_operator=1.0,
)


@dataclass(frozen=True)
class Comparison:
    """The rows of one comparison, by implementation."""

    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        """Any row: all have the same work."""
        return next(iter(self.rows.values()))

    def median(self, name: str) -> float | None:
        """Median of an implementation, or None if it was not measured or failed its check."""
        row = self.rows.get(name)
        return row["median"] if row is not None and row["ok"] else None

    def ratio(self, name: str, own_name: str = OWN) -> float | None:
        """The time of an implementation as a multiple of fastlenet's, in one of fastlenet's forms."""
        own, other = self.median(own_name), self.median(name)
        return other / own if own and other else None

    def ratio_text(self, name: str) -> str:
        """The ratio as a table shows it."""
        if name not in self.rows:
            return ""
        ratio = self.ratio(name)
        if ratio is None:
            return "" if self.rows[name]["ok"] else "red"
        apart = abs(self.median(name) - self.median(OWN)) > (self.rows[name]["iqr"] + self.rows[OWN]["iqr"]) / 2
        return f"{ratio:.2f}x" + ("" if apart else "~") + modelled(self.rows[name], self.rows[OWN])

    @property
    def floor_ratio(self) -> float | None:
        """The time of fastlenet as a multiple of its floor."""
        row = self.rows.get(OWN)
        if row is None or not row["ok"] or not row["floor_ns_per_image"]:
            return None
        return row["ns_per_image"] / row["floor_ns_per_image"]


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Group rows by what they compare, in order."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in KEY), {})[row["impl"]] = row
    return [Comparison(group) for group in groups.values()]


def modelled(*rows: Row) -> str:
    """Mark a figure that is modelled."""
    return " (modelled)" if any(row.get("source", "measured") != "measured" for row in rows) else ""


def label(row: Row) -> str:
    """Describe the work of a row."""
    return f"{_title(row)}, batch {row['batch']}, {mode(row)}" + (", kernels alone" if row["level"] == "kernel" else "")


def _title(row: Row) -> str:
    """Describe what a row measures, without batch and mode."""
    # GPU time alone is of networks and of operators.
    operator = row["level"] == "operator" or row["name"].startswith(("conv2d_relu_max_pool2d ", "linear_relu "))
    directions = DIRECTIONS if operator else OF_NETWORKS
    return f"{row['name']} {directions[row['direction']]}"


def mode(row: Row) -> str:
    """Format dtype and precision."""
    return "bfloat16" if row["dtype"] == "bfloat16" else f"{row['dtype']} {row['precision']}"


def duration(microseconds: float) -> str:
    """Format a time in a suitable unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def line(rows: Sequence[Row]) -> str:
    """One comparison in one line."""
    comparison = Comparison({row["impl"]: row for row in rows})
    own = comparison.median(OWN)
    parts = [f"{label(comparison.first)}: fastlenet {'red' if own is None else duration(own)}"]
    parts += [f"{name} {text}" for name in comparison.rows if name != OWN and (text := comparison.ratio_text(name))]
    if comparison.floor_ratio is not None:
        parts.append(f"floor {comparison.floor_ratio:.1f}x")
    return "; ".join(parts)


def noise(rows: Iterable[Row]) -> str | None:
    """Warn if other processes shared the CPUs, or if the timings scatter."""
    timed = [row for row in rows if row["ok"]]
    crowded = sum(bool(row.get("crowded")) for row in timed)
    scattered = sum(row["iqr"] > 0.1 * row["median"] for row in timed)
    if crowded + scattered <= len(timed) / 20:
        return None
    return (
        f"Noisy: of {len(timed)} timings, {crowded} were taken while other processes used these CPUs, and {scattered} "
        "have an interquartile range of more than 10% of the median. Repeat on a quiet machine before believing these "
        "ratios."
    )


def sections(rows: Iterable[Row]) -> list[tuple[str, list[list[str]]]]:
    """Make the tables: titles, and lines of cells, the head first."""
    titles = {"module": "Networks", "operator": "Operators", "kernel": "GPU time alone"}
    result = []
    everything = comparisons(rows)
    for level, title in titles.items():
        some = [comparison for comparison in everything if comparison.first["level"] == level]
        if not some:
            continue
        baselines = list(dict.fromkeys(name for comparison in some for name in comparison.rows if name != OWN))
        head = ["work", "batch", "mode", "fastlenet", *baselines, "floor", "saved/image", "peak memory"]
        lines = [_cells(comparison, baselines) for comparison in some]
        keep = [i for i in range(len(head)) if i < 4 or any(cells[i] for cells in lines)]
        result.append((title, [[cells[i] for i in keep] for cells in [head, *lines]]))
    return result


def _cells(comparison: Comparison, baselines: Sequence[str]) -> list[str]:
    row = comparison.first
    own = comparison.rows.get(OWN, row)
    median = comparison.median(OWN)
    time = "red" if median is None else f"{duration(median)} +- {own['iqr'] / median / 2:.0%}{modelled(own)}"
    return [
        _title(row),
        str(row["batch"]),
        mode(row),
        time,
        *(comparison.ratio_text(name) for name in baselines),
        "" if comparison.floor_ratio is None else f"{comparison.floor_ratio:.1f}x",
        _against_eager(comparison, "saved_bytes_per_image", lambda value: f"{value:,.0f} B"),
        _against_eager(comparison, "peak_bytes", lambda value: f"{value / 1e6:,.1f} MB"),
    ]


def _against_eager(comparison: Comparison, field: str, show: Any) -> str:
    """Format fastlenet's figure with eager's beside it."""
    own, other = (comparison.rows.get(name, {}).get(field) for name in (OWN, EAGER))
    if own is None:
        return ""
    return show(own) + (f" (eager {show(other)})" if other else "")


def goals(results: dict[str, Any]) -> list[list[str]]:
    """Compare the results with the project's goals: lines of cells, the head first."""
    wanted = CPU_GOALS if results["environment"]["device_slug"].startswith("cpu-") else GPU_GOALS
    everything = comparisons(row for row in results["rows"] if row["precision"] == wanted.precision)
    lenet = {
        (c.first["direction"], c.first["batch"]): c
        for c in everything
        if c.first["name"] == "LeNet" and c.first["level"] == "module"
    }
    lines = []
    for goal in wanted.goals:
        if (comparison := lenet.get((goal.direction, goal.batch))) is None:
            continue
        title = f"LeNet {OF_NETWORKS[goal.direction]}, batch {goal.batch}"
        if goal.memory:
            own, other = (comparison.rows.get(name, {}).get("peak_bytes") for name in (OWN, EAGER))
            value = own / other if own and other else None
            lines.append([f"peak memory, {title}", _against(value, goal.eager, most=True), ""])
            continue
        own, eager = (f"{OWN} graphed", f"{EAGER} graphed") if goal.graphed else (OWN, EAGER)
        ratios = [ratio for name in wanted.baselines if (ratio := comparison.ratio(name, own))]
        best = "" if goal.best is None else _against(min(ratios, default=None), goal.best)
        lines.append(
            [title + ", as CUDA graphs" * goal.graphed, _against(comparison.ratio(eager, own), goal.eager), best]
        )
    for (direction, _), comparison in lenet.items():
        if direction == "train_step":
            saved = comparison.rows.get(OWN, {}).get("saved_bytes_per_image")
            verdict = "not measured" if saved is None else "met" if saved <= wanted.saved_bytes else "missed"
            figure = "" if saved is None else f"{saved:,.0f} B, "
            lines.append(
                ["saved for backward, bytes per image", f"{figure}goal <= {wanted.saved_bytes:,} B: {verdict}", ""]
            )
            break
    lines += _of_networks(everything, wanted)
    operators = [(ratio, c) for c in everything if c.first["level"] == "operator" and (ratio := c.ratio(EAGER))]
    if operators:
        ratio, worst = min(operators, key=lambda pair: pair[0])
        title = f"worst operator: {label(worst.first)}"
        lines.append([title, _against(ratio, wanted.worst_operator), ""])
    return [["goal", "against stock eager", f"against the best of {', '.join(wanted.baselines)}"], *lines]


def _of_networks(everything: Sequence[Comparison], wanted: Goals) -> list[list[str]]:
    """Compare several networks with their goals: lines for the geometric mean and for the worst."""
    networks = [c for c in everything if c.first["level"] == "module"]
    if wanted.networks is None or wanted.worst_network is None or len({c.first["name"] for c in networks}) < 2:
        return []
    eager = [ratio for c in networks if (ratio := c.ratio(EAGER))]
    best = [min(ratios) for c in networks if (ratios := [r for name in wanted.baselines if (r := c.ratio(name))])]
    if not eager:
        return []
    return [
        [f"{len(eager)} comparisons of networks, {title}", _against(of(eager), goals[0]), _against(of(best), goals[1])]
        for title, of, goals in (
            ("geometric mean", statistics.geometric_mean, wanted.networks),
            ("worst", min, wanted.worst_network),
        )
    ]


def _against(value: float | None, goal: float, most: bool = False) -> str:
    """Format a ratio with its goal."""
    bound = f"goal {'<=' if most else '>='} {goal:g}x"
    if value is None:
        return f"{bound}: not measured"
    met = value <= goal if most else value >= goal
    return f"{value:.2f}x, {bound}: {'met' if met else 'missed'}"


def all_tables(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The table of goals, if the results concern any, and the tables of `sections`."""
    against_goals = goals(results)
    return [("Goals", against_goals)] * (len(against_goals) > 1) + sections(results["rows"])


def print_tables(results: dict[str, Any]) -> None:
    """Print all tables, with rich if it is installed."""
    tables = all_tables(results)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(as_text(tables))
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # lines of a log may be long
        console = Console(highlight=False, width=max(240, console.width))
    for title, (head, *lines) in tables:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right")
        for cells in lines:
            table.add_row(*cells)
        console.print(table)


def as_text(tables: Iterable[tuple[str, list[list[str]]]]) -> str:
    """Tables in plain text."""
    blocks = []
    for title, lines in tables:
        widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines]
        blocks.append("\n".join([title, *(line.rstrip() for line in text)]))
    return "\n\n".join(blocks)


def as_markdown(results: dict[str, Any], picture: str | None) -> str:
    """The whole page."""
    about = results["environment"]
    rows = results["rows"]
    source = "modelled in part, as marked" if any(modelled(row) for row in rows) else "measured; none is modelled"
    parts = [f"# fastlenet on {about['device']}", heading(about) + f" All figures are {source}."]
    if picture is not None:
        parts.append(f"![How fast LeNet runs, stock eager being 1]({picture})")
    parts += [text for text in (noise(rows), LEGEND) if text]
    for title, lines in all_tables(results):
        head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
        parts.append("\n".join([f"## {title}\n", head, "| --- " * len(lines[0]) + "|", *body]))
    red = [f"- {label(row)}, {row['impl']}: {row.get('why', 'unknown')}" for row in rows if not row["ok"]]
    if red:
        parts.append("## Not timed\n\n" + "\n".join(red))
    compiled = [row for row in rows if row["compile_seconds"] and row["compile_seconds"] > 1]
    if compiled:
        first = {}
        for row in compiled:
            first.setdefault(row["impl"], []).append(row["compile_seconds"])
        times = ", ".join(f"{name} {max(values):.1f} s" for name, values in first.items())
        parts.append(f"Longest first call, compilation included, outside all times above: {times}.")
    if missing := about.get("bench", {}).get("not_measured"):
        parts.append(f"Not measured for lack of time: {len(missing)} comparisons.")
    return "\n\n".join(parts) + "\n"


def heading(about: dict[str, Any]) -> str:
    """Name the source of the figures."""
    versions = [f"torch {about['torch']}", f"triton {about['triton']}", f"Python {about['python']}"]
    versions += [f"{name} {about[key]}" for name, key in (("CUDA", "cuda"), ("driver", "driver")) if about.get(key)]
    commit = f"commit {(about['commit'] or 'unknown')[:10]}" + (" with uncommitted changes" if about["dirty"] else "")
    threads = f"{about['threads']['intra_op']} threads, " if "cpu" in about["device_slug"] else ""
    return f"{about['device']}, {threads}{', '.join(versions)}; {about.get('date', 'date unknown')}, {commit}."


COLOURS = {
    OWN: "#c1272d",
    EAGER: "#555555",
    "channels_last": "#0072b2",
    "compiled": "#009e73",
    "compiled reduce-overhead": "#e69f00",
    "compiled max-autotune": "#8c6d31",
    "library": "#cc79a7",
    "library channels_last": "#7b4173",
}
GRAPHED = " graphed"
"""The end of the name of an implementation that replays CUDA graphs. Its line is dotted."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the picture.

    Above, for LeNet's training step and inference: speed against stock eager by batch, with a line for each
    implementation and a dashed line for the floor. Below: every operator against eager and against its best baseline.

    Raises:
        MissingPackageError: without matplotlib.
        InputError: if there is nothing to draw, or `path` cannot be written.
    """
    matplotlib = import_extra("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_extra("matplotlib.pyplot")
    everything = [c for c in comparisons(results["rows"]) if c.ratio(EAGER)]
    networks = [c for c in everything if c.first["level"] == "module"]
    modes = [mode(c.first) for c in networks]
    lenet = [c for c in networks if c.first["name"] == "LeNet"]
    shown = max(set(modes), key=lambda name: (modes.count(name), -modes.index(name))) if modes else ""
    panels = [
        (f"LeNet {word}", sorted((c for c in lenet if c.first["direction"] == direction), key=_batch))
        for direction, word in OF_NETWORKS.items()
    ]
    panels = [(title, [c for c in some if mode(c.first) == shown]) for title, some in panels]
    panels = [(title, some) for title, some in panels if some]
    operators = [c for c in everything if c.first["level"] == "operator"]
    operators = [c for c in operators if mode(c.first) == mode(operators[0].first)]
    if not panels and not operators:
        raise InputError("the results have no comparison of fastlenet with stock eager, so there is nothing to draw")
    height = (4.6 if panels else 0) + (0.9 + 0.23 * len(operators) if operators else 0) + 1.1
    figure = pyplot.figure(figsize=(11, height), layout="constrained")
    about = results["environment"]
    figure.suptitle(
        f"fastlenet on {about['device']}: how many times as fast as stock PyTorch", fontweight="bold", x=0.01, ha="left"
    )
    note = "\nNoisy: many ranges are wide, so repeat it before believing it." if noise(results["rows"]) else ""
    figure.supxlabel(heading(about) + note, fontsize=7.5, color="#444444")
    grid = figure.add_gridspec(
        int(bool(panels)) + int(bool(operators)),
        max(1, len(panels)),
        height_ratios=[*([4.6] if panels else []), *([0.9 + 0.23 * len(operators)] if operators else [])],
    )
    for column, (title, some) in enumerate(panels):
        _draw_lines(figure.add_subplot(grid[0, column]), f"{title} ({shown})", some)
    _name_lines(figure)
    if operators:
        _draw_bars(figure.add_subplot(grid[-1, :]), operators)
    try:
        from io import BytesIO

        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        atomic_write(path, buffer.getvalue())
    finally:
        pyplot.close(figure)


def _batch(comparison: Comparison) -> int:
    return comparison.first["batch"]


def _draw_lines(axes: Any, title: str, some: list[Comparison]) -> None:
    """Speed against eager by batch."""
    names = list(dict.fromkeys(name for comparison in some for name in comparison.rows))
    speeds_seen = [1.0]
    for name in [*(name for name in names if name != OWN), OWN]:
        points = [(i, c.median(EAGER) / c.median(name)) for i, c in enumerate(some) if c.median(name)]
        if not points:
            continue
        positions, speeds = zip(*points, strict=True)
        speeds_seen += speeds
        base = name.removesuffix(GRAPHED)
        axes.plot(
            positions,
            speeds,
            "o-" if base == name else "o:",
            color=COLOURS.get(base, "#999999"),
            linewidth=3 if base == OWN else 1.6,
            markersize=7 if base == OWN else 4,
            label=name,
        )
        if base == OWN:
            for position, speed in points:
                text = axes.annotate(
                    f"{speed:.2g}x", (position, speed), (0, 9), textcoords="offset points", ha="center",
                    color=COLOURS[OWN], fontweight="bold", zorder=5,
                )  # fmt: skip
                text.set_path_effects([import_extra("matplotlib.patheffects").withStroke(linewidth=3, foreground="w")])
    floors = [c.median(EAGER) * 1e3 / c.first["batch"] / c.rows[OWN]["floor_ns_per_image"] for c in some]
    # The floor of a batch of one lies outside of the picture, because there calls take longer than the work.
    top = max(speeds_seen)
    upper = max(top * 1.6, 2.0, min(max(floors), 12 * top) * 1.3)
    lower = min(speeds_seen) / 1.35
    axes.plot(range(len(some)), floors, "--", color="black", linewidth=1.2, label="floor of this device")
    axes.set_yscale("log")
    axes.set_ylim(lower, upper)
    axes.axhspan(lower, 1, color="#000000", alpha=0.06, zorder=0)
    axes.annotate("slower than stock", (0.015, 0.012), xycoords="axes fraction", fontsize=8, color="#666666")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if lower <= t <= upper]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(some)), [f"{_batch(c):,}" for c in some])
    axes.set_xlim(-0.3, len(some) - 0.7)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("images a batch")
    axes.set_ylabel("speed, stock eager = 1 (higher is faster)")
    axes.set_title(title, fontsize=11)


def _name_lines(figure: Any) -> None:
    """Draw one legend for all panels, at the right: fastlenet first, then in the order of drawing, the floor last."""
    found = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=lambda name: (name.removesuffix(GRAPHED) != OWN, name.startswith("floor"), name != OWN))
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)


def _draw_bars(axes: Any, operators: list[Comparison]) -> None:
    """Each operator's ratio against eager as a bar, against its best baseline as a mark."""
    operators = list(reversed(operators))
    heights = range(len(operators))
    ratios = [c.ratio(EAGER) for c in operators]
    best = [min(r for name in c.rows if name != OWN and (r := c.ratio(name))) for c in operators]
    # A logarithmic scale from 1: bars for twice as slow and twice as fast have the same length.
    axes.set_xscale("log")
    colours = [COLOURS[OWN] if ratio >= 1 else "#999999" for ratio in ratios]
    axes.barh(heights, [ratio - 1 for ratio in ratios], left=1, color=colours, alpha=0.8)
    patch = import_extra("matplotlib.patches").Patch
    [mark] = axes.plot(best, heights, "|", color="black", markersize=11, markeredgewidth=2.2)
    axes.axvline(1, color=COLOURS[EAGER], linewidth=1.2)
    shapes = [c.first["name"].removeprefix("conv2d_relu_max_pool2d ").replace("_relu", "") for c in operators]
    names = [
        f"{shape} {DIRECTIONS[c.first['direction']]}, {_batch(c)}" for shape, c in zip(shapes, operators, strict=True)
    ]
    axes.set_yticks(heights, names, fontsize=7.5)
    for height, ratio in zip(heights, ratios, strict=True):
        side = {"xytext": (4, 0), "ha": "left"} if ratio >= 1 else {"xytext": (-4, 0), "ha": "right"}
        axes.annotate(f"{ratio:.2f}x", (ratio, height), textcoords="offset points", va="center", fontsize=7.5, **side)
    axes.set_ylim(-0.7, len(operators) - 0.3)
    low, high = min(*ratios, *best, 0.8) / 1.25, max(*ratios, *best, 1.25) * 1.25
    axes.set_xlim(low, high)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("fastlenet is slower (grey)      |      fastlenet is faster (red)")
    axes.set_title(f"Operators ({mode(operators[0].first)}): shape, direction, batch", fontsize=11)
    handles = [patch(color=COLOURS[OWN], alpha=0.8), mark]
    axes.legend(handles, ["against stock eager", "against the best baseline"], loc="lower right", fontsize=8.5)
    axes.grid(axis="x", alpha=0.3)


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        InputError: if it cannot be used.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(results, dict) or not {"environment", "rows"} <= results.keys():
        raise InputError(f"{path} is not a results file of fastlenet bench")
    if not results["rows"]:
        raise InputError(f"{path} holds no rows: its run stopped before the first comparison")
    return results


def newest(folder: Path) -> Path:
    """Find the newest results file of this device.

    Raises:
        InputError: if there is none.
    """
    own = folder / environment.device_slug()
    # Their names begin with the UTC date.
    files = sorted(own.glob("*.json"))
    if not files:
        raise InputError(f"no results in {own}: run `fastlenet bench` first, or name a results file")
    return files[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and the picture of a results file.

    Returns:
        0, or 2 for bad input.
    """
    description = "Turn a results file of 'fastlenet bench' into a Markdown page and a picture."
    parser = Parser(prog="fastlenet report", description=description, allow_abbrev=False)
    results, output = ROOT / "bench" / "results", "folder for page and picture (default: that of the results file)"
    text = "folder with the results (default: bench/results in the checkout)"
    parser.add_argument("file", type=Path, nargs="?", help="results file (default: the newest of this device)")
    parser.add_argument("--results", type=Path, default=results, metavar="FOLDER", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    options = parser.parse_args(argv)
    try:
        path = options.file or newest(options.results)
        results = load(path)
        folder = options.output or path.parent
        picture: Path | None = folder / f"{path.stem}.png"
        try:
            draw(results, picture)
        except MissingPackageError as error:
            print(f"no picture: {error}", file=sys.stderr)
            picture = None
        page = folder / f"{path.stem}.md"
        atomic_write(page, as_markdown(results, picture and picture.name).encode())
    except InputError as error:
        return print_error(parser.prog, error, 2)
    print(f"{page}" + (f"\n{picture}" if picture else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
