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
DARK_ORANGE = "#d94801"
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


def outline(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    """Draw a thick dashed frame."""
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2.4, linestyle=(0, (4, 2))))


def conv2d_relu_max_pool2d(folder: Path) -> None:
    """One pooled cell: from its patch of the input to its value and its argmax."""
    axes = canvas(27.5, 10.4)
    cell = 0.8
    patch = {(row, column): BLUE for row in range(1, 7) for column in range(1, 7)}
    grid(axes, 1, 2.0, 8, 8, cell, patch)
    # The field of the window's second cell: rows 1 to 5 and columns 2 to 6 of the input.
    outline(axes, (1 + 2 * cell, 2.0 + 2 * cell), (5 * cell, 5 * cell), DARK_ORANGE)
    words(axes, 4.2, 9.6, "input, in memory")
    words(axes, 4.2, 0.9, "a 6 x 6 patch holds the four 5 x 5\nfields of one window; dashed: cell 1's")
    arrow(axes, (7.7, 5.2), (10.7, 5.2), "convolve")
    values = ((-0.3, 1.2), (0.7, 1.2))
    grid(axes, 11, 3.9, 2, 2, 1.3, {(0, 1): ORANGE})
    for row in (0, 1):
        for column in (0, 1):
            words(axes, 11.75 + 1.3 * column, 5.75 - 1.3 * row, f"{values[row][column]}")
            words(axes, 11.2 + 1.3 * column, 6.25 - 1.3 * row, str(2 * row + column), fontsize=7)
    words(axes, 12.3, 9.6, "one window of the convolution,\nin registers only (Triton)")
    words(axes, 12.3, 2.9, "cells numbered in scan order;\nof equal ones the first wins")
    arrow(axes, (13.9, 5.2), (17.7, 5.2), "max, then relu")
    grid(axes, 18, 5.6, 4, 4, cell, {(1, 1): ORANGE})
    words(axes, 19.2, 7.6, "1.2", fontsize=8)
    words(axes, 19.6, 9.6, "output, in memory")
    grid(axes, 18, 1.6, 4, 4, cell, {(1, 1): GREEN})
    words(axes, 19.2, 3.6, "1", fontsize=8)
    words(axes, 21.5, 7.2, "1.2 = relu(max)", ha="left")
    words(axes, 21.5, 3.2, "argmax: cell 1 won;\n255 if relu closed it", ha="left")
    words(axes, 19.6, 0.7, "argmax, one byte each,\nkept for the backward")
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
    axes = canvas(22, 13.4)
    words(
        axes, 0.2, 12.9, "forward: sum and relu happen in registers, on the way to memory (beta = alpha = 1)", ha="left"
    )
    row_of(axes, 10.6, [
        ("y\nM x N", 2.6, 2.6, ORANGE), "= relu(", ("input,\nbroadcast", 2.6, 1.3, PALE), "+",
        ("mat1\nM x K", 3.4, 2.6, BLUE), "x", ("mat2\nK x N", 2.6, 3.4, BLUE), ")",
    ])  # fmt: skip
    words(axes, 0.2, 8.2, "backward: the gradient is masked with y > 0 as it is read", ha="left")
    masked = ("grad y\nM x N", 2.6, 2.6, BLUE), "where", ("y > 0", 2.6, 2.6, GREEN)
    row_of(
        axes, 6.1, [("grad mat1\nM x K", 3.4, 2.6, ORANGE), "= (", *masked, ") x", ("mat2.T\nN x K", 3.4, 2.6, BLUE)]
    )
    row_of(
        axes, 2.3, [("grad mat2\nK x N", 2.6, 3.4, ORANGE), "=", ("mat1.T\nK x M", 2.6, 3.4, BLUE), "x (", *masked, ")"]
    )
    save(folder, "addmm_relu")


