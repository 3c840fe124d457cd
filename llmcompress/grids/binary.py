"""Q1_0, Q2_0: one or two bits a weight under a float16 scale d, for models trained that way.

Q1_0: 128 weights, each -d or d. Q2_0: 64 weights, each -d, 0, d or 2 d, where d may be negative.
Layouts: `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import searched_grid
from llmcompress.grids.floats import read_half
from llmcompress.grids.lanes import absolute, fma, load, select, splat, store_bytes
from llmcompress.grids.legacy import weigh, weigh_plain
from llmcompress.grids.rounding import divide, inverse_of, nearest_code, round_to_half, store_half
from llmcompress.grids.scale_search import fit_scaled

BLOCK_1, BLOCK_2 = 128, 64

# The codes of Q2_0, not whole, that the weight largest in size is laid upon. The first leaves weights of
# three levels exact.
TOPS = np.array([-1.4, 2.2, -2.2], np.float32)


# bytes 0-1: d | 2-17: bit n of byte 2 + k is set where weight 8 k + n is not negative
@register_jitable
def encode_q1_0(x, w, unit, parts, packed):
    """Without importance, ggml's bytes: the mean size of the weights is their best scale."""
    sum_w, sum_x = splat(0.0), splat(0.0)
    for j in range(BLOCK_1):
        sum_w, sum_x = sum_w + load(w, j), fma(load(w, j), absolute(load(x, j)), sum_x)
    store_half(packed, 0, round_to_half(divide(sum_x, sum_w) * unit))
    for k in range(BLOCK_1 // 8):
        byte = splat(255.0)
        for n in range(8):
            byte = byte - select(load(x, 8 * k + n) < 0.0, splat(np.float32(1 << n)), splat(0.0))
        store_bytes(packed, 2 + k, byte)


@register_jitable
def decode_q1_0(data, values):
    d = read_half(data, 0)
    for j in range(BLOCK_1):
        values[j] = d if data[2 + j // 8] >> (j % 8) & 1 else -d


# bytes 0-1: d | 2-17: codes + 1, four to a byte, the first in bits 0-1
@register_jitable
def encode_q2_0(x, w, unit, parts, packed, search):
    tops, rounds = search
    d, _ = fit_scaled(x, w, 0, BLOCK_2, -1.0, 2.0, tops, rounds)
    d = round_to_half(d * unit)
    store_half(packed, 0, d)
    inverse = inverse_of(d / unit)
    for k in range(BLOCK_2 // 4):
        byte = splat(85.0)  # codes of zero
        for n in range(4):
            byte = fma(nearest_code(load(x, 4 * k + n) * inverse, -1.0, 2.0), np.float32(1 << (2 * n)), byte)
        store_bytes(packed, 2 + k, byte)


@register_jitable
def decode_q2_0(data, values):
    d = read_half(data, 0)
    for j in range(BLOCK_2):
        code = data[2 + j // 4] >> (j % 4 * 2) & 3
        values[j] = np.float32(np.int32(code) - 1) * d


Q1_0 = searched_grid("Q1_0", 41, BLOCK_1, 18, weigh, weigh_plain, encode_q1_0, decode_q1_0)
Q2_0 = searched_grid("Q2_0", 42, BLOCK_2, 18, weigh, weigh_plain, encode_q2_0, decode_q2_0, (TOPS,))
