"""The fused operators as functions, in the manner of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlenet import checks, ops
from fastlenet.kernels.geometry import LINEAR, LINEAR_RELU, ConvPoolGeometry, Links, Pair
from fastlenet.private import any_autocast
from fastlenet.selection import run

__all__ = ["addmm_relu", "chain", "conv2d_relu_max_pool2d", "linear_relu", "mlp"]

# torch.fx records calls of these as they stand: its stand-ins for tensors cannot pass their checks.
for _name in __all__:
    torch.fx.wrap(_name)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    pool_size: int | tuple[int, ...] = 2,
    pool_stride: int | tuple[int, ...] | None = None,
    pool_padding: int | tuple[int, ...] = 0,
    pool_dilation: int | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Convolve, apply relu and max-pool in one operator.

    Equal to ``F.max_pool2d(F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups)), pool_size,
    pool_stride, pool_padding, pool_dilation, ceil_mode)``, gradients included. NaN propagates. Of equal cells the first
    in scan order wins. No gradient passes where every cell of a window is <= 0.

    A kernel keeps the input, the weight and one byte for each pooled cell for the backward. It keeps nothing of the
    size of the convolution's output.

    Args:
        input: (N, C, H, W) or, unbatched, (C, H, W); any strides; float32, float16, bfloat16 or float64. N may be 0.
        weight: (O, C / groups, KH, KW), of input's dtype and device.
        bias: (O,), or None.
        stride: step of the convolution, an int or a pair (height, width), as all sizes below.
        padding: zeros added on each side, ``"valid"`` (none), or ``"same"`` (the convolution has the input's size).
        dilation: spacing between kernel elements.
        groups: number of groups of channels, each convolved by itself.
        pool_size: size of the pooling window.
        pool_stride: step of the window; `pool_size` by default.
        pool_padding: cells added on each side, which never win; at most half of `pool_size`.
        pool_dilation: spacing between a window's cells.
        ceil_mode: whether to pool windows that reach beyond the end too.

    Returns:
        (N, O, PH, PW), or (O, PH, PW) for unbatched input; channels_last if input or weight is.

    Raises:
        RuntimeError: if shapes, dtypes or values do not fit, where stock PyTorch raises it too.
        TypeError: if an argument has a wrong type, where stock PyTorch raises it too.
        NotImplementedError: if backend ``"triton"`` or ``"cpu"`` is forced and has no kernel for the dtype or window.

    Examples:
        >>> import torch, fastlenet
        >>> images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> convolve = fastlenet.functional.conv2d_relu_max_pool2d
        >>> convolve(images, weight, padding="same", pool_size=(2, 4)).shape
        torch.Size([2, 4, 4, 2])
    """
    name = "conv2d_relu_max_pool2d"
    checks.tensors(name, ("input", input), ("weight", weight), bias=bias)
    checks.boolean(name, "ceil_mode", ceil_mode)
    groups = checks.integer(name, "groups", groups)
    pool_size = checks.pair(name, "pool_size", pool_size)
    stride, dilation = checks.pair(name, "stride", stride), checks.pair(name, "dilation", dilation)
    if isinstance(padding, str):
        input, padding = _named_padding(name, input, weight, padding, stride, dilation)
    operands = autocast(input, weight, bias)
    # Stock takes an empty tuple or list for None.
    unset = pool_stride is None or (isinstance(pool_stride, (tuple, list)) and not pool_stride)
    geometry = ConvPoolGeometry(
        stride,
        checks.pair(name, "padding", padding),
        dilation,
        groups,
        pool_size,
        pool_size if unset else checks.pair(name, "pool_stride", pool_stride),
        checks.pair(name, "pool_padding", pool_padding),
        checks.pair(name, "pool_dilation", pool_dilation),
        ceil_mode,
    )
    return run(ops.CONV2D_RELU_MAX_POOL2D, geometry, *operands)


