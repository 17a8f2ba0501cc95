"""Pictures of training runs: the trainer's own, and the parts that it shares with the demo's."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastlenet.errors import import_extra
from fastlenet.training.data import Dataset
from fastlenet.training.loop import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = ("#0b3c5d", "#f4a259")
WRONG = "#c1121f"
FORMATS = ("png", "svg", "pdf")


def draw_run(
    history: Sequence[Mapping[str, Any]], evaluation: Evaluation, dataset: Dataset, file_format: str = "png"
) -> bytes:
    """Draw a run: loss and accuracy after each epoch, the confusion matrix, some digits with predictions.

    Args:
        history: a record for each epoch, as `loop.TrainResult` has them.
        evaluation: of the held-out digits.
        dataset: the digits.
        file_format: one of `FORMATS`, in which the file's bytes are returned.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    return overview(
        f"LeNet on {dataset.name}: {evaluation.accuracy:.2%} of {len(dataset.test_labels):,} held-out digits right",
        lambda area: _draw_history(area, history),
        evaluation.predictions,
        dataset,
        ("Confusion matrix", "Held-out digits with the network's predictions"),
        file_format,
    )


def overview(
    title: str,
    draw_curves: Callable[[SubFigure], None],
    predictions: torch.Tensor,
    dataset: Dataset,
    titles: tuple[str, str],
    file_format: str,
) -> bytes:
    """Draw a file of curves, the confusion matrix and some held-out digits, the last two under `titles`."""
    # The object interface draws in memory and leaves the user's pyplot settings alone.
    figure = import_extra("matplotlib.figure").Figure(figsize=(14, 9), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.8, 1))
    left, right = top.subfigures(1, 2, width_ratios=(1.45, 1))
    draw_curves(left)
    _draw_confusion(right.subplots(), predictions, dataset.test_labels, titles[0])
    _draw_digits(bottom, predictions, dataset, titles[1])
    stream = io.BytesIO()
    figure.savefig(stream, format=file_format)
    return stream.getvalue()


def _draw_history(area: SubFigure, history: Sequence[Mapping[str, Any]]) -> None:
    upper, lower = area.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    epochs = [record["epoch"] for record in history]
    for name, label, colour in (("train_loss", "training", COLOURS[0]), ("test_loss", "held out", COLOURS[1])):
        upper.plot(epochs, [record[name] for record in history], "o-", color=colour, markersize=3, label=label)
    upper.set(title="Mean loss of each epoch", ylabel="loss")
    lower.plot(epochs, [100 * record["test_accuracy"] for record in history], "o-", color=COLOURS[1], markersize=3)
    lower.set_ylabel("held out, right (%)")
    finish_curves(upper, lower)


def finish_curves(upper: Axes, lower: Axes) -> None:
    """Give losses over other curves their scales, legend and pale grid."""
    upper.set_yscale("log")
    upper.legend(frameon=False)
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(import_extra("matplotlib.ticker").MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_confusion(axes: Axes, predictions: torch.Tensor, labels: torch.Tensor, title: str) -> None:
    """Draw how often each digit was taken for each, under a title that counts the mistakes."""
    counts = torch.bincount(labels * 10 + predictions, minlength=100).reshape(10, 10)
    # Ninety-odd right answers would drown single mistakes on one scale: right and wrong get a scale each.
    mistakes = counts.clone().fill_diagonal_(0)
    axes.imshow(mistakes.tolist(), cmap="Reds", vmin=0, vmax=max(5, int(mistakes.max())) * 1.6)
    for true, predicted in counts.nonzero().tolist():
        style = {"ha": "center", "va": "center"}
        if true == predicted:
            style |= {"color": "white", "fontweight": "bold", "backgroundcolor": COLOURS[0]}
        axes.text(predicted, true, str(int(counts[true, predicted])), style)
    axes.set(title=f"{title}: {int(mistakes.sum())} of {len(labels):,} wrong", xlabel="predicted", ylabel="true digit")
    axes.set(xticks=range(10), yticks=range(10))
    axes.tick_params(length=0)


def _draw_digits(area: SubFigure, predictions: torch.Tensor, dataset: Dataset, title: str) -> None:
    """Draw up to 30 held-out digits, half of them mistaken if there are so many, each with what it was taken for."""
    columns = 15
    wrong = (predictions != dataset.test_labels).nonzero().flatten().tolist()
    right = (predictions == dataset.test_labels).nonzero().flatten().tolist()
    right = right[: max(columns, 2 * columns - len(wrong))]
    shown = right + wrong[: 2 * columns - len(right)]
    area.suptitle(f"{title}; red: wrong, with the true digit", fontsize=12)
    places = list(area.subplots(2, columns).flat)
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    for axes, index in zip(places, shown, strict=False):
        pixels = dataset.test_images[index, 0] * dataset.std + dataset.mean
        axes.imshow(pixels.tolist(), cmap="gray_r", vmin=0, vmax=1)
        predicted, true = int(predictions[index]), int(dataset.test_labels[index])
        if predicted == true:
            axes.set_title(str(predicted), fontsize=11)
            axes.spines[:].set(color="#bbbbbb", linewidth=0.8)
        else:
            axes.set_title(f"{predicted} (is {true})", fontsize=11, color=WRONG, fontweight="bold")
            axes.spines[:].set(color=WRONG, linewidth=2.5)
        axes.set(xticks=[], yticks=[])
