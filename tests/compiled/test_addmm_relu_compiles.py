"""The product's kernels at the shapes that the design notes name: what their machine code must be, by architecture.

Launchers run on CPU tensors through the fake driver. Times are modelled by `bench.static`, nothing is measured.
"""

from __future__ import annotations

import re

import networkx
import pytest
import torch
from fastlenet.kernels import addmm_relu as kernels
from harness.fake_driver import assert_shipped_without_spills, compiling_for, opcodes, sass
from harness.operators import fp32_precision

from bench.static import model
from bench.static import sass as reader

pytestmark = pytest.mark.thorough

SHAPES = {
    "LeNet fc1": (8192, 400, 120),
    "784 to 512": (8192, 784, 512),
    "4096 to 4096": (512, 4096, 4096),
    "LeNet fc2": (16384, 120, 84),
    "odd": (1000, 1001, 999),
}
PRODUCTS = {"_forward_kernel", "_grad_mat1_kernel", "_grad_mat2_kernel"}
MATRIX_UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
modes = pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32")], ids=["bf16", "tf32"]
)


def launch(target, shape, dtype, precision, *, weight_rows=True, wanted=(True, True, True)):
    """Forward and gradients as of a linear layer; returns every compiled kernel with its launch."""
    m, k, n = shape
    mat1, bias = torch.empty(m, k, dtype=dtype), torch.empty(n, dtype=dtype)
    mat2 = torch.empty(n, k, dtype=dtype).t() if weight_rows else torch.empty(k, n, dtype=dtype)
    with fp32_precision(precision), compiling_for(target) as records:
        output = kernels.addmm_relu(bias, mat1, mat2, 1, 1)
        kernels.addmm_relu_backward(torch.empty_like(output), output, mat1, mat2, (n,), 1, 1, wanted)
        assert_shipped_without_spills(records)
        found = [(record, call) for record in records for call in record.calls]
        for record in records:
            assert record.count(r"\b(atom|red)\." if record.target.backend == "cuda" else r"atomic") == 0, record
            if record.target.backend == "cuda":
                record.machine_code, record.opcodes = sass(record), opcodes(record)
    return found


def main_loop(record):
    """The instructions of the innermost loop that multiplies: the shortest way back to its block."""
    program = reader.parse(record.machine_code)
    unit, best = MATRIX_UNITS[f"sm_{record.target.arch}"], []
    for number, block in enumerate(program.blocks):
        if not any(i.base == unit for i in block.instructions):
            continue
        back = [
            networkx.shortest_path(program.graph, successor, number)
            for successor in block.successors
            if networkx.has_path(program.graph, successor, number)
        ]
        # Of a nest of loops the inner one is the shorter.
        inside = [i for other in min(back, key=len, default=[]) for i in program.blocks[other].instructions]
        density = [sum(i.base == unit for i in some) / max(1, len(some)) for some in (inside, best)]
        if density[0] > density[1]:
            best = inside
    assert best, f"{record} has no loop with {unit}"
    return best


def assert_near_limit(record, call):
    cost = model.cost(record, call)
    limit = max(cost.times["tensor"], cost.times["memory"])
    # Kernels of some microseconds that only add up a few numbers are bound by neither.
    assert cost.ns <= max(1.3 * limit, 1000), f"{record}\n{cost}"


def assert_loads_are_wide(record, narrow):
    """Operands come by descriptors, or by asynchronous copies of 16 bytes, or of 8 where `narrow`."""
    loads = {i.opcode for i in main_loop(record) if i.base in ("LDGSTS", "LDG")}
    if record.constexprs["BOXED"]:
        assert not loads, (record, loads)
        assert any(op.startswith("UTMALDG") for op in record.opcodes), record
    else:
        assert loads, record
        assert all("LDGSTS" in op and (op.endswith(".128") or (narrow and op.endswith(".64"))) for op in loads), loads


