"""The work that is measured: shapes, data, and the least cost.

A `Case` is an operator or a network with its sizes. A `Work` is a case with a batch size, dtype, precision and
direction: one comparison, with rows from one process, interleaved. `setup` makes the data for all implementations of a
comparison.

How cost is counted. FLOPs: two per multiply-add of convolutions and matrix products; of a convolution only cells in a
pooling window count. Bytes: each tensor that an operator must read or write counts once, parameters once a batch.
Between operators everything goes through memory, except inside the three linear layers of LeNet, which count as one
operator. A backward pass counts convolution gradients at the argmax cells alone (`dense=True`: at all cells), and one
byte of argmax for a pooled cell. It reads its operands once for all its gradients.

So LeNet's forward is 833,040 FLOP and 16,744 bytes an image, its training step 1,367,520 FLOP (2,263,920 dense). A step
by layers, without a fused head and with separate kernels for input and weight gradients, moves about 53 KB instead of
the 44.6 KB counted here. An implementation that does not fuse across layers takes at least max(bytes / copy rate, FLOP
/ arithmetic rate).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from torch import Tensor

FORWARD, BACKWARD, BOTH, TRAIN_STEP = "forward", "backward", "forward_backward", "train_step"
CALL, KERNEL = "call", "kernel"

# A decision (which cell of a window wins, whether a relu is open) is clear if it holds by so many rounding steps.
MARGIN_STEPS = 32


class Cost(NamedTuple):
    """The least cost: per image, and `fixed_bytes` (parameters) per batch."""

    flops: float
    bytes: float
    fixed_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


Results = dict[str, Tensor]
"""The results of a call by name: its output and gradients."""


@dataclass(frozen=True)
class ConvCase:
    """conv2d + relu + max-pool on (`channels`, `size`, `size`) images; names as in torch.nn.functional."""

    name: str
    channels: int
    size: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: int = 2
    pool_stride: int = 2
    pool_padding: int = 0
    input_grad: bool = True
    batch: int = 64

    @property
    def shape(self) -> str:
        """Format the sizes."""
        return (
            f"{self.channels}x{self.size}x{self.size} to {self.out_channels}, kernel {self.kernel}/{self.stride} "
            f"pad {self.padding}, pool {self.pool}/{self.pool_stride} pad {self.pool_padding}"
        )

    @property
    def geometry(self) -> ConvPoolGeometry:
        """The same for the library."""
        pairs = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": 1,
            "pool_size": self.pool,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
            "pool_dilation": 1,
        }
        return ConvPoolGeometry(groups=1, ceil_mode=False, **{name: (n, n) for name, n in pairs.items()})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.channels, self.size, self.size

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one image's output."""
        conv = self.geometry.conv_size((self.size, self.size), (self.kernel, self.kernel))
        return self.out_channels, *self.geometry.pooled_size(conv)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        return {
            "weight": (self.out_channels, self.channels, self.kernel, self.kernel),
            "bias": (self.out_channels,),
        }

    def undecided(self, input: Tensor, parameters: dict[str, Tensor], step: float) -> Tensor:
        """Tell, per element of the output, whether rounding may change which input cells it depends on."""
        conv = F.conv2d(input, parameters["weight"], parameters["bias"], self.stride, self.padding)
        margin = MARGIN_STEPS * step * conv.square().mean().sqrt()
        best = torch.full((len(input), *self.output_shape), -torch.inf, dtype=conv.dtype, device=conv.device)
        second = best.clone()
        padded = F.pad(conv, [self.pool_padding] * 4, value=-torch.inf)
        reach = [(length - 1) * self.pool_stride + 1 for length in self.output_shape[1:]]
        for top in range(self.pool):
            for left in range(self.pool):
                cell = padded[:, :, top : top + reach[0] : self.pool_stride, left : left + reach[1] : self.pool_stride]
                second = torch.maximum(second, torch.minimum(best, cell))
                best = torch.maximum(best, cell)
        return (best.abs() < margin) | ((best > 0) & (best - second < margin))

    def cost(self, direction: str, itemsize: int, dense: bool = False) -> Cost:
        """Count what `direction` costs at least."""
        pooled = math.prod(self.output_shape)
        taps = self.channels * self.kernel**2
        image = math.prod(self.input_shape)
        fixed = (self.out_channels * taps + self.out_channels) * itemsize
        [conv_h, conv_w] = self.geometry.conv_size((self.size, self.size), (self.kernel, self.kernel))
        covered = self._covered(conv_h) * self._covered(conv_w) * self.out_channels
        argmax = 0 if direction == FORWARD else pooled
        forward = Cost(2.0 * covered * taps, (image + pooled) * itemsize + argmax, fixed)
        gradients = 2 if self.input_grad else 1
        backward = Cost(
            2.0 * gradients * (covered if dense else min(pooled, covered)) * taps,
            (pooled + image * gradients) * itemsize + argmax,
            fixed * gradients,
        )
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def _covered(self, length: int) -> int:
        """How many cells of the convolution, along one dimension, lie in a window."""
        starts = [i * self.pool_stride - self.pool_padding for i in range(self.output_shape[1])]
        return len({cell for start in starts for cell in range(start, start + self.pool) if 0 <= cell < length})


