"""Small non-overlapping 2x2 pools in exact float32, on the FMA units.

`tl.dot` in ``ieee`` mode feeds the FMA units operand by operand through shared memory; here a lane computes whole
results in its own registers instead. All sizes but the batch are compile-time constants, so that every loop over taps
is unrolled and every address is a register plus a constant. Every result is a chain of fused multiply-adds in a fixed
order, or a fixed sum of some, so tiles may depend on the batch without changing a bit.

Letters: N images, C input and O output channels, H x W input, KH x KW kernel, PH x PW pooled output, P = PH * PW.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvPoolGeometry
from ..runtime import INTERPRETED, all_registers, cdiv, empty, index_type, launch, relu, store, sum_parts


@triton.jit
def _adjacent(pointers, mask, COUNT: tl.constexpr):
    """Load the COUNT elements that start at each pointer, two at a time where their addresses allow it.

    Where the mask, if there is one, is off, they are 0.
    """
    values = ()
    for i in tl.static_range(COUNT // 2):
        pairs = pointers[:, None] + (2 * i + tl.arange(0, 2))[None, :]
        if mask is None:
            values = values + tl.split(tl.load(pairs).to(tl.float32))
        else:
            values = values + tl.split(tl.load(pairs, mask=mask[:, None], other=0.0).to(tl.float32))
    if COUNT % 2 == 1:
        if mask is None:
            values = values + (tl.load(pointers + (COUNT - 1)).to(tl.float32),)
        else:
            values = values + (tl.load(pointers + (COUNT - 1), mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _pool(cells, RETURN_ARGMAX: tl.constexpr):
    """Maximum and argmax of a window's four cells, in scan order, after relu."""
    best = cells[0]
    if RETURN_ARGMAX:
        # In float32, which one instruction selects; integers become masks and shifts. Adding 2**23 moves a small number
        # into the last bits.
        argmax = tl.zeros(best.shape, tl.float32)
        for cell in tl.static_range(1, 4):
            wins = (cells[cell] > best) | (cells[cell] != cells[cell])
            best = tl.where(wins, cells[cell], best)
            argmax = tl.where(wins, 1.0 * cell, argmax)
        argmax = tl.where(best <= 0, 255.0, argmax) + 8388608.0
        return relu(best), argmax.to(tl.int32, bitcast=True).to(tl.uint8)
    else:  # noqa: RET505  (Triton compiles what follows a return)
        for cell in tl.static_range(1, 4):
            best = tl.maximum(best, cells[cell], propagate_nan=tl.PropagateNan.ALL)
        return relu(best), best


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    argmax_ptr,
    rows,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    INPUT_H: tl.constexpr,
    INPUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_ARGMAX: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Pooled output and argmax, in exact float32.

    Maths: as in `general`. Each convolution cell is one chain of fused multiply-adds, from the bias through
    (channel, kernel row, kernel column) in order, whatever the tile: no result depends on it.

    Tile: BLOCK pooled positions (rows of N * P, two a lane) x CHANNELS output channels; a program's number counts the
    tiles of channels first, so that neighbours read the same input. A lane keeps the window's four cells of every
    channel. Per input channel it slides down its (KH + 1) x (KW + 1) patch with two rows in registers; weights are
    scalars that all lanes share, loaded once for the eight products of two positions.

    Shapes and strides: input (N, C, H, W), weight (O, C, KH, KW), bias (O), output and argmax (N, O, PH, PW), all
    contiguous.

    Saves: one byte of argmax per pooled cell, nothing else.

    Cost per image: 8 * P * O * C * KH * KW FLOP; reads the input once per tile of channels, writes O * P outputs and as
    many bytes of argmax. For every 8 multiply-adds one weight is loaded.
    """
    tiles: tl.constexpr = OUT_CHANNELS // CHANNELS
    row = (tl.program_id(0) // tiles).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) % tiles * CHANNELS
    mask = row < rows
    # Rows beyond the last repeat it: loads need no mask then.
    row = tl.minimum(row, rows - 1)
    image = row // (POOLED_H * POOLED_W)
    position = row % (POOLED_H * POOLED_W)
    corner = position // POOLED_W * (2 * INPUT_W) + position % POOLED_W * 2
    pixels = input_ptr + (image * (IN_CHANNELS * INPUT_H * INPUT_W) + corner)
    depth: tl.constexpr = IN_CHANNELS * KERNEL_H * KERNEL_W
    taps = weight_ptr + first * depth

    conv = ()
    for o in tl.static_range(CHANNELS):
        start = tl.zeros((BLOCK,), tl.float32)
        if HAS_BIAS:
            start += tl.load(bias_ptr + first + o).to(tl.float32)
        conv = conv + (start, start, start, start)
    for _ in range(IN_CHANNELS):
        upper = _adjacent(pixels, None, KERNEL_W + 1)
        for _ in tl.range(KERNEL_H, loop_unroll_factor=UNROLL):
            pixels += INPUT_W
            lower = _adjacent(pixels, None, KERNEL_W + 1)
            done = ()
            for o in tl.static_range(CHANNELS):
                a, b, c, d = conv[4 * o], conv[4 * o + 1], conv[4 * o + 2], conv[4 * o + 3]
                for i in tl.static_range(KERNEL_W):
                    tap = tl.load(taps + (o * depth + i)).to(tl.float32)
                    a = tl.fma(upper[i], tap, a)
                    b = tl.fma(upper[i + 1], tap, b)
                    c = tl.fma(lower[i], tap, c)
                    d = tl.fma(lower[i + 1], tap, d)
                done = done + (a, b, c, d)
            conv = done
            upper = lower
            taps += KERNEL_W
        pixels += (INPUT_H - KERNEL_H) * INPUT_W

    size: tl.constexpr = POOLED_H * POOLED_W
    offset = image * (OUT_CHANNELS * size) + (position + first * size)
    outputs = output_ptr + offset
    argmax_ptrs = argmax_ptr + offset
    for o in tl.static_range(CHANNELS):
        best, argmax = _pool(conv[4 * o : 4 * o + 4], RETURN_ARGMAX)
        store(outputs + o * size, best, mask)
        if RETURN_ARGMAX:
            tl.store(argmax_ptrs + o * size, argmax, mask=mask)


@triton.jit(do_not_specialize=["images"])
def _grad_weight_kernel(
    grad_ptr,
    argmax_ptr,
    input_ptr,
    weight_parts_ptr,
    bias_parts_ptr,
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
):
    """Gradients of the weight and the bias in exact float32: one part of each sum, which `sum_parts` completes.

    Maths: as in `general`: ``grad_weight[o, c, i, j] = sum over (n, p, cell) of where(argmax[n, o, p] == cell,
    grad[n, o, p], 0) * input[n, c, h(p, cell) + i, w(p, cell) + j]``. All four cells are multiplied, zero or not, so
    that NaN and infinities in the input go where PyTorch's go.

    Tile: a lane stays on one pooled position and steps through images, num_programs(1) * BLOCK // P at a time; it adds
    up CHANNELS * KH * KW weights of one input channel (and, in the first input channel's programs, the biases) in
    registers. At the end lanes are summed by a tree. Lanes beyond a multiple of P idle.

    Shapes and strides: grad and argmax (N, O, PH, PW) and input (N, C, H, W) contiguous; weight_parts (parts, O, C, KH,
    KW) and bias_parts (parts, O) float32, contiguous.

    Cost per image: as the forward; reads the input once per tile of output channels, gradients and argmax once per
    input channel.
    """
    size: tl.constexpr = POOLED_H * POOLED_W
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    in_channel = tl.program_id(0) % IN_CHANNELS
    first = tl.program_id(0) // IN_CHANNELS * CHANNELS
    part = tl.program_id(1)
    lane = part * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(1) * BLOCK // size
    position = lane % size
    corner = position // POOLED_W * (2 * INPUT_W) + position % POOLED_W * 2 + in_channel * (INPUT_H * INPUT_W)
    position += first * size
    image = tl.where(lane < step * size, lane // size, images)

    weight_sums = ()
    bias_sums = ()
    zero = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(CHANNELS * taps):
        weight_sums = weight_sums + (zero,)
    for _ in tl.static_range(CHANNELS):
        bias_sums = bias_sums + (zero,)
    for _ in range((images + step - 1) // step):
        there = image < images
        row = tl.minimum(image, images - 1).to(INDEX)
        image += step
        grads = grad_ptr + (row * (OUT_CHANNELS * size) + position)
        argmax_ptrs = argmax_ptr + (row * (OUT_CHANNELS * size) + position)
        cells = ()
        passed = ()
        for o in tl.static_range(CHANNELS):
            grad = tl.load(grads + o * size).to(tl.float32)
            argmax = tl.where(there, tl.load(argmax_ptrs + o * size).to(tl.int32), 255)
            for cell in tl.static_range(4):
                cells = cells + (tl.where(argmax == cell, grad, 0.0),)
            passed = passed + (tl.where(argmax == 255, 0.0, grad),)
        if in_channel == 0:
            done = ()
            for o in tl.static_range(CHANNELS):
                done = done + (bias_sums[o] + passed[o],)
            bias_sums = done
        pixels = input_ptr + (row * (IN_CHANNELS * INPUT_H * INPUT_W) + corner)
        patch = ()
        for i in tl.static_range(KERNEL_H + 1):
            patch = patch + (_adjacent(pixels + i * INPUT_W, there, KERNEL_W + 1),)
        done = ()
        for o in tl.static_range(CHANNELS):
            for i in tl.static_range(KERNEL_H):
                for j in tl.static_range(KERNEL_W):
                    total = weight_sums[o * taps + i * KERNEL_W + j]
                    total = tl.fma(cells[4 * o], patch[i][j], total)
                    total = tl.fma(cells[4 * o + 1], patch[i][j + 1], total)
                    total = tl.fma(cells[4 * o + 2], patch[i + 1][j], total)
                    total = tl.fma(cells[4 * o + 3], patch[i + 1][j + 1], total)
                    done = done + (total,)
        weight_sums = done

    channel = part.to(INDEX) * OUT_CHANNELS + first
    for o in tl.static_range(CHANNELS):
        entry = weight_parts_ptr + ((channel + o) * IN_CHANNELS + in_channel) * taps
        for k in tl.static_range(taps):
            tl.store(entry + k, tl.sum(weight_sums[o * taps + k]))
    if in_channel == 0:
        for o in tl.static_range(CHANNELS):
            tl.store(bias_parts_ptr + channel + o, tl.sum(bias_sums[o]))


@triton.jit
def _add_cells(
    total, cells, kernel, ROW: tl.constexpr, COLUMN: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr
):
    """Add what a window's two cells of one row send to a pixel, if they reach it.

    The pixel lies ROW rows below the cells and COLUMN columns right of the first.
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
    """Add what a window's cells send to ROWS rows of KW + 1 pixels per channel, the window beginning in row ROW."""
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

    Maths: as in `general`. A pixel receives from up to KW // 2 + 1 columns of windows: per column one chain of fused
    multiply-adds over (output channel, window, cell) in order, and these sums from right to left, whatever the tile.

    Tile: BLOCK // PW images x STRIP rows of 2x2 blocks of pixels x CHANNELS input channels. A lane owns a column of
    windows and adds up what these send to the KW + 1 columns of pixels below them, so that no product is wasted on
    windows beside the image. A window's gradient is spread over its four cells by argmax, once for all pixels and
    channels that it reaches; windows that do not reach the strip are skipped. At the end a pixel's sums meet in memory:
    each lane stores its own two columns, then adds in the two after them, and so on, with a barrier between.
    A program's number counts the tiles of one group of images first, so that neighbours read the same gradients.

    Shapes and strides: grad and argmax (N, O, PH, PW), weight (O, C, KH, KW), output (N, C, H, W), all contiguous.

    Cost per image: 8 * P * O * C * KH * KW FLOP; reads gradients and argmax once per tile of channels, and those of
    KH // 2 rows again per strip; writes C * H * W elements, and reads and writes them KW // 2 times more in cache.
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
    """Whether these kernels can compute this convolution and pool, and hold one channel's taps in registers."""
    plain = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)
    return geometry == plain and weight[0, 0].numel() <= 49 and min(geometry.output_shape(input, weight)[2:]) > 0


