"""Scales and offsets of runs of columns, from the numbers among their bytes, and those numbers moved to their least squares.

    weight = scale x (level[code] - middle) + offset

with the middle level of formats whose levels are 0, 1, 2 ..., so that symmetric ones have no offset. A run's scale and offset are
linear in each of its numbers, the other ones fixed; by how much is a format's own, found by decoding. What the numbers of a
block do to a row's error is then a matter of two values a run, whatever the format.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llmcompress.grids.code_bits import (
    book_of,
    get_codes,
    get_floats,
    get_numbers,
    lattice_of,
    layout_of,
    levels_of,
    put_floats,
    put_numbers,
)
from llmcompress.grids.compiled import compiled
from llmcompress.grids.floats import half_bits_of, half_to_float
from llmcompress.grids.grid import Grid

FOUR = 4  # columns that are added up at a time, and rows


@dataclass(frozen=True)
class Slopes:
    """What a run's scale and offset are per unit of its numbers: Σ float x (alone + Σ part x by_part).

    run: columns. alone: float32 (floats, 2), by_part: float32 (floats, parts, 2), of the scale and the offset. middle: a level.
    """

    run: int
    alone: np.ndarray
    by_part: np.ndarray
    middle: np.float32


@functools.lru_cache(maxsize=64)
def slopes_of(grid: Grid) -> Slopes:
    """Found on a block, by decoding it with each number at 1 and all others at 0."""
    layout = layout_of(grid)
    run = grid.block // len(layout.parts[0].pieces) if layout.parts else grid.block
    uniform = book_of(grid) is None and is_uniform(levels_of(grid))
    middle = np.float32(len(levels_of(grid)) // 2 if uniform else 0)
    blank = grid.quantize(
        np.random.default_rng(0).standard_normal((1, grid.block)).astype(np.float32), None, "fast"
    )
    for numbers in layout.parts:
        blank = put_numbers(grid, blank, numbers, np.zeros((1, len(numbers.pieces)), np.int32))

    def decoded(place: tuple[int, str], data: np.ndarray) -> np.ndarray:
        for other in layout.floats:
            data = put_floats(grid, data, other, float(other == place))
        scale, offset = (values[0, 0] for values in lattice_of(grid, data))
        return np.array([scale, offset + middle * scale], np.float32)

    alone = np.stack([decoded(place, blank) for place in layout.floats])
    by_part = np.zeros((len(layout.floats), len(layout.parts), 2), np.float32)
    for at, numbers in enumerate(layout.parts):
        one = put_numbers(grid, blank, numbers, np.ones((1, len(numbers.pieces)), np.int32))
        by_part[:, at] = [decoded(place, one) - alone[n] for n, place in enumerate(layout.floats)]
    return Slopes(run, alone, by_part, middle)


def is_uniform(levels: np.ndarray) -> bool:
    """Whether they are 0, 1, 2 ..."""
    return bool((levels == np.arange(len(levels))).all())


def scales_of(grid: Grid, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets of the middle, float32 (rows, runs), of encoded rows."""
    layout, slopes = layout_of(grid), slopes_of(grid)
    both = np.float32(0), np.float32(0)
    for place, alone, by_part in zip(layout.floats, slopes.alone, slopes.by_part):
        values = np.repeat(get_floats(grid, data, place), grid.block // slopes.run, axis=1)
        for kind in range(2):
            share = alone[kind]
            for numbers, per_unit in zip(layout.parts, by_part[:, kind]):
                if per_unit:
                    share = share + per_unit * get_numbers(grid, data, numbers).astype(np.float32)
            both = (*both[:kind], both[kind] + values * share, *both[kind + 1 :])
    return both


def lattice(grid: Grid, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `lattice_of` of code_bits.py, without decoding the rows."""
    slopes = slopes_of(grid)
    scale, offset = scales_of(grid, data)
    return np.repeat(scale, slopes.run, axis=1), np.repeat(offset - slopes.middle * scale, slopes.run, axis=1)


def refit(grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Scales and minima moved to where the row's error is least, the codes fixed; `pull`, e H, follows."""
    layout, slopes = layout_of(grid), slopes_of(grid)
    if book_of(grid) is None:
        units = np.take(levels_of(grid) - slopes.middle, get_codes(grid, data))
    else:
        scale = np.repeat(scales_of(grid, data)[0], slopes.run, axis=1)
        units = grid.dequantize(data) / np.where(scale == 0, np.float32(1), scale)
    floats = np.stack([get_floats(grid, data, place) for place in layout.floats])
    runs = data.shape[1] // grid.block_bytes * (grid.block // slopes.run)
    parts = np.zeros((len(layout.parts), len(data), runs), np.float32)
    for at, numbers in enumerate(layout.parts):
        parts[at] = get_numbers(grid, data, numbers)
    limits = np.array([numbers.range for numbers in layout.parts], np.float32).reshape(-1, 2)
    halves = np.array([kind == "<f2" for _, kind in layout.floats])
    _refit(pull, hessian, units, floats, parts, slopes.alone, slopes.by_part, limits, halves)
    for values, numbers in zip(parts, layout.parts):
        data = put_numbers(grid, data, numbers, values.astype(np.int32))
    for values, place in zip(floats, layout.floats):
        data = put_floats(grid, data, place, values)
    return data


@compiled(fastmath=True, error_model="numpy")
def _refit(pull, hessian, units, floats, parts, alone, by_part, limits, halves):
    """Move the numbers one after the other, the parts first. Floats keep their sign.

    units: (rows, columns), what weights rise by per unit of their scale. floats: (floats, rows, blocks), parts: (parts, rows,
    runs), in place. Of a run, r is what goes with its scale, `runs` + r what goes with its offset.
    """
    rows, columns = pull.shape
    runs = parts.shape[2]
    size, runs_of_block = columns // runs, runs // floats.shape[2]
    both = 2 * runs if alone[:, 1].any() or by_part[:, :, 1].any() else runs
    forwards = np.zeros((FOUR, both, columns), np.float32)  # H times what goes with a run's scale, or offset
    gram, near = np.zeros((both, both), np.float32), np.empty(both, np.float32)
    moves, slope = np.empty(both, np.float32), np.zeros(both, np.float32)
    four = np.zeros((FOUR, columns), np.float32)
    for r in range(both - runs):
        for i in range(r * size, r * size + size):
            forwards[:, runs + r] += hessian[i]
        for other in range(runs):
            gram[runs + r, runs + other] = _sum(forwards[0, runs + r], other * size, size)
    for row in range(rows):
        if row % FOUR == 0:
            ahead = min(FOUR, rows - row)
            four[:ahead] = units[row : row + ahead]
            _add_forward(four, hessian, runs, forwards)
        unit, pulled, forward = units[row], pull[row], forwards[row % FOUR]
        moves[:] = np.float32(0)
        for r in range(runs):
            start = r * size
            near[r] = _dot(unit, pulled, start, size)
            for other in range(r, runs):
                gram[r, other] = gram[other, r] = _dot(unit, forward[r], other * size, size)
            if both > runs:
                near[runs + r] = _sum(pulled, start, size)
                for other in range(runs):
                    gram[r, runs + other] = gram[runs + other, r] = _sum(forward[r], other * size, size)
        for part in range(len(parts)):
            for r in range(runs):
                x = y = np.float32(0)
                for f in range(len(floats)):
                    value = floats[f, row, r // runs_of_block]
                    x += value * by_part[f, part, 0]
                    y += value * by_part[f, part, 1]
                product, square = x * near[r], x * x * gram[r, r]
                if both > runs:
                    o = runs + r
                    product += y * near[o]
                    square += y * (y * gram[o, o] + np.float32(2) * x * gram[r, o])
                if not square > np.float32(0):
                    continue
                old = parts[part, row, r]
                new = np.floor(old + product / square + np.float32(0.5))
                new = min(max(new, limits[part, 0]), limits[part, 1])
                change = new - old
                if change * (change * square - np.float32(2) * product) < np.float32(0):
                    parts[part, row, r] = new
                    slope[r] = x
                    if both > runs:
                        slope[runs + r] = y
                    _take(change, slope, r, r + 1, runs, gram, near, moves)
        for f in range(len(floats)):
            for block in range(floats.shape[2]):
                first, end = block * runs_of_block, (block + 1) * runs_of_block
                for r in range(first, end):
                    x, y = alone[f, 0], alone[f, 1]
                    for part in range(len(parts)):
                        x += parts[part, row, r] * by_part[f, part, 0]
                        y += parts[part, row, r] * by_part[f, part, 1]
                    slope[r] = x
                    if both > runs:
                        slope[runs + r] = y
                product = square = np.float32(0)
                for half in range(both // runs):
                    for a in range(half * runs + first, half * runs + end):
                        product += slope[a] * near[a]
                        for other in range(both // runs):
                            for b in range(other * runs + first, other * runs + end):
                                square += slope[a] * slope[b] * gram[a, b]
                if not square > np.float32(0):
                    continue
                old = floats[f, row, block]
                new = old + product / square
                if halves[f]:
                    new = half_to_float(np.uint32(half_bits_of(np.float32(new).view(np.uint32))))
                change = new - old
                lower = change * (change * square - np.float32(2) * product) < np.float32(0)
                if lower and old * new > np.float32(0):
                    floats[f, row, block] = new
                    _take(change, slope, first, end, runs, gram, near, moves)
        for a in range(both):
            if moves[a] != np.float32(0):
                for j in range(columns):
                    pulled[j] -= moves[a] * forward[a, j]


@compiled(inline="always", fastmath=True)
def _take(change, slope, first, end, runs, gram, near, moves):
    """A number's change, of which the runs first..end get their slope."""
    for half in range(len(near) // runs):
        for a in range(half * runs + first, half * runs + end):
            move = change * slope[a]
            moves[a] += move
            for b in range(len(near)):
                near[b] -= move * gram[a, b]


@compiled(fastmath=True)
def _add_forward(units, hessian, runs, forwards):
    """Four rows' `units` times H, run by run: H is read once for all."""
    columns = units.shape[1]
    size = columns // runs
    one, two, three, four = units[0], units[1], units[2], units[3]
    for r in range(runs):
        a, b, c, d = forwards[0, r], forwards[1, r], forwards[2, r], forwards[3, r]
        for j in range(columns):
            a[j] = b[j] = c[j] = d[j] = np.float32(0)
        start = r * size
        whole = start + size // FOUR * FOUR
        for i in range(start, whole, FOUR):
            for j in range(columns):
                h, k, m, n = hessian[i, j], hessian[i + 1, j], hessian[i + 2, j], hessian[i + 3, j]
                a[j] += (one[i] * h + one[i + 1] * k) + (one[i + 2] * m + one[i + 3] * n)
                b[j] += (two[i] * h + two[i + 1] * k) + (two[i + 2] * m + two[i + 3] * n)
                c[j] += (three[i] * h + three[i + 1] * k) + (three[i + 2] * m + three[i + 3] * n)
                d[j] += (four[i] * h + four[i + 1] * k) + (four[i + 2] * m + four[i + 3] * n)
        for i in range(whole, start + size):
            for j in range(columns):
                a[j] += one[i] * hessian[i, j]
                b[j] += two[i] * hessian[i, j]
                c[j] += three[i] * hessian[i, j]
                d[j] += four[i] * hessian[i, j]


@compiled(inline="always", fastmath=True)
def _dot(a, b, start, size):
    total = np.float32(0)
    for i in range(start, start + size):
        total += a[i] * b[i]
    return total


@compiled(inline="always", fastmath=True)
def _sum(a, start, size):
    total = np.float32(0)
    for i in range(start, start + size):
        total += a[i]
    return total
