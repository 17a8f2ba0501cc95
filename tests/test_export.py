"""Graphs that leave the process: torch.export, AOTInductor, decomposition into plain ATen, ONNX."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.cases import ADDMM_CASES, CONV_CASES, SHIPPED_ADDMM, SHIPPED_CONV, addmm_cases, conv_cases
from torch.export import Dim
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import fastlenet
from fastlenet import ops
from fastlenet.ops.chain import links_of, spec_of
from fastlenet.ops.registration import Operator

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
TABLE = fastlenet.decompositions()
OPERATORS = torch.ops.fastlenet


def operators(graph) -> set[str]:
    """The namespaces of the operators that a graph calls."""
    return {
        node.target.namespace
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    fused, stock = fastlenet.LeNet(), fastlenet.StockLeNet()
    stock.load_state_dict(fused.state_dict())
    return fused.requires_grad_(False), stock.requires_grad_(False)


@pytest.fixture(scope="module")
def program(networks):
    """LeNet exported for any batch, fastlenet's operators inside."""
    return torch.export.export(networks[0], (torch.randn(2, 1, 32, 32),), dynamic_shapes=({0: Dim("batch")},))


@pytest.fixture(scope="module")
def plain(program):
    """The same in plain ATen."""
    return program.run_decompositions(fastlenet.decompositions())


# --- decompositions ------------------------------------------------------------------------------------------------


def assert_same(ours, operator, *args):
    """Equal results, bit for bit, in the same shapes, dtypes and memory formats."""
    for mine, wanted in zip(ours, operator(*args), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)
        formats = (torch.contiguous_format, torch.channels_last) if mine.dim() == 4 else (torch.contiguous_format,)
        for layout in formats:
            assert mine.is_contiguous(memory_format=layout) == wanted.is_contiguous(memory_format=layout)


