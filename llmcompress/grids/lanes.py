"""Sixteen float32 values in one variable, for Numba kernels.

A number format is searched block by block, and blocks are many and alike: the kernels lay sixteen blocks
side by side, one in each lane, and run the same scalar algorithm on all of them. A lane never
sees its neighbours, so results depend neither on the vector width of the CPU nor on how rows are cut into
slabs; and since LLVM is given vectors to begin with (and makes two AVX2 or four NEON registers of
one where it must), nothing depends on its auto-vectoriser. Nothing here is compiled with fast-math.

In a kernel, `+ - * /`, `<`, `>` and unary minus work on lanes, and on lanes with numbers. Arrays
of lanes are float32 arrays `(n, 16)`, read and written with `load` and `store`.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_BITS = ir.VectorType(ir.IntType(1), WIDTH)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


class _Mask(types.Type):
    def __init__(self) -> None:
        super().__init__("mask16")


LANES, MASK = _Lanes(), _Mask()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes_type):
        super().__init__(manager, lanes_type, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask_type):
        super().__init__(manager, mask_type, _BITS)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * WIDTH)


def _broadcast(builder, scalar, vector=_FLOATS):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


def _as_lanes(context, builder, value, value_type):
    """`value` as a vector; a number is rounded to float32 and repeated."""
    if isinstance(value_type, _Lanes):
        return value
    return _broadcast(builder, context.cast(builder, value, value_type, types.float32))


def _define_operator(operation, result, build) -> None:
    pairs = [(LANES, LANES), (LANES, types.float64), (types.float64, LANES)]

    @infer_global(operation)
    class _(ConcreteTemplate):
        cases = [signature(result, *pair) for pair in pairs]

    def lower(context, builder, sig, args):
        left, right = (_as_lanes(context, builder, *pair) for pair in zip(args, sig.args))
        return build(builder, left, right)

    for pair in pairs:
        lower_builtin(operation, *pair)(lower)


_define_operator(operator.add, LANES, ir.IRBuilder.fadd)
_define_operator(operator.sub, LANES, ir.IRBuilder.fsub)
_define_operator(operator.mul, LANES, ir.IRBuilder.fmul)
_define_operator(operator.truediv, LANES, ir.IRBuilder.fdiv)
_define_operator(operator.lt, MASK, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define_operator(operator.gt, MASK, lambda builder, a, b: builder.fcmp_ordered(">", a, b))


@infer_global(operator.neg)
class _Negation(ConcreteTemplate):
    cases = [signature(LANES, LANES)]


@lower_builtin(operator.neg, LANES)
def _negate(context, builder, sig, args):
    return builder.fneg(args[0])


def _call(builder, name: str, vectors: list):
    """Call an LLVM intrinsic on vectors."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(vectors))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(function, vectors)


def _unary(name: str):
    """An LLVM intrinsic of one vector."""

    @intrinsic
    def function(typing_context, a):
        def lower(context, builder, sig, args):
            return _call(builder, name, args)

        return LANES(LANES), lower

    return function


rint = _unary("rint")  # to nearest, ties to even
round_away = _unary("round")  # to nearest, ties away from zero: C's roundf
absolute = _unary("fabs")
ceil = _unary("ceil")
sqrt = _unary("sqrt")


@intrinsic
def splat(typing_context, number):
    """A number in every lane."""

    def lower(context, builder, sig, args):
        return _as_lanes(context, builder, args[0], sig.args[0])

    return LANES(number), lower


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def lower(context, builder, sig, args):
        vectors = [_as_lanes(context, builder, *pair) for pair in zip(args, sig.args)]
        return _call(builder, "fma", vectors)

    return LANES(a, b, c), lower


def _extremum(order: str):
    """The x86 rule: the second operand where either is NaN, so that `clamp` maps NaN to its lower bound."""

    @intrinsic
    def function(typing_context, a, b):
        def lower(context, builder, sig, args):
            left, right = (_as_lanes(context, builder, *pair) for pair in zip(args, sig.args))
            return builder.select(builder.fcmp_ordered(order, left, right), left, right)

        return LANES(a, b), lower

    return function


