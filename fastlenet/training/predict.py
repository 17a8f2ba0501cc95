"""What `fastlenet predict` does: files with pictures of digits in, a trained network's answers out.

A picture becomes what MNIST's makers made of theirs: light ink on black, the digit's box scaled to fit 20x20 pixels,
its centre of mass put at the centre of 28x28 pixels. Images of an IDX file are of that form and stay as they are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastlenet.errors import import_extra
from fastlenet.lenet import LeNet
from fastlenet.training import checkpoint, data, loop
from fastlenet.training.data import GZIP, PADDING, SIDE, DataError

BOX = 20
# Larger pictures are scaled to so many pixels first, which averages the grain of a photograph away.
LARGEST = 280
# How often paper and ink are told apart, each time after the paper's shading, as found so far, is taken away.
ROUNDS = 3
# An image whose lightest and darkest pixels are nearer than this share of black to white shows nothing.
LEAST_CONTRAST = 0.1
# A probability below which the answer is more likely wrong than right.
LIKELY = 0.5
SUFFIXES = (".png", ".jpg", ".jpeg")
_IDX_IMAGES = b"\x00\x00\x08\x03"
_BATCH = 1000
_BAR = 40


@dataclass(frozen=True, eq=False)
class Trained:
    """A network from a checkpoint, in evaluation mode, with the mean and deviation of the padded training pixels."""

    model: LeNet
    mean: float
    std: float

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            images: float32, (n, 28, 28), light ink on black, black 0 and white 1.

        Returns:
            float64, (n, 10), on the CPU: the probability of each digit.
        """
        weight = self.model.fc3.weight
        padded = F.pad(images.unsqueeze(1), (PADDING,) * 4).sub(self.mean).div(self.std)
        with torch.no_grad():
            logits = [self.model(part.to(weight.device, weight.dtype)).cpu() for part in padded.split(_BATCH)]
        return torch.cat(logits).double().softmax(1)


def load_trained(path: str | os.PathLike[str], device: str = "auto") -> Trained:
    """Load the network of a checkpoint that `fastlenet train` wrote.

    Args:
        path: the checkpoint.
        device: ``"auto"`` (a GPU if there is one), or what `torch.device` takes.

    Raises:
        CheckpointError: if the file is no checkpoint, or not one of a `LeNet` or `StockLeNet` for digits.
        ConfigError: if the device or a forced backend cannot be used here.
    """
    stored = checkpoint.load(path)
    config = loop.TrainConfig(device=device, dtype=stored.config.get("dtype", "float32"))
    loop.check_backend(config)
    model = LeNet(dtype=config.torch_dtype)
    checkpoint.check_model(stored.model, model.state_dict())
    if not {"mean", "std"} <= stored.config.keys():
        raise checkpoint.CheckpointError(
            f"checkpoint {os.fspath(path)} does not say how its images were normalised (fastlenet 0.1 wrote it): train "
            "one more epoch with --resume"
        )
    model.load_state_dict(stored.model)
    return Trained(model.to(config.torch_device()).eval(), stored.config["mean"], stored.config["std"])


def files_of(path: Path) -> list[Path]:
    """List what a path stands for: the PNG and JPEG files in a folder, by name, if it has any; else itself."""
    found = path.iterdir() if path.is_dir() else ()
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES) or [path]


