"""The loops of gptq.py for codebooks, compiled: four or eight columns at a time get an entry and signs (entry_search.py).

What counts is, in the sweep, what is left of H for these columns, those behind them free; after it, their block of H.
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.lanes import WIDTH, fma, load, minimum, splat, store
from llmcompress.methods.entry_search import (
    LARGEST,
    choose,
    code_of,
    count_signs,
    move,
    parity_of,
    propose,
    scratch_for,
    take_signs_wanted,
    want,
    weight,
)

OTHERS = 4  # codes of a group beside its own that pairs are made of
NOISE = np.float32(1e-6)


@compiled(fastmath=True, error_model="numpy")
def sweep_entries(left, scale, book, squares, factor, codes, errors):
    """As `sweep` of columns.py; `left` is used up. squares: (groups, size, size), what counts; codes: (rows, groups)."""
    rows, columns = left.shape
    size, scratch = book.entries.shape[1], scratch_for(book)
    linear, signs = scratch.linear, scratch.signs
    for row in range(rows):
        for group in range(columns // size):
            start, square, step = group * size, squares[group], scale[row, group * size]
            turn = np.float32(-1) if step < np.float32(0) else np.float32(1)
            for i in range(size):
                signs[i] = -turn if left[row, start + i] < np.float32(0) else turn
                linear[i] = np.float32(0)
                for j in range(size):
                    linear[i] += square[i, j] * left[row, start + j]
            odd = parity_of(codes[row], group, book) if (group + 1) * size % 8 == 0 else -1
            n, _ = choose(square, step, odd, book, scratch)
            codes[row, group] = code_of(n, signs, book.bits)
            for i in range(size):
                j = start + i
                error = (left[row, j] - step * signs[i] * book.entries[n, i]) / factor[j, j]
                errors[row, j] = error
                for behind in range(j + 1, columns):
                    left[row, behind] -= error * factor[j, behind]


@compiled(fastmath=True, error_model="numpy")
def descend_entries(pull, hessian, codes, scale, book, order, rounds):
    """As `descend` of columns.py; `order` is of groups.

    Where two groups share a set of even signs, a group also tries the other parity, if its neighbour gains by it too."""
    rows, columns = pull.shape
    size, scratch, tried = book.entries.shape[1], scratch_for(book), np.empty(columns, np.float32)
    for row in range(rows):
        for _ in range(rounds):
            moved = False
            for group in order:
                start, step, code = group * size, scale[row, group * size], codes[row, group]
                if step == np.float32(0):
                    continue
                odd, other = parity_of(codes[row], group, book), group ^ 1
                chosen, change, before = propose(
                    pull[row], hessian, start, step, step, code, odd, book, scratch
                )
                enough = -NOISE * abs(before)
                if book.even and size == 4:
                    turned, alone, _ = propose(
                        pull[row], hessian, start, step, step, code, 1 - odd, book, scratch
                    )
                    tried[:] = pull[row]
                    move(tried, hessian, start, step, code, step, turned, book)
                    odd, held = count_signs(turned, book.bits) % 2, codes[row, other]
                    partner, more, _ = propose(
                        tried, hessian, other * size, step, step, held, odd, book, scratch
                    )
                    if alone + more < min(change, enough):
                        move(tried, hessian, other * size, step, held, step, partner, book)
                        pull[row, :] = tried
                        codes[row, group], codes[row, other], moved = turned, partner, True
                        continue
                if chosen != code and change < enough:
                    move(pull[row], hessian, start, step, code, step, chosen, book)
                    codes[row, group], moved = chosen, True
            if not moved:
                break


@compiled(fastmath=True, error_model="numpy")
def rescale_entries(pull, hessian, codes, scale, slope, numbers, least, most, book):
    """Move the number of a run of columns to the next, all of whose codes follow, wherever that lowers the error.

    numbers: int32 (rows, runs), in least..most. slope: float32 (rows, runs), what the run's scale rises by per unit."""
    rows, columns = pull.shape
    size, scratch, tried = book.entries.shape[1], scratch_for(book), np.empty(columns, np.float32)
    groups = columns // numbers.shape[1] // size
    found = np.empty(groups, codes.dtype)
    for row in range(rows):
        for run in range(numbers.shape[1]):
            first = run * groups
            for direction in (-1, 1):
                number = numbers[row, run] + direction
                held = scale[row, first * size]
                step = held + np.float32(direction) * slope[row, run]
                if number < least or number > most or step * held <= np.float32(0):
                    continue
                tried[:], found[:] = pull[row], codes[row, first : first + groups]
                total, enough = np.float32(0), np.float32(0)
                for again in range(2):
                    for g in range(groups):
                        start, now = (first + g) * size, step if again else held
                        odd = parity_of(found, g, book)
                        code, change, before = propose(
                            tried, hessian, start, now, step, found[g], odd, book, scratch
                        )
                        if again and not change < np.float32(0):
                            continue
                        move(tried, hessian, start, now, found[g], step, code, book)
                        found[g], total, enough = code, total + change, enough - NOISE * abs(before)
                if total < enough:
                    pull[row], codes[row, first : first + groups] = tried, found
                    numbers[row, run], scale[row, first * size : (first + groups) * size] = number, step
                    break


