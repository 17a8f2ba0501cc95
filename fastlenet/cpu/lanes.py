"""Vectors of 16 float32 as values of compiled functions.

numba compiles scalars and leaves it to LLVM to find vectors in loops. Here vectors are spelled out, so that a kernel's
inner loop is what its text says on every machine: LLVM splits a vector of 16 into as many registers as the CPU needs
(one with AVX-512, two with AVX, four with SSE or NEON).

A tuple of vectors lives in registers. A kernel's tile is the length of its tuples, which numba knows at compile time.
Memory is addressed in bytes by plain integers: tables of offsets then need no arithmetic, and no array carries a shape.

==================  ================================================================================
``Lanes``           16 float32, one per image
``Ints``            16 int32, one per image: the window cell that won
``offsets``         a tuple of integers; its length is the number of vectors that an operation handles
==================  ================================================================================

This module imports numba. Only modules that hold kernels import it, and they are imported when code must be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
BYTES = 4 * LANES
"""Size of a vector in memory."""

_BIT, _BYTE, _INT, _LONG = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_FLOATS, _DOUBLES, _INTS, _BYTES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _DOUBLE, _INT, _BYTE))


class Lanes(types.Type):
    """16 float32."""


class Ints(types.Type):
    """16 int32."""


lanes, ints = Lanes("lanes"), Ints("ints")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _FLOATS)


@register_model(Ints)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _INTS)


def kernel(arguments: int) -> Callable[[Callable], Any]:
    """Compile a function of so many integers that returns nothing, callable from C.

    A division by zero gives infinity or NaN, as in C. An exception could not leave a kernel: it would end the process.
    """
    return cfunc(types.void(*[types.int64] * arguments), error_model="numpy")


def inlined(function: Callable) -> Any:
    """Compile a function into each of its callers.

    numba would compile it anew for each literal argument. LLVM knows the literals anyway, once the function is inlined.
    """
    dispatcher = njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)
    template_for = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template_for(tuple(map(types.unliteral, args)), kws)
    return dispatcher


# --- memory --------------------------------------------------------------------------------------------------------


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address, kind):
    value = builder.load(_pointer(builder, address, kind))
    value.align = 1 if kind is _BYTES else 4  # no promise; aligned addresses are fast all the same
    return value


def _store(builder, value, address):
    builder.store(value, _pointer(builder, address, value.type)).align = 1 if value.type == _BYTES else 4


def _each(builder, address, offsets):
    return [builder.add(address, offset) for offset in cgutils.unpack_tuple(builder, offsets)]


def _unpack(builder, *tuples):
    return [cgutils.unpack_tuple(builder, each) for each in tuples]


@intrinsic
def long_at(typingctx, address):
    """Return the int64 at an address."""

    def generate(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _LONG))

    return types.int64(types.int64), generate


@intrinsic
def field(typingctx, table, number):
    """Return an entry of a table of int64."""

    def generate(context, builder, signature, args):
        place = builder.add(args[0], builder.mul(args[1], _LONG(8)))
        return builder.load(_pointer(builder, place, _LONG))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def longs_at(typingctx, address, like):
    """Return as many consecutive int64 as `like` has elements, as offsets."""

    def generate(context, builder, signature, args):
        places = [builder.add(args[0], _LONG(8 * i)) for i in range(like.count)]
        return cgutils.pack_array(builder, [builder.load(_pointer(builder, place, _LONG)) for place in places], _LONG)

    return types.UniTuple(types.int64, like.count)(types.int64, like), generate


@intrinsic
def float_at(typingctx, address):
    """Return the float32 at an address."""

    def generate(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _FLOAT))

    return types.float32(types.int64), generate


@intrinsic
def set_float(typingctx, address, value):
    """Write a float32 to an address."""

    def generate(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _FLOAT))
        return context.get_dummy_value()

    return types.none(types.int64, types.float32), generate


@intrinsic
def double_at(typingctx, address):
    """Return the float64 at an address."""

    def generate(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _DOUBLE))

    return types.float64(types.int64), generate


@intrinsic
def add_doubles(typingctx, address, values):
    """Add one vector to 16 float64 in memory."""

    def generate(context, builder, signature, args):
        [value] = cgutils.unpack_tuple(builder, args[1])
        sums = builder.load(_pointer(builder, args[0], _DOUBLES))
        sums.align = 4
        _store(builder, builder.fadd(sums, builder.fpext(value, _DOUBLES)), args[0])
        return context.get_dummy_value()

    return types.none(types.int64, values), generate


@intrinsic
def byte_at(typingctx, address):
    """Return the byte at an address."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.load(_pointer(builder, args[0], _BYTE)), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def set_byte(typingctx, address, value):
    """Write the lowest byte of an integer to an address."""

    def generate(context, builder, signature, args):
        builder.store(builder.trunc(args[1], _BYTE), _pointer(builder, args[0], _BYTE))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def take(typingctx, address):
    """Add 1 to the int64 at an address, undivided by other threads, and return what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _LONG), _LONG(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def load(typingctx, address, offsets):
    """Load a vector from `address` plus each of `offsets`."""

    def generate(context, builder, signature, args):
        return cgutils.pack_array(builder, [_load(builder, place, _FLOATS) for place in _each(builder, *args)], _FLOATS)

    return types.UniTuple(lanes, offsets.count)(types.int64, offsets), generate


@intrinsic
def store(typingctx, address, offsets, values):
    """Store each vector of `values` to `address` plus its offset."""

    def generate(context, builder, signature, args):
        for place, value in zip(_each(builder, *args[:2]), *_unpack(builder, args[2]), strict=True):
            _store(builder, value, place)
        return context.get_dummy_value()

    return types.none(types.int64, offsets, values), generate


@intrinsic
def store_first(typingctx, address, step, count, values):
    """Store the first `count` vectors of `values`, `step` bytes apart."""

    def generate(context, builder, signature, args):
        address, step, count, values = args
        for i, value in enumerate(cgutils.unpack_tuple(builder, values)):
            with builder.if_then(builder.icmp_signed("<", _LONG(i), count), likely=True):
                _store(builder, value, builder.add(address, builder.mul(step, _LONG(i))))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, values), generate


@intrinsic
def load_bytes(typingctx, address, offsets):
    """Load 16 bytes from `address` plus each of `offsets`, as int32."""

    def generate(context, builder, signature, args):
        values = [builder.zext(_load(builder, place, _BYTES), _INTS) for place in _each(builder, *args)]
        return cgutils.pack_array(builder, values, _INTS)

    return types.UniTuple(ints, offsets.count)(types.int64, offsets), generate


def _clamped(builder, address, step, count, number):
    """Places `step` bytes apart; those beyond the first `count` are the last of these."""
    last = builder.sub(count, _LONG(1))
    for i in range(number):
        place = builder.select(builder.icmp_signed("<", _LONG(i), last), _LONG(i), last)
        yield builder.add(address, builder.mul(step, place))


@intrinsic
def load_first(typingctx, address, step, count, like):
    """Load `count` vectors, `step` bytes apart; what `like` has more is zero."""

    def generate(context, builder, signature, args):
        values = []
        for i, place in enumerate(_clamped(builder, *args[:3], like.count)):
            live = builder.icmp_signed("<", _LONG(i), args[2])
            values.append(builder.select(live, _load(builder, place, _FLOATS), _all(0.0)))
        return cgutils.pack_array(builder, values, _FLOATS)

    return types.UniTuple(lanes, like.count)(types.int64, types.int64, types.int64, like), generate


@intrinsic
def add_tile(typingctx, address, offsets, step, tile):
    """Add a tile to memory: element (i, j) at `address` plus offset i plus j times `step`."""

    def generate(context, builder, signature, args):
        address, _, step, tile = args
        values = iter(cgutils.unpack_tuple(builder, tile))
        for place in _each(builder, address, args[1]):
            for j in range(tile_columns):
                here = builder.add(place, builder.mul(step, _LONG(j)))
                _store(builder, builder.fadd(_load(builder, here, _FLOATS), next(values)), here)
        return context.get_dummy_value()

    tile_columns = tile.count // offsets.count
    return types.none(types.int64, offsets, types.int64, tile), generate


@intrinsic
def store_bytes_first(typingctx, address, step, count, values):
    """Store the first `count` vectors of int32 as bytes, `step` bytes apart."""

    def generate(context, builder, signature, args):
        address, step, count, values = args
        for i, value in enumerate(cgutils.unpack_tuple(builder, values)):
            with builder.if_then(builder.icmp_signed("<", _LONG(i), count), likely=True):
                _store(builder, builder.trunc(value, _BYTES), builder.add(address, builder.mul(step, _LONG(i))))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, values), generate


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _all(value, kind=_FLOATS):
    return ir.Constant(kind, [value] * LANES)


def _spread(builder, scalar, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(one, one, _all(0, _INTS))


def _shuffle(builder, first, second, order: Sequence[int]):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, len(order)), list(order)))


@intrinsic
def splat(typingctx, address, like):
    """Load as many consecutive floats as `like` has elements and spread each over a vector."""

    def generate(context, builder, signature, args):
        places = [builder.add(args[0], _LONG(4 * i)) for i in range(like.count)]
        scalars = [builder.load(_pointer(builder, place, _FLOAT)) for place in places]
        return cgutils.pack_array(builder, [_spread(builder, scalar, _FLOATS) for scalar in scalars], _FLOATS)

    return types.UniTuple(lanes, like.count)(types.int64, like), generate


@intrinsic
def splat_each(typingctx, address, offsets):
    """Load a float from `address` plus each of `offsets` and spread it over a vector."""

    def generate(context, builder, signature, args):
        scalars = [builder.load(_pointer(builder, place, _FLOAT)) for place in _each(builder, *args)]
        return cgutils.pack_array(builder, [_spread(builder, scalar, _FLOATS) for scalar in scalars], _FLOATS)

    return types.UniTuple(lanes, offsets.count)(types.int64, offsets), generate


def _first_lanes(builder, count):
    """Which lanes are among the first `count`."""
    numbers = ir.Constant(ir.VectorType(_LONG, LANES), list(range(LANES)))
    return builder.icmp_signed("<", numbers, _spread(builder, count, ir.VectorType(_LONG, LANES)))


@intrinsic
def load_lanes(typingctx, address, offsets, count):
    """Load the first `count` lanes of a vector from `address` plus each of `offsets`; the others are zero."""

    def generate(context, builder, signature, args):
        address, offsets, count = args
        mask = _first_lanes(builder, count)
        pointer = _FLOATS.as_pointer()
        kind = ir.FunctionType(_FLOATS, [pointer, _INT, mask.type, _FLOATS])
        masked = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0v{LANES}f32")
        values = [
            builder.call(masked, [builder.inttoptr(place, pointer), _INT(4), mask, _all(0.0)])
            for place in _each(builder, address, offsets)
        ]
        return cgutils.pack_array(builder, values, _FLOATS)

    return types.UniTuple(lanes, offsets.count)(types.int64, offsets, types.int64), generate


@intrinsic
def store_lanes(typingctx, address, offsets, count, values):
    """Store the first `count` lanes of each vector of `values` to `address` plus its offset."""

    def generate(context, builder, signature, args):
        address, offsets, count, values = args
        mask = _first_lanes(builder, count)
        pointer = _FLOATS.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [_FLOATS, pointer, _INT, mask.type])
        masked = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0v{LANES}f32")
        for place, value in zip(_each(builder, address, offsets), cgutils.unpack_tuple(builder, values), strict=True):
            builder.call(masked, [value, builder.inttoptr(place, pointer), _INT(4), mask])
        return context.get_dummy_value()

    return types.none(types.int64, offsets, types.int64, values), generate


@intrinsic
def set_long(typingctx, address, value):
    """Write an int64 to an address."""

    def generate(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _LONG))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def totals(typingctx, values):
    """Return the sum of the lanes of each vector, halves first."""

    def generate(context, builder, signature, args):
        (vectors,) = _unpack(builder, args[0])
        return cgutils.pack_array(builder, [_total(builder, value) for value in vectors], _FLOAT)

    return types.UniTuple(types.float32, values.count)(values), generate


@intrinsic
def splat_strided(typingctx, address, step, like):
    """Load as many floats, `step` bytes apart, as `like` has elements and spread each over a vector."""

    def generate(context, builder, signature, args):
        places = [builder.add(args[0], builder.mul(args[1], _LONG(i))) for i in range(like.count)]
        scalars = [builder.load(_pointer(builder, place, _FLOAT)) for place in places]
        return cgutils.pack_array(builder, [_spread(builder, scalar, _FLOATS) for scalar in scalars], _FLOATS)

    return types.UniTuple(lanes, like.count)(types.int64, types.int64, like), generate


@intrinsic
def spread(typingctx, value, like):
    """Spread one float over every vector of a tuple as long as `like`."""

    def generate(context, builder, signature, args):
        return cgutils.pack_array(builder, [_spread(builder, args[0], _FLOATS)] * like.count, _FLOATS)

    return types.UniTuple(lanes, like.count)(types.float32, like), generate


@intrinsic
def spread_int(typingctx, value, like):
    """Spread one integer over every vector of a tuple as long as `like`."""

    def generate(context, builder, signature, args):
        value = _spread(builder, builder.trunc(args[0], _INT), _INTS)
        return cgutils.pack_array(builder, [value] * like.count, _INTS)

    return types.UniTuple(ints, like.count)(types.int64, like), generate


@intrinsic
def zeros(typingctx, rows, columns):
    """Return vectors of zeros for a tile of ``len(rows) x len(columns)``, row by row."""

    def generate(context, builder, signature, args):
        return cgutils.pack_array(builder, [_all(0.0)] * rows.count * columns.count, _FLOATS)

    return types.UniTuple(lanes, rows.count * columns.count)(rows, columns), generate


@intrinsic
def repeat(typingctx, rows, values):
    """Return a tile whose every row is `values`."""

    def generate(context, builder, signature, args):
        return cgutils.pack_array(builder, cgutils.unpack_tuple(builder, args[1]) * rows.count, _FLOATS)

    return types.UniTuple(lanes, rows.count * values.count)(rows, values), generate


@intrinsic
def add(typingctx, first, second):
    """Add two tuples of vectors."""

    def generate(context, builder, signature, args):
        pairs = zip(*_unpack(builder, *args), strict=True)
        return cgutils.pack_array(builder, [builder.fadd(a, b) for a, b in pairs], _FLOATS)

    return first(first, second), generate


@intrinsic
def add_products(typingctx, tile, rows, columns):
    """Add ``rows[i] * columns[j]`` to the tile's element (i, j), for all pairs: one FMA each."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        tile, rows, columns = _unpack(builder, *args)
        sums = iter(tile)
        return cgutils.pack_array(
            builder, [builder.call(fma, [row, column, next(sums)]) for row in rows for column in columns], _FLOATS
        )

    return tile(tile, rows, columns), generate


