"""The search for the entry of a codebook: every entry is tried, by its halves.

The errors of all combinations of levels are summed for either half of the weights. The error of an entry
is the sum of two of these, and of entries that share a first half only the least second one matters:
one instruction an entry. So that the least error says whose it is, the last seven bits of the sums are the
number of the half (errors are not negative, and order holds but for ties within 1 in 65536).

Where signs come in even sets, which weight of an odd one gets the wrong sign is settled before: the one that
costs least if any combination of levels were an entry. Trying all eight takes twice the time and lowers the
error by half a percent; the same time spent on more scales lowers it by two to five.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from llmcompress.grids.codebook import Codebook
from llmcompress.grids.lanes import (
    LANES,
    WIDTH,
    absolute,
    fma,
    load,
    maximum,
    minimum,
    number_of,
    repeated,
    select,
    splat,
    store,
    tagged,
)

NONE = 1e37  # the error of what cannot be


def compile_search(book: Codebook) -> Callable:
    """`search(x, w, odds, j, step, tables, codes)` finds the codes of weights j to j + 8.

    `step` is the scale of the levels; `tables`, float32 `(4, 96, 16)`, is scratch.
    """
    size = book.entries.shape[1]
    half = size // 2
    halves = len(book.levels) ** half
    nearest, add_up = _compile_nearest(book.pairs), _compile_sums(len(book.levels), half)

    @register_jitable
    def search(x, w, odds, j, step, tables, codes):
        sizes_of_eight(x, w, odds, j, step, book, tables[3])
        for start in range(0, 8, size):
            for k in range(2):
                level_errors(tables[3], w, j, start + k * half, half, step, book, tables[2])
                add_up(tables[2], tables[k])
            first, second = nearest(tables[0], tables[1])
            code = fma(number_of(first), np.float32(halves), number_of(second))
            store(codes, (j + start) // size, code)

    return search


@register_jitable
def sizes_of_eight(x, w, odds, j, step, book, sizes):
    """|x|, but of an odd set one is negative: the one that costs least if any combination were an entry."""
    least, wrong = splat(1e38), splat(-1.0)
    for k in range(8):
        size = absolute(load(x, j + k))
        store(sizes, k, size)
        if book.even:
            near = step * book.levels[0]
            up, down = size + near, maximum(near - size, 0.0)
            cost = load(w, j + k) * (up * up - down * down)
            wrong, least = select(cost < least, float(k), wrong), minimum(cost, least)
    if book.even:
        wrong = select(load(odds, j // 8) > 0.5, wrong, splat(-1.0))
        for k in range(8):
            size = load(sizes, k)
            store(sizes, k, select(absolute(wrong - float(k)) < 0.5, -size, size))


@register_jitable
def level_errors(sizes, w, j, first, count, step, book, errors):
    """Row `k levels + c`: the error of level c for weight k."""
    levels = len(book.levels)
    for k in range(count):
        size, weight = load(sizes, first + k), load(w, j + first + k)
        for c in range(levels):
            difference = size - step * book.levels[c]
            store(errors, levels * k + c, weight * difference * difference)


class _Rows:
    """The rows of a contiguous float32 array `(n, 16)`, for an intrinsic: its address is worked out once."""

    def __init__(self, context, builder, array_type, array) -> None:
        vector = ir.VectorType(ir.FloatType(), WIDTH)
        data = context.make_array(array_type)(context, builder, array).data
        self.builder, self.start = builder, builder.bitcast(data, vector.as_pointer())

    def _place(self, k: int):
        return self.builder.gep(self.start, [ir.Constant(ir.IntType(64), k)])

    def load(self, k: int):
        return self.builder.load(self._place(k), align=4)

    def store(self, k: int, value) -> None:
        self.builder.store(value, self._place(k), align=4)


def _compile_sums(levels: int, weights: int) -> Callable:
    """`add_up(errors, sums)`: row n of `sums` is combination n of the rows that `level_errors` wrote."""

    @intrinsic
    def add_up(typing_context, errors, sums):
        def lower(context, builder, sig, args):
            errors, sums = (_Rows(context, builder, *pair) for pair in zip(sig.args, args))
            totals = [repeated(0.0)]
            for k in range(weights):
                right = [errors.load(levels * k + c) for c in range(levels)]
                totals = [builder.fadd(total, error) for error in right for total in totals]
            for n, total in enumerate(totals):
                sums.store(n, tagged(builder, total, n))
            return context.get_dummy_value()

        return types.void(errors, sums), lower

    return add_up


def _least(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _by_first_half(pairs: np.ndarray) -> list[tuple[int, list[int]]]:
    """Each first half with the second halves that follow it."""
    return [(int(first), pairs[pairs[:, 0] == first, 1].tolist()) for first in np.unique(pairs[:, 0])]


def _compile_nearest(pairs: np.ndarray) -> Callable:
    """`nearest(firsts, seconds)`: the tagged errors of the halves of the entry of the least error."""

    @intrinsic
    def nearest(typing_context, firsts, seconds):
        def lower(context, builder, sig, args):
            firsts, seconds = (_Rows(context, builder, *pair) for pair in zip(sig.args, args))
            best = [repeated(NONE)] * 3
            for half, others in _by_first_half(pairs):
                first = firsts.load(half)
                second = functools.reduce(functools.partial(_least, builder), map(seconds.load, others))
                total = builder.fadd(first, second)
                better = builder.fcmp_ordered("<", total, best[0])
                best = [builder.select(better, *pair) for pair in zip((total, first, second), best)]
            return context.make_tuple(builder, sig.return_type, best[1:])

        return types.UniTuple(LANES, 2)(firsts, seconds), lower

    return nearest
