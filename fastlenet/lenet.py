"""LeNet for 32x32 images, once with the fused layers and once in plain ``torch.nn``.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998; with relu and
max-pooling, as PyTorch's tutorials have it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlenet import functional
from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, Links
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU, prepared
from fastlenet.private import has_global_hook

__all__ = ["LeNet", "StockLeNet"]


class StockLeNet(nn.Module):
    """LeNet for 32x32 images in plain ``torch.nn``. Tests, benchmarks and the demo compare `LeNet` with it.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.

    Examples:
        >>> import fastlenet
        >>> fastlenet.StockLeNet().load_state_dict(fastlenet.LeNet().state_dict())
        <All keys matched successfully>
    """

    _convolution: type[nn.Conv2d] = nn.Conv2d
    _linear: type[nn.Linear] = nn.Linear

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = self._convolution(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = self._convolution(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = self._linear(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = self._linear(120, 84, device=device, dtype=dtype)
        self.fc3 = nn.Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, in_channels, 32, 32), or one unbatched, to logits (N, num_classes)."""
        features = F.max_pool2d(F.relu(self.conv1(input)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        hidden = F.relu(self.fc1(features.flatten(-3)))
        return self.fc3(F.relu(self.fc2(hidden)))


class LeNet(StockLeNet):
    """LeNet for 32x32 images, built of fused layers that run as one chain: on a GPU as three kernels.

    The layers run one by one under torch.export, and under torch.compile in PyTorch 2.11. They also do if one of them
    has hooks or parametrizations or was replaced.

    The state_dict is interchangeable with that of `StockLeNet` in both directions. With the same seed both start from
    the same weights.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.

    Examples:
        >>> import torch, fastlenet
        >>> fastlenet.LeNet()(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    _convolution = ConvReLUMaxPool2d
    _linear = LinearReLU

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, in_channels, 32, 32), or one unbatched, to logits (N, num_classes)."""
        # torch.fx traces with stand-ins for tensors, and a global module hook must see each layer.
        if type(input) is Tensor and not torch.compiler.is_exporting() and not has_global_hook():
            modules = self._modules
            chain = chain_of(*[modules.get(name) for name in LAYERS])
            if chain is not None:
                return functional.chain(input, *chain)
        features = self.conv2(self.conv1(input)).flatten(-3)
        return self.fc3(self.fc2(self.fc1(features)))


LAYERS = "conv1", "conv2", "fc1", "fc2", "fc3"


def chain_of(*layers: nn.Module | None) -> tuple[list[Tensor | None], Links] | None:
    """Return the parameters and links of the network; None if one of its layers was changed.

    A parametrized layer is of another type. A layer with hooks, or with its own forward, must be called by itself.
    """
    links: list[Any] = []
    parameters: list[Tensor | None] = []
    for layer, kind in zip(layers, _KINDS, strict=True):
        if layer is None or type(layer) is not kind:
            return None
        state = layer.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return None
        own = state["_parameters"]
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None:
            return None
        # Stock broadcasts the bias of a linear map.
        if kind is not ConvReLUMaxPool2d and bias is not None and bias.shape != weight.shape[:1]:
            return None
        parameters += weight, bias
        links.append(prepared(layer) if kind is ConvReLUMaxPool2d else LINEAR if kind is nn.Linear else LINEAR_RELU)
    return None if None in links else (parameters, tuple(links))


_KINDS = ConvReLUMaxPool2d, ConvReLUMaxPool2d, LinearReLU, LinearReLU, nn.Linear
