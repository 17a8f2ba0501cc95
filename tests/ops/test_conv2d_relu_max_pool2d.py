"""conv2d + relu + max-pool among PyTorch's own operators: outputs that users modify, counted FLOPs, layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.operators import stock_conv2d_relu_max_pool2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlenet
from fastlenet.functional import chain, conv2d_relu_max_pool2d

pytestmark = pytest.mark.usefixtures("either")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
IN_PLACE = {
    "add": lambda output: output.add_(1),
    "relu": F.relu_,
    "dropout": lambda output: F.dropout(output, 0.5, training=True, inplace=True),
    "index": lambda output: output.__setitem__(0, 0.5),
    "method": lambda output: output.mul_(2).clamp_(max=1),
}


@DTYPES
@pytest.mark.parametrize("images", [None, 1, 2, 64])
@pytest.mark.parametrize("how", IN_PLACE)
def test_an_output_may_be_modified_in_place(how, images, dtype):
    """Its gradients are stock's; it was a view of something larger once, which PyTorch refuses to modify."""
    torch.manual_seed(0)
    shape = (1, 32, 32) if images is None else (images, 1, 32, 32)
    tensors = [torch.randn(size).to(dtype).requires_grad_() for size in (shape, (6, 1, 5, 5), (6,))]
    results = []
    for function in (conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d):
        torch.manual_seed(1)
        output = function(*tensors)
        assert not output._is_view()
        output = IN_PLACE[how](output) or output if how == "index" else IN_PLACE[how](output)
        results.append([output, *torch.autograd.grad(output.float().sum(), tensors)])
    # What is compared is which operations a graph holds; their rounding is judged elsewhere.
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-1 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("windows", ["plain", "overlapping", "empty"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_neither_outputs_nor_gradients_are_views(windows, layout, grad_mode):
    options = {
        "plain": {},
        "overlapping": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
        "empty": {"pool_size": 2, "pool_stride": 1, "pool_padding": 1, "pool_dilation": 2},
    }[windows]
    images, weight, bias = torch.randn(3, 2, 9, 9).to(memory_format=layout), torch.randn(4, 2, 3, 3), torch.randn(4)
    with torch.set_grad_enabled(grad_mode):
        tensors = [tensor.requires_grad_() for tensor in (images, weight, bias)]
        output = conv2d_relu_max_pool2d(*tensors, **options)
        assert not output._is_view()
        if grad_mode:
            for gradient in torch.autograd.grad(output.sum(), tensors):
                assert not gradient._is_view()
        assert not conv2d_relu_max_pool2d(images[0], weight, bias, **options)._is_view()


def test_layers_in_front_of_layers_that_work_in_place():
    model = nn.Sequential(
        fastlenet.ConvReLUMaxPool2d(1, 6, 5), nn.Dropout(0.0, inplace=True), nn.ReLU(inplace=True), nn.Flatten(),
        fastlenet.LinearReLU(1176, 8), nn.Linear(8, 2),
    )  # fmt: skip
    images = torch.randn(3, 1, 32, 32)
    model(images).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model[1], model[2] = nn.Identity(), nn.Identity()
    model.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(grads, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("stride", [(1, 2), (2, 2)])
def test_a_strided_pointwise_kernel_in_channels_last(stride, either):
    """Stock's weight gradient writes beyond its memory there (torch 2.13): the reference takes the plain layout."""
    images = torch.randn(3, 8, 30, 30).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 8, 1, 1, requires_grad=True)
    if either == "stock":
        weight, images = weight.detach(), images  # its derivative is stock's own
    output = conv2d_relu_max_pool2d(images, weight, stride=stride)
    expected = stock_conv2d_relu_max_pool2d(images.contiguous(), weight, stride=stride)
    torch.testing.assert_close(output, expected)
    if either == "kernels":
        found = [torch.autograd.grad(result.square().sum(), weight)[0] for result in (output, expected)]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)], ids=str)
def test_flops_are_counted_as_stocks(wanted):
    """Two for each product, forward and for each gradient that is asked for."""
    images, weight = torch.randn(3, 4, 12, 11), torch.randn(6, 2, 3, 2)
    images.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    totals = []
    for function in (conv2d_relu_max_pool2d, stock_conv2d_relu_max_pool2d):
        with FlopCounterMode(display=False) as counter:
            function(images, weight, groups=2, padding=1).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("attribute", [
    "stride", "padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode",
])  # fmt: skip
def test_a_layer_notices_that_an_attribute_changed(attribute):
    """Its geometry is read once, but not for good: also where the attribute is set past `__setattr__`."""
    layer = fastlenet.ConvReLUMaxPool2d(2, 4, 3, padding=1, pool_size=3, pool_stride=2, groups=2)
    images = torch.randn(2, 4 if attribute == "groups" else 2, 13, 12)
    if attribute == "groups":
        layer = fastlenet.ConvReLUMaxPool2d(4, 4, 3, padding=1, pool_size=3, pool_stride=2, groups=2)
        layer.weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    other = {"ceil_mode": True, "groups": 2, "padding": "valid", "pool_stride": [1, 2], "stride": (2, 1)}.get(
        attribute, 1
    )
    other = 2 if attribute in ("dilation", "pool_size", "pool_dilation") else other

    def expected():
        fields = "stride", "padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding", "pool_dilation"
        options = {name: getattr(layer, name) for name in (*fields, "ceil_mode")}
        return stock_conv2d_relu_max_pool2d(images, layer.weight, layer.bias, **options)

    torch.testing.assert_close(layer(images), expected())
    before = getattr(layer, attribute)
    setattr(layer, attribute, other)
    torch.testing.assert_close(layer(images), expected())
    if isinstance(other, list):
        other[0] = 2  # in place
        torch.testing.assert_close(layer(images), expected())
    vars(layer)[attribute] = before
    torch.testing.assert_close(layer(images), expected())


@pytest.mark.parametrize("wrong", [True, 1.0, (True, 1)])
def test_a_layer_refuses_an_attribute_that_only_equals_a_legal_one(wrong):
    layer, images = fastlenet.ConvReLUMaxPool2d(1, 2, 3), torch.randn(1, 1, 8, 8)
    layer(images)
    layer.stride = wrong
    with pytest.raises(TypeError, match="stride"):
        layer(images)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_an_unbatched_output_is_laid_out_plainly(grad_mode):
    """As stock's, whatever the layout of the weights: a user may view it as one row."""
    image = torch.randn(3, 14, 14)
    first, second = (
        torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_(grad_mode)
        for shape in ((6, 3, 3, 3), (4, 6, 2, 2))
    )
    plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
    calls = {
        "layer": lambda image: conv2d_relu_max_pool2d(image, first),
        "chain": lambda image: chain(image, [first, None, second, None], (plain, plain)),
    }
    for name, call in calls.items():
        assert call(image).is_contiguous(), name
        assert torch.compile(call, backend="aot_eager", fullgraph=True)(image).is_contiguous(), name
