"""``python -m bench.slowest``: random legal calls, and those that are slowest compared with stock PyTorch.

Calls are drawn from the whole range of the operators: any kernel, stride, padding, dilation, groups, window, layout,
type and batch; and chains of up to three convolutions and three linear maps. Each is timed, forward and backward, in
turns with stock's own composition. A call may take at most `FACTOR` times stock's time plus `SLACK_US`. A call that
takes more is timed again, for longer, before it counts. The command prints the worst calls, which can become tests, and
exits with 1 if one takes too long.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry
from torch import Tensor

from fastlenet import functional
from fastlenet.terminal import Parser

FACTOR, SLACK_US = 1.5, 50.0
MOST_PRODUCTS = 3e8
"""The most multiply-adds of a random call. Larger calls would only take longer to time."""
CHAINS = 0.4
"""The part of the random calls that are chains."""
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ConvCall(NamedTuple):
    """A drawn call of `conv2d_relu_max_pool2d`: shapes, and the keyword arguments of both operators."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    conv: dict[str, Any]
    pool: dict[str, Any]
    dtype: torch.dtype
    channels_last: bool
    input_grad: bool

    def tensors(self) -> list[Tensor]:
        """Input, weight and bias, of random numbers."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        input = torch.randn(self.input).to(self.dtype).contiguous(memory_format=layout)
        weight = (torch.randn(self.weight) / 4).to(self.dtype)
        bias = torch.randn(self.weight[0]).to(self.dtype)
        return [input.requires_grad_(self.input_grad), weight.requires_grad_(), bias.requires_grad_()]

    def fused(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The call by fastlenet."""
        pool = {name if name == "ceil_mode" else f"pool_{name}": value for name, value in self.pool.items()}
        return functional.conv2d_relu_max_pool2d(input, weight, bias, **self.conv, **pool)

    def stock(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Run the call with stock PyTorch's operators."""
        size, stride, padding, dilation = (self.pool[name] for name in ("size", "stride", "padding", "dilation"))
        conv = F.relu(F.conv2d(input, weight, bias, **self.conv))
        return F.max_pool2d(conv, size, stride, padding, dilation, self.pool["ceil_mode"])


class ChainCall(NamedTuple):
    """A drawn chain: the shape of its input, and of each weight, pools of 2x2 behind 3x3 or 5x5 kernels."""

    input: tuple[int, ...]
    weights: list[tuple[int, ...]]
    grad: bool

    def tensors(self) -> list[Tensor]:
        """The input, and a weight and a bias of each link, of random numbers."""
        found = [torch.randn(self.input)]
        for shape in self.weights:
            found += [torch.randn(shape) / math.prod(shape[1:]) ** 0.5, torch.randn(shape[0])]
        return [tensor.requires_grad_(self.grad and i > 0) for i, tensor in enumerate(found)]

    def fused(self, *tensors: Tensor) -> Tensor:
        """The call by fastlenet."""
        last = len(self.weights) - 1
        links = [_PLAIN if len(w) == 4 else LINEAR if i == last else LINEAR_RELU for i, w in enumerate(self.weights)]
        return functional.chain(tensors[0], tensors[1:], tuple(links))

    def stock(self, *tensors: Tensor) -> Tensor:
        """Run the call with stock PyTorch's operators."""
        output = tensors[0]
        for i, weight in enumerate(self.weights):
            operands = tensors[1 + 2 * i : 3 + 2 * i]
            if len(weight) == 4:
                output = F.max_pool2d(F.relu(F.conv2d(output, *operands, padding=1)), 2)
            else:
                output = F.linear(output if output.dim() == 2 else output.flatten(1), *operands)
                output = output if i == len(self.weights) - 1 else F.relu(output)
        return output


_PLAIN = ConvPoolGeometry((1, 1), (1, 1), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


def draw_chain(rng: random.Random) -> ChainCall:
    """Draw a chain of at least two links."""
    while True:
        images, products = rng.choice([1, 2, 4, 7, 8, 16, 17, 32, 64, 256, 512]), 0
        sizes = [rng.choice([1, 3, 16]), *[rng.choice([14, 20, 28, 32])] * 2]
        input, weights = (images, *sizes), list[tuple[int, ...]]()
        for _ in range(rng.choice([0, 1, 2, 2, 3])):
            filters, kernel = rng.choice([3, 6, 16, 20, 32, 64]), rng.choice([3, 3, 5])
            weights.append((filters, sizes[0], kernel, kernel))
            conv = sizes[1] + 3 - kernel
            products += images * math.prod(weights[-1]) * conv**2
            sizes = [filters, conv // 2, conv // 2]
        if not weights:
            sizes, input = [math.prod(sizes)], (images, math.prod(sizes))
        width = math.prod(sizes)
        for _ in range(rng.choice([0, 1, 2, 2, 3])):
            weights.append((rng.choice([10, 64, 120, 512, 1024]), width))
            products += images * math.prod(weights[-1])
            width = weights[-1][0]
        if len(weights) > 1 and min(sizes) > 0 and products <= MOST_PRODUCTS:
            return ChainCall(input, weights, rng.random() < 0.6)


def draw(rng: random.Random) -> ConvCall:
    """Draw a legal call. Unusual calls are more frequent than in practice."""
    while True:
        groups = rng.choice([1, 1, 1, 2, 4])
        channels, outputs = groups * rng.choice([1, 1, 2, 3, 8, 16, 32]), groups * rng.choice([1, 3, 6, 8, 16, 32, 64])
        images = rng.choice([1, 1, 2, 8, 16, 17, 32, 64, 256])
        size = rng.choice([1, 7, 14, 28, 32, 56, 400]), rng.choice([1, 8, 14, 28, 32, 40, 400])
        kernel = rng.choice([1, 2, 3, 5, 7, 20, 64]), rng.choice([1, 3, 5, 7])
        conv = {
            "stride": rng.choice([(1, 1), (1, 1), (2, 2)]),
            "padding": (rng.choice([0, 0, 1, 3]), rng.choice([0, 0, 1, 2])),
            "dilation": rng.choice([1, 1, 1, 2, 3]),
            "groups": groups,
        }
        # Stock PyTorch 2.13 corrupts memory in the weight's gradient of some strided convolutions: with dilation, with
        # different strides, of images or kernels one pixel wide. Such calls are left out.
        if max(conv["stride"]) > 1:
            conv["dilation"] = 1
            if min(*size, *kernel) == 1:
                continue
        window = rng.choice([(1, 1), (2, 2), (2, 2), (3, 3), (4, 2), (16, 16), (20, 20), (56, 56), (1, 400)])
        pool = {
            "size": window,
            "stride": rng.choice([window, window, (1, 1), (2, 2)]),
            "padding": rng.choice([(0, 0), (0, 0), (window[0] // 2, window[1] // 2)]),
            "dilation": rng.choice([1, 1, 1, 2]),
            "ceil_mode": rng.random() < 0.2,
        }
        conv_size = [
            (size[i] + 2 * conv["padding"][i] - conv["dilation"] * (kernel[i] - 1) - 1) // conv["stride"][i] + 1
            for i in (0, 1)
        ]
        reach = [pool["dilation"] * (window[i] - 1) + 1 - 2 * pool["padding"][i] for i in (0, 1)]
        if min(conv_size) < 1 or any(conv_size[i] < reach[i] for i in (0, 1)):
            continue
        # It writes outside of its memory if a window lies wholly in the padding, because its index is not in the image.
        if any(pool["padding"][i] and pool["dilation"] > conv_size[i] for i in (0, 1)):
            continue
        products = images * outputs * channels // groups * kernel[0] * kernel[1] * conv_size[0] * conv_size[1]
        if products > MOST_PRODUCTS or images * channels * size[0] * size[1] > 2e7:
            continue
        pooled = [conv_size[i] // pool["stride"][i] + 1 for i in (0, 1)]
        if images * outputs * pooled[0] * pooled[1] * window[0] * window[1] > MOST_PRODUCTS:
            continue
        plain = max(conv["stride"]) == 1 and min(size) > 1 and min(kernel) > 1
        dtype = rng.choice(DTYPES) if plain else torch.float32
        return ConvCall(
            (images, channels, *size),
            (outputs, channels // groups, *kernel),
            conv,
            pool,
            dtype,
            # Nor may 16-bit gradients of dilated convolutions with groups be in channels_last, on CPUs with AVX-512.
            plain and (groups == 1 or conv["dilation"] == 1 or dtype.itemsize > 2) and rng.random() < 0.3,
            rng.random() < 0.5,
        )


def compare(call: ConvCall | ChainCall, seconds: float) -> tuple[float, float]:
    """Time a call and stock's, in turns, for about `seconds`: medians in microseconds, fastlenet's first."""
    steps = [_step(function, call.tensors()) for function in (call.fused, call.stock)]
    for step in steps:
        step()
    samples: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 3:
        for i in (0, 1) if len(samples[0]) % 2 else (1, 0):
            begin = time.perf_counter()
            steps[i]()
            samples[i].append((time.perf_counter() - begin) * 1e6)
    return statistics.median(samples[0]), statistics.median(samples[1])


def _step(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], None]:
    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def step() -> None:
        output = function(*tensors)
        if leaves:
            torch.autograd.grad(output, leaves, torch.ones_like(output))

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, time and print; return 1 if a call takes too long."""
    description = "Time random legal calls and print those that are slowest compared with stock PyTorch."
    parser = Parser(prog="python -m bench.slowest", description=description, allow_abbrev=False)
    seconds = "seconds of timing for each call (default: 0.05)"
    parser.add_argument("--draws", type=int, default=300, metavar="N", help="number of random calls (default: 300)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random calls (default: 0)")
    parser.add_argument("--seconds", type=float, default=0.05, metavar="SECONDS", help=seconds)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    found: list[tuple[float, float, float, ConvCall | ChainCall]] = []
    for _ in range(options.draws):
        call = draw_chain(rng) if rng.random() < CHAINS else draw(rng)
        fused, stock = compare(call, options.seconds)
        for _ in range(2):  # a short disturbance of the machine must not count
            if fused > FACTOR * stock + SLACK_US:
                fused, stock = compare(call, 10 * options.seconds)
        found.append(((fused - SLACK_US) / stock, fused, stock, call))
    found.sort(key=lambda row: -row[0])
    for excess, fused, stock, call in found[:8]:
        print(f"{fused:9.0f} us, stock {stock:9.0f} us, ({excess:.2f}x without {SLACK_US:.0f} us) {call}")
    slow = sum(excess > FACTOR for excess, *_ in found)
    print(f"{slow} of {options.draws} drawn calls take more than {FACTOR}x stock's time plus {SLACK_US:.0f} us")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