@intrinsic
def relu(typingctx, values):
    """Replace what is below zero by zero; NaN stays."""

    def generate(context, builder, signature, args):
        (values,) = _unpack(builder, args[0])
        kept = [builder.select(builder.fcmp_ordered("<", v, _all(0.0)), _all(0.0), v) for v in values]
        return cgutils.pack_array(builder, kept, _FLOATS)

    return values(values), generate


def _wins(builder, value, best):
    """Where a value replaces the best by max_pool2d's rule: it is larger, or it is NaN."""
    return builder.or_(builder.fcmp_ordered(">", value, best), builder.fcmp_unordered("uno", value, value))


@intrinsic
def larger(typingctx, best, values):
    """Return, vector by vector, the values where they win and else the best."""

    def generate(context, builder, signature, args):
        pairs = zip(*_unpack(builder, *args), strict=True)
        return cgutils.pack_array(builder, [builder.select(_wins(builder, v, b), v, b) for b, v in pairs], _FLOATS)

    return best(best, values), generate


@intrinsic
def winner(typingctx, argmax, best, values, cell):
    """Return `cell` where the values win and else the argmax."""

    def generate(context, builder, signature, args):
        argmax, best, values = _unpack(builder, *args[:3])
        cell = _spread(builder, builder.trunc(args[3], _INT), _INTS)
        triples = zip(argmax, best, values, strict=True)
        return cgutils.pack_array(
            builder, [builder.select(_wins(builder, v, b), cell, a) for a, b, v in triples], _INTS
        )

    return argmax(argmax, best, values, types.int64), generate


