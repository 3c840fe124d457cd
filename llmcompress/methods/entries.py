"""The loops of gptq.py for codebooks, compiled: four or eight columns at a time get the entry and the signs of the least error.

That error is (x - v) S (x - v)ᵀ for the weights x wanted and v = step x signs x entry: S is what is left of H for
these columns, those behind them free, in the sweep, and their block of H in the descent. Signs are those of the weights
wanted; where they must be even in number and are not, one is turned that then costs least. Of these signs all entries
are tried.
"""

from __future__ import annotations

import functools

import numpy as np

from llmcompress.grids.code_bits import entry_bits
from llmcompress.grids.codebook import Codebook
from llmcompress.grids.compiled import compiled

FOUR = 4  # terms of a cost that are added at a time


@functools.lru_cache(maxsize=8)
def _by_name(entries: bytes, size: int) -> np.ndarray:
    table = np.frombuffer(entries, np.float32).reshape(-1, size)
    terms = [table[:, i] for i in range(size)]
    terms += [table[:, i] * table[:, j] for i in range(size) for j in range(i, size)]
    terms += [np.zeros(len(table), np.float32)] * (-len(terms) % FOUR)
    return np.ascontiguousarray(terms)


def book_tables(book: Codebook) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Entries, float32 (entries, size); what costs are linear in, float32 (terms, entries): levels, and products of
    two; the bits of an entry's number; and whether signs are even."""
    return book.entries, _by_name(book.entries.tobytes(), book.entries.shape[1]), entry_bits(book), book.even


@compiled(fastmath=True, error_model="numpy")
def _search(linear, square, step, signs, terms, factors, costs):
    """The entry of the least step² v S v - 2 step v·linear, and that."""
    size, k = len(linear), len(linear)
    for i in range(size):
        factors[i] = np.float32(-2) * step * signs[i] * linear[i]
        for j in range(i, size):
            double = np.float32(1) if i == j else np.float32(2)
            factors[k] = double * step * step * signs[i] * signs[j] * square[i, j]
            k += 1
    factors[k:] = np.float32(0)
    costs[:] = np.float32(0)
    for k in range(0, len(terms), FOUR):
        a, b, c, d = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        for n in range(len(costs)):
            costs[n] += a * terms[k, n] + b * terms[k + 1, n] + c * terms[k + 2, n] + d * terms[k + 3, n]
    found = 0
    for n in range(len(costs)):
        if costs[n] < costs[found]:
            found = n
    return found, costs[found]


@compiled(fastmath=True, error_model="numpy")
def _choose(linear, square, step, signs, odd, entries, terms, factors, costs):
    """The best entry; `signs` become its. odd: 1 and 0 for an odd and even number of negative ones, -1 for any."""
    size, negative = len(linear), 0
    for i in range(size):
        negative += signs[i] < np.float32(0)
    n, cost = _search(linear, square, step, signs, terms, factors, costs)
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
    return _search(linear, square, step, signs, terms, factors, costs)


@compiled(fastmath=True, error_model="numpy")
def _code(n, signs, bits):
    code = n
    for i in range(len(signs)):
        code |= int(signs[i] < np.float32(0)) << (bits + i)
    return code


@compiled(fastmath=True, error_model="numpy")
def _count_signs(code, bits):
    count, signs = 0, code >> bits
    while signs:
        count += signs & 1
        signs >>= 1
    return count


