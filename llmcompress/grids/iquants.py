"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: 256 weights, four or eight at a time from a codebook.

weight = sign d (2 scale + 1) level; d in float16, scales of sub-blocks 0..15. Layouts: `ggml-common.h` of
llama.cpp. Errors are weighed as in llama.cpp's `quantize_row_*`, but for `temper`; IQ2_XXS and IQ2_XS, which
it refuses to make without importance, then as with importance 1.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import searched_grid
from llmcompress.grids.codebook import decode_entry, read_codebook, whole_signs
from llmcompress.grids.codebook_blocks import BLOCK, fit_entries, temper
from llmcompress.grids.codebook_search import compile_search
from llmcompress.grids.floats import read_half
from llmcompress.grids.grid import Grid
from llmcompress.grids.kquants import sum_of_squares, weigh_with_energy
from llmcompress.grids.lanes import WIDTH, fma, load, splat, store
from llmcompress.grids.rounding import store_half

# Least squares leaves weights of few bits too small. A larger d spends some of the lead over llama.cpp in
# weighted error, and the model gains: on a Llama of 6 M weights the KL divergence of IQ2_XXS falls by a
# fifth, that of IQ3_XXS by a tenth.
BOOK_2_XXS = read_codebook("IQ2_XXS", 8, even=True, shrink=0.95, enlarge=1.05, tries=4)
BOOK_2_XS = read_codebook("IQ2_XS", 8, even=True, shrink=0.95, enlarge=1.045, tries=6)
BOOK_2_S = read_codebook("IQ2_S", 8, even=False, shrink=0.95, enlarge=1.04, tries=2)
BOOK_3_XXS = read_codebook("IQ3_XXS", 4, even=True, shrink=0.95, enlarge=1.015, tries=4)
BOOK_3_S = read_codebook("IQ3_S", 1, even=False, shrink=1.0, enlarge=1.02, tries=2)

search_2_xxs, search_2_xs, search_2_s = map(compile_search, (BOOK_2_XXS, BOOK_2_XS, BOOK_2_S))
search_3_xxs, search_3_s = compile_search(BOOK_3_XXS), compile_search(BOOK_3_S)

# Steps that are tried, over the root mean square of a sub-block; d, over the largest step. Found by trial.
TRIALS_2 = np.array([0.2, 0.25, 0.3, 0.36, 0.43, 0.5], np.float32)
TRIALS_3 = np.array([0.07, 0.09, 0.11, 0.13, 0.16, 0.2], np.float32)
SCALE_TRIALS = (1 / np.array([28.5, 29.5, 30.2, 31.0, 31.6])).astype(np.float32)


@register_jitable
def weigh(x, w, row_energy):
    """w = importance sqrt(2 mean square of the block + x^2), importance tempered."""
    temper(w)
    weigh_with_energy(x, w, sum_of_squares(x, 0, BLOCK) / 128.0)


@register_jitable
def weigh_2(x, w, row_energy):
    """w = importance sqrt(mean square of the block + x^2), importance tempered."""
    temper(w)
    weigh_with_energy(x, w, sum_of_squares(x, 0, BLOCK) / 256.0)


@register_jitable
def weigh_evenly(x, w):
    """w = sqrt(mean square of the block + x^2)."""
    for j in range(BLOCK):
        store(w, j, splat(1.0))
    weigh_with_energy(x, w, sum_of_squares(x, 0, BLOCK) / 256.0)


@register_jitable
def weigh_iq2_s(x, w):
    """w = half the mean square of the block + x^2."""
    energy = sum_of_squares(x, 0, BLOCK) / 512.0
    for j in range(BLOCK):
        store(w, j, fma(load(x, j), load(x, j), energy))


@register_jitable
def weigh_iq3(x, w):
    """w = a quarter of the mean square of the block + x^2.

    llama.cpp weighs by x^2 alone, which leaves small weights to themselves (see kquants.py); the
    error stays below llama.cpp's by that measure too.
    """
    energy = sum_of_squares(x, 0, BLOCK) / 1024.0
    for j in range(BLOCK):
        store(w, j, fma(load(x, j), load(x, j), energy))