@intrinsic
def where_equal(typingctx, argmax, cell, values):
    """Return the values where the argmax is `cell`, and else zero."""

    def generate(context, builder, signature, args):
        cell = _spread(builder, builder.trunc(args[1], _INT), _INTS)
        pairs = zip(*_unpack(builder, args[0], args[2]), strict=True)
        kept = [builder.select(builder.icmp_signed("==", a, cell), v, _all(0.0)) for a, v in pairs]
        return cgutils.pack_array(builder, kept, _FLOATS)

    return values(argmax, types.int64, values), generate


@intrinsic
def where_not_equal(typingctx, argmax, cell, values):
    """Return the values where the argmax is not `cell`, and else zero."""

    def generate(context, builder, signature, args):
        cell = _spread(builder, builder.trunc(args[1], _INT), _INTS)
        pairs = zip(*_unpack(builder, args[0], args[2]), strict=True)
        kept = [builder.select(builder.icmp_signed("==", a, cell), _all(0.0), v) for a, v in pairs]
        return cgutils.pack_array(builder, kept, _FLOATS)

    return values(argmax, types.int64, values), generate


@intrinsic
def where_positive(typingctx, tests, values):
    """Return the values where the tests are not at most zero, as relu's derivative has it, and else zero."""

    def generate(context, builder, signature, args):
        pairs = zip(*_unpack(builder, *args), strict=True)
        kept = [builder.select(builder.fcmp_ordered("<=", t, _all(0.0)), _all(0.0), v) for t, v in pairs]
        return cgutils.pack_array(builder, kept, _FLOATS)

    return values(tests, values), generate


