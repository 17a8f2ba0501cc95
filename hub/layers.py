"""Layers for Hugging Face's ``kernelize``, which replaces the forward of another layer by theirs.

They have no state. The forward reads the attributes of the layer that it is put on: those of ``nn.Conv2d`` and the
pool, or those of ``nn.Linear``.
"""

from __future__ import annotations

from torch import nn

from fastlenet import modules

__all__ = ["ConvReLUMaxPool2d", "LinearReLU"]


class ConvReLUMaxPool2d(nn.Module):
    """The forward for a layer with the attributes of `fastlenet.ConvReLUMaxPool2d`."""

    has_backward = True
    can_torch_compile = True
    forward = modules.ConvReLUMaxPool2d.forward


class LinearReLU(nn.Module):
    """The forward for a layer with the attributes of ``nn.Linear``, followed by relu."""

    has_backward = True
    can_torch_compile = True
    forward = modules.LinearReLU.forward