@compiled(fastmath=True, error_model="numpy")
def pair_entries(pull, hessian, by_place, codes, scale, book):
    """Give two groups other codes wherever that lowers the error and one alone does not.

    by_place: `hessian`, its columns sorted by their place in a group. Groups are a multiple of 16."""
    rows, columns = pull.shape
    size, scratch = book.entries.shape[1], scratch_for(book)
    groups = columns // size
    lanes = groups // WIDTH
    others = np.empty((OTHERS, groups), codes.dtype)
    alone = np.empty((OTHERS, groups), np.float32)  # what each changes the error by
    double = np.empty((OTHERS, size, groups), np.float32)  # twice what it changes the weights by
    enough, shift = np.empty(groups, np.float32), np.empty((size, groups), np.float32)
    best = np.empty((1, WIDTH), np.float32)
    for row in range(rows):
        for g in range(groups):
            _list_others(
                pull[row], hessian, g, codes[row], scale[row], book, scratch, others, alone, double, enough
            )
        for g in range(groups):
            for t in range(OTHERS):
                own = alone[t, g]
                if own >= LARGEST:
                    continue
                shift[:] = np.float32(0)
                _shift(by_place, g, double[t, :, g], shift)
                least = splat(0.0)
                for k in range(g // WIDTH, lanes):
                    for u in range(OTHERS):
                        change = load(alone, u * lanes + k)
                        for i in range(size):
                            change = fma(
                                load(double, (u * size + i) * lanes + k), load(shift, i * lanes + k), change
                            )
                        least = minimum(least, change)
                store(best, 0, least)
                lowest = np.float32(0)
                for lane in range(WIDTH):
                    lowest = min(lowest, best[0, lane])
                if not own + lowest < enough[g]:
                    continue
                partner, which, lowest = g, 0, np.float32(0)
                for other in range(g // WIDTH * WIDTH, groups):
                    for u in range(OTHERS):
                        change = alone[u, other]
                        for i in range(size):
                            change += double[u, i, other] * shift[i, other]
                        if change < lowest and other != g:
                            partner, which, lowest = other, u, change
                if partner == g or not own + lowest < enough[g]:
                    continue
                _shift(by_place, partner, double[which, :, partner], shift)
                for u in range(OTHERS):
                    for i in range(size):
                        for other in range(groups):
                            alone[u, other] += double[u, i, other] * shift[i, other]
                for group, code in ((g, others[t, g]), (partner, others[which, partner])):
                    step = scale[row, group * size]
                    move(pull[row], hessian, group * size, step, codes[row, group], step, code, book)
                    codes[row, group] = code
                for group in (g, partner):
                    _list_others(
                        pull[row],
                        hessian,
                        group,
                        codes[row],
                        scale[row],
                        book,
                        scratch,
                        others,
                        alone,
                        double,
                        enough,
                    )
                break


@compiled(fastmath=True, error_model="numpy")
def _shift(by_place, group, double, shift):
    """Add what the pull falls by if a group moves."""
    size, groups = shift.shape
    flat = shift.reshape(-1)
    for i in range(size):
        change = np.float32(0.5) * double[i]
        for j in range(len(flat)):
            flat[j] += change * by_place[group * size + i, j]


@compiled(fastmath=True, error_model="numpy")
def _list_others(pull, hessian, group, codes, scale, book, scratch, others, alone, double, enough):
    """The best codes of a group beside the one it has, as `pair_entries` knows them; where there are fewer, LARGEST."""
    size, code, step = book.entries.shape[1], codes[group], scale[group * book.entries.shape[1]]
    start = group * size
    alone[:, group] = LARGEST
    double[:, :, group] = np.float32(0)
    if step == np.float32(0):
        return
    square = hessian[start : start + size, start : start + size]
    before = want(pull, square, start, step, code, book, scratch)
    enough[group] = -NOISE * abs(before)
    take_signs_wanted(pull, square, start, step, step, scratch)
    choose(square, step, parity_of(codes, group, book), book, scratch)
    least, count = scratch.least, 0
    for lane in range(WIDTH):  # each has one
        n = WIDTH * int(least[1, lane]) + lane
        found = code_of(n, scratch.signs, book.bits)
        if found == code:
            continue
        place = min(count, OTHERS - 1)
        if count >= OTHERS and not least[0, lane] - before < alone[place, group]:
            continue
        while place > 0 and least[0, lane] - before < alone[place - 1, group]:
            alone[place, group], others[place, group] = alone[place - 1, group], others[place - 1, group]
            place -= 1
        alone[place, group], others[place, group] = least[0, lane] - before, found
        count += 1
    for t in range(min(count, OTHERS)):
        for i in range(size):
            change = weight(others[t, group], i, book) - scratch.old[i]
            double[t, i, group] = np.float32(2) * step * change
