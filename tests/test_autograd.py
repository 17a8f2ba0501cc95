"""At home in PyTorch: derivatives of any order, torch.func, compile, export, autocast, a module's life."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fastlenet
from fastlenet import functional
from fastlenet.ops.addmm_relu import AddmmReLUFunction
from fastlenet.ops.chain import ChainFunction
from fastlenet.ops.conv2d_relu_max_pool2d import ConvReLUMaxPool2dFunction

pytestmark = pytest.mark.usefixtures("either")

ALL_ELSE = {"stride": (1, 2), "padding": (2, 1), "groups": 2}
POOL = {"pool_size": (3, 2), "pool_stride": (2, 1), "pool_padding": 1, "ceil_mode": True}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def conv_tensors():
    return double(2, 4, 7, 8), double(4, 2, 3, 2), double(4)


@pytest.fixture
def addmm_tensors():
    return double(3), double(5, 4), double(4, 3)


def fused_conv(input, weight, bias):
    return functional.conv2d_relu_max_pool2d(input, weight, bias, **ALL_ELSE, **POOL)


def fused_addmm(input, mat1, mat2):
    return functional.addmm_relu(input, mat1, mat2, beta=0.5, alpha=2.0)


@pytest.fixture
def networks():
    """Fused and stock LeNet in float64, in the same state."""
    fused, stock = fastlenet.LeNet().double(), fastlenet.StockLeNet().double()
    stock.load_state_dict(fused.state_dict())
    return fused, stock


@pytest.fixture
def images():
    return torch.randn(3, 1, 32, 32, dtype=torch.float64)


def agree(values):
    """In float64 both compute the same; what is left is the order of sums."""
    fused, stock = values
    torch.testing.assert_close(fused, stock, rtol=1e-12, atol=1e-14)


# --- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize(("function", "tensors"), [(fused_conv, "conv_tensors"), (fused_addmm, "addmm_tensors")])
def test_gradients_to_second_order_and_forward_mode(function, tensors, request):
    tensors = request.getfixturevalue(tensors)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("subset", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize(("function", "tensors"), [(fused_conv, "conv_tensors"), (fused_addmm, "addmm_tensors")])
def test_second_order_of_single_inputs(function, tensors, subset, request):
    """Some cotangents of a double backward are then undefined."""
    tensors = [tensor.detach() for tensor in request.getfixturevalue(tensors)]
    for tensor, needed in zip(tensors, subset, strict=True):
        tensor.requires_grad_(needed)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_per_sample_gradients(networks, images):
    labels = torch.tensor([1, 2, 3])

    def per_sample(network):
        def loss(parameters, image, label):
            return F.cross_entropy(functional_call(network, parameters, (image[None],)), label[None])

        parameters = {name: value.detach() for name, value in network.named_parameters()}
        return vmap(grad(loss), (None, 0, 0))(parameters, images, labels)

    agree(per_sample(network) for network in networks)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobian(jacobian, networks, images):
    agree(jacobian(network)(images[:1]) for network in networks)


def test_jvp(networks, images):
    agree(jvp(network, (images,), (images.flip(0),)) for network in networks)


def test_forward_mode_by_dual_numbers(networks, images):
    """Without torch.func, and without any requires_grad."""

    def tangent(network):
        network.requires_grad_(False)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(images, images.flip(0))
            return torch.autograd.forward_ad.unpack_dual(network(dual)).tangent

    agree(tangent(network) for network in networks)


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0)])
def test_mapped_over_weights_and_images(in_dims, networks, images):
    stacked, _ = stack_module_state([fastlenet.LeNet().double() for _ in range(3)])
    single = {name: value[0] for name, value in stacked.items()}
    state = stacked if in_dims[0] == 0 else single
    batch = torch.stack([images] * 3) * torch.arange(1, 4).view(3, 1, 1, 1, 1) if in_dims[1] == 0 else images
    agree(vmap(lambda s, x, n=network: functional_call(n, s, (x,)), in_dims)(state, batch) for network in networks)


@pytest.mark.parametrize("in_dims", [(d, w, b) for d in (None, 1) for w in (None, 2) for b in (None, 1)][1:])
@pytest.mark.parametrize(("function", "tensors"), [(fused_conv, "conv_tensors"), (fused_addmm, "addmm_tensors")])
def test_any_argument_may_be_mapped_over_any_dimension(function, tensors, in_dims, request):
    """Groups stay groups, and each copy's gradients are its own: as in a loop over the copies."""
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    tensors = [tensor.detach() for tensor in request.getfixturevalue(tensors)]
    mapped = [
        tensor if dim is None else torch.stack([factor * tensor for factor in scale], dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]

    def outputs(*arguments):
        return function(*arguments), grad(lambda *a: function(*a).square().sum(), (0, 1, 2))(*arguments)

    def copy_of(i):
        return [t if dim is None else t.select(dim, i) for t, dim in zip(mapped, in_dims, strict=True)]

    ours, ours_grads = vmap(outputs, in_dims)(*mapped)
    loop = [outputs(*copy_of(i)) for i in range(len(scale))]
    agree((ours, torch.stack([output for output, _ in loop])))
    for k, gradient in enumerate(ours_grads):
        agree((gradient, torch.stack([grads[k] for _, grads in loop])))


def test_maps_nest(conv_tensors):
    """Vmap of vmap of a gradient."""
    image, weight, bias = (tensor.detach() for tensor in conv_tensors)
    images, weights = torch.stack([image, -image]), torch.stack([weight, weight / 2, -weight])
    slope = grad(lambda x, w: fused_conv(x, w, bias).square().sum())
    nested = vmap(vmap(slope, (None, 0)), (0, None))(images, weights)
    agree((nested, torch.stack([torch.stack([slope(x, w) for w in weights]) for x in images])))


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "fc2.bias"])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_hessian(outer, name, networks, images):
    """Forward mode over reverse mode, as torch.func.hessian does it, and reverse over reverse."""

    def of(network):
        parameters = {name: value.detach() for name, value in network.named_parameters()}
        return outer(
            jacrev(lambda value: functional_call(network, {**parameters, name: value}, (images[:1],)).square().sum())
        )(parameters[name])

    agree(of(network) for network in networks)


