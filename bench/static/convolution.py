"""``--conv``: the modelled cost of any convolution, relu and max-pool, beside its floor."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastlenet.kernels import conv2d_relu_max_pool2d as convolution
from fastlenet.kernels.geometry import ConvPoolGeometry

from bench.static.launches import PRECISIONS, Row, compiling_fastlenet, launch_row, rounded
from bench.static.model import LABEL
from fastlenet.errors import InputError

FLOOR_FLOP, FLOOR_BYTES = 60e3, 3e3
"""Rates of a convolution's floor: FLOP and bytes a nanosecond. 60 TFLOP/s is nine tenths of an H100's FMA units."""

FORWARD_PASS, GRAD_INPUT, GRAD_WEIGHT = "forward", "grad_input", "grad_weight"


@dataclass(frozen=True)
class ConvShape:
    """A convolution, relu and max-pool on `batch` images: what ``--conv`` models.

    Attributes:
        batch, channels, size, out_channels, kernel: as of `torch.nn.functional.conv2d`; pairs in (height, width) order.
        geometry: of convolution and pool.
        channels_last: the layout of images, results and gradients.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    geometry: ConvPoolGeometry
    channels_last: bool = False

    def pooled(self) -> tuple[int, int]:
        """Height and width of the result; raises `InputError` where the kernel or the window does not fit."""
        conv = self.geometry.conv_size(self.size, self.kernel)
        pooled = self.geometry.pooled_size(conv)
        if min(*conv, *pooled) < 1:
            raise InputError(f"nothing is left of {self.size[0]}x{self.size[1]} pixels: the result is {pooled}")
        return pooled

    def floor_ns(self, direction: str, itemsize: int) -> float:
        """The least that one pass takes, per image: its products at 60 TFLOP/s, or its tensors at 3 TB/s.

        Products count at the convolution cells that a window looks at, all cells of a window alike. Tensors count once:
        the images or their gradient, the pooled cells and their argmax, and the weight, once a batch.
        """
        cells = 1
        for axis, length in enumerate(self.geometry.conv_size(self.size, self.kernel)):
            step, first = self.geometry.pool_stride[axis], -self.geometry.pool_padding[axis]
            span = range(self.geometry.pool_size[axis] * self.geometry.pool_dilation[axis])
            seen = {first + step * i + k for i in range(self.pooled()[axis]) for k in span}
            cells *= len(seen & set(range(length)))
        depth = self.channels * math.prod(self.kernel)
        flop = 2 * cells * self.out_channels * depth
        pooled = self.out_channels * math.prod(self.pooled())
        moved = (
            self.channels * math.prod(self.size) + pooled
        ) * itemsize + pooled * self.geometry.argmax_dtype.itemsize
        moved += (depth + 1) * self.out_channels * itemsize / self.batch
        return max(flop / FLOOR_FLOP, moved / FLOOR_BYTES)