@every_shape
@modes
def test_machine_code_on_sm_90(shape, dtype, precision):
    """Wgmma over a tile's whole width, descriptors, few integer instructions, near the model's limits."""
    launches = launch("sm_90", shape, dtype, precision)
    products = [(record, call) for record, call in launches if record.name in PRODUCTS]
    assert {record.name for record, _ in products} == PRODUCTS
    # A row of 84 numbers of 16 bits starts at multiples of 8 bytes; odd rows are padded.
    narrow = dtype == torch.bfloat16 and any(size % 8 == 4 for size in shape)
    for record, _ in products:
        name, tile = str(record), record.constexprs
        assert narrow or tile["BOXED"], name
        loop = main_loop(record)
        units = {i.opcode for i in loop if i.base == "HGMMA"}
        depth = 16 if dtype == torch.bfloat16 else 8
        assert units, name
        assert all(f"64x{tile['BLOCK_N']}x{depth}" in unit for unit in units), (name, units)
        assert_loads_are_wide(record, narrow)
        # Beside the main loop only the bias is loaded in less: a lane of a matrix unit's result owns pairs of columns,
        # which an odd bias gives one by one.
        less = sum(times for op, times in record.opcodes.items() if op.startswith("LDG.") and ".128" not in op)
        bias = 0 if record.name != "_forward_kernel" else 32 if tile["ADDEND"] == 1 else 16
        assert less <= (bias or (32 if narrow else 0)), (name, record.opcodes)
        integers = sum(model.classify(i.opcode) == "integer" for i in loop)
        steps = sum(i.base == "HGMMA" for i in loop) * depth * (64 * tile["BLOCK_N"]) / 128
        assert integers <= steps / 8, f"{name}: {integers} integer instructions for {steps:.0f} multiply-adds a thread"
    for record, call in launches:
        assert_near_limit(record, call)


OTHERS = [
    *(("sm_80", shape) for shape in ("784 to 512", "LeNet fc2", "odd")),
    *(("sm_100", shape) for shape in ("784 to 512", "4096 to 4096", "LeNet fc2", "odd")),
    *(("gfx942", shape) for shape in ("784 to 512", "LeNet fc2", "odd")),
]


@pytest.mark.parametrize(("target", "shape"), OTHERS, ids=[" ".join(pair) for pair in OTHERS])
@modes
def test_other_architectures(target, shape, dtype, precision):
    """No spills, matrix units, loads as wide as rows allow, and near the model's limits where there is a model."""
    shape = SHAPES[shape]
    launches = launch(target, shape, dtype, precision)
    assert {record.name for record, _ in launches} >= PRODUCTS
    narrow = dtype == torch.bfloat16 and any(size % 8 == 4 for size in shape)
    for record, call in launches:
        # On sm_100 the sum of an odd number of columns is bound by issue, as the design notes say.
        if target in model.DEVICES and record.name != "_sum_partials_kernel":
            assert_near_limit(record, call)
        if record.name not in PRODUCTS:
            continue
        if target in MATRIX_UNITS:
            assert_loads_are_wide(record, narrow)
            assert target == "sm_80" or narrow or record.constexprs["BOXED"], record
        elif dtype == torch.bfloat16:
            assert record.count(r"v_mfma_f32_\w+bf16") > 0, record


@pytest.mark.parametrize("rows", [1, 64])
def test_few_rows_take_more_programs(rows):
    """Two chunks of a depth of 4096 are summed by programs of their own, and many rows take the same chunks."""
    few = launch("sm_90", (rows, 4096, 4096), torch.bfloat16, "ieee", wanted=(False, False, True))
    names = {record.name: (record, call) for record, call in few}
    assert {"_forward_parts_kernel", "_finish_kernel"} <= set(names)
    record, call = names["_forward_parts_kernel"]
    assert call.grid == (32, 2, 1)
    many = launch("sm_90", (512, 4096, 4096), torch.bfloat16, "ieee", wanted=(False, False, True))
    (whole,) = [record for record, _ in many if record.name == "_forward_kernel"]
    for constant in ("CHUNK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "PRECISION"):
        assert record.constexprs[constant] == whole.constexprs[constant]
    assert any(i.base == "HGMMA" for i in main_loop(record))


ROUNDS = [
    ("sm_90", 128, "by descriptors"),
    ("sm_90", 126, "by descriptors"),
    ("sm_80", 128, r"cvt\.rna\.tf32"),
    ("gfx942", 128, "by integers"),
]


@pytest.mark.parametrize(("target", "size", "how"), ROUNDS, ids=[f"{target} {size}" for target, size, _ in ROUNDS])
def test_tf32_operands_are_rounded_by_the_gpu(target, size, how):
    """By descriptors from sm_90 on, of padded copies too; by `cvt.rna` on sm_80, and by integers on gfx942."""
    for record, _ in launch(target, (64, size, size), torch.float32, "tf32", wanted=(False, True, False)):
        if record.name in PRODUCTS:
            assert record.constexprs["BOXED"] == (how == "by descriptors"), record
            found = set(re.findall(r"cvt\.\w+\.tf32", record.assembly))
            assert found == ({how.replace("\\", "")} if "cvt" in how else set()), record
