"""The demo: LeNet with the fused layers against LeNet in plain PyTorch, on real handwritten digits.

``python -m fastlenet.training.demo --output out`` trains both networks from the same initial weights on the same
batches, side by side, compares them in a table and a picture, and then trains for a few steps under the Triton kernels
themselves (interpreted where there is no GPU). It ends with exit code 0 only if the networks learn and their losses
agree.

What "agree" means. Training amplifies differences: where two pixels of a pooling window or a unit's input and zero are
within a rounding error of each other, the last bit decides which way a gradient goes, and from there two correct
programs drift apart. So the losses are not held against a tolerance, but against what PyTorch itself does: the stock
network is trained several times, from starting weights that differ in their last bit, and each run's error is its
largest distance from a float64 run. The fused network's error may be at most twice the worst of these, plus one
rounding step of the loss. Only the first steps are judged; over a whole training the differences are reported as they
are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlenet import environment
from fastlenet.errors import import_extra
from fastlenet.files import atomic_write, write_json
from fastlenet.lenet import LeNet, StockLeNet
from fastlenet.selection import use_backend
from fastlenet.terminal import FAILED, OK, Parser, exit_code
from fastlenet.timing import synchronize
from fastlenet.training import loop
from fastlenet.training.data import load_sample
from fastlenet.training.loop import Batches, Learner, TrainConfig
from fastlenet.training.picture import COLOURS, finish_curves, overview

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from rich.console import Console

# Reaches 97.8 to 98.2% of the held-out digits over several seeds: far enough above what is required that another
# machine's rounding does not decide. Batches of 100 are where fusing begins to save memory and time on a CPU, too.
RECIPE = TrainConfig(epochs=50, batch_size=100, optimizer="nesterov", lr=0.04, lr_decay=0.94, max_shift=2)
REQUIRED_ACCURACY = 0.97

JUDGED_STEPS = 20
STOCK_RUNS = 16

# The kernels' own run: the interpreter takes two or three seconds for such a step.
KERNEL_STEPS = 8
KERNEL_BATCH = 16

FUSED, STOCK = 0, 1
NAMES = ("fused (fastlenet.LeNet)", "stock (plain torch.nn)")


@dataclass(frozen=True)
class Agreement:
    """How far the fused and the stock network's losses are from a float64 run's, over the first steps.

    Attributes:
        steps: how many steps were judged.
        fused_error: the fused network's largest distance.
        stock_error: the largest distance of any of the stock runs.
        rounding: one rounding step of the largest loss, in the networks' dtype.
        ok: whether the fused network's is at most twice stock's plus the rounding; false for NaN.
    """

    steps: int
    fused_error: float
    stock_error: float
    rounding: float
    ok: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ok", self.fused_error <= 2 * self.stock_error + self.rounding)

    def __str__(self) -> str:
        return (
            f"loss of the first {self.steps} steps against a float64 run: fused off by {self.fused_error:.1e}, "
            f"allowed {2 * self.stock_error + self.rounding:.1e} (twice the {self.stock_error:.1e} of {STOCK_RUNS} "
            f"stock runs whose starting weights differ in the last bit, plus one rounding step)"
        )


def initial_weights(seed: int) -> dict[str, torch.Tensor]:
    """Draw the weights that every network of a comparison starts from, as a `state_dict` on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StockLeNet().state_dict()


def learner_from(model: nn.Module, weights: dict[str, torch.Tensor], config: TrainConfig) -> Learner:
    """Make a learner whose model starts from `weights`."""
    model.load_state_dict(weights)
    return Learner(model, config, config.torch_device())


def train_in_turns(learners: Sequence[Learner], batches: Batches, epoch: int) -> Iterator[tuple[int, float, float]]:
    """Train learners side by side for one epoch: each takes a step on a batch before any sees the next batch.

    Which learner goes first changes from step to step: what a neighbour leaves in the caches, and what else the machine
    does at the moment, then falls on all alike.

    Yields:
        For each step the learner's index, its loss before the step, and the step's seconds, the device's work included.
    """
    device, order = batches.images.device, list(range(len(learners)))
    for learner in learners:
        learner.start_epoch(epoch)
    for images, labels, _ in batches.epoch(epoch):
        for index in order:
            synchronize(device)
            start = time.perf_counter()
            loss = learners[index].step(images, labels)
            synchronize(device)
            yield index, loss.item(), time.perf_counter() - start
        order.reverse()