def mlp(folder: Path) -> None:
    """A tile of images on its way through three layers."""
    axes = canvas(27, 9.2)
    axes.add_patch(
        Rectangle((4.6, 3.9), 17.8, 3.6, facecolor="white", edgecolor=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    )
    words(axes, 13.4, 8.3, "one program: a tile of rows goes through all layers, on the chip (Triton)")
    line = 5.7
    boxes = ((0.3, 3.4, "input\nN x 400", BLUE), (9.0, 2.4, "hidden 1\n120", PALE), (15.0, 2.4, "hidden 2\n84", PALE),
             (23.4, 2.8, "output\nN x 10", ORANGE))  # fmt: skip
    for left, width, name, colour in boxes:
        matrix(axes, (left, line - 1.3), (width, 2.6), name, colour)
    for start, end, layer in ((3.9, 8.8, "W1, b1, relu"), (11.6, 14.8, "W2, b2,\nrelu"), (17.6, 23.2, "W3, b3")):
        arrow(axes, (start, line), (end, line), layer)
    for left in (10.2, 16.2):
        arrow(axes, (left, 4.3), (left, 2.1))
    words(axes, 13.2, 1.2, "stored once if a backward is to come;\nin inference never")
    save(folder, "mlp")


def backward(folder: Path) -> None:
    """The gradient of pooled cells on its way back to the convolution's cells, and from there on."""
    axes = canvas(27.5, 9.6)
    cell = 1.1
    values, argmax = (("0.3", "-1"), ("2", "0.7")), (("1", "255"), ("0", "3"))
    winners = {(0, 1): ORANGE, (2, 0): ORANGE, (3, 3): ORANGE}
    for bottom, numbers, colour, name in (
        (5.2, values, ORANGE, "gradient of the output"),
        (1.4, argmax, GREEN, "argmax"),
    ):
        grid(axes, 1.6, bottom, 2, 2, cell, {(row, column): colour for row in (0, 1) for column in (0, 1)})
        for row in (0, 1):
            for column in (0, 1):
                words(axes, 1.6 + cell * (column + 0.5), bottom + cell * (1.5 - row), numbers[row][column], fontsize=9)
        words(axes, 1.6 + cell, bottom + 2 * cell + 0.5, name)
    arrow(axes, (4.4, 4.6), (8.4, 4.6), "each to its cell")
    grid(axes, 9, 2.4, 4, 4, cell, winners)
    for (row, column), value in {(0, 1): "0.3", (2, 0): "2", (3, 3): "0.7"}.items():
        words(axes, 9 + cell * (column + 0.5), 2.4 + cell * (3.5 - row), value, fontsize=9)
    for row in (0, 2):
        for column in (0, 2):
            outline(axes, (9 + column * cell, 2.4 + row * cell), (2 * cell, 2 * cell), INK)
    words(axes, 11.2, 8.4, "gradient of the convolution,\nworked out where it is needed,\nnever stored")
    words(axes, 11.2, 1.2, "dashed: windows; other cells are 0.\nThe window with 255 passes nothing.")
    arrow(axes, (13.9, 5.6), (17.6, 7.0), "")
    arrow(axes, (13.9, 4.6), (17.6, 4.6), "")
    arrow(axes, (13.9, 3.6), (17.6, 2.2), "")
    matrix(axes, (17.9, 6.3), (9, 1.6), "gradient of the input: convolve with\nthe weight, transposed", BLUE)
    matrix(axes, (17.9, 3.8), (9, 1.6), "gradient of the weight: products with\nthe input, summed over images", BLUE)
    matrix(axes, (17.9, 1.3), (9, 1.6), "gradient of the bias: the sum", BLUE)
    save(folder, "backward")


def lenet(folder: Path) -> None:
    """The network's tensors, and the layer between each two."""
    axes = canvas(30, 8.2)
    line = 4.0
    tensors = ((0.3, 3.2, "1 x 32 x 32", BLUE), (6.6, 2.4, "6 x 14 x 14", PALE), (12.2, 1.8, "16 x 5 x 5", PALE),
               (17.4, 0.7, "120", PALE), (21.8, 0.7, "84", PALE), (26.0, 0.7, "10", ORANGE))  # fmt: skip
    for left, width, name, colour in tensors:
        high = width if width > 1 else {"120": 4.4, "84": 3.4, "10": 1.6}[name]
        axes.add_patch(Rectangle((left, line - high / 2), width, high, facecolor=colour, edgecolor=INK, linewidth=0.9))
        words(axes, left + width / 2, line - high / 2 - 0.6, name)
    ends = [(left, left + width) for left, width, _, _ in tensors]
    layers = "conv1\n5 x 5, relu,\npool 2 x 2", "conv2\n5 x 5, relu,\npool 2 x 2", "fc1\nrelu", "fc2\nrelu", "fc3"
    for before, after, layer in zip(ends, ends[1:], layers, strict=False):
        arrow(axes, (before[1] + 0.15, line), (after[0] - 0.15, line), layer)
    save(folder, "lenet")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    for draw in (conv2d_relu_max_pool2d, backward, addmm_relu, mlp, lenet):
        draw(target)