minimum = _extremum("<")
maximum = _extremum(">")


@intrinsic
def select(typing_context, mask, a, b):
    """`a` where the mask holds, `b` elsewhere."""

    def lower(context, builder, sig, args):
        left, right = (_as_lanes(context, builder, *pair) for pair in zip(args[1:], sig.args[1:]))
        return builder.select(args[0], left, right)

    return LANES(mask, a, b), lower


@intrinsic
def largest_lane(typing_context, a):
    """The largest of the sixteen values, none of them NaN."""

    def lower(context, builder, sig, args):
        kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
        name = f"llvm.vector.reduce.fmax.v{WIDTH}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, args, fastmath=("nnan",))

    return types.float32(LANES), lower


@intrinsic
def power_of_two(typing_context, a):
    """The largest power of two not above each (positive, normal) value."""

    def lower(context, builder, sig, args):
        exponent = builder.and_(builder.bitcast(args[0], _INTS), _constant(_INTS, 0x7F800000))
        return builder.bitcast(exponent, _FLOATS)

    return LANES(LANES), lower


@intrinsic
def leading_bits(typing_context, a, shift):
    """The bits of float32 values, none negative, from bit number `shift` up, as whole numbers."""

    def lower(context, builder, sig, args):
        distance = context.cast(builder, args[1], sig.args[1], types.int32)
        bits = builder.lshr(builder.bitcast(args[0], _INTS), _broadcast(builder, distance, _INTS))
        return builder.sitofp(bits, _FLOATS)

    return LANES(LANES, shift), lower


@intrinsic
def number_of(typing_context, a):
    """The numbers that `tagged` put in."""

    def lower(context, builder, sig, args):
        bits = builder.and_(builder.bitcast(args[0], _INTS), _constant(_INTS, 127))
        return builder.sitofp(bits, _FLOATS)

    return LANES(LANES), lower


