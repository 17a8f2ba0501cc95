"""The graphed training step: its promises, on a stand-in for CUDA graphs, and on real ones where there is a GPU.

The stand-in records every operator that the step dispatches, undoes what they did, and replays them on the same
memory: as a CUDA graph does, it knows nothing of Python, of changed numbers and of tensors that have moved.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlenet
from fastlenet import graphs
from fastlenet.graphs import GraphedInference, GraphedTrainStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Runs operators and writes them down; `undo` puts all memory back, `replay` does them again in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.rng = torch.get_rng_state()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        # Of all arguments, because not every schema owns up to what the operator modifies (native_batch_norm).
        for tensor in tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.rng)

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                known = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
                again = function(*args, **kwargs)
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() not in known:  # neither a view nor in place
                        old.untyped_storage().copy_(new.untyped_storage())


@pytest.fixture
def captures(monkeypatch):
    """Put the stand-in in the place of CUDA graphs; lists what was captured."""
    made: list[Recording] = []

    class Stream:
        def __init__(self, device=None) -> None:
            self.wait_stream = lambda other: None

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        with (recording := Recording()):
            yield
        recording.undo()
        graph.replay = recording.replay
        made.append(recording)

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    stand_ins = {
        "CUDAGraph": type("CUDAGraph", (), {}),
        "Stream": Stream,
        "current_stream": Stream,
        "graph": capture,
        "stream": contextlib.nullcontext,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


class Wide(nn.Module):
    """What a graph could get wrong: dropout's generator, running statistics, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = fastlenet.ConvReLUMaxPool2d(1, 3, 3, device=None)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = fastlenet.LinearReLU(75, 8)
        self.hidden.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(8, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.fused(input)).flatten(1)
        return self.head(F.dropout(self.hidden(features), 0.3, self.training))


class Halved(torch.optim.Optimizer):
    """An optimizer that knows of no capturing and keeps its state where it should not."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    parameter -= parameter.grad * group["lr"] / state["step"]


class Descent(Halved):
    """An optimizer without state, which never asks for the value of its learning rate."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter -= parameter.grad * self.param_groups[0]["lr"]


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1, "momentum": 0.9, "nesterov": True} | options)


def batches(count, size=12, device="cpu"):
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(size, 1, 12, 12, generator=generator).to(device),
            torch.randint(4, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


class Plain:
    """The loop that the helper must equal."""

    def __init__(self, model, optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def __call__(self, *batch):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Graphed(GraphedTrainStep):
    """The helper, with the model and the optimizer that it was given."""

    def __init__(self, model, loss, optimizer, example_inputs) -> None:
        super().__init__(model, loss, optimizer, example_inputs)
        self.model, self.optimizer = model, optimizer


def pair(make_optimizer=sgd, device="cpu", make_model=Wide, loss=F.cross_entropy):
    """The same model twice, one stepped by the loop and one by the helper."""
    torch.manual_seed(1)
    looped = make_model().to(device)
    stepped = copy.deepcopy(looped)
    loop = Plain(looped, make_optimizer(looped.parameters()))
    return loop, Graphed(stepped, loss, make_optimizer(stepped.parameters()), batches(1, 12, device)[0])


def state_of(model, optimizer):
    """All that a step changes: parameters, buffers, gradients, optimizer state."""
    return (
        list(model.state_dict().values()),
        [parameter.grad for parameter in model.parameters()],
        [value for state in optimizer.state.values() for value in state.values()],
    )


def train_both(loop, step, some, seed=7):
    """Train on the same batches with the same random numbers; every state must be equal to the bit at every step."""
    outcomes, after = [], []
    for take in (loop, step):
        torch.manual_seed(seed)
        outcomes.append([(take(*batch), copy.deepcopy(state_of(take.model, take.optimizer))) for batch in some])
        after.append([torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])])
    for looped, stepped in zip(*outcomes, strict=True):
        torch.testing.assert_close(stepped, looped, rtol=0, atol=0)
    torch.testing.assert_close(*after, rtol=0, atol=0)
    return outcomes[1]


