"""Q4_0, Q4_1, Q5_0, Q5_1 without importance, about as fast as one core reads memory.

There llama.cpp lays the grid over the range of the block and rounds, with no search. Here codes are the
nearest on the grid as it is stored, which keeps the error of every block at or under ggml's, and grids with a
base are left at that. Grids without one are laid a fraction of a step beyond the extreme weight, and then
fitted by least squares, once.

A block is two vectors, rounded and packed along its weights. What a block has but one of (least, most, sums)
is reduced for sixteen blocks together (`reduction`), and so the scales come to lie in lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmcompress.grids.block_loop import SOURCES
from llmcompress.grids.compiled import compiled
from llmcompress.grids.lanes import (
    _FLOATS,
    _INTS,
    LANES,
    WIDTH,
    _constant,
    _element,
    _index,
    absolute,
    fma,
    half_bits,
    load,
    mask_bits,
    maximum,
    minimum,
    rint,
    select,
    splat,
    store,
)
from llmcompress.grids.reduction import (
    inlined,
    larger_bits,
    merge_extremes,
    merge_ranges,
    merge_sums,
    reduced,
    sign_first,
    sign_last,
)
from llmcompress.grids.rounding import divide, inverse_of, round_to_half

BLOCK = 32
CHUNK = 4 * WIDTH  # blocks fitted before they are rounded, so that the fits overlap in time

# How far, in steps, the extreme weight lies beyond the first code of a grid without a base.
OVERHANG = 0.2
WHOLE = 1.5 * 2.0**23  # floats of this size are whole numbers
TINY = 2.0**-120  # steps below have no finite inverse that helps, and are 0 as float16


@intrinsic
def prefetch(typing_context, array, i):
    """Ask for lanes number `i` of a float32 array, which may lie beyond its end, to be fetched from memory."""

    def lower(context, builder, sig, args):
        place = _element(context, builder, sig.args[0], args[0], builder.mul(args[1], _index(WIDTH)), _FLOATS)
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(place, byte), *(number(flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.int64), lower


@inlined
def range_of(flat, block, inverse, count):
    first, second = load(flat, 2 * block), load(flat, 2 * block + 1)
    return minimum(first, second), maximum(first, second)


@inlined
def extreme_of(flat, block, inverse, count):
    return larger_bits(sign_last(load(flat, 2 * block)), sign_last(load(flat, 2 * block + 1)))


@inlined
def sums_of(flat, block, inverse, count):
    """The parts of the sums of x l and l^2, with codes l from -count / 2 on."""
    first, second = load(flat, 2 * block), load(flat, 2 * block + 1)
    most = count / 2 - 1.0
    code, other = minimum(rint(first * inverse), most), minimum(rint(second * inverse), most)
    return fma(code, first, other * second), fma(code, code, other * other)


@inlined
def fit_affine_chunk(flat, first, count, inverses, offsets, scales, bases):
    """Lay x = d l + m, l in 0..count - 1, over the range of each block.

    Fills float32 `(CHUNK,)` with 1 / d, -m / d and the bits of d and m, float16.
    """
    for k in range(0, CHUNK, WIDTH):
        least, most = reduced(range_of, merge_ranges, flat, first, inverses, count, k)
        d, m = round_to_half((most - least) / (count - 1.0)), round_to_half(least)
        inverse = divide(splat(1.0), d)
        store(inverses, k // WIDTH, inverse)
        store(offsets, k // WIDTH, -m * inverse)
        store(scales, k // WIDTH, half_bits(d))
        store(bases, k // WIDTH, half_bits(m))


@inlined
def fit_scaled_chunk(flat, first, count, inverses, scales):
    """Fit x = d l, l in -count / 2..count / 2 - 1, to each block. Fills in 1 / d and the bits of d, as above."""
    for k in range(0, CHUNK, WIDTH):
        extreme = sign_first(reduced(extreme_of, merge_extremes, flat, first, inverses, count, k))
        inverse = select(absolute(extreme) > TINY, (-count / 2 - OVERHANG) / extreme, 0.0)
        store(inverses, k // WIDTH, inverse)
    for k in range(0, CHUNK, WIDTH):
        sum_xl, sum_ll = reduced(sums_of, merge_sums, flat, first, inverses, count, k)
        d = round_to_half(divide(sum_xl, sum_ll))
        store(inverses, k // WIDTH, inverse_of(d))
        store(scales, k // WIDTH, half_bits(d))


@intrinsic
def store_nibbles(typing_context, data, i, first, second):
    """Write the last four bits of `first`, and of `second` above them, from byte i on of a uint8 array."""
    vector = ir.VectorType(ir.IntType(8), WIDTH)

    def lower(context, builder, sig, args):
        low, high = (builder.bitcast(lanes, _INTS) for lanes in args[2:])
        low = builder.and_(low, _constant(_INTS, 15))
        both = builder.trunc(builder.or_(low, builder.shl(high, _constant(_INTS, 4))), vector)
        builder.store(both, _element(context, builder, sig.args[0], args[0], args[1], vector), align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, LANES, LANES), lower


@inlined
def encode_block(flat, block, inverse, offset, with_base, count, data, i):
    """Codes x inverse + offset from byte i on: the fifth bits of those of more than four, then the others.

    The nearest whole number is the last bits of a float that WHOLE is added to; where offsets are whole they hold it.
    """
    code, other = load(flat, 2 * block), load(flat, 2 * block + 1)
    code, other = fma(code, inverse, offset), fma(other, inverse, offset)
    if with_base:
        code, other = code + WHOLE, other + WHOLE
    most = WHOLE + count - 1.0
    code, other = minimum(maximum(code, WHOLE), most), minimum(maximum(other, WHOLE), most)
    if count > 16.0:
        fifth, other_fifth = mask_bits(code > WHOLE + 15.0), mask_bits(other > WHOLE + 15.0)
        store_word(data, i, fifth)
        store_word(data, i + 2, other_fifth)
        i += 4
    store_nibbles(data, i, code, other)


@inlined
def store_word(data, i, word):
    """Write 16 bits, low byte first."""
    data[i], data[i + 1] = word & 255, word >> 8


def compile_range_quantizer(name: str, block_bytes: int, bits: int, with_base: bool) -> Callable:
    """The quantize kernel, as `Grid` wants it, of a format of `bits` a code; importance is ignored."""
    sources, count = SOURCES, float(2**bits)

    @compiled(f"quantize_{name}_plain", error_model="numpy")
    def quantize(weights, importance, out):
        sources  # noqa: B018
        flat, data = weights.reshape(-1), out.reshape(-1)
        blocks = flat.size // BLOCK
        if blocks < CHUNK:
            flat, data = np.zeros(CHUNK * BLOCK, np.float32), np.empty(CHUNK * block_bytes, np.uint8)
            flat[: weights.size] = weights.reshape(-1)
        inverses, offsets = np.empty(CHUNK, np.float32), np.full(CHUNK, np.float32(count / 2 + WHOLE))
        scales, bases = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        for start in range(0, blocks, CHUNK):
            first = max(min(start, blocks - CHUNK), 0)  # the last chunk overlaps the one before
            if with_base:
                fit_affine_chunk(flat, first, count, inverses, offsets, scales, bases)
            else:
                fit_scaled_chunk(flat, first, count, inverses, scales)
            for k in range(CHUNK):
                i = (first + k) * block_bytes
                store_word(data, i, np.int32(scales[k]))
                if with_base:
                    store_word(data, i + 2, np.int32(bases[k]))
                codes = i + 4 if with_base else i + 2
                prefetch(flat, 2 * (first + k + CHUNK))
                prefetch(flat, 2 * (first + k + CHUNK) + 1)
                encode_block(flat, first + k, inverses[k], offsets[k], with_base, count, data, codes)
        if blocks < CHUNK:
            out.reshape(-1)[:] = data[: out.size]

    return quantize