def _named_padding(
    name: str, input: Tensor, weight: Tensor, padding: str, stride: Pair, dilation: Pair
) -> tuple[Tensor, Pair]:
    """Resolve ``"same"`` and ``"valid"``; where "same" is uneven, the odd zero goes behind the input, as in stock."""
    if padding == "valid" or weight.dim() != 4:  # which is refused later
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"{name}: padding must be ints, 'same' or 'valid', but got padding={padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"{name}: padding='same' is not supported for strided convolutions, but got stride={stride}")
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map and relu in one operator: ``F.relu(F.linear(input, weight, bias))``.

    Args:
        input: ``(*, in_features)`` with any leading dimensions; float32, float16, bfloat16 or float64.
        weight: (out_features, in_features), of input's dtype and device; or (in_features,) without bias.
        bias: (out_features,), or None.

    Returns:
        ``(*, out_features)``, or ``(*)`` for a 1-dimensional weight.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, where stock PyTorch raises it too.
        TypeError: if an argument is not a tensor, where stock PyTorch raises it too.

    Examples:
        >>> import torch, fastlenet
        >>> fastlenet.functional.linear_relu(torch.tensor([[1.0, -1.0]]), 2 * torch.eye(2))
        tensor([[2., 0.]])
    """
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        checks.tensors("linear_relu", ("input", input), ("weight", weight))
    if bias is not None and not isinstance(bias, Tensor):
        checks.tensors("linear_relu", bias=bias)
    return run(ops.LINEAR_RELU, None, *autocast(input, weight, bias))


def addmm_relu(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Multiply two matrices, add and apply relu in one operator: ``F.relu(torch.addmm(input, mat1, mat2, ...))``.

    Args:
        input: the addend, broadcastable to (M, N). With `beta` 0 it is ignored, NaN included.
        mat1: (M, K); float32, float16, bfloat16 or float64.
        mat2: (K, N), of mat1's dtype and device.
        beta: factor of `input`.
        alpha: factor of the product.

    Returns:
        relu(beta * input + alpha * (mat1 @ mat2)), (M, N).

    Raises:
        RuntimeError: if shapes or dtypes do not fit, where stock PyTorch raises it too.
        TypeError: if an argument has a wrong type, where stock PyTorch raises it too.

    Examples:
        >>> import torch, fastlenet
        >>> input, matrix = torch.tensor([1.0, -9.0]), torch.eye(2)
        >>> fastlenet.functional.addmm_relu(input, matrix, matrix, alpha=2)
        tensor([[3., 0.],
                [1., 0.]])
    """
    name = "addmm_relu"
    checks.tensors(name, ("input", input), ("mat1", mat1), ("mat2", mat2))
    beta, alpha = checks.scalar(name, "beta", beta), checks.scalar(name, "alpha", alpha)
    return run(ops.ADDMM_RELU, (beta, alpha), *autocast(input, mat1, mat2))


def mlp(
    input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, weight3: Tensor, bias3: Tensor
) -> Tensor:
    """Apply three linear layers with relu between them in one operator.

    Equal to ``F.linear(F.relu(F.linear(F.relu(F.linear(input, weight1, bias1)), weight2, bias2)), weight3, bias3)``,
    gradients included. It is a `chain` of three linear links. For layers of up to 128 features (`input` may have any
    number) the Triton kernels keep hidden values on the chip, and store them once if a backward follows.

    Args:
        input: ``(*, in_features)`` with any leading dimensions; float32, float16, bfloat16 or float64.
        weight1: (hidden1, in_features), of input's dtype and device.
        bias1: (hidden1,).
        weight2: (hidden2, hidden1).
        bias2: (hidden2,).
        weight3: (out_features, hidden2).
        bias3: (out_features,).

    Returns:
        ``(*, out_features)``.

    Raises:
        RuntimeError: if shapes or dtypes do not fit.
        TypeError: if an argument is not a tensor.
        NotImplementedError: if backend ``"triton"`` or ``"cpu"`` is forced and has no kernel for the dtype.

    Examples:
        >>> import torch, fastlenet
        >>> sizes = (400, 120), (120, 84), (84, 10)
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)
        >>> parameters = layers.parameters()
        >>> fastlenet.functional.mlp(torch.randn(64, 400), *parameters).shape
        torch.Size([64, 10])
    """
    tensors = input, weight1, bias1, weight2, bias2, weight3, bias3
    for name, tensor in zip(_MLP_ARGUMENTS, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            checks.tensors("mlp", (name, tensor))
    return chain(input, tensors[1:], _MLP_LINKS)


_MLP_ARGUMENTS = "input", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3"
_MLP_LINKS = LINEAR_RELU, LINEAR_RELU, LINEAR


def chain(input: Tensor, parameters: Sequence[Tensor | None], links: Links) -> Tensor:
    """Apply a row of fused operators as one: convolutions with relu and max-pool, then linear maps with relu.

    Equal to the operators one after the other, gradients included. Results between them are not returned. Each
    sample is flattened before the first linear link. Where no kernel takes the whole chain, its links run one by one.

    Args:
        input: (N, C, H, W) or (C, H, W) if the first link is a convolution, else ``(*, in_features)``.
        parameters: weight and bias of each link in turn; a bias may be None.
        links: a `fastlenet.kernels.geometry.ConvPoolGeometry` for each convolution, then ``"linear_relu"`` for each
            linear map with relu; the last link may be ``"linear"``, without relu.

    Returns:
        The last link's output.

    Raises:
        RuntimeError: if shapes, dtypes or links do not fit.
        TypeError: if an argument is not a tensor.
        NotImplementedError: if a backend is forced that has no kernel for the chain.

    Examples:
        >>> import torch, fastlenet
        >>> parameters = [torch.randn(4, 6), None, torch.randn(2, 4), torch.randn(2)]
        >>> links = "linear_relu", "linear"
        >>> fastlenet.functional.chain(torch.randn(5, 6), parameters, links).shape
        torch.Size([5, 2])
    """
    checks.tensors("chain", ("input", input))
    return run(ops.CHAIN, links, *autocast(input, *parameters))


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as autocast casts for F.conv2d and F.linear: floating point other than float64, on the autocast device."""
    if not torch.compiler.is_compiling() and not any_autocast():
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        and tensor.device.type == device
        else tensor
        for tensor in tensors
    )
