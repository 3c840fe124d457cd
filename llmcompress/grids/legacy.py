"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights under one float16 scale, some with a float16 base.

Layouts: `ggml-common.h` of llama.cpp; d and m stand for scale and base, as there. With importance, errors are
weighed as llama.cpp weighs them, by importance times sqrt(mean square of the row + x^2); without, alike, and
but for `--effort best` the grid is laid over the range of the block as in `ranges`.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import compile_dequantizer, compile_plain_quantizer, searched_grid
from llmcompress.grids.floats import half_bits_of, read_half
from llmcompress.grids.grid import Grid
from llmcompress.grids.lanes import (
    absolute,
    fma,
    largest_lane,
    load,
    maximum,
    minimum,
    round_away,
    splat,
    sqrt,
    store,
    store_bytes,
    store_run,
)
from llmcompress.grids.ranges import compile_range_quantizer
from llmcompress.grids.rounding import divide, inverse_of, nearest_code, round_to_half, split_code, store_half
from llmcompress.grids.scale_search import fit_affine, fit_scaled

BLOCK = 32

# Chosen one by one, each the best company for those before, on blocks with importance (`tops` in scale_search).
TOPS_4 = np.array([-11.9, -9.5, -8.8, -8.4, -8.1, -7.8, -7.1, -6.9, -6.2, 7.4, 8.2, 9.3], np.float32)
TOPS_5 = np.array([-17.2, -16.6, -16.3, -16.0, -15.7, -15.3, -15.1, -14.7, -14.3, -14.0, -13.0], np.float32)
ENDS_4 = np.array([(a, b) for a in (-0.7, -0.2, 0.2, 0.6) for b in (14.5, 14.9, 15.3, 15.7)], np.float32)
ENDS_5 = np.array([(a, b) for a in (-0.7, -0.2, 0.2, 0.6) for b in (30.5, 30.9, 31.3, 31.7)], np.float32)
ANY_BASE = 1e30


@register_jitable
def weigh(x, w, row_energy):
    for j in range(len(x)):
        store(w, j, load(w, j) * sqrt(fma(load(x, j), load(x, j), row_energy)))


@register_jitable
def weigh_plain(x, w):
    for j in range(len(x)):
        store(w, j, splat(1.0))


@register_jitable
def encode_scaled(x, d, low, high):
    """Turn x into its codes less `low`, in place."""
    inverse = inverse_of(d)
    for j in range(len(x)):
        store(x, j, nearest_code(load(x, j) * inverse, low, high) - low)


@register_jitable
def encode_affine(x, d, m, high):
    """Turn x into its codes, in place."""
    inverse = divide(splat(1.0), d)
    for j in range(BLOCK):
        store(x, j, nearest_code((load(x, j) - m) * inverse, 0.0, high))


@register_jitable
def pack_low_bits(codes, packed, i):
    """Byte i + j, j < 16: code j in bits 0-3, code j + 16 in bits 4-7."""
    for j in range(16):
        store_bytes(packed, i + j, fma(load(codes, j + 16), 16.0, load(codes, j)))


@register_jitable
def pack_fifth_bits(codes, packed, i):
    """Byte i + k, k < 4: bit n is bit 4 of code 8 k + n. Leaves the low four bits in `codes`."""
    for k in range(4):
        byte = splat(0.0)
        for n in range(8):
            high, low = split_code(load(codes, 8 * k + n), 16.0)
            byte = fma(high, np.float32(1 << n), byte)
            store(codes, 8 * k + n, low)
        store_bytes(packed, i + k, byte)


