"""What every launcher and kernel shares: allocation, launching on the right device, precision, loads and stores."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter in this process (``TRITON_INTERPRET=1``)."""

NO_WINNER = tl.constexpr(255)
"""The argmax of a window whose output is 0 after relu: no cell of it gets a gradient."""


def empty(
    shape: Sequence[int],
    like: Tensor,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Allocate memory that a kernel fills. All outputs and workspaces come from here, so tests can poison them."""
    if memory_format is torch.contiguous_format:  # in 1.4 us instead of 2.3
        tensor = like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
    else:
        tensor = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)
    if (recording := _of_thread.recording) is not None:
        recording.allocated(tensor)
    return tensor


def contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return an operand laid out as a kernel needs it: itself or a copy. All copies of launchers come from here."""
    laid_out = tensor.contiguous(memory_format=memory_format)
    if laid_out is not tensor and (recording := _of_thread.recording) is not None:
        recording.copied(tensor, laid_out, memory_format)
    return laid_out


def by_library(function: Any, *args: Any) -> Tensor:
    """Let PyTorch compute something between kernels: `function` of `args`, tensors first, gives a new tensor."""
    result = function(*args)
    if (recording := _of_thread.recording) is not None:
        recording.called(function, args, result)
    return result


class ThreadState(threading.local):
    """What notes the allocations and launches of this thread: a `plans.Recording`, or None."""

    recording: Any = None


_of_thread = ThreadState()


@contextlib.contextmanager
def reporting_to(recording: Any) -> Iterator[None]:
    """Let a `plans.Recording` note what is allocated and launched in this thread."""
    before, _of_thread.recording = _of_thread.recording, recording
    try:
        yield
    finally:
        _of_thread.recording = before


class DriverCache:
    """What is remembered of Triton's active driver. Another driver (that of `bench.static`, in tests) starts anew.

    Attributes:
        driver: the driver that all this belongs to.
        targets: of each device what `target` and `architecture` return, which PyTorch takes microseconds to tell.
        kernels: by `_key`, what `launch` needs to start a compiled kernel without Triton's binder.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.targets: dict[int, tuple[Any, str]] = {}
        self.kernels: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


_remembered = DriverCache(None)


def active_driver() -> Any:
    """Return Triton's active driver."""
    return triton.runtime.driver.active


def of_driver() -> DriverCache:
    """Return what belongs to the driver that is active."""
    global _remembered
    driver, found = triton.runtime.driver.active, _remembered
    if found.driver is not driver:
        found = _remembered = DriverCache(driver)
    return found


def _of_device() -> tuple[Any, str]:
    found = of_driver()
    device = found.driver.get_current_device()
    if device not in found.targets:
        target = found.driver.get_current_target()
        name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
        found.targets[device] = target, name
    return found.targets[device]


def target() -> Any:
    """Return Triton's description of the current device: ``backend`` (``"cuda"`` or ``"hip"``) and ``arch``."""
    return _of_device()[0]


def architecture() -> str:
    """Name the current device's architecture: ``sm_90``, ``gfx942``, or ``"interpreted"`` in the interpreter."""
    return "interpreted" if INTERPRETED.value else _of_device()[1]


class Box(NamedTuple):
    """How a kernel sees a matrix through a tensor descriptor, by which the GPU copies tiles on its own (TMA).

    Attributes:
        shape: of the matrix, whose rows are dense: a matrix with dense columns is described transposed.
        strides: of the same; the last is 1.
        block: shape of a tile.
        rounded: whether float32 is rounded to the nearest tf32 on its way.
    """

    shape: tuple[int, int]
    strides: tuple[int, int]
    block: tuple[int, int]
    rounded: bool


Boxes = Mapping[int, Box]
"""Those of a launch's tensors that the kernel takes as descriptors, by position."""

DESCRIPTORS_ROUND = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__
"""Whether this version of Triton lets descriptors round to tf32: from 3.7 on."""


def describable(matrix: Tensor) -> bool:
    """Whether there may be a descriptor of a matrix: dense rows or columns that start at multiples of 16 bytes."""
    length = matrix.shape[1] if matrix.stride(1) == 1 else matrix.shape[0]
    return abs(layout(matrix)) * matrix.element_size() == 16 and max(matrix.stride()) >= length > 0 < matrix.numel()


def box(matrix: Tensor, rows: int, columns: int, rounded: bool) -> Box:
    """Describe a matrix that is `describable`, in tiles of `rows` x `columns`."""
    if matrix.stride(1) != 1:
        matrix, rows, columns = matrix.t(), columns, rows
    height, width = matrix.shape
    return Box((height, width), (matrix.stride(0), 1), (rows, columns), rounded)


def describe(args: tuple[Any, ...], boxes: Boxes) -> tuple[Any, ...]:
    """Put descriptors in the place of the tensors that have a box."""
    found = list(args)
    for position, (shape, strides, block, rounded) in boxes.items():
        options = {"round_f32_to_tf32": True} if rounded else {}
        found[position] = TensorDescriptor(found[position], [*shape], [*strides], [*block], **options)
    return tuple(found)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, boxes: Boxes = MappingProxyType({}), **constants: Any
) -> None:
    """Launch `kernel` on the device of its first argument, a tensor; it need not be the current device.

    An empty grid launches nothing. The kernel takes a tensor with a box as a descriptor.

    Triton binds and specialises some 25 arguments at every launch, which takes as long as a small kernel runs several
    times over. Here it does so once for each `_key`; a launch with a known key starts the compiled kernel itself.
    """
    if min(grid) == 0:
        return
    if INTERPRETED.value:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*describe(args, boxes), **constants)
        return
    found = of_driver()
    device, wanted = found.driver.get_current_device(), args[0].get_device()
    if wanted in (device, -1):  # -1: on the CPU, where only a driver without a device launches
        _launch_on(found, device, kernel, grid, args, boxes, constants)
    else:
        with torch.cuda.device_of(args[0]):
            _launch_on(found, wanted, kernel, grid, args, boxes, constants)


