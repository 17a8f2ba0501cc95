"""Every kernel once on a GPU, on small uneven shapes, for compute-sanitizer in ``make gpu``.

It checks results too, so that a run that computes nothing does not pass.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from fastlenet import functional, use_backend


def main() -> int:
    """Run both operators, forward and backward, in every dtype."""
    if not torch.cuda.is_available():
        print("smoke: no GPU here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with use_backend("triton"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            _conv(dtype, (3, 4, 11, 9), (6, 2, 3, 2), groups=2, padding=1, pool=(3, 2, 1))
            _conv(dtype, (2, 1, 32, 32), (6, 1, 5, 5), groups=1, padding=0, pool=(2, 2, 0))
            for precision in ("ieee", "tf32"):
                torch.backends.cuda.matmul.fp32_precision = precision
                for sizes in _LINEAR:
                    _linear(dtype, *sizes)
    torch.cuda.synchronize()
    print("smoke: ok")
    return 0


def _agree(name: str, fused: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    for own, other in zip(fused, stock, strict=True):
        # A few rounding steps of the dtype. The tests check accuracy; this shows that the kernels computed.
        torch.testing.assert_close(own, other, msg=lambda text: f"{name}: {text}")


def _gradients(operator, *tensors: torch.Tensor, expanded: bool = True) -> list[torch.Tensor]:
    output = operator(*tensors)
    grad_output = torch.ones((), device=output.device, dtype=output.dtype).expand(output.shape)
    return [output, *torch.autograd.grad(output, tensors, grad_output if expanded else grad_output.contiguous())]


def _on_grid(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers: every product and sum is exact, so that fused and stock agree to the bit."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype).requires_grad_()


def _conv(dtype: torch.dtype, shape, kernel, groups: int, padding: int, pool: tuple[int, int, int]) -> None:
    tensors = [_on_grid(*size, dtype=dtype) for size in (shape, kernel, kernel[:1])]
    fused = _gradients(
        lambda x, w, b: functional.conv2d_relu_max_pool2d(
            x, w, b, 1, padding, 1, groups, pool_size=pool[0], pool_stride=pool[1], pool_padding=pool[2]
        ),
        *tensors,
    )
    stock = _gradients(lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b, 1, padding, 1, groups)), *pool), *tensors)
    _agree(f"conv2d_relu_max_pool2d {dtype}", fused, stock)


# Odd sizes are copied to padded rows, multiples of eight go by tensor descriptors, and the last is masked once and
# stores its gradient by a descriptor.
_LINEAR = ((65, 33, 17), (130, 120, 88), (64, 2048, 136))


def _linear(dtype: torch.dtype, rows: int, features: int, outputs: int) -> None:
    tensors = [_on_grid(*size, dtype=dtype) for size in ((rows, features), (outputs, features), (outputs,))]
    _agree(
        f"linear_relu {dtype} {rows}x{features}x{outputs}",
        _gradients(functional.linear_relu, *tensors, expanded=False),
        _gradients(lambda x, w, b: F.relu(F.linear(x, w, b)), *tensors, expanded=False),
    )


if __name__ == "__main__":
    raise SystemExit(main())