def test_every_operator_has_a_decomposition():
    registered = {name for value in vars(ops).values() if isinstance(value, Operator) for name in value.registered()}
    assert {op._opname for op in TABLE} == registered
    assert all(op.namespace == ops.NAMESPACE for op in TABLE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@conv_cases([*CONV_CASES, *SHIPPED_CONV])
def test_decomposed_convolution_equals_the_operator(case, layout, generator):
    """On the exact grid every order of summation gives the same numbers, and ties abound."""
    tensors = case.exact(torch.float32, generator)
    input, weight, bias = tensors["input"], tensors["weight"], tensors["bias"]
    input = (input if input.dim() == 4 else input[None]).contiguous(memory_format=layout)
    forward, backward = OPERATORS.conv2d_relu_max_pool2d.default, OPERATORS.conv2d_relu_max_pool2d_backward.default
    for return_argmax in (False, True):
        args = (input, weight, bias, *case.geometry, return_argmax)
        assert_same(TABLE[forward](*args), forward, *args)
    output, argmax = forward(*args)
    grad = torch.randint(-3, 4, output.shape, generator=generator).to(output)
    for mask in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        args = (grad, input, weight, argmax, *case.geometry, mask)
        for mine, wanted in zip(TABLE[backward](*args), backward(*args), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


@addmm_cases([*ADDMM_CASES, *SHIPPED_ADDMM])
def test_decomposed_addmm_equals_the_operator(case, generator):
    tensors = case.exact(torch.float32, generator)
    input, mat1, mat2 = tensors["input"], tensors["mat1"], tensors["mat2"]
    forward, backward = OPERATORS.addmm_relu.default, OPERATORS.addmm_relu_backward.default
    args = (input, mat1, mat2, case.beta, case.alpha)
    assert_same([TABLE[forward](*args)], lambda *a: [forward(*a)], *args)
    output = forward(*args)
    grad = torch.randint(-3, 4, output.shape, generator=generator).to(output)
    size = () if input is None else input.shape
    for mask in ([input is not None, True, True], [False, True, False], [False, False, True]):
        args = (grad, output, mat1, mat2, size, case.beta, case.alpha, mask)
        assert_same(TABLE[backward](*args), backward, *args)


CHAIN = (PLAIN, PLAIN._replace(pool_size=(3, 2), pool_stride=(2, 2), padding=(1, 0)), "linear_relu", "linear")


@pytest.mark.parametrize("links", [CHAIN[:2], CHAIN[:3], CHAIN, CHAIN[2:]], ids=str)
@pytest.mark.parametrize("images", [0, 1, 5])
def test_decomposed_chain_equals_the_operator(images, links, generator):
    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    input, parameters = integers(images, 2, 14, 13), []
    shapes = {0: (3, 2, 3, 3), 1: (4, 3, 3, 2), 2: (5, 16), 3: (2, 5)}
    if links == CHAIN[2:]:
        input = integers(images, 16)
    for shape in [shapes[CHAIN.index(link)] for link in links]:
        parameters += [integers(*shape), integers(shape[0]) if len(parameters) % 4 else None]
    forward, backward, spec = OPERATORS.chain.default, OPERATORS.chain_backward.default, spec_of(links)
    assert links_of(spec) == links
    for save in (False, True):
        ours, wanted = TABLE[forward](input, parameters, spec, save), forward(input, parameters, spec, save)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    output, saved = wanted
    grad = torch.randint(-3, 4, output.shape, generator=generator).float()
    given = [True, *(parameter is not None for parameter in parameters)]
    for mask in (given, [False, *given[1:]], [False] * (len(given) - 2) + given[-2:]):
        args = (grad, output, input, parameters, saved, spec, mask)
        torch.testing.assert_close(TABLE[backward](*args), backward(*args), rtol=0, atol=0)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_decomposed_argmax_of_special_numbers(special, generator):
    """NaN and infinities win or lose as in the operator: outputs and argmax are the same."""
    input = torch.randint(-3, 4, (2, 2, 9, 8), generator=generator).float()
    input[0, 0, 3, 3] = input[1, 1, 0, 5] = special
    weight = torch.ones(3, 2, 2, 2)
    geometry = next(case for case in CONV_CASES if case.name == "pool padding").geometry
    args = (input, weight, None, *geometry, True)
    operator = OPERATORS.conv2d_relu_max_pool2d.default
    assert_same(TABLE[operator](*args), operator, *args)


@pytest.mark.parametrize("tracing", ["real", "symbolic"])
def test_a_training_step_in_plain_aten(tracing):
    """Forward and backward of a network as one graph without an operator of ours."""
    model = torch.nn.Sequential(
        fastlenet.ConvReLUMaxPool2d(1, 3, 3, pool_size=3, pool_stride=2),
        torch.nn.Flatten(),
        fastlenet.LinearReLU(48, 4),
    ).double()
    parameters = dict(model.named_parameters())

    def gradients(parameters, images):
        output = functional_call(model, parameters, (images,))
        return torch.autograd.grad(output.square().sum(), list(parameters.values()))

    images = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    graph = make_fx(gradients, decomposition_table=TABLE, tracing_mode=tracing)(parameters, images)
    assert operators(graph.graph) == {"aten"}
    if tracing == "symbolic":
        images = torch.randn(5, 1, 12, 12, dtype=torch.float64)
    # In float64 what is left is the order of sums.
    torch.testing.assert_close(
        graph(parameters, images), list(gradients(parameters, images)), rtol=1e-12, atol=1e-12, check_stride=False
    )


# --- programs ------------------------------------------------------------------------------------------------------


def test_decompositions_leave_every_other_operator_alone(program, plain, networks):
    assert operators(program.graph) == {"aten", "fastlenet"}
    assert operators(plain.graph) == {"aten"}
    targets = [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
    assert "aten.linear.default" in targets, "fc3 is stock's business"
    assert not [target for target in targets if "div" in target or "where" in target], "nobody asked for argmax"
    images = torch.randn(7, 1, 32, 32)
    assert torch.equal(plain.module()(images), networks[1](images)), "it is stock's network, to the bit"


@pytest.mark.wide
def test_a_decomposed_program_runs_without_fastlenet(program, plain, networks, tmp_path):
    images = torch.randn(7, 1, 32, 32)
    torch.export.save(program, tmp_path / "ours.pt2")
    torch.export.save(plain, tmp_path / "plain.pt2")
    torch.save(images, tmp_path / "images.pt")
    argmax = (
        "import sys, torch\n"
        "sys.modules['fastlenet'] = None  # importing it fails, as where it is not installed\n"
        "torch.set_num_threads(1)\n"
        "program = torch.export.load('plain.pt2')\n"
        "torch.save(program.module()(torch.load('images.pt')), 'outputs.pt')\n"
        "try:\n"
        "    torch.export.load('ours.pt2')\n"
        "except Exception:\n"
        "    sys.exit(0)\n"
        "sys.exit('the program with our operators loaded too: fastlenet was not out of reach')\n"
    )
    done = subprocess.run([sys.executable, "-c", argmax], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), networks[1](images))


def test_a_decomposed_program_can_be_trained():
    """Gradients of every parameter are stock's."""
    fused, stock = fastlenet.LeNet().double(), fastlenet.StockLeNet().double()
    stock.load_state_dict(fused.state_dict())
    images = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    module = torch.export.export(fused, (images,)).run_decompositions(fastlenet.decompositions()).module()
    for network in (module, stock):
        network(images).square().sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert len(found) == 10
    torch.testing.assert_close(found, {name: p.grad for name, p in stock.named_parameters()}, rtol=1e-12, atol=1e-12)


def test_onnx_with_a_dynamic_batch(plain, networks, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    exported = torch.onnx.export(plain, dynamo=True, verbose=False)
    exported.save(tmp_path / "lenet.onnx")
    session = runtime.InferenceSession(tmp_path / "lenet.onnx", providers=["CPUExecutionProvider"])
    [argument] = session.get_inputs()
    assert argument.shape[1:] == [1, 32, 32]
    assert isinstance(argument.shape[0], str), "a named, not a fixed, dimension"
    for size in (1, 2, 9):
        images = torch.randn(size, 1, 32, 32)
        [outputs] = session.run(None, {argument.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs), networks[1](images))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")  # PyTorch advises against its older exporter
def test_onnx_of_the_layers_themselves(dynamo, trainable, tmp_path):
    """ONNX has no fused operators, and needs no decompositions for them."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layers = fastlenet.ConvReLUMaxPool2d(1, 3, 3, pool_size=3, pool_stride=2), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, fastlenet.LinearReLU(27, 4)).requires_grad_(trainable).eval()
    images = torch.randn(5, 1, 10, 10)
    torch.onnx.export(model, (images,), tmp_path / "layers.onnx", dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layers.onnx", providers=["CPUExecutionProvider"])
    [outputs] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(images).detach())


@pytest.mark.wide
def test_aot_inductor_package_runs_our_operators(tmp_path):
    """Compiled ahead of time, and loaded where only fastlenet's operators are, which it calls; for several batches."""
    model = torch.nn.Sequential(
        fastlenet.ConvReLUMaxPool2d(1, 3, 3), torch.nn.Flatten(), fastlenet.LinearReLU(75, 4)
    ).requires_grad_(False)
    batch = Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(3, 1, 12, 12),), dynamic_shapes=({0: batch},))
    assert operators(program.graph) == {"aten", "fastlenet"}
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    images = [torch.randn(size, 1, 12, 12) for size in (1, 3, 64)]
    torch.save(images, tmp_path / "images.pt")
    # In a process of its own: machine code gone wrong dies of a signal, which is then a failure like any other.
    argmax = (
        "import torch, fastlenet\n"
        "torch._C._set_print_stack_traces_on_fatal_signal(True)\n"
        "torch.set_num_threads(1)\n"
        "package = torch._inductor.aoti_load_package('model.pt2')\n"
        "assert package.get_metadata()['AOTI_DEVICE_KEY'] == 'cpu', package.get_metadata()\n"
        "torch.save([package(images) for images in torch.load('images.pt')], 'outputs.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", argmax], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), [model(some) for some in images])