def test_on_a_cpu_it_is_the_loop_and_says_so(caplog):
    with caplog.at_level("DEBUG", "fastlenet"):
        loop, step = pair()
    assert step.graphed is False
    assert "there are no CUDA graphs on cpu" in caplog.text
    train_both(loop, step, [*batches(3), *batches(1, 2)])


def test_a_graphed_step_is_the_loop(captures):
    loop, step = pair()
    assert step.graphed is True
    train_both(loop, step, batches(5))
    assert len(captures) == 1


def test_making_one_and_capturing_change_nothing():
    model = Wide()
    optimizer = sgd(model.parameters())
    before = copy.deepcopy((state_of(model, optimizer), torch.get_rng_state()))
    GraphedTrainStep(model, F.cross_entropy, optimizer, batches(1)[0])
    torch.testing.assert_close((state_of(model, optimizer), torch.get_rng_state()), before, rtol=0, atol=0)


def test_other_batches_are_trained_on_eagerly(captures):
    """A small first one, the last of an epoch between full ones, another dtype: nothing of it disturbs the graph."""
    loop, step = pair()
    full, small = batches(6), batches(3, 2)
    train_both(loop, step, [small[0], *full[:3], small[1], small[2], *full[3:]])
    assert len(captures) == 1


def test_warming_up_and_capturing_see_the_same_memory(captures):
    """A kernel compiled for other addresses would have to be compiled, and loaded, in the middle of a capture."""
    _, step = pair()
    seen = set()
    step.model.register_forward_pre_hook(lambda _, args: seen.add(args[0].data_ptr()))
    for batch in batches(3):
        step(*batch)
    assert len(seen) == 1


def test_losses_and_gradients_are_their_own_and_stay(captures):
    _, step = pair()
    losses = [step(*batch) for batch in batches(4)]
    assert len({loss.item() for loss in losses}) == 4
    assert len({loss.data_ptr() for loss in losses}) == 4
    step.optimizer.zero_grad()
    step(*batches(1)[0])
    assert step.model.head.weight.grad.abs().sum() > 0, "zero_grad by the user does not hide the gradients"
    assert step.model.hidden.bias.grad is None
    assert step.model.unused.grad is None


def test_a_changed_learning_rate_is_captured_anew(captures):
    loop, step = pair()
    for rate in (0.1, 0.01):
        for take in (loop.optimizer, step.optimizer):
            take.param_groups[0]["lr"] = rate
        train_both(loop, step, batches(4))
    assert len(captures) == 2


def test_a_learning_rate_in_a_tensor_is_changed_in_place(captures):
    rate = torch.tensor(0.1)

    def make(parameters):
        optimizer = Descent(parameters)
        optimizer.param_groups[0]["lr"] = rate
        return optimizer

    loop, step = pair(make)
    for value in (0.1, 0.02, 0.05):
        rate.fill_(value)
        train_both(loop, step, batches(3))
    assert len(captures) == 1


def test_options_of_several_numbers_are_compared(captures):
    """Such as Adam's betas, also as tensors, of which a comparison is a tensor."""
    _, step = pair(Descent)
    [group] = step.optimizer.param_groups
    for betas in ((0.9, 0.99), (torch.tensor(0.9), torch.tensor(0.95)), (0.9, 0.97)):
        group["betas"] = betas
        for batch in batches(3):
            step(*batch)
    assert len(captures) == 3


def test_a_mode_a_freeze_and_a_move_are_captured_anew(captures):
    loop, step = pair()
    models = loop.model, step.model
    train_both(loop, step, batches(3))
    for model in models:
        model.eval()
    train_both(loop, step, batches(3))
    for model in models:
        model.train()
        model.fused.requires_grad_(False)
        model.hidden.bias.requires_grad_(True)
    train_both(loop, step, batches(3))
    for model in models:
        model.head.weight.data = model.head.weight.data.clone()
    train_both(loop, step, batches(3))
    assert len(captures) == 4


