"""TQ1_0, TQ2_0: 256 weights, each -d, 0 or d, under one float16 scale d.

Layouts: `ggml-common.h` of llama.cpp. Meant for models trained to three levels (BitNet b1.58,
arXiv:2402.17764; TriLM), which any search leaves exact: their blocks get ggml's bytes. ggml takes the weight
largest in size for d, which rounds most of an ordinary model to zero; here d is fitted as in the other
formats.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import searched_grid
from llmcompress.grids.floats import read_half
from llmcompress.grids.kquants import pack_crumbs
from llmcompress.grids.lanes import absolute, fma, load, maximum, select, splat, store_bytes
from llmcompress.grids.legacy import encode_scaled, weigh, weigh_plain
from llmcompress.grids.rounding import divide, round_to_half, store_half

BLOCK = 256

# The weight largest in size over the scales tried.
TOPS = np.array([1.4, 3.2], np.float32)


@register_jitable
def trit_sums(x, w, cut):
    """The sums of w |x| and of w over the weights larger in size than `cut`, in two halves for speed."""
    none = splat(0.0)
    sum_x, sum_w, more_x, more_w = none, none, none, none
    for j in range(0, BLOCK, 2):
        size, more = absolute(load(x, j)), absolute(load(x, j + 1))
        counted, counted_more = select(size > cut, load(w, j), none), select(more > cut, load(w, j + 1), none)
        sum_x, more_x = fma(counted, size, sum_x), fma(counted_more, more, more_x)
        sum_w, more_w = sum_w + counted, more_w + counted_more
    return sum_x + more_x, sum_w + more_w


@register_jitable
def fit_trits(x, w, tops, rounds):
    """The d of x = d c with codes c of -1, 0 and 1. Weights beyond d / 2 are those with a code."""
    largest = splat(0.0)
    for j in range(BLOCK):
        largest = maximum(absolute(load(x, j)), largest)
    best_gain, best = splat(0.0), splat(0.0)
    for k in range(len(tops) + rounds):
        d = largest / tops[k] if k < len(tops) else best
        sum_x, sum_w = trit_sums(x, w, d * 0.5)
        fitted = divide(sum_x, sum_w)
        gain = fitted * sum_x
        better = gain > best_gain
        best_gain, best = select(better, gain, best_gain), select(better, fitted, best)
    return best


@register_jitable
def encode_trits(x, w, unit, search):
    """Turn x into codes 0, 1, 2, in place. Returns d."""
    tops, rounds = search
    d = round_to_half(fit_trits(x, w, tops, rounds) * unit)
    encode_scaled(x, d / unit, -1.0, 1.0)
    return d


@register_jitable
def pack_trits(codes, packed, i, first, run, count):
    """Byte i + j, j < run: codes first + j + run k, k < count, as digits of base 3 after the point.

    The first is the highest of five digits; the byte is 256 times their fraction, rounded up.
    """
    for j in range(run):
        number = splat(0.0)
        for k in range(5):
            digit = load(codes, first + j + run * k) if k < count else splat(0.0)
            number = fma(number, 3.0, digit)
        store_bytes(packed, i + j, fma(number, 256.0 / 243.0, 242.5 / 243.0))  # 0.5: clear of rounding


@register_jitable
def trit(byte, k):
    """Digit k after the point: times 3^k, what is left below 256 once more times 3."""
    power = (1, 3, 9, 27, 81)[k]
    return ((np.int32(byte) * power & 255) * 3) >> 8


@register_jitable
def unpack_trits(data, values, d, i, first, run, count):
    for k in range(count):
        for j in range(run):
            values[first + run * k + j] = np.float32(trit(data[i + j], k) - 1) * d


# bytes 0-31: codes 0-159, five to a byte | 32-47: 160-239, five | 48-51: 240-255, four | 52-53: d
@register_jitable
def encode_tq1_0(x, w, unit, parts, packed, search):
    d = encode_trits(x, w, unit, search)
    pack_trits(x, packed, 0, 0, 32, 5)
    pack_trits(x, packed, 32, 160, 16, 5)
    pack_trits(x, packed, 48, 240, 4, 4)
    store_half(packed, 52, d)


@register_jitable
def decode_tq1_0(data, values):
    d = read_half(data, 52)
    unpack_trits(data, values, d, 0, 0, 32, 5)
    unpack_trits(data, values, d, 32, 160, 16, 5)
    unpack_trits(data, values, d, 48, 240, 4, 4)


# bytes 0-63: codes | 64-65: d
@register_jitable
def encode_tq2_0(x, w, unit, parts, packed, search):
    d = encode_trits(x, w, unit, search)
    pack_crumbs(x, packed, 0)
    store_half(packed, 64, d)


@register_jitable
def decode_tq2_0(data, values):
    d = read_half(data, 64)
    for j in range(BLOCK):
        code = data[j // 128 * 32 + j % 32] >> (j % 128 // 32 * 2) & 3
        values[j] = np.float32(np.int32(code) - 1) * d


TQ1_0 = searched_grid("TQ1_0", 34, BLOCK, 54, weigh, weigh_plain, encode_tq1_0, decode_tq1_0, (TOPS,))
TQ2_0 = searched_grid("TQ2_0", 35, BLOCK, 66, weigh, weigh_plain, encode_tq2_0, decode_tq2_0, (TOPS,))
