"""The convolution's specialised variants, `patch_dot`, `patch_fma` and `column_fma`, before the general kernels' judge.

LeNet's shapes run as they ship. Two small shapes, listed for these tests only, make all else cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fastlenet.kernels import configurations, rules
from fastlenet.kernels.conv2d_relu_max_pool2d import patch_dot
from harness.cases import DTYPES, ConvCase, conv_case
from harness.draw import Drawn
from harness.fuzz import assume, examples, given, settings, st
from harness.judge import assert_bitwise_equal, assert_same_values, exact_grid
from harness.modes import interpreting
from harness.operators import CONV, far_apart, fp32_precision, run, upstream
from harness.poison import assert_writes_everything
from harness.strides import awkward, kinds_for

import fastlenet

CONV1 = conv_case("LeNet conv1", (2, 1, 32, 32), (6, 1, 5, 5))
CONV2 = conv_case("LeNet conv2", (2, 6, 14, 14), (16, 6, 5, 5))
SMALL = conv_case("small", (40, 2, 8, 10), (3, 2, 3, 3))
# Windows in pairs share a patch of 6 x 6 pixels, in rows of which only every second starts at a multiple of four.
PAIRS = conv_case("pairs", (23, 2, 10, 14), (3, 2, 3, 3))
ONE_TAP = conv_case("one tap", (9, 3, 4, 6), (5, 3, 1, 1))
SPECIAL = [float("nan"), float("inf"), -float("inf")]


@dataclass(frozen=True)
class Mode:
    """A dtype and the precision of its products, which choose the variant."""

    dtype: torch.dtype
    precision: str
    variant: str

    def __str__(self) -> str:
        return self.precision if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")


TF32 = Mode(torch.float32, "tf32", "patch_dot")
EXACT = Mode(torch.float32, "ieee", "patch_fma")
HALF = Mode(torch.float16, "ieee", "patch_dot")
BFLOAT = Mode(torch.bfloat16, "ieee", "patch_dot")
modes = pytest.mark.parametrize("mode", [TF32, EXACT, HALF, BFLOAT], ids=str)
variants = pytest.mark.parametrize("mode", [TF32, EXACT], ids=str)

# Tiles of several images, partial in every dimension, and a depth that takes several steps.
TILES = {
    (2, 8, 10, 3, 2, 3, 3): {
        "forward": {"IMAGES": 5, "ROWS": 1, "OUT_PAD": 4, "BLOCK_M": 32, "BLOCK_K": 16, "STAGES": 1},
        "grad_input": {"IMAGES": 5, "IN_PAD": 4, "OUT_PAD": 4, "BLOCK_M": 32},
        "grad_weight": {"IMAGES": 2, "ROWS": 3, "WINDOWS": 1, "OUT_PAD": 4, "BLOCK_M": 32, "BLOCK_K": 16, "STAGES": 1},
    },
    (2, 10, 14, 3, 2, 3, 3): {
        "forward": {"IMAGES": 2, "ROWS": 2, "OUT_PAD": 4, "BLOCK_M": 32, "BLOCK_K": 16, "STAGES": 1},
        "grad_input": {"IMAGES": 4, "IN_PAD": 4, "OUT_PAD": 4, "BLOCK_M": 32},
        "grad_weight": {"IMAGES": 5, "ROWS": 1, "WINDOWS": 2, "OUT_PAD": 4, "BLOCK_M": 16, "BLOCK_K": 32, "STAGES": 1},
    },
    (3, 4, 6, 5, 3, 1, 1): {
        "forward": {"IMAGES": 2, "ROWS": 2, "OUT_PAD": 8, "BLOCK_M": 16, "BLOCK_K": 16, "STAGES": 1},
        "grad_input": {"IMAGES": 4, "IN_PAD": 4, "OUT_PAD": 8, "BLOCK_M": 16},
        "grad_weight": {"IMAGES": 3, "ROWS": 1, "WINDOWS": 1, "OUT_PAD": 8, "BLOCK_M": 16, "BLOCK_K": 16, "STAGES": 1},
    },
}


@pytest.fixture(autouse=True)
def _small_shapes_are_listed(monkeypatch):
    table = dict(configurations.table())
    for shape, tiles in TILES.items():
        for direction, dot in tiles.items():
            for mode in ("tf32", "ieee", "float16", "bfloat16"):
                exact = "column_fma" if direction == "grad_input" else "patch_fma"
                variant = exact if mode == "ieee" else "patch_dot"
                options = dot if variant == "patch_dot" else {"CHANNELS": 3, "STRIP": 2}
                key = f"conv2d_relu_max_pool2d.{direction}", "sm_90", mode, shape
                table[key] = configurations.Configuration(variant, options, "for a test")
    monkeypatch.setattr(configurations, "table", lambda: table)
    if interpreting():
        # What ships for a GPU, not the tiles that suit the interpreter.
        monkeypatch.setattr(configurations, "architecture", lambda: "sm_90")


@pytest.fixture
def several_tiles_a_program(monkeypatch, unplanned):
    """Share the work as a large batch does: a few programs, each with several groups of images."""
    share = patch_dot._share
    monkeypatch.setattr(patch_dot, "_share", lambda tiles, rows, _: share(tiles, rows, 2))


@pytest.fixture
def conv(watched):
    return CONV.under(watched)


CONSTANTS = {"patch_dot": "OUT_PAD", "patch_fma": "POOL_STRIDE_H", "column_fma": "STRIP"}


def expect(launches, **variants: str) -> None:
    """Assert that these kernels ran, each of its variant, and no other of the convolution's."""
    found = {
        name.replace("_sliding", ""): variant
        for name, options in launches
        for variant, constant in CONSTANTS.items()
        if constant in options
    }
    assert found == {f"_{name}_kernel": variant for name, variant in variants.items()}


