"""``python -m bench.static``: the command, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from bench.static.committed import ROOT, committed_path, compare, completed, measured, model_of
from bench.static.compile_time import compile_once, measure_compile
from bench.static.convolution import conv_rows, pair, print_rows, shape_of
from bench.static.fake_driver import TARGETS
from bench.static.launches import BATCH, COMPILE_GOAL, INFERENCE, PRECISIONS, Row, report
from bench.static.model import DEVICES, LABEL
from fastlenet.errors import InputError, import_extra
from fastlenet.files import write_json
from fastlenet.terminal import BAD_INPUT, Parser, print_error

# --- printing --------------------------------------------------------------------------------------------------------


def _print_rows(console: Any, rows: Sequence[Row]) -> None:
    table_module = import_extra("rich.table")
    for arch, precision in dict.fromkeys((row["arch"], row["precision"]) for row in rows):
        device = DEVICES.get(arch)
        title = f"{arch} {precision}" + (f", {device.name}" if device else ": resources only") + f"; {LABEL}"
        table = table_module.Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in ("kernel and shape", "used by"):
            table.add_column(heading, overflow="fold")
        units = ("issue", "alu", "fma", "xu", "lsu", "tensor", "memory")
        headings = ("regs", "spill", "shared", "warps", "fit", "instr/img", *units, "ns/img", "bound")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            if (row["arch"], row["precision"]) != (arch, precision):
                continue
            uses = [
                f"{'inference' if use == INFERENCE else 'step'}{f' x{n}' if n > 1 else ''}"
                for use, n in row["launches"].items()
            ]
            resources = [row["registers"], row["spill_bytes"], row["shared_bytes"], row["num_warps"]]
            cells = [f"{row['kernel']}  {row['shape']}", ", ".join(uses), *map(str, resources)]
            if row["instructions"] is not None:
                cells += [str(row["occupancy"]), f"{row['instructions']:.1f}"]
                cells += [f"{row['ns_per_image'][unit]:.3f}" for unit in units]
                cells += [f"{row['modelled_ns_per_image']:.3f}", row["bound"]]
            table.add_row(*cells)
        console.print(table)
        console.print()


def _print_totals(console: Any, document: dict[str, Any]) -> None:
    table = import_extra("rich.table").Table(
        title=f"LeNet at batch {BATCH}, ns per image; {LABEL}", title_justify="left", title_style="bold", box=None
    )
    for heading in ("arch", "precision", "use", "launches", "instr/img", "issue", "modelled", "goal", ""):
        table.add_column(heading, justify="left" if heading in ("arch", "precision", "use", "") else "right")
    for total in document["totals"]:
        goal = total["goal_ns_per_image"]
        verdict = "" if goal is None else "met" if total["modelled_ns_per_image"] <= goal else "missed"
        figures = [f"{total[name]:.2f}" for name in ("instructions", "issue_ns_per_image", "modelled_ns_per_image")]
        use = "inference" if total["use"] == INFERENCE else "forward + backward"
        head = [total["arch"], total["precision"], use, str(total["launches"])]
        table.add_row(*head, *figures, "" if goal is None else f"{goal:g}", verdict)
    console.print(table)
    console.print(
        "What stock PyTorch computes (fc3 where LeNet takes stock's addmm, loss, optimizer) is not in the sums.\n"
    )


def _print_rest(console: Any, document: dict[str, Any]) -> None:
    for row in document["rows"]:
        for path in row["rare_paths"] or ():
            console.print(
                f"branch on data at {path['address']} of {row['kernel']} ({row['arch']} {row['precision']}): "
                f"{path['instructions']} instructions of its longer side not counted"
            )
    if document["compile"]:
        console.print("Compile time of one training step's kernels, measured on this machine's CPU in a fresh process:")
    for line in document["compile"]:
        verdict = "met" if line["cold_seconds"] <= COMPILE_GOAL else "missed"
        console.print(
            f"  {line['arch']} {line['precision']}: {line['cold_compiled']} kernels in {line['cold_seconds']:.1f} s "
            f"({line['cold_cpu_seconds']:.1f} s of CPU) from an empty cache (goal {COMPILE_GOAL:g} s: {verdict}); "
            f"a second process compiled {line['warm_compiled']} in {line['warm_seconds']:.1f} s"
        )


def _print_measured(console: Any) -> None:
    results = measured()
    if not results:
        console.print(
            "Model against measurement: no GPU results in bench/results, so there is nothing to compare with."
        )
    for device, rows in results.items():
        arch = next((name for name, d in DEVICES.items() if d.name.split()[0].lower() in device), None)
        if arch is None:
            console.print(f"Model against measurement on {device}: no model of it.")
            continue
        console.print(f"Model ({LABEL.partition(',')[0]}) against measurement on {device}, ns per image:")
        for row in rows:
            model = model_of(row, arch)
            if model is not None:
                took = row["ns_per_image"]
                work = f"{row['name']} {row['direction']} {row['batch']} {row['precision']} {row['level']}"
                console.print(f"  {work}: model {model:.3g}, measured {took:.3g}: {took / model:.2f} times the model")


# --- the command -----------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m bench.static", description=f"What the GPU kernels cost: {LABEL}.", allow_abbrev=False
    )
    arch = "the only architecture to compile for (may be repeated; default: all)"
    precision = "the only precision to compile (may be repeated; default: all)"
    only = "report only kernels whose name or shape contains TEXT (default: all)"
    parser.add_argument("--arch", action="append", choices=TARGETS, help=arch)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help=precision)
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to this file as JSON too")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write the report to {committed_path().relative_to(ROOT)} too; other architectures there stay",
    )
    parser.add_argument("--check", action="store_true", help="compare with that file; exit code 1 if worse")
    parser.add_argument("--compile-times", action="store_true", help="also measure compile times on this CPU")
    parser.add_argument("--compile-once", nargs=2, metavar=("ARCH", "PRECISION"), help=argparse.SUPPRESS)
    conv = parser.add_argument_group(
        "a convolution of your own instead of fastlenet's list; sizes are N or HxW, in pixels"
    )
    kernel, pool = "size of the convolution's kernel", "size of the pool's window (default: 2)"
    batch = f"images in a call (default: {BATCH})"
    shape = "input channels, height and width, and output channels, such as 3x32x32-6"
    conv.add_argument("--conv", metavar="CxHxW-O", help=shape)
    conv.add_argument("--kernel", type=pair, metavar="SIZE", help=kernel)
    conv.add_argument("--stride", type=pair, default=(1, 1), metavar="SIZE", help="step of the kernel (default: 1)")
    conv.add_argument("--padding", type=pair, default=(0, 0), metavar="SIZE", help="zeros on each side (default: 0)")
    conv.add_argument("--pool", type=pair, default=(2, 2), metavar="SIZE", help=pool)
    conv.add_argument("--pool-stride", type=pair, metavar="SIZE", help="step of the window (default: its size)")
    conv.add_argument("--pool-padding", type=pair, default=(0, 0), metavar="SIZE", help="pool's padding (default: 0)")
    conv.add_argument("--ceil-mode", action="store_true", help="also pool windows that reach beyond the end")
    conv.add_argument("--input-grad", action="store_true", help="also model the gradient of the input")
    conv.add_argument("--channels-last", action="store_true", help="take channels_last tensors")
    conv.add_argument("--batch", type=int, default=BATCH, metavar="N", help=batch)
    conv.add_argument("--json", action="store_true", help="print the rows of --conv as JSON instead of a table")
    options = parser.parse_args(arguments)
    options.arch = options.arch or list(TARGETS)
    options.precision = options.precision or list(PRECISIONS)
    if options.save and (options.only or len(options.precision) < len(PRECISIONS)):
        parser.error("--save writes whole architectures: leave out --precision and --only")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    if options.compile_once:
        print(json.dumps(compile_once(*options.compile_once)))
        return 0
    try:
        if options.conv:
            works = [(arch, precision) for arch in options.arch for precision in options.precision]
            shape = shape_of(options)
            rows = [row for work in works for row in conv_rows(shape, *work, options.input_grad)]
            print(json.dumps(rows, indent=1)) if options.json else print_rows(rows)
            return 0
        document = report(options.arch, options.precision, options.only)
        if options.compile_times:
            works = [(arch, precision) for arch in options.arch for precision in options.precision]
            document["compile"] = [measure_compile(*work) for work in works]
        path = committed_path()
        committed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if options.output:
            write_json(options.output, document)
        if options.save:
            write_json(path, completed(document, committed))
        console = import_extra("rich.console").Console(highlight=False, markup=False, soft_wrap=False)
        if not console.is_terminal:
            console = import_extra("rich.console").Console(highlight=False, markup=False, width=200)
        _print_rows(console, document["rows"])
        _print_totals(console, document)
        _print_rest(console, document)
        _print_measured(console)
        if not options.check:
            return 0
        if committed is None:
            raise InputError(f"no committed figures for triton {triton.__version__}: {path.name} is not there")
    except InputError as error:
        return print_error("bench.static", error, BAD_INPUT)
    if options.only:
        committed["rows"] = [r for r in committed["rows"] if options.only in f"{r['kernel']} {r['shape']}"]
        document["totals"] = []
    problems = compare(document, committed)
    print("\n".join(["worse than the committed figures:", *problems] if problems else ["as the committed figures"]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
