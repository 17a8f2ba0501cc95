"""The backend: what it finds in a graph, what it refuses, its options, and how it measures."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from harness.fuzz import assume, examples, given, settings, st
from harness.judge import assert_same_values, exact_grid
from networks import TutorialNet
from test_fuse import images_of, results
from torch import nn

import fastlenet
from fastlenet import timing
from fastlenet.fusion.backend import Backend


class Pooled(nn.Module):
    """Convolution, something in between, max-pool."""

    def __init__(self, between, **conv):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, **conv)
        self.between = between
        self.pool = nn.MaxPool2d(2)

    def forward(self, images):
        return self.pool(self.between(self.conv(images)))


class Body(nn.Module):
    """A forward given as a function of the model and its images."""

    def __init__(self, body, training=True):
        super().__init__()
        self.body = body
        self.conv, self.conv2, self.norm, self.linear = (
            nn.Conv2d(2, 4, 3),
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(16, 4),
        )
        self.train(training)

    def forward(self, images):
        return self.body(self, images)


def shared(model, images):
    maps = F.relu(model.conv(images))
    hidden = model.linear(F.max_pool2d(maps, 3).flatten(1))
    return F.relu(hidden) + hidden + maps.mean()


def seen_before(model, images):
    maps = model.conv(images)
    mean = maps.mean()
    F.relu(maps, inplace=True)
    return F.max_pool2d(maps, 2) + mean


def seen_after(model, images):
    maps = model.conv(images)
    maps.relu_()
    return F.max_pool2d(maps, 2) + maps.mean()


def old_name(model, images):
    maps = model.conv(images)
    after = maps.relu_()
    return F.max_pool2d(after, 2) + maps.mean()


def changed_through_a_view(model, images):
    maps = model.conv(images)
    view = maps.view(-1)
    maps.relu_()
    return F.max_pool2d(maps, 2).sum() + view.sum()


def view_is_changed(model, images):
    maps = model.conv(images)
    maps.view(-1).mul_(-1)
    return F.max_pool2d(F.relu(maps), 2)


def row_is_changed(model, images):
    maps = model.conv(images)
    maps[0] += 1
    return F.max_pool2d(F.relu(maps), 2)


def alias_by_dropout(model, images):
    maps = model.conv(images)
    same = F.dropout(maps, training=False)
    maps.relu_()
    return F.max_pool2d(F.relu(same), 2) - same.mean()


def returned(model, images):
    maps = F.relu(model.conv(images))
    return F.max_pool2d(maps, 2), maps


def indices(model, images):
    maps, index = F.max_pool2d(F.relu(model.conv(images)), 2, return_indices=True)
    return maps + index


def late(model, images):
    return F.relu(F.max_pool2d(model.conv(images), 2, 2, padding=1, dilation=7))


def statistics_change_in_between(model, images):
    maps = model.conv(images)
    model.norm.running_mean.add_(1)
    return F.max_pool2d(F.relu(model.norm(maps)), 2)


def statistics_change_by_an_operator(model, images):
    maps, mean = model.conv(images), model.norm.running_mean
    mean += 1
    return F.max_pool2d(F.relu(model.norm(maps)), 2)


def statistics_change_by_an_index(model, images):
    maps = model.conv(images)
    model.norm.running_var[1:] = 2
    return F.max_pool2d(F.relu(model.norm(maps)), 2)


def statistics_are_an_output(model, images):
    maps, mean = model.conv(images), model.norm.running_mean
    torch.add(mean, 1, out=mean)
    return F.max_pool2d(F.relu(model.norm(maps)), 2)


def gradients_switched_in_between(model, images):
    maps = model.conv(images)
    with torch.no_grad():
        maps = F.relu(maps)
    return F.max_pool2d(maps, 2) + images.mean() * model.conv.bias.sum()


def autocast_in_between(model, images):
    maps = model.conv(images)
    with torch.autocast("cpu", torch.bfloat16):
        return F.max_pool2d(F.relu(maps), 2) + model.conv2(images).float().mean()


def autocast_ends_in_between(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.conv(images)
    return F.max_pool2d(F.relu(maps), 2).float()


REFUSED = {
    "shared_activation": (lambda: Body(shared), "is used by max_pool2d, mean too|is used by mean too"),
    "seen_before_relu_in_place": (lambda: Body(seen_before), "is used by mean too"),
    "seen_after_relu_in_place": (lambda: Body(seen_after), "is used by mean too"),
    "used_under_its_old_name": (lambda: Body(old_name), "is used by mean too"),
    "changed_through_a_view": (lambda: Body(changed_through_a_view), "is used by view too"),
    "view_is_changed": (lambda: Body(view_is_changed), "is used by view too"),
    "row_is_changed": (lambda: Body(row_is_changed), "is used by getitem"),
    "alias_by_dropout": (lambda: Body(alias_by_dropout), "is used by"),
    "returned": (lambda: Body(returned), "is used by the output too"),
    "indices": (lambda: Body(indices), "returns indices"),
    "relu_after_padded_dilated_pool": (lambda: Body(late), "both padding and dilation"),
    "statistics_change": (lambda: Body(statistics_change_in_between, training=False), "may change an operand"),
    "statistics_change_by_an_operator": (
        lambda: Body(statistics_change_by_an_operator, training=False), "may change an operand",
    ),
    "statistics_change_by_an_index": (
        lambda: Body(statistics_change_by_an_index, training=False), "may change an operand",
    ),
    "statistics_are_an_output": (lambda: Body(statistics_are_an_output, training=False), "may change an operand"),
    "gradients_switched": (lambda: Body(gradients_switched_in_between), "may switch gradients or autocast"),
    "autocast": (lambda: Body(autocast_in_between), "may switch gradients or autocast"),
    "autocast_ends": (lambda: Body(autocast_ends_in_between), "may switch gradients or autocast"),
    "training_batch_norm": (
        lambda: Pooled(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), "statistics from the whole batch",
    ),
    "batch_norm_without_statistics": (
        lambda: Pooled(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())).eval(),
        "statistics from the whole batch",
    ),
    "training_dropout": (lambda: Pooled(nn.Sequential(nn.Dropout(), nn.ReLU())), "drops out, in training mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name, ran):
    """`explain` says why; the fused model computes what the stock model does, gradients included."""
    make, reason = REFUSED[name]
    model, images = make().double(), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    table = fastlenet.explain(model, images)
    refused = [site for site in table.sites if site.reason != "fastlenet.fuse can take it over"]
    assert any(part in site.reason for site in refused for part in reason.split("|")), table
    fused = fastlenet.fuse(copy.deepcopy(model), inplace=True)
    assert ran(fused, images)[0] == 0
    fused.load_state_dict(model.state_dict())
    outputs = []
    for network in (model, fused):
        torch.manual_seed(0)
        network.zero_grad()
        output = network(images)
        parts = output if isinstance(output, tuple) else (output,)
        sum(part.sum() for part in parts).backward()
        outputs.append((output, [parameter.grad for parameter in network.parameters()], list(network.buffers())))
    torch.testing.assert_close(outputs[1], outputs[0])


def interleaved(model, images):
    first, second = model.conv(images), model.conv2(images)
    first, second = F.relu(first), F.relu(second)
    return F.max_pool2d(first, 2) + F.max_pool2d(second, 2)


def input_changed_afterwards(model, images):
    images = images + 0
    with torch.no_grad():
        maps = model.conv(images)
        images.mul_(0)
        return F.max_pool2d(F.relu(maps), 2) + images.sum()


def within_autocast(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        return F.max_pool2d(F.relu(model.conv(images)), 2)


def within_no_grad(model, images):
    with torch.no_grad():
        maps = F.max_pool2d(F.relu(model.conv(images)), 2)
    return maps + model.conv.bias.sum()


def result_is_changed(model, images):
    return F.max_pool2d(F.relu(model.conv(images)), 2).mul_(2).add_(model.linear.bias.sum() + model.linear.weight.sum())


def view_of_result_is_changed(model, images):
    rows = F.max_pool2d(F.relu(model.conv(images)), 4).flatten(1)
    rows *= 2
    return model.linear(rows)


def result_is_dropped_in_place(model, images):
    maps = F.dropout(F.max_pool2d(F.relu(model.conv(images)), 4), 0.5, True, True)
    return model.linear(maps.flatten(1))


def twice(model, images):
    return F.max_pool2d(F.relu(model.conv(images)), 2) + F.max_pool2d(F.relu(model.conv(images.flip(0))), 2)


def by_addmm(model, images):
    rows = images[:, 0, :4, :4].flatten(1)
    first = torch.addmm(model.linear.bias, rows, model.linear.weight.t(), beta=2, alpha=3).relu()
    return first + F.relu(model.linear.bias.addmm(rows, model.linear.weight.t()))


def named_arguments(model, images):
    maps = F.conv2d(input=images, weight=model.conv.weight, bias=model.conv.bias, padding="same", dilation=2)
    return F.max_pool2d(input=F.relu(input=maps, inplace=True), kernel_size=(3, 2), stride=2, ceil_mode=True)


def padded_otherwise(model, images):
    return F.max_pool2d(F.relu(model.conv(F.pad(images, (1, 1, 1, 1), mode="reflect"))), 2)


def window_from_a_size(model, images):
    return F.max_pool2d(F.relu(model.conv(images)), images.shape[-1] // 4)


FOUND = {
    "interleaved": (interleaved, (2, 0)),
    "input_changed_afterwards": (input_changed_afterwards, (1, 0)),
    "within_autocast": (within_autocast, (1, 0)),
    "within_no_grad": (within_no_grad, (1, 0)),
    "twice": (twice, (2, 0)),
    "addmm": (by_addmm, (0, 2)),
    "named_arguments": (named_arguments, (1, 0)),
    "padded_otherwise": (padded_otherwise, (1, 0)),
    "window_from_a_size": (window_from_a_size, (1, 0)),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name, ran):
    body, sites = FOUND[name]
    model, images = Body(body).double(), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    if "autocast" in name:
        model, images = model.float(), images.float()
    fused = fastlenet.fuse(model)
    assert ran(fused, images) == sites
    outcomes = []
    for network in (model, fused):
        network.zero_grad()
        output = network(images)
        if output.requires_grad:
            output.sum().backward()
        outcomes.append((output, [None if p.grad is None else p.grad.clone() for p in network.parameters()]))
    tolerance = 0.05 if "autocast" in name else 1e-10
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", [result_is_changed, view_of_result_is_changed, result_is_dropped_in_place])
def test_a_result_may_be_changed_in_place(change):
    model, images = Body(change).double(), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    del model.conv2, model.norm
    fused = fastlenet.fuse(model)
    for (name, actual), expected in zip(results(fused, images).items(), results(model, images).values(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_folded_norm_reaches_its_parameters():
    model = (
        Pooled(nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Dropout2d(), nn.ReLU(inplace=True))).double().eval()
    )
    nn.init.uniform_(model.between[0].weight, -1, 1)
    nn.init.uniform_(model.between[0].running_var, 0.5, 2)
    fused, images = fastlenet.fuse(model), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    for name, value in results(model, images).items():
        torch.testing.assert_close(results(fused, images)[name], value, msg=lambda m, name=name: f"{name}: {m}")


class Marked(torch.Tensor):
    """A kind of tensor with operators of its own, as quantised and distributed ones are."""


def test_parameters_of_another_kind_are_left_alone(ran):
    model, images = Pooled(nn.ReLU()), torch.randn(3, 2, 10, 10)
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Marked))
    fused = fastlenet.fuse(model)
    assert ran(fused, images) == (0, 0)
    assert type(fused(images)) is type(model(images)) is Marked
    assert "are of type Marked" in str(fastlenet.explain(fused))


@pytest.mark.parametrize("order", ["relu_first", "pool_first"])
def test_order_of_relu_and_pool_makes_no_difference(order, ran):
    """Many ties, zeros and NaN: values and gradients are those of either order in stock, which agree."""

    def ordered(model, images):
        maps = model.conv(images)
        if order == "relu_first":
            return F.max_pool2d(F.relu(maps), 3, 2, 1)
        return F.relu(F.max_pool2d(maps, 3, 2, 1))

    model = Body(ordered)
    del model.linear, model.conv2, model.norm
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(exact_grid(tuple(parameter.shape), torch.float32, terms=18))
    fused = fastlenet.fuse(model)
    images = exact_grid((4, 2, 12, 12), torch.float32, terms=18)
    images[1, 0, 3, 4] = torch.nan
    images[2, 1, 5, 5] = torch.inf
    assert ran(fused, images) == (1, 0)
    actual, expected = results(fused, images), results(model, images)
    for name in ("output", "conv.weight", "conv.bias"):
        assert_same_values(actual[name], expected[name], name=name)
    finite = torch.tensor([0, 3])
    assert_same_values(results(fused, images[finite])["input"], results(model, images[finite])["input"])


@st.composite
def chains(draw):
    """A Sequential of random layers, most of them parts of sites."""
    layers, channels = [], 2
    parts = ["conv", "relu", "pool", "norm", "dropout", "identity", "sigmoid", "tuple"]
    for part in draw(st.lists(st.sampled_from(parts), min_size=2, max_size=9)):
        if part == "conv":
            wide = draw(st.integers(1, 4))
            layers.append(nn.Conv2d(channels, wide, draw(st.integers(1, 3)), padding=1, bias=draw(st.booleans())))
            channels = wide
        layers += {
            "conv": [],
            "relu": [nn.ReLU(inplace=draw(st.booleans()))],
            "pool": [nn.MaxPool2d(2, draw(st.integers(1, 2)), padding=1, ceil_mode=draw(st.booleans()))],
            "norm": [nn.BatchNorm2d(channels)],
            "dropout": [nn.Dropout2d(0.5)],
            "identity": [nn.Identity()],
            "sigmoid": [nn.Sigmoid()],
            "tuple": [nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())],
        }[part]
    return nn.Sequential(*layers), draw(st.booleans())


@settings(max_examples=examples(12))
@given(chains())
def test_random_chains(drawn):
    """Whatever is found in a random chain of layers, the numbers stay."""
    model, training = drawn
    model = nn.Sequential(nn.Conv2d(2, 2, 1), *model).double().train(training)
    fused = fastlenet.fuse(model)
    images = torch.randn(2, 2, 14, 14, dtype=torch.float64)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    try:
        expected = results(model, images)
    except RuntimeError:  # relu in place may spoil what the layer before it keeps
        assume(False)
    for name, value in statistics.items():
        model.get_buffer(name).copy_(value)
    for name, value in results(fused, images).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_torch_compile_finds_the_backend(ran):
    assert "fastlenet" in torch._dynamo.list_backends()
    model, images = TutorialNet().double(), images_of("tutorial").double()
    compiled = torch.compile(model, backend="fastlenet", fullgraph=True)
    assert ran(compiled, images) == (2, 2)
    for (name, actual), expected in zip(
        results(compiled, images).items(), results(model, images).values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.wide
def test_inductor_takes_the_fused_graph(monkeypatch):
    """Training included; a fused operator is one opaque call in what Inductor compiles. A changed batch, too."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU()
    )
    model = model.double().eval()
    compiled = torch.compile(model, backend="fastlenet", options={"inner": "inductor"})
    code = []
    monkeypatch.setattr("torch._inductor.graph.GraphLowering.save_output_code", code.append)
    for size in (4, 3):
        images = torch.randn(size, 2, 8, 8, dtype=torch.float64)
        actual, expected = results(compiled, images), results(model, images)
        for value, (name, truth) in zip(actual.values(), expected.items(), strict=True):
            torch.testing.assert_close(value, truth, msg=lambda m, name=name: f"{name}: {m}")
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))
    assert any("torch.ops.fastlenet.conv2d_relu_max_pool2d" in source for source in code)
    assert any("torch.ops.fastlenet.addmm_relu" in source for source in code)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"inner": "cudagraphs"}, "'inner'"), ({"measure": 1}, "'measure'"), ({"measures": True}, "'measures'")],
)
def test_other_options_are_errors(options, message):
    compiled = torch.compile(TutorialNet(), backend="fastlenet", options=options)
    with pytest.raises(Exception, match=message) as error:
        compiled(images_of("tutorial"))
    assert isinstance(error.value.inner_exception, ValueError)


