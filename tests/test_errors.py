"""Bad input gets stock's exception type and a message that names the argument and what it was."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import randn

import fastlenet
from fastlenet import functional, selection

pytestmark = pytest.mark.cheap


def stock_conv(input, weight, bias=None, *, pool_size=2, pool_stride=None, pool_padding=0, pool_dilation=1, **options):
    ceil_mode = options.pop("ceil_mode", False)
    conv = F.relu(F.conv2d(input, weight, bias, **options))
    return F.max_pool2d(conv, pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


def quantized(*size):
    return torch.quantize_per_tensor(randn(size), 0.1, 0, torch.qint8)


def conv(function, input=(2, 3, 8, 8), weight=(4, 3, 3, 3), bias=(4,), **options):
    """Call `function` with random tensors of these sizes; anything else stands for itself."""
    made = [randn(value) if isinstance(value, tuple) else value for value in (input, weight, bias)]
    return function(*made, **options)


# fmt: off
CONV = {
    "input of 2 dimensions": ({"input": (3, 3)}, "input.*[3, 3]"),
    "input of 5 dimensions": ({"input": (1, 1, 3, 8, 8)}, "input.*[1, 1, 3, 8, 8]"),
    "input of wrong channels": ({"input": (2, 5, 8, 8)}, "weight of size [4, 3, 3, 3].*input[2, 5, 8, 8].*3 channels"),
    "unbatched, wrong channels": ({"input": (5, 8, 8)}, "3 channels.*input of size [5, 8, 8]"),
    "weight of 3 dimensions": ({"weight": (4, 3, 3)}, "weight.*[4, 3, 3]"),
    "weight without output channels": ({"weight": (0, 3, 3, 3), "bias": (0,)}, "weight.*[0, 3, 3, 3]"),
    "bias of wrong length": ({"bias": (5,)}, "bias.*4 elements.*[5]"),
    "bias of 2 dimensions": ({"bias": (4, 1)}, "bias.*1-dimensional.*[4, 1]"),
    "input of another dtype": ({"input": randn(2, 3, 8, 8).double()}, "input.*weight.*dtype.*float64.*float32"),
    "bias of another dtype": ({"bias": randn(4).double()}, "input.*bias.*dtype.*float32.*float64"),
    "input no tensor": ({"input": None}, "'input' must be Tensor, not NoneType"),
    "weight no tensor": ({"weight": [1.0]}, "'weight' must be Tensor, not list"),
    "bias no tensor": ({"bias": 1.0}, "'bias' must be Tensor, not float"),
    "stride 0": ({"stride": 0}, "non-positive stride.*stride=(0, 0)"),
    "stride negative": ({"stride": (1, -1)}, "non-positive stride.*stride=(1, -1)"),
    "stride of three": ({"stride": (1, 1, 1)}, "stride.*(1, 1, 1)"),
    "stride a string": ({"stride": "a"}, "'stride'.*'a'"),
    "stride a float": ({"stride": 1.5}, "'stride'.*1.5"),
    "padding negative": ({"padding": -1}, "negative padding.*padding=(-1, -1)"),
    "padding of an unknown name": ({"padding": "full"}, "padding.*'full'"),
    "padding same with stride": ({"padding": "same", "stride": 2}, "padding='same'.*stride=(2, 2)"),
    "dilation 0": ({"dilation": 0}, "non-positive dilation.*dilation=(0, 0)"),
    "groups 0": ({"groups": 0}, "non-positive groups.*groups=0"),
    "groups that do not divide the channels": ({"groups": 2}, "groups=2.*6 channels.*3"),
    "groups that do not divide the output": (
        {"input": (2, 6, 8, 8), "weight": (3, 3, 3, 3), "bias": (3,), "groups": 2}, "groups=2.*weight.*[3, 3, 3, 3]"
    ),
    "groups a float": ({"groups": 1.0}, "'groups' must be int, not float"),
    "kernel larger than input": ({"input": (2, 3, 2, 2)}, "2 x 2.*3 x 3.*input of size [2, 3, 2, 2]"),
    "empty height": ({"input": (2, 3, 0, 8), "padding": 2}, "input of size [2, 3, 0, 8]"),
    "pool_size 0": ({"pool_size": 0}, "not be zero.*pool_size=(0, 0)"),
    "pool_size of three": ({"pool_size": (1, 2, 3)}, "pool_size.*(1, 2, 3)"),
    "pool_size a float": ({"pool_size": 2.5}, "'pool_size'.*2.5"),
    "pool_size too large": ({"pool_size": 9}, "4x6x6.*too small.*pool_size=(9, 9)"),
    "pool_stride 0": ({"pool_stride": 0}, "stride should not be zero.*pool_stride=(0, 0)"),
    "pool_padding too large": ({"pool_padding": 2}, "half of.*kernel size.*pool_size=(2, 2).*pool_padding=(2, 2)"),
    "pool_padding negative": ({"pool_padding": -1}, "non-negative.*pool_padding=(-1, -1)"),
    "pool_dilation 0": ({"pool_dilation": 0}, "greater than zero.*pool_dilation=(0, 0)"),
    "stride a bool": ({"stride": True}, "'stride'.*True"),
    "stride an array of floats": ({"stride": np.ones(2)}, "'stride'.*1."),
    "stride a pair of a float": ({"stride": (1.0, 2)}, "'stride'.*(1.0, 2)"),
    "stride None": ({"stride": None}, "'stride'.*None"),
    "padding a float": ({"padding": 1.5}, "'padding'.*1.5"),
    "padding of three": ({"padding": (1, 1, 1)}, "padding.*(1, 1, 1)"),
    "dilation a string": ({"dilation": "x"}, "'dilation'.*'x'"),
    "dilation negative": ({"dilation": -1}, "greater than zero.*dilation=(-1, -1)"),
    "groups a string": ({"groups": "2"}, "'groups' must be int, not str"),
    "groups a bool": ({"groups": True}, "'groups' must be int, not bool"),
    "groups negative": ({"groups": -1}, "non-positive groups.*groups=-1"),
    "weight without height": ({"weight": (4, 3, 0, 3)}, "weight of size [4, 3, 0, 3]"),
    "no channels": ({"input": (2, 0, 8, 8), "weight": (4, 0, 3, 3)}, "input of size [2, 0, 8, 8].*[4, 0, 3, 3]"),
    "empty batch of wrong channels": ({"input": (0, 5, 8, 8)}, "input[0, 5, 8, 8].*3 channels"),
    "complex numbers": (
        {"input": randn(2, 3, 8, 8) + 0j, "weight": randn(4, 3, 3, 3) + 0j, "bias": None}, "complex.*input.*complex64"
    ),
    "quantized numbers": (
        {"input": quantized(2, 3, 8, 8), "weight": quantized(4, 3, 3, 3), "bias": None}, "quantized.*input.*qint8"
    ),
    "pool_size None": ({"pool_size": None}, "'pool_size'.*None"),
    "pool_size empty": ({"pool_size": ()}, "pool_size=()"),
    "pool_stride a string": ({"pool_stride": "a"}, "'pool_stride'.*'a'"),
    "pool_stride of three": ({"pool_stride": (1, 1, 1)}, "pool_stride.*(1, 1, 1)"),
    "pool_stride a NumPy float": ({"pool_stride": np.float64(2)}, "'pool_stride'.*2.0"),
    "pool_padding named": ({"pool_padding": "same"}, "'pool_padding'.*'same'"),
    "pool_padding too large in one dimension": (
        {"pool_size": (1, 3), "pool_padding": 1}, "half of.*kernel size.*pool_size=(1, 3).*pool_padding=(1, 1)"
    ),
    "pool_dilation too large": ({"pool_dilation": 9}, "4x6x6.*too small.*pool_dilation=(9, 9)"),
    "ceil_mode an int": ({"ceil_mode": 0.0}, "'ceil_mode' must be bool, not float"),
    "ceil_mode no bool": ({"ceil_mode": "x"}, "'ceil_mode' must be bool, not str"),
}
# fmt: on


def assert_same_error(fused, stock, words):
    """Both calls raise the same type; the fused one's message holds the words in this order."""
    with pytest.raises(Exception) as expected:  # noqa: PT011 (stock decides)
        stock()
    pattern = ".*".join(re.escape(word) for word in words.split(".*"))
    with pytest.raises(type(expected.value), match=f"(?s){pattern}"):
        fused()