@intrinsic
def total(typingctx, address):
    """Load a vector and return the sum of its lanes, halves first."""

    def generate(context, builder, signature, args):
        return _total(builder, _load(builder, args[0], _FLOATS))

    return types.float32(types.int64), generate


def _total(builder, value):
    width = LANES
    while width > 1:
        width //= 2
        halves = [_shuffle(builder, value, value, range(start, start + width)) for start in (0, width)]
        value = builder.fadd(*halves)
    return builder.extract_element(value, _INT(0))


def _transposed(builder, vectors):
    """Transpose a square of vectors: exchange halves, quarters and so on between vectors half, a quarter ... apart."""
    distance = LANES // 2
    while distance:
        low = [i for block in range(0, LANES, 2 * distance) for i in range(block, block + distance)]
        first = [i + (LANES if i & distance else 0) - (distance if i & distance else 0) for i in range(LANES)]
        second = [i + distance if not i & distance else i + LANES for i in range(LANES)]
        result = list(vectors)
        for i in low:
            one, other = vectors[i], vectors[i + distance]
            result[i] = _shuffle(builder, one, other, first)
            result[i + distance] = _shuffle(builder, one, other, second)
        vectors, distance = result, distance // 2
    return vectors


@intrinsic
def transpose(typingctx, address, step, last, target, target_step, count):
    """Load 16 vectors, `step` bytes apart, zeros beyond number `last`, and store the first `count` of the transpose.

    The transpose is stored `target_step` bytes apart.
    """

    def generate(context, builder, signature, args):
        return _generate_transpose(context, builder, args, _FLOATS)

    return types.none(*[types.int64] * 6), generate


