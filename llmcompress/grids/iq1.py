"""IQ1_S and IQ1_M: eight weights at a time are one of 2048 words of codes -1, 0 and 1, all moved by 1/8.

weight = d scale (code + shift), where scale is odd, 1 to 15, and shift is 1/8 or -1/8; d in float16. IQ1_S
has a scale and a shift for 32 weights, IQ1_M a scale for 16 and a shift for 8. Layouts: `ggml-common.h` of
llama.cpp; gguf-py brings the words. Errors are weighed as llama.cpp weighs them with importance, but for
`temper`; without, IQ1_S (which llama.cpp refuses then) is weighed as with importance 1, IQ1_M as Q3_K is, see
`weigh_by_square`.

The word for eight weights is found from their nearest codes. Where these are no word, one or two of them go
to their second nearest, so that least is lost: a table tells which single changes lead to a word. Two
changes begin with the cheapest or the second cheapest of all: on normal weights that ends 0.2 % above
the error that trying every word leaves.
"""

from __future__ import annotations

import gguf
import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.block_loop import searched_grid
from llmcompress.grids.codebook_blocks import temper
from llmcompress.grids.floats import half_to_float, read_half
from llmcompress.grids.kquants import BLOCK, sum_of_squares, weigh_by_square, weigh_with_energy
from llmcompress.grids.lanes import (
    WIDTH,
    absolute,
    fma,
    half_bits,
    has_bit,
    load,
    maximum,
    minimum,
    pick,
    rint,
    select,
    splat,
    sqrt,
    store,
    store_bytes,
)
from llmcompress.grids.rounding import divide, inverse_of, nearest_code, round_to_half, split_code, store_half

GROUP = 8  # weights of a word
SHIFT = 0.125
ITSELF = 2 * GROUP  # the bit that tells of a word, see `_reach`
PLACES = 3 ** np.arange(GROUP)  # eight codes are a number in base 3, digits code + 1


def _words() -> np.ndarray:
    """The 2048 words, int64 `(2048, 8)`."""
    gguf.quants.IQ1_S.init_grid()
    return gguf.quants.IQ1_S.grid.reshape(-1, GROUP).astype(np.int64)


def _neighbours() -> np.ndarray:
    """For each number that with code k raised (column k) or lowered (8 + k), or -1; int64 `(6561, 16)`."""
    numbers = np.arange(3**GROUP)[:, None]
    digits = numbers // PLACES % 3
    raised, lowered = np.where(digits < 2, numbers + PLACES, -1), np.where(digits > 0, numbers - PLACES, -1)
    return np.concatenate([raised, lowered], axis=1)