def _registers(limit: int) -> dict[str, int]:
    """Launch option that bounds a thread's registers, on the targets that have it."""
    return {"maxnreg": limit} if not INTERPRETED and all_registers() else {}


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


def _tile(rows: int, channels: int, limit: int) -> dict[str, int]:
    """Choose how many rows, two a lane, and how many channels a program takes.

    Small batches get small programs, down to one channel, until there are about four for each of 128 multiprocessors.
    No result depends on the choice.

    Args:
        rows: lanes' worth of work along the batch.
        channels: how many there are; a program takes a divisor of it.
        limit: the most channels that registers hold.
    """
    if INTERPRETED:
        return {"BLOCK": min(4096, triton.next_power_of_2(rows)), "CHANNELS": _divisor(channels, limit)}
    tile = {}
    for num_warps, at_most in ((4, limit), (1, limit), (1, min(4, limit)), (1, min(2, limit)), (1, 1)):
        tile = {"BLOCK": 64 * num_warps, "CHANNELS": _divisor(channels, at_most), "num_warps": num_warps}
        if cdiv(rows, tile["BLOCK"]) * channels // tile["CHANNELS"] >= 512:
            break
    return tile


def _sizes(input: Tensor, weight: Tensor, pooled: Tensor) -> dict[str, int]:
    """List the sizes that the kernels take as constants."""
    return {
        "IN_CHANNELS": weight.shape[1],
        "OUT_CHANNELS": weight.shape[0],
        **dict(zip(("INPUT_H", "INPUT_W"), input.shape[2:], strict=True)),
        **dict(zip(("KERNEL_H", "KERNEL_W"), weight.shape[2:], strict=True)),
        **dict(zip(("POOLED_H", "POOLED_W"), pooled.shape[2:], strict=True)),
    }


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, return_argmax: bool, configuration: Mapping[str, int]
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; arguments and results as in `conv2d_relu_max_pool2d`, tensors contiguous."""
    pooled = ((size - kernel + 1) // 2 for size, kernel in zip(input.shape[2:], weight.shape[2:], strict=True))
    output = empty((input.shape[0], weight.shape[0], *pooled), input)
    argmax = empty(output.shape, output, torch.uint8) if return_argmax else None
    rows, channels = input.shape[0] * output.shape[2] * output.shape[3], weight.shape[0]
    tile = _tile(rows, channels, configuration["CHANNELS"])
    launch(
        _forward_kernel,
        (cdiv(rows, tile["BLOCK"]) * (channels // tile["CHANNELS"]),),
        input,
        weight,
        weight if bias is None else bias,
        output,
        output if argmax is None else argmax,
        rows,
        **_sizes(input, weight, output),
        HAS_BIAS=bias is not None,
        RETURN_ARGMAX=return_argmax,
        INDEX=index_type(input, output),
        UNROLL=weight.shape[2] if tile["CHANNELS"] * weight[0, 0].numel() <= 200 else 1,
        num_stages=1,
        **tile,
        # Three programs of four warps then fit on a multiprocessor; more registers would save few instructions.
        **_registers(configuration.get("maxnreg", 168)),
    )
    return output, argmax


def grad_input(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, configuration: Mapping[str, int]
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


def grad_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, configuration: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of the weight and the bias; all tensors contiguous."""
    (out_channels, in_channels), size = weight.shape[:2], argmax.shape[2] * argmax.shape[3]
    channels = _divisor(out_channels, configuration["CHANNELS"])
    tiles = out_channels // channels * in_channels
    # One warp a program: its lanes are then summed without a barrier. As many as some 132 multiprocessors hold at once,
    # with four images or more a lane, and at least one lane for each position.
    block, registers = 1024 if INTERPRETED else 32, configuration.get("maxnreg", 168)
    programs = 132 * (65536 // (32 * registers))
    parts = max(cdiv(size, block), min(cdiv(argmax.shape[0] * size, 4 * block), programs // tiles))
    weight_parts = empty((parts, *weight.shape), input, torch.float32)
    bias_parts = empty((parts, out_channels), input, torch.float32)
    launch(
        _grad_weight_kernel,
        (tiles, parts),
        grad_output,
        argmax,
        input,
        weight_parts,
        bias_parts,
        input.shape[0],
        **_sizes(input, weight, argmax),
        INDEX=index_type(input, grad_output, weight_parts),
        BLOCK=block,
        CHANNELS=channels,
        num_warps=1,
        num_stages=1,
        **_registers(registers),
    )
    result, bias = empty(weight.shape, weight), empty((out_channels,), weight)
    return sum_parts(weight_parts, result), sum_parts(bias_parts, bias)
