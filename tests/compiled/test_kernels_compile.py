"""Every launcher in every configuration that ships, compiled for every architecture: what the machine code must be.

A launcher runs on CPU tensors through the fake driver, which compiles for the architecture and launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fastlenet.kernels import addmm_relu as addmm
from fastlenet.kernels import configurations, mlp, rules, runtime
from fastlenet.kernels import conv2d_relu_max_pool2d as conv
from harness.cases import conv_case
from harness.fake_driver import TARGETS, CompiledKernelRecord, assert_shipped_without_spills, compiling_for, opcodes
from harness.operators import far_apart, fp32_precision

from bench import tune
from bench.workloads import ConvCase


@dataclass(frozen=True)
class Mode:
    """A dtype with the precision of its products."""

    dtype: torch.dtype
    precision: str = "ieee"

    def __str__(self) -> str:
        return f"{self.dtype}".removeprefix("torch.") + ("" if self.precision == "ieee" else "-tf32")


IEEE = Mode(torch.float32)
MODES = (IEEE, Mode(torch.float32, "tf32"), Mode(torch.float16), Mode(torch.bfloat16))
WIDTHS = (16, 32, 64, 128)
"""Channels or features, one for each tile that ships; those between take the next larger tile."""
NVIDIA = [name for name in TARGETS if name.startswith("sm")]
PRODUCTS = {
    "conv forward": "_forward_kernel",
    "conv grad_input": "_non_overlapping_grad_input_kernel",
    "conv grad_weight": "_grad_weight_kernel",
    "addmm forward": "_forward_kernel",
    "addmm grad_mat1": "_grad_mat1_kernel",
    "addmm grad_mat2": "_grad_mat2_kernel",
}


@pytest.fixture(autouse=True)
def _general_kernels(monkeypatch):
    """Few channels would go to the FMA units: the convolution's tests here are of the general kernels."""
    monkeypatch.setattr(rules, "choose", lambda *_: None)


every_target = pytest.mark.parametrize("target", TARGETS)


def modes(*chosen: Mode):
    return pytest.mark.parametrize("mode", chosen, ids=str)


class Launchers:
    """Calls the launchers as the operators do and returns what each call compiled."""

    def __init__(self, records: list[CompiledKernelRecord]) -> None:
        self.records = records
        self.seen = 0

    def new(self) -> list[CompiledKernelRecord]:
        """The kernels compiled since the last call."""
        records = self.records[self.seen :]
        self.seen = len(self.records)
        return records

    def product(self) -> CompiledKernelRecord | None:
        """The one kernel compiled since the last call that is not the sum of parts; None if it was not new."""
        records = [record for record in self.new() if "sum_partials" not in record.name]
        assert len(records) <= 1
        return records[0] if records else None

    def conv(
        self, case, dtype, *, bias=True, argmax=True, masks=((True, False, False), (False, True, True)), tensors=None
    ):
        """Forward, then a backward for each mask; yields the product kernel of each."""
        tensors = tensors or case.random(dtype)
        output, argmax = conv.conv2d_relu_max_pool2d(
            tensors["input"], tensors["weight"], tensors["bias"] if bias else None, case.geometry, argmax
        )
        yield self.product()
        if argmax is None:
            argmax = torch.empty_like(output, dtype=torch.uint8)
        for mask in masks:
            conv.conv2d_relu_max_pool2d_backward(
                output, tensors["input"], tensors["weight"], argmax, case.geometry, mask
            )
            yield self.product()

    def addmm(self, m, width, dtype, *, addend=(), masks=((False, True, False), (True, False, True))):
        """Forward, then a backward for each mask; yields the product kernel of each."""
        mat1, mat2 = torch.randn(m, width).to(dtype), torch.randn(width, width).to(dtype)
        size = (width,) if addend == () else addend
        input = None if size is None else torch.randn(size).to(dtype)
        output = addmm.addmm_relu(input, mat1, mat2, 1, 1)
        yield self.product()
        for mask in masks:
            addmm.addmm_relu_backward(output, output, mat1, mat2, size or (), 1, 1, mask)
            yield self.product()