@dataclass(frozen=True)
class LinearCase:
    """linear + relu from `features` to `out_features`; an image is a row."""

    name: str
    features: int
    out_features: int
    batch: int = 1024
    input_grad: bool = True

    @property
    def shape(self) -> str:
        """Format the sizes."""
        return f"{self.features} to {self.out_features}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return (self.features,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one row's output."""
        return (self.out_features,)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        return {"weight": (self.out_features, self.features), "bias": (self.out_features,)}

    def undecided(self, input: Tensor, parameters: dict[str, Tensor], step: float) -> Tensor:
        """Tell, per element of the output, whether rounding may open or close its relu."""
        product = F.linear(input, parameters["weight"], parameters["bias"])
        return product.abs() < MARGIN_STEPS * step * product.square().mean().sqrt()

    def cost(self, direction: str, itemsize: int, dense: bool = False) -> Cost:
        """Count what `direction` costs at least; a dense product has no zeros to leave out."""
        fixed = (self.features + 1) * self.out_features * itemsize
        work = 2.0 * self.features * self.out_features
        forward = Cost(work, (self.features + self.out_features) * itemsize, fixed)
        # Reads the upstream gradient, the output (relu's mask) and the input, writes the input's gradient.
        backward = Cost(2 * work, 2 * (self.features + self.out_features) * itemsize, 2 * fixed)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


@dataclass(frozen=True)
class NetworkCase:
    """A network of convolutions, each with relu and max-pool, and linear layers with relu between them.

    It is measured as inference (`forward`) and as a whole training step.

    Attributes:
        name: its name in the results.
        convolutions: in order; the first needs no input gradient.
        widths: features of the flattened images and of each linear layer's output.
        norm: whether there is a BatchNorm between each convolution and its relu.
    """

    name: str
    convolutions: tuple[ConvCase, ...]
    widths: tuple[int, ...]
    norm: bool = False

    @property
    def shape(self) -> str:
        """Format the sizes."""
        first, norm = self.convolutions[0], ", BatchNorm" if self.norm else ""
        return f"{first.channels}x{first.size}x{first.size} to {self.widths[-1]}{norm}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.convolutions[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one image's logits."""
        return self.widths[-1:]

    @property
    def products(self) -> int:
        """How many products follow each other in a forward pass."""
        return len(self.convolutions) + len(self.widths) - 1

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        layers: dict[str, ConvCase | LinearCase] = {f"conv{i}": c for i, c in enumerate(self.convolutions, start=1)}
        layers |= {f"fc{i}": LinearCase("", *sizes) for i, sizes in enumerate(pairwise(self.widths), start=1)}
        shapes = {f"{n}.{p}": shape for n, layer in layers.items() for p, shape in layer.parameter_shapes.items()}
        if self.norm:
            for i, case in enumerate(self.convolutions, start=1):
                shapes |= {f"norm{i}.{name}": (case.out_channels,) for name in ("weight", "bias")}
        return shapes

    def undecided(self, input: Tensor, parameters: dict[str, Tensor], step: float) -> Tensor:
        """Tell, per image, whether rounding may change which cells win or which relus are open."""
        images = torch.zeros(len(input), dtype=torch.bool, device=input.device)
        for i, case in enumerate(self.convolutions, start=1):
            own = {name: parameters[f"conv{i}.{name}"] for name in ("weight", "bias")}
            images |= case.undecided(input, own, step).flatten(1).any(1)
            conv = F.relu(F.conv2d(input, own["weight"], own["bias"], case.stride, case.padding))
            input = F.max_pool2d(conv, case.pool, case.pool_stride, case.pool_padding)
        input = input.flatten(1)
        for i in range(1, len(self.widths) - 1):
            own = {name: parameters[f"fc{i}.{name}"] for name in ("weight", "bias")}
            images |= LinearCase("", 1, 1).undecided(input, own, step).any(1)
            input = F.relu(F.linear(input, own["weight"], own["bias"]))
        return images

    def cost(self, direction: str, itemsize: int, dense: bool = False) -> Cost:
        """Count what `direction` costs at least; a BatchNorm in inference is part of its convolution."""
        part = FORWARD if direction == FORWARD else BOTH
        total = Cost(0, 0)
        for case in self.convolutions:
            total += case.cost(part, itemsize, dense)
        first, *hidden, last = self.widths
        products = 2.0 * sum(n * m for n, m in pairwise(self.widths))
        total += Cost(products, (first + last) * itemsize)
        if direction == TRAIN_STEP:
            # Hidden activations and logits are written and read again; 8 bytes of label; the features' gradient.
            total += Cost(2 * products, (2 * sum(hidden) + last + 2 * first) * itemsize + 8)
        size = sum(math.prod(shape) for shape in self.parameter_shapes.values()) * itemsize
        # A step reads the parameters forward and backward, writes gradients; SGD reads both and writes one.
        return total._replace(fixed_bytes=size * (1 if direction == FORWARD else 6))