@compiled(fastmath=True, error_model="numpy")
def sweep_entries(left, scale, entries, terms, bits, even, squares, factor, codes, errors):
    """As `sweep` of columns.py; `left` is used up. squares: (groups, size, size), S of each; codes: (rows, groups)."""
    rows, columns = left.shape
    size = entries.shape[1]
    linear, signs = np.empty(size, np.float32), np.empty(size, np.float32)
    factors, costs = np.empty(len(terms), np.float32), np.empty(len(entries), np.float32)
    for row in range(rows):
        for group in range(columns // size):
            start, square, step = group * size, squares[group], scale[row, group * size]
            turn = np.float32(-1) if step < np.float32(0) else np.float32(1)
            for i in range(size):
                signs[i] = -turn if left[row, start + i] < np.float32(0) else turn
                linear[i] = np.float32(0)
                for j in range(size):
                    linear[i] += square[i, j] * left[row, start + j]
            odd = -1
            if even and (group + 1) * size % 8 == 0:
                odd = 0 if size == 8 else _count_signs(codes[row, group - 1], bits) % 2
            n, _ = _choose(linear, square, step, signs, odd, entries, terms, factors, costs)
            codes[row, group] = _code(n, signs, bits)
            for i in range(size):
                j = start + i
                error = (left[row, j] - step * signs[i] * entries[n, i]) / factor[j, j]
                errors[row, j] = error
                for behind in range(j + 1, columns):
                    left[row, behind] -= error * factor[j, behind]


@compiled(fastmath=True, error_model="numpy")
def _propose(pull, hessian, start, step, code, odd, entries, terms, bits, linear, signs, old, factors, costs):
    """The best code of the columns from `start` on, and by how much it changes the error. `pull` is a row's.

    Of the signs that the weights wanted have, or, where that does not help, of those it has."""
    size, mask = entries.shape[1], (1 << bits) - 1
    square, before = hessian[start : start + size, start : start + size], np.float32(0)
    for i in range(size):
        sign = np.float32(-1) if code >> (bits + i) & 1 else np.float32(1)
        old[i] = sign * entries[code & mask, i]
    for i in range(size):
        within = np.float32(0)
        for j in range(size):
            within += step * square[i, j] * old[j]
        linear[i] = pull[start + i] + within
        before += step * old[i] * (within - np.float32(2) * linear[i])
        wanted = step * (step * old[i] + pull[start + i] / square[i, i])
        signs[i] = np.float32(-1) if wanted < np.float32(0) else np.float32(1)
    n, cost = _choose(linear, square, step, signs, odd, entries, terms, factors, costs)
    least, best = cost - before, _code(n, signs, bits)
    if least >= np.float32(0) and best >> bits != code >> bits:
        for i in range(size):
            signs[i] = np.float32(-1) if old[i] < np.float32(0) else np.float32(1)
        n, cost = _choose(linear, square, step, signs, odd, entries, terms, factors, costs)
        if cost - before < least:
            least, best = cost - before, _code(n, signs, bits)
    return best, least, before


@compiled(fastmath=True, error_model="numpy")
def _move(pull, hessian, start, step, code, chosen, entries, bits):
    """Let a row's `pull` follow from one code to another."""
    mask = (1 << bits) - 1
    for i in range(entries.shape[1]):
        old = -entries[code & mask, i] if code >> (bits + i) & 1 else entries[code & mask, i]
        new = -entries[chosen & mask, i] if chosen >> (bits + i) & 1 else entries[chosen & mask, i]
        change = step * (new - old)
        for j in range(len(pull)):
            pull[j] -= change * hessian[start + i, j]


@compiled(fastmath=True, error_model="numpy")
def descend_entries(pull, hessian, codes, scale, entries, terms, bits, even, order, rounds):
    """As `descend` of columns.py; `order` is of groups.

    Where two groups share a set of even signs, a group also tries the other parity, if its neighbour gains by it too."""
    rows, columns = pull.shape
    size = entries.shape[1]
    linear, signs, old = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    factors, costs, tried = (
        np.empty(len(terms), np.float32),
        np.empty(len(entries), np.float32),
        np.empty(columns, np.float32),
    )
    for row in range(rows):
        for _ in range(rounds):
            moved = False
            for group in order:
                start, step, code = group * size, scale[row, group * size], codes[row, group]
                if step == np.float32(0):
                    continue
                odd, other = -1, group ^ 1
                if even:
                    odd = 0 if size == 8 else _count_signs(codes[row, other], bits) % 2
                chosen, change, before = _propose(
                    pull[row],
                    hessian,
                    start,
                    step,
                    code,
                    odd,
                    entries,
                    terms,
                    bits,
                    linear,
                    signs,
                    old,
                    factors,
                    costs,
                )
                enough = np.float32(-1e-6) * abs(before)
                if even and size == 4:
                    turned, alone, _ = _propose(
                        pull[row],
                        hessian,
                        start,
                        step,
                        code,
                        1 - odd,
                        entries,
                        terms,
                        bits,
                        linear,
                        signs,
                        old,
                        factors,
                        costs,
                    )
                    tried[:] = pull[row]
                    _move(tried, hessian, start, step, code, turned, entries, bits)
                    partner, more, _ = _propose(
                        tried,
                        hessian,
                        other * size,
                        step,
                        codes[row, other],
                        _count_signs(turned, bits) % 2,
                        entries,
                        terms,
                        bits,
                        linear,
                        signs,
                        old,
                        factors,
                        costs,
                    )
                    if alone + more < min(change, enough):
                        _move(tried, hessian, other * size, step, codes[row, other], partner, entries, bits)
                        pull[row, :] = tried
                        codes[row, group], codes[row, other], moved = turned, partner, True
                        continue
                if chosen != code and change < enough:
                    _move(pull[row], hessian, start, step, code, chosen, entries, bits)
                    codes[row, group], moved = chosen, True
            if not moved:
                break