@intrinsic
def transpose_bytes(typingctx, address, step, last, target, target_step, count):
    """Do what `transpose` does, with 16 vectors of 16 bytes."""

    def generate(context, builder, signature, args):
        return _generate_transpose(context, builder, args, _BYTES)

    return types.none(*[types.int64] * 6), generate


def _generate_transpose(context, builder, args, kind):
    address, step, last, target, target_step, count = args
    nothing = cgutils.global_constant(builder, "zeros", ir.Constant(kind, [0] * LANES))
    nothing = builder.ptrtoint(nothing, _LONG)
    vectors = []
    for i in range(LANES):
        place = builder.add(address, builder.mul(step, _LONG(i)))
        place = builder.select(builder.icmp_signed("<=", _LONG(i), last), place, nothing)
        vectors.append(_load(builder, place, kind))
    for i, value in enumerate(_transposed(builder, vectors)):
        with builder.if_then(builder.icmp_signed("<", _LONG(i), count), likely=True):
            _store(builder, value, builder.add(target, builder.mul(target_step, _LONG(i))))
    return context.get_dummy_value()


@intrinsic
def call(typingctx, address, arguments):
    """Call the kernel at an address with a tuple of integers."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_LONG] * arguments.count)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), cgutils.unpack_tuple(builder, args[1]))
        return context.get_dummy_value()

    return types.none(types.int64, arguments), generate


assert ctypes.sizeof(ctypes.c_void_p) == 8, "addresses are int64"
