"""MXFP4, NVFP4: weights as four-bit floats (E2M1) under a scale that is a float of eight bits.

E2M1 has the sizes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 (OCP Microscaling Formats v1.0). MXFP4: 32 weights under
a power of two (E8M0). NVFP4: four times 16 weights, each under an E4M3 without a sign; ggml's has no
scale for the whole tensor. Layouts: `ggml-common.h` of llama.cpp. ggml derives the scale from the weight
largest in size; here its neighbours are tried too, and the one with the least error is kept.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import searched_grid
from llmcompress.grids.lanes import (
    absolute,
    ceil,
    fma,
    leading_bits,
    load,
    maximum,
    minimum,
    power_of_two,
    select,
    splat,
    store,
    store_bytes,
)
from llmcompress.grids.legacy import low_bits, pack_low_bits, weigh, weigh_plain
from llmcompress.grids.rounding import inverse_of
from llmcompress.grids.scale_search import extent

BLOCK_MX, BLOCK_NV, SIZE_NV = 32, 64, 16

DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)

# Powers of two over that of the largest weight, ggml's first; and the largest weight over the scale.
STEPS_MX = np.array([0.25, 0.5, 0.125], np.float32)
TOPS_NV = np.array([3.6, 4.0, 4.4, 4.8, 5.2, 5.6, 6.0, 6.4, 6.8, 7.4], np.float32)
LEAST_E4M3, MOST_E4M3 = 2.0**-9, 448.0


@register_jitable
def nearest_size(value):
    """The nearest of E2M1's sizes; the smaller one of two that are as near, as in ggml."""
    size = minimum(absolute(value), 6.0)
    spacing = power_of_two(maximum(size, 1.0)) * 0.5
    return ceil(size / spacing - 0.5) * spacing


@register_jitable
def encode_sizes(x, start, size, step):
    """Turn x into its codes, in place."""
    inverse = inverse_of(step)
    for j in range(start, start + size):
        nearest = nearest_size(load(x, j) * inverse)
        code = minimum(minimum(nearest + nearest, nearest + 2.0), fma(nearest, 0.5, 4.0))
        store(x, j, select(load(x, j) < 0.0, select(nearest > 0.0, code + 8.0, code), code))


@register_jitable
def fit_gain(x, w, start, size, step):
    """By how much steps of this size lower the weighted squared error below that of zeros."""
    inverse = inverse_of(step)
    gain = splat(0.0)
    for j in range(start, start + size):
        nearest = nearest_size(load(x, j) * inverse) * step
        gain = fma(load(w, j) * nearest, absolute(load(x, j)) * 2.0 - nearest, gain)
    return gain


# byte 0: exponent of the scale + 127 | 1-16: codes
@register_jitable
def encode_mxfp4(x, w, unit, parts, packed):
    best_gain, best = splat(-1.0), splat(0.0)
    for k in range(len(STEPS_MX)):
        step = maximum(STEPS_MX[k], 2.0**-127 / unit)
        gain = fit_gain(x, w, 0, BLOCK_MX, step)
        better = gain > best_gain
        best_gain, best = select(better, gain, best_gain), select(better, step, best)
    encode_sizes(x, 0, BLOCK_MX, best)
    store_bytes(packed, 0, leading_bits(unit, 23) + leading_bits(best, 23) - 127.0)
    pack_low_bits(x, packed, 1)


@register_jitable
def decode_mxfp4(data, values):
    exponent = np.int32(data[0])
    bits = (exponent - 1) << 23 if exponent > 1 else 0x00200000 << exponent
    d = np.uint32(bits).view(np.float32)
    for j in range(BLOCK_MX):
        values[j] = DOUBLED[low_bits(data, 1, j)] * d


@register_jitable
def round_to_e4m3(value):
    """The nearest E4M3 of those from 2^-9 to 448; ties to even."""
    value = minimum(maximum(value, LEAST_E4M3), MOST_E4M3)
    # Adding 2^20 times the leading bit leaves four bits, or steps of 2^-9 below the least normal one.
    shift = power_of_two(maximum(value, 2.0**-6)) * 2.0**20
    return (value + shift) - shift


@register_jitable
def e4m3_bits(value):
    return select(value < 2.0**-6, value * 512.0, leading_bits(value, 20) - 960.0)


@register_jitable
def fit_e4m3(x, w, start, unit, tops):
    """The scale of 16 weights, in the units of the source."""
    least, most = extent(x, start, SIZE_NV)
    largest = maximum(most, -least) * unit
    best_gain, best = splat(0.0), splat(0.0)
    for k in range(len(tops)):
        d = round_to_e4m3(largest / tops[k])
        gain = fit_gain(x, w, start, SIZE_NV, d / unit)
        better = gain > best_gain
        best_gain, best = select(better, gain, best_gain), select(better, d, best)
    return best


# bytes 0-3: scales | 4 + 8 b + j, j < 8: codes 16 b + j (bits 0-3) and 16 b + 8 + j (bits 4-7)
@register_jitable
def encode_nvfp4(x, w, unit, parts, packed, search):
    tops, _ = search
    for b in range(BLOCK_NV // SIZE_NV):
        d = fit_e4m3(x, w, b * SIZE_NV, unit, tops)
        store_bytes(packed, b, e4m3_bits(d))
        encode_sizes(x, b * SIZE_NV, SIZE_NV, d / unit)
        for j in range(8):
            low, high = load(x, b * SIZE_NV + j), load(x, b * SIZE_NV + 8 + j)
            store_bytes(packed, 4 + 8 * b + j, fma(high, 16.0, low))


@register_jitable
def read_e4m3_halved(data, i):
    """Half the scale in byte i, whose highest bit does not count; 0x7F is zero."""
    bits = np.int32(data[i])
    exponent, fraction = bits >> 3 & 15, bits & 7
    if bits == 0x7F:
        return np.float32(0.0)
    if exponent == 0:
        return np.float32(fraction) * np.float32(2.0**-10)
    return np.uint32(((exponent + 119) << 23) | (fraction << 20)).view(np.float32)


@register_jitable
def decode_nvfp4(data, values):
    for b in range(BLOCK_NV // SIZE_NV):
        d = read_e4m3_halved(data, b)
        for j in range(SIZE_NV):
            code = data[4 + 8 * b + j % 8] >> (j // 8 * 4) & 15
            values[SIZE_NV * b + j] = DOUBLED[code] * d


MXFP4 = searched_grid("MXFP4", 39, BLOCK_MX, 17, weigh, weigh_plain, encode_mxfp4, decode_mxfp4)
NVFP4 = searched_grid("NVFP4", 40, BLOCK_NV, 36, weigh, weigh_plain, encode_nvfp4, decode_nvfp4, (TOPS_NV,))