def _reach(entries: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Bit k: raising code k makes a word; bit 8 + k: lowering does; bit 16: it is one."""
    leads = (neighbours >= 0) & (entries[neighbours] >= 0)
    return leads @ (1 << np.arange(2 * GROUP)) + ((entries >= 0) << ITSELF)


def _nearest(entries: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """The number of a word few changes away."""
    nearest = np.where(entries >= 0, np.arange(len(entries)), -1)
    while (nearest < 0).any():
        for column in neighbours.T:
            found = np.where(column >= 0, nearest[column], -1)
            nearest = np.where(nearest < 0, found, nearest)
    return nearest


WORDS = _words()
_NEIGHBOURS = _neighbours()
_ENTRIES = np.full(3**GROUP, -1)
_ENTRIES[(WORDS + 1) @ PLACES] = np.arange(len(WORDS))
ENTRY = _ENTRIES.astype(np.float32)  # which word a number is
REACH = _reach(_ENTRIES, _NEIGHBOURS).astype(np.float32)
NEAREST = _nearest(_ENTRIES, _NEIGHBOURS).astype(np.float32)
CODES = WORDS.astype(np.int8)
POWERS = PLACES.astype(np.float32)

# Where the search lays the largest weight of a sub-block, in steps; and the largest scale. Found by trial.
TOPS = np.array([1.05, 1.3, 1.6, 1.95, 2.4, 3.0], np.float32)
SCALE_TOPS = np.array([11.0, 12.0, 13.0, 14.0, 15.0, 16.0], np.float32)

# Least squares leaves weights of so few bits too small. With d a tenth larger the error is 5 % more, still
# under llama.cpp's (which enlarges d by as much), and the model gains: on a Llama of 6 M weights the KL
# divergence of IQ1_S falls from 0.149 to 0.12, that of IQ1_M with importance from 0.118 to 0.098.
ENLARGED = 1.1

NOTHING = 1e38  # the cost of what cannot be


@register_jitable
def shifted_sums(x, w, start, size, inverse, shift):
    """With the nearest codes, words or not, v = code + shift: the sums of w x v and w v^2."""
    sum_xv, sum_vv = splat(0.0), splat(0.0)
    for j in range(start, start + size):
        value = nearest_code(fma(load(x, j), inverse, -shift), -1.0, 1.0) + shift
        weighted = load(w, j) * value
        sum_xv, sum_vv = fma(weighted, load(x, j), sum_xv), fma(weighted, value, sum_vv)
    return sum_xv, sum_vv


@register_jitable
def loose_sums(x, w, start, size, span, step, shifts):
    """The same over a sub-block, with the better shift for each `span` of it, which goes to `shifts`."""
    inverse = inverse_of(step)
    sum_xv, sum_vv = splat(0.0), splat(0.0)
    for first in range(start, start + size, span):
        up_xv, up_vv = shifted_sums(x, w, first, span, inverse, splat(SHIFT))
        down_xv, down_vv = shifted_sums(x, w, first, span, inverse, splat(-SHIFT))
        up = 2.0 * (up_xv - down_xv) > step * (up_vv - down_vv)
        sum_xv, sum_vv = sum_xv + select(up, up_xv, down_xv), sum_vv + select(up, up_vv, down_vv)
        for group in range(first // GROUP, (first + span) // GROUP):
            store(shifts, group, select(up, SHIFT, -SHIFT))
    return sum_xv, sum_vv


@register_jitable
def turn_one(number, spent, turned, room, best, word):
    """Try the second nearest code for each weight but number `turned`; renews what is best and its number."""
    costs, places, turns = room[0], room[1], room[2]
    reach = pick(REACH, number)
    for k in range(GROUP):
        cost = select(absolute(turned - float(k)) > 0.5, spent + load(costs, k), NOTHING)
        cost = select(has_bit(reach, load(places, k)), cost, NOTHING)
        better = cost < best
        best, word = select(better, cost, best), select(better, number + load(turns, k), word)
    return best, word


@register_jitable
def find_word(x, w, first, inverse, shift, room):
    """The number of the word for eight weights from `first` on."""
    costs, places, turns = room[0], room[1], room[2]
    number, none = splat(0.0), splat(-1.0)
    least, least_at, least_turn = splat(NOTHING), none, none
    second, second_at, second_turn = splat(NOTHING), none, none
    for k in range(GROUP):
        value = fma(load(x, first + k), inverse, -shift)
        code = nearest_code(value, -1.0, 1.0)
        rest = value - code
        turn = select(absolute(code) > 0.5, -code, select(rest > 0.0, 1.0, -1.0))
        cost = load(w, first + k) * fma(turn * rest, -2.0, 1.0)
        number = fma(code + 1.0, POWERS[k], number)
        store(costs, k, cost)
        store(places, k, select(turn > 0.0, float(k), float(k + GROUP)))
        turn = turn * POWERS[k]
        store(turns, k, turn)
        first_one, one = cost < least, cost < second
        second = select(first_one, least, select(one, cost, second))
        second_at = select(first_one, least_at, select(one, float(k), second_at))
        second_turn = select(first_one, least_turn, select(one, turn, second_turn))
        least, least_at = select(first_one, cost, least), select(first_one, float(k), least_at)
        least_turn = select(first_one, turn, least_turn)
    best = select(has_bit(pick(REACH, number), ITSELF), 0.0, NOTHING)
    best, word = turn_one(number, splat(0.0), none, room, best, number)
    best, word = turn_one(number + least_turn, least, least_at, room, best, word)
    best, word = turn_one(number + second_turn, second, second_at, room, best, word)
    return pick(NEAREST, word)


@register_jitable
def word_sums(x, w, start, size, step, shifts, room):
    """With words for codes, v = code + shift: the sums of w x v and w v^2 over a sub-block."""
    inverse = inverse_of(step)
    sum_xv, sum_vv = splat(0.0), splat(0.0)
    for first in range(start, start + size, GROUP):
        shift = load(shifts, first // GROUP)
        digits = find_word(x, w, first, inverse, shift, room)
        for k in range(GROUP):
            later = rint(fma(digits, 1.0 / 3.0, -1.0 / 3.0))
            value = fma(later, -3.0, digits) - 1.0 + shift
            digits = later
            weighted = load(w, first + k) * value
            sum_xv, sum_vv = fma(weighted, load(x, first + k), sum_xv), fma(weighted, value, sum_vv)
    return sum_xv, sum_vv


@register_jitable
def fit_part(x, w, start, size, span, shifts, room, tops):
    """The step of a sub-block and its sum of w v^2; leaves the shifts of its groups in `shifts`."""
    largest = splat(0.0)
    for j in range(start, start + size):
        largest = maximum(absolute(load(x, j)), largest)
    best_gain, best = splat(-1.0), splat(0.0)
    for k in range(len(tops)):
        sum_xv, sum_vv = loose_sums(x, w, start, size, span, largest / tops[k], shifts)
        fitted = divide(sum_xv, sum_vv)
        better = fitted * sum_xv > best_gain
        best_gain, best = select(better, fitted * sum_xv, best_gain), select(better, fitted, best)
    loose_sums(x, w, start, size, span, best, shifts)
    sum_xv, sum_vv = word_sums(x, w, start, size, best, shifts, room)
    return maximum(divide(sum_xv, sum_vv), 0.0), sum_vv


@register_jitable
def odd_code(value):
    """The nearest of 1, 3 ... 15."""
    return fma(nearest_code(fma(value, 0.5, -0.5), 0.0, 7.0), 2.0, 1.0)


@register_jitable
def fit_scales(scales, weights, count, tops):
    """d of which the steps in `scales` are about odd multiples; makes them these."""
    largest = splat(0.0)
    for b in range(count):
        largest = maximum(load(scales, b), largest)
    best_gain, best = splat(-1.0), splat(0.0)
    for k in range(len(tops)):
        inverse = inverse_of(largest / tops[k])
        sum_xl, sum_ll = splat(0.0), splat(0.0)
        for b in range(count):
            code = odd_code(load(scales, b) * inverse)
            sum_xl = fma(load(weights, b) * code, load(scales, b), sum_xl)
            sum_ll = fma(load(weights, b) * code, code, sum_ll)
        d = divide(sum_xl, sum_ll)
        better = d * sum_xl > best_gain
        best_gain, best = select(better, d * sum_xl, best_gain), select(better, d, best)
    return best


@register_jitable
def refine_scales(x, w, scales, size, shifts, room, d):
    """Try the neighbours of every scale; returns d anew."""
    sum_aa, sum_xa = splat(0.0), splat(0.0)
    for b in range(BLOCK // size):
        best_gain, scale, best_vv, best_xv = splat(-NOTHING), load(scales, b), splat(0.0), splat(0.0)
        for change in (0.0, -2.0, 2.0):
            tried = minimum(maximum(load(scales, b) + change, 1.0), 15.0)
            step = d * tried
            sum_xv, sum_vv = word_sums(x, w, b * size, size, step, shifts, room)
            gain = step * (2.0 * sum_xv - step * sum_vv)
            better = gain > best_gain
            best_gain, scale = select(better, gain, best_gain), select(better, tried, scale)
            best_vv, best_xv = select(better, sum_vv, best_vv), select(better, sum_xv, best_xv)
        store(scales, b, scale)
        sum_aa, sum_xa = fma(scale * scale, best_vv, sum_aa), fma(scale, best_xv, sum_xa)
    return maximum(divide(sum_xa, sum_aa), 0.0)


@register_jitable
def encode_words(x, w, unit, parts, size, span, shifts, search):
    """Find d, scales 0 to 7 (`parts[0]`) and shifts; make row g of x the entries of group g. Returns d."""
    tops, scale_tops, rounds = search
    scales, weights, room = parts[0], parts[1], np.empty((3, GROUP, WIDTH), np.float32)
    count = BLOCK // size
    for b in range(count):
        step, curvature = fit_part(x, w, b * size, size, span, shifts, room, tops)
        store(scales, b, step)
        store(weights, b, curvature)
    d = round_to_half(fit_scales(scales, weights, count, scale_tops) * unit)
    inverse = inverse_of(d / unit)
    for b in range(count):
        store(scales, b, odd_code(load(scales, b) * inverse))
    for _ in range(rounds):
        d = round_to_half(refine_scales(x, w, scales, size, shifts, room, d / unit) * unit)
    for first in range(0, BLOCK, GROUP):
        inverse = inverse_of(d / unit * load(scales, first // size))
        word = find_word(x, w, first, inverse, load(shifts, first // GROUP), room)
        store(x, first // GROUP, pick(ENTRY, word))
    for b in range(count):
        store(scales, b, fma(load(scales, b), 0.5, -0.5))
    return round_to_half(d * ENLARGED)


@register_jitable
def is_down(shifts, group):
    return select(load(shifts, group) < 0.0, 1.0, 0.0)


# bytes 0-1: d | 2-33: bits 0-7 of the entries of groups | 34-49: eight uint16, for 32 weights each:
# bits 3 k to 3 k + 2: bits 8-10 of entry k | 12-14: scale | 15: the shift is down
@register_jitable
def encode_iq1_s(x, w, unit, parts, packed, search):
    shifts = np.empty((32, WIDTH), np.float32)
    d = encode_words(x, w, unit, parts, 32, 32, shifts, search)
    store_half(packed, 0, d)
    for b in range(8):
        word = fma(is_down(shifts, 4 * b), 32768.0, load(parts[0], b) * 4096.0)
        for k in range(4):
            high, low = split_code(load(x, 4 * b + k), 256.0)
            store_bytes(packed, 2 + 4 * b + k, low)
            word = fma(high, np.float32(1 << 3 * k), word)
        high, low = split_code(word, 256.0)
        store_bytes(packed, 34 + 2 * b, low)
        store_bytes(packed, 35 + 2 * b, high)


@register_jitable
def decode_iq1_s(data, values):
    d = read_half(data, 0)
    for b in range(8):
        word = np.int32(data[34 + 2 * b]) | np.int32(data[35 + 2 * b]) << 8
        step = d * np.float32(2 * (word >> 12 & 7) + 1)
        shift = np.float32(-SHIFT if word >> 15 else SHIFT)
        for k in range(4):
            entry = data[2 + 4 * b + k] | (word >> 3 * k & 7) << 8
            for j in range(GROUP):
                values[32 * b + 8 * k + j] = step * (np.float32(CODES[entry, j]) + shift)


# bytes 0-31: bits 0-7 of the entries of groups | 32-47: for groups 2 i and 2 i + 1, in four bits each:
# bits 8-10 of the entry, and whether the shift is down | 48-55: four uint16, q-th: scale 4 q + k in
# bits 3 k to 3 k + 2, k < 4, and in bits 12-15 bits 4 q to 4 q + 3 of d
@register_jitable
def encode_iq1_m(x, w, unit, parts, packed, search):
    shifts = np.empty((32, WIDTH), np.float32)
    rest = half_bits(encode_words(x, w, unit, parts, 16, 8, shifts, search))
    for i in range(16):
        byte = splat(0.0)
        for k in range(2):
            high, low = split_code(load(x, 2 * i + k), 256.0)
            store_bytes(packed, 2 * i + k, low)
            byte = fma(fma(is_down(shifts, 2 * i + k), 8.0, high), np.float32(1 << 4 * k), byte)
        store_bytes(packed, 32 + i, byte)
    for q in range(4):
        rest, nibble = split_code(rest, 16.0)
        word = nibble * 4096.0
        for k in range(4):
            word = fma(load(parts[0], 4 * q + k), np.float32(1 << 3 * k), word)
        high, low = split_code(word, 256.0)
        store_bytes(packed, 48 + 2 * q, low)
        store_bytes(packed, 49 + 2 * q, high)


@register_jitable
def decode_iq1_m(data, values):
    bits = np.uint32(0)
    for q in range(4):
        bits |= np.uint32(data[49 + 2 * q] >> 4) << 4 * q
    d = half_to_float(bits)
    for i in range(16):
        word = np.int32(data[48 + i // 4 * 2]) | np.int32(data[49 + i // 4 * 2]) << 8
        step = d * np.float32(2 * (word >> i % 4 * 3 & 7) + 1)
        for k in range(2):
            high = data[32 + i] >> 4 * k
            entry = data[2 * i + k] | (high & 7) << 8
            shift = np.float32(-SHIFT if high & 8 else SHIFT)
            for j in range(GROUP):
                values[16 * i + 8 * k + j] = step * (np.float32(CODES[entry, j]) + shift)


@register_jitable
def weigh(x, w, row_energy):
    """w = importance sqrt(2 mean square of the block + x^2), importance tempered."""
    temper(w)
    weigh_with_energy(x, w, sum_of_squares(x, 0, BLOCK) / 128.0)


@register_jitable
def weigh_evenly(x, w):
    """As with importance 1."""
    energy = sum_of_squares(x, 0, BLOCK) / 128.0
    for j in range(BLOCK):
        store(w, j, sqrt(fma(load(x, j), load(x, j), energy)))


CANDIDATES = (TOPS, SCALE_TOPS)
CANDIDATES_M = (TOPS[1:], SCALE_TOPS)  # the smallest gains IQ1_M too little for its time
IQ1_S = searched_grid("IQ1_S", 19, BLOCK, 50, weigh, weigh_evenly, encode_iq1_s, decode_iq1_s, CANDIDATES)
IQ1_M = searched_grid(
    "IQ1_M", 29, BLOCK, 56, weigh, weigh_by_square, encode_iq1_m, decode_iq1_m, CANDIDATES_M
)
