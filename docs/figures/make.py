"""Draw the figures of the guide: ``python docs/figures/make.py [FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, PALE, BLUE, ORANGE, GREEN = "#333333", "#f4f4f4", "#9ecae1", "#fdae6b", "#a1d99b"
# The same bytes from every run, with text that stays text.
plt.rcParams.update({"svg.hashsalt": "fastlenet", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"})


def grid(
    axes: Axes, left: float, bottom: float, rows: int, columns: int, size: float = 1.0, colours: dict | None = None
) -> None:
    """Draw cells; `colours` gives some (row from the top, column) a colour of their own."""
    for row in range(rows):
        for column in range(columns):
            corner = left + column * size, bottom + (rows - 1 - row) * size
            colour = (colours or {}).get((row, column), PALE)
            axes.add_patch(Rectangle(corner, size, size, facecolor=colour, edgecolor=INK, linewidth=0.6))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """Draw an arrow with words above its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.25, text, ha="center", va="bottom", color=INK)


def words(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Write centred text."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, **options})


def canvas(width: float, height: float) -> Axes:
    """Return axes in which a unit is the same in both directions."""
    _, axes = plt.subplots(figsize=(width * 0.42, height * 0.42))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")
    return axes


def save(folder: Path, name: str) -> None:
    """Write the current figure, without a date."""
    plt.savefig(folder / f"{name}.svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    plt.close()


def conv2d_relu_max_pool2d(folder: Path) -> None:
    """One pooled cell: from its patch of the input to its value and its code."""
    axes = canvas(24, 9.6)
    patch = {(row, column): BLUE for row in range(1, 7) for column in range(1, 7)}
    grid(axes, 0, 1.4, 8, 8, 0.8, patch)
    words(axes, 3.2, 8.2, "input, in memory")
    words(axes, 3.2, 0.7, "a 6 x 6 patch holds the four\n5 x 5 fields of one 2 x 2 window")
    arrow(axes, (6.6, 4.6), (9.6, 4.6), "convolve")
    values = ((-0.3, 1.2), (0.7, 1.2))
    grid(axes, 9.9, 3.3, 2, 2, 1.3, {(0, 1): ORANGE})
    for row in (0, 1):
        for column in (0, 1):
            words(axes, 10.55 + 1.3 * column, 5.25 - 1.3 * row, f"{values[row][column]}")
            words(axes, 9.9 + 1.3 * column + 0.2, 5.8 - 1.3 * row - 0.15, str(2 * row + column), fontsize=7)
    words(axes, 11.2, 8.2, "one window of the convolution,\nin registers only (Triton)")
    words(axes, 11.2, 2.3, "cells numbered in scan order;\nof equal ones the first wins")
    arrow(axes, (12.8, 4.6), (16.6, 4.6), "max, then relu")
    grid(axes, 17, 4.8, 4, 4, 0.8, {(1, 1): ORANGE})
    words(axes, 18.2, 6.8, "1.2", fontsize=8)
    words(axes, 18.6, 8.5, "output, in memory")
    grid(axes, 17, 0.9, 4, 4, 0.8, {(1, 1): GREEN})
    words(axes, 18.2, 2.9, "1", fontsize=8)
    words(axes, 20.4, 6.4, "1.2 = relu(max)", ha="left")
    words(axes, 20.4, 2.5, "code: cell 1 won;\n255 if relu closed it", ha="left")
    words(axes, 18.6, 0.4, "codes, one byte each, for the backward", fontsize=9)
    save(folder, "conv2d_relu_max_pool2d")


def matrix(axes: Axes, corner: tuple[float, float], size: tuple[float, float], name: str, colour: str = PALE) -> None:
    """Draw a matrix with its name in it."""
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor=INK, linewidth=0.9))
    words(axes, corner[0] + size[0] / 2, corner[1] + size[1] / 2, name)


def row_of(axes: Axes, y: float, parts: Sequence[tuple[str, float, float, str] | str]) -> None:
    """Draw matrices and signs from left to right, centred on a line."""
    x = 0.2
    for part in parts:
        if isinstance(part, str):
            width = 0.6 + 0.26 * len(part)
            words(axes, x + width / 2, y, part, fontsize=11)
            x += width
        else:
            name, wide, high, colour = part
            matrix(axes, (x, y - high / 2), (wide, high), name, colour)
            x += wide


def addmm_relu(folder: Path) -> None:
    """Forward in one kernel; in the backward the mask is applied while the gradient is read."""
    axes = canvas(22, 9.2)
    words(axes, 0.2, 8.7, "forward: bias, sum and relu happen in registers, on the way to memory", ha="left")
    row_of(axes, 6.4, [
        ("y\nM x N", 2.6, 2.6, ORANGE), "= relu(", ("input,\nbroadcast", 2.6, 1.3, PALE), "+",
        ("mat1\nM x K", 3.4, 2.6, BLUE), "x", ("mat2\nK x N", 2.6, 3.4, BLUE), ")",
    ])  # fmt: skip
    words(
        axes, 0.2, 4.0, "backward: the gradient is masked with y > 0 as it is read; no masked copy is made", ha="left"
    )
    row_of(axes, 1.9, [
        ("grad mat1\nM x K", 3.4, 2.6, ORANGE), "= (", ("grad y\nM x N", 2.6, 2.6, BLUE), "where",
        ("y > 0", 2.6, 2.6, GREEN), ") x", ("mat2.T\nN x K", 3.4, 2.6, BLUE),
    ])  # fmt: skip
    save(folder, "addmm_relu")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    for draw in (conv2d_relu_max_pool2d, addmm_relu):
        draw(target)