@register_jitable
def low_bits(data, i, j):
    """The low four bits of code j."""
    return np.int32(data[i + j % 16] >> (j // 16 * 4) & 15)


@register_jitable
def fifth_bit(data, i, j):
    """Bit 4 of code j, in its place."""
    return np.int32((data[i + j // 8] >> (j % 8) & 1) << 4)


# bytes 0-1: d | 2-17: low bits
@register_jitable
def encode_q4_0(x, w, unit, parts, packed, search):
    tops, rounds = search
    d, _ = fit_scaled(x, w, 0, BLOCK, -8.0, 7.0, tops, rounds)
    d = round_to_half(d * unit)
    encode_scaled(x, d / unit, -8.0, 7.0)
    store_half(packed, 0, d)
    pack_low_bits(x, packed, 2)


@register_jitable
def decode_q4_0(data, values):
    d = read_half(data, 0)
    for j in range(BLOCK):
        values[j] = d * (np.float32(low_bits(data, 2, j)) - np.float32(8.0))


# bytes 0-1: d | 2-3: m | 4-19: low bits
@register_jitable
def encode_q4_1(x, w, unit, parts, packed, search):
    ends, rounds = search
    d, m, _ = fit_affine(x, w, 0, BLOCK, 15.0, ANY_BASE, ends, rounds)
    d, m = round_to_half(d * unit), round_to_half(m * unit)
    encode_affine(x, d / unit, m / unit, 15.0)
    store_half(packed, 0, d)
    store_half(packed, 2, m)
    pack_low_bits(x, packed, 4)


@register_jitable
def decode_q4_1(data, values):
    d, m = read_half(data, 0), read_half(data, 2)
    for j in range(BLOCK):
        values[j] = d * np.float32(low_bits(data, 4, j)) + m


# bytes 0-1: d | 2-5: fifth bits | 6-21: low bits
@register_jitable
def encode_q5_0(x, w, unit, parts, packed, search):
    tops, rounds = search
    d, _ = fit_scaled(x, w, 0, BLOCK, -16.0, 15.0, tops, rounds)
    d = round_to_half(d * unit)
    encode_scaled(x, d / unit, -16.0, 15.0)
    store_half(packed, 0, d)
    pack_fifth_bits(x, packed, 2)
    pack_low_bits(x, packed, 6)


@register_jitable
def decode_q5_0(data, values):
    d = read_half(data, 0)
    for j in range(BLOCK):
        values[j] = d * (np.float32(low_bits(data, 6, j) | fifth_bit(data, 2, j)) - np.float32(16.0))


# bytes 0-1: d | 2-3: m | 4-7: fifth bits | 8-23: low bits
@register_jitable
def encode_q5_1(x, w, unit, parts, packed, search):
    ends, rounds = search
    d, m, _ = fit_affine(x, w, 0, BLOCK, 31.0, ANY_BASE, ends, rounds)
    d, m = round_to_half(d * unit), round_to_half(m * unit)
    encode_affine(x, d / unit, m / unit, 31.0)
    store_half(packed, 0, d)
    store_half(packed, 2, m)
    pack_fifth_bits(x, packed, 4)
    pack_low_bits(x, packed, 8)


@register_jitable
def decode_q5_1(data, values):
    d, m = read_half(data, 0), read_half(data, 2)
    for j in range(BLOCK):
        values[j] = d * np.float32(low_bits(data, 8, j) | fifth_bit(data, 4, j)) + m


# bytes 0-1: d | 2-33: codes, int8
@register_jitable
def encode_q8_0(flat, number, data):
    """Block `number` of `flat`, ggml's bytes exactly: codes by the scale before it is rounded to float16.

    No importance changes a scale that the largest weight decides, and with nothing to search a
    block is done along its weights.
    """
    first, second = load(flat, 2 * number), load(flat, 2 * number + 1)
    d = largest_lane(maximum(absolute(first), absolute(second))) / np.float32(127.0)
    bits = half_bits_of(np.float32(d).view(np.uint32))
    step = d if d < np.float32(65520.0) else np.float32(65504.0)
    inverse = np.float32(1.0) / step if step > np.float32(0.0) else np.float32(0.0)
    data[0], data[1] = bits & 255, bits >> 8
    store_run(data, 2, minimum(maximum(round_away(first * inverse), -127.0), 127.0))
    store_run(data, 18, minimum(maximum(round_away(second * inverse), -127.0), 127.0))


@register_jitable
def decode_q8_0(data, values):
    d = read_half(data, 0)
    for j in range(BLOCK):
        values[j] = d * np.float32(np.int8(data[2 + j]))


def _grid(name, ggml_type, block_bytes, encode, decode, candidates, bits, with_base) -> Grid:
    plain = compile_range_quantizer(name, block_bytes, bits, with_base)
    sizes = (ggml_type, BLOCK, block_bytes)
    return searched_grid(name, *sizes, weigh, weigh_plain, encode, decode, (candidates,), plain=plain)


Q4_0 = _grid("Q4_0", 2, 18, encode_q4_0, decode_q4_0, TOPS_4, bits=4, with_base=False)
Q4_1 = _grid("Q4_1", 3, 20, encode_q4_1, decode_q4_1, ENDS_4, bits=4, with_base=True)
Q5_0 = _grid("Q5_0", 6, 22, encode_q5_0, decode_q5_0, TOPS_5, bits=5, with_base=False)
Q5_1 = _grid("Q5_1", 7, 24, encode_q5_1, decode_q5_1, ENDS_5, bits=5, with_base=True)
_quantize_q8_0 = compile_plain_quantizer("Q8_0", 34, encode_q8_0)
_dequantize_q8_0 = compile_dequantizer("Q8_0", BLOCK, 34, decode_q8_0)
Q8_0 = Grid("Q8_0", 8, BLOCK, 34, _quantize_q8_0, _dequantize_q8_0)