# --- accuracy ------------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("case", [SMALL, PAIRS, ONE_TAP, CONV1, CONV2], ids=str)
def test_as_accurate_as_stock(mode, case, conv, device, launches):
    with fp32_precision(mode.precision):
        conv.random(case, case.random(mode.dtype, device=device))
    if case == CONV1:
        # The gradient of a network's images is not listed: the rule decides. A convolution of so few products leaves
        # matrix units waiting.
        weight = mode.variant if mode.dtype != torch.float32 else "patch_fma"
        expect(launches, forward="patch_fma", grad_input="patch_fma", grad_weight=weight)
    else:
        exact = "column_fma" if mode.variant == "patch_fma" else mode.variant
        expect(launches, forward=mode.variant, grad_input=exact, grad_weight=mode.variant)


@pytest.mark.wide
@modes
@pytest.mark.parametrize("case", [CONV1, CONV2, SMALL, PAIRS, ONE_TAP], ids=str)
def test_equal_to_stock_where_arithmetic_is_exact(mode, case, conv, device):
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))


@variants
def test_several_tiles_a_program(mode, conv, device, several_tiles_a_program):
    with fp32_precision(mode.precision):
        conv.exact(SMALL, SMALL.exact(mode.dtype, device=device))


@pytest.mark.wide
@variants
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_bias(mode, bias, conv, device):
    case = conv_case("bias", SMALL.input, SMALL.weight, bias=bias)
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))


@variants
@pytest.mark.parametrize("images", [0, 1, 5, 6])
def test_any_number_of_images(mode, images, watched, device):
    """None, one, exactly a tile, and one more."""
    case = conv_case("images", (images, *SMALL.input[1:]), SMALL.weight)
    with fp32_precision(mode.precision):
        CONV.under(watched).exact(case, case.exact(mode.dtype, device=device))


# --- the rule ------------------------------------------------------------------------------------------------------

RULED = [
    conv_case("odd sizes", (3, 2, 9, 11), (5, 2, 3, 3)),
    conv_case("even kernel", (3, 1, 8, 10), (3, 1, 4, 2)),
    conv_case("padded", (2, 3, 6, 8), (4, 3, 3, 3), padding=1),
    conv_case("padded by an odd number of pairs", (2, 1, 8, 8), (2, 1, 5, 5), padding=2),
    conv_case("smaller than a block's patch", (2, 1, 5, 4), (2, 1, 5, 5), padding=2, pool_size=3, pool_stride=2),
    conv_case("overlapping windows", (3, 2, 9, 10), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2),
    conv_case(
        "overlapping windows of four channels", (2, 4, 8, 9), (3, 4, 3, 3), padding=1, pool_size=3, pool_stride=2
    ),
    conv_case("windows that share two rows", (2, 1, 7, 6), (2, 1, 2, 2), pool_size=3, pool_stride=1),
    conv_case("overlapping from row to row", (2, 2, 9, 7), (2, 2, 3, 2), pool_size=(3, 2), pool_stride=(1, 2)),
    conv_case("rows in two chunks", (2, 1, 21, 9), (2, 1, 3, 3), pool_size=3, pool_stride=2),
    conv_case("rows in chunks that windows outreach", (2, 1, 20, 9), (2, 1, 2, 2), pool_size=5, pool_stride=1),
    conv_case("overlapping one way", (2, 2, 7, 9), (2, 2, 2, 3), pool_size=(3, 2), pool_stride=(3, 1)),
    conv_case("windows of 3 x 3", (2, 1, 11, 10), (4, 1, 3, 2), pool_size=3),
    conv_case("gaps between windows", (2, 2, 9, 10), (3, 2, 2, 2), pool_size=2, pool_stride=3),
    conv_case("stride", (2, 2, 13, 12), (3, 2, 3, 3), stride=2, padding=1),
    conv_case("stride beyond the kernel", (2, 1, 12, 13), (2, 1, 1, 2), stride=(3, 4), pool_size=2),
    conv_case("ceil mode", (2, 1, 8, 9), (2, 1, 3, 3), pool_size=3, pool_stride=2, pool_padding=1, ceil_mode=True),
    conv_case("a stem of 7 x 7", (1, 1, 14, 12), (2, 1, 7, 7), stride=2, padding=3, pool_size=3, pool_stride=2),
]
FIRST_LAYER = conv_case("a first layer of 11 x 11", (1, 1, 27, 31), (2, 1, 11, 11), stride=4, padding=2, pool_size=2)
ruled = pytest.mark.parametrize("case", RULED, ids=str)


