"""The benchmark harness: that it counts, judges, times and records what it says, on tiny shapes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from harness.judge import assert_as_accurate

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import baselines, gpu, memory, report, run, timing, workloads  # noqa: E402
from bench.workloads import BACKWARD, BOTH, FORWARD, KERNEL, LENET, TRAIN_STEP, ConvCase, LinearCase, Work  # noqa: E402

CPU = torch.device("cpu")
CONV = ConvCase("tiny", 2, 9, 3, 3, padding=1, pool=3, pool_padding=1)
LINEAR = LinearCase("tiny", 5, 4)
MODES = [(torch.float32, "ieee"), (torch.bfloat16, "bf16")]
WORKS = [Work(case, 3, *mode, way) for case in (CONV, LINEAR) for mode in MODES for way in (FORWARD, BACKWARD, BOTH)]
NETWORKS = [LENET, *(case for case in workloads.CLASSROOM if case.name in ("digits 5x5", "digits norm"))]
WORKS += [Work(case, 4, *mode, direction) for mode in MODES for case in NETWORKS for direction in (FORWARD, TRAIN_STEP)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny shapes gain nothing from more threads, and on a busy machine wait long for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what is counted


def test_cost_of_lenet_is_the_counted_one():
    assert LENET.cost(FORWARD, 4)[:2] == (833_040, 16_744)
    assert LENET.cost(TRAIN_STEP, 4).flops == 1_367_520
    assert LENET.cost(TRAIN_STEP, 4, dense=True).flops == 2_263_920
    assert LENET.cost(FORWARD, 4).fixed_bytes == 61_706 * 4
    # Layer by layer, and each gradient by a kernel of its own, it is about 53 KB.
    assert 44_000 < LENET.cost(TRAIN_STEP, 4).bytes < 53_000


def test_cost_counts_only_cells_under_a_window():
    # A 5x5 convolution output of which a 2/2 pool sees 4x4 cells.
    case = ConvCase("", 1, 7, 1, 3)
    assert case.output_shape == (1, 2, 2)
    assert case.cost(FORWARD, 4).flops == 2 * 16 * 9
    # One cell of four carries a gradient.
    assert case.cost(BACKWARD, 4).flops == 2 * 2 * 4 * 9
    assert case.cost(BACKWARD, 4, dense=True).flops == 2 * 2 * 16 * 9
    # Overlapping windows look at each cell once: 7x7 of them; the code is one byte a pooled cell.
    overlapping = ConvCase("", 1, 9, 1, 3, pool=3, pool_stride=2)
    assert overlapping.cost(FORWARD, 4).flops == 2 * 49 * 9
    assert overlapping.cost(BOTH, 4).bytes == overlapping.cost(FORWARD, 4).bytes + (9 + 2 * 81) * 4 + 2 * 9


@pytest.mark.parametrize("name", run.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suite_holds_what_the_issues_ask_for(name, device):
    works = list(workloads.suite(name, device))
    assert len({w.label for w in works}) == len(works)
    steps = {w.batch for w in works if w.direction == TRAIN_STEP}
    for work in works:
        row = {"name": work.name, "direction": work.direction, "level": KERNEL, "batch": work.batch}
        assert report.label(row | {"dtype": "float32", "precision": work.precision}).startswith(work.name)
    if name == "networks":
        assert (steps, {w.batch for w in works if w.direction == FORWARD}) == ({32, 128, 512}, {1, 32, 512})
        assert {w.case for w in works} == {LENET, *workloads.CLASSROOM}
        return
    assert steps == ({1, 64, 1024, 8192} if device == "cuda" else {1, 32, 64, 1024, 8192})
    inference = {w.batch for w in works if w.case is LENET and w.direction == FORWARD}
    assert inference >= {1, 64, 1024, 8192}
    assert (65536 in inference) == (name == "full" or device == "cuda")
    assert {w.precision for w in works} == {"ieee", "bf16"} | ({"tf32"} if device == "cuda" else set())
    assert any(w.level == KERNEL for w in works) == (device == "cuda")
    assert not any(w.level == KERNEL and w.direction == TRAIN_STEP for w in works)


# ---- the data


@pytest.mark.parametrize("some", WORKS, ids=lambda w: w.label)
def test_setup_is_the_same_every_time(some):
    first, second = (workloads.setup(some, CPU, cache_bytes=0) for _ in range(2))
    assert len(first.sets) == max(2, workloads.parity_sets(some))
    for mine, theirs in zip(first.sets, second.sets, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_training_images_have_clear_decisions():
    step = Work(LENET, 200, direction=TRAIN_STEP)
    data = workloads.setup(step, CPU, cache_bytes=0)
    exact = data.to(torch.float64)
    for input, _ in exact.sets:
        assert not LENET.undecided(input, exact.parameters, step.epsilon).any()
    # Without the choice some are not clear: the choice does something.
    unchosen = workloads.setup(step, CPU, cache_bytes=0, choose=False).to(torch.float64)
    assert LENET.undecided(unchosen.sets[0][0], exact.parameters, 4 * step.epsilon).any()


def test_undecided_finds_ties_and_relus_at_their_edge():
    case = ConvCase("", 1, 4, 1, 1, pool=2)
    parameters = {"weight": torch.ones(1, 1, 1, 1).double(), "bias": torch.zeros(1).double()}
    image = torch.tensor([[5, 5, 1, 2], [0, 0, 3, 4], [-1, -1, 0, -3], [-2, -1, -4, -5]]).double().reshape(1, 1, 4, 4)
    # A tie; clear; closed whatever wins; at the edge.
    assert case.undecided(image, parameters, 1e-3).flatten().tolist() == [True, False, False, True]


# ---- implementations


@pytest.mark.parametrize("some", WORKS, ids=lambda w: w.label)
def test_every_implementation_computes_the_same(some):
    with baselines.precision_mode(some.precision):
        calls, rows = run.check(some, CPU)
    assert {name: row.get("why") for name, row in rows.items() if not row["ok"]} == {}
    assert list(calls) == [n for n in ("fastlenet", "eager", "channels_last", "onnxruntime") if n in rows]
    plain = some.case in NETWORKS and some.direction == FORWARD and some.dtype == torch.float32
    assert ("onnxruntime" in rows) == plain
    assert ("channels_last" in rows) == (not isinstance(some.case, LinearCase))


def test_results_start_from_the_same_parameters_every_time():
    step = Work(LENET, 4, direction=TRAIN_STEP)
    call = baselines.Call(step, baselines.EAGER, workloads.setup(step, CPU, cache_bytes=0))
    first, second = call.results(1), call.results(1)
    assert first.keys() == {"loss"} | {f"gradient of {n}" for n in LENET.parameter_shapes} | {
        f"{n} after the step" for n in LENET.parameter_shapes
    }
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = first["conv1.weight after the step"] - call.parameters["conv1.weight"].detach()
    assert float((moved + baselines.LEARNING_RATE * first["gradient of conv1.weight"]).abs().max()) < 1e-7
    assert float(moved.abs().max()) > 0


def test_precision_mode_is_put_back():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    inside = []

    def fail():
        with baselines.precision_mode("tf32"):
            # The older interface must say the same: torch.compile's max-autotune asks it.
            inside.append((torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [("tf32", "high")]
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def test_competitors_on_a_gpu():
    gpu = torch.device("cuda")
    names = {i.name for i in baselines.competitors(Work(LENET, 64, compiled=True), gpu)}
    assert names == {i.name for i in baselines.IMPLEMENTATIONS} - {"onnxruntime"}
    step = {i.name for i in baselines.competitors(Work(LENET, 64, direction=TRAIN_STEP), gpu)}
    assert step == {
        "fastlenet", "eager", "channels_last", "fastlenet graphed", "eager graphed", "channels_last graphed",
    }  # fmt: skip
    # Backward alone keeps the outputs of several forwards, which modes with CUDA graphs of their own overwrite.
    backward = {i.name for i in baselines.competitors(Work(CONV, 64, direction=BACKWARD, compiled=True), gpu)}
    assert backward == {"fastlenet", "eager", "channels_last", "compiled"}
    kernel = {i.name for i in baselines.competitors(Work(CONV, 64, level=KERNEL), gpu)}
    assert kernel == {"fastlenet", "eager", "channels_last", "library", "library channels_last"}


# ---- parity


def _results(values: torch.Tensor, **others: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"output": values, **others}]


@pytest.mark.parametrize(("factor", "fine"), [(0.0, True), (1.9, True), (2.5, False), (1e3, False)])
def test_parity_agrees_with_the_tests_judge(factor, fine, generator):
    reference = torch.randn(2000, dtype=torch.float64, generator=generator)
    noise = 1e-4 * torch.randn(2000, dtype=torch.float64, generator=generator)
    stock, actual = (reference + noise).float(), (reference + factor * noise).float()
    verdict = timing.check_accuracy(_results(actual), _results(stock), _results(reference))
    assert (verdict is None) == fine
    if fine:
        assert_as_accurate(actual, stock, reference, dtype=torch.float32)
    else:
        with pytest.raises(AssertionError):
            assert_as_accurate(actual, stock, reference, dtype=torch.float32)
        assert "output" in verdict


@pytest.mark.parametrize("spoil", ["nan", "shape", "small"])
def test_parity_sees_single_wrong_values(spoil, generator):
    reference = torch.randn(500, dtype=torch.float64, generator=generator)
    small = torch.randn(6, dtype=torch.float64, generator=generator)
    stock = _results(reference.float(), bias=small.float())
    actual = _results(reference.float(), bias=small.float())
    assert timing.check_accuracy(actual, stock, _results(reference, bias=small)) is None
    if spoil == "nan":
        actual[0]["output"][7] = torch.nan
    elif spoil == "shape":
        actual[0]["output"] = actual[0]["output"][:-1]
    else:
        actual[0]["bias"][3] *= 1.001
    assert timing.check_accuracy(actual, stock, _results(reference, bias=small)) is not None


@pytest.mark.parametrize(("error", "fine"), [(0.9, True), (1.2, False)])
def test_parity_allows_a_rounding_step_of_the_products(error, fine, generator):
    """Stock may compute exactly in tf32's mode, too; a step of tf32 is then all that is allowed."""
    reference = torch.randn(2000, dtype=torch.float64, generator=generator)
    step = Work(LINEAR, 3, precision="tf32").step
    assert step == 2.0**-10
    assert Work(LENET, 3, precision="tf32", direction=TRAIN_STEP).step == 10 * step
    assert Work(LENET, 3, precision="ieee").step == Work(LENET, 3, torch.bfloat16, "bf16").step == 0
    actual = (reference * (1 + error * step)).float()
    verdict = timing.check_accuracy(_results(actual), _results(reference.float()), _results(reference), step)
    assert (verdict is None) == fine


