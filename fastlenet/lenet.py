"""LeNet for 32x32 images, once with the fused layers and once in plain ``torch.nn``.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998; with relu and
max-pooling, as PyTorch's tutorials have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU

__all__ = ["LeNet", "StockLeNet"]


class LeNet(nn.Module):
    """LeNet built of fused layers: two kernels for its convolutional part and two for its hidden linear layers.

    Its state_dict is interchangeable with `StockLeNet`'s in both directions, and with the same seed both start from
    the same weights.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.
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
        features = self.conv2(self.conv1(input))
        return self.fc3(self.fc2(self.fc1(features.flatten(-3))))


class StockLeNet(nn.Module):
    """The same network in plain ``torch.nn``: what tests, benchmarks and the demo compare `LeNet` with.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the input images.
        device: where the parameters live.
        dtype: the parameters' type.
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