def test_a_mode_is_an_error():
    compiled = torch.compile(TutorialNet(), backend="fastlenet", mode="reduce-overhead")
    with pytest.raises(Exception, match="no mode, but got 'reduce-overhead'"):
        compiled(images_of("tutorial"))


def test_measure_keeps_what_wins(monkeypatch, ran):
    wins = itertools.cycle([0, timing.WINS])
    monkeypatch.setattr(timing, "compare", lambda *_: timing.Comparison(2e-3, 1e-3, next(wins)))
    compiled = torch.compile(TutorialNet(), backend="fastlenet", options={"measure": True})
    assert ran(compiled, images_of("tutorial")) == (1, 1)


@pytest.mark.parametrize("autocast", [False, True])
def test_measuring_runs_both_on_numbers_of_the_right_kind(autocast, monkeypatch):
    """What is timed is the site, at its shape, under its autocast, with its backward where a gradient is needed.

    On numbers whose products and sums are exact, stock and fused operators give the same values.
    """
    seen = []

    def rand(shape, generator, **options):
        """Numbers from 0 to 1, which are scaled to numbers of an exact grid from -1 to 1."""
        return (exact_grid(tuple(shape), torch.bfloat16, generator).to(**options) + 1) / 2

    def compare(stock, fused, device):
        seen.append([stock(), fused()])
        return timing.Comparison(2e-3, 1e-3, timing.WINS)

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(torch, "rand", rand)
    model = Body(within_autocast if autocast else interleaved)
    compiled = torch.compile(model, backend=Backend(measure=True))
    images = torch.randn(3, 2, 10, 10)
    compiled(images)
    with torch.no_grad():
        compiled(images)
    assert len(seen) == (2 if autocast else 4)
    half = len(seen) // 2
    for stock, fused in seen[:half]:
        assert [value.shape for value in stock] == [(4, 2, 3, 3), (4,)]
        for expected, actual in zip(stock, fused, strict=True):
            assert_same_values(actual, expected)
    for stock, fused in seen[half:]:
        assert stock.shape == (3, 4, 4, 4)
        assert stock.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert_same_values(fused, stock)


