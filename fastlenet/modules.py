"""The fused operators as layers: drop-in subclasses of ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet.functional import autocast, conv2d_relu_max_pool2d, linear_relu
from fastlenet.kernels.geometry import ConvPoolGeometry, Pair
from fastlenet.ops import CONV2D_RELU_MAX_POOL2D
from fastlenet.selection import run

__all__ = ["ConvReLUMaxPool2d", "LinearReLU"]


# torch.fx looks a name up where it is used, so that the wrapping in fastlenet.functional does not reach here.
torch.fx.wrap("conv2d_relu_max_pool2d")
torch.fx.wrap("linear_relu")


class ConvReLUMaxPool2d(nn.Conv2d):
    """An ``nn.Conv2d`` followed by relu and ``nn.MaxPool2d``, computed by one fused operator.

    Parameters, initial values and state_dict are those of ``nn.Conv2d``. See
    `fastlenet.functional.conv2d_relu_max_pool2d` for shapes, dtypes and errors.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the convolution's kernel, an int or a pair (height, width), as all sizes below.
        stride: step of the convolution.
        padding: zeros added on each side, or ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: number of groups of channels, each convolved by itself.
        bias: whether to learn a bias.
        pool_size: size of the pooling window.
        pool_stride: step of the window; `pool_size` by default.
        pool_padding: cells added on each side, which never win.
        pool_dilation: spacing between a window's cells.
        ceil_mode: whether to pool windows that reach beyond the end too.
        device: where the parameters live.
        dtype: the parameters' type.

    Examples:
        >>> import torch, fastlenet
        >>> pool = {"pool_size": 3, "pool_stride": 2}
        >>> layer = fastlenet.ConvReLUMaxPool2d(3, 8, 3, padding=1, **pool)
        >>> layer(torch.randn(4, 3, 28, 28)).shape
        torch.Size([4, 8, 13, 13])
        >>> torch.nn.Conv2d(3, 8, 3, padding=1).load_state_dict(layer.state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        pool_size: int | tuple[int, ...] = 2,
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
        pool_dilation: int | tuple[int, ...] = 1,
        ceil_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_dilation = pool_dilation
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in_channels, H, W), or unbatched (in_channels, H, W), to the pooled output."""
        if type(input) is Tensor and 3 <= input.dim() <= 4 and not torch.compiler.is_compiling():
            weight, bias, geometry = self.weight, self.bias, prepared(self)
            if geometry is not None and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
                return run(CONV2D_RELU_MAX_POOL2D, geometry, *autocast(input, weight, bias))
        return conv2d_relu_max_pool2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            ceil_mode=self.ceil_mode,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `prepared` keeps."""
        return {name: value for name, value in super().__getstate__().items() if name != "_prepared"}

    def extra_repr(self) -> str:
        """Describe the convolution as ``nn.Conv2d`` does, then the pool."""
        pool = [f"pool_size={self.pool_size}"]
        defaults: dict[str, Any] = {"pool_stride": self.pool_size, "pool_padding": 0, "pool_dilation": 1}
        pool += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.ceil_mode:
            pool.append("ceil_mode=True")
        return ", ".join([super().extra_repr(), *pool])


_FIELDS = (
    "stride", "padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode",
)  # fmt: skip
_fields = operator.itemgetter(*_FIELDS)


def prepared(layer: nn.Module) -> ConvPoolGeometry | None:
    """Return the geometry of a `ConvReLUMaxPool2d`, read once, and again when an attribute is another object.

    Attributes that could change in place, such as lists, are not read: then it returns None.
    """
    attributes = layer.__dict__
    compiling = torch.compiler.is_compiling()  # TorchDynamo cannot look into an itemgetter, and keeps what it found
    try:
        fields = tuple([attributes[name] for name in _FIELDS]) if compiling else _fields(attributes)
        known = None if compiling else attributes.get("_prepared")
    except KeyError:  # a class's own attributes, or another class that borrows the forward
        return None
    if known is not None and all(map(operator.is_, fields, known[0])):
        return known[1]
    conv, groups, pool, ceil_mode = [*map(_pair, fields[:3])], fields[3], [*map(_pair, fields[4:8])], fields[8]
    if None in conv or None in pool or type(groups) is not int or type(ceil_mode) is not bool:
        return None
    geometry = ConvPoolGeometry(*conv, groups, *pool, ceil_mode)
    if not compiling:
        attributes["_prepared"] = fields, geometry
    return geometry


def _pair(value: Any) -> Pair | None:
    """Read an int, a pair of ints or ``"valid"`` as (height, width); None for any other value."""
    if type(value) is int:
        return value, value
    plain = type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int
    return value if plain else (0, 0) if type(value) is str and value == "valid" else None


class LinearReLU(nn.Linear):
    """An ``nn.Linear`` followed by relu, computed by one fused operator.

    Parameters, initial values and state_dict are those of ``nn.Linear``. `fastlenet.functional.linear_relu` says which
    shapes and dtypes it takes.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to learn a bias.
        device: where the parameters live.
        dtype: the parameters' type.

    Examples:
        >>> import torch, fastlenet
        >>> fastlenet.LinearReLU(20, 30)(torch.randn(128, 20)).shape
        torch.Size([128, 30])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(*, in_features)`` to ``(*, out_features)``."""
        return linear_relu(input, self.weight, self.bias)
