"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights with one scale, or a scale and a minimum, in float16.

Layouts: `ggml-common.h` of llama.cpp. Weight j of a block sits in the low half of byte j, weight j + 16 in the
high half. Errors are weighed as llama.cpp does with an importance matrix, importance
times sqrt(mean square of the row + x^2), and all alike without one.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import register_jitable

from llmcompress.grids.block_loop import (
    clamped_rint,
    compile_quantizer,
    divide,
    round_to_half,
    store_half,
)
from llmcompress.grids.floats import half_to_float
from llmcompress.grids.grid import Grid
from llmcompress.grids.lanes import absolute, fma, load, select, splat, sqrt, store, store_bytes
from llmcompress.grids.scale_search import fit_affine, fit_scale

BLOCK = 32
ROUNDS = 2
TOPS_4 = np.array([-8.7, -8.35, -8.0, -7.65, -7.3, 7.0, 7.3, 7.7, 8.1], np.float32)
TOPS_5 = np.array([-16.7, -16.2, -15.8, -15.3, 15.0, 15.4, 15.8], np.float32)
TOPS_15 = np.array([[0.0, 14.5], [0.0, 15.0], [0.0, 15.5]], np.float32)
TOPS_31 = np.array([[0.0, 30.2], [0.0, 30.6], [0.0, 31.0], [0.0, 31.4]], np.float32)


@register_jitable
def weigh(x, w, row_mean_square):
    for j in range(BLOCK):
        store(w, j, load(w, j) * sqrt(fma(load(x, j), load(x, j), row_mean_square)))


@register_jitable
def weigh_plain(x, w):
    for j in range(BLOCK):
        store(w, j, splat(1.0))


@register_jitable
def encode_scaled(x, d, low, high):
    """Turn x into codes of x = d (l + low), l from 0 on, in place."""
    inverse = select(absolute(d) > 0.0, 1.0 / d, 0.0)
    for j in range(BLOCK):
        store(x, j, clamped_rint(load(x, j) * inverse, low, high) - low)


@register_jitable
def encode_affine(x, d, m, high):
    """Turn x into codes of x = d l + m, in place."""
    inverse = divide(splat(1.0), d)
    for j in range(BLOCK):
        store(x, j, clamped_rint((load(x, j) - m) * inverse, 0.0, high))


@register_jitable
def pack_halves(codes, packed, i):
    """byte j: weight j in bits 0-3, weight j + 16 in bits 4-7."""
    for j in range(16):
        store_bytes(packed, i + j, fma(load(codes, j + 16), 16.0, load(codes, j)))


@register_jitable
def pack_fifth_bits(codes, packed, i):
    """byte k: bit n is bit 4 of weight 8 k + n. Leaves the low four bits in `codes`."""
    for k in range(4):
        byte = splat(0.0)
        for n in range(8):
            code = load(codes, 8 * k + n)
            high = code > 15.0
            byte = select(high, byte + np.float32(1 << n), byte)
            store(codes, 8 * k + n, select(high, code - 16.0, code))
        store_bytes(packed, i + k, byte)


# d: 2 bytes | halves: 16 bytes
@register_jitable
def encode_q4_0(x, w, unit, packed):
    d, _ = fit_scale(x, w, 0, BLOCK, -8.0, 7.0, TOPS_4, ROUNDS)
    half = round_to_half(d * unit)
    encode_scaled(x, half / unit, -8.0, 7.0)
    store_half(packed, 0, half)
    pack_halves(x, packed, 2)


# d: 2 bytes | minimum: 2 bytes | halves: 16 bytes
@register_jitable
def encode_q4_1(x, w, unit, packed):
    d, m, _ = fit_affine(x, w, 0, BLOCK, 15.0, 1e30, TOPS_15, ROUNDS)
    half, half_m = round_to_half(d * unit), round_to_half(m * unit)
    encode_affine(x, half / unit, half_m / unit, 15.0)
    store_half(packed, 0, half)
    store_half(packed, 2, half_m)
    pack_halves(x, packed, 4)


# d: 2 bytes | fifth bits: 4 bytes | halves: 16 bytes
@register_jitable
def encode_q5_0(x, w, unit, packed):
    d, _ = fit_scale(x, w, 0, BLOCK, -16.0, 15.0, TOPS_5, ROUNDS)
    half = round_to_half(d * unit)
    encode_scaled(x, half / unit, -16.0, 15.0)
    store_half(packed, 0, half)
    pack_fifth_bits(x, packed, 2)
    pack_halves(x, packed, 6)


# d: 2 bytes | minimum: 2 bytes | fifth bits: 4 bytes | halves: 16 bytes
@register_jitable
def encode_q5_1(x, w, unit, packed):
    d, m, _ = fit_affine(x, w, 0, BLOCK, 31.0, 1e30, TOPS_31, ROUNDS)
    half, half_m = round_to_half(d * unit), round_to_half(m * unit)
    encode_affine(x, half / unit, half_m / unit, 31.0)
    store_half(packed, 0, half)
    store_half(packed, 2, half_m)
    pack_fifth_bits(x, packed, 4)
    pack_halves(x, packed, 8)


@njit(cache=True, nogil=True, error_model="numpy")
def dequantize_q4_0(data, out):
    blocks, values = data.reshape(-1, 18), out.reshape(-1, BLOCK)
    for b in range(len(blocks)):
        d = half_to_float(blocks[b, 0], blocks[b, 1])
        for j in range(16):
            values[b, j] = d * np.float32(np.int32(blocks[b, 2 + j] & 15) - np.int32(8))
            values[b, j + 16] = d * np.float32(np.int32(blocks[b, 2 + j] >> 4) - np.int32(8))


@njit(cache=True, nogil=True, error_model="numpy")
def dequantize_q4_1(data, out):
    blocks, values = data.reshape(-1, 20), out.reshape(-1, BLOCK)
    for b in range(len(blocks)):
        d, m = half_to_float(blocks[b, 0], blocks[b, 1]), half_to_float(blocks[b, 2], blocks[b, 3])
        for j in range(16):
            values[b, j] = d * np.float32(blocks[b, 4 + j] & 15) + m
            values[b, j + 16] = d * np.float32(blocks[b, 4 + j] >> 4) + m


Q4_0 = Grid("Q4_0", 2, BLOCK, 18, compile_quantizer(BLOCK, 18, weigh, weigh_plain, encode_q4_0), dequantize_q4_0)
Q4_1 = Grid("Q4_1", 3, BLOCK, 20, compile_quantizer(BLOCK, 20, weigh, weigh_plain, encode_q4_1), dequantize_q4_1)
Q5_0 = Grid("Q5_0", 6, BLOCK, 22, compile_quantizer(BLOCK, 22, weigh, weigh_plain, encode_q5_0), dequantize_q4_1)
Q5_1 = Grid("Q5_1", 7, BLOCK, 24, compile_quantizer(BLOCK, 24, weigh, weigh_plain, encode_q5_1), dequantize_q4_1)
