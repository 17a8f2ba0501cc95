"""The command line: `fastlenet train|predict|bench|report|env`, also as `python -m fastlenet`."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlenet._version import __version__
from fastlenet.errors import ROOT, import_extra
from fastlenet.terminal import BAD_INPUT, DEVICE_HELP, FAILED, INTERRUPTED, OK, Parser, exit_code, print_error

if TYPE_CHECKING:
    from torch import Tensor


def run_train(arguments: Sequence[str]) -> int:
    """`fastlenet train`: train LeNet on handwritten digits."""
    from fastlenet.training import distributed, loop, products

    parser = Parser(
        prog="fastlenet train",
        description="Train fastlenet.LeNet on handwritten digits. Each epoch writes OUTPUT/metrics.json and a "
        "checkpoint. To train one network in N processes: torchrun --nproc-per-node=N -m fastlenet train ...",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    loop.add_options(parser, loop.TrainConfig(), *loop.TrainConfig.__dataclass_fields__)
    parser.add_argument("--output", metavar="FOLDER", default="out", help="folder for the results (default: out)")
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the checkpoint, bit for bit; the checkpoint has all options, and only --epochs, --data "
        "(the same images elsewhere) and --device may differ from it",
    )
    for name, text in (
        ("checkpoint", "checkpoint file (default: OUTPUT/checkpoint.safetensors)"),
        ("plot", "draw loss, accuracy and mistakes into this PNG, SVG or PDF file (default: no drawing)"),
        ("onnx", "write the trained network as ONNX, checked by ONNX Runtime, to this file (default: none)"),
        ("export", "write the trained network for torch.export.load without fastlenet to this file (default: none)"),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", help=text)
    given = vars(parser.parse_args(arguments))
    targets = {product: Path(given.pop(product)) for product in products.KINDS if product in given}
    output, resume = Path(given.pop("output")), given.pop("resume")
    checkpoint_file = Path(given.pop("checkpoint", output / "checkpoint.safetensors"))
    for product, path in targets.items():
        products.check_target(product, path)
    config = loop.resume_config(checkpoint_file, **given) if resume else loop.TrainConfig(**given)
    with distributed.join(config.torch_device()) as world:
        return _train(config, output, checkpoint_file, resume, targets, world.main)


def _train(config: Any, output: Path, checkpoint_file: Path, resume: bool, targets: dict[str, Path], main: bool) -> int:
    """Run the trainer; the main process shows a progress bar, and writes what else is asked for."""
    from fastlenet.training import data, loop, products

    console = import_extra("rich.console").Console(highlight=False, soft_wrap=True, markup=False, quiet=not main)
    dataset = data.load(config.data)
    steps_per_epoch = -(-len(dataset.train_labels) // config.batch_size)
    progress = loop.progress_bars(console)
    task = progress.add_task("training", total=config.epochs * steps_per_epoch, loss="...")
    # Where lines stay, as in a log, the line of each epoch says it all and a bar would only repeat it.
    progress.disable = not console.is_terminal

    def on_step(number: int, loss: Tensor) -> None:
        progress.update(task, completed=number)
        # Reading a loss waits for the device: now and then is enough for the eye.
        if number % 20 == 0:
            progress.update(task, loss=f"{loss.item():.4f}")

    def on_epoch(record: dict[str, Any]) -> None:
        console.print(
            f"epoch {record['epoch']:>{len(str(config.epochs))}}/{config.epochs}  lr {record['lr']:.3g}  "
            f"loss {record['train_loss']:.4f}  held out: loss {record['test_loss']:.4f}, "
            f"accuracy {record['test_accuracy']:.2%}"
        )

    try:
        with progress:
            result = loop.train(
                config,
                dataset=dataset,
                output=output,
                checkpoint_file=checkpoint_file,
                resume=resume,
                on_step=on_step,
                on_epoch=on_epoch,
            )
    except loop.TrainingDivergedError as error:
        return print_error("fastlenet train", error, FAILED) if main else FAILED
    except KeyboardInterrupt:
        kept = checkpoint_file.is_file()
        how = f"; --resume goes on from {checkpoint_file}" if kept else " before the first epoch's end"
        return print_error("fastlenet train", f"interrupted{how}", INTERRUPTED)
    epochs = len(result.history)
    console.print(
        f"held-out accuracy {result.evaluation.accuracy:.2%} after {epochs} epoch{'s' if epochs > 1 else ''}; "
        f"results in {output}, checkpoint {checkpoint_file}"
    )
    code = OK
    for product, path in targets.items() if main else ():
        try:
            products.write(product, path, result, dataset)
            console.print(f"{product}: {path}")
        except products.ExportError as error:
            code = print_error("fastlenet train", error, FAILED)
    return code


def run_predict(arguments: Sequence[str]) -> int:
    """`fastlenet predict`: say which digits pictures show."""
    parser = Parser(
        prog="fastlenet predict",
        description="Say which digit each picture shows, by a network that 'fastlenet train' has trained. A picture "
        "has one digit, of any size, dark on light or light on dark.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint of 'fastlenet train', such as out/checkpoint.safetensors"
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a PNG or JPEG file, a folder of them, or an IDX file of images"
    )
    parser.add_argument(
        "--limit", type=int, default=10, metavar="N", help="most images to read of an IDX file (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help=f"{DEVICE_HELP} (default: auto)")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        parser.error(f"argument --limit: must be at least 1, got {options.limit}")
    from fastlenet.training import predict
    from fastlenet.training.data import DataError

    trained = predict.load_trained(options.checkpoint, options.device)
    code = OK
    for file in (file for given in options.images for file in predict.files_of(Path(given))):
        try:
            images, count = predict.read(file, options.limit)
        except DataError as error:
            sys.stdout.flush()  # Lines and complaints keep their order, in a log as well.
            code = print_error("fastlenet predict", error, BAD_INPUT)
            continue
        for number, probabilities in enumerate(trained.probabilities(images)):
            name = str(file) if count == 1 else f"{file}, image {number}"
            print(*predict.lines(name, probabilities), sep="\n")
        if count > len(images):
            print(f"{file}: {count - len(images):,} more images; --limit shows more")
    return code


def run_env(arguments: Sequence[str]) -> int:
    """`fastlenet env`: print what measurements record about this machine, as JSON."""
    description = "Print what measurements record about this machine, as JSON."
    Parser(prog="fastlenet env", description=description).parse_args(arguments)
    from fastlenet import environment

    print(json.dumps(environment.collect(), indent=2))
    return OK


def run_in_checkout(command: str, module: str, arguments: Sequence[str]) -> int:
    """`fastlenet bench` and `fastlenet report`: run a module of the `bench` folder, which is not installed."""
    # Looked for as a file: some other package called `bench` may well be installed.
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").is_file():
        advice = "runs in a checkout only, because its folder bench is not installed: run pip install -e . there"
        # With --help this prints the advice and ends.
        Parser(prog=f"fastlenet {command}", description=f"This command {advice}.").parse_known_args(arguments)
        return print_error(f"fastlenet {command}", advice, BAD_INPUT)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    main_of_command: Callable[[Sequence[str]], int | None] = importlib.import_module(module).main
    return main_of_command(arguments) or OK


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (run_train, "train LeNet on handwritten digits"),
    "predict": (run_predict, "say which digits pictures show, by a trained network"),
    "bench": (functools.partial(run_in_checkout, "bench", "bench.run"), "measure speed and memory (in a checkout)"),
    "report": (
        functools.partial(run_in_checkout, "report", "bench.report"),
        "make tables from measurements (in a checkout)",
    ),
    "env": (run_env, "print what measurements record about this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 if the work itself failed; 2 for bad input, after one line on stderr; 130 if interrupted.
    """
    logging.basicConfig(format="%(name)s: %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = "\n".join(f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="fastlenet",
        description="Faster small convolutional networks in PyTorch: a trainer, a classifier and benchmarks.",
        epilog=f"commands:\n{commands}\n\n'fastlenet COMMAND --help' says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastlenet {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" | ".join(COMMANDS))

    def command() -> int:
        # Each command parses its own arguments, so that only the one asked for imports what it needs.
        return COMMANDS[parser.parse_args(arguments[:1]).command][0](arguments[1:])

    return exit_code(" ".join(["fastlenet", *arguments[:1]]), command)