def train_both(
    learners: Sequence[Learner], batches: Batches, steps: int, console: Console
) -> tuple[list[list[float]], list[list[float]]]:
    """Train the fused and the stock learner in turns for so many steps, under progress bars.

    Returns:
        Each learner's loss, and its seconds, at every step.
    """
    losses: list[list[float]] = [[], []]
    seconds: list[list[float]] = [[], []]
    turns = itertools.chain.from_iterable(train_in_turns(learners, batches, epoch) for epoch in itertools.count())
    with loop.progress_bars(console) as progress:
        tasks = [progress.add_task(name, total=steps, loss="...") for name in NAMES]
        for index, loss, duration in itertools.islice(turns, 2 * steps):
            losses[index].append(loss)
            seconds[index].append(duration)
            progress.update(tasks[index], advance=1, loss=f"{loss:.4f}")
    return losses, seconds


def judge(
    fused_losses: Sequence[float], batches: Batches, weights: dict[str, torch.Tensor], config: TrainConfig
) -> Agreement:
    """Judge the losses of a network over the first steps of epoch 0, from these weights on these batches.

    The module's docstring says how.
    """
    generator = loop.derived_generator(config.seed, "last bits")
    exact = learner_from(StockLeNet(), weights, dataclasses.replace(config, dtype="float64"))
    learners = [exact, learner_from(StockLeNet(), weights, config)]
    for _ in range(STOCK_RUNS - 1):
        nudged = {
            name: torch.nextafter(value, value + torch.randn(value.shape, generator=generator))
            for name, value in weights.items()
        }
        learners.append(learner_from(StockLeNet(), nudged, config))
    losses: list[list[float]] = [[] for _ in learners]
    for index, loss, _ in itertools.islice(train_in_turns(learners, batches, 0), len(learners) * len(fused_losses)):
        losses[index].append(loss)
    return Agreement(
        steps=len(fused_losses),
        fused_error=largest_difference(fused_losses, losses[0]),
        stock_error=max(largest_difference(run, losses[0]) for run in losses[1:]),
        rounding=torch.finfo(config.torch_dtype).eps * max(losses[0]),
    )


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Find the largest distance between numbers at the same place; NaN if any number is."""
    return (torch.tensor(left, dtype=torch.float64) - torch.tensor(right, dtype=torch.float64)).abs().max().item()


def saved_bytes_per_image(learner: Learner, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Measure what autograd keeps for the backward pass of a batch, in bytes an image.

    Each storage counts once and whole, however many views of it are kept. Parameters do not count.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in learner.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The name keeps the graph alive, so that no address is given out twice while it is built.
        _loss = learner.loss(images, labels)
    return sum(kept.values()) / len(images)


def verdict(ok: bool, text: str, console: Console) -> bool:
    """Print one line of judgement, and return it."""
    console.print(f"[bold green]ok[/]  {text}" if ok else f"[bold red]FAILED[/]  {text}")
    return ok


def run_training(output: Path, config: TrainConfig, console: Console) -> bool:
    """Run the demo's first part; writes ``demo.json`` and ``demo.png`` into `output`.

    Returns:
        Whether all is well.
    """
    implementation, device, dataset = loop.check_backend(config), config.torch_device(), load_sample()
    console.print(
        f"{dataset.name}: {len(dataset.train_labels):,} to train on, {len(dataset.test_labels):,} held out. "
        f"Training two networks from the same weights on the same batches; the fused one runs on {implementation}."
    )
    batches, weights = loop.make_batches(dataset, config, device), initial_weights(config.seed)
    learners = [learner_from(model, weights, config) for model in (LeNet(), StockLeNet())]
    images, labels, _ = next(batches.epoch(0))
    saved = [saved_bytes_per_image(learner, images, labels) for learner in learners]
    steps = config.epochs * len(batches)
    losses, seconds = train_both(learners, batches, steps, console)
    test = dataset.test_images.to(device), dataset.test_labels.to(device)
    fused, stock = evaluations = [loop.evaluate(learner.model, *test) for learner in learners]
    fused_weights, stock_weights = (learner.model.state_dict() for learner in learners)
    drift = max((fused_weights[name] - stock_weights[name]).abs().max().item() for name in stock_weights)
    agreement = judge(losses[FUSED][:JUDGED_STEPS], batches, weights, config)
    times = [statistics.median(own) for own in seconds]

    threads = torch.get_num_threads()
    where = "GPU" if device.type == "cuda" else f"CPU, {threads} thread{'s' * (threads != 1)}"
    title = f"{steps:,} steps of {config.batch_size} images, {environment.device_name()} ({where})"
    table = import_extra("rich.table").Table(title=title, title_style="bold")
    for name in ("", "fused", "stock", "fused vs stock"):
        table.add_column(name, justify="right" if name else "left")
    points = f"{100 * (fused.accuracy - stock.accuracy):+.2f} points"
    table.add_row("held-out accuracy", f"{fused.accuracy:.2%}", f"{stock.accuracy:.2%}", points)
    first = largest_difference(*(own[:JUDGED_STEPS] for own in losses))
    table.add_row(f"largest loss difference, steps 1-{agreement.steps}", "", "", f"{first:.1e}")
    table.add_row("largest loss difference, all steps", "", "", f"{largest_difference(*losses):.1e}")
    table.add_row("largest weight difference at the end", "", "", f"{drift:.1e}")
    ratio = f"{times[STOCK] / times[FUSED]:.2f} x as fast"
    table.add_row("median time per step", *(f"{own * 1e3:.3f} ms" for own in times), ratio)
    ratio = f"{saved[STOCK] / saved[FUSED]:.2f} x fewer"
    table.add_row("saved activations per image", *(f"{own:,.0f} B" for own in saved), ratio)
    console.print(table)
    ok = verdict(agreement.ok, str(agreement), console)
    for name, found in zip(NAMES, evaluations, strict=True):
        text = f"{name}: {found.accuracy:.2%} of the held-out digits right, {REQUIRED_ACCURACY:.0%} required"
        ok = verdict(found.accuracy >= REQUIRED_ACCURACY, text, console) and ok
    record = {
        "config": dataclasses.asdict(config),
        "accuracy": [found.accuracy for found in evaluations],
        "loss_difference": largest_difference(*losses),
        "weight_difference": drift,
        "median_step_seconds": times,
        "saved_bytes_per_image": saved,
        "agreement": dataclasses.asdict(agreement),
        "steps": steps,
        "environment": environment.collect(),
    }
    write_json(output / "demo.json", record)
    picture = overview(
        f"LeNet on 5,000 MNIST digits: fused {fused.accuracy:.1%}, stock {stock.accuracy:.1%} of the held-out digits "
        "right",
        lambda area: draw_losses(area, losses, len(batches)),
        fused.predictions,
        dataset,
        ("Confusion matrix (fused)", "Held-out digits with the fused network's predictions"),
        "png",
    )
    atomic_write(output / "demo.png", picture)
    console.print(f"Picture: {output / 'demo.png'}   numbers: {output / 'demo.json'}", markup=False)
    return ok


def run_kernels(output: Path, config: TrainConfig, console: Console) -> bool:
    """Run the demo's second part: a short training under the Triton kernels; writes ``kernels.json`` into `output`.

    Returns:
        Whether the losses agree with stock PyTorch's.

    Raises:
        ConfigError: if the kernels cannot run in this process.
    """
    config = dataclasses.replace(config, epochs=1, batch_size=KERNEL_BATCH)
    device = config.torch_device()
    with use_backend("triton"):
        loop.check_backend(config)
        how = "compiled, on the GPU" if device.type == "cuda" else "in Triton's interpreter: right, but slow"
        console.print(
            f"The same training under the Triton kernels ({how}), {KERNEL_STEPS} steps of {KERNEL_BATCH} images."
        )
        batches, weights = loop.make_batches(load_sample(), config, device), initial_weights(config.seed)
        learners = [learner_from(model, weights, config) for model in (LeNet(), StockLeNet())]
        losses, _ = train_both(learners, batches, KERNEL_STEPS, console)
    table = import_extra("rich.table").Table()
    for name in ("step", "loss, Triton kernels", "loss, stock", "difference"):
        table.add_column(name, justify="right")
    for number, (fused, stock) in enumerate(zip(*losses, strict=True), start=1):
        table.add_row(str(number), f"{fused:.8f}", f"{stock:.8f}", f"{abs(fused - stock):.1e}")
    console.print(table)
    agreement = judge(losses[FUSED], batches, weights, config)
    record = {
        "config": dataclasses.asdict(config),
        "interpreted": device.type != "cuda",
        "losses": losses,
        "loss_difference": largest_difference(*losses),
        "agreement": dataclasses.asdict(agreement),
        "environment": environment.collect(),
    }
    write_json(output / "kernels.json", record)
    return verdict(agreement.ok, f"Triton kernels: {agreement}", console)


def run_kernels_apart(arguments: Sequence[str], config: TrainConfig, console: Console) -> bool:
    """Run `run_kernels` in a process of its own.

    Interpreted and compiled Triton do not mix in one process: which it is gets fixed when triton is imported.
    """
    if importlib.util.find_spec("triton") is None:
        console.print("The Triton kernels were not run: triton is not installed here.")
        return True
    interpret = {"TRITON_INTERPRET": "1"} if config.torch_device().type == "cpu" else {}
    sys.stdout.flush()  # In a log, the other process's lines would else come before these.
    command = [sys.executable, "-m", "fastlenet.training.demo", *arguments, "--part", "kernels"]
    return subprocess.run(command, env=os.environ | interpret, check=False).returncode == OK


def draw_losses(area: SubFigure, losses: Sequence[Sequence[float]], steps_per_epoch: int) -> None:
    """Draw the smoothed losses of both networks over each other, and how far they are apart."""
    upper, lower = area.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    steps = range(1, len(losses[FUSED]) + 1)
    epochs = [step / steps_per_epoch for step in steps]
    window = max(1, steps_per_epoch // 2)
    # A broad pale line under a fine dark one: where the curves coincide, both can be seen.
    for index, width in ((STOCK, 5.0), (FUSED, 1.2)):
        smooth = [statistics.fmean(losses[index][max(0, step - window) : step]) for step in steps]
        upper.plot(epochs, smooth, color=COLOURS[index], linewidth=width, label=NAMES[index], solid_capstyle="round")
    upper.set(title=f"Training loss of both networks (mean of {window} steps)", ylabel="training loss")
    differences = [abs(fused - stock) for fused, stock in zip(*losses, strict=True)]
    same = f"exactly zero at {differences.count(0):,} of {len(differences):,} steps"
    lower.set_title(f"Difference of their losses: {same}", fontsize=10)
    lower.plot(epochs, differences, ".", color=COLOURS[FUSED], markersize=2)
    if any(differences):
        lower.set_yscale("log", nonpositive="mask")  # Zero has no place there: the title counts such steps.
    else:
        lower.set_yticks([0])
    lower.set(ylabel="|fused - stock|", xlim=(0, epochs[-1]))
    finish_curves(upper, lower)


def run(argv: Sequence[str] | None) -> int:
    """Run the parts that the arguments ask for, and return `OK` or `FAILED`."""
    parser = Parser(
        prog="python -m fastlenet.training.demo",
        description="Train LeNet on real digits with fused layers and with plain PyTorch, and compare.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="out", metavar="FOLDER", help="folder for the results (default: out)")
    loop.add_options(parser, RECIPE, "epochs", "seed", "device")
    parser.add_argument(
        "--part",
        choices=("all", "training", "kernels"),
        default="all",
        help="what to run: 'training' (train both networks and compare them), 'kernels' (a few steps with the Triton "
        "kernels in this process; without a GPU set TRITON_INTERPRET=1), or 'all' (both) (default: all)",
    )
    given = vars(parser.parse_args(argv))
    output, part = Path(given.pop("output")), given.pop("part")
    config = dataclasses.replace(RECIPE, **given)
    console = import_extra("rich.console").Console(highlight=False)
    if config.torch_device().type == "cpu":
        # Steps of a few milliseconds gain little from more threads, and on a busy machine several threads mostly wait
        # for each other. One thread also makes the run the same whatever the number of cores.
        torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        # Losses are judged to the last digits, and by default convolutions on a GPU may round to tf32.
        switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
        switch.fp32_precision = "ieee"
        ok = (run_kernels if part == "kernels" else run_training)(output, config, console)
    if part == "all":
        arguments = ["--output", str(output), "--seed", str(config.seed), "--device", config.device]
        ok = run_kernels_apart(arguments, config, console) and ok
    return OK if ok else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments, without the program's name; None takes the process's own.

    Returns:
        0 if all is well; 1 if a network did not learn or the losses disagree; 2 for bad input; 130 if interrupted.
    """
    return exit_code("fastlenet demo", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