@pytest.mark.parametrize("mode", [TF32, BFLOAT], ids=str)
@ruled
def test_the_rule_takes_few_channels_to_the_fma_units(case, mode, conv, device, launches):
    with fp32_precision(mode.precision):
        conv.random(case, case.random(mode.dtype, device=device), allow_zero=True)
        expect(launches, forward="patch_fma", grad_input="patch_fma", grad_weight="patch_fma")


@ruled
def test_what_the_rule_takes_equals_stock_where_arithmetic_is_exact(case, conv, device, launches):
    conv.exact(case, case.exact(torch.float32, device=device))
    expect(launches, forward="patch_fma", grad_input="patch_fma", grad_weight="patch_fma")


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_windows_that_overlap_are_loaded_once_for_a_column(kind, conv, device, launches):
    """The weight's gradient slides down columns, in several chunks of rows, and adds up to what stock does."""
    case = conv_case("sliding", (2, 2, 17, 6), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    tensors["input"] = awkward(tensors["input"], kind) if kind != "contiguous" else tensors["input"]
    conv.exact(case, tensors)
    assert [name for name, _ in launches if "grad_weight" in name] == ["_sliding_grad_weight_kernel"]


@pytest.mark.wide
def test_a_first_layer_with_a_large_kernel(conv, device, launches):
    """Its kernel rows are shared between programs; its images' gradient, which few ask for, stays general."""
    conv.exact(FIRST_LAYER, FIRST_LAYER.exact(torch.float32, device=device))
    assert {name for name, constants in launches if "POOL_STRIDE_H" in constants} == {
        "_forward_kernel",
        "_grad_weight_kernel",
    }
    conv.random(FIRST_LAYER, FIRST_LAYER.random(torch.float32, device=device), allow_zero=True)


@pytest.mark.parametrize("images", [0, 1, 70])
@pytest.mark.parametrize("case", [RULED[0], RULED[4]], ids=str)
def test_the_rule_at_any_number_of_images(images, case, conv, device):
    """Also more than one program's lanes, of which the last lend their cells to none."""
    case = conv_case("images", (images, *case.input[1:]), case.weight, **case.keywords)
    conv.exact(case, case.exact(torch.float32, device=device))


def test_inference_loops_over_rows_of_large_padded_kernels_and_gives_the_same_bits(device, launches):
    """Where registers hold all rows only beside an argmax."""
    case = conv_case("inference", (2, 2, 9, 8), (3, 2, 5, 5), padding=2, pool_size=3, pool_stride=2)
    tensors = case.random(torch.float32, device=device)
    output = CONV.fused(**tensors | {"weight": tensors["weight"].clone().requires_grad_()}, **case.keywords)
    with torch.no_grad():
        assert_bitwise_equal(CONV.fused(**tensors, **case.keywords), output.detach())
    assert [constants["UNROLL"] for _, constants in launches] == [True, False]


@pytest.mark.wide
def test_the_last_chunk_of_rows_ends_with_the_image(conv, device):
    """Three rows of windows in chunks of two: a fourth would lie beyond the last image's memory."""
    case = conv_case("chunks", (6000, 1, 7, 7), (1, 1, 1, 1), pool_size=3, pool_stride=2)
    conv.exact(case, case.exact(torch.float32, device=device))


@pytest.mark.parametrize("kind", kinds_for(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("name", ["input", "weight", "grad"])
def test_the_rule_takes_awkward_layouts(name, kind, conv, device, launches):
    """Channels last as it is, others copied, unaligned ones by single loads: never on the general kernels."""
    case = conv_case("layouts", (3, 2, 8, 6), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float16, device=device)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    conv.exact(case, tensors, kind if name == "grad" else "contiguous")
    expect(launches, forward="patch_fma", grad_input="patch_fma", grad_weight="patch_fma")


def test_unaligned_images_are_loaded_one_by_one(conv, device, launches):
    case = RULED[2]
    tensors = case.exact(torch.float16, device=device)
    shifted = torch.cat([tensors["input"].new_zeros(1), tensors["input"].flatten()])[1:].view(case.input)
    conv.exact(case, tensors | {"input": shifted})
    assert {constants["PAIRS"] for name, constants in launches if name == "_forward_kernel"} == {-1}


@pytest.mark.wide
@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_nan_and_infinities_by_the_rule(name, value, conv, device):
    """Every cell lies in a window and none in the padding, so that stock's own definition decides."""
    case = conv_case("special", (3, 2, 9, 9), (3, 2, 3, 3), pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    flat = tensors[name].view(-1)
    flat[torch.tensor([0, flat.numel() // 2, flat.numel() - 1])] = value
    conv.exact(case, tensors)


def test_a_sample_does_not_depend_on_its_batch_by_the_rule(device):
    samples_do_not_depend_on_their_batch(device)


def samples_do_not_depend_on_their_batch(device) -> None:
    case = conv_case("batch", (40, 2, 9, 10), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2)
    tensors = case.random(torch.float32, device=device)
    images = tensors.pop("input")
    with torch.no_grad():
        whole = CONV.fused(images, **tensors, **case.keywords)
        for batch, sample in ((1, 0), (1, 39), (7, 33)):
            part = CONV.fused(images[sample : sample + batch].clone(), **tensors, **case.keywords)
            assert_bitwise_equal(part, whole[sample : sample + batch], name=f"{batch} from sample {sample}")


def test_where_the_rule_ends():
    """Few channels go to the FMA units, more only exactly; those of many go by blocks, the input's by a workspace."""
    geometry, overlapping = RULED[0].geometry, RULED[5].geometry

    def variant(direction, channels, exact, kernel=(3, 3), geometry=geometry, target="sm_90"):
        found = rules.choose(direction, geometry, channels, 64, kernel, exact, target)
        return None if found is None else found.variant

    assert [variant("forward", channels, False) for channels in (31, 32)] == ["patch_fma", "block_dot"]
    assert [variant("forward", 256, exact) for exact in (False, True)] == ["block_dot", None]
    assert [variant("grad_weight", channels, True) for channels in (64, 65)] == ["patch_fma", None]
    assert [variant(name, 3, True, target="gfx942") for name in ("forward", "grad_weight")] == ["patch_fma", None]
    assert [variant("grad_input", channels, True) for channels in (64, 65)] == ["patch_fma", None]
    spread = [variant("grad_input", channels, False) for channels in (31, 32, 64, 65)]
    assert spread == ["patch_fma", "spread_dot", "spread_dot", None]
    assert [variant("grad_input", 32, False, kernel) for kernel in ((1, 3), (2, 2))] == [None, "spread_dot"]
    few = [variant("grad_input", channels, False, geometry=overlapping) for channels in (15, 16)]
    assert few == ["patch_fma", "spread_dot"]
    assert variant("grad_input", 16, False, geometry=overlapping, target="sm_80") == "patch_fma"
    assert variant("grad_input", 32, False, (1, 1), overlapping) == "spread_dot"
    weights = [variant("grad_weight", channels, False, geometry=overlapping) for channels in (31, 32, 256)]
    assert weights == ["patch_fma", "block_dot", "block_dot"]
    assert [variant("grad_weight", 32, exact) for exact in (True, False)] == ["patch_fma", "block_dot"]
    for width, target, found in (
        (7, "sm_90", "block_dot"),
        (8, "sm_90", None),
        (5, "sm_80", "block_dot"),
        (6, "sm_80", None),
    ):
        assert variant("grad_weight", 65, False, (3, width), target=target) == found
    elsewhere = [variant("grad_weight", channels, False, (3, 3), overlapping, "sm_100") for channels in (32, 64, 65)]
    assert elsewhere == ["spread_dot", "spread_dot", None]
    assert variant("forward", 3, True, (12, 12)) is None
    dilated = conv_case("", (1,), (1, 1, 3, 3), dilation=2).geometry
    assert variant("forward", 3, True, geometry=dilated) is None


@pytest.mark.parametrize(
    ("pool", "step", "channels", "target", "slides"),
    [(3, 2, 16, "sm_90", 1), (3, 2, 16, "sm_100", 0), (3, 2, 1, "sm_100", 1), (2, 2, 16, "sm_90", 0)],
)
def test_windows_that_overlap_slide_where_registers_hold_them(pool, step, channels, target, slides):
    geometry = conv_case("", (1,), (1, 1, 3, 3), pool_size=pool, pool_stride=step).geometry
    rule = rules.choose("grad_weight", geometry, channels, 32, (3, 3), False, target)
    assert rule.options.get("SLIDE", 0) == slides


@pytest.mark.parametrize(
    ("channels", "pool", "step", "expected"), [(16, 3, 2, (4, 1)), (3, 3, 2, (3, 2)), (16, 2, 2, (2, 2))]
)
def test_channels_share_what_overlapping_windows_spread(channels, pool, step, expected):
    geometry = conv_case("", (1,), (1, 1, 3, 3), pool_size=pool, pool_stride=step).geometry
    options = rules.choose("grad_input", geometry, channels, 32, (3, 3), True, "sm_90").options
    assert (options["CHANNELS"], options["POSITIONS"]) == expected


if hasattr(st, "composite"):

    @st.composite
    def ruled_calls(draw):
        """A call that the rule takes."""
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        pool = draw(st.sampled_from([1, 2, 3, (2, 3), (3, 1)]))
        keywords = {
            "stride": draw(st.sampled_from([1, 1, 2, (1, 3), 4])),
            "padding": draw(st.sampled_from([0, 1, (2, 0), 3])),
            "pool_size": pool,
            "pool_stride": draw(st.sampled_from([None, 1, 2, 3, (2, 1)])),
            "pool_padding": 0 if pool in (1, (3, 1)) else draw(st.sampled_from([0, 1])),
            "ceil_mode": draw(st.booleans()),
        }
        input = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(4, 13)), draw(st.integers(4, 13))
        weight = draw(st.integers(1, 5)), input[1], *kernel
        case = conv_case("drawn", input, weight, bias=draw(st.booleans()), **keywords)
        geometry = case.geometry
        assume(min(geometry.conv_size(input[2:], kernel)) > 0)
        assume(min(geometry.pooled_size(geometry.conv_size(input[2:], kernel))) > 0)
        kinds = {
            name: draw(st.sampled_from(["contiguous", "channels_last", "sliced"])) for name in (*case.shapes, "grad")
        }
        return Drawn(case, draw(st.sampled_from(DTYPES)), kinds, draw(st.booleans()), draw(st.integers(0, 2**16)))

else:
    ruled_calls = st


@pytest.mark.wide
@settings(max_examples=examples(20))
@given(call=ruled_calls())
def test_drawn_calls_by_the_rule(call, conv, device, launches):
    launches.clear()
    tensors, kind = call.tensors(device), call.grad_kind(4)
    if call.exact:
        conv.exact(call.case, tensors, kind)
    else:
        conv.random(call.case, tensors, kind, allow_zero=True)
    expect(launches, forward="patch_fma", grad_input="patch_fma", grad_weight="patch_fma")


# --- many channels -------------------------------------------------------------------------------------------------

TWO_STEPS = conv_case("two steps", (2, 33, 7, 6), (48, 33, 3, 3), padding=1, pool_size=3, pool_stride=2)
ONE_TAP_EACH = conv_case("one tap", (3, 32, 5, 4), (17, 32, 1, 1), pool_size=1)
MATRIX_UNITS = [TF32, HALF, BFLOAT]


@pytest.fixture
def spreading(monkeypatch):
    """Let `block_dot` compute the forward, and `spread_dot` all gradients, whatever the channels."""
    blocks, spreads = rules.Rule("block_dot", {}), rules.Rule("spread_dot", {})
    monkeypatch.setattr(rules, "choose", lambda direction, *_: blocks if direction == "forward" else spreads)


@pytest.fixture
def blocks(monkeypatch, spreading):
    """Let `block_dot` compute the weight's gradient too."""
    input_only = rules.Rule("spread_dot", {}), rules.Rule("block_dot", {})
    monkeypatch.setattr(rules, "choose", lambda direction, *_: input_only[direction != "grad_input"])


WORKSPACE, BLOCKS = ("_spread_kernel", "_weight_product_kernel"), ("_grad_weight_kernel",)


def by_blocks_and_workspace(launches, weights=WORKSPACE) -> None:
    """Assert that the forward computed blocks, and that gradients were spread and multiplied, or the weight's not."""
    wanted = ["_pack_kernel", "_forward_kernel", "_spread_kernel", "_product_kernel", *weights]
    found = [name for name, _ in launches if name != "_sum_partials_kernel"]
    assert found == wanted * (len(found) // len(wanted))
    assert found


@pytest.mark.parametrize("mode", MATRIX_UNITS, ids=str)
@ruled
def test_blocks_and_a_workspace(mode, case, conv, device, launches, spreading):
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))
        by_blocks_and_workspace(launches)
        conv.random(case, case.random(mode.dtype, device=device), allow_zero=True)


@pytest.mark.parametrize("mode", [*MATRIX_UNITS, EXACT], ids=str)
@pytest.mark.parametrize("case", [TWO_STEPS, ONE_TAP_EACH], ids=str)
def test_blocks_and_a_workspace_of_many_channels(mode, case, conv, device, launches, spreading):
    """Also of exact float32, which a table may ask for."""
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))
    by_blocks_and_workspace(launches)


@pytest.mark.wide
@pytest.mark.parametrize("mode", [TF32, BFLOAT], ids=str)
@ruled
def test_weight_gradients_by_blocks(mode, case, conv, device, launches, blocks):
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))
        by_blocks_and_workspace(launches, BLOCKS)
        conv.random(case, case.random(mode.dtype, device=device), allow_zero=True)


@pytest.mark.parametrize("mode", [TF32, BFLOAT], ids=str)
@pytest.mark.parametrize("case", [TWO_STEPS, ONE_TAP_EACH], ids=str)
def test_weight_gradients_by_blocks_of_many_channels(mode, case, conv, device, launches, blocks):
    with fp32_precision(mode.precision):
        conv.exact(case, case.exact(mode.dtype, device=device))
    by_blocks_and_workspace(launches, BLOCKS)


@pytest.mark.wide
@pytest.mark.parametrize("images", [0, 1, 70])
def test_weight_gradients_by_blocks_of_any_number_of_images(images, conv, device, blocks):
    case = conv_case("images", (images, *RULED[5].input[1:]), RULED[5].weight, **RULED[5].keywords)
    conv.exact(case, case.exact(torch.float16, device=device))


@pytest.mark.wide
@pytest.mark.parametrize("kind", kinds_for(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("name", ["input", "grad"])
def test_weight_gradients_by_blocks_take_awkward_layouts(name, kind, conv, device, launches, blocks):
    case = conv_case("layouts", (3, 2, 8, 6), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float16, device=device)
    if name == "input":
        tensors["input"] = awkward(tensors["input"], kind)
    conv.exact(case, tensors, kind if name == "grad" else "contiguous")
    by_blocks_and_workspace(launches, BLOCKS)


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("size", [9, 10], ids=["whole blocks", "cells that are missing"])
def test_weight_gradients_by_blocks_of_special_pixels(value, size, device, launches, blocks):
    """A block's cells beyond the convolution meet no pixel: their gradient of 0 would make it NaN."""
    case = conv_case("special", (3, 2, size, size), (3, 2, 4, 4), padding=2, pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    tensors["input"][1, 0, -1, -1] = value
    output = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=device)
    expected, result = (run(f, tensors, case.keywords, grad) for f in (CONV.stock, CONV.fused))
    for name in ("weight", "bias"):
        assert_same_values(result.grads[name], expected.grads[name], name=name)
    by_blocks_and_workspace(launches, BLOCKS)


def test_general_gradients_of_cells_that_several_windows_chose(conv, device, launches, monkeypatch):
    """Each window's gradient is rounded to tf32 before the sum: errors are as large as theirs, not as the sum's."""
    monkeypatch.setattr(rules, "choose", lambda *_: None)
    with fp32_precision("tf32"):
        conv.random(TWO_STEPS, TWO_STEPS.random(torch.float32, device=device))
    found = [name for name, _ in launches]
    assert found == ["_forward_kernel", "_grad_input_kernel", "_grad_weight_kernel", "_sum_partials_kernel"]


@pytest.mark.parametrize("images", [0, 1, 70])
def test_blocks_and_a_workspace_of_any_number_of_images(images, conv, device, spreading):
    case = conv_case("images", (images, *RULED[5].input[1:]), RULED[5].weight, **RULED[5].keywords)
    conv.exact(case, case.exact(torch.float16, device=device))


@pytest.mark.parametrize("kind", kinds_for(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("name", ["input", "weight", "grad"])
def test_blocks_and_a_workspace_take_awkward_layouts(name, kind, conv, device, launches, spreading):
    case = conv_case("layouts", (3, 2, 8, 6), (3, 2, 3, 3), padding=1, pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float16, device=device)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    conv.exact(case, tensors, kind if name == "grad" else "contiguous")
    by_blocks_and_workspace(launches)


def test_a_sample_does_not_depend_on_its_batch_by_blocks(device, spreading, sums_in_order):
    samples_do_not_depend_on_their_batch(device)


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_nan_and_infinities_by_blocks(name, value, device, launches, spreading):
    case = conv_case("special", (3, 2, 9, 9), (3, 2, 3, 3), pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    flat = tensors[name].view(-1)
    flat[torch.tensor([0, flat.numel() // 2, flat.numel() - 1])] = value
    with torch.no_grad():
        assert_same_values(CONV.fused(**tensors, **case.keywords), CONV.stock(**tensors, **case.keywords))
    assert [name for name, _ in launches] == ["_pack_kernel", "_forward_kernel"]


@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_a_workspace_keeps_nan_and_infinities_of_the_upstream_gradient(value, conv, device, spreading):
    """They reach what their cell reaches, and nothing where relu was off."""
    case = conv_case("special", (3, 2, 9, 9), (3, 2, 3, 3), pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    tensors["bias"][0] = -100
    output = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=device)
    for position in (int((output == 0).flatten().nonzero()[0]), int(output.argmax())):
        spoiled = grad.clone()
        spoiled.view(-1)[position] = value
        conv.equal(case, tensors, spoiled)


@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_a_workspace_and_infinite_weights(value, device, spreading):
    """As in stock, but that the edge may be NaN: a tap beyond the convolution adds 0 times the weight."""
    case = conv_case("special", (3, 2, 9, 9), (3, 2, 3, 3), pool_size=3, pool_stride=2)
    tensors = case.exact(torch.float32, device=device)
    tensors["weight"][1, 0, 1, 1] = value
    output = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=device)
    expected, result = (run(f, tensors, case.keywords, grad).grads["input"] for f in (CONV.stock, CONV.fused))
    assert_same_values(torch.where(result.isnan(), result, expected), result)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert_same_values(result[inner], expected[inner])


@pytest.mark.wide
@settings(max_examples=examples(20))
@given(call=ruled_calls())
def test_drawn_calls_by_blocks_and_a_workspace(call, conv, device, launches, spreading):
    launches.clear()
    tensors, kind = call.tensors(device), call.grad_kind(4)
    if call.exact:
        conv.exact(call.case, tensors, kind)
    else:
        conv.random(call.case, tensors, kind, allow_zero=True)
    by_blocks_and_workspace(launches)


@pytest.mark.wide
@settings(max_examples=examples(20))
@given(call=ruled_calls())
def test_drawn_calls_with_the_weights_gradient_by_blocks(call, conv, device, launches, blocks):
    launches.clear()
    tensors, kind = call.tensors(device), call.grad_kind(4)
    if call.exact:
        conv.exact(call.case, tensors, kind)
    else:
        conv.random(call.case, tensors, kind, allow_zero=True)
    by_blocks_and_workspace(launches, BLOCKS)


# --- layouts -------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("input", "weight", "grad") for kind in kinds_for(torch.empty(1, 1, 1, 1))],
)
def test_awkward_layouts(mode, name, kind, conv, device):
    case = conv_case("layouts", (6, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(mode.dtype, device=device)
    if name != "grad":
        tensors[name] = awkward(tensors[name], kind)
    with fp32_precision(mode.precision):
        conv.exact(case, tensors, kind if name == "grad" else "contiguous")


def test_what_the_variant_cannot_load_runs_on_the_general_kernels(conv, device, launches):
    """Channels last, and data whose address is no multiple of 16 bytes."""
    case = conv_case("layouts", (6, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(torch.float16, device=device)
    shifted = torch.cat([tensors["input"].new_zeros(1), tensors["input"].flatten()])[1:].view(case.input)
    for other in (tensors["input"].contiguous(memory_format=torch.channels_last), shifted):
        conv.exact(case, tensors | {"input": other})
    assert not any("OUT_PAD" in constants for _, constants in launches)


@pytest.mark.wide
@variants
def test_addresses_of_64_bits(mode, monkeypatch, conv, device, launches):
    from fastlenet.kernels.conv2d_relu_max_pool2d import column_fma, patch_fma

    tl = pytest.importorskip("triton.language")
    for module in (column_fma, patch_dot, patch_fma):
        monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    with fp32_precision(mode.precision):
        conv.exact(SMALL, SMALL.exact(mode.dtype, device=device))
    own = [constants for name, constants in launches if name != "_sum_partials_kernel"]
    assert {str(constants["INDEX"]) for constants in own if "INDEX" in constants} <= {"int64"}


def test_an_input_beyond_two_to_the_31_is_addressed(watched, device):
    """Images so far apart are not contiguous: they are copied first, and arrive."""
    case = conv_case("far", (4, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(torch.float16, device=device)
    expected = run(CONV.stock, tensors, case.keywords)
    result = watched(CONV.fused, tensors | {"input": far_apart(tensors["input"])}, case.keywords)
    for (label, actual), (_, wanted) in zip(result.tensors(), expected.tensors(), strict=True):
        assert_same_values(actual, wanted, name=label)


# --- special values ------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_nan_and_infinities_travel_as_in_stock(mode, name, value, conv, device, several_tiles_a_program):
    """Also at a patch's corners, which the banded matrix multiplies by zero for the cells that do not look there."""
    case = conv_case("special", (6, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(mode.dtype, device=device)
    flat = tensors[name].view(-1)
    flat[torch.tensor([0, flat.numel() // 2, flat.numel() // 2 + 1, flat.numel() - 1])] = value
    if name == "bias":
        flat[1:] = 0
    with fp32_precision(mode.precision):
        result = conv.exact(case, tensors)
    assert not all(tensor.isfinite().all() for _, tensor in result.tensors()) or value < 0


@pytest.mark.wide
@variants
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_nan_and_infinities_in_the_upstream_gradient(mode, value, conv, device):
    """They reach the pixels that their cell reaches and no other, and nothing where relu was off."""
    case = conv_case("special", (6, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(mode.dtype, device=device)
    tensors["bias"][0] = -100
    output = CONV.stock(**tensors, **case.keywords)
    grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=device)
    closed = int((output == 0).flatten().nonzero()[0])
    for position in (closed, int(output.argmax())):
        spoiled = grad.clone()
        spoiled.view(-1)[position] = value
        with fp32_precision(mode.precision):
            result = conv.equal(case, tensors, spoiled)
        assert result.grads["bias"].isfinite().all() == (position == closed)


@pytest.mark.wide
@variants
def test_finite_neighbours_keep_their_bits(mode, device):
    """One image with an infinity makes its program compute again; every other image's bits stay what they were."""
    clean = SMALL.random(mode.dtype, device=device)
    spoiled = clean | {"input": clean["input"].clone()}
    spoiled["input"][7, 0, 3, 3] = float("inf")
    grad = upstream(CONV.stock(**clean, **SMALL.keywords))
    with fp32_precision(mode.precision):
        expected, result = (run(CONV.fused, tensors, SMALL.keywords, grad) for tensors in (clean, spoiled))
    assert not result.output[7].isfinite().all()
    others = [image for image in range(len(grad)) if image != 7]
    assert_bitwise_equal(result.output[others], expected.output[others])
    assert_bitwise_equal(result.grads["input"][others], expected.grads["input"][others])


def test_overflow_to_infinity(device):
    """A result that float16 cannot hold is infinite, as in stock."""
    case = conv_case("overflow", (6, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(torch.float16, device=device)
    tensors["input"] *= 2.0**14
    tensors["weight"] *= 4
    output = CONV.fused(**tensors, **case.keywords)
    assert output.isinf().any()
    assert output.isfinite().any()
    assert_same_values(output, CONV.stock(**tensors, **case.keywords))


@variants
def test_ties_go_to_the_first_cell_and_closed_cells_get_nothing(mode, conv, device):
    case = conv_case("ties", (3, *SMALL.input[1:]), SMALL.weight)
    tensors = {name: torch.ones(shape, dtype=mode.dtype, device=device) for name, shape in case.shapes.items()}
    with fp32_precision(mode.precision):
        assert (conv.equal(case, tensors, None).argmax == 0).all()
        tensors["bias"] = torch.full_like(tensors["bias"], -1000.0)
        result = conv.equal(case, tensors, None)
    assert (result.argmax == 255).all()
    for _, tensor in result.tensors():
        assert_bitwise_equal(tensor, torch.zeros_like(tensor))


# --- what is launched, and its bits --------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [("input", {"_grad_input_kernel"}), ("weight", {"_grad_weight_kernel"}), ("bias", {"_grad_weight_kernel"})],
)
def test_only_requested_gradients_are_computed(mode, wanted, kernels, launches, device):
    case = conv_case("wanted", (4, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(mode.dtype, device=device)
    with fp32_precision(mode.precision):
        result = run(CONV.fused, tensors, case.keywords, None, [wanted])
        expected = run(CONV.stock, tensors, case.keywords, None, [wanted])
    assert [name for name, grad in result.grads.items() if grad is not None] == [wanted]
    assert_same_values(result.grads[wanted], expected.grads[wanted])
    assert {name for name, _ in launches if name.startswith("_grad")} == kernels


@variants
def test_every_element_is_written(mode, device):
    case = conv_case("written", (6, *SMALL.input[1:]), SMALL.weight)
    with fp32_precision(mode.precision):
        assert_writes_everything(lambda: run(CONV.fused, case.random(mode.dtype, device=device), case.keywords))


@pytest.mark.wide
@modes
def test_bitwise_reproducible_from_run_to_run(mode, device):
    tensors = SMALL.random(mode.dtype, device=device)
    with fp32_precision(mode.precision):
        grad = upstream(CONV.stock(**tensors, **SMALL.keywords))
        first, second = (run(CONV.fused, tensors, SMALL.keywords, grad) for _ in range(2))
    for (name, one), (_, other) in zip(first.tensors(), second.tensors(), strict=True):
        assert_bitwise_equal(one, other, name=name)


@modes
def test_a_sample_does_not_depend_on_its_batch(mode, device, sums_in_order):
    tensors = SMALL.random(mode.dtype, device=device)
    images = tensors.pop("input")
    with fp32_precision(mode.precision), torch.no_grad():
        whole = CONV.fused(images, **tensors, **SMALL.keywords)
        for batch, sample in ((1, 0), (1, 39), (2, 38), (7, 5), (7, 33)):
            part = CONV.fused(images[sample : sample + batch].clone(), **tensors, **SMALL.keywords)
            assert_bitwise_equal(part, whole[sample : sample + batch], name=f"{batch} from sample {sample}")


@variants
@pytest.mark.parametrize(("forward", "backward"), [("triton", "aten"), ("aten", "triton")])
def test_one_implementation_may_follow_the_other(mode, forward, backward, device):
    """What the forward saves means the same to both backwards."""
    case: ConvCase = conv_case("either", (5, *SMALL.input[1:]), SMALL.weight)
    tensors = case.exact(mode.dtype, device=device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with fp32_precision(mode.precision):
        with fastlenet.use_backend(forward):
            output = CONV.fused(**leaves, **case.keywords)
        grad = exact_grid(output.shape, output.dtype, terms=case.terms, device=device)
        with fastlenet.use_backend(backward):
            output.backward(grad)
        expected = run(CONV.stock, tensors, case.keywords, grad)
    for name, leaf in leaves.items():
        assert_same_values(leaf.grad, expected.grads[name], name=name)