def read(path: Path, limit: int) -> tuple[torch.Tensor, int]:
    """Read the images of a file.

    Args:
        path: a PNG or JPEG file of one digit, or an IDX file of images, also gzipped.
        limit: how many images of an IDX file to take.

    Returns:
        The images, float32, (n, 28, 28), light ink on black, black 0 and white 1; and how many the file holds.

    Raises:
        DataError: if the file holds no image of a digit.
        MissingPackageError: if a picture is to be read and Pillow is not installed.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder without PNG or JPEG files")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if start == _IDX_IMAGES or start.startswith(GZIP):
        images = data.read_idx(path, dimensions=3)
        return images[:limit].float().div_(255), len(images)
    shades = _shades(path)
    try:
        return centred(ink(shades)).unsqueeze(0), 1
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _shades(path: Path) -> torch.Tensor:
    """Decode a picture to shades of grey: float32, (height, width), black 0 and white 1."""
    pillow, operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    with warnings.catch_warnings():
        # Pillow warns of pictures that are large enough to fill the memory, and refuses those twice as large.
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            with pillow.open(path, formats=("PNG", "JPEG")) as image:
                return _grey(operations.exif_transpose(image))
        except pillow.UnidentifiedImageError as error:
            raise DataError(f"{path}: not a PNG, JPEG or IDX file") from error
        except Exception as error:  # Damaged files make Pillow's decoders raise errors of a dozen types.
            raise DataError(f"{path}: cannot be decoded ({error})") from error


def _grey(image: Any) -> torch.Tensor:
    np = import_extra("numpy")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts off
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
    if not image.has_transparency_data:
        return torch.from_numpy(np.asarray(image.convert("L")).astype(np.float32) / 255)
    # On paper of the other shade than the opaque part, which is the digit if not all is opaque.
    layers = torch.from_numpy(np.asarray(image.convert("RGBA").convert("LA")).astype(np.float32) / 255)
    shade, opacity = layers.unbind(-1)
    ink_is_dark = (shade * opacity).sum() < 0.5 * opacity.sum()
    return shade * opacity + (1 - opacity) * ink_is_dark


def ink(shades: torch.Tensor) -> torch.Tensor:
    """Tell the ink from the paper, whichever of them is the lighter, also where a shadow falls across the paper.

    Args:
        shades: float32, (height, width), black 0 and white 1.

    Returns:
        float32, of the same size or, of large pictures, a smaller one: 0 for paper, up to 1 for ink.

    Raises:
        DataError: if nothing stands out from the paper.
    """
    if max(shades.shape) > LARGEST:
        shades = _resized(shades, LARGEST)
    light, paper = shades, None
    for _ in range(ROUNDS):
        if paper is not None:
            light = light - _plane(light, paper)
        darkest, lightest = light.min(), light.max()
        if lightest - darkest < LEAST_CONTRAST:
            raise DataError("shows nothing: all of it is of one shade")
        share = (light - darkest) / (lightest - darkest)
        threshold = _threshold(share)
        # Paper is what most of the edge and of the picture is: the edge alone may be crossed by a digit that fills it.
        edge = torch.cat([share[0], share[-1], share[:, 0], share[:, -1]])
        if (edge > threshold).float().mean() + (share > threshold).float().mean() > 1:
            share, threshold = 1 - share, 1 - threshold
        paper = share <= threshold
    # Half the threshold keeps the soft rim of a stroke and leaves out the paper's grain.
    return share * (share > threshold / 2)


def _resized(image: torch.Tensor, longest: int) -> torch.Tensor:
    """Scale an image (height, width) so that its longer side has `longest` pixels, each the mean of what it covers."""
    size = [max(1, round(side * longest / max(image.shape))) for side in image.shape]
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _plane(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Fit a plane to the chosen pixels of an image (height, width) by least squares, and return it in that size."""
    height, width = values.shape
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(values), rows, columns], dim=-1)
    # By "gelsd", which copes with pixels that lie on one line.
    solution = torch.linalg.lstsq(terms[chosen].double(), values[chosen, None].double(), driver="gelsd").solution
    return (terms.double() @ solution)[..., 0].to(values.dtype)


def _threshold(values: torch.Tensor) -> float:
    """Find the value between 0 and 1 that parts `values` into two groups of least variance within (Otsu's method)."""
    bins = 256
    counts = torch.histc(values, bins, 0, 1).double()
    middles = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below, sums = counts.cumsum(0), (counts * middles).cumsum(0)
    above = below[-1] - below
    between = (sums[-1] * below - sums * below[-1]) ** 2 / (below * above).clamp(min=1)
    return (int(between.argmax()) + 1) / bins


def centred(ink: torch.Tensor) -> torch.Tensor:
    """Scale and place a digit as MNIST does.

    Args:
        ink: float32, (height, width), 0 for paper; not all of it is 0.

    Returns:
        float32, (28, 28): the digit's box fits 20x20, its centre of mass is at the centre, to half a pixel, unless
        that would cut it off.
    """
    rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
    box = ink[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    small = _resized(box, BOX).clamp(0, 1)
    place = []
    for axis, side in enumerate(small.shape):
        mass = small.sum(1 - axis)
        centre = float((mass * torch.arange(side)).sum() / mass.sum())
        place.append(min(max(round(SIDE / 2 - centre), 0), SIDE - side))
    image = torch.zeros(SIDE, SIDE)
    image[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = small
    return image


def lines(name: str, probabilities: torch.Tensor) -> Iterator[str]:
    """Say what the network takes an image for: the digit and its probability, then a bar for each class."""
    digit = int(probabilities.argmax())
    doubt = "" if probabilities[digit] >= LIKELY else " (not sure)"
    # A name may hold bytes that are no text, which a terminal refuses.
    name = name.encode(errors="backslashreplace").decode()
    yield f"{name}: {digit}, probability {probabilities[digit]:.1%}{doubt}"
    for number, share in enumerate(probabilities.tolist()):
        yield f"  {number} {'#' * round(share * _BAR):<{_BAR}} {share:6.1%}"