@pytest.mark.parametrize("name", CONV)
def test_conv2d_relu_max_pool2d(name):
    arguments, words = CONV[name]
    assert_same_error(
        lambda: conv(functional.conv2d_relu_max_pool2d, **arguments), lambda: conv(stock_conv, **arguments), words
    )


LINEAR = {
    "features do not fit": (
        ((5, 6), (3, 7), (3,)),
        "cannot be multiplied.*input of size [5, 6].*weight of size [3, 7]",
    ),
    "bias of wrong length": (((5, 7), (3, 7), (4,)), "[5, 3].*[4].*bias of size [4]"),
    "bias of wrong length, 3 dimensions": (
        ((2, 5, 7), (3, 7), (4,)),
        "must match.*input of size [2, 5, 7].*bias of size [4]",
    ),
    "weight of 1 dimension with bias": (((5, 7), (7,), (3,)), "weight.*[7]"),
    "weight of 3 dimensions": (((5, 7), (2, 3, 7), None), "weight.*[2, 3, 7]"),
    "input a scalar": (((), (3, 7), (3,)), "at least 1D.*input of size []"),
    "input of another dtype": ((randn(5, 7).double(), (3, 7), (3,)), "input.*weight.*dtype.*float64.*float32"),
    "bias of another dtype": (((5, 7), (3, 7), randn(3).double()), "input.*bias.*dtype.*float32.*float64"),
    "input no tensor": ((None, (3, 7), (3,)), "'input' must be Tensor, not NoneType"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_relu(name):
    arguments, words = LINEAR[name]
    made = [randn(value) if isinstance(value, tuple) else value for value in arguments]
    assert_same_error(lambda: functional.linear_relu(*made), lambda: F.relu(F.linear(*made)), words)


ADDMM = {
    "mat1 of 1 dimension": (((3,), (7,), (7, 3)), {}, "mat1.*matrix.*[7]"),
    "mat2 of 3 dimensions": (((3,), (5, 7), (1, 7, 3)), {}, "mat2.*matrix.*[1, 7, 3]"),
    "inner sizes do not fit": (
        ((3,), (5, 7), (6, 3)),
        {},
        "cannot be multiplied.*mat1 of size [5, 7].*mat2 of size [6, 3]",
    ),
    "input does not broadcast": (((4,), (5, 7), (7, 3)), {}, "[5, 3].*[4].*input of size [4]"),
    "input of 3 dimensions": (((1, 5, 3), (5, 7), (7, 3)), {}, "[5, 3].*input of size [1, 5, 3]"),
    "mat2 of another dtype": (((3,), (5, 7), randn(7, 3).double()), {}, "mat1.*mat2.*dtype.*float32.*float64"),
    "input of another dtype": ((randn(3).double(), (5, 7), (7, 3)), {}, "mat1.*input.*dtype.*float32.*float64"),
    "input no tensor": ((None, (5, 7), (7, 3)), {}, "'input' must be Tensor, not NoneType"),
    "beta a string": (((3,), (5, 7), (7, 3)), {"beta": "a"}, "'beta' must be Number, not str"),
    "alpha a string": (((3,), (5, 7), (7, 3)), {"alpha": "a"}, "'alpha' must be Number, not str"),
    "alpha None": (((3,), (5, 7), (7, 3)), {"alpha": None}, "'alpha' must be Number, not NoneType"),
    "beta complex": (((3,), (5, 7), (7, 3)), {"beta": 1j}, "beta must be a real number.*beta=1j"),
    "alpha a vector": (((3,), (5, 7), (7, 3)), {"alpha": randn(2)}, "'alpha' must be Number, not Tensor"),
    "alpha that needs a gradient": (
        ((3,), (5, 7), (7, 3)),
        {"alpha": torch.tensor(2.0, requires_grad=True)},
        "'alpha' must be Number, not Tensor",
    ),
}


@pytest.mark.parametrize("name", ADDMM)
def test_addmm_relu(name):
    arguments, options, words = ADDMM[name]
    made = [randn(value) if isinstance(value, tuple) else value for value in arguments]
    assert_same_error(
        lambda: functional.addmm_relu(*made, **options), lambda: F.relu(torch.addmm(*made, **options)), words
    )


NAMES = ["stride", "padding", "dilation", "groups", *(f"pool_{n}" for n in ("size", "stride", "padding", "dilation"))]
INTEGERS = {
    "NumPy": np.int64(1),
    "short NumPy": np.int32(1),
    "tensor": torch.tensor(1),
    "list": [1],
    "pair": (np.int64(1), 1),
    "pair of a tensor": [torch.tensor(1), 1],
    "size": torch.Size([1, 1]),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NAMES for k in INTEGERS if n != "groups" or k in ("NumPy", "tensor")]
)
def test_what_stock_reads_as_integers_is_no_error(name, kind):
    """Sizes that come out of NumPy or of a tensor."""
    made, options = [randn(2, 3, 8, 8), randn(4, 3, 3, 3)], {name: INTEGERS[kind]}
    expected = stock_conv(*made, **options)
    torch.testing.assert_close(functional.conv2d_relu_max_pool2d(*made, **options), expected)


@pytest.mark.parametrize("pool_stride", [None, (), []], ids=str)
def test_no_pool_stride_is_the_windows_size(pool_stride):
    made = randn(2, 3, 8, 8), randn(4, 3, 3, 3)
    expected = stock_conv(*made, pool_size=3, pool_stride=pool_stride)
    torch.testing.assert_close(functional.conv2d_relu_max_pool2d(*made, pool_size=3, pool_stride=pool_stride), expected)


@pytest.mark.parametrize(
    "factor",
    [True, False, np.bool_(True), np.bool_(False), np.float32(0.5), np.int64(2), torch.tensor(2.0), torch.tensor(3)],
    ids=repr,
)
@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_what_stock_reads_as_a_number_is_no_error(name, factor):
    made = [randn(size).requires_grad_() for size in ((3,), (5, 7), (7, 3))]
    fused, stock = functional.addmm_relu(*made, **{name: factor}), F.relu(torch.addmm(*made, **{name: factor}))
    torch.testing.assert_close(fused, stock)
    torch.testing.assert_close(*(torch.autograd.grad(output.sum(), made) for output in (fused, stock)))


@pytest.mark.parametrize("name", ["", "cuda", "Triton"])
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match=f"backend must be one of 'auto', 'triton', 'cpu', 'aten', but got '{name}'"),
        fastlenet.use_backend(name),
    ):
        pass
    assert fastlenet.backend() == "auto"


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("FASTLENET_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"FASTLENET_BACKEND must be one of .*'cudnn'"):
        conv(functional.conv2d_relu_max_pool2d)


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), fastlenet.use_backend("aten"):
        raise KeyError
    assert fastlenet.backend() == "auto"


