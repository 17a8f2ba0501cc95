"""The static cost report: its counts on kernels whose trip counts are known, and today's figures against the committed.

The counts of toy kernels come from their source: how many products a thread forms, how often it loads, how many
multiply-adds its matrix products take. None of that knows of unrolling, remainders or guards in the machine code.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from harness.fake_driver import CompiledKernelRecord, assert_shipped_without_spills, compiling_for

from bench import kernels
from bench.static import __main__ as command
from bench.static import committed, compile_time, launches, model, sass
from bench.static.fake_driver import sass as disassemble
from bench.workloads import LENET, TRAIN_STEP, Work

every_arch = pytest.mark.parametrize("arch", model.DEVICES)


@triton.jit
def _add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset) + 1.5)


@triton.jit(do_not_specialize=["n"])
def _loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        total = total * total + tl.load(x_ptr + i * BLOCK + offset)
    tl.store(y_ptr + offset, total)


@triton.jit(do_not_specialize=["n", "m"])
def _nested_kernel(x_ptr, y_ptr, n, m, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    for _ in range(n):
        total = total + 0.25
        for _ in range(m):
            total = total * total + x
    tl.store(y_ptr + offset, total)


@triton.jit
def _static_kernel(x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    for _ in tl.static_range(N):
        total = total * total + x
    tl.store(y_ptr + offset, total)


@triton.jit
def _triangle_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    for _ in range(tl.program_id(0) + 3 * tl.program_id(1)):
        total = total * total + x
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offset, total)


@triton.jit(do_not_specialize=["n"])
def _persistent_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    for _ in range(tl.program_id(0), n, tl.num_programs(0)):
        total = total * total + x
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offset, total)


@triton.jit(do_not_specialize=["n", "divisor"])
def _division_kernel(x_ptr, y_ptr, n, divisor, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    while n > 0:
        for _ in range(n % divisor):
            total = total * total + x
        n = n // divisor
    tl.store(y_ptr + offset, total)


@triton.jit
def _data_loop_kernel(x_ptr, n_ptr, y_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    total = tl.load(x_ptr + offset)
    for _ in range(tl.load(n_ptr)):
        total = total * total + 1.5
    tl.store(y_ptr + offset, total)


@triton.jit(do_not_specialize=["n"])
def _fallback_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    total = x
    if tl.sum((x != x).to(tl.int32)) > 0:
        for _ in range(n):
            total = total * total + x
    tl.store(y_ptr + offset, total)


@triton.jit(do_not_specialize=["steps"])
def _dot_kernel(x_ptr, y_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for i in range(steps):
        x = tl.load(x_ptr + row[:, None] * K + depth[None, :] + i)
        y = tl.load(y_ptr + depth[:, None] * N + column[None, :] + i)
        total = tl.dot(x, y, total, input_precision="tf32")
    tl.store(out_ptr + row[:, None] * N + column[None, :], total)


BLOCK = 256
WARPS = 4
PER_THREAD = BLOCK // (32 * WARPS)


def launch(arch, kernel, *args, grid=(1,), **constants) -> tuple[CompiledKernelRecord, sass.Execution]:
    """Compile and count one launch of a toy kernel."""
    with compiling_for(arch) as records:
        kernel[grid](*args, **constants)
        (record,) = records
        return record, model.cost(record).execution


def active(execution: sass.Execution, opcode: str) -> float:
    """How often warps execute an opcode with any lane switched on."""
    names = [name for name in execution.instructions if name == opcode or name.startswith(f"{opcode}.")]
    return sum(execution.instructions[name] - execution.idle.get(name, 0) for name in names)


def products(execution: sass.Execution) -> float:
    """Multiply-adds of a lane, over all warps."""
    return active(execution, "FFMA") + 2 * active(execution, "FFMA2")


def loads(execution: sass.Execution) -> float:
    """Words of 32 bits that a lane loads, over all warps."""
    widths = {"LDG.E.128": 4, "LDG.E.64": 2}
    wide = sum((width - 1) * active(execution, opcode) for opcode, width in widths.items())
    return wide + active(execution, "LDG")


@pytest.fixture(scope="module")
def x():
    return torch.ones(1 << 16)


# --- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@every_arch
def test_a_kernel_without_branches_runs_as_it_stands(arch, x):
    record, execution = launch(arch, _add_kernel, x, x, grid=(10,), BLOCK=BLOCK)
    text = disassemble(record)
    # Up to the first unconditional EXIT every line is an instruction that runs; behind it there is only padding.
    lines = [line for line in text.partition("EXIT ;")[0].splitlines() if line.lstrip().startswith("/*")]
    assert execution.warps == 10 * WARPS
    assert execution.total == execution.warps * (len(lines))
    assert (execution.loops, execution.rare_paths) == ((), ())


@every_arch
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 16, 17, 1000])
def test_unrolled_loops_are_counted(arch, n, x):
    _, execution = launch(arch, _loop_kernel, x, x, n, grid=(3,), BLOCK=BLOCK)
    assert products(execution) == 3 * WARPS * PER_THREAD * n
    assert loads(execution) == 3 * WARPS * PER_THREAD * n


@every_arch
@pytest.mark.parametrize(("n", "m"), [(3, 5), (1, 100), (9, 0), (0, 4), (16, 33)])
def test_nested_loops_multiply(arch, n, m, x):
    _, execution = launch(arch, _nested_kernel, x, x, n, m, BLOCK=BLOCK)
    assert products(execution) == WARPS * PER_THREAD * n * m
    assert active(execution, "FADD") + 2 * active(execution, "FADD2") == WARPS * PER_THREAD * n


@every_arch
def test_static_ranges_leave_no_loop(arch, x):
    _, execution = launch(arch, _static_kernel, x, x, N=23, BLOCK=BLOCK)
    assert products(execution) == WARPS * PER_THREAD * 23
    assert execution.loops == ()


@every_arch
def test_programs_are_told_apart(arch, x):
    _, execution = launch(arch, _triangle_kernel, x, x, grid=(13, 4), BLOCK=BLOCK)
    assert products(execution) == WARPS * PER_THREAD * sum(a + 3 * b for a in range(13) for b in range(4))
    assert execution.programs_seen == 52


def test_many_programs_are_sampled(x):
    _, execution = launch("sm_90", _triangle_kernel, x, x, grid=(5000,), BLOCK=BLOCK)
    assert execution.programs_seen <= 64
    assert products(execution) == pytest.approx(WARPS * PER_THREAD * sum(range(5000)), rel=0.02)


@every_arch
def test_the_grid_is_known_to_the_kernel(arch, x):
    _, execution = launch(arch, _persistent_kernel, x, x, 100, grid=(7,), BLOCK=BLOCK)
    assert products(execution) == WARPS * PER_THREAD * 100


@every_arch
@pytest.mark.parametrize("n", [1, 12345, 2**31 - 1, 2**40 + 12345])
def test_divisions_are_followed(arch, n, x):
    """Integer division is a sequence of conversions, a reciprocal and corrections, in 64 bits a subroutine."""
    _, execution = launch(arch, _division_kernel, x, x, n, 13, BLOCK=BLOCK)
    digits, rest = 0, n
    while rest > 0:
        digits, rest = digits + rest % 13, rest // 13
    assert products(execution) == WARPS * PER_THREAD * digits


def test_a_loop_that_ends_by_data_has_no_count(x):
    with pytest.raises(sass.UnknownTripCountError, match="goes on or ends by data"):
        launch("sm_90", _data_loop_kernel, x, x.int(), x, BLOCK=BLOCK)


_SPILLS = """
        /*0000*/                   LDG.E R2, [R2] ;
        /*0010*/                   STL [R2], R3 ;
        /*0020*/                   LDL R4, [R1+0x8] ;
        /*0030*/                   ISETP.NE.AND P0, PT, R4, RZ, PT ;
        /*0040*/               @P0 EXIT ;
        /*0050*/                   MOV R5, R4 ;
        /*0060*/                   EXIT ;
