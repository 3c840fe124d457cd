"""Codebooks: the magnitudes of four or eight weights are an entry of a table, their signs stand beside it.

In half of the formats signs come in sets of eight of which an even number is negative. Where it is odd
(`odds` holds 1 for such sets, else 0), one weight gets the wrong sign: the one that then costs least.

Levels are the magnitudes that entries are made of; digits number them. A half of an entry has the
number of its digits, first digit the least, and an entry the code `halves * first + second`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gguf import quants
from numba.extending import register_jitable

from llmcompress.grids.lanes import absolute, fma, load, minimum, select, splat, store
from llmcompress.grids.rounding import split_code


class Codebook(NamedTuple):
    """The entries of a format, in its order and by their halves."""

    entries: np.ndarray  # float32 (entries, 4 or 8)
    levels: np.ndarray  # float32 (3 or 8,), all but the last evenly spaced
    pairs: np.ndarray  # int64 (entries, 2): the halves of each
    indices: np.ndarray  # int16 (halves * halves,): the entry with this code
    even: bool  # whether signs come in even sets
    shrink: float  # the best step over what it were if every combination of levels were an entry, about
    enlarge: float  # d as it is stored over that of least squares
    tries: int  # scales tried for a sub-block in each round


def read_codebook(name: str, unit: int, even: bool, shrink: float, enlarge: float, tries: int) -> Codebook:
    """The codebook of ggml's type `name`, from gguf-py; `unit` is what counts as 1 there."""
    table = getattr(quants, name)
    table.init_grid()
    entries, levels = table.grid.reshape(table.grid_shape), np.array(table.grid_map)
    places = len(levels) ** np.arange(entries.shape[1] // 2)
    pairs = np.searchsorted(levels, entries).reshape(len(entries), 2, -1) @ places
    halves = len(levels) ** len(places)
    indices = np.zeros(halves * halves, np.int16)
    indices[pairs @ [halves, 1]] = np.arange(len(entries))
    entries, levels = (entries / unit).astype(np.float32), (levels / unit).astype(np.float32)
    return Codebook(entries, levels, pairs, indices, even, shrink, enlarge, tries)


@register_jitable
def level_of(book, digit):
    top = len(book.levels) - 1
    rise = book.levels[1] - book.levels[0]
    beyond = book.levels[top] - (book.levels[0] + np.float32(top) * rise)
    return fma(digit, rise, splat(book.levels[0])) + select(digit > top - 0.5, splat(beyond), splat(0.0))


@register_jitable
def entry_levels(book, code, levels, first):
    """Write the levels of an entry as rows `first` to `first + size`."""
    half = book.entries.shape[1] // 2
    base = np.float32(len(book.levels))
    left, right = split_code(code, base**half)
    for k in range(half):
        left, digit = split_code(left, base)
        store(levels, first + k, level_of(book, digit))
        right, digit = split_code(right, base)
        store(levels, first + half + k, level_of(book, digit))


@register_jitable
def levels_of_eight(book, codes, j, levels):
    """Write the levels of weights j to j + 8 as rows 0 to 8."""
    size = book.entries.shape[1]
    for first in range(0, 8, size):
        entry_levels(book, load(codes, (j + first) // size), levels, first)


@register_jitable
def sums_of_eight(x, w, odds, j, book, codes, levels):
    """With l the levels of weights j to j + 8: the sums of w |x| l, a wrong sign counted, and of w l^2."""
    levels_of_eight(book, codes, j, levels)
    sum_xl, sum_ll, least = splat(0.0), splat(0.0), splat(1e38)
    for k in range(8):
        weighted = load(w, j + k) * load(levels, k)
        product = weighted * absolute(load(x, j + k))
        sum_xl, sum_ll = sum_xl + product, fma(weighted, load(levels, k), sum_ll)
        least = minimum(product, least)
    if book.even:
        sum_xl = fma(load(odds, j // 8) * least, splat(-2.0), sum_xl)
    return sum_xl, sum_ll


@register_jitable
def sign_byte(x, w, odds, j, book, codes, levels):
    """Bit k is set where weight j + k is negative, or has the wrong sign."""
    levels_of_eight(book, codes, j, levels)
    byte, least, change = splat(0.0), splat(1e38), splat(0.0)
    for k in range(8):
        value, bit = load(x, j + k), splat(1 << k)
        negative = select(value < 0.0, bit, splat(0.0))
        product = load(w, j + k) * load(levels, k) * absolute(value)
        change = select(product < least, bit - 2.0 * negative, change)
        byte, least = byte + negative, minimum(product, least)
    return fma(change, load(odds, j // 8), byte) if book.even else byte


@register_jitable
def mark_odd_sets(x, odds):
    for i in range(len(x) // 8):
        count = splat(0.0)
        for j in range(8 * i, 8 * i + 8):
            count = count + select(load(x, j) < 0.0, splat(1.0), splat(0.0))
        store(odds, i, split_code(count, 2.0)[1])


@register_jitable
def whole_signs(seven):
    """The bits of eight signs from the first seven: an even number is set."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    return seven | ((parity ^ parity >> 1) & 1) << 7


@register_jitable
def decode_entry(entry, signs, step, values, first):
    """Write the weights of an entry; bit k of `signs` is set where weight k is negative."""
    for k in range(len(entry)):
        value = step * entry[k]
        values[first + k] = -value if signs >> k & 1 else value