@pytest.mark.parametrize("layer", [fastlenet.ConvReLUMaxPool2d(3, 4, 3), fastlenet.LinearReLU(8, 4)])
def test_forced_triton_on_a_cpu_says_what_to_do(layer, monkeypatch):
    """Never a silent fallback: the error names the device and the two ways out."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastlenet.use_backend("triton"), pytest.raises(RuntimeError, match=r"forced.*cpu.*GPU.*TRITON_INTERPRET=1"):
        layer(randn(2, 3, 8, 8))


def test_triton_forced_by_the_environment_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTLENET_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"'triton' is forced.*cpu tensors.*GPU.*TRITON_INTERPRET=1.*'auto'"):
        conv(functional.conv2d_relu_max_pool2d)


def test_a_backward_follows_the_choice_of_its_forward(monkeypatch, cpu_kernels):
    """Whatever is forced by then: a graph's two halves never part ways."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer, images = fastlenet.ConvReLUMaxPool2d(3, 4, 3), randn(2, 3, 8, 8)
    for forced in ("triton", "aten"):
        output = layer(images)
        with fastlenet.use_backend(forced):
            output.sum().backward()
    assert cpu_kernels.calls == ["conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"] * 2


def test_log_names_the_product_and_a_forced_backend(caplog):
    with caplog.at_level(logging.DEBUG, logger="fastlenet"), fastlenet.use_backend("aten"):
        functional.linear_relu(randn(5, 7), randn(3, 7))
    assert "addmm_relu of (5, 7) torch.float32 runs on ATen: backend 'aten' is forced" in caplog.text