def test_a_red_check_prints_no_time(monkeypatch):
    some = Work(LINEAR, 3)
    build = baselines.build

    def spoiled(work, form):
        model = build(work, form)
        if form == baselines.FUSED:
            forward = model.function
            model.function = lambda *args, **options: forward(*args, **options) * 1.01
        return model

    monkeypatch.setattr(baselines, "build", spoiled)
    rows = {row["impl"]: row for row in run.measure(some, CPU, budget=0, rounds=2)}
    assert not rows["fastlenet"]["ok"]
    assert rows["fastlenet"]["median"] is None
    assert "error" in rows["fastlenet"]["why"]
    assert rows["eager"]["ok"]
    assert "fastlenet red" in report.line(list(rows.values()))


def test_an_implementation_that_fails_leaves_the_others_alone(monkeypatch):
    def explode(*_):
        raise RuntimeError("cannot\nrun")

    monkeypatch.setattr(memory, "saved_bytes_per_image", explode)
    rows = run.measure(Work(LINEAR, 3), CPU, budget=0, rounds=2)
    assert {row["why"] for row in rows} == {"RuntimeError: cannot"}


# ---- timing


def test_interleaving_changes_who_follows_whom(monkeypatch):
    """Each call follows each other one: what a call leaves behind, such as sleeping threads, favours none."""
    some = Work(LINEAR, 2)
    data = workloads.setup(some, CPU, cache_bytes=0)
    names = ["one", "two", "three", "four"]
    calls = {name: baselines.Call(some, baselines.EAGER, data) for name in names}
    seen = []
    by_call = {id(call): name for name, call in calls.items()}

    def seconds(call, repeats, first, device):
        seen.append(by_call[id(call)])
        return 1e-3

    monkeypatch.setattr(baselines.Call, "seconds", seconds)
    timings = timing.interleave(calls, CPU, budget=0, min_rounds=60)
    rounds = [seen[first : first + 4] for first in range(8, len(seen), 4)]
    assert len(rounds) == 60
    assert all(sorted(each) == sorted(names) for each in rounds)
    followers = {pair for each in rounds for pair in pairwise(each)}
    assert followers == {(one, other) for one in names for other in names if one != other}
    assert timings["two"] == timing.Timing(1e-3, 0.0, 1e-3, 60)


