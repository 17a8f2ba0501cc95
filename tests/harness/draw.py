"""Hypothesis strategies: calls of the operators, and the layouts of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.cases import DTYPES, AddmmCase, ConvCase, Tensors, conv_case
from harness.fuzz import st
from harness.strides import KINDS, SAME_VALUES, awkward

__all__ = ["Drawn", "addmm_calls", "conv_calls"]


@dataclass
class Drawn:
    """A call: its case, dtype, the layout of each tensor and of the upstream gradient, and the kind of numbers."""

    case: ConvCase | AddmmCase
    dtype: torch.dtype
    kinds: dict[str, str]
    exact: bool
    seed: int

    def tensors(self, device: torch.device | str = "cpu") -> Tensors:
        """The call's tensors, in their layouts."""
        generator = torch.Generator().manual_seed(self.seed)
        make = self.case.exact if self.exact else self.case.random
        return {
            name: None if tensor is None else awkward(tensor, _legal(tensor, self.kinds[name]))
            for name, tensor in make(self.dtype, generator, device).items()
        }

    def grad_kind(self, dim: int) -> str:
        """The layout of an upstream gradient of `dim` dimensions."""
        kind = self.kinds["grad"]
        return "contiguous" if kind == "channels_last" and dim != 4 else kind


def _legal(tensor: torch.Tensor, kind: str) -> str:
    if (kind == "channels_last" and tensor.dim() != 4) or (kind == "expanded" and tensor.dim() == 0):
        return "contiguous"
    return kind


def _pairs(low: int, high: int) -> Any:
    """An int or a pair of them."""
    number = st.integers(low, high)
    return st.one_of(number, st.tuples(number, number))


def _drawn(
    draw: Any, case: ConvCase | AddmmCase, names: tuple[str, ...], dtypes: Sequence[torch.dtype] = DTYPES
) -> Drawn:
    exact = draw(st.booleans())
    # A tensor that repeats one number leaves the exact grid: its sums have no random signs.
    kinds = st.sampled_from(SAME_VALUES if exact else KINDS)
    return Drawn(
        case,
        draw(st.sampled_from(dtypes)),
        {name: draw(kinds) for name in (*names, "grad")},
        exact,
        draw(st.integers(0, 2**16)),
    )


if hasattr(st, "composite"):

    @st.composite
    def conv_calls(draw: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> Drawn:
        """Any legal call of conv2d_relu_max_pool2d at small sizes."""
        groups = draw(st.integers(1, 3))
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        dilation, pool_size = draw(_pairs(1, 3)), draw(_pairs(1, 4))
        padding = draw(st.one_of(_pairs(0, 3), st.sampled_from(["same", "valid"])))
        keywords = {
            "stride": 1 if padding == "same" else draw(_pairs(1, 3)),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "pool_size": pool_size,
            "pool_stride": draw(st.one_of(st.none(), _pairs(1, 4))),
            "ceil_mode": draw(st.booleans()),
        }
        if draw(st.booleans()):
            keywords["pool_dilation"] = draw(_pairs(1, 2))
        else:  # both at once can leave a window without a single cell, which has a test of its own
            smallest = min(pool_size) if isinstance(pool_size, tuple) else pool_size
            keywords["pool_padding"] = draw(_pairs(0, smallest // 2))
        geometry = conv_case("", (1,), (1, 1, *kernel), **keywords).geometry
        size = []
        for i in (0, 1):
            window = geometry.pool_dilation[i] * (geometry.pool_size[i] - 1) + 1 - 2 * geometry.pool_padding[i]
            reach = geometry.dilation[i] * (kernel[i] - 1) + 1
            zeros = reach - 1 if padding == "same" else 2 * geometry.padding[i]
            fits = (max(1, window) - 1) * geometry.stride[i] + reach - zeros
            size.append(max(1, fits) + draw(st.integers(0, 7)))
        in_channels, out_channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        batch = draw(st.sampled_from([(), (1,), (2,), (3,)]))
        case = conv_case(
            "drawn",
            (*batch, groups * in_channels, *size),
            (groups * out_channels, in_channels, *kernel),
            bias=draw(st.booleans()),
            **keywords,
        )
        return _drawn(draw, case, ("input", "weight", "bias"), dtypes)

    @st.composite
    def addmm_calls(draw: Any) -> Drawn:
        """Any legal call of addmm_relu at small sizes."""
        m, k, n = (draw(st.integers(0, 40)) for _ in range(3))
        addend = draw(st.sampled_from([None, (n,), (1, n), (m, 1), (1, 1), (), (m, n)]))
        factors = st.sampled_from([1, 0.5, -2, 0])
        beta, alpha = (1, 1) if addend is None else (draw(factors), draw(factors))
        return _drawn(draw, AddmmCase("drawn", m, k, n, addend, beta, alpha), ("input", "mat1", "mat2"))

else:  # without hypothesis the tests that draw are skipped
    conv_calls = addmm_calls = st
