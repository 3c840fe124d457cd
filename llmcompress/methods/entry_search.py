"""The search for the entry of a codebook, and the signs, of the least error, given all other weights; compiled.

That error is (x - v) S (x - v)ᵀ for the weights x wanted and v = step x signs x entry. Signs are those of the weights
wanted; where they must be even in number and are not, one is turned that then costs least. Of these signs all entries
are tried, sixteen at a time.

A code is an entry in the low bits, and above them the signs, set where a weight is negative.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from llmcompress.grids.code_bits import entry_bits
from llmcompress.grids.codebook import Codebook
from llmcompress.grids.compiled import compiled
from llmcompress.grids.lanes import WIDTH, fma, load, select, splat, store

FOUR = 4  # lanes of entries whose costs are added up side by side
LARGEST = np.float32(1e30)


class Book(NamedTuple):
    """entries: float32 (entries, 4 or 8). terms: float32 (entries / 16, terms, 16), what costs are linear in: levels, and
    products of two. bits: of an entry's number. even: whether of eight signs an even number is negative."""

    entries: np.ndarray
    terms: np.ndarray
    bits: int
    even: bool


class Scratch(NamedTuple):
    """linear: S x. signs: those tried, 1 and -1. old: signs x entry as it was. least: for each lane the least cost, and the
    sixteen entries it is among."""

    linear: np.ndarray
    signs: np.ndarray
    old: np.ndarray
    factors: np.ndarray
    least: np.ndarray


def tables_of(book: Codebook) -> Book:
    entries = book.entries
    return Book(entries, _terms(entries.tobytes(), entries.shape[1]), entry_bits(book), book.even)


@functools.lru_cache(maxsize=8)
def _terms(entries: bytes, size: int) -> np.ndarray:
    table = np.frombuffer(entries, np.float32).reshape(-1, size)
    terms = [table[:, i] for i in range(size)]
    terms += [table[:, i] * table[:, j] for i in range(size) for j in range(i, size)]
    return np.ascontiguousarray(np.stack(terms).reshape(len(terms), -1, WIDTH).transpose(1, 0, 2))


@compiled(fastmath=True, error_model="numpy")
def scratch_for(book):
    size, terms = book.entries.shape[1], book.terms.shape[1]
    return Scratch(
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(terms, np.float32),
        np.empty((2, WIDTH), np.float32),
    )


@compiled(fastmath=True, error_model="numpy")
def _search(square, step, book, scratch):
    """The entry of the least step² v S v - 2 step v·linear, and that."""
    linear, signs, factors, terms = scratch.linear, scratch.signs, scratch.factors, book.terms
    size = k = len(linear)
    for i in range(size):
        factors[i] = np.float32(-2) * step * signs[i] * linear[i]
        for j in range(i, size):
            double = np.float32(1) if i == j else np.float32(2)
            factors[k] = double * step * step * signs[i] * signs[j] * square[i, j]
            k += 1
    count, least, which = terms.shape[1], splat(1e30), splat(0.0)
    for chunk in range(0, len(terms), FOUR):
        a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for k in range(count):
            factor, at = factors[k], chunk * count + k
            a, b = fma(load(terms, at), factor, a), fma(load(terms, at + count), factor, b)
            at += 2 * count
            c, d = fma(load(terms, at), factor, c), fma(load(terms, at + count), factor, d)
        first, second = a < b, c < d
        a, b = select(first, a, b), select(first, splat(0.0), splat(1.0))
        c, d = select(second, c, d), select(second, splat(2.0), splat(3.0))
        first = a < c
        a, b = select(first, a, c), select(first, b, d) + np.float32(chunk)
        better = a < least
        least, which = select(better, a, least), select(better, b, which)
    store(scratch.least, 0, least)
    store(scratch.least, 1, which)
    found = 0
    for lane in range(1, WIDTH):
        if scratch.least[0, lane] < scratch.least[0, found]:
            found = lane
    return WIDTH * int(scratch.least[1, found]) + found, scratch.least[0, found]