def test_bystanders_are_seen(monkeypatch):
    readings = iter([(10.0, 20.0, 5.0), (14.0, 24.0, 7.0), (10.0, 20.0, 5.0), (14.0, 24.0, 9.0), None])
    monkeypatch.setattr(timing.Bystanders, "_read", staticmethod(lambda: next(readings)))
    # Of four CPU seconds, all busy, this process had two; then all four; then nobody knows.
    assert timing.Bystanders().crowded() is True
    watcher = timing.Bystanders()
    assert watcher.crowded() is False
    assert watcher.crowded() is None


def test_floor_is_the_longer_of_memory_and_arithmetic():
    rates = timing.Rates(copy={1_000: 4e9, 1_000_000: 1e9}, matrix={"ieee": 1e12, "bf16": 4e12}, fma=2e12)
    memory_bound, arithmetic_bound = workloads.Cost(0, 4_000_000), workloads.Cost(1e9, 4)
    assert rates.floor(memory_bound, 2, "bf16") == pytest.approx(8e-3)
    assert rates.floor(arithmetic_bound, 2, "ieee") == pytest.approx(1e-3)
    assert rates.floor(arithmetic_bound, 2, "bf16") == pytest.approx(0.5e-3)
    # What fits a cache may be as fast as a copy there.
    assert rates.floor(workloads.Cost(0, 1_000), 1, "ieee") == pytest.approx(0.25e-6)
    better = rates.best(timing.Rates({1_000: 1.0, 1_000_000: 2e9}, {"ieee": 2e12, "bf16": 1.0}, 1.0))
    assert better == timing.Rates({1_000: 4e9, 1_000_000: 2e9}, {"ieee": 2e12, "bf16": 4e12}, 2e12)


