"""The layers that Hugging Face's ``kernelize`` may put in another layer's place.

They hold nothing: `kernelize` takes their forward alone, which then works on the attributes of the layer that it stands
in for: those of ``nn.Conv2d`` and the pool's, or those of ``nn.Linear``.
"""

from __future__ import annotations

from torch import nn

from fastlenet import modules

__all__ = ["ConvReLUMaxPool2d", "LinearReLU"]


class ConvReLUMaxPool2d(nn.Module):
    """Stands in for a layer with the attributes of `fastlenet.ConvReLUMaxPool2d`."""

    has_backward = True
    can_torch_compile = True
    forward = modules.ConvReLUMaxPool2d.forward


class LinearReLU(nn.Module):
    """Stands in for a layer with the attributes of ``nn.Linear``, and relu after it."""

    has_backward = True
    can_torch_compile = True
    forward = modules.LinearReLU.forward