def test_log_says_why_aten_was_taken_for_a_layer(caplog):
    with caplog.at_level(logging.DEBUG, logger="fastlenet"):
        functional.linear_relu(randn(5, 7), randn(3, 7))
    assert "addmm_relu of (5, 7) torch.float32 runs on ATen: the input is on cpu" in caplog.text


def test_log_is_silent_by_default(caplog):
    with caplog.at_level(logging.INFO, logger="fastlenet"):
        conv(functional.conv2d_relu_max_pool2d)
    assert not caplog.records


def test_log_says_why_aten_was_taken(caplog, no_compiler):
    with caplog.at_level(logging.DEBUG, logger="fastlenet"):
        conv(functional.conv2d_relu_max_pool2d)
    assert "conv2d_relu_max_pool2d of (2, 3, 8, 8) torch.float32 runs on ATen: the input is on cpu" in caplog.text


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without numba."""
    from fastlenet import cpu

    monkeypatch.setattr(cpu, "unavailable", lambda: "numba is not installed")
    selection.forget()
    yield
    selection.forget()


def test_backend_of_a_tensor(no_compiler, monkeypatch):
    assert fastlenet.backend(randn(2)) == "aten"
    monkeypatch.setattr("fastlenet.cpu.unavailable", lambda: None)
    assert fastlenet.backend(randn(2)) == "cpu"
    assert fastlenet.backend(randn(2).double()) == "aten"
    with fastlenet.use_backend("aten"):
        assert fastlenet.backend() == "aten"


def test_explain_lists_sites_shapes_and_reasons(no_compiler):
    table = fastlenet.explain(fastlenet.LeNet(), randn(2, 1, 32, 32))
    assert [site.name for site in table.sites] == ["conv1", "conv2", "fc1", "fc2"]
    assert table.sites[0].input == "2x1x32x32 float32"
    assert table.sites[0].output == "2x6x14x14 float32"
    assert {site.implementation for site in table.sites} == {"aten"}
    assert "the input is on cpu" in str(table)
    assert "(no fused operators)" in str(fastlenet.explain(fastlenet.StockLeNet()))


def test_explain_without_an_example_knows_no_shapes(no_compiler):
    table = fastlenet.explain(fastlenet.LeNet())
    assert {(site.input, site.output) for site in table.sites} == {("?", "?")}
    header, *lines = str(table).splitlines()
    assert header.split() == ["runs", "why"]
    assert [line for line in lines if ":" in line] == [
        "conv1: conv2d_relu_max_pool2d", "conv2: conv2d_relu_max_pool2d", "fc1: linear_relu", "fc2: linear_relu"
    ]  # fmt: skip
    assert lines[1].startswith("  aten  the input is on cpu, which Triton does not drive")
    assert fastlenet.explain(fastlenet.LinearReLU(3, 2)).sites[0].name == "(model)"


def test_explain_shows_what_a_forced_backend_would_raise(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastlenet.use_backend("triton"):
        table = fastlenet.explain(fastlenet.LeNet())
    assert {site.implementation for site in table.sites} == {"none"}


@pytest.mark.parametrize("wrong", [(True, 1), (1.0, 1), True, 1.0])
def test_what_equals_a_legal_argument_is_checked_all_the_same(wrong):
    """Legal calls are remembered by what they were given, and True and 1.0 equal 1."""
    for stride in (1, (1, 1)):
        conv(functional.conv2d_relu_max_pool2d, stride=stride)
    with pytest.raises(TypeError, match="stride"):
        conv(functional.conv2d_relu_max_pool2d, stride=wrong)


def test_what_autocast_makes_legal_is_refused_outside():
    shapes = (2, 6), (5, 6), (5,), (4, 5), (4,), (3, 4), (3,)
    input, *parameters = (randn(shape) for shape in shapes)
    images, weight = randn(2, 3, 8, 8), randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        functional.mlp(input.bfloat16(), *parameters)
        functional.conv2d_relu_max_pool2d(images.bfloat16(), weight)
    with pytest.raises(RuntimeError, match="same dtype"):
        functional.mlp(input.bfloat16(), *parameters)
    with pytest.raises(RuntimeError, match="same dtype"):
        functional.conv2d_relu_max_pool2d(images.bfloat16(), weight)