# ---- memory


@pytest.mark.wide
def test_saved_bytes_are_those_of_the_contract():
    step = Work(LENET, 64, direction=TRAIN_STEP)
    data = workloads.setup(step, CPU, cache_bytes=0)
    saved = {i.name: memory.saved_bytes_per_image(baselines.Call(step, i, data)) for i in baselines.IMPLEMENTATIONS[:2]}
    assert saved["fastlenet"] <= 12_800
    assert saved["eager"] == 49_040
    assert memory.saved_bytes_per_image(baselines.Call(Work(LENET, 4), baselines.EAGER, data)) is None


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_step_is_at_least_what_autograd_keeps():
    step = Work(LENET, 2048, direction=TRAIN_STEP)
    peak = memory.cpu_peak_bytes(step, baselines.EAGER)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    # All saved activations but the input, which was there before; and not several times as much.
    kept = 2048 * (49_040 - 4_096)
    assert kept < peak < 4 * kept


# ---- the commands


# Where the commands run; a GPU has more modes and more baselines than a CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = timing.Rates({2**20: 1e10}, {"ieee": 1e11, "bf16": 1e11}, None)
together = pytest.mark.xdist_group("LeNet")  # see test_predict.py
TINY = [WORKS[0], Work(LENET, 4, direction=TRAIN_STEP)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The results file of a run of two tiny comparisons, and what the run printed."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(run, "suite", lambda *_: iter(TINY))
        patch.setattr(timing.Rates, "measure", classmethod(lambda *_: RATES))
        assert run.main(["--results", str(folder), "--budget", "0", "--rounds", "2"]) == 0
    [path] = folder.glob("*/*.json")
    return path, out.getvalue()


@together
def test_bench_writes_what_the_contract_says(tiny):
    path, out = tiny
    results = json.loads(path.read_text())
    about = results["environment"]
    assert path.parent.name == about["device_slug"]
    assert path.stem == f"{about['date']}-{(about['commit'] or 'unknown')[:10]}"
    assert {"device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "precision", "clocks"} <= set(
        about
    )
    assert about["bench"]["not_measured"] == []
    assert [(row["name"], row["batch"], row["impl"]) for row in results["rows"]] == [
        (some.name, some.batch, baseline.name) for some in TINY for baseline in baselines.competitors(some, DEVICE)
    ]
    for row in results["rows"]:
        assert {
            "name", "impl", "batch", "dtype", "precision", "direction", "unit", "median", "iqr", "n", "ns_per_image",
            "saved_bytes_per_image", "ok", "floor_ns_per_image", "peak_bytes", "compile_seconds", "shape",
        } <= set(row)  # fmt: skip
        assert row["ok"]
        assert row["n"] == 2
        assert row["unit"] == "us"
        assert row["ns_per_image"] == pytest.approx(row["median"] * 1e3 / row["batch"])
        assert row["floor_ns_per_image"] > 0
    assert "LeNet training step" in out
    assert str(path) in out
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bench_stops_at_its_limit_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing.Rates, "measure", classmethod(lambda *_: RATES))
    assert run.main(["--results", str(tmp_path), "--limit", "0", "--filter", "lenet train_step 64 "]) == 0
    [path] = tmp_path.glob("*/*.json")
    results = json.loads(path.read_text())
    left = results["environment"]["bench"]["not_measured"]
    assert "LeNet train_step 64 ieee" in left
    assert left == [w.label for w in workloads.suite("quick", DEVICE.type) if "lenet train_step 64 " in w.label.lower()]
    assert results["rows"] == []
    assert "time is up" in capsys.readouterr().out
    assert report.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.wide