_MOST_KEYS = 4096
"""Launches remembered: each holds a few hundred bytes, and a program whose sizes never repeat would add up."""


def _launch_on(
    found: DriverCache,
    device: int,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    boxes: Boxes,
    constants: dict[str, Any],
) -> None:
    """Launch on `device`, which is the current one."""
    key = None if _watched(kernel) else _key(kernel, device, args, boxes, constants)
    known = None if key is None else found.kernels.get(key)
    recording, wide_grid = _of_thread.recording, (*grid, 1, 1)[:3]
    if known is not None:
        # As `JITFunction.run` launches where there are no hooks.
        compiled, rest = known
        stream = found.driver.get_current_stream(device)
        compiled.run(
            *(*wide_grid, stream, compiled.function, compiled.packed_metadata, None, None, None),
            *describe(args, boxes),
            *rest,
        )
        if recording is not None:
            recording.launched(kernel, compiled, wide_grid, args, rest, boxes)
        return
    compiled = kernel[grid](*describe(args, boxes), **constants)
    # AMD's backend also specialises on the size of a tensor's memory, which the key does not tell.
    if key is None or not isinstance(compiled, triton.compiler.CompiledKernel) or target().backend != "cuda":
        if recording is not None:
            recording.went_past()
        return
    if len(found.kernels) >= _MOST_KEYS:
        found.kernels.clear()
    names = kernel.signature.parameters
    bound = kernel.signature.bind(*args, **{name: value for name, value in constants.items() if name in names})
    bound.apply_defaults()
    # The kernel itself is kept, as its module is unloaded when it dies.
    rest = tuple(bound.arguments.values())[len(args) :]
    found.kernels[key] = compiled, rest
    if recording is not None:
        recording.launched(kernel, compiled, wide_grid, args, rest, boxes)


def _watched(kernel: Any) -> bool:
    """Whether this kernel's launches have hooks, or all launches; see `unobserved`."""
    return bool(kernel.pre_run_hooks) or not unobserved()


def unobserved() -> bool:
    """Whether launches may go past Triton's own `run`: there are no hooks, and compilation is not instrumented."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
    )


def _key(
    kernel: Any, device: int, args: tuple[Any, ...], boxes: Boxes, constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Return what decides which compiled kernel a launch takes, or None where that is not known.

    The key tells apart at least what Triton tells apart, so that equal keys have one kernel. It holds each tensor's
    type and its address modulo 16, each int's value (which decides its width, whether 16 divides it, and whether it is
    1), for a float only that it is one, and all constants. Triton also checks global variables; kernels here use none
    that change.
    """
    key: list[Any] = [id(kernel), device]
    for arg in args:
        if isinstance(arg, Tensor):
            key += arg.dtype, arg.data_ptr() % 16
        elif type(arg) is int:
            key.append(arg)
        elif type(arg) is float:
            key.append(float)
        else:
            return None
    key += [(position, box.block) for position, box in boxes.items()]
    # True equals 1, and both equal 1.0.
    return *key, *constants, *constants.values(), *map(type, constants.values())