Case = ConvCase | LinearCase | NetworkCase


@dataclass(frozen=True)
class Work:
    """One comparison.

    Attributes:
        case: operator or network.
        batch: images (rows) a call.
        dtype: of parameters and data.
        precision: of float32 products: ``"ieee"`` or ``"tf32"``; ``"bf16"`` where `dtype` is bfloat16.
        direction: ``"forward"``, ``"backward"``, ``"forward_backward"``, ``"train_step"``.
        level: ``"call"`` times calls from Python, back to back; ``"kernel"`` the GPU alone, as one CUDA graph of them.
        compiled: whether torch.compile's modes compete.
        memory: whether peak memory is measured, if that needs a separate process (on a CPU).
    """

    case: Case
    batch: int
    dtype: torch.dtype = torch.float32
    precision: str = "ieee"
    direction: str = FORWARD
    level: str = CALL
    compiled: bool = False
    memory: bool = False

    @property
    def name(self) -> str:
        """The work without batch, dtype and direction."""
        operator = {ConvCase: "conv2d_relu_max_pool2d ", LinearCase: "linear_relu "}
        return operator.get(type(self.case), "") + self.case.name

    @property
    def label(self) -> str:
        """The comparison's name in messages, and for ``--filter``."""
        level = " kernel" if self.level == KERNEL else ""
        return f"{self.name} {self.direction} {self.batch} {self.precision}{level}"

    @property
    def cost(self) -> Cost:
        """The least cost."""
        return self.case.cost(self.direction, self.dtype.itemsize)

    @property
    def input_grad(self) -> bool:
        """Whether the input's gradient is asked for."""
        return self.direction in (BACKWARD, BOTH) and self.case.input_grad  # type: ignore[union-attr]

    @property
    def epsilon(self) -> float:
        """One rounding step of the products or of the result, whichever is coarser."""
        return 2.0**-10 if self.precision == "tf32" else torch.finfo(self.dtype).eps

    @property
    def step(self) -> float:
        """The error that rounding of products allows: a step for each product of the longest chain to a result.

        0 if results themselves are rounded as coarsely. A network's products follow each other; those of its backward
        come after.
        """
        if self.precision != "tf32":
            return 0.0
        chain = 1
        if isinstance(self.case, NetworkCase):
            chain = self.case.products * (2 if self.direction == TRAIN_STEP else 1)
        return chain * self.epsilon


@dataclass(frozen=True)
class Data:
    """The data of all implementations of a comparison.

    Attributes:
        parameters: by name.
        sets: 2 to 16 pairs (input, target), used in turn, so many that their calls touch twice the size of the
            last-level cache. The target is the upstream gradient, or the labels of a training step.
    """

    parameters: dict[str, Tensor]
    sets: list[tuple[Tensor, Tensor]]

    def to(self, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format) -> Data:
        """Convert values, and give four-dimensional ones the layout `memory_format`."""

        def convert(tensor: Tensor) -> Tensor:
            layout = memory_format if tensor.dim() == 4 else torch.preserve_format
            return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, memory_format=layout, copy=True)

        parameters = {name: convert(value) for name, value in self.parameters.items()}
        return Data(parameters, [(convert(x), convert(target)) for x, target in self.sets])


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache that rotating sets of data must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=32 * 2**20)


