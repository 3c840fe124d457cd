"""The search for the entry of a codebook: every entry is tried, by its halves.

The errors of all combinations of levels are summed for either half of the weights. The error of an entry
is the sum of two of these, and of entries that share a first half only the least second one matters:
one instruction an entry. So that the least error says whose it is, the last seven bits of the sums are the
number of the half (errors are not negative, and order holds but for ties within 1 in 65536).

What may have one wrong sign is searched along with where it stands, in the first half or in the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable

from llmcompress.grids.codebook import Codebook
from llmcompress.grids.lanes import (
    LANES,
    absolute,
    fma,
    load,
    load_row,
    minimum,
    number_of,
    repeated,
    select,
    splat,
    store,
    store_row,
    tagged,
)

NONE = 1e37  # the error of what cannot be


def compile_search(book: Codebook) -> Callable:
    """`search(x, w, odds, j, step, tables, codes)` finds the codes of weights j to j + 8.

    `step` is the scale of the levels. Returns the error; `tables`, float32 `(5, 96, 16)`, is scratch.
    """
    size = book.entries.shape[1]
    halves = len(book.levels) ** (size // 2)
    nearest, nearest_flipped = _compile_nearest(book.pairs), _compile_nearest_flipped(book.pairs)
    fill = _compile_fill(book)

    @register_jitable
    def search_free(x, w, odds, j, step, tables, codes):
        total = splat(0.0)
        for i in range(j // size, (j + 8) // size):
            fill(x, w, size * i, step, splat(0.0), tables)
            error, first, second = nearest(tables[0], tables[1])
            store(codes, i, code_of(first, second, halves))
            total = total + error
        return total

    @register_jitable
    def search_even_eight(x, w, odds, j, step, tables, codes):
        fill(x, w, j, step, load(odds, j // 8), tables)
        error, first, second = nearest_flipped(tables[0], tables[1], tables[2], tables[3])
        store(codes, j // 8, code_of(first, second, halves))
        return error

    @register_jitable
    def search_even_fours(x, w, odds, j, step, tables, codes):
        error_before, flipped_before, code_before = splat(0.0), splat(0.0), splat(0.0)
        total = splat(0.0)
        for i in range(j // 4, j // 4 + 2):
            fill(x, w, 4 * i, step, load(odds, j // 8), tables)
            error, first, second = nearest(tables[0], tables[1])
            code = code_of(first, second, halves)
            flipped, first, second = nearest_flipped(tables[0], tables[1], tables[2], tables[3])
            flipped_code = code_of(first, second, halves)
            store(codes, i, code)
            if i % 2 == 1:
                in_first, in_second = flipped_before + error, error_before + flipped
                total, is_first = minimum(in_first, in_second), in_first < in_second
                store(codes, i - 1, select(is_first, code_before, load(codes, i - 1)))
                store(codes, i, select(is_first, code, flipped_code))
            error_before, flipped_before, code_before = error, flipped, flipped_code
        return total

    if not book.even:
        return search_free
    return search_even_eight if size == 8 else search_even_fours


@register_jitable
def code_of(first, second, halves):
    return fma(number_of(first), np.float32(halves), number_of(second))


def _compile_fill(book: Codebook) -> Callable:
    """`fill(x, w, first, step, odd, tables)`: errors of the first and the second half, then flipped ones."""
    levels, half, even = len(book.levels), book.entries.shape[1] // 2, book.even
    add_up, add_up_flipped = _compile_sums(levels, half), _compile_flipped_sums(levels, half)

    @register_jitable
    def fill(x, w, first, step, odd, tables):
        for k in range(2):
            level_errors(x, w, first + k * half, half, step, odd, book, tables[4])
            if even:
                add_up_flipped(tables[4], tables[k], tables[k + 2])
            else:
                add_up(tables[4], tables[k])

    return fill


@register_jitable
def level_errors(x, w, first, count, step, odd, book, errors):
    """Row `2 k levels + c`: level c for weight k; `levels` rows on: with the sign wrong, if `odd`."""
    levels = len(book.levels)
    for k in range(count):
        size, weight = absolute(load(x, first + k)), load(w, first + k)
        for c in range(levels):
            value = step * book.levels[c]
            difference = size - value
            error = weight * difference * difference
            store(errors, 2 * levels * k + c, error)
            store(errors, 2 * levels * k + levels + c, fma(odd * (weight * size), 4.0 * value, error))


def _compile_sums(levels: int, weights: int) -> Callable:
    """`add_up(errors, sums)`: row n of `sums` is combination n of the rows that `level_errors` wrote."""

    @intrinsic
    def add_up(typing_context, errors, sums):
        def lower(context, builder, sig, args):
            errors, sums = zip(sig.args, args)
            totals = [repeated(0.0)]
            for k in range(weights):
                right = [load_row(context, builder, *errors, 2 * levels * k + c) for c in range(levels)]
                totals = [builder.fadd(total, error) for error in right for total in totals]
            for n, total in enumerate(totals):
                store_row(context, builder, *sums, n, tagged(builder, total, n))
            return context.get_dummy_value()

        return types.void(errors, sums), lower

    return add_up


def _compile_flipped_sums(levels: int, weights: int) -> Callable:
    """`add_up(errors, sums, flipped)`: the same, and the sums with one wrong sign."""

    @intrinsic
    def add_up(typing_context, errors, sums, flipped):
        def lower(context, builder, sig, args):
            errors, sums, flipped = zip(sig.args, args)
            totals = [(repeated(0.0), repeated(NONE))]
            for k in range(weights):
                rows = [load_row(context, builder, *errors, 2 * levels * k + c) for c in range(2 * levels)]
                totals = [
                    (builder.fadd(a, right), _least(builder, builder.fadd(b, right), builder.fadd(a, wrong)))
                    for right, wrong in zip(rows[:levels], rows[levels:])
                    for a, b in totals
                ]
            for n, (a, b) in enumerate(totals):
                store_row(context, builder, *sums, n, tagged(builder, a, n))
                store_row(context, builder, *flipped, n, tagged(builder, b, n))
            return context.get_dummy_value()

        return types.void(errors, sums, flipped), lower

    return add_up


def _least(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _by_first_half(pairs: np.ndarray) -> list[tuple[int, list[int]]]:
    """Each first half with the second halves that follow it."""
    return [(int(first), pairs[pairs[:, 0] == first, 1].tolist()) for first in np.unique(pairs[:, 0])]


def _compile_nearest(pairs: np.ndarray) -> Callable:
    """`nearest(firsts, seconds)`: the least error of an entry, and the tagged errors of its halves."""

    @intrinsic
    def nearest(typing_context, firsts, seconds):
        def lower(context, builder, sig, args):
            firsts, seconds = (
                functools.partial(load_row, context, builder, *pair) for pair in zip(sig.args, args)
            )
            best = [repeated(NONE)] * 3
            for half, others in _by_first_half(pairs):
                first = firsts(half)
                second = functools.reduce(functools.partial(_least, builder), map(seconds, others))
                total = builder.fadd(first, second)
                better = builder.fcmp_ordered("<", total, best[0])
                best = [builder.select(better, *pair) for pair in zip((total, first, second), best)]
            return context.make_tuple(builder, sig.return_type, best)

        return types.UniTuple(LANES, 3)(firsts, seconds), lower

    return nearest


def _compile_nearest_flipped(pairs: np.ndarray) -> Callable:
    """`nearest(firsts, seconds, flipped_firsts, flipped_seconds)`: the same with one wrong sign."""

    @intrinsic
    def nearest(typing_context, firsts, seconds, flipped_firsts, flipped_seconds):
        def lower(context, builder, sig, args):
            tables = [functools.partial(load_row, context, builder, *pair) for pair in zip(sig.args, args)]
            least, best = functools.partial(_least, builder), [repeated(NONE)] * 3
            for half, others in _by_first_half(pairs):
                first, flipped_first = tables[0](half), tables[2](half)
                second = functools.reduce(least, map(tables[1], others))
                flipped_second = functools.reduce(least, map(tables[3], others))
                in_first, in_second = builder.fadd(flipped_first, second), builder.fadd(first, flipped_second)
                is_first = builder.fcmp_ordered("<", in_first, in_second)
                total = builder.select(is_first, in_first, in_second)
                second = builder.select(is_first, second, flipped_second)
                better = builder.fcmp_ordered("<", total, best[0])
                best = [builder.select(better, *pair) for pair in zip((total, first, second), best)]
            return context.make_tuple(builder, sig.return_type, best)

        return types.UniTuple(LANES, 3)(firsts, seconds, flipped_firsts, flipped_seconds), lower

    return nearest
