"""fastlenet: fused Triton operators for small convolutional networks, plugged into PyTorch autograd.

>>> import torch, fastlenet
>>> layer = fastlenet.ConvReLUMaxPool2d(1, 6, 5)
>>> layer(torch.randn(2, 1, 32, 32)).shape
torch.Size([2, 6, 14, 14])
"""

import importlib.util
import os

# In a checkout the kernels lie beside the package; only an installation puts them where Python finds them.
if importlib.util.find_spec(f"{__name__}.kernels") is None:
    _folder = os.path.abspath(__path__[0])
    raise ImportError(f"{__name__} is not installed: run 'pip install -e .' in the checkout that holds {_folder}")

from fastlenet import functional, graphs, private
from fastlenet._version import __version__
from fastlenet.export import decompositions
from fastlenet.fusion import explain, fuse
from fastlenet.lenet import LeNet, StockLeNet
from fastlenet.modules import ConvReLUMaxPool2d, LinearReLU
from fastlenet.selection import backend, use_backend

private.warn_if_untested()

__all__ = [
    "ConvReLUMaxPool2d",
    "LeNet",
    "LinearReLU",
    "StockLeNet",
    "__version__",
    "backend",
    "decompositions",
    "explain",
    "functional",
    "fuse",
    "graphs",
    "use_backend",
]
