"""The input's gradient of small images under 2x2 windows that do not overlap, in exact float32, on the FMA units.

A lane takes one column of pooling windows and keeps the sums of all pixels that these windows reach in registers. So no
product is wasted, and no lane is idle. Neighbouring lanes reach some of the same pixels: they add their sums up in
memory, where `patch_fma` adds them by shuffles between lanes. All sizes but the batch are compile-time constants. It is
listed for LeNet's second layer, where it is modelled to take 0.9 times what `patch_fma` takes.

Letters: N images, C input and O output channels, H x W input, KH x KW kernel, PH x PW pooled output, P = PH * PW.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry
from ..runtime import INTERPRETED, all_registers, cdiv, empty, index_type, launch


@triton.jit
def _add_cells(
    total, cells, kernel, ROW: tl.constexpr, COLUMN: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr
):
    """Add to a pixel's sum what the two cells in one row of a window give it; nothing if they do not reach it.

    The pixel lies ROW rows below the two cells, and COLUMN columns to the right of the left one.
    """
    if ROW >= 0 and ROW < KERNEL_H:
        if COLUMN < KERNEL_W:
            total = tl.fma(cells[0], kernel[ROW * KERNEL_W + COLUMN], total)
        if COLUMN > 0:
            total = tl.fma(cells[1], kernel[ROW * KERNEL_W + COLUMN - 1], total)
    return total


@triton.jit
def _add_window(
    sums,
    upper,
    lower,
    kernels,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
):
    """Add what the cells of a window give to ROWS rows of KW + 1 pixels in each channel; it starts in row ROW."""
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    width: tl.constexpr = KERNEL_W + 1
    start: tl.constexpr = ROW if ROW > 0 else 0
    stop: tl.constexpr = ROW + KERNEL_H + 1 if ROW + KERNEL_H + 1 < ROWS else ROWS
    for c in tl.static_range(CHANNELS):
        kernel = kernels[c * taps : (c + 1) * taps]
        done = ()
        for h in tl.static_range(start, stop):
            for w in tl.static_range(width):
                total = sums[(c * ROWS + h) * width + w]
                total = _add_cells(total, upper, kernel, h - ROW, w, KERNEL_H, KERNEL_W)
                total = _add_cells(total, lower, kernel, h - ROW - 1, w, KERNEL_H, KERNEL_W)
                done = done + (total,)
        sums = sums[: (c * ROWS + start) * width] + done + sums[(c * ROWS + stop) * width :]
    return sums


@triton.jit(do_not_specialize=["images"])
def _grad_input_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    output_ptr,
    images,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    INPUT_H: tl.constexpr,
    INPUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Gradient of the input in exact float32, without atomics.

    Maths: as in `general`. Up to KW // 2 + 1 columns of windows reach a pixel. For each column the kernel makes one sum
    by fused multiply-adds, in the order output channel, window, cell. Then it adds these sums from right to left. The
    order does not depend on the tile.

    Tile: BLOCK // PW images x STRIP rows of 2x2 blocks of pixels x CHANNELS input channels. A lane has one column of
    windows. It sums what these windows give to the KW + 1 columns of pixels that they reach, so no product is computed
    for windows outside the image. The gradient of a window goes to one of its four cells, by argmax; this is decided
    once for all pixels and channels that the window reaches. Windows that do not reach the strip are skipped. At the
    end lanes add their sums up in memory: each lane stores its first two columns of pixels, then adds the next two to
    what is there, and so on, with a barrier between. Programs are numbered by tile first and by group of images then,
    so that neighbouring programs read the same gradients.

    Shapes and strides: grad and argmax (N, O, PH, PW), weight (O, C, KH, KW), output (N, C, H, W), all contiguous.

    Cost per image: 8 * P * O * C * KH * KW FLOP; reads gradients and argmax once for each tile of channels, and
    those of KH // 2 rows of windows once more for each strip; writes C * H * W elements, and reads and writes them
    KW // 2 times more in cache.
    """
    size: tl.constexpr = POOLED_H * POOLED_W
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    strips: tl.constexpr = (INPUT_H + 2 * STRIP - 1) // (2 * STRIP)
    above: tl.constexpr = KERNEL_H // 2
    width: tl.constexpr = KERNEL_W + 1
    tile = tl.program_id(0) % (strips * (IN_CHANNELS // CHANNELS))
    top = tile % strips * STRIP
    first = tile // strips * CHANNELS
    group = (tl.program_id(0) // (strips * (IN_CHANNELS // CHANNELS))).to(INDEX)
    lane = tl.arange(0, BLOCK)
    column = lane % POOLED_W
    image = group * (BLOCK // POOLED_W) + lane // POOLED_W
    mask = (lane < BLOCK // POOLED_W * POOLED_W) & (image < images)
    # Images beyond the last repeat it: loads need no mask then.
    image = tl.minimum(image, images - 1)
    window = image * (OUT_CHANNELS * size) + ((top - above) * POOLED_W + column)
    grads = grad_ptr + window
    argmax_ptrs = argmax_ptr + window
    weights = weight_ptr + first * taps

    sums = ()
    for _ in tl.static_range(2 * STRIP * width * CHANNELS):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    for _ in range(OUT_CHANNELS):
        kernels = ()
        for k in tl.static_range(CHANNELS * taps):
            kernels = kernels + (tl.load(weights + k).to(tl.float32),)
        for u in tl.static_range(above + STRIP):
            # Of a single strip the windows' rows are known when it is compiled.
            if strips > 1 or (u >= above and u < POOLED_H + above):  # noqa: SIM102
                if strips == 1 or ((top + u >= above) & (top + u < POOLED_H + above)):
                    argmax = tl.load(argmax_ptrs + u * POOLED_W).to(tl.int32)
                    grad = tl.load(grads + u * POOLED_W).to(tl.float32)
                    upper = (tl.where(argmax == 0, grad, 0.0), tl.where(argmax == 1, grad, 0.0))
                    lower = (tl.where(argmax == 2, grad, 0.0), tl.where(argmax == 3, grad, 0.0))
                    sums = _add_window(
                        sums, upper, lower, kernels, 2 * (u - above), 2 * STRIP, CHANNELS, KERNEL_H, KERNEL_W
                    )
        grads += size
        argmax_ptrs += size
        weights += IN_CHANNELS * taps

    corner = image * (IN_CHANNELS * INPUT_H * INPUT_W) + (top * (2 * INPUT_W) + column * 2)
    pixels = output_ptr + (corner + first * (INPUT_H * INPUT_W))
    pair = tl.arange(0, 2)[None, :]
    last = column == POOLED_W - 1
    nothing = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range((INPUT_W + 1) // 2 - POOLED_W + 1):
        # Only the last lane goes on where no window reaches.
        there = mask if 2 * block < width else mask & last
        if block > 0:
            tl.debug_barrier()
        for c in tl.static_range(CHANNELS):
            for h in tl.static_range(2 * STRIP):
                pointers = pixels[:, None] + ((c * INPUT_H + h) * INPUT_W + 2 * block) + pair
                inside = there[:, None] & (column[:, None] * 2 + 2 * block + pair < INPUT_W) & (2 * top + h < INPUT_H)
                values = tl.join(
                    sums[(c * 2 * STRIP + h) * width + 2 * block] if 2 * block < width else nothing,
                    sums[(c * 2 * STRIP + h) * width + 2 * block + 1] if 2 * block + 1 < width else nothing,
                )
                if block > 0:
                    # The last lane meets columns beyond the windows' own first: nothing is there yet.
                    values += tl.load(pointers, mask=inside & (column < POOLED_W - 1)[:, None], other=0.0)
                tl.store(pointers, values, mask=inside)


def covers(geometry: ConvPoolGeometry, input: Tensor, weight: Tensor) -> bool:
    """Whether this kernel computes the gradient of such a call: one channel's taps must fit into registers."""
    plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
    return geometry == plain and weight[0, 0].numel() <= 49 and min(geometry.output_shape(input, weight)[2:]) > 0


def _registers(limit: int) -> dict[str, int]:
    """The launch option that limits the registers of a thread, on targets that have one."""
    return {"maxnreg": limit} if not INTERPRETED and all_registers() else {}


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


def _sizes(input: Tensor, weight: Tensor, pooled: Tensor) -> dict[str, int]:
    """List the sizes that the kernels take as constants."""
    return {
        "IN_CHANNELS": weight.shape[1],
        "OUT_CHANNELS": weight.shape[0],
        **dict(zip(("INPUT_H", "INPUT_W"), input.shape[2:], strict=True)),
        **dict(zip(("KERNEL_H", "KERNEL_W"), weight.shape[2:], strict=True)),
        **dict(zip(("POOLED_H", "POOLED_W"), pooled.shape[2:], strict=True)),
    }


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    geometry: ConvPoolGeometry,
    last: bool,
    configuration: Mapping[str, int],
) -> Tensor:
    """Launch the gradient of the input; all tensors contiguous."""
    result = empty(input.shape, input)
    channels = _divisor(weight.shape[1], configuration["CHANNELS"])
    tiles = cdiv(input.shape[2], 2 * configuration["STRIP"]) * (weight.shape[1] // channels)
    images, columns = input.shape[0], argmax.shape[3]
    # Programs of one warp until there are about four of four warps for each of 128 multiprocessors.
    num_warps = 4 if cdiv(images, max(1, 128 // columns)) * tiles >= 512 else 1
    lanes = min(4096, images * columns) if INTERPRETED else 32 * num_warps
    block = triton.next_power_of_2(max(lanes, columns))
    launch(
        _grad_input_kernel,
        (cdiv(images, block // columns) * tiles,),
        grad_output,
        argmax,
        weight,
        result,
        images,
        **_sizes(input, weight, argmax),
        INDEX=index_type(grad_output, result),
        BLOCK=block,
        CHANNELS=channels,
        STRIP=configuration["STRIP"],
        num_warps=num_warps,
        num_stages=1,
        # Three programs of four warps on a multiprocessor, as in the forward.
        **_registers(configuration.get("maxnreg", 168)),
    )
    return result