def setup(work: Work, device: torch.device, cache_bytes: int, *, choose: bool = True) -> Data:
    """Make the data of a comparison, the same in every run.

    If rounding decides which cell of a window wins, or whether a relu is open, two correct gradients differ by far more
    than a rounding step. So gradients are compared only where such decisions are clear: elsewhere the upstream gradient
    of an operator is zero, and the images of a float32 training step are chosen accordingly. (In tf32 and bfloat16
    every image has unclear decisions. There the measure is stock's error against the reference, which has such cases
    too.) Without `choose` the images are not chosen.
    """
    generator = torch.Generator(device).manual_seed(1998)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    parameters = {
        # He's initialisation keeps values near 1 in all layers. The bias is small but never zero.
        name: (random(*shape) * (math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1)).to(work.dtype)
        for name, shape in work.case.parameter_shapes.items()
    }
    parameters |= {n: value + 1 for n, value in parameters.items() if n.startswith("norm") and n.endswith("weight")}
    exact = {name: value.double() for name, value in parameters.items()}
    bytes_of_call = work.batch * work.cost.bytes + work.cost.fixed_bytes
    count = max(2, parity_sets(work), min(16, math.ceil(2 * cache_bytes / bytes_of_call)))
    sets = []
    for _ in range(count):
        input = random(work.batch, *work.case.input_shape).to(work.dtype)
        if work.direction == TRAIN_STEP:
            # Under BatchNorm an image's decisions depend on the whole batch, so images are not chosen.
            if choose and work.precision == "ieee" and not work.case.norm:  # type: ignore[union-attr]
                _replace_undecided(input, work, exact, random)
            target = torch.randint(10, (work.batch,), generator=generator, device=device)
        else:
            target = random(work.batch, *work.case.output_shape).to(work.dtype)
            if work.direction != FORWARD:
                target.masked_fill_(work.case.undecided(input.double(), exact, work.epsilon), 0)
        sets.append((input, target))
    return Data(parameters, sets)


def _replace_undecided(input: Tensor, work: Work, parameters: dict[str, Tensor], random) -> None:
    """Draw again, in place, the images with a decision that rounding may change."""
    # One image at a time has its own root mean square, so judge by twice the step to be safe in any batch.
    open_images = torch.arange(len(input), device=input.device)
    while len(open_images):
        wrong = work.case.undecided(input[open_images].double(), parameters, 2 * work.epsilon)
        open_images = open_images[wrong]
        input[open_images] = random(len(open_images), *input.shape[1:]).to(input.dtype)