@compiled(fastmath=True, error_model="numpy")
def choose(square, step, odd, book, scratch):
    """The best entry and its cost; `scratch.signs` become its. odd: 1 and 0 for an odd and even number of negative ones,
    -1 for any."""
    linear, signs, entries = scratch.linear, scratch.signs, book.entries
    size, negative = len(linear), 0
    for i in range(size):
        negative += signs[i] < np.float32(0)
    n, cost = _search(square, step, book, scratch)
    if odd < 0 or negative % 2 == odd:
        return n, cost
    turned, least = 0, np.float32(np.inf)
    for i in range(size):
        pull = linear[i]
        for j in range(size):
            pull -= step * square[i, j] * signs[j] * entries[n, j]
        change = np.float32(-2) * step * signs[i] * entries[n, i]
        rise = change * (change * square[i, i] - np.float32(2) * pull)
        if rise < least:
            turned, least = i, rise
    signs[turned] = -signs[turned]
    return _search(square, step, book, scratch)


@compiled(fastmath=True, error_model="numpy")
def code_of(n, signs, bits):
    code = n
    for i in range(len(signs)):
        code |= int(signs[i] < np.float32(0)) << (bits + i)
    return code


@compiled(fastmath=True, error_model="numpy")
def count_signs(code, bits):
    count, signs = 0, code >> bits
    while signs:
        count += signs & 1
        signs >>= 1
    return count


@compiled(fastmath=True, error_model="numpy")
def parity_of(codes, group, book):
    """What `odd` is for a group of a row of `codes`, the other groups as they are."""
    if not book.even:
        return -1
    return 0 if book.entries.shape[1] == 8 else count_signs(codes[group ^ 1], book.bits) % 2


@compiled(fastmath=True, error_model="numpy")
def want(pull, square, start, held, code, book, scratch):
    """Fill `scratch` for columns of which `code` on the step `held` is now; returns how much they lower e H e as they are,
    and what of it is squared."""
    entries, size = book.entries, len(scratch.linear)
    n, before = code & ((1 << book.bits) - 1), np.float32(0)
    for i in range(size):
        sign = np.float32(-1) if code >> (book.bits + i) & 1 else np.float32(1)
        scratch.old[i] = sign * entries[n, i]
    for i in range(size):
        within = np.float32(0)
        for j in range(size):
            within += held * square[i, j] * scratch.old[j]
        scratch.linear[i] = pull[start + i] + within
        before += held * scratch.old[i] * (within - np.float32(2) * scratch.linear[i])
    return before


@compiled(fastmath=True, error_model="numpy")
def take_signs_wanted(pull, square, start, held, step, scratch):
    for i in range(len(scratch.signs)):
        wanted = step * (held * scratch.old[i] + pull[start + i] / square[i, i])
        scratch.signs[i] = np.float32(-1) if wanted < np.float32(0) else np.float32(1)


@compiled(fastmath=True, error_model="numpy")
def propose(pull, hessian, start, held, step, code, odd, book, scratch):
    """The best code, on `step`, of the columns from `start` on, where `code` on the step `held` is now; by how much it
    changes the error; and what rounding in that is of the order of. `pull` is a row's.

    Of the signs that the weights wanted have, or, where that does not help, of those it has."""
    size = book.entries.shape[1]
    square = hessian[start : start + size, start : start + size]
    before = want(pull, square, start, held, code, book, scratch)
    take_signs_wanted(pull, square, start, held, step, scratch)
    n, cost = choose(square, step, odd, book, scratch)
    least, best = cost - before, code_of(n, scratch.signs, book.bits)
    if least >= np.float32(0) and best >> book.bits != code >> book.bits:
        for i in range(size):
            scratch.signs[i] = np.float32(-1) if scratch.old[i] < np.float32(0) else np.float32(1)
        n, cost = choose(square, step, odd, book, scratch)
        if cost - before < least:
            least, best = cost - before, code_of(n, scratch.signs, book.bits)
    return best, least, before


@compiled(fastmath=True, error_model="numpy")
def weight(code, i, book):
    """Sign times entry of weight i."""
    level = book.entries[code & ((1 << book.bits) - 1), i]
    return -level if code >> (book.bits + i) & 1 else level


@compiled(fastmath=True, error_model="numpy")
def move(pull, hessian, start, held, code, step, chosen, book):
    """Let a row's `pull` follow from one step and code to another."""
    for i in range(book.entries.shape[1]):
        change = step * weight(chosen, i, book) - held * weight(code, i, book)
        for j in range(len(pull)):
            pull[j] -= change * hessian[start + i, j]