def test_gradient_penalty_trains(networks, images):
    """A loss of a gradient, back-propagated into every weight."""

    def gradients(network):
        inputs = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
        weights = [value for name, value in network.named_parameters() if "weight" in name]
        return torch.autograd.grad((slope.norm() - 1) ** 2, weights)

    agree(gradients(network) for network in networks)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, networks, images):
    def gradients(network):
        inputs = images.clone().requires_grad_()
        checkpoint(network, inputs, use_reentrant=reentrant).sum().backward()
        return [inputs.grad, *(parameter.grad for parameter in network.parameters())]

    agree(gradients(network) for network in networks)


def test_anomaly_detection_and_frozen_parameters(networks, images):
    fused = networks[0]
    fused.conv1.requires_grad_(False)
    fused.fc1.weight.requires_grad_(False)
    with torch.autograd.set_detect_anomaly(True):
        fused(images).sum().backward()
    assert fused.conv1.weight.grad is None
    assert fused.fc1.weight.grad is None
    assert fused.fc1.bias.grad is not None
    assert fused.conv2.weight.grad is not None


@pytest.mark.parametrize("layer", [None, "conv2"])
def test_anomaly_detection_names_the_operators(layer, networks, images, cpu_kernels):
    """A gradient that turns into NaN is told at the node where it does, with the line of its forward."""
    fused = networks[0]
    module, name = fused, "ConvReLUMaxPool2d_ConvReLUMaxPool2d_LinearReLU_LinearReLU_LinearChainBackward"
    if layer is not None:
        module, name = getattr(fused, layer), "ConvReLUMaxPool2dFunctionBackward"

    def spoil(_, args, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    module.register_forward_hook(spoil)
    with torch.autograd.set_detect_anomaly(True):
        loss = fused(images).sum()
        with (
            pytest.warns(UserWarning, match=rf"Error detected in {name}. Traceback of forward call(?s:.*)lenet.py"),
            pytest.raises(RuntimeError, match=rf"Function '{name}' returned nan values"),
        ):
            loss.backward()


def test_function_is_skipped_where_no_gradient_is_needed(networks, images, monkeypatch):
    for function in (ConvReLUMaxPool2dFunction, AddmmReLUFunction, ChainFunction):
        monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        assert networks[0](images).grad_fn is None
    with torch.inference_mode():
        assert networks[0](images).is_inference()
    assert networks[0].requires_grad_(False)(images).grad_fn is None


# --- raw operators, compile, export --------------------------------------------------------------------------------

GEOMETRIES = {
    "LeNet": ((2, 1, 10, 10), (3, 1, 3, 3), ((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)),
    "all else": ((2, 4, 7, 8), (4, 2, 3, 2), ((1, 2), (2, 1), (1, 1), 2, (3, 2), (2, 1), (1, 1), (1, 1), True)),
}


def test_raw_operators_take_tensors_that_require_gradients():
    """They are below autograd: the result is stock's, exact for integers whatever the order of sums."""
    images, weight, bias = (torch.randint(-4, 5, shape).float() for shape in ((2, 1, 10, 10), (3, 1, 3, 3), (3,)))
    geometry = GEOMETRIES["LeNet"][2]
    output, _ = torch.ops.fastlenet.conv2d_relu_max_pool2d(
        images, weight.requires_grad_(), bias.requires_grad_(), *geometry, True
    )
    assert torch.equal(output, F.max_pool2d(F.relu(F.conv2d(images, weight, bias)), 2))


@pytest.mark.wide
def test_one_graph_for_every_batch(networks):
    """Where the user says that the batch is dynamic; see test_compile.py for one that turns out to be."""
    fused, stock = (network.float() for network in networks)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    for size in (4, 5, 9):
        images, labels = torch.randn(size, 1, 32, 32), torch.arange(size) % 10
        for network in (compiled, stock):
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
        for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert counter.frame_count == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), stock(images))


