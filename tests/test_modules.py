"""A module's life: copies, saving, casting, parametrisation, pruning, hooks, frozen parts, checkpointing, tracing."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from harness.operators import saved_for_backward
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlenet

LAYERS = ("conv1", "conv2", "fc1", "fc2")


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


def trained(network, images, steps=3):
    """A few steps of SGD; the loss of each, and where the parameters end."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), torch.arange(len(images)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [parameter.detach().clone() for parameter in network.parameters()]


# --- reparametrisation ----------------------------------------------------------------------------------------------


def test_weight_norm(networks, images):
    for network in networks:
        for name in LAYERS:
            parametrizations.weight_norm(getattr(network, name))
    assert "conv1.parametrizations.weight.original0" in networks[0].state_dict()
    networks[1].load_state_dict(networks[0].state_dict())
    agree(trained(network, images) for network in networks)


def test_spectral_norm_in_evaluation(networks, images):
    for network in networks:
        parametrizations.spectral_norm(network.fc1)
    networks[1].load_state_dict(networks[0].state_dict())
    agree(network.eval()(images) for network in networks)


def test_pruning(networks, images):
    """Masked weights stay zero, through training and once the mask is made permanent."""
    for network in networks:
        for name in LAYERS:
            prune.l1_unstructured(getattr(network, name), "weight", amount=0.5)
        prune.ln_structured(network.conv2, "weight", amount=2, n=2, dim=0)
    agree(trained(network, images) for network in networks)
    zeros = networks[0].conv2.weight == 0
    assert zeros.flatten(1).all(1).sum() == 2
    for network in networks:
        for name in LAYERS:
            prune.remove(getattr(network, name), "weight")
    assert torch.equal(networks[0].conv2.weight == 0, zeros)
    agree(network(images) for network in networks)


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_see_and_change_what_stock_modules_let_them(networks, images):
    """Forward, forward-pre and backward hooks, on modules and on parameters."""
    relu_and_pool = {"conv1": lambda x: F.max_pool2d(F.relu(x), 2), "fc1": F.relu}

    def observe(network, rest):
        seen = []
        for name in ("conv1", "fc1"):
            layer = getattr(network, name)
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
            layer.register_forward_hook(lambda _, args, output, name=name: seen.append(rest[name](output)))
            layer.weight.register_hook(lambda grad: seen.append(grad) or grad.clamp(-1e-3, 1e-3))
            layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
        # Gradients of the fused module's output are those after relu and pool: not what a stock module's hook sees.
        network.fc1.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_input[0]))
        network.fc3.register_full_backward_hook(lambda _, grad_input, grad_output: (grad_input[0] * 2,))
        network(images).square().sum().backward()
        return seen

    fused, stock = networks
    agree([observe(fused, dict.fromkeys(("conv1", "fc1"), torch.clone)), observe(stock, relu_and_pool)])


# --- only what is needed -----------------------------------------------------------------------------------------