def all_registers() -> dict[str, int]:
    """Launch option that lets a thread use every register it can name.

    Left to itself, ptxas aims at a round number of resident programs and spills a few bytes to reach it. The option
    exists on NVIDIA's targets only.
    """
    return {"maxnreg": 255} if target().backend == "cuda" else {}


def cdiv(dividend: int, divisor: int) -> int:
    """Divide and round up, as ``triton.cdiv`` does in microseconds: it serves kernels too."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """Return the least power of two that is not less than a positive number; as `cdiv`, for launchers alone."""
    return 1 << (number - 1).bit_length()


def index_type(*tensors: Tensor | None) -> tl.dtype:
    """Return the integer type in which every element of `tensors` can be addressed: int64 only where it is needed."""
    for tensor in tensors:
        if tensor is None:
            continue
        last = tensor.numel()
        if last > 0 and not tensor.is_contiguous():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            last = max(last, reach)
        if last >= 2**31 - 2**20:  # a tile may look a block beyond the end before it masks
            return tl.int64
    return tl.int32


def layout(matrix: Tensor) -> int:
    """Tell how a matrix's elements lie, for `pointers`.

    Returns:
        Elements that a load may take at a time (16 bytes, 8 bytes, or one element), where rows are dense; the same,
        negative, where columns are; 0 where neither is.
    """
    row_stride, column_stride = matrix.stride()
    if column_stride == 1:
        sign, length, stride = 1, matrix.shape[1], row_stride
    elif row_stride == 1:
        sign, length, stride = -1, matrix.shape[0], column_stride
    else:
        return 0
    size = matrix.element_size()
    for bytes in (16, 8):
        if matrix.data_ptr() % bytes == stride * size % bytes == length * size % bytes == 0:
            return sign * (bytes // size)
    return sign


def dot_precision(dtype: torch.dtype, fp32_precision: str) -> str:
    """Translate PyTorch's precision switch (``"tf32"``, ``"ieee"`` or ``"none"``) to ``tl.dot``'s."""
    return "tf32" if dtype == torch.float32 and fp32_precision == "tf32" else "ieee"


def interpreted_tile(rows: int, columns: int, depth: int) -> dict[str, int]:
    """Choose the tile of a matrix product in the interpreter, whose cost is per operation and not per element."""
    sizes = (min(1024, rows), min(256, columns), min(256, depth))
    block_m, block_n, block_k = (max(16, triton.next_power_of_2(size)) for size in sizes)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}


def split_reduction(rows: int, block: int, tiles: int) -> tuple[int, int]:
    """Cut a reduction over `rows` into parts that programs sum apart, for a two-stage sum in a fixed order.

    Depends on the shape alone, so that a result never depends on the device it was computed on.

    Args:
        rows: length of the reduction.
        block: rows that a program takes at a time.
        tiles: programs that each part occupies.

    Returns:
        Number of parts and rows per part, a multiple of `block`.
    """
    blocks = -(-rows // block)
    # About four programs for each of some 128 multiprocessors, each with at least four blocks to sum.
    parts = max(1, min(blocks // 4, 512 // tiles))
    per_part = max(1, -(-blocks // parts)) * block
    return max(1, -(-rows // per_part)), per_part


@triton.jit
def load(pointers, mask=None):
    """Load an operand of tl.dot or of a sum, 0 where masked off.

    The interpreter computes in float32: its float16 sums lose accuracy and its bfloat16 arithmetic is wrong
    (triton#11584). Compiled kernels keep the tensor's type, for the tensor cores.
    """
    values = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def pointers(ptr, row, column, row_stride, column_stride, LAYOUT: tl.constexpr):
    """Pointers to the elements [row, column] of a matrix; LAYOUT, by `layout`, promises how they lie."""
    ELEMENT: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    if LAYOUT > 0:
        # One after the other: the sum of both offsets would be widened and added for each element.
        found = (ptr + (row * row_stride)[:, None]) + column[None, :]
        found = tl.multiple_of(found, (1, LAYOUT * ELEMENT))
    elif LAYOUT < 0:
        found = (ptr + (column * column_stride)[None, :]) + row[:, None]
        found = tl.multiple_of(found, (-LAYOUT * ELEMENT, 1))
    else:
        found = (ptr + (row * row_stride)[:, None]) + (column * column_stride)[None, :]
    return found


@triton.jit
def bound(size, LAYOUT: tl.constexpr):
    """Return `size` as a multiple of the LAYOUT elements of a load: a mask must not split a load.

    A size that is no multiple is that of a padded copy, whose padding may be read.
    """
    if LAYOUT > 1:
        size = (size + LAYOUT - 1) // LAYOUT * LAYOUT
    return size


@triton.jit
def _bfloat16_bits(values):
    """Round float32 `values` to the nearest bfloat16, as 32-bit integers: the interpreter's conversion truncates."""
    bits = values.to(tl.uint32, bitcast=True)
    # Adding just under half a unit to the bits rounds as the hardware does.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values != values, 0x7FC0, rounded)


@triton.jit
def operand(values, pointer):
    """Round float32 `values` to the type that `pointer` points to, as an operand of tl.dot (see `load`)."""
    if not INTERPRETED:
        values = values.to(pointer.dtype.element_ty)
    elif pointer.dtype.element_ty == tl.bfloat16:
        values = (_bfloat16_bits(values) << 16).to(tl.float32, bitcast=True)
    else:
        values = values.to(pointer.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def tf32(values, PRECISION: tl.constexpr):
    """Round float32 `values` to the nearest tf32 where products are of tf32; others stay as they are.

    A matrix unit cuts 13 bits off, a bias towards 0 and twice the error. Added up, two rounded operands keep a product
    within 2**-10 of itself. From sm_90 on one instruction rounds, halves to even, as descriptors do. On sm_80 the
    assembler makes three of it, which round halves away from 0; so do the integers here, elsewhere and in the
    interpreter. The interpreter's tl.dot multiplies whole numbers, so the bits are cut off here.
    """
    if PRECISION == "tf32":
        if INTERPRETED:
            values = _tf32_by_integers(values)
        elif cuda_capability_geq(9):
            values = tl.inline_asm_elementwise(
                "cvt.rn.tf32.f32 $0, $1;", "=r,r", [values], dtype=tl.float32, is_pure=True, pack=1
            )
        elif cuda_capability_geq(8):
            values = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,r", [values], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            values = _tf32_by_integers(values)
    return values


@triton.jit
def _tf32_by_integers(values):
    bits = values.to(tl.int32, bitcast=True)
    rounded = bits + 0x1000
    if INTERPRETED:
        rounded = rounded & -0x2000
    # The sum would carry a NaN's bits into its sign.
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Return total + left @ right, of operands rounded to nearest where products are of tf32."""
    return tl.dot(tf32(left, PRECISION), tf32(right, PRECISION), total, input_precision=PRECISION)


@triton.jit
def load_box(box, row, column, LAYOUT: tl.constexpr):
    """Load a tile of an operand by its descriptor, from [row, column] of the matrix on; 0 beyond its end.

    The sign of LAYOUT, as of `layout`, tells whether rows or columns are dense.
    """
    values = box.load([row, column]) if LAYOUT > 0 else box.load([column, row]).T
    if INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def boxed_dot(left, right, total, PRECISION: tl.constexpr):
    """Return total + left @ right, of operands by descriptors, which round to tf32 but in the interpreter."""
    if INTERPRETED:
        left, right = tf32(left, PRECISION), tf32(right, PRECISION)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def in_registers(values):
    """Keep a float32 operand in registers on its way to a matrix unit; the assembler drops the copy."""
    if not INTERPRETED:
        values = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=tl.float32, is_pure=True, pack=1)
    return values


@triton.jit
def store_box(box, row, column, values, LAYOUT: tl.constexpr):
    """Store a tile of float32 by a result's descriptor, at [row, column] of the matrix and as far as it goes."""
    values = rounded(values, box.dtype)
    row, column = row.to(tl.int32), column.to(tl.int32)
    if LAYOUT > 0:
        box.store([row, column], values)
    else:
        box.store([column, row], values.T)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Round float32 `values` to a type, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300  (a type is no constant here)
        values = _bfloat16_bits(values).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        values = values.to(DTYPE)
    return values


@triton.jit
def store(pointers, values, mask):
    """Store float32 `values`, rounded to nearest even."""
    tl.store(pointers, rounded(values, pointers.dtype.element_ty), mask=mask)


@triton.jit
def relu(values):
    """Return max(values, 0); NaN stays NaN, as in PyTorch."""
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


_MATRICES, _OUTPUTS = 4, 4
"""Matrices of partial sums that one launch adds up, and outputs of each."""

_MATRICES_IN_KERNEL, _OUTPUTS_IN_KERNEL = tl.constexpr(_MATRICES), tl.constexpr(_OUTPUTS)


@triton.jit
def _sum_rows(
    partials_ptr,
    offset,
    columns,
    parts,
    output_ptr,
    first,
    size,
    factor,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up BLOCK columns, from `offset + first` on, of a (parts, columns) matrix.

    Rows p, p + ROWS, ... are added first to last, then these ROWS sums by a tree. ALIGNED promises that `columns`,
    `offset` and `size` are multiples of four, so that loads take 16 bytes.
    """
    element = first + tl.arange(0, BLOCK)
    found = partials_ptr + (offset + element)
    outputs = output_ptr + element
    if ALIGNED:
        found = tl.multiple_of(found, 16)
        outputs = tl.multiple_of(outputs, 4 * output_ptr.dtype.element_ty.primitive_bitwidth // 8)
        size = size // 4 * 4
    if ROWS == 1:
        store(outputs, tl.load(found, mask=element < size) * factor, element < size)
    else:
        row = tl.arange(0, ROWS)
        rows = (row.to(element.dtype) * columns)[:, None]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, parts, ROWS):
            pointers = found[None, :] + rows
            if ALIGNED:
                pointers = tl.multiple_of(pointers, (1, 16))
            total += tl.load(pointers, mask=(start + row < parts)[:, None] & (element < size)[None, :], other=0.0)
            found += columns.to(element.dtype) * ROWS
        store(outputs, tl.sum(total, axis=0) * factor, element < size)


@triton.jit
def _sum_block(
    partials_ptr,
    offset,
    columns,
    parts,
    output_ptr,
    block,
    size,
    factor,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the columns of one block: the fewer numbers there are for each, the more columns it has (`_wider`)."""
    block = block.to(INDEX)
    if parts == 1:
        first = block * (128 * BLOCK)
        _sum_rows(partials_ptr, offset, columns, parts, output_ptr, first, size, factor, ALIGNED, 1, 128 * BLOCK)
    elif parts <= 32:
        first = block * (16 * BLOCK)
        _sum_rows(partials_ptr, offset, columns, parts, output_ptr, first, size, factor, ALIGNED, 8, 16 * BLOCK)
    else:
        _sum_rows(partials_ptr, offset, columns, parts, output_ptr, block * BLOCK, size, factor, ALIGNED, 128, BLOCK)


_WIDER = {1: 7, 32: 4}
"""By how many bits a block is wider than BLOCK columns, up to so many parts."""


@triton.jit(
    do_not_specialize=[
        *(f"partials{i}_ptr" for i in range(_MATRICES)),
        *(f"output{i}_ptr" for i in range(_MATRICES * _OUTPUTS)),
        *(f"parts{i}" for i in range(_MATRICES)),
        *(f"size{i}" for i in range(_MATRICES * _OUTPUTS)),
    ]
)
def _sum_partials_kernel(
    partials0_ptr,
    partials1_ptr,
    partials2_ptr,
    partials3_ptr,
    output0_ptr,
    output1_ptr,
    output2_ptr,
    output3_ptr,
    output4_ptr,
    output5_ptr,
    output6_ptr,
    output7_ptr,
    output8_ptr,
    output9_ptr,
    output10_ptr,
    output11_ptr,
    output12_ptr,
    output13_ptr,
    output14_ptr,
    output15_ptr,
    parts0,
    parts1,
    parts2,
    parts3,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    size8,
    size9,
    size10,
    size11,
    size12,
    size13,
    size14,
    size15,
    factor0,
    factor1,
    factor2,
    factor3,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Add up the rows of four float32 matrices of partial sums, in an order that depends on the number of rows alone.

    Row p of matrix m, (parts, size[4 * m] + ... + size[4 * m + 3]), holds part p of outputs 4 * m to 4 * m + 3, one
    after the other. A size of 0 leaves an output out.

    Tile: a program takes a block of one output, of BLOCK = 2**BITS columns or some times more (`_sum_block`), and 1, 8
    or 128 parts at a time, so that many loads are under way at once. Blocks are numbered output by output.

    Cost per element of an output: reads one float32 a part, writes one element.
    """
    matrices = (partials0_ptr, partials1_ptr, partials2_ptr, partials3_ptr)
    rows = (parts0, parts1, parts2, parts3)
    factors = (factor0, factor1, factor2, factor3)
    outputs = (
        output0_ptr, output1_ptr, output2_ptr, output3_ptr, output4_ptr, output5_ptr, output6_ptr, output7_ptr,
        output8_ptr, output9_ptr, output10_ptr, output11_ptr, output12_ptr, output13_ptr, output14_ptr, output15_ptr,
    )  # fmt: skip
    sizes = (
        size0, size1, size2, size3, size4, size5, size6, size7,
        size8, size9, size10, size11, size12, size13, size14, size15,
    )  # fmt: skip
    number = tl.program_id(0)
    partials_ptr, parts, factor, columns = partials0_ptr, parts0, factor0, size0
    output_ptr, size, offset, block = output0_ptr, size0, size0 * 0, number
    begin = number * 0
    for m in tl.static_range(_MATRICES_IN_KERNEL):
        wider = tl.where(rows[m] == 1, 7, tl.where(rows[m] <= 32, 4, 0))
        before = size0 * 0
        first = begin
        for i in tl.static_range(_OUTPUTS_IN_KERNEL):
            here = sizes[m * _OUTPUTS_IN_KERNEL + i]
            if number >= begin:
                output_ptr, size, offset, block = outputs[m * _OUTPUTS_IN_KERNEL + i], here, before, number - begin
            begin += (here + (BLOCK << wider) - 1) >> (BITS + wider)
            before += here
        if number >= first:
            partials_ptr, parts, factor, columns = matrices[m], rows[m], factors[m], before
    if (columns | offset | size) % 4 == 0:
        _sum_block(partials_ptr, offset, columns, parts, output_ptr, block, size, factor, True, INDEX, BLOCK)
    else:
        _sum_block(partials_ptr, offset, columns, parts, output_ptr, block, size, factor, False, INDEX, BLOCK)


Sum = tuple[Tensor, Sequence[Tensor], float]
"""A dense float32 matrix (parts, *) of partial sums, up to four dense outputs that a row holds one after the other, and
a factor for their sums."""


def sum_partials(*sums: Sum, later: list[Sum] | None = None) -> None:
    """Reduce matrices of partial sums over their rows into their outputs; deterministic.

    One launch takes four matrices whose outputs are of one type.

    Args:
        sums: what to reduce; the numbers of parts may differ.
        later: where `sums` are noted instead, so that a caller may reduce those of several launchers together.
    """
    if later is not None:
        later.extend(sums)
        return
    for dtype in dict.fromkeys(sum[1][0].dtype for sum in sums):
        alike = [sum for sum in sums if sum[1][0].dtype == dtype]
        for first in range(0, len(alike), _MATRICES):
            _launch_sum(alike[first : first + _MATRICES])


def _launch_sum(sums: Sequence[Sum]) -> None:
    block = 1024 if INTERPRETED else 32
    empty_sum: Sum = (sums[0][0], (), 1.0)
    padded = [*sums, *[empty_sum] * (_MATRICES - len(sums))]
    outputs: list[Tensor] = []
    sizes: list[int] = []
    programs = 0
    for partials, found, _ in padded:
        outputs += [*found, *[sums[0][1][0]] * (_OUTPUTS - len(found))]
        sizes += [*[output.numel() for output in found], *[0] * (_OUTPUTS - len(found))]
        wider = next((bits for most, bits in _WIDER.items() if partials.shape[0] <= most), 0)
        programs += sum(cdiv(output.numel(), block << wider) for output in found)
    launch(
        _sum_partials_kernel,
        (programs,),
        *(partials for partials, _, _ in padded),
        *outputs,
        *(partials.shape[0] for partials, _, _ in padded),
        *sizes,
        *(float(factor) for _, _, factor in padded),
        INDEX=index_type(*(partials for partials, _, _ in sums), *outputs[: len(sums) * _OUTPUTS]),
        BLOCK=block,
        BITS=block.bit_length() - 1,
        num_warps=4,
    )
