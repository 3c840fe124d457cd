"""F32, F16 and BF16, and reading them.

Rounding is to nearest, ties to even. Infinity is never written: a finite value beyond the format's
range becomes its largest finite one, and `count_saturated` tells how many did. NaN stays NaN; whoever
reads weights asks `first_nonfinite` first.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from llmcompress.grids.block_loop import SOURCES
from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid, Quantizer
from llmcompress.grids.lanes import _INTS, WIDTH, _constant, _element, _index, load, maximum, minimum

BRAIN_MAX = 3.3895313892515355e38
_CHUNK = 4096  # values looked at between two chances to stop early


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Contiguous `raw` as float32 of the same shape; F32 is returned as it is, not copied.

    `dtype` is "F32", "F16" or "BF16"; `raw` then float32, float16, or uint16 (the bits of bfloat16).
    """
    if dtype == "F32":
        return raw
    values = np.empty(raw.shape, np.float32)
    {"F16": _halves_to_float, "BF16": _brains_to_float}[dtype](_words(raw), values.reshape(-1))
    return values


def first_nonfinite(raw: np.ndarray, dtype: str) -> int:
    """Flat index of the first NaN or infinity in contiguous `raw`, as for `to_float32`; -1 if none."""
    words = raw.reshape(-1).view(np.uint32) if dtype == "F32" else _words(raw)
    exponent = {"F32": np.uint32(0x7F800000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}[dtype]
    return int(_first_with_bits(words, exponent))


def count_saturated(values: np.ndarray, dtype: str) -> int:
    """How many finite values in a float32 array the rounding to "F16" or "BF16" cuts to its largest one."""
    # Values up to half a step beyond the largest round down to it by themselves.
    limit = {"F32": np.inf, "F16": 65520.0, "BF16": 3.3961775292304601e38}[dtype]
    return int(_count_from(np.ascontiguousarray(values, np.float32).reshape(-1), np.float32(limit)))


def _words(raw: np.ndarray) -> np.ndarray:
    return raw.reshape(-1).view(np.uint16)


@register_jitable
def half_to_float(bits):
    """The float16 with these bits (uint32) as float32."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    bias = 224 if exponent == 31 else 112
    normal = np.uint32(((exponent + bias) << 23) | (fraction << 13)).view(np.float32)
    size = np.float32(fraction) * np.float32(2.0**-24) if exponent == 0 else normal
    return -size if bits & 0x8000 else size


@register_jitable
def read_half(data, i):
    """The float16 in bytes i and i + 1, low byte first, as float32."""
    return half_to_float(np.uint32(data[i] | data[i + 1] << 8))


@compiled()
def _halves_to_float(words, values):
    for i in range(words.size):
        values[i] = half_to_float(np.uint32(words[i]))


@compiled()
def _brains_to_float(words, values):
    bits = values.view(np.uint32)
    for i in range(words.size):
        bits[i] = np.uint32(words[i]) << np.uint32(16)


@compiled()
def _first_with_bits(words, exponent):
    """Index of the first word with all bits of `exponent` set, or -1."""
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK]
        largest = exponent ^ exponent  # a zero of the words' own width, which keeps the loop in vectors
        for i in range(chunk.size):
            largest = max(largest, chunk[i] & exponent)
        if largest == exponent:
            for i in range(chunk.size):
                if (chunk[i] & exponent) == exponent:
                    return start + i
    return -1


@compiled()
def _count_from(values, limit):
    count = 0
    for value in values:
        count += limit <= abs(value) < np.inf
    return count


def _quantize_f32(weights, importance, out):
    out.view(np.float32)[...] = weights


def _dequantize_f32(data, out):
    out[...] = data.view(np.float32)


@register_jitable
def half_bits_of(bits):
    """The float16 bits of a float32 with these bits (uint32)."""
    sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    # Half a step less one, plus the last bit that stays, rounds ties to even.
    rounded = (size + 0xFFF + (size >> 13 & 1)) >> 13
    half = min(rounded - (112 << 10), 0x7BFF)
    # Below the least normal float16, adding 1/2 leaves a float32 whose last bits count steps of 2^-24.
    if size < 113 << 23:
        shifted = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5))
        half = shifted.view(np.uint32) & 0x7FF
    if size > 0x7F800000:
        half = 0x7E00
    return np.uint16(sign | half)


@compiled()
def _quantize_f16(weights, importance, out):
    bits, halves = weights.reshape(-1).view(np.uint32), out.reshape(-1).view(np.uint16)
    for i in range(bits.size):
        halves[i] = half_bits_of(bits[i])


@compiled()
def _dequantize_f16(data, out):
    _halves_to_float(data.reshape(-1).view(np.uint16), out.reshape(-1))


@intrinsic
def store_brains(typing_context, brains, i, value):
    """Write lanes rounded to bfloat16 as lanes number `i` of a contiguous uint16 array. NaN becomes quiet."""
    vector = ir.VectorType(ir.IntType(16), WIDTH)

    def lower(context, builder, sig, args):
        bits = builder.bitcast(args[2], _INTS)
        # Half a step less one, plus the last bit that stays, rounds ties to even.
        last = builder.and_(builder.lshr(bits, _constant(_INTS, 16)), _constant(_INTS, 1))
        rounded = builder.add(builder.add(bits, _constant(_INTS, 0x7FFF)), last)
        quiet = builder.or_(bits, _constant(_INTS, 0x400000))
        bits = builder.select(builder.fcmp_unordered("uno", args[2], args[2]), quiet, rounded)
        start = builder.mul(args[1], _index(WIDTH))
        place = _element(context, builder, sig.args[0], args[0], start, vector)
        builder.store(builder.trunc(builder.lshr(bits, _constant(_INTS, 16)), vector), place, align=2)
        return context.get_dummy_value()

    return types.void(brains, types.int64, value), lower


@register_jitable
def round_to_brains(values, brains):
    """float32 to the bits of bfloat16, uint16, as many as fill lanes."""
    for j in range(values.size // WIDTH):
        store_brains(brains, j, maximum(-BRAIN_MAX, minimum(BRAIN_MAX, load(values, j))))  # NaN stays


def _compile_bf16() -> Quantizer:
    sources = SOURCES

    @compiled()
    def quantize(weights, importance, out):
        sources  # noqa: B018
        values, brains = weights.reshape(-1), out.reshape(-1).view(np.uint16)
        round_to_brains(values, brains)
        rest = values.size % WIDTH
        if rest:
            last, rounded = np.zeros(WIDTH, np.float32), np.empty(WIDTH, np.uint16)
            last[:rest] = values[values.size - rest :]
            round_to_brains(last, rounded)
            brains[brains.size - rest :] = rounded[:rest]

    return quantize


@compiled()
def _dequantize_bf16(data, out):
    _brains_to_float(data.reshape(-1).view(np.uint16), out.reshape(-1))


F32 = Grid("F32", 0, 1, 4, _quantize_f32, _dequantize_f32)
F16 = Grid("F16", 1, 1, 2, _quantize_f16, _dequantize_f16)
BF16 = Grid("BF16", 30, 1, 2, _compile_bf16(), _dequantize_bf16)