def parity_sets(work: Work) -> int:
    """How many sets the accuracy check runs. Small batches are judged together, otherwise chance would decide."""
    return max(1, min(16, 64 // work.batch))


LENET = NetworkCase(
    "LeNet",
    (ConvCase("LeNet.conv1", 1, 32, 6, 5, input_grad=False), ConvCase("LeNet.conv2", 6, 14, 16, 5)),
    (400, 120, 84, 10),
)


def _network(
    name: str, size: int, channels: tuple[int, ...], kernel: int, hidden: tuple[int, ...], **options: Any
) -> NetworkCase:
    """Make a network of equal convolutions, each followed by a 2x2 pool."""
    norm = options.pop("norm", False)
    cases: list[ConvCase] = []
    for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
        case = ConvCase(f"{name}.conv{number}", inputs, size, outputs, kernel, input_grad=number > 1, **options)
        cases.append(case)
        size = case.output_shape[1]
    return NetworkCase(name, tuple(cases), (math.prod(cases[-1].output_shape), *hidden, 10), norm)


# Networks as courses and tutorials have them.
CLASSROOM = (
    _network("digits 5x5", 28, (1, 10, 20), 5, (50,)),
    _network("digits 3x3", 28, (1, 32, 64), 3, (128,)),
    _network("digits padded", 28, (1, 6, 16), 5, (120, 84), padding=2),
    _network("digits norm", 28, (1, 16, 32), 3, (64,), padding=1, norm=True),
    _network("colour 5x5", 32, (3, 6, 16), 5, (120, 84)),
    _network("colour 3x3", 32, (3, 16, 32, 64), 3, (64,), padding=1),
    _network("colour norm", 32, (3, 32, 64), 5, (128,), padding=2, norm=True),
)

# LeNet's own operators; batches as in the network.
LENET_OPERATORS: tuple[Case, ...] = (
    replace(LENET.convolutions[0], batch=1024),
    replace(LENET.convolutions[1], batch=1024),
    LinearCase("LeNet.fc1", 400, 120),
    LinearCase("LeNet.fc2", 120, 84),
)

# Others, at batches that take a CPU some ten milliseconds. A GPU gets 16 times as many images.
OTHER_OPERATORS: tuple[Case, ...] = (
    ConvCase("MNIST.conv1", 1, 28, 32, 3, input_grad=False, batch=128),
    ConvCase("MNIST.conv2", 32, 13, 64, 3, batch=128),
    ConvCase("CIFAR.conv1", 3, 32, 32, 5, padding=2, pool=3, input_grad=False, batch=64),
    ConvCase("CIFAR.conv2", 32, 16, 64, 3, padding=1, batch=64),
    ConvCase("AlexNet.conv1", 3, 224, 64, 11, 4, 2, pool=3, input_grad=False, batch=8),
    ConvCase("ResNet.stem", 3, 224, 64, 7, 2, 3, pool=3, pool_padding=1, input_grad=False, batch=4),
    ConvCase("VGG.64", 64, 32, 64, 3, padding=1, batch=16),
    ConvCase("VGG.256", 128, 16, 256, 3, padding=1, batch=16),
    ConvCase("kernel.1x1", 64, 28, 64, 1, batch=32),
    ConvCase("kernel.15x15", 3, 48, 16, 15, padding=7, batch=16),
    LinearCase("linear.84", 84, 84, batch=1024),
    LinearCase("linear.784to512", 784, 512, batch=512),
    LinearCase("linear.4096", 4096, 4096, batch=32),
)


def suite(name: str, device_type: str) -> Iterator[Work]:
    """List the comparisons of a suite, the most important first.

    Args:
        name: ``"quick"``, ``"full"``, or ``"networks"``: LeNet and other small networks, at usual batches.
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    full, gpu = name == "full", device_type == "cuda"
    if name == "networks":
        for case in (LENET, *CLASSROOM):
            for direction, batches in ((TRAIN_STEP, (32, 128, 512)), (FORWARD, (1, 32, 512))):
                for batch in batches:
                    yield Work(case, batch, direction=direction, compiled=True)
        return
    modes = [(torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "bf16")]
    if not gpu:
        modes.remove((torch.float32, "tf32"))
    main_mode = modes[0]
    inference = (1024, 64, 1, 32, 512, 8192) if not (full or gpu) else (8192, 1, 64, 1024, 65536)
    steps = (1024, 64, 32, 1, 8192) if not gpu else (8192, 64, 1024, 1)
    for mode in modes:
        for direction, batches in ((TRAIN_STEP, steps), (FORWARD, inference)):
            # On a small machine bfloat16 is measured at one batch.
            for batch in batches if full or gpu or mode == main_mode else batches[:1]:
                # Each mode of torch.compile compiles for many seconds, so a GPU's quick suite has three headlines.
                headline = mode == main_mode and (not gpu or batch in ((64, 8192) if direction != FORWARD else (8192,)))
                work = Work(LENET, batch, *mode, direction, compiled=full or headline)
                yield replace(work, memory=direction == TRAIN_STEP and batch == 8192)
                # A training step has no kernel level: each call in one graph would start from the last one's weights.
                if gpu and direction == FORWARD and (full or batch in (1, 64, 8192)):
                    yield replace(work, level=KERNEL, compiled=False)
    every = (FORWARD, BACKWARD, BOTH)
    for mode in modes if full or gpu else [main_mode]:
        groups = [(LENET_OPERATORS, 8, every)]
        if full or mode == main_mode:
            groups.append((OTHER_OPERATORS, 16, every if full else (FORWARD, BOTH)))
        for cases, factor, directions in groups:
            for case in cases:
                for direction in directions:
                    work = Work(case, case.batch * (factor if gpu else 1), *mode, direction, compiled=full)
                    yield work
                    if gpu:
                        yield replace(work, level=KERNEL, compiled=False)