@pytest.mark.wide
def test_one_layer_in_a_compiled_stock_model():
    model = torch.nn.Sequential(fastlenet.ConvReLUMaxPool2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(75, 2))
    images = torch.randn(4, 1, 12, 12)
    torch._dynamo.reset()
    results = []
    for call in (torch.compile(model, fullgraph=True), model):
        model.zero_grad()
        output = call(images)
        output.square().sum().backward()
        results.append((output.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_dynamic_batch(strict, networks):
    fused = networks[0].float()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(fused, (torch.randn(2, 1, 32, 32),), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    images = torch.randn(7, 1, 32, 32)
    torch.testing.assert_close(torch.export.load(file).module()(images), fused(images))


# --- autocast ------------------------------------------------------------------------------------------------------


def test_autocast_as_stock(networks):
    """Output and gradient dtypes, in the region, in a disabled one inside it, and for float64."""
    fused, stock = (network.float() for network in networks)
    images = torch.randn(4, 1, 32, 32)

    def observe(network):
        network.zero_grad()
        seen = []
        network.conv1.register_forward_hook(lambda *args: seen.append(args[2].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            output = network(images)
            with torch.autocast("cpu", enabled=False):
                inner = network(images)
        output.float().sum().backward()
        return seen, output.dtype, inner.dtype, [parameter.grad.dtype for parameter in network.parameters()]

    assert observe(fused) == observe(stock)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.double()(images.double()).dtype == torch.float64


def test_backward_inside_an_autocast_region_keeps_its_dtype():
    """The forward ran in float32; a cast inside the backward would lose half the digits."""
    layer, images = fastlenet.ConvReLUMaxPool2d(3, 4, 3), torch.randn(2, 3, 8, 8, requires_grad=True)
    layer(images).sum().backward()
    expected = images.grad.clone()
    images.grad = None
    output = layer(images)
    with torch.autocast("cpu", torch.bfloat16):
        output.sum().backward()
    assert torch.equal(images.grad, expected)


# --- a module's life -----------------------------------------------------------------------------------------------


def test_same_seed_same_weights():
    made = []
    for kind in (fastlenet.LeNet, fastlenet.StockLeNet):
        torch.manual_seed(5)
        made.append(kind().state_dict())
    torch.testing.assert_close(*made, rtol=0, atol=0)


LAYERS = {
    "network": (fastlenet.LeNet, fastlenet.StockLeNet),
    "convolution": (lambda: fastlenet.ConvReLUMaxPool2d(4, 6, 3, groups=2), lambda: torch.nn.Conv2d(4, 6, 3, groups=2)),
    "linear": (lambda: fastlenet.LinearReLU(5, 3, bias=False), lambda: torch.nn.Linear(5, 3, bias=False)),
}


@pytest.mark.parametrize("direction", ["to stock", "from stock"])
@pytest.mark.parametrize("name", LAYERS)
def test_states_fit_both_ways(name, direction):
    """Same names in the same order, and every value arrives."""
    source, target = (make() for make in (LAYERS[name] if direction == "to stock" else LAYERS[name][::-1]))
    assert not any(torch.equal(*pair) for pair in zip(source.parameters(), target.parameters(), strict=True))
    target.load_state_dict(source.state_dict(), strict=True)
    assert list(target.state_dict()) == list(source.state_dict())
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_copies(networks, images):
    fused = networks[0]
    expected = fused(images)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    loaded = fastlenet.LeNet().double()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copied", "read"])
def test_copies_keep_every_option_and_share_nothing(how):
    options = {"stride": 2, "padding": "valid", "dilation": (1, 2), "groups": 2, "bias": False, "dtype": torch.float64}
    layer = fastlenet.ConvReLUMaxPool2d(4, 6, (3, 2), **options, **POOL)
    twin, images = how(layer), torch.randn(2, 4, 20, 20, dtype=torch.float64)
    expected = layer(images)
    assert (type(twin), repr(twin)) == (type(layer), repr(layer))
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(layer(images), expected)
    assert not twin(images).any()


@pytest.mark.parametrize("how", [{"device": "meta"}, {}], ids=["made there", "moved there"])
def test_meta_device_and_to_empty(how):
    stock, images = fastlenet.StockLeNet(), torch.randn(2, 1, 32, 32)
    meta = fastlenet.LeNet(**how).to("meta")
    assert meta(images.to("meta")).shape == (2, 10)
    real = meta.to_empty(device="cpu")
    real.load_state_dict(stock.state_dict())
    torch.testing.assert_close(real(images), stock(images))


def test_channels_last_model(networks, images):
    fused, stock = (network.to(memory_format=torch.channels_last) for network in networks)
    wide = images.expand(3, 1, 32, 32).to(memory_format=torch.channels_last)
    agree((fused(wide), stock(wide)))


def test_repr_names_what_is_not_default():
    layer = fastlenet.ConvReLUMaxPool2d(3, 4, 5, pool_size=3, pool_stride=2, ceil_mode=True, bias=False)
    assert layer.extra_repr().endswith("bias=False, pool_size=3, pool_stride=2, ceil_mode=True")