@together
def test_report_makes_a_page_and_a_picture(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    path, _ = tiny
    assert report.main(["--results", str(path.parents[1]), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / f"{path.stem}.md").read_text()
    assert "none is modelled" in page
    assert f"![How fast LeNet runs, stock eager being 1]({path.stem}.png)" in page
    assert "| LeNet training step | 4 | float32 ieee |" in page
    assert torch.__version__ in page
    assert (tmp_path / "page" / f"{path.stem}.png").read_bytes().startswith(b"\x89PNG")


@together
def test_report_marks_what_is_modelled(tiny):
    results = json.loads(tiny[0].read_text())
    for row in results["rows"]:
        if row["impl"] == "fastlenet":
            row["source"] = "modelled"
    page = report.as_markdown(results, None)
    assert "modelled in part" in page
    assert page.count("(modelled)") >= len(TINY)


def test_ratios_and_their_certainty():
    def row(impl, median, iqr, **others):
        base = {"name": "LeNet", "level": "module", "direction": "forward", "batch": 2, "dtype": "float32"}
        base |= {"precision": "ieee", "impl": impl, "median": median, "iqr": iqr, "ok": True}
        return base | {"ns_per_image": median and median * 500, "floor_ns_per_image": 1000.0} | others

    rows = [row("fastlenet", 10.0, 1.0), row("eager", 25.0, 2.0), row("channels_last", 10.4, 1.0)]
    rows.append(row("compiled", None, None, ok=False))
    [comparison] = report.comparisons(rows)
    assert [comparison.ratio_text(name) for name in comparison.rows] == ["1.00x~", "2.50x", "1.04x~", "red"]
    assert comparison.ratio_text("absent") == ""
    assert comparison.floor_ratio == 5
    assert report.noise(rows) is None
    assert "Noisy" in report.noise([row("eager", 10.0, 5.0)])
    assert "Noisy" in report.noise([row("eager", 10.0, 0.0, crowded=True)])


def test_a_comparison_that_breaks_down_is_named_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing.Rates, "measure", classmethod(lambda *_: RATES))
    monkeypatch.setattr(run, "suite", lambda *_: iter([Work(LINEAR, 3), Work(LINEAR, 4)]))
    interleave = timing.interleave

    def break_down_once(calls, *args, **options):
        if next(iter(calls.values())).work.batch == 3:
            raise RuntimeError("out of\nmemory")
        return interleave(calls, *args, **options)

    monkeypatch.setattr(run, "interleave", break_down_once)
    assert run.main(["--results", str(tmp_path), "--budget", "0", "--rounds", "2"]) == 1
    assert "RuntimeError: out of\n" in capsys.readouterr().out
    [path] = tmp_path.glob("*/*.json")
    results = json.loads(path.read_text())
    assert results["environment"]["bench"]["not_measured"] == ["linear_relu tiny forward 3 ieee"]
    assert {row["batch"] for row in results["rows"]} == {4}


def test_goals_are_set_against_the_results():
    def row(impl, median, direction="train_step", batch=1024, **others):
        base = {"name": "LeNet", "level": "module", "direction": direction, "batch": batch, "dtype": "float32"}
        base |= {"precision": "ieee", "impl": impl, "median": median, "ok": median is not None}
        return base | {"saved_bytes_per_image": 12_792, "peak_bytes": None} | others

    rows = [row("fastlenet", 10.0), row("eager", 46.0), row("channels_last", 14.0), row("compiled", 30.0)]
    rows += [row("fastlenet", None, "forward"), row("eager", 20.0, "forward")]
    rows += [row("fastlenet", 10.0, batch=8192, peak_bytes=40), row("eager", 9.0, batch=8192, peak_bytes=100)]
    rows += [
        row(name, value, level="operator", name="VGG", direction="forward")
        for name, value in (("fastlenet", 10.0), ("eager", 9.0))
    ]
    head, *lines = report.goals({"environment": {"device_slug": "cpu-some"}, "rows": rows})
    assert head[2] == "against the best of eager, channels_last, compiled"
    assert lines == [
        ["LeNet training step, batch 1024", "4.60x, goal >= 4x: met", "1.40x, goal >= 2.5x: missed"],
        ["LeNet inference, batch 1024", "goal >= 4x: not measured", "goal >= 2.5x: not measured"],
        ["peak memory, LeNet training step, batch 8192", "0.40x, goal <= 0.3x: missed", ""],
        ["saved for backward, bytes per image", "12,792 B, goal <= 12,800 B: met", ""],
        ["worst operator: VGG forward, batch 1024, float32 ieee", "0.90x, goal >= 0.95x: missed", ""],
    ]


def test_networks_are_set_against_goals_together():
    """Where there are several: their geometric mean, and the worst."""
    row = {"level": "module", "direction": "forward", "batch": 32, "dtype": "float32", "precision": "ieee", "ok": True}
    medians = {"LeNet": (10.0, 40.0, 20.0), "digits": (10.0, 10.0, 12.5), "broken": (None, 10.0, 10.0)}
    rows = [
        row | {"name": name, "impl": impl, "median": median, "ok": median is not None}
        for name, some in medians.items()
        for impl, median in zip(("fastlenet", "eager", "compiled"), some, strict=True)
    ]
    _, *lines = report.goals({"environment": {"device_slug": "cpu-some"}, "rows": rows})
    assert lines == [
        ["2 comparisons of networks, geometric mean", "2.00x, goal >= 2.5x: missed", "1.41x, goal >= 1.8x: missed"],
        ["2 comparisons of networks, worst", "1.00x, goal >= 1x: met", "1.00x, goal >= 0.97x: met"],
    ]
    assert report.goals({"environment": {"device_slug": "cpu-some"}, "rows": rows[:3]})[1:] == []


def test_graphs_are_set_against_graphs():
    """On a GPU a goal may be of CUDA graphs, where Python's part of a call does not count."""
    medians = {"fastlenet": 100.0, "fastlenet graphed": 10.0, "eager": 150.0, "eager graphed": 31.0}
    medians |= {"compiled reduce-overhead": 40.0, "compiled max-autotune": 24.0}
    row = {"name": "LeNet", "level": "module", "direction": "train_step", "batch": 64, "dtype": "float32"}
    row |= {"precision": "tf32", "ok": True, "saved_bytes_per_image": None, "peak_bytes": None}
    rows = [row | {"impl": name, "median": median} for name, median in medians.items()]
    _, line, *_ = report.goals({"environment": {"device_slug": "some-gpu"}, "rows": rows})
    title = "LeNet training step, batch 64, as CUDA graphs"
    assert line == [title, "3.10x, goal >= 3x: met", "2.40x, goal >= 2.5x: missed"]


@together
@pytest.mark.parametrize("slug", ["cpu-some", "some-gpu"])
@pytest.mark.parametrize("rich", [True, False])
def test_tables_print_with_and_without_rich(tiny, rich, slug, monkeypatch, capsys):
    """The goals only where these results say anything about them: all are exact float32, a GPU's goals are tf32's."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    results = json.loads(tiny[0].read_text())
    results["environment"]["device_slug"] = slug
    report.print_tables(results)
    out = capsys.readouterr().out
    saved = next(row["saved_bytes_per_image"] for row in results["rows"] if row["direction"] == TRAIN_STEP)
    assert all(text in out for text in ("Networks", "Operators", "channels_last", f"{saved:,.0f} B"))
    assert ("Goals" in out) == (slug == "cpu-some")
    assert "…" not in out


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (run.main, ["--suite", "huge"]),
        (run.main, ["--filter", "no such thing"]),
        (run.main, ["--threads", "0"]),
        (run.main, ["--rounds", "1"]),
        (run.main, ["--budget", "nan"]),
        (run.main, ["--results", "/proc/nowhere", "--limit", "0"]),
        (report.main, ["/no/such/file.json"]),
        (report.main, ["--results", "/no/such/folder"]),
        (report.main, [__file__]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_one_line_and_exit_code_2(command, arguments, capsys, monkeypatch):
    monkeypatch.setattr(timing.Rates, "measure", classmethod(lambda *_: RATES))
    try:
        code = command(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- make gpu


def test_make_gpu_names_an_unknown_part(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--parts", "tests,kernel"])
    assert stop.value.code == 2
    assert "unknown part 'kernel'; choose of tests, sanitize, kernels, bench" in capsys.readouterr().err


def test_make_gpu_needs_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "results")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "sees no GPU" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.wide
def test_make_gpu_says_of_every_part_how_it_ended(monkeypatch, capsys, tmp_path):
    """One that fails, cannot be started or takes too long does not stop the others, and none is forgotten."""
    found = {
        "tests": {
            "good": [sys.executable, "-c", "print('all is well')"],
            "absent": [str(tmp_path / "no such program")],
        },
        "sanitize": {"bad": [sys.executable, "-c", "raise SystemExit(3)"]},
        "kernels": {"slow": [sys.executable, "-c", "import time; time.sleep(60)"]},
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(gpu, "commands", lambda part, *_: found[part])
    monkeypatch.setattr(gpu, "CHECKS_SHARE", 0.9)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    monkeypatch.setattr(gpu, "TAIL_SECONDS", 1)
    assert gpu.main(["--parts", "tests,sanitize,kernels", "--seconds", "8", "--results", str(tmp_path)]) == 1
    _, summary = capsys.readouterr().out.split("some GPU, torch")
    verdicts = {line.split()[0]: line.split(maxsplit=1)[1] for line in summary.splitlines()[1:]}
    assert verdicts["good"].startswith("ok (")
    assert verdicts["absent"].startswith("did not run: ")
    assert verdicts["bad"].startswith("exit code 3 (")
    assert verdicts["slow"].startswith("ran past its ")
    assert (tmp_path / "gpu-good.log").read_text() == "all is well\n"
    monkeypatch.setattr(gpu, "TAIL_SECONDS", 9)
    assert gpu.main(["--parts", "kernels", "--seconds", "8", "--results", str(tmp_path)]) == 1
    assert "no time was left" in capsys.readouterr().out