def run_for(clock, *milliseconds):
    """A call that takes so long by a planted clock, in turns."""
    lengths = itertools.cycle(milliseconds)

    def call():
        clock[0] += next(lengths) / 1e3

    return call


@pytest.mark.parametrize(
    ("stock", "fused", "clear"),
    [((3,), (1,), True), ((1,), (3,), False), ((1,), (1,), False), ((1.01,), (1,), False), ((1, 2), (2, 1), False)],
    ids=["faster", "slower", "equal", "within_the_margin", "changing"],
)
def test_only_clear_wins_count(stock, fused, clear, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = timing.compare(run_for(clock, *stock), run_for(clock, *fused), torch.device("cpu"))
    assert times.clear is clear
    if len(stock) == 1:
        assert (times.stock, times.fused) == pytest.approx((stock[0] / 1e3, fused[0] / 1e3))


@pytest.mark.parametrize(("won", "rounds"), [(0, 3), (5, 11), (11, 20)])
def test_a_lost_cause_is_cut_short(won, rounds, monkeypatch):
    """Three rounds lost at first are enough: a large model's user is not kept waiting."""
    clock, calls = [0.0], itertools.count(-2)  # two calls come before the first round, and each round has two
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)

    def fused():
        clock[0] += 0.001 if next(calls) < 2 * won else 0.003

    times = timing.compare(run_for(clock, 2), fused, torch.device("cpu"))
    assert (times.wins, times.rounds, times.clear) == (won, rounds, False)
    assert str(times) == f"won {won} of {rounds} rounds"