@register_jitable
def odd_step(d, scale):
    return d * (np.float32(2.0) * np.float32(scale) + np.float32(1.0))


@register_jitable
def nibble(data, i, b):
    """Number b of those in bytes i and on, the low half of a byte first."""
    return data[i + b // 2] >> (b % 2 * 4) & 15


@register_jitable
def pack_nibbles(scales, packed, i):
    for b in range(len(scales) // 2):
        for lane in range(WIDTH):
            packed[i + b, lane] = scales[2 * b, lane] | scales[2 * b + 1, lane] << 4


@register_jitable
def pack_signs_and_scale(signs, scales, packed, i, b, lane):
    """Bytes i to i + 3: four times seven signs from bit 0 on, the scale in bits 28-31."""
    word = scales[b, lane] << 28
    for k in range(4):
        word |= (signs[4 * b + k, lane] & 127) << (7 * k)
    for k in range(4):
        packed[i + k, lane] = word >> (8 * k) & 255


@register_jitable
def read_word(data, i):
    word = np.int64(0)
    for k in range(4):
        word |= np.int64(data[i + k]) << (8 * k)
    return word


# bytes 0-1: d | 2 + 8 b, b < 8: four entries, then signs and scale
@register_jitable
def encode_iq2_xxs(x, w, unit, parts, packed, effort):
    d, entries, signs, scales = fit_entries(x, w, unit, parts, 32, BOOK_2_XXS, search_2_xxs, effort)
    store_half(packed, 0, d)
    for lane in range(WIDTH):
        for g in range(32):
            packed[2 + g // 4 * 8 + g % 4, lane] = entries[g, lane]
        for b in range(8):
            pack_signs_and_scale(signs, scales, packed, 6 + 8 * b, b, lane)


@register_jitable
def decode_iq2_xxs(data, values):
    d = read_half(data, 0)
    for b in range(8):
        word = read_word(data, 6 + 8 * b)
        step = odd_step(d, word >> 28)
        for k in range(4):
            entry, signs = BOOK_2_XXS.entries[data[2 + 8 * b + k]], whole_signs(word >> (7 * k) & 127)
            decode_entry(entry, signs, step, values, 32 * b + 8 * k)


# bytes 0-1: d | 2 + 2 g, g < 32: entry in bits 0-8, seven signs in bits 9-15 | 66-73: scales
@register_jitable
def encode_iq2_xs(x, w, unit, parts, packed, effort):
    d, entries, signs, scales = fit_entries(x, w, unit, parts, 16, BOOK_2_XS, search_2_xs, effort)
    store_half(packed, 0, d)
    for g in range(32):
        for lane in range(WIDTH):
            word = entries[g, lane] | (signs[g, lane] & 127) << 9
            packed[2 + 2 * g, lane], packed[3 + 2 * g, lane] = word & 255, word >> 8
    pack_nibbles(scales, packed, 66)


@register_jitable
def decode_iq2_xs(data, values):
    d = read_half(data, 0)
    for g in range(32):
        word = np.int64(data[2 + 2 * g]) | np.int64(data[3 + 2 * g]) << 8
        step = odd_step(d, nibble(data, 66, g // 2))
        decode_entry(BOOK_2_XS.entries[word & 511], whole_signs(word >> 9), step, values, 8 * g)


# bytes 0-1: d | 2-33: bits 0-7 of entries | 34-65: signs | 66-73: bits 8-9, four to a byte | 74-81: scales
@register_jitable
def encode_iq2_s(x, w, unit, parts, packed, effort):
    d, entries, signs, scales = fit_entries(x, w, unit, parts, 16, BOOK_2_S, search_2_s, effort)
    store_half(packed, 0, d)
    packed[66:74] = 0
    for g in range(32):
        for lane in range(WIDTH):
            packed[2 + g, lane] = entries[g, lane] & 255
            packed[34 + g, lane] = signs[g, lane]
            packed[66 + g // 4, lane] |= entries[g, lane] >> 8 << (g % 4 * 2)
    pack_nibbles(scales, packed, 74)


@register_jitable
def decode_iq2_s(data, values):
    d = read_half(data, 0)
    for g in range(32):
        index = np.int64(data[2 + g]) | (np.int64(data[66 + g // 4]) >> (g % 4 * 2) & 3) << 8
        step = odd_step(d, nibble(data, 74, g // 2))
        decode_entry(BOOK_2_S.entries[index], np.int64(data[34 + g]), step, values, 8 * g)


# bytes 0-1: d | 2-65: entries | 66 + 4 b, b < 8: signs and scale
@register_jitable
def encode_iq3_xxs(x, w, unit, parts, packed, effort):
    d, entries, signs, scales = fit_entries(x, w, unit, parts, 32, BOOK_3_XXS, search_3_xxs, effort)
    store_half(packed, 0, d)
    for lane in range(WIDTH):
        for g in range(64):
            packed[2 + g, lane] = entries[g, lane]
        for b in range(8):
            pack_signs_and_scale(signs, scales, packed, 66 + 4 * b, b, lane)


@register_jitable
def decode_iq3_xxs(data, values):
    d = read_half(data, 0)
    for b in range(8):
        word = read_word(data, 66 + 4 * b)
        step = odd_step(d, word >> 28)
        for k in range(8):
            signs = whole_signs(word >> (k // 2 * 7) & 127) >> (k % 2 * 4)
            decode_entry(BOOK_3_XXS.entries[data[2 + 8 * b + k]], signs, step, values, 32 * b + 4 * k)


# bytes 0-1: d | 2-65: bits 0-7 of entries | 66-73: bit 8, eight to a byte | 74-105: signs | 106-109: scales
@register_jitable
def encode_iq3_s(x, w, unit, parts, packed, effort):
    d, entries, signs, scales = fit_entries(x, w, unit, parts, 32, BOOK_3_S, search_3_s, effort)
    store_half(packed, 0, d)
    packed[66:74] = 0
    for lane in range(WIDTH):
        for g in range(64):
            packed[2 + g, lane] = entries[g, lane] & 255
            packed[66 + g // 8, lane] |= entries[g, lane] >> 8 << g % 8
        for i in range(32):
            packed[74 + i, lane] = signs[i, lane]
    pack_nibbles(scales, packed, 106)


@register_jitable
def decode_iq3_s(data, values):
    d = read_half(data, 0)
    for g in range(64):
        index = np.int64(data[2 + g]) | (np.int64(data[66 + g // 8]) >> g % 8 & 1) << 8
        step = odd_step(d, nibble(data, 106, g // 8))
        signs = np.int64(data[74 + g // 2]) >> (g % 2 * 4)
        decode_entry(BOOK_3_S.entries[index], signs, step, values, 4 * g)


def _grid(name: str, ggml_type: int, block_bytes: int, *functions, trials: np.ndarray) -> Grid:
    return searched_grid(name, ggml_type, BLOCK, block_bytes, *functions, (trials, SCALE_TRIALS))


IQ2_XXS = _grid("IQ2_XXS", 16, 66, weigh_2, weigh_evenly, encode_iq2_xxs, decode_iq2_xxs, trials=TRIALS_2)
IQ2_XS = _grid("IQ2_XS", 17, 74, weigh_2, weigh_evenly, encode_iq2_xs, decode_iq2_xs, trials=TRIALS_2)
IQ2_S = _grid("IQ2_S", 22, 82, weigh, weigh_iq2_s, encode_iq2_s, decode_iq2_s, trials=TRIALS_2)
IQ3_XXS = _grid("IQ3_XXS", 18, 98, weigh, weigh_iq3, encode_iq3_xxs, decode_iq3_xxs, trials=TRIALS_3)
IQ3_S = _grid("IQ3_S", 21, 110, weigh, weigh_iq3, encode_iq3_s, decode_iq3_s, trials=TRIALS_3)