"""


def test_after_a_store_to_an_unknown_place_a_reload_is_unknown():
    """A branch on it is one on data, which is followed."""
    trace = sass.parse(_SPILLS).trace({}, {})
    assert sum(trace.rare.values()) == 1


@every_arch
def test_a_fallback_for_rare_data_is_listed_and_not_counted(arch, x):
    record, execution = launch(arch, _fallback_kernel, x, x, 100, BLOCK=BLOCK)
    assert products(execution) == 0
    (path,) = execution.rare_paths
    assert path.times == 1
    static_products = sum(opcode.startswith("FFMA") for opcode in _opcodes(record))
    assert static_products <= path.instructions < len(_opcodes(record))
    assert f"branch on data {path.address:#06x}" in str(model.cost(record))


def _opcodes(record):
    return [i.opcode for block in sass.parse(disassemble(record)).blocks for i in block.instructions]


@every_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [16, 128])
def test_matrix_instructions_tell_their_work(arch, dtype, m, x):
    a = x.to(dtype)
    _, execution = launch(arch, _dot_kernel, a, a, x, 5, grid=(6,), M=m, N=32, K=64)
    assert sum(execution.tensor_macs.values()) == 6 * 5 * m * 32 * 64
    assert all(("TF32" in opcode.split(".")) == (dtype == torch.float32) for opcode in execution.tensor_macs)


# --- the model -----------------------------------------------------------------------------------------------------


def test_times_follow_from_the_device(x):
    images = 10 * BLOCK
    with compiling_for("sm_90") as records:
        _add_kernel[(10,)](x[:images], torch.empty(images), BLOCK=BLOCK)
        cost = model.cost(records[0], images=images)
    issued = cost.execution.total / (132 * 4 * 1.98)
    assert cost.times["issue"] == pytest.approx(issued)
    # Both tensors share no storage; the input is a view of a longer one.
    assert cost.memory_bytes == 2 * 4 * images
    assert cost.times["memory"] == pytest.approx(2 * 4 * images / 3.0e3)
    assert cost.bound == "memory"
    assert cost.ns == cost.times["memory"]
    assert sum(cost.by_class.values()) == cost.execution.total
    assert cost.by_class["LDG.64"] == cost.by_class["STG.64"] == 10 * WARPS
    assert cost.occupancy == 16  # 64 warps


def test_memory_counts_each_tensor_once():
    base = torch.ones(1000)
    with compiling_for("sm_90") as records:
        _add_kernel[(1,)](base, base, BLOCK=BLOCK)
        _add_kernel[(1,)](base[:400], base[300:], BLOCK=BLOCK)
        _add_kernel[(1,)](base[:1].expand(500), base[:400], BLOCK=BLOCK)
        calls = [call for record in records for call in record.calls]
    assert [model.memory_bytes(call) for call in calls] == [4000, 4000, 4 * 401]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_matrix_rates(arch, x):
    """64 x 64 x 64 products of 16 bits: 128 cycles of an H100's multiprocessor by wgmma, of an A100's 256."""
    half = x.half()
    with compiling_for(arch) as records:
        _dot_kernel[(1,)](half, half, x, 1, M=64, N=64, K=64)
        device, cost = model.DEVICES[arch], model.cost(records[0])
    cycles = {"sm_80": 256, "sm_90": 128}[arch]
    assert cost.times["tensor"] == pytest.approx(cycles / device.processors / device.ghz)


def test_an_architecture_without_a_model_is_refused(x):
    with compiling_for("gfx942") as records:
        _add_kernel[(1,)](x, x, BLOCK=BLOCK)
        with pytest.raises(ValueError, match="no model of gfx942"):
            model.cost(records[0])


# --- the report ----------------------------------------------------------------------------------------------------

CONTRACT = {"kernel", "shape", "dtype", "precision", "arch", "used_by", "registers", "spill_bytes", "shared_bytes"}
CONTRACT |= {"num_warps", "instructions", "by_class", "issue_ns_per_image"}
PATH = committed.committed_path()
needs_committed = pytest.mark.skipif(
    not PATH.is_file(), reason=f"no committed figures for triton {triton.__version__} (refresh: {committed.REFRESH})"
)


@pytest.fixture(scope="module")
def saved():
    return json.loads(PATH.read_text(encoding="utf-8"))


@pytest.mark.thorough
@needs_committed
@pytest.mark.parametrize("precision", launches.PRECISIONS)
def test_no_kernel_of_lenet_got_dearer(precision, saved):
    today = launches.report(["sm_90"], [precision], operators=False)
    assert {use for row in today["rows"] for use in row["used_by"]} == {launches.INFERENCE, launches.STEP}
    for row in today["rows"]:
        assert set(row) >= CONTRACT
        assert row["by_class"].get("other", 0) <= 0.02 * row["instructions"], f"unknown instructions in {row['kernel']}"
        assert sum(row["by_class"].values()) == pytest.approx(row["instructions"], rel=1e-4)
    problems = committed.compare(today, saved)
    refresh = f"if that is meant, refresh the committed figures:\n    {committed.REFRESH}"
    assert not problems, "\n".join([f"against {PATH.name}:", *problems, refresh])


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", launches.PRECISIONS)
def test_no_kernel_of_lenet_spills(arch, precision):
    with launches.compiling_fastlenet(arch, precision) as records:
        for use in (launches.INFERENCE, launches.STEP):
            launches.run_lenet(use, launches.PRECISIONS[precision])
        assert_shipped_without_spills(records)


@pytest.mark.thorough
@needs_committed
def test_the_committed_report_is_whole(saved):
    assert saved["environment"]["triton"] == triton.__version__
    for row in saved["rows"]:
        assert set(row) >= CONTRACT
    found = {(row["arch"], row["precision"]) for row in saved["rows"]}
    architectures = {row["arch"] for row in saved["rows"]}
    assert "sm_90" in architectures
    assert found == {(arch, precision) for arch in architectures for precision in launches.PRECISIONS}
    assert {(t["arch"], t["precision"], t["use"]) for t in saved["totals"]} == {
        (arch, precision, use)
        for arch in architectures & set(model.DEVICES)
        for precision in launches.PRECISIONS
        for use in (launches.INFERENCE, launches.STEP)
    }
    assert all(line["warm_compiled"] == 0 < line["cold_compiled"] for line in saved["compile"])


def figures(**changes):
    """A report of one row."""
    row: dict = dict.fromkeys(CONTRACT, "a") | {
        "arch": "sm_90",
        "used_by": [launches.INFERENCE],
        "launches": {launches.INFERENCE: 2},
        "spill_bytes": 0,
        "instructions": 100.0,
        "issue_ns_per_image": 1.0,
        "modelled_ns_per_image": 1.5,
    }
    row |= changes
    return {"rows": [row], "totals": launches.totals([row])}


@pytest.mark.thorough
def test_comparison_tells_what_got_worse():
    before = figures()
    assert before["totals"][0]["modelled_ns_per_image"] == 3.0
    assert committed.compare(figures(instructions=104.9), before) == []
    assert committed.compare(figures(instructions=50.0, issue_ns_per_image=0.5), before) == []
    row, total = committed.compare(figures(instructions=106.0), before)
    assert row.startswith("instructions 100 -> 106 (+6%): a | a")
    assert total.startswith("instructions 200 -> 212 (+6%): total of sm_90")
    assert len(committed.compare(figures(issue_ns_per_image=1.06), before)) == 2
    assert committed.compare(figures(spill_bytes=8), before) == ["spills 8 bytes: a | a | a | a | sm_90"]
    assert committed.compare(figures(spill_bytes=8, arch="sm_100"), figures(arch="sm_100")) == []
    new, gone = committed.compare(figures(shape="b"), before)
    assert new.startswith("not in the committed file")
    assert gone.startswith("only in the committed file")


@pytest.mark.thorough
def test_architectures_are_saved_one_by_one():
    def of(arch, commit, **changes):
        line = {"arch": arch, "precision": "bf16"}
        return figures(arch=arch, **changes) | {"environment": {"commit": commit}, "compile": [line]}

    first = committed.completed(of("sm_90", "a"), None)
    both = committed.completed(of("sm_80", "b"), first)
    assert both["commits"] == {"sm_80": "b", "sm_90": "a"}
    again = committed.completed(of("sm_90", "c", instructions=50.0), both)
    assert again["commits"] == {"sm_80": "b", "sm_90": "c"}
    for part in ("rows", "totals", "compile"):
        assert [line["arch"] for line in again[part]] == ["sm_80", "sm_90"]
    assert [row["instructions"] for row in again["rows"]] == [100.0, 50.0]


@pytest.mark.thorough
def test_a_second_process_compiles_nothing():
    line = compile_time.measure_compile("sm_90", "bf16")
    assert line["cold_compiled"] > 0
    assert line["warm_compiled"] == 0
    assert 0 < line["warm_seconds"] < line["cold_seconds"]


@pytest.mark.thorough
def test_the_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--arch", "sm_90", "--precision", "fp16", "--only", "sum_partials", "--output", str(path)]
    assert command.main(options) == 0
    printed = " ".join(capsys.readouterr().out.split())  # a narrow terminal wraps lines
    assert model.LABEL in printed
    assert "no GPU results in bench/results" in printed or "against measurement on" in printed
    assert set(json.loads(path.read_text())) >= {"environment", "rows", "totals", "note", "model"}
    with pytest.raises(SystemExit) as ended:
        command.main(["--precision", "bf16", "--save"])
    assert ended.value.code == 2
    assert "--save writes whole architectures" in capsys.readouterr().err


@pytest.mark.thorough
def test_measurements_are_found_and_modelled(tmp_path):
    assert committed.measured(tmp_path) == {}
    row = {"name": "linear_relu LeNet.fc2", "direction": "forward", "batch": 64, "precision": "bf16"}
    rows = [row | {"impl": impl, "ok": ok} for impl, ok in (("fastlenet", True), ("eager", True), ("fastlenet", False))]
    for device in ("static", "cpu-some", "nvidia-h100-80gb-hbm3"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "2026-01-01.json").write_text(json.dumps({"rows": rows}))
    assert committed.measured(tmp_path) == {"nvidia-h100-80gb-hbm3": rows[:1]}
    forward = committed.model_of(row, "sm_90")
    backward = committed.model_of(row | {"direction": "backward"}, "sm_90")
    both = committed.model_of(row | {"direction": "forward_backward"}, "sm_90")
    assert forward > 0
    assert both == pytest.approx(forward + backward)
    assert committed.model_of(row | {"name": "something else"}, "sm_90") is None
    assert committed.model_of(row | {"precision": "int8"}, "sm_90") is None


@pytest.mark.thorough
def test_profiled_kernels_find_their_model(monkeypatch):
    """The n-th launch of a name is its n-th row: LeNet has three forwards, of conv1, conv2 and the head."""
    step = Work(LENET, launches.BATCH, torch.bfloat16, "bf16", TRAIN_STEP)
    forward = "_forward_kernel"
    launched = [forward, "softmax", forward, forward, "_grad_hidden_kernel", forward]
    assert committed.modelled_kernels(step, launched) == {}  # this machine has no GPU, so the rows are not of it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = committed.modelled_kernels(step, launched)
    assert found.keys() == {0, 2, 3, 4}
    newest = sorted((committed.RESULTS / "static").glob("*.json"))[-1]
    rows = json.loads(newest.read_text())["rows"]
    rows = [row for row in rows if row["arch"] == "sm_90" and row["precision"] == "bf16"]
    rows = [row for row in rows if launches.STEP in row["used_by"] and row["kernel"].endswith("._forward_kernel")]
    assert [found[i] for i in (0, 2, 3)] == [row["modelled_ns_per_image"] for row in rows]
    assert committed.modelled_kernels(replace(step, batch=64), launched) == {}


@pytest.mark.thorough
def test_kernels_are_profiled_on_a_gpu_only(capsys):
    assert kernels.main([]) == 2
    assert capsys.readouterr().err == "bench.kernels: PyTorch sees no GPU\n"