def channels(width, **keywords):
    return conv_case("compiled", (2, width, 14, 14), (width, width, 5, 5), **keywords)


def tile(record):
    return record.constexprs["BLOCK_N"]


def products_per_thread(record):
    """Multiplications that one step over the depth of the tile takes."""
    block = record.constexprs
    return block["BLOCK_M"] * block["BLOCK_N"] * block["BLOCK_K"] // (32 * record.num_warps)


@pytest.fixture
def compiled():
    """Compile the six product kernels, with all that they can return, and check what must hold of any kernel."""

    def compile_all(target: str, mode: Mode, width: int) -> dict[str, CompiledKernelRecord]:
        with fp32_precision(mode.precision), compiling_for(target) as records:
            launchers = Launchers(records)
            found = [*launchers.conv(channels(width), mode.dtype), *launchers.addmm(64, width, mode.dtype)]
            check(records)
            return dict(zip(PRODUCTS, found, strict=True))

    return compile_all


def check(records):
    """No spills (OutOfResources has told of too much shared memory already), and no atomics of any kind."""
    assert_shipped_without_spills(records)
    for record in records:
        pattern = r"\b(atom|red)\." if record.target.backend == "cuda" else r"atomic"
        assert record.count(pattern) == 0, f"{record} uses atomics"


# --- every configuration -------------------------------------------------------------------------------------------


