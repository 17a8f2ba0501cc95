"""The designed grid: every kind of call that the operators promise to support, at sizes an interpreter can afford.

The kernel tests and the ATen tests run the same cases. Each exists for a reason, which its name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fastlenet.kernels.geometry import ConvPoolGeometry

from harness.judge import exact_grid

__all__ = [
    "ADDMM_CASES",
    "BIG_WINDOW",
    "CONV_CASES",
    "DTYPES",
    "SHIPPED_ADDMM",
    "SHIPPED_CONV",
    "TOO_BIG_WINDOW",
    "AddmmCase",
    "ConvCase",
    "Tensors",
    "addmm_cases",
    "conv_case",
    "conv_cases",
    "dtypes",
    "pair",
    "parametrize_dtypes",
    "wide_and_narrow",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Tensors = dict[str, torch.Tensor | None]


def parametrize_dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    """Parametrise a test over dtypes, as ``dtype``."""
    return pytest.mark.parametrize("dtype", chosen, ids=[str(d).removeprefix("torch.") for d in chosen])


dtypes = parametrize_dtypes(*DTYPES)
wide_and_narrow = parametrize_dtypes(torch.float32, torch.bfloat16)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a hyper-parameter."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Case:
    """What both kinds of case do with the shapes of their tensors."""

    name: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        raise NotImplementedError

    @property
    def terms(self) -> int:
        raise NotImplementedError

    def random(
        self, dtype: torch.dtype, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensors:
        """Tensors of normally distributed numbers, None where the case has no tensor."""
        return {
            name: None if shape is None else torch.randn(shape, generator=generator).to(device, dtype)
            for name, shape in self.shapes.items()
        }

    def exact(
        self, dtype: torch.dtype, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensors:
        """Tensors on the exact grid, where every order of summation gives the same result and ties abound."""
        return {
            name: None if shape is None else exact_grid(shape, dtype, generator, terms=self.terms, device=device)
            for name, shape in self.shapes.items()
        }


@dataclass(frozen=True)
class ConvCase(_Case):
    """A call of conv2d_relu_max_pool2d: shapes, and keyword arguments as a user would write them."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    keywords: dict[str, Any] = field(default_factory=dict)
    bias: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shapes of the call's tensors, by argument name."""
        return {"input": self.input, "weight": self.weight, "bias": self.weight[:1] if self.bias else None}

    @property
    def conv_keywords(self) -> dict[str, Any]:
        """The convolution's keyword arguments."""
        return {
            name: value for name, value in self.keywords.items() if name in ("stride", "padding", "dilation", "groups")
        }

    @property
    def geometry(self) -> ConvPoolGeometry:
        """The window arithmetic of the pool; the convolution's padding stands as (0, 0) where it is named."""
        get = self.keywords.get
        padding, size = get("padding", 0), get("pool_size", 2)
        return ConvPoolGeometry(
            pair(get("stride", 1)),
            (0, 0) if isinstance(padding, str) else pair(padding),
            pair(get("dilation", 1)),
            get("groups", 1),
            pair(size),
            pair(get("pool_stride") or size),
            pair(get("pool_padding", 0)),
            pair(get("pool_dilation", 1)),
            get("ceil_mode", False),
        )

    @property
    def terms(self) -> int:
        """The most products that any result of the call sums, for `exact_grid`."""
        out_channels, in_channels, *kernel = self.weight
        batch = self.input[0] if len(self.input) == 4 else 1
        taps, size = kernel[0] * kernel[1], self.input[-1] * self.input[-2]
        cover = self.geometry.window_size  # overlapping windows can all choose one cell
        return max(in_channels * taps + 1, cover * taps * out_channels // self.geometry.groups, batch * size)


def conv_case(name: str, input: tuple[int, ...], weight: tuple[int, ...], *, bias: bool = True, **keywords: Any):
    """Write a `ConvCase` like a call."""
    return ConvCase(name, input, weight, keywords, bias)  # type: ignore[arg-type]


BIG_WINDOW = conv_case("window of 15x17 cells", (1, 2, 17, 20), (3, 2, 2, 2), pool_size=(15, 17), pool_stride=(1, 2))

# No kernel covers it: ATen alone.
TOO_BIG_WINDOW = conv_case("window of 256 cells", (1, 2, 18, 18), (3, 2, 2, 2), pool_size=16, pool_stride=1)

CONV_CASES = [
    conv_case("LeNet conv1", (2, 1, 32, 32), (6, 1, 5, 5)),
    conv_case("LeNet conv2", (2, 6, 14, 14), (16, 6, 5, 5)),
    conv_case("1x1 kernel", (2, 3, 6, 6), (4, 3, 1, 1)),
    conv_case("one pixel", (2, 3, 1, 1), (4, 3, 1, 1), pool_size=1),
    conv_case("kernel as large as the input", (3, 2, 7, 7), (4, 2, 7, 7), pool_size=1),
    conv_case("one pooled cell", (3, 2, 6, 6), (4, 2, 3, 3), pool_size=4),
    conv_case("odd sizes", (3, 3, 13, 11), (5, 3, 3, 3)),
    conv_case("non-square image and kernel", (2, 2, 9, 16), (5, 2, 4, 3)),
    conv_case(
        "non-square everything",
        (2, 2, 21, 17),
        (5, 2, 3, 4),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        pool_size=(2, 3),
        pool_stride=(3, 2),
        pool_padding=(0, 1),
        pool_dilation=(2, 1),
        ceil_mode=True,
    ),
    conv_case("stride", (2, 2, 15, 14), (4, 2, 3, 3), stride=2),
    conv_case("stride beyond the kernel", (2, 2, 17, 14), (4, 2, 2, 1), stride=(3, 2)),
    conv_case("padding", (2, 2, 8, 7), (4, 2, 3, 3), padding=1),
    conv_case("uneven pair of paddings", (2, 2, 8, 7), (4, 2, 3, 3), padding=(2, 0)),
    conv_case("padding of the kernel's size", (1, 2, 3, 4), (3, 2, 2, 2), padding=2),
    conv_case("same padding, even kernel", (2, 2, 8, 7), (4, 2, 4, 2), padding="same"),
    conv_case("same padding, dilated", (2, 2, 8, 9), (4, 2, 3, 2), padding="same", dilation=(2, 3)),
    conv_case("valid padding", (2, 2, 8, 7), (4, 2, 3, 3), padding="valid"),
    conv_case("dilation", (2, 2, 14, 15), (4, 2, 3, 3), dilation=(2, 3)),
    conv_case("two groups", (2, 4, 8, 9), (6, 2, 3, 3), groups=2),
    conv_case("depthwise", (2, 4, 8, 8), (4, 1, 3, 3), groups=4, padding=1),
    conv_case("depthwise with multiplier", (2, 3, 8, 8), (6, 1, 3, 3), groups=3, bias=False),
    conv_case("overlapping pool 3/2", (2, 2, 11, 12), (4, 2, 3, 3), pool_size=3, pool_stride=2),
    conv_case("overlapping pool 3/1", (2, 2, 8, 9), (4, 2, 3, 3), pool_size=3, pool_stride=1),
    conv_case("AlexNet", (1, 3, 27, 31), (4, 3, 11, 11), stride=4, padding=2, pool_size=3, pool_stride=2),
    conv_case("pool stride beyond its size", (2, 2, 13, 14), (4, 2, 3, 3), pool_size=2, pool_stride=(3, 4)),
    conv_case("pool 1x1", (2, 2, 7, 8), (4, 2, 3, 3), pool_size=1),
    BIG_WINDOW,
    conv_case("pool padding", (2, 2, 9, 10), (4, 2, 3, 3), pool_size=3, pool_stride=2, pool_padding=1),
    conv_case("pool dilation", (2, 2, 11, 13), (4, 2, 3, 3), pool_size=(2, 3), pool_stride=2, pool_dilation=(3, 2)),
    conv_case("ceil mode overhangs", (2, 2, 9, 10), (4, 2, 3, 3), pool_size=(2, 3), ceil_mode=True),
    conv_case(
        "ceil mode drops a window in the padding",
        (2, 2, 7, 8),
        (4, 2, 3, 3),
        pool_size=(2, 3),
        pool_stride=(2, 4),
        pool_padding=1,
        ceil_mode=True,
    ),
    conv_case("unbatched", (2, 9, 8), (4, 2, 3, 3)),
    conv_case("empty batch", (0, 2, 9, 8), (4, 2, 3, 3)),
    conv_case("no bias", (2, 3, 8, 9), (4, 3, 3, 3), bias=False),
    conv_case("17 output channels", (2, 3, 8, 8), (17, 3, 3, 3)),
    conv_case("more channels than a tile", (1, 2, 8, 8), (70, 2, 3, 3)),
    conv_case("deep kernel", (1, 64, 5, 5), (8, 64, 3, 3)),
]

# Several programs and partial tiles in every dimension of the tiles that ship (see test_shipped_tiles_*).
SHIPPED_CONV = [
    conv_case("two tiles of rows, channels and depth", (2, 70, 4, 5), (5, 70, 2, 2)),
    conv_case("two tiles of output channels", (2, 2, 7, 8), (70, 2, 3, 3), pool_size=(2, 1), pool_stride=(2, 2)),
    conv_case("several parts", (8, 3, 15, 13), (6, 3, 3, 3), stride=1, pool_size=2),
    conv_case("groups, overlap and all else", (2, 6, 9, 8), (40, 3, 2, 3), groups=2, stride=(1, 2), padding=1,
              dilation=(2, 1), pool_size=3, pool_stride=(2, 1), pool_padding=1, ceil_mode=True),
]  # fmt: skip


@dataclass(frozen=True)
class AddmmCase(_Case):
    """A call of addmm_relu; without `addend` the call of linear_relu without bias that ends in the same kernel."""

    name: str
    m: int
    k: int
    n: int
    addend: tuple[int, ...] | None
    beta: float = 1
    alpha: float = 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shapes of the call's tensors, by argument name."""
        return {"input": self.addend, "mat1": (self.m, self.k), "mat2": (self.k, self.n)}

    @property
    def keywords(self) -> dict[str, Any]:
        """The call's keyword arguments."""
        return {"beta": self.beta, "alpha": self.alpha}

    @property
    def terms(self) -> int:
        """The most products that any result of the call sums, for `exact_grid`."""
        # Factors of up to 2 make the terms four times as large in square; a broadcast addend sums all of M x N.
        return 4 * max(self.k + 1, self.m, self.n, self.m * self.n if self.addend is not None else 1)


ADDMM_CASES = [
    AddmmCase("LeNet fc1", 4, 400, 120, (120,)),
    AddmmCase("LeNet fc2", 3, 120, 84, (84,)),
    AddmmCase("one element", 1, 1, 1, (1,)),
    AddmmCase("one row", 1, 33, 17, (17,)),
    AddmmCase("one column", 19, 7, 1, (1,)),
    AddmmCase("depth 1", 5, 1, 6, (6,)),
    AddmmCase("depth 0", 3, 0, 4, (4,)),
    AddmmCase("empty batch", 0, 5, 3, (3,)),
    AddmmCase("no columns", 3, 5, 0, (0,)),
    AddmmCase("no addend", 6, 20, 9, None),
    AddmmCase("row addend", 6, 20, 9, (1, 9)),
    AddmmCase("column addend", 6, 20, 9, (6, 1)),
    AddmmCase("scalar addend", 6, 20, 9, ()),
    AddmmCase("1x1 addend", 6, 20, 9, (1, 1)),
    AddmmCase("full addend", 6, 20, 9, (6, 9)),
    AddmmCase("bias as square as the output", 9, 20, 9, (9,)),
    AddmmCase("beta and alpha", 6, 20, 9, (9,), beta=0.5, alpha=-2),
    AddmmCase("beta and alpha, full addend", 6, 20, 9, (6, 9), beta=-2, alpha=0.5),
    AddmmCase("beta 0", 6, 20, 9, (9,), beta=0),
    AddmmCase("alpha 0", 6, 20, 9, (9,), alpha=0),
    AddmmCase("more columns than a tile", 17, 33, 70, (70,)),
]

SHIPPED_ADDMM = [
    AddmmCase("partial tiles everywhere", 67, 70, 71, (71,)),
    AddmmCase("several parts", 250, 5, 20, (20,)),
    AddmmCase("full addend", 67, 18, 65, (67, 65), beta=0.5, alpha=-2),
]


def conv_cases(cases: Sequence[ConvCase] = CONV_CASES, *, without: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrise a test over convolution cases, as ``case``."""
    chosen = [case for case in cases if case.name not in without]
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


def addmm_cases(cases: Sequence[AddmmCase] = ADDMM_CASES) -> pytest.MarkDecorator:
    """Parametrise a test over addmm cases, as ``case``."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])