def conv_rows(shape: ConvShape, arch: str, precision: str, input_grad: bool) -> list[Row]:
    """What the forward of a training step and its gradients cost on one architecture: a row for each.

    A row adds up all launches of its pass, `launches` lists them. Its kernel is the one that takes longest.
    """
    dtype, pooled = PRECISIONS[precision], shape.pooled()
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    input = torch.empty(shape.batch, shape.channels, *shape.size, dtype=dtype, memory_format=layout)
    weight = torch.empty(shape.out_channels, shape.channels, *shape.kernel, dtype=dtype)
    bias = torch.empty(shape.out_channels, dtype=dtype)
    outputs = (shape.batch, shape.out_channels, *pooled)
    grad = torch.empty(outputs, dtype=dtype, memory_format=layout)
    argmax = torch.empty(outputs, dtype=shape.geometry.argmax_dtype, memory_format=layout)
    masks = {GRAD_INPUT: (True, False, False), GRAD_WEIGHT: (False, True, True)}
    rows = []
    for direction in (FORWARD_PASS, *([GRAD_INPUT] if input_grad else []), GRAD_WEIGHT):
        begin = time.process_time() + os.times().children_user
        with compiling_fastlenet(arch, precision) as records:
            if direction == FORWARD_PASS:
                convolution.conv2d_relu_max_pool2d(input, weight, bias, shape.geometry, True)
            else:
                operands = grad, input, weight, argmax, shape.geometry, masks[direction]
                convolution.conv2d_relu_max_pool2d_backward(*operands)
            seconds = time.process_time() + os.times().children_user - begin
            found = [
                launch_row(record, call, arch, precision, shape.batch) for record in records for call in record.calls
            ]
        longest = max(found, key=lambda row: row["modelled_ns_per_image"] or row["registers"])
        total = [row["modelled_ns_per_image"] for row in found]
        rows.append(
            {
                "kernel": longest["kernel"],
                "direction": direction,
                "arch": arch,
                "precision": precision,
                "batch": shape.batch,
                "modelled_ns_per_image": None if None in total else rounded(sum(total)),
                "floor_ns": rounded(shape.floor_ns(direction, dtype.itemsize)),
                "spill_bytes": max(row["spill_bytes"] for row in found),
                "registers": max(row["registers"] for row in found),
                "compiled": len(records),
                "compile_seconds": round(seconds, 1),
                "note": LABEL,
                "launches": found,
            }
        )
    return rows


def pair(text: str) -> tuple[int, int]:
    """Read ``5`` or ``5x3``."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number or HEIGHTxWIDTH, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def shape_of(options: argparse.Namespace) -> ConvShape:
    """Read what ``--conv`` and the options beside it say; raises `InputError`."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)-(\d+)", options.conv)
    if found is None or options.kernel is None:
        raise InputError(f"--conv takes CxHxW-O and needs --kernel, as in --conv 3x32x32-6 --kernel 5: {options.conv}")
    channels, height, width, out_channels = map(int, found.groups())
    pool = options.pool
    geometry = ConvPoolGeometry(
        *(options.stride, options.padding, (1, 1), 1),
        *(pool, options.pool_stride or pool, options.pool_padding, (1, 1), options.ceil_mode),
    )
    if 0 in (channels, height, width, out_channels, options.batch, *options.kernel, *geometry.stride, *pool):
        raise InputError("sizes, strides and the batch are at least 1")
    if 0 in geometry.pool_stride or any(2 * p > size for p, size in zip(geometry.pool_padding, pool, strict=True)):
        raise InputError("a pool's stride is at least 1, and its padding at most half a window")
    if geometry.window_size > 255:
        raise InputError(f"windows have at most 255 cells, got {geometry.window_size}")
    size, last = (height, width), options.channels_last
    return ConvShape(options.batch, channels, size, out_channels, options.kernel, geometry, last)


def print_rows(rows: Sequence[Row]) -> None:
    print(f"ns per image; {LABEL}")
    head = (
        "arch",
        "precision",
        "pass",
        "kernel",
        "modelled",
        "floor",
        "ratio",
        "regs",
        "spill",
        "kernels",
        "compile s",
    )
    line = "{:7} {:9} {:11} {:44} {:>9} {:>8} {:>6} {:>5} {:>6} {:>7} {:>9}"
    print(line.format(*head))
    for row in rows:
        modelled, floor = row["modelled_ns_per_image"], row["floor_ns"]
        figures = ("", "") if modelled is None else (f"{modelled:.2f}", f"{modelled / floor:.2f}")
        names = row["arch"], row["precision"], row["direction"], row["kernel"].partition(".")[2]
        sizes = row["registers"], row["spill_bytes"], row["compiled"], row["compile_seconds"]
        print(line.format(*names, figures[0], f"{floor:.2f}", figures[1], *sizes))
    print(f"{sum(row['compiled'] for row in rows)} kernels, each of them compiled once for any number of images")
