"""addmm + relu and linear + relu among PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastlenet.functional import addmm_relu, linear_relu

pytestmark = pytest.mark.usefixtures("either")


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("weight", [(4, 7), (7,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_outputs_are_never_views(leading, weight, dtype):
    """Without a graph they may be modified; with one that changes what relu kept, which is noticed, as in stock."""
    input = torch.randn(*leading, 7, dtype=dtype, requires_grad=True)
    matrix = torch.randn(weight, dtype=dtype)
    output = linear_relu(input, matrix)
    assert not output._is_view()
    with torch.no_grad():
        assert not linear_relu(input, matrix)._is_view()
        linear_relu(input, matrix).add_(1)
    output.add_(1)
    if output.numel():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_flops_are_counted_as_stocks():
    tensors = [torch.randn(size, requires_grad=True) for size in ((5,), (3, 4), (4, 5))]
    pairs = (
        (addmm_relu, lambda *args: F.relu(torch.addmm(*args)), tensors),
        (
            linear_relu,
            lambda *args: F.relu(F.linear(*args)),
            [torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)],
        ),
    )
    for ours, stock, operands in pairs:
        totals = []
        for function in (ours, stock):
            with FlopCounterMode(display=False) as counter:
                function(*operands).sum().backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0