class Asked(TorchDispatchMode):
    """Notes which gradients the backward operators are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, list[list[bool]]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlenet" and function._opname.endswith("_backward"):
            self.masks.setdefault(function._opname, []).append(list(args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole", [True, False], ids=["chain", "layers"])
@pytest.mark.parametrize(
    "frozen", ["nothing", "conv1", "conv1 conv2", "fc1.weight", "conv2.bias fc2", "conv1 conv2 fc1 fc2"]
)
def test_frozen_parts_cost_nothing(frozen, whole, networks, images, cpu_kernels):
    """Every gradient is asked for only if a parameter, or something before it, needs it."""
    for network in networks:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen.split())))
    fused, stock = networks
    if not whole:
        fused.fc3.register_forward_hook(lambda *_: None)
    with Asked() as asked:
        fused(images).square().sum().backward()
    stock(images).square().sum().backward()
    agree([[parameter.grad for parameter in network.parameters()] for network in networks])

    needs = {name: parameter.requires_grad for name, parameter in fused.named_parameters()}
    if whole:
        assert asked.masks == {"chain_backward": [[False, *needs.values()]]}
        return
    expected: list[list[bool]] = []
    before = False  # whether anything before the layer needs a gradient
    for name in ("conv1", "conv2"):
        mask = [before, needs[f"{name}.weight"], needs[f"{name}.bias"]]
        if any(mask):
            expected.insert(0, mask)
        before = any(mask)
    assert asked.masks == ({"conv2d_relu_max_pool2d_backward": expected} if expected else {})


def test_nothing_is_saved_for_frozen_networks(networks, images):
    fused = networks[0].requires_grad_(False)
    with saved_for_backward() as saved:
        fused(images)
    assert saved == []


def test_saved_tensors_can_be_packed_away(networks, cpu_kernels):
    """What autograd keeps goes through the hooks, can live elsewhere, and is as little as the README says."""
    fused = networks[0].float()
    images = torch.randn(64, 1, 32, 32)
    packed: list[torch.Tensor] = []

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    results = []
    for hooked in (True, False):
        fused.zero_grad()
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda number: packed[number].clone()):
                output = fused(images)
        else:
            output = fused(images)
        output.square().sum().backward()
        results.append([parameter.grad for parameter in fused.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    # The images; argmax and output of each convolution; the output of each linear layer but the last.
    parameters = {parameter.shape for parameter in fused.parameters()}
    activations = [tensor for tensor in packed if tensor.shape not in parameters and tensor.numel()]
    assert sorted(tensor.shape for tensor in activations) == sorted(
        torch.Size([64, *shape])
        for shape in [
            (1, 32, 32), (6, 14, 14), (6, 14, 14), (16, 5, 5), (16, 5, 5), (120,), (84,)
        ]
    )  # fmt: skip
    argmaxes = [tensor for tensor in activations if tensor.dtype == torch.uint8]
    assert sorted(argmax.shape for argmax in argmaxes) == [torch.Size([64, 6, 14, 14]), torch.Size([64, 16, 5, 5])]


def test_saved_tensors_on_the_cpu(networks, images):
    """PyTorch's own way of offloading them."""
    gradients = []
    for context in (torch.autograd.graph.save_on_cpu(), torch.enable_grad()):
        networks[0].zero_grad()
        with context:
            output = networks[0](images)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in networks[0].parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# --- functional and checkpointed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_train_as_the_whole(reentrant, networks, images):
    """Some layers computed again in the backward, dropout's numbers included: the same training, to the bit."""
    fused = networks[0]

    class Checkpointed(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.net, self.on = fused, on

        def forward(self, input):
            def features(x):
                return F.dropout(self.net.conv2(self.net.conv1(x)), 0.2, self.training).flatten(1)

            # The reentrant kind asks for an input that needs a gradient.
            input = input.clone().requires_grad_()
            inner = checkpoint(features, input, use_reentrant=reentrant) if self.on else features(input)
            return self.net.fc3(self.net.fc2(self.net.fc1(inner)))

    start = {name: value.clone() for name, value in fused.state_dict().items()}
    results = []
    for on in (True, False):
        fused.load_state_dict(start)
        torch.manual_seed(3)
        results.append(trained(Checkpointed(on), images))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradient_penalty_steps(networks, images):
    """Whole training steps whose loss holds a gradient, with an optimizer: as stock."""

    def steps(network):
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        losses = []
        for _ in range(3):
            inputs = images.clone().requires_grad_()
            outputs = network(inputs)
            (slope,) = torch.autograd.grad(outputs.logsumexp(1).sum(), inputs, create_graph=True)
            loss = F.cross_entropy(outputs, torch.arange(3)) + ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    # Adam divides by gradients' magnitudes, and so magnifies rounding where they are small.
    torch.testing.assert_close(*(steps(network) for network in networks), rtol=1e-9, atol=0)


def test_functional_call_with_other_weights(networks, images):
    """Also with a tied weight and a subset of the state."""
    other = {name: torch.randn_like(value) for name, value in networks[0].state_dict().items()}
    subset = {name: value for name, value in other.items() if name.startswith("conv")}
    for state in (other, subset):
        agree(functional_call(network, state, (images,)) for network in networks)
    assert not torch.equal(networks[0].conv1.weight, other["conv1.weight"])


# --- saving, casting, moving -----------------------------------------------------------------------------------------


def test_whole_modules_can_be_allowed_for_weights_only(networks, images):
    """`torch.save` of the module itself, read back without running what a pickle asks for."""
    file = io.BytesIO()
    torch.save(networks[0], file)
    from torch.nn.modules.conv import Conv2d
    from torch.nn.modules.linear import Linear

    allowed = [fastlenet.LeNet, fastlenet.ConvReLUMaxPool2d, fastlenet.LinearReLU, Conv2d, Linear]
    file.seek(0)
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded(images), networks[0](images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("module", [lambda: fastlenet.LeNet(), lambda: fastlenet.ConvReLUMaxPool2d(1, 6, 5)])
def test_compiled_modules_are_copied_without_their_code(module, copied):
    """As nn.Module has it: what `Module.compile` made cannot be pickled."""
    original, images = module(), torch.randn(2, 1, 32, 32)
    expected = original(images)
    original.compile(backend="eager")
    torch.testing.assert_close(original(images), expected)
    assert torch.equal(copied(original)(images), expected)


def test_safetensors_both_ways(networks, images, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    fused, _ = networks
    safetensors.save_model(fused, str(tmp_path / "model.safetensors"))
    for network in (fastlenet.LeNet().double(), fastlenet.StockLeNet().double()):
        safetensors.load_model(network, str(tmp_path / "model.safetensors"))
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fused.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casting(dtype, networks, images):
    """Parameters, output and gradients follow; the numbers are stock's in that dtype, up to its rounding."""
    outputs = []
    for network in networks:
        network.to(dtype)
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
        output = network(images.to(dtype))
        output.sum().backward()
        assert output.dtype == network.conv1.weight.grad.dtype == dtype
        outputs.append(output.detach())
    torch.testing.assert_close(*outputs)


def test_memory_formats(networks, images):
    """Converted to channels_last and back, parameters and outputs are laid out as stock's."""
    wide = torch.randn(3, 6, 14, 14, dtype=torch.float64)
    for layout in (torch.channels_last, torch.contiguous_format):
        for network in networks:
            network.to(memory_format=layout)
            assert network.conv2.weight.is_contiguous(memory_format=layout)
        fused, stock = networks[0].conv2(wide), F.max_pool2d(F.relu(networks[1].conv2(wide)), 2)
        agree([fused, stock])
        assert fused.is_contiguous(memory_format=layout)
        assert stock.is_contiguous(memory_format=layout)
        agree(trained(network, images, 1) for network in networks)


def test_meta_to_empty_in_stock_order():
    """Built without memory, given some, filled: `torch.nn.utils.skip_init` does the same."""
    with torch.device("meta"):
        model = nn.Sequential(fastlenet.ConvReLUMaxPool2d(1, 2, 3), nn.Flatten(), fastlenet.LinearReLU(50, 4))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    for module in model:
        getattr(module, "reset_parameters", lambda: None)()
    assert model(torch.randn(3, 1, 12, 12)).isfinite().all()
    skipped = nn.utils.skip_init(fastlenet.LinearReLU, 50, 4)
    assert skipped.weight.shape == (4, 50)


# --- tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of arguments read sizes
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_jit_trace(frozen, networks, images, tmp_path, either):
    """Frozen, the operators are recorded whole; else stock's are, with gradients. Batches stay open."""
    fused = networks[0].requires_grad_(not frozen)
    traced = torch.jit.trace(fused, images[:2])
    assert ("fastlenet::conv2d_relu_max_pool2d" in str(traced.inlined_graph)) is frozen
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    agree([loaded(images), fused(images)])
    if not frozen:
        for network in (loaded, fused):
            network(images).square().sum().backward()
        agree([[parameter.grad for parameter in network.parameters()] for network in (loaded, fused)])
    # Sizes are tensors while torch.jit.trace runs: nothing of such a call may be left for what is traced next.
    torch.export.export(fused, (images,), strict=True)


# --- linear layers on a CPU: stock's operators and derivatives ------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_layer_on_a_cpu_is_stocks(leading, bias, dtype):
    """To the bit, gradients included, and as many of them as stock has."""
    layer = fastlenet.LinearReLU(7, 4, bias=bias, dtype=dtype)
    images = torch.randn(*leading, 7, dtype=dtype, requires_grad=True)
    sources = [images, *layer.parameters()]
    output = layer(images)
    expected = F.relu(F.linear(images, layer.weight, layer.bias))
    assert type(output.grad_fn).__name__ == "ReluBackward0"
    assert torch.equal(output, expected)
    seed = torch.randn_like(expected)
    grads = [
        torch.autograd.grad(result, sources, seed, create_graph=dtype == torch.float64) for result in (output, expected)
    ]
    for actual, wanted in zip(*grads, strict=True):
        assert torch.equal(actual, wanted)
        assert actual.stride() == wanted.stride()


def test_linear_layer_is_the_fused_operator_for_compilers():
    layer, images = fastlenet.LinearReLU(7, 4), torch.randn(5, 7)
    graph = torch.export.export(layer, (images,)).graph
    assert any("fastlenet.addmm_relu" in str(node.target) for node in graph.nodes)


def test_linear_layer_under_transforms_and_autocast():
    layer, images = fastlenet.LinearReLU(7, 4), torch.randn(5, 7)

    def stock(image):
        return F.relu(F.linear(image, layer.weight, layer.bias))

    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    assert_close(torch.func.vmap(layer)(images), stock(images))
    assert_close(torch.func.vmap(torch.func.jacfwd(layer))(images), torch.func.vmap(torch.func.jacrev(stock))(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), stock(images))
        assert layer(images).dtype == torch.bfloat16
