"""LeNet for 32x32 images, once with the fused layers and once in plain ``torch.nn``.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998; with relu and
max-pooling, as PyTorch's tutorials have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlenet.backend import use_triton
from fastlenet.functional import mlp
from fastlenet.kernels.geometry import WIDEST_LAYER
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU

__all__ = ["LeNet", "StockLeNet"]


class LeNet(nn.Module):
    """LeNet built of fused layers: two kernels for its convolutional part and, on Triton, one for its linear layers.

    Its linear layers run one by one on ATen, under torch.compile and torch.export, and where somebody may watch or has
    changed one of them (hooks, parametrizations, other modules in their places).

    Its state_dict is interchangeable with `StockLeNet`'s in both directions, and with the same seed both start from
    the same weights.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.

    Example:
        >>> import torch, fastlenet
        >>> fastlenet.LeNet()(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvReLUMaxPool2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = ConvReLUMaxPool2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = LinearReLU(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = LinearReLU(120, 84, device=device, dtype=dtype)
        self.fc3 = nn.Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, in_channels, 32, 32), or one unbatched, to logits (N, num_classes)."""
        features = self.conv2(self.conv1(input)).flatten(-3)
        if not self._head_is_one_operator(features):
            return self.fc3(self.fc2(self.fc1(features)))
        fc1, fc2, fc3 = self.fc1, self.fc2, self.fc3
        return mlp(features, fc1.weight, fc1.bias, fc2.weight, fc2.bias, fc3.weight, fc3.bias)

    def _head_is_one_operator(self, features: Tensor) -> bool:
        """Whether the linear layers may be computed as one, which nobody can tell but by the clock."""
        return (
            not torch.compiler.is_compiling()
            # torch.fx traces with stand-ins for tensors.
            and isinstance(features, Tensor)
            and use_triton(features)
            and _is_plain(self.fc1, LinearReLU)
            and _is_plain(self.fc2, LinearReLU)
            and _is_plain(self.fc3, nn.Linear)
            and not torch.nn.modules.module._has_any_global_hook()
        )


def _is_plain(layer: nn.Module, kind: type[nn.Linear]) -> bool:
    """Whether a layer is what LeNet made it, narrow enough for the fused head, and without hooks."""
    # A parametrized layer is of another type; one made by older means has a hook.
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        type(layer) is kind
        and bias is not None
        and weight is not None
        and weight.shape[0] <= WIDEST_LAYER
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


class StockLeNet(nn.Module):
    """The same network in plain ``torch.nn``: what tests, benchmarks and the demo compare `LeNet` with.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.

    Example:
        >>> import fastlenet
        >>> fastlenet.StockLeNet().load_state_dict(fastlenet.LeNet().state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = nn.Linear(120, 84, device=device, dtype=dtype)
        self.fc3 = nn.Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, in_channels, 32, 32), or one unbatched, to logits (N, num_classes)."""
        features = F.max_pool2d(F.relu(self.conv1(input)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        hidden = F.relu(self.fc1(features.flatten(-3)))
        return self.fc3(F.relu(self.fc2(hidden)))
