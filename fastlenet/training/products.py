"""What the trainer writes beside its checkpoint: a picture of the run, and the network for use without fastlenet.

A file is made and checked in memory and then written at once, so it is whole or not there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlenet._version import __version__
from fastlenet.errors import InputError, import_extra
from fastlenet.export import decompositions
from fastlenet.files import atomic_write
from fastlenet.selection import use_backend
from fastlenet.training import picture
from fastlenet.training.data import Dataset
from fastlenet.training.loop import TrainResult

KINDS = ("plot", "onnx", "export")
# The name of the JSON record in an exported program's file.
RECORD = "fastlenet.json"


class ExportError(RuntimeError):
    """An exported network does not compute what the trained one computes."""


def check_target(kind: str, path: Path) -> None:
    """Refuse a file, of one of the `KINDS`, that cannot be written: before any training.

    Raises:
        InputError: if the name cannot be that of such a file.
        MissingPackageError: if a package that it takes is not installed.
    """
    if kind == "plot":
        if path.suffix[1:].lower() not in picture.FORMATS:
            raise InputError(f"--plot: {path} must end in .{', .'.join(picture.FORMATS)}")
        import_extra("matplotlib.figure")
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_extra(package, "fastlenet[export]")
    if path.is_dir():
        raise InputError(f"--{kind}: {path} is a folder")


def write(kind: str, path: Path, result: TrainResult, dataset: Dataset) -> None:
    """Write one file, of one of the `KINDS`.

    Raises:
        ExportError: if the exported network computes something else than the trained one; nothing is written.
        InputError: if the file cannot be written.
    """
    if kind == "plot":
        content = picture.draw_run(result.history, result.evaluation, dataset, path.suffix[1:].lower())
    else:
        record = {"fastlenet": __version__, "input": "(n, 1, 32, 32)", "mean": dataset.mean, "std": dataset.std}
        make = {"onnx": onnx_bytes, "export": program_bytes}[kind]
        with _quiet():
            content = make(result.model, dataset.test_images, record)
    atomic_write(path, content)


def program_bytes(model: nn.Module, images: Tensor, record: dict[str, object]) -> bytes:
    """Make a file for `torch.export.load` that needs no fastlenet, for any number of images.

    Args:
        model: a classifier from (n, 1, 32, 32) to (n, classes). It stays as it is.
        images: (N, 1, 32, 32), on the CPU: what the file is checked on.
        record: JSON values, kept in the file as the extra file `RECORD`.

    Returns:
        The file's bytes. The program computes on the CPU in the model's dtype.

    Raises:
        ExportError: if the program, loaded from these bytes, is less exact than stock PyTorch may be.
    """
    model = _apart(model)
    stream = io.BytesIO()
    torch.export.save(_program(model, images), stream, extra_files={RECORD: json.dumps(record)})
    loaded = torch.export.load(io.BytesIO(stream.getvalue())).module()
    _check(model, images, loaded, "the exported program")
    return stream.getvalue()


def onnx_bytes(model: nn.Module, images: Tensor, record: dict[str, object]) -> bytes:
    """Make an ONNX file, for any number of images; arguments as of `program_bytes`.

    Returns:
        The file's bytes. The network computes in float32, the one dtype that ONNX's runtimes all have.

    Raises:
        ExportError: if ONNX Runtime's outputs are less exact than stock PyTorch's may be.
        MissingPackageError: if one of ONNX's packages is not installed.
    """
    model = _apart(model).float()
    import_extra("onnxscript", "fastlenet[export]")
    runtime = import_extra("onnxruntime", "fastlenet[export]")
    exported = torch.onnx.export(_program(model, images), dynamo=True, verbose=False)
    assert exported is not None  # Only the exporter before dynamo's returns None.
    proto = exported.model_proto
    for name, value in record.items():
        proto.metadata_props.add(key=name, value=str(value))
    content: bytes = proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [argument] = session.get_inputs()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {argument.name: images.numpy()})[0])

    _check(model, images, run, "the ONNX file, run by ONNX Runtime,")
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PyTorch's exporters say about themselves (deprecations, packages not installed) from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _apart(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU, for inference."""
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    dtype = next(model.parameters()).dtype
    # A copy: the file keeps the example, and of a view all that it is a view of.
    example = images[:2].to(dtype, copy=True)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return program.run_decompositions(decompositions())


def _check(model: nn.Module, images: Tensor, run: Callable[[Tensor], Tensor], name: str) -> None:
    """Hold a network's outputs to this library's rule of accuracy.

    Against float64 they may be off by twice what stock's operators are in the same dtype, plus one rounding step.
    """
    images = images.to(next(model.parameters()).dtype)
    with torch.no_grad(), use_backend("aten"):
        exact = copy.deepcopy(model).double()(images.double())
        own = (model(images) - exact).abs().max().item()
    allowed = 2 * own + torch.finfo(images.dtype).eps * exact.abs().max().item()
    error = (run(images) - exact).abs().max().item()
    if not error <= allowed:  # NaN is not.
        raise ExportError(f"{name} is off by {error:.1e}, allowed are {allowed:.1e}: nothing was written")