def test_a_hiccup_does_not_hide_a_win(monkeypatch):
    clock, calls = [0.0], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)

    def fused():
        clock[0] += 0.1 if next(calls) in (4, 9) else 0.001

    times = timing.compare(run_for(clock, 2), fused, torch.device("cpu"))
    assert (times.wins, times.rounds, times.clear) == (16, 18, True)


@pytest.mark.parametrize(("fused", "clear"), [(1.5, True), (2.0, False)])
def test_what_the_other_leaves_behind_does_not_decide(fused, clear, monkeypatch):
    """A call takes three times as long after the other one, which leaves other data in the caches."""
    clock, before = [0.0], [None]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)

    def call(name, milliseconds):
        clock[0] += milliseconds * (1 if before[0] == name else 3) / 1e3
        before[0] = name

    times = timing.compare(lambda: call("stock", 2.0), lambda: call("fused", fused), torch.device("cpu"))
    assert times.clear is clear


@pytest.mark.parametrize(("often", "least", "most"), [(0.5, 0.0, 0.02), (0.8, 0.85, 1.0)])
def test_how_often_fused_is_kept(often, least, most, monkeypatch):
    """One of 340 candidates of equal speed, and most that win four rounds of five."""
    clock, random, calls = [0.0], torch.Generator().manual_seed(0), itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)
    wins = [False]

    def fused():
        if next(calls) % 2 == 0:  # a round has two calls
            wins[0] = bool(torch.rand((), generator=random) < often)
        clock[0] += 0.001 if wins[0] else 0.003

    kept = [timing.compare(run_for(clock, 2), fused, torch.device("cpu")).clear for _ in range(500)]
    assert least <= sum(kept) / len(kept) <= most


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4e-8, "0.04 us"), (9.99e-4, "999 us"), (9.999e-4, "1 ms"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (123, "123 s")],
)
def test_times_have_units_that_suit_them(seconds, text):
    assert timing.readable(seconds) == text
