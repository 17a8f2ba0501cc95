"""The operators: each one's schema, shape function, checks and ``torch.autograd.Function`` in a file of its own.

`fastlenet.selection` decides which implementation a call takes.
"""

from fastlenet.ops.addmm_relu import ADDMM_RELU, LINEAR_RELU
from fastlenet.ops.batch_norm_relu_max_pool2d import BATCH_NORM_RELU_MAX_POOL2D
from fastlenet.ops.chain import CHAIN
from fastlenet.ops.conv2d_relu_max_pool2d import CONV2D_RELU_MAX_POOL2D
from fastlenet.ops.registration import NAMESPACE

__all__ = ["ADDMM_RELU", "BATCH_NORM_RELU_MAX_POOL2D", "CHAIN", "CONV2D_RELU_MAX_POOL2D", "LINEAR_RELU", "NAMESPACE"]
