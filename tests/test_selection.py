"""One decision for each kind of call: who takes it, what is known of it, and what must not change it."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import logging
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastlenet.kernels import configurations
from fastlenet.kernels.geometry import ConvPoolGeometry
from harness.operators import stock_conv2d_relu_max_pool2d

import fastlenet
from fastlenet import functional, ops, selection

pytestmark = pytest.mark.cheap

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
CONV = ops.CONV2D_RELU_MAX_POOL2D


@pytest.fixture(autouse=True)
def _nothing_known():
    selection.forget()
    yield
    selection.forget()


@pytest.fixture
def tensors():
    return torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)


class OnAGpu:
    """What a decision asks of tensors on a GPU, which this machine need not have."""

    def __init__(self, *shape, dtype=torch.float32):
        self.meta = torch.empty(shape, dtype=dtype, device="meta")

    device = torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.meta, name)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "triton" or find_spec(name, *rest))


def decide(operator, settings, *tensors, differentiable=True):
    selection.forget()
    return selection.choose(operator, settings, tensors, differentiable)


# --- the faults that twenty deciding places had made ---------------------------------------------------------------


def walk(output):
    """The names of an output's graph, in order."""
    names, nodes = [], [output.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [onward for onward, _ in node.next_functions if onward is not None]
    return names


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize("what", ["convolution", "linear", "network"])
def test_a_logger_changes_neither_the_graph_nor_what_is_saved(what, caplog):
    from harness.operators import saved_for_backward

    def run():
        torch.manual_seed(0)
        images = torch.randn(2, 1, 32, 32)
        layer = {"convolution": fastlenet.ConvReLUMaxPool2d(1, 6, 5), "linear": fastlenet.LinearReLU(32, 5)}
        with saved_for_backward() as saved:
            output = layer.get(what, fastlenet.LeNet())(images)
        return walk(output), [(tensor.shape, tensor.dtype) for tensor in saved]

    silent = run()
    with caplog.at_level(logging.DEBUG, logger="fastlenet"):
        assert run() == silent
    assert caplog.records
    assert run() == silent


def test_explain_says_what_runs(monkeypatch, gpu):
    """It rebuilt the decision by hand, and said "aten" where stock's operators ran."""
    layer, images = fastlenet.ConvReLUMaxPool2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    asked = []
    monkeypatch.setattr(selection, "REJECTS", {**selection.REJECTS, "cpu": lambda call: asked.append(call) or None})
    monkeypatch.setattr(CONV, "implementation", lambda *_: (None, None))
    (site,) = fastlenet.explain(layer).sites
    assert site.implementation == "cpu"
    choice = selection.choose(CONV, PLAIN, (images, layer.weight, layer.bias))
    assert (choice.implementation, choice.reason) == (site.implementation, site.reason)
    assert asked


@pytest.mark.parametrize(("depth", "columns"), [(85, 64), (113, 64), (96, 128)])
def test_a_convolution_goes_one_way_forward_and_backward(depth, columns, gpu):
    """Those of tf32 with 768 to 1023 products went forward on Triton and backward through a CPU's formulations."""
    operands = OnAGpu(2, depth, 16, 16), OnAGpu(columns, depth, 3, 3), None
    with precision("cudnn.conv", "tf32"):
        choice = decide(CONV, PLAIN, *operands)
        assert choice.implementation == ("triton" if depth * 9 < 768 else "aten")
        assert decide(CONV, PLAIN, *operands, differentiable=False).implementation == "triton"


def test_an_operator_launches_its_own_kernels():
    """An unknown name once led to the convolution's."""
    pytest.importorskip("triton")
    for each in (ops.CONV2D_RELU_MAX_POOL2D, ops.ADDMM_RELU, ops.LINEAR_RELU, ops.CHAIN):
        functions = [getattr(f, "func", getattr(f, "launcher", f)) for f in each.implementation("triton")]
        assert all(each.name in function.__module__ for function in functions)
    with pytest.raises(AttributeError):
        ops.SOFTMAX  # noqa: B018


def test_what_goes_wrong_in_a_linear_layer_is_told(monkeypatch):
    """Every RuntimeError was swallowed, and all was computed again."""
    calls = []

    def out_of_memory(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(F, "linear", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        functional.linear_relu(torch.randn(5, 7), torch.randn(3, 7))
    assert len(calls) == 1


# --- the order, and what a forced one says -----------------------------------------------------------------------


def test_order(gpu, cpu_kernels):
    float64 = torch.float64
    assert decide(CONV, PLAIN, OnAGpu(2, 1, 8, 8), OnAGpu(4, 1, 3, 3), None).implementation == "triton"
    assert decide(CONV, PLAIN, OnAGpu(2, 1, 8, 8, dtype=float64), OnAGpu(4, 1, 3, 3), None).implementation == "aten"
    assert decide(CONV, PLAIN, torch.empty(2, 1, 8, 8), torch.empty(4, 1, 3, 3), None).implementation == "cpu"
    assert decide(CONV, PLAIN, *(torch.empty(2, 1, n, n, device="meta") for n in (8, 3)), None).implementation == "aten"
    cpu_kernels.reason = "too small"
    choice = decide(CONV, PLAIN, torch.empty(2, 1, 8, 8), torch.empty(4, 1, 3, 3), None)
    assert choice.implementation == "aten"
    assert "; too small" in choice.reason


def test_a_library_that_is_faster_is_a_reason_only_where_triton_is_not_forced(gpu):
    deep = OnAGpu(2, 512, 16, 16), OnAGpu(512, 512, 3, 3), None
    choice = decide(CONV, PLAIN, *deep)
    assert choice.implementation == "aten"
    assert "the library is expected to be faster" in choice.reason
    with fastlenet.use_backend("triton"):
        assert decide(CONV, PLAIN, *deep) == ("triton", "backend 'triton' is forced")
    with fastlenet.use_backend("aten"):
        assert decide(CONV, PLAIN, *deep) == ("aten", "backend 'aten' is forced")


def test_a_forced_cpu_backend_runs_or_says_why_not(tensors, cpu_kernels):
    with fastlenet.use_backend("cpu"):
        functional.conv2d_relu_max_pool2d(*tensors).sum().backward()
        assert cpu_kernels.calls == ["conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"]
        with pytest.raises(RuntimeError, match=r"'cpu' is forced, but .* do not run on meta tensors.*'auto'"):
            functional.conv2d_relu_max_pool2d(*(tensor.to("meta") for tensor in tensors))
        cpu_kernels.reason = "no kernel covers this"
        with pytest.raises(NotImplementedError, match="'cpu' is forced, but no kernel covers this"):
            functional.conv2d_relu_max_pool2d(tensors[0][:1], *tensors[1:])
        cpu_kernels.unavailable = lambda: "numba is not installed (pip install 'fastlenet[cpu]')"
        with pytest.raises(RuntimeError, match=r"'cpu' is forced, but numba is not installed \(pip install"):
            functional.conv2d_relu_max_pool2d(tensors[0][:, :, 1:], *tensors[1:])


def test_parts_of_a_chain_that_no_kernel_takes_whole(cpu_kernels, monkeypatch):
    """Its convolutions may still be a kernel's, one by one."""
    monkeypatch.setattr(cpu_kernels, "chain_rejects", lambda *_: "this chain is too long")
    network, images = fastlenet.LeNet(), torch.randn(2, 1, 32, 32)
    output = network(images)
    output.sum().backward()
    assert cpu_kernels.calls == ["conv2d_relu_max_pool2d"] * 2 + ["conv2d_relu_max_pool2d_backward"] * 2
    monkeypatch.setattr(cpu_kernels, "rejects", lambda *_: "these are too small")
    selection.forget()
    cpu_kernels.calls.clear()
    torch.testing.assert_close(network(images), output)
    assert cpu_kernels.calls == []


# --- stock's operators for few images ------------------------------------------------------------------------------


def convolutions(output):
    return [name for name in walk(output) if "Conv" in name]


PRODUCT, LIBRARY = ["SlowConv2DBackward0"], ["ConvolutionBackward0"]


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize(
    ("input", "weight", "options", "expected"),
    [
        ((1, 1, 32, 32), (6, 1, 5, 5), {}, PRODUCT),
        ((8, 6, 14, 14), (16, 6, 5, 4), {"stride": (2, 1), "padding": (1, 2)}, PRODUCT),
        ((9, 6, 14, 14), (16, 6, 5, 5), {}, LIBRARY),
        ((2, 6, 14, 14), (16, 6, 3, 3), {"dilation": 2}, LIBRARY),
        ((2, 6, 14, 14), (16, 3, 5, 5), {"groups": 2}, LIBRARY),
        ((2, 18, 14, 14), (16, 18, 3, 3), {}, LIBRARY),  # 162 products of a sum
        ((1, 6, 64, 64), (16, 6, 5, 5), {}, LIBRARY),  # 2**23 products
    ],
)
def test_few_small_convolutions_are_matrix_products(input, weight, options, expected):
    """Under "auto", in the plain layout, in float32; with the results of stock's own."""
    images, kernel, bias = torch.randn(input), torch.randn(weight, requires_grad=True), torch.randn(weight[0])
    output = functional.conv2d_relu_max_pool2d(images, kernel, bias, **options)
    assert convolutions(output) == expected
    torch.testing.assert_close(output, stock_conv2d_relu_max_pool2d(images, kernel, bias, **options))
    if input[1] > 1:
        last = functional.conv2d_relu_max_pool2d(images.to(memory_format=torch.channels_last), kernel, bias, **options)
        assert convolutions(last) == LIBRARY
    double = (tensor.detach().double().requires_grad_() for tensor in (images, kernel, bias))
    assert convolutions(functional.conv2d_relu_max_pool2d(*double, **options)) == LIBRARY
    with fastlenet.use_backend("aten"):
        assert convolutions(functional.conv2d_relu_max_pool2d(images, kernel, bias, **options)) == LIBRARY


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize(
    ("input", "weight"),
    [
        (torch.randn(2, 6, 14, 28)[..., ::2], torch.randn(16, 6, 5, 5)),
        (torch.randn(2, 6, 14, 14), torch.randn(6, 16, 5, 5).transpose(0, 1)),
        (torch.randn(2, 6, 14, 14), torch.randn(16, 6, 1, 1).to(memory_format=torch.channels_last)),
    ],
    ids=["sliced images", "transposed weight", "weight of one pixel in channels_last"],
)
def test_matrix_products_take_plain_layouts_only(input, weight):
    """Stock's matrix product refuses the gradient of a weight in another layout."""
    images, kernel = input.requires_grad_(), weight.requires_grad_()
    output = functional.conv2d_relu_max_pool2d(images, kernel)
    assert convolutions(output) == LIBRARY
    upstream = torch.randn_like(output)
    found, wanted = (
        torch.autograd.grad(result, (images, kernel), upstream)
        for result in (output, stock_conv2d_relu_max_pool2d(images, kernel))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize(("images", "expected"), [(1, PRODUCT * 2), (8, LIBRARY + PRODUCT), (9, LIBRARY * 2)])
def test_convolutions_of_a_chain_are_matrix_products_each_by_its_size(images, expected):
    """The second has too many products from eight images on."""
    layers = [torch.nn.Conv2d(1, 15, 5), torch.nn.Conv2d(15, 40, 3), torch.nn.Linear(40 * 5 * 5, 10)]
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    input = torch.randn(images, 1, 28, 28)
    output = functional.chain(input, parameters, (PLAIN, PLAIN, "linear"))
    assert convolutions(output) == expected
    first, second = (stock_conv2d_relu_max_pool2d(input, *parameters[:2]), parameters[2:4])
    features = stock_conv2d_relu_max_pool2d(first, *second)
    torch.testing.assert_close(output, F.linear(features.flatten(1), *parameters[4:]))


# --- what is known -------------------------------------------------------------------------------------------------


def test_a_kind_of_call_is_decided_once(tensors, monkeypatch):
    decided, rejects = [], selection.REJECTS["cpu"]
    monkeypatch.setitem(selection.REJECTS, "cpu", lambda call: decided.append(call) or rejects(call))
    for _ in range(3):
        functional.conv2d_relu_max_pool2d(*tensors)
        selection.choose(CONV, PLAIN, tensors)
    assert len(decided) == 1


def test_a_reason_is_logged_once_and_again_after_silence(tensors, caplog):
    tensors = [tensor.double() for tensor in tensors]
    for _ in range(2):
        with caplog.at_level(logging.DEBUG, logger="fastlenet"):
            for _ in range(3):
                functional.conv2d_relu_max_pool2d(*tensors)
        functional.conv2d_relu_max_pool2d(*tensors)
    assert len(caplog.records) == 2


def test_another_number_of_threads_is_noticed():
    """More threads need more images."""
    pytest.importorskip("numba")
    tensors = torch.randn(16, 6, 14, 14), torch.randn(16, 6, 5, 5), None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 8, 1):
            torch.set_num_threads(threads)
            found.append(selection.choose(CONV, PLAIN, tensors).implementation)
    finally:
        torch.set_num_threads(before)
    assert found == ["cpu", "aten", "cpu"]


def test_another_table_is_noticed(monkeypatch, tensors):
    """What follows from the table of configurations is decided anew when another one is in force."""
    known = selection.find(CONV, PLAIN, tensors)
    monkeypatch.setattr(configurations, "table", lambda table={}: table)
    assert selection.find(CONV, PLAIN, tensors) is not known


def test_what_is_known_does_not_grow_without_end(tensors):
    """After some thousand kinds of calls the first is decided anew."""
    known = selection.find(CONV, PLAIN, tensors)
    assert selection.find(CONV, PLAIN, tensors) is known
    images = torch.empty(5000, 3, 8, 8)
    for count in range(1, len(images)):
        selection.find(CONV, PLAIN, (images[:count], *tensors[1:]))
    assert selection.find(CONV, PLAIN, tensors) is not known


def variations(input, weight, bias):
    """Calls that differ from the first in one component of the key each."""
    spread = torch.zeros(2 * len(input), *input.shape[1:])[::2]
    unaligned = torch.zeros(input.numel() + 1)[1:].view(input.shape)
    frozen, matrix = weight.detach(), torch.zeros(4, 4)
    call = (CONV, PLAIN, (input, weight, bias))
    return {
        "itself": (call, {}),
        "settings": ((CONV, PLAIN._replace(stride=(2, 1)), call[2]), {}),
        "no bias": ((CONV, PLAIN, (input, weight, None)), {}),
        "shape": ((CONV, PLAIN, (input[:1], weight, bias)), {}),
        "shape of the weight": ((CONV, PLAIN, (input, weight[:, :, :2], bias)), {}),
        "strides": ((CONV, PLAIN, (spread, weight, bias)), {}),
        "layout of the weight": ((CONV, PLAIN, (input, weight.to(memory_format=torch.channels_last), bias)), {}),
        "dtype": ((CONV, PLAIN, (input.double(), weight.double(), bias.double())), {}),
        "device": ((CONV, PLAIN, (input.to("meta"), weight.to("meta"), bias.to("meta"))), {}),
        "alignment": ((CONV, PLAIN, (unaligned, weight, bias)), {}),
        "negative": ((CONV, PLAIN, (torch._neg_view(input), weight, bias)), {}),
        "gradient": ((CONV, PLAIN, (input, frozen, bias)), {}),
        "one operator": ((ops.LINEAR_RELU, (1, 1), (matrix, matrix, matrix)), {}),
        "another": ((ops.ADDMM_RELU, (1, 1), (matrix, matrix, matrix)), {}),
        "setting": (call, {"backend": "aten"}),
        "precision of convolutions": (call, {"cudnn.conv": "tf32"}),
        "precision of products": (call, {"cuda.matmul": "tf32"}),
    }


def find_all(tensors):
    found = {}
    for name, (call, state) in variations(*tensors).items():
        with fastlenet.use_backend(state.get("backend", "auto")), contextlib.ExitStack() as stack:
            for switch in ("cudnn.conv", "cuda.matmul"):
                stack.enter_context(precision(switch, state.get(switch, "ieee")))
            found[name] = id(selection.find(*call))
    return found


@contextlib.contextmanager
def precision(switch, value):
    switch = operator.attrgetter(switch)(torch.backends)
    before, switch.fp32_precision = switch.fp32_precision, value
    try:
        yield
    finally:
        switch.fp32_precision = before


def test_calls_that_differ_are_known_apart(tensors):
    """Each component of the key is needed: without it, two of these calls would be taken for one."""
    found = find_all(tensors)
    assert len(set(found.values())) == len(found)
    # And each is found again.
    assert find_all(tensors) == found


# --- the house -----------------------------------------------------------------------------------------------------

ROOMS = [
    {"fastlenet", "fastlenet.cli", "fastlenet.__main__"},
    {"fastlenet.training"},
    {
        "fastlenet.lenet",
        "fastlenet.rewrite",
        "fastlenet.fusion",
        "fastlenet.graphs",
        "fastlenet.environment",
        "fastlenet.pattern",
    },
    {"fastlenet.modules", "fastlenet.timing"},
    {"fastlenet.functional"},
    {"fastlenet.selection"},
    {"fastlenet.library", "fastlenet.export"},
    {"fastlenet.ops"},
    {"fastlenet.checks", "fastlenet.reference", "fastlenet.cpu"},
    {"fastlenet.kernels"},
    {"fastlenet.errors", "fastlenet.files", "fastlenet.terminal", "fastlenet._version", "fastlenet.timing"},
    {"fastlenet.private"},
]
"""The rooms, those above first. A room may import those below it, and its own."""


def modules():
    """Every module of the package by name, with its syntax tree and the package that it lies in."""
    for name, folder in (("fastlenet", ROOT / "fastlenet"), ("fastlenet.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join([name, *(part for part in parts if part != "__init__")])
            package = module if parts[-1] == "__init__" else module.rpartition(".")[0]
            yield module, package, ast.parse(path.read_text(encoding="utf-8"))


def imported(package, tree, known):
    """The package's modules that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                if whole in known:
                    yield whole
                elif origin in known and whole != "fastlenet.cpu":  # which an installation may lack
                    yield origin


def room(module):
    """The number of a module's room: that of the longest name that leads to it."""
    places = {name: number for number, names in enumerate(ROOMS) for name in names}
    while module not in places:
        module = module.rpartition(".")[0]
    return places[module]


def test_nothing_imports_upward():
    found = {module: (package, tree) for module, package, tree in modules()}
    upward = [
        f"{module} -> {other}"
        for module, (package, tree) in found.items()
        for other in imported(package, tree, found)
        if room(other) < room(module)
        # What lies above the operators may use them as users do.
        and not (other == "fastlenet" and room(module) <= room("fastlenet.lenet"))
    ]
    assert upward == []


def test_no_module_imports_itself_by_a_detour():
    found = {module: (package, tree) for module, package, tree in modules()}
    graph = {module: set(imported(package, tree, found)) - {module} for module, (package, tree) in found.items()}
    graph["fastlenet"] = set()  # imports all that users call; what lies below names modules and not the package
    while graph:
        leaves = [module for module, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for module in leaves:
            del graph[module]


@pytest.mark.wide
def test_kernels_know_nothing_of_autograd_or_choice():
    for module, package, tree in modules():
        if module.startswith("fastlenet.kernels"):
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"requires_grad", "is_grad_enabled", "autograd"}, module
            others = set(imported(package, tree, {module for module, *_ in modules()})) - {"fastlenet.private"}
            assert all(other.startswith("fastlenet.kernels") for other in others), module