def _index(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _data(context, builder, array_type, array):
    return context.make_array(array_type)(context, builder, array).data


def _element(context, builder, array_type, array, index, vector):
    """Pointer to the vector at flat `index` of a contiguous array."""
    place = builder.gep(_data(context, builder, array_type, array), [index])
    return builder.bitcast(place, vector.as_pointer())


@intrinsic
def load(typing_context, array, i):
    """Lanes number `i` of a contiguous float32 array."""

    def lower(context, builder, sig, args):
        start = builder.mul(args[1], _index(WIDTH))
        return builder.load(_element(context, builder, sig.args[0], args[0], start, _FLOATS), align=4)

    return LANES(array, types.int64), lower


@intrinsic
def store(typing_context, array, i, value):
    """Write `value` as lanes number `i` of a contiguous float32 array."""

    def lower(context, builder, sig, args):
        start = builder.mul(args[1], _index(WIDTH))
        vector = _as_lanes(context, builder, args[2], sig.args[2])
        builder.store(vector, _element(context, builder, sig.args[0], args[0], start, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), lower


def _byte_store(step: int):
    """Write the low bytes of whole numbers at `i * step` of a contiguous uint8 array."""
    vector = ir.VectorType(ir.IntType(8), WIDTH)

    @intrinsic
    def function(typing_context, array, i, value):
        def lower(context, builder, sig, args):
            start = builder.mul(args[1], _index(step))
            whole = builder.trunc(builder.fptosi(args[2], _INTS), vector)
            builder.store(whole, _element(context, builder, sig.args[0], args[0], start, vector), align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, LANES), lower

    return function


store_bytes = _byte_store(WIDTH)  # as row i of an array (n, 16)
store_run = _byte_store(1)  # from byte i on


@intrinsic
def lookup(typing_context, table, index):
    """Entries of an int8 table of sixteen, at whole numbers 0 to 15.

    Written as sixteen single look-ups, which LLVM makes one shuffle of bytes where the CPU has it.
    """
    table_kind = ir.VectorType(ir.IntType(8), WIDTH)

    def lower(context, builder, sig, args):
        entries = builder.load(
            _element(context, builder, sig.args[0], args[0], _index(0), table_kind), align=1
        )
        places = builder.trunc(builder.fptosi(args[1], _INTS), table_kind)
        places = builder.and_(places, ir.Constant(table_kind, [WIDTH - 1] * WIDTH))
        found = ir.Constant(table_kind, ir.Undefined)
        for lane in range(WIDTH):
            at = ir.Constant(ir.IntType(32), lane)
            entry = builder.extract_element(entries, builder.extract_element(places, at))
            found = builder.insert_element(found, entry, at)
        return builder.sitofp(found, _FLOATS)

    return LANES(table, LANES), lower


@intrinsic
def pick(typing_context, table, index):
    """`table[index]` in every lane: a 1-D array of numbers, at whole numbers within it."""

    def lower(context, builder, sig, args):
        data = _data(context, builder, sig.args[0], args[0])
        places, found = builder.fptosi(args[1], _INTS), ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(WIDTH):
            at = ir.Constant(ir.IntType(32), lane)
            place = builder.sext(builder.extract_element(places, at), ir.IntType(64))
            entry = builder.load(builder.gep(data, [place]))
            entry = context.cast(builder, entry, sig.args[0].dtype, types.float32)
            found = builder.insert_element(found, entry, at)
        return found

    return LANES(table, LANES), lower


@intrinsic
def has_bit(typing_context, a, place):
    """Where bit number `place`, a number or lanes, of whole numbers 0 to 2^24 is set."""

    def lower(context, builder, sig, args):
        bits = builder.fptosi(args[0], _INTS)
        places = builder.fptosi(_as_lanes(context, builder, args[1], sig.args[1]), _INTS)
        odd = builder.and_(builder.lshr(bits, places), _constant(_INTS, 1))
        return builder.icmp_unsigned("!=", odd, _constant(_INTS, 0))

    return MASK(LANES, place), lower


@intrinsic
def half_bits(typing_context, a):
    """The bits of float16 values (see `round_to_half`), as whole numbers 0 to 65535."""

    def lower(context, builder, sig, args):
        bits = builder.bitcast(args[0], _INTS)
        size = builder.and_(bits, _constant(_INTS, 0x7FFFFFFF))
        sign = builder.and_(builder.lshr(bits, _constant(_INTS, 16)), _constant(_INTS, 0x8000))
        normal = builder.lshr(builder.sub(size, _constant(_INTS, 112 << 23)), _constant(_INTS, 13))
        steps = builder.fmul(builder.bitcast(size, _FLOATS), _constant(_FLOATS, 2.0**24))
        is_normal = builder.icmp_unsigned(">=", size, _constant(_INTS, 113 << 23))
        half = builder.select(is_normal, normal, builder.fptosi(steps, _INTS))
        return builder.sitofp(builder.or_(half, sign), _FLOATS)

    return LANES(LANES), lower


@intrinsic
def mask_bits(typing_context, mask):
    """A mask as a number, lane k in bit k."""

    def lower(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), ir.IntType(32))

    return types.uint32(mask), lower


# For intrinsics that write straight code of many lanes themselves.
def repeated(value: float) -> ir.Constant:
    return _constant(_FLOATS, value)


def load_row(context, builder, array_type, array, k: int):
    """Lanes number k of a contiguous float32 array."""
    place = _element(context, builder, array_type, array, _index(WIDTH * k), _FLOATS)
    return builder.load(place, align=4)


def store_row(context, builder, array_type, array, k: int, value) -> None:
    builder.store(value, _element(context, builder, array_type, array, _index(WIDTH * k), _FLOATS), align=4)


def tagged(builder, value, number: int):
    """Lanes with `number`, 0 to 127, in place of their last seven bits; see `number_of`."""
    bits = builder.and_(builder.bitcast(value, _INTS), _constant(_INTS, -128))
    return builder.bitcast(builder.or_(bits, _constant(_INTS, number)), _FLOATS)