@every_target
@modes(*MODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_shipped_configurations(target, mode, width, compiled):
    """All fit the architecture without spilling, and multiply on the units that their precision demands."""
    records = compiled(target, mode, width)
    assert {name: record.name for name, record in records.items()} == PRODUCTS
    for name, record in records.items():
        # Exact float32 products of matrices keep both operands in registers, and would spill in a wider tile; those of
        # convolutions would run on sm_100's matrix units, in tf32.
        small = mode == IEEE and (name.startswith("addmm") or target == "sm_100")
        widest = 32 if small else 64 if name == "conv forward" else 128
        if name.startswith("addmm grad") and mode == IEEE and target == "sm_90":
            widest = 64
        assert tile(record) == min(widest, width), name
        assert record.constexprs["PRECISION"] == mode.precision
        if record.target.backend == "cuda":
            units = opcodes(record)
            tensor_cores = sum(n for op, n in units.items() if op.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCMMA")))
            assert bool(tensor_cores) == (mode != IEEE), f"{name}: {tensor_cores} tensor-core instructions"
            if mode == IEEE:
                multiplied = sum((2 if op.startswith("FFMA2") else 1) * n for op, n in units.items() if "FFMA" in op)
                assert multiplied >= products_per_thread(record), name
        elif mode.dtype != torch.float32:
            assert record.count(r"v_mfma_f32_\w+(f16|bf16)") > 0, name


@every_target
@modes(*MODES)
@pytest.mark.parametrize("width", [16, 64])
def test_few_input_channels(target, mode, width):
    """Below 16 channels the depth is walked in the weight's own order; tiles are smaller."""
    case = conv_case("few channels", (2, 3, 14, 14), (width, 3, 5, 5))
    with fp32_precision(mode.precision), compiling_for(target) as records:
        forward, _, grad_weight = Launchers(records).conv(case, mode.dtype)
        assert [(r.constexprs["WIDE"], tile(r)) for r in (forward, grad_weight)] == [(False, width)] * 2
        check(records)


@every_target
@modes(*MODES)
def test_any_stride_and_any_window(target, mode):
    """The input's gradient where strides divide, and several windows cover a cell."""
    case = channels(64, stride=2, pool_size=3, pool_stride=2, pool_padding=1)
    with fp32_precision(mode.precision), compiling_for(target) as records:
        _, grad_input, _ = Launchers(records).conv(case, mode.dtype)
        assert grad_input.name == "_grad_input_kernel"
        check(records)


@every_target
@modes(IEEE, Mode(torch.bfloat16))
def test_every_form_of_each_launcher(target, mode):
    """With and without bias, argmax and addend, and each set of gradients that a caller may ask for."""
    case = channels(128)
    with compiling_for(target) as records:
        launchers = Launchers(records)
        only = [(False, True, False), (False, False, True)]
        bare, weight, bias = launchers.conv(case, mode.dtype, bias=False, argmax=False, masks=only)
        assert (bare.constexprs["HAS_BIAS"], bare.constexprs["RETURN_ARGMAX"]) == (False, False)
        needs = [(r.constexprs["NEED_WEIGHT"], r.constexprs["NEED_BIAS"]) for r in (weight, bias)]
        assert needs == [(True, False), (False, True)]
        (with_bias,) = launchers.conv(case, mode.dtype, argmax=False, masks=())
        (with_argmax,) = launchers.conv(case, mode.dtype, bias=False, masks=())
        assert (with_bias.constexprs["HAS_BIAS"], with_argmax.constexprs["RETURN_ARGMAX"]) == (True, True)
        # A bias, an addend of the output's size and one of another size have kernels of their own.
        product, mat2 = launchers.addmm(64, 128, mode.dtype, addend=None, masks=[(False, False, True)])
        assert product.constexprs["INPUT"] == "none"
        assert mat2.name == "_grad_mat2_kernel"
        with_bias, _ = launchers.addmm(64, 128, mode.dtype, masks=[(True, False, False)])
        assert with_bias.constexprs["INPUT"] == "row"
        for size in ((64, 128), (64, 1)):
            _, addend = launchers.addmm(64, 128, mode.dtype, addend=size, masks=[(True, False, False)])
            # In float32 both forms are the same kernel.
            if size == (64, 128) or mode.dtype != torch.float32:
                assert addend.name == "_lay_out_kernel"
        check(records)


@every_target
@modes(IEEE, Mode(torch.float16))
def test_addresses_of_64_bits(target, mode, monkeypatch):
    """The variant for tensors beyond 2^31 elements must fit as well."""
    for module in (conv.general, addmm, runtime):
        monkeypatch.setattr(module, "index_type", lambda *_: runtime.tl.int64)
    with compiling_for(target) as records:
        launchers = Launchers(records)
        found = [*launchers.conv(channels(128), mode.dtype), *launchers.addmm(64, 128, mode.dtype)]
        assert {str(record.constexprs["INDEX"]) for record in records} == {"int64"}
        assert len(found) == len(PRODUCTS)
        check(records)


def test_a_tensor_beyond_two_to_the_31_gets_64_bits():
    """The launchers choose the variant themselves, and strides that need 64 bits are passed as such."""
    case = channels(16)
    tensors = case.random(torch.float16)
    tensors["input"] = far_apart(torch.cat([tensors["input"]] * 2))
    with compiling_for("sm_90") as records:
        forward, grad_input, grad_weight = Launchers(records).conv(case, torch.float16, tensors=tensors)
    assert [str(r.constexprs["INDEX"]) for r in (forward, grad_input, grad_weight)] == ["int64", "int32", "int64"]


# --- what the code must contain ------------------------------------------------------------------------------------


@every_target
@modes(IEEE, Mode(torch.float16))
def test_relu_propagates_nan(target, mode, compiled):
    """A plain maximum would turn NaN into 0, and the interpreter would not show it."""
    records = compiled(target, mode, 16)
    for name in ("conv forward", "addmm forward"):
        if target in NVIDIA:
            assert records[name].count(r"max\.NaN\.f32") > 0, name
            assert records[name].count(r"max\.f32") == 0, name
        else:
            # An unordered comparison tells NaN, which gfx942's maximum drops.
            assert records[name].count(r"v_cmp_u_f32|v_cmp_o_f32|v_maximum|v_max_f32.*nan") > 0, name


# --- a bounded number of variants ----------------------------------------------------------------------------------

SHAPES = [
    conv_case("batch 2", (2, 3, 14, 14), (6, 3, 5, 5)),
    conv_case("batch 1", (1, 3, 14, 14), (6, 3, 5, 5)),
    conv_case("batch 16", (16, 3, 14, 14), (6, 3, 5, 5)),
    conv_case("batch 17", (17, 3, 14, 14), (6, 3, 5, 5)),
    conv_case("multiples of 16", (32, 16, 32, 48), (16, 16, 1, 1)),
    conv_case("ones everywhere", (1, 1, 1, 1), (1, 1, 1, 1), pool_size=1),
    conv_case("stride and groups", (2, 4, 15, 13), (6, 2, 2, 3), stride=(1, 16), groups=2, padding=1),
    conv_case("large window", (1, 2, 20, 20), (5, 2, 3, 3), pool_size=(16, 1), pool_stride=1, dilation=2),
    conv_case("ceil mode", (3, 1, 12, 11), (13, 1, 3, 3), pool_size=3, pool_stride=2, pool_padding=1, ceil_mode=True),
    conv_case("LeNet conv1, larger", (64, 1, 34, 32), (6, 1, 5, 5)),
]


def test_new_shapes_compile_nothing_new():
    """Batch sizes, ones, multiples of 16, odd strides and unaligned pointers all run the same few kernels."""
    with compiling_for("sm_90") as records:
        launchers = Launchers(records)
        everything = [(True, True, True)]
        counts = []
        for case in SHAPES:
            for awkward in (False, True):
                tensors = case.random(torch.float16)
                if awkward:  # shift every pointer by one element and widen every stride
                    tensors = {name: _unaligned(tensor) for name, tensor in tensors.items()}
                output, argmax = conv.conv2d_relu_max_pool2d(*tensors.values(), case.geometry, True)
                grad = _unaligned(output) if awkward else output.sum().expand_as(output)
                arguments = (tensors["input"], tensors["weight"], argmax, case.geometry)
                conv.conv2d_relu_max_pool2d_backward(grad, *arguments, everything[0])
                counts.append(len(records))
        # Forward, two gradients and the sum; then the wide forms of forward and weight gradient; and, from the first
        # stride or window that is not plain on, another gradient of the input.
        assert counts == sorted(counts)
        assert sorted(set(counts)) == [4, 6, 7]
        # A product's kernels differ by tile and by how operands lie: sizes compile nothing new once these are known.
        dense, awkward = [(32, 72, 128), (7, 128, 80), (64, 104, 96)], [(17, 13, 7), (3, 5, 9), (40, 15, 11)]
        for shapes, lay in ((dense, lambda tensor: tensor), (awkward, _unaligned)):
            for m, k, n in shapes:
                mat1, mat2, bias = (lay(torch.randn(shape).half()) for shape in ((m, k), (k, n), (n,)))
                output = addmm.addmm_relu(bias, mat1, mat2, 1, 0.5)
                addmm.addmm_relu_backward(lay(output.clone()), output, mat1, mat2, (n,), 1, 0.5, everything[0])
                counts.append(len(records))
        # Forward and two gradients of each form; and the two copies to padded rows, plain and masked.
        assert counts[-6:] == [10] * 3 + [15] * 3
    assert launchers.records is records


def _unaligned(tensor):
    """A view with twice the strides that starts one element into its memory."""
    return torch.zeros(2 * tensor.numel() + 1, dtype=tensor.dtype)[1:].as_strided(
        tensor.shape, [2 * stride for stride in tensor.stride()]
    )


# --- three linear layers in one ------------------------------------------------------------------------------------

HEADS = {"LeNet": (400, 120, 84, 10), "as wide as it gets": (400, 128, 128, 128), "unaligned": (399, 127, 127, 127)}
MLP_PRODUCTS = (
    "_forward_kernel", "_exact_forward_kernel", "_grad_hidden_kernel", "_exact_grad_hidden_kernel",
    "_grad_weights_kernel",
)  # fmt: skip


def head(rows, widths, dtype):
    """Launch forward, with and without what the backward needs, and the backward with all gradients."""
    k, p, q, r = widths
    shapes = ((p, k), (p,), (q, p), (q,), (r, q), (r,))
    input, parameters = torch.randn(rows, k).to(dtype), [torch.randn(shape).to(dtype) for shape in shapes]
    mlp.mlp(input, *parameters, False)
    output, hidden1, hidden2 = mlp.mlp(input, *parameters, True)
    weights = parameters[::2]
    for mask in ([True] * 7, [True] + [False] * 6):
        mlp.mlp_backward(output, input, hidden1, hidden2, *weights, mask)


@every_target
@modes(*MODES)
@pytest.mark.parametrize("widths", HEADS.values(), ids=HEADS)
def test_mlp(target, mode, widths):
    """Fits without spilling or atomics, whatever the widths, and multiplies on the units that the precision demands."""
    with fp32_precision(mode.precision), compiling_for(target) as records:
        head(100, widths, mode.dtype)
        check(records)
        own = [record for record in records if record.name in MLP_PRODUCTS]
        assert {record.constexprs["ALIGNED"] for record in own} == {widths != HEADS["unaligned"]}
        for record in records:
            if record.name not in MLP_PRODUCTS or record.target.backend != "cuda":
                continue
            units = opcodes(record)
            tensor_cores = sum(n for op, n in units.items() if op.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCMMA")))
            assert bool(tensor_cores) == (mode != IEEE), f"{record}: {tensor_cores} tensor-core instructions"
        if target in NVIDIA:
            assert all(r.count(r"max\.NaN\.f32") > 0 == r.count(r"max\.f32") for r in records if "forward" in r.name)


@pytest.mark.wide
@every_target
@modes(IEEE, Mode(torch.float16))
def test_mlp_with_addresses_of_64_bits(target, mode, monkeypatch):
    monkeypatch.setattr(mlp, "index_type", lambda *_: runtime.tl.int64)
    with compiling_for(target) as records:
        head(100, HEADS["LeNet"], mode.dtype)
        check(records)


@pytest.mark.wide
def test_new_shapes_of_mlp_compile_nothing_new():
    """Two variants of each kernel, by whether rows start at multiples of four elements."""
    with compiling_for("sm_90") as records:
        counts = []
        for rows, widths in [
            (100, (400, 120, 84, 10)),
            (1, (16, 100, 96, 1)),
            (64, (32, 128, 68, 128)),
            (17, (4, 68, 72, 16)),
            (100, (401, 120, 84, 10)),
            (16, (1, 99, 95, 16)),
        ]:
            head(rows, widths, torch.float16)
            counts.append(len(records))
    # Forward twice, hidden gradients twice, products, the sum; then all but the sum once more.
    assert counts == [6] * 4 + [11] * 2


# --- the table of configurations -----------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", [*TARGETS])
def test_listed_configurations_spill_nothing(architecture):
    """Every entry for the architecture, with and without argmax, in each of its modes."""
    entries = {key: entry for key, entry in configurations.table().items() if key[1] == architecture}
    assert entries
    for (kernel, _, mode, shape), entry in entries.items():
        dtype = torch.float32 if mode in ("tf32", "ieee") else getattr(torch, mode)
        case = conv_case("listed", (64, *shape[:3]), shape[3:])
        tensors = case.random(dtype)
        pooled = case.geometry.output_shape(tensors["input"], tensors["weight"])
        grad, argmax = torch.empty(pooled, dtype=dtype), torch.empty(pooled, dtype=torch.uint8)
        variant = conv.VARIANTS[entry.variant]
        with fp32_precision("tf32" if mode == "tf32" else "ieee"), compiling_for(architecture) as records:
            if kernel.endswith("forward"):
                for return_argmax in (True, False):
                    variant.forward(*tensors.values(), case.geometry, return_argmax, False, entry.options)
            else:
                launcher = getattr(variant, kernel.rpartition(".")[2])
                launcher(grad, tensors["input"], tensors["weight"], argmax, case.geometry, False, entry.options)
            check(records)


# --- the tuner -----------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_tuner_drops_what_does_not_fit(monkeypatch):
    """Spills, and what the compiler refuses, are told by compiling alone."""
    case = ConvCase("wide", 128, 16, 128, 3, padding=1)
    slot = next(slot for slot in tune.slots(case, "ieee") if slot.kernel.endswith("grad_weight"))
    monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")
    for options, told in (({"BLOCK_K": 32}, "spills"), ({"BLOCK_K": 24}, "CompilationError")):
        assert told in str(tune.unfit(slot, configurations.Configuration("general", options, "")))