def test_a_loaded_optimizer_is_captured_anew(captures):
    loop, step = pair()
    train_both(loop, step, batches(3))
    stored = copy.deepcopy(loop.optimizer.state_dict())
    for _ in range(2):  # The first time the groups' options are put into another order too, which tells as well.
        train_both(loop, step, batches(3))
        for optimizer in (loop.optimizer, step.optimizer):
            optimizer.load_state_dict(copy.deepcopy(stored))
    train_both(loop, step, batches(3))
    assert len(captures) == 3


def test_the_gpu_is_not_waited_for(captures):
    """The stand-in refuses what a capture refuses, so it tells a loss that reads a number from the usual one."""
    _, step = pair(loss=lambda output, target: F.cross_entropy(output, target) * float(output.detach().sum() != 0))
    step(*batches(1)[0])
    with pytest.raises(RuntimeError, match="first complaint: operation not permitted when stream is capturing"):
        step(*batches(1)[0])


def test_state_on_the_cpu_is_refused(captures, monkeypatch):
    _, step = pair(Halved)
    step(*batches(1)[0])
    with pytest.raises(RuntimeError, match="Halved keeps its state 'step' on the CPU"):
        step(*batches(1)[0])


def test_optimizers_that_cannot_be_captured_are_named(captures):
    model = Wide()
    for made in (torch.optim.Adam, torch.optim.RMSprop):
        with pytest.raises(ValueError, match=rf"make it with {made.__name__}\(\.\.\., capturable=True\)"):
            GraphedTrainStep(model, F.cross_entropy, made(model.parameters()), batches(1)[0])
    GraphedTrainStep(model, F.cross_entropy, torch.optim.Adam(model.parameters(), capturable=True), batches(1)[0])


def test_bad_examples_are_named():
    model = Wide()
    optimizer = sgd(model.parameters())
    images, labels = batches(1)[0]
    with pytest.raises(ValueError, match=r"the model's inputs and then the target, got 1"):
        GraphedTrainStep(model, F.cross_entropy, optimizer, [images])
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
        GraphedTrainStep(model, F.cross_entropy, optimizer, [images, labels.to("meta")])


# --- inference -----------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """A forward whose outputs stand in a nest, one of them changed in place by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Wide().eval()

    def forward(self, input: torch.Tensor) -> dict:
        logits = self.wide(input)
        return {"logits": logits, "both": (logits.softmax(1), [logits.argmax(1)])}


def infer_both(model, infer, inputs):
    for input in inputs:
        with torch.no_grad():
            torch.testing.assert_close(infer(input), model(input), rtol=0, atol=0)


def test_inference_on_a_cpu_is_the_model_and_says_so(caplog):
    model = Several()
    with caplog.at_level("DEBUG", "fastlenet"):
        infer = GraphedInference(model, batches(1)[0][0])
    assert infer.graphed is False
    assert "there are no CUDA graphs on cpu" in caplog.text
    infer_both(model, infer, [images for images, _ in batches(3)])
    assert not infer(batches(1)[0][0])["logits"].requires_grad


def test_graphed_inference_is_the_model(captures):
    """Other sizes between, parameters changed in place, outputs changed by their user: one capture serves all."""
    model = Several()
    full, small = ([images for images, _ in batches(6, size)] for size in (12, 2))
    infer = GraphedInference(model, full[0])
    infer_both(model, infer, [small[0], *full[:3], small[1], full[3]])
    with torch.no_grad():
        model.wide.head.weight.mul_(2)
        model.wide.norm.running_mean.add_(1)
    first = infer(full[0])
    kept = first["logits"].clone()
    first["logits"].zero_()
    infer_both(model, infer, full)
    infer(full[1])
    torch.testing.assert_close(infer(full[0])["logits"], kept, rtol=0, atol=0)
    assert len(captures) == 1


def test_inference_is_captured_anew_where_the_graph_would_be_wrong(captures):
    model = Several()
    images = [images for images, _ in batches(3)]
    infer = GraphedInference(model, images[0])
    infer_both(model, infer, images)
    changes = (
        lambda: setattr(model.wide.head.weight, "data", -model.wide.head.weight.data),
        lambda: setattr(model.wide.norm, "running_mean", model.wide.norm.running_mean + 1),
        lambda: model.wide.norm.train(),
        lambda: setattr(model.wide, "head", nn.Linear(8, 4)),
    )
    for number, change in enumerate(changes, start=2):
        change()
        model.wide.norm.momentum = 0.0  # so that both runs see the same statistics
        infer_both(model, infer, images)
        assert len(captures) == number
    with torch.autocast("cpu", torch.bfloat16):
        infer_both(model, infer, images)
    assert len(captures) == len(changes) + 2


def test_bad_inference_examples_are_named():
    with pytest.raises(ValueError, match="at least one tensor"):
        GraphedInference(Several())
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
        GraphedInference(Several(), torch.empty(1, device="meta"))


@needs_gpu
def test_graphed_inference_on_a_gpu():
    model = fastlenet.LeNet(device="cuda").eval()
    images = torch.randn(4, 2, 1, 32, 32, device="cuda")
    infer = GraphedInference(model, images[0])
    assert infer.graphed
    infer_both(model, infer, images)


# --- on a GPU ------------------------------------------------------------------------------------------------------


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, capturable=True)


def fused_sgd(parameters):
    return sgd(parameters, lr=torch.tensor(0.1, device="cuda"), fused=True)


@needs_gpu
@pytest.mark.parametrize("make_optimizer", [sgd, adam, fused_sgd])
def test_real_graphs_are_the_loop(make_optimizer):
    loop, step = pair(make_optimizer, "cuda")
    assert step.graphed
    full, small = batches(8, device="cuda"), batches(2, 2, device="cuda")
    calls = []
    step.model.register_forward_pre_hook(lambda *_: calls.append(1))
    train_both(loop, step, [small[0], *full[:5], small[1], *full[5:]])
    assert len(calls) == 4, "both small batches, the first full one, and the capture"


@needs_gpu
def test_real_graphs_of_lenet_never_wait_for_the_gpu():
    """PyTorch itself watches for synchronising calls, in the eager step and in replays."""

    def digits(count):
        generator = torch.Generator().manual_seed(4)
        return [
            (torch.randn(64, 1, 32, 32, generator=generator).cuda(), torch.arange(64).cuda() % 10) for _ in range(count)
        ]

    torch.manual_seed(1)
    looped = fastlenet.LeNet(device="cuda")
    stepped = copy.deepcopy(looped)
    loop = Plain(looped, sgd(looped.parameters()))
    some = digits(6)
    step = GraphedTrainStep(stepped, F.cross_entropy, sgd(stepped.parameters()), some[0])
    train_both(loop, step, some)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in some:
            step(*batch)
            loop(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_that_waits_for_the_gpu_is_told():
    _, step = pair(device="cuda", loss=lambda output, target: F.cross_entropy(output, target) * output.sum().item())
    step(*batches(1, device="cuda")[0])
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph: something in it waits"):
        step(*batches(1, device="cuda")[0])


@needs_gpu
def test_make_graphed_callables():
    """PyTorch's own helper takes our layers; forward and backward are graphs then."""
    torch.manual_seed(1)
    eager = fastlenet.LeNet(device="cuda")
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (torch.randn(8, 1, 32, 32, device="cuda"),))
    for _ in range(3):
        images, labels = torch.randn(8, 1, 32, 32, device="cuda"), torch.arange(8, device="cuda")
        results = []
        for model in (graphed, eager):
            model.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_inference_is_captured_bare(batch):
    model = fastlenet.LeNet(device="cuda").eval()
    images = torch.randn(batch, 1, 32, 32, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        assert torch.equal(output, model(images))
