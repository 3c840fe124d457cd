"""GPTQ: round a column, and let the columns that follow make up for its error (Frantar et al., arXiv:2210.17323).

The error is measured on the inputs the weight will see: e H eᵀ for a row's rounding error e, H = XᵀX. A row goes

1. through the sweep, a block of columns at a time: scales fitted on the weights as the columns before left them, then
   codes, column by column, or four or eight at a time where they share an entry of a codebook. A fit sees what each
   column counts, not how they go together, so fits of several weighings go through the sweep and the best is taken.
2. through its blocks again, given all others: each code moved to where it is best (coordinate descent, as in
   QuantEase, arXiv:2309.01885), scales and minima to their least squares, pairs of codes to their next levels, until
   a pass over the blocks changes nothing, or `PASSES` are over.

It is taken only if its error is below that of rounding to nearest. A number format takes part by its entry in
grids/code_bits.py.
"""

from __future__ import annotations

import itertools

import numpy as np

from llmcompress.grids.code_bits import (
    book_of,
    get_codes,
    get_floats,
    get_numbers,
    layout_of,
    levels_of,
    put_codes,
    put_floats,
    put_numbers,
)
from llmcompress.grids.grid import Grid
from llmcompress.grids.lanes import WIDTH as LANES
from llmcompress.methods.columns import descend, move_pairs, sweep
from llmcompress.methods.entries import descend_entries, pair_entries, rescale_entries, sweep_entries
from llmcompress.methods.entry_search import tables_of
from llmcompress.methods.exact_zero import zero_code
from llmcompress.methods.scales import is_uniform, lattice, refit
from llmcompress.methods.solver import RIDGE, RIDGE_OF_CODEBOOKS, Solver, product

WIDTH = 256  # columns whose codes are chosen before the rest hears of their errors: a multiple of most blocks
# e H e over that of rounding to nearest, mean of six of sample-llama-6m's matrices, with 1 and 2 passes: Q4_K 0.265, 0.260;
# Q3_K 0.233, 0.224; Q2_K 0.273, 0.262. The middle weighing is worth 1 % of it, pairs 10 %, the refit 2 (IQ4_XS) to 10 (Q2_K).
WEIGHINGS = {
    "fast": (1.0,),
    "normal": (1.0, 0.5, 0.0),
    "best": (1.0, 0.75, 0.5, 0.25, 0.0),
}  # powers of importance
# Of codebooks, scales over those of rounding to nearest that are tried, the plain one first: 3 % of IQ3_XXS's e H e.
SIZES = (1.0, 0.93, 0.97, 1.03)
PASSES = {"fast": 0, "normal": 2, "best": 8}  # over the blocks at most
ROUNDS = 8  # of a descent in a block at most


def supports(grid: Grid) -> bool:
    """Whether a grid's numbers can be chosen one by one."""
    return layout_of(grid) is not None


def quantize(
    weights: np.ndarray, grid: Grid, solver: Solver, effort: str = "normal", act_order: bool = False,
    gone: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Round float32 (rows, columns) to `grid`; returns uint8 (rows, row_bytes).

    No row has a larger error e H eᵀ than rounded to nearest with the importance diag(H). With `act_order` the columns
    are rounded in the order of their importance, on the scales of rounding to nearest; so they are where blocks
    are wider than a sweep. `gone`, bool (rows, columns): pruned, so zero, for which the others make up; the grid has a
    `zero_code`.
    """
    nearest = grid.quantize(_without(weights, gone), solver.importance, effort)
    if solver.factor is None or not supports(grid):
        return nearest
    if act_order or WIDTH % grid.block:
        fed = _feed_errors_on(weights, grid, nearest, solver, act_order, gone)
    else:
        fed = _feed_errors(weights, grid, solver, effort, gone)
    best, errors = _settle(weights, grid, fed, solver, PASSES[effort], gone)
    worse = errors > _errors(weights - grid.dequantize(nearest), solver)
    best[worse] = nearest[worse]
    return best


def _without(values: np.ndarray, gone: np.ndarray | None, columns: slice = slice(None)) -> np.ndarray:
    """Zeros for what is gone of some columns. A weight on a scale of zero stays what it is in all that follows."""
    return values if gone is None else np.where(gone[:, columns], np.float32(0), values)


def _feed_errors(
    weights: np.ndarray, grid: Grid, solver: Solver, effort: str, gone: np.ndarray | None = None
) -> np.ndarray:
    """GPTQ's sweep over the columns, scales fitted as it gets to them; returns encoded rows."""
    left = weights.copy()  # the weights, less what the errors so far ask of them
    encoded = []
    for first in range(0, weights.shape[1], WIDTH):
        block = slice(first, first + WIDTH)
        target = np.ascontiguousarray(left[:, block])
        for power, size in itertools.product(WEIGHINGS[effort], SIZES if book_of(grid) else SIZES[:1]):
            if size == SIZES[0]:
                weighing = solver.conditional[block] ** np.float32(power)
                fitted = grid.quantize(_without(target, gone, block), weighing, effort)
            tried = _scaled(grid, fitted, size)
            on = (_without(numbers, gone, block) for numbers in lattice(grid, tried))
            codes, made = _round_block(target, *on, grid, solver.factor[block, block])
            if gone is not None:
                codes[gone[:, block]] = zero_code(grid)
            cost = (made * made).sum(1)
            if power == WEIGHINGS[effort][0] and size == SIZES[0]:
                best, least = (tried.copy(), codes, made), cost
            else:
                better = cost < least
                for kept, new in zip((*best, least), (tried, codes, made, cost)):
                    kept[better] = new[better]
        data, codes, errors = best
        left[:, block.stop :] -= product(errors, solver.factor[block, block.stop :])
        encoded.append(put_codes(grid, data, codes))
    return np.concatenate(encoded, axis=1)


def _scaled(grid: Grid, data: np.ndarray, size: float) -> np.ndarray:
    """Encoded rows with all floats `size` times as large."""
    for place in layout_of(grid).floats if size != 1 else ():
        data = put_floats(grid, data, place, get_floats(grid, data, place) * np.float32(size))
    return data


def _feed_errors_on(
    weights: np.ndarray, grid: Grid, data: np.ndarray, solver: Solver, act_order: bool,
    gone: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """The sweep on the scales of `data`, encoded rows, in either order of the columns."""
    order, ordered = solver.by_importance if act_order else (slice(None), solver)
    left = weights[:, order].copy()
    scale, offset = (_without(numbers, gone)[:, order] for numbers in lattice(grid, data))
    codes = np.empty(weights.shape, np.uint8)
    for first in range(0, weights.shape[1], WIDTH):
        block = slice(first, first + WIDTH)
        codes[:, block], errors = _round_block(
            left[:, block], scale[:, block], offset[:, block], grid, ordered.factor[block, block]
        )
        left[:, block.stop :] -= product(errors, ordered.factor[block, block.stop :])
    if act_order:
        codes[:, order] = codes.copy()
    if gone is not None:
        codes[gone] = zero_code(grid)
    return put_codes(grid, data, codes)


def _round_block(
    weights: np.ndarray, scale: np.ndarray, offset: np.ndarray, grid: Grid, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of a block of columns on given scales and offsets, and their errors in units of the factor's diagonal."""
    weights, scale, offset, factor = map(np.ascontiguousarray, (weights, scale, offset, factor))
    errors, book = np.empty(scale.shape, np.float32), book_of(grid)
    if book is None:
        codes = np.empty(scale.shape, np.uint8)
        sweep(weights, scale, offset, *_levels(grid), factor, codes, errors)
        return codes, errors
    size = book.entries.shape[1]
    codes = np.empty((len(scale), scale.shape[1] // size), np.int32)
    corners = [factor[i : i + size, i : i + size].astype(np.float64) for i in range(0, len(factor), size)]
    squares = np.array([np.linalg.inv(corner.T @ corner) for corner in corners], np.float32)
    sweep_entries(weights.copy(), scale, tables_of(book), squares, factor, codes, errors)
    return codes, errors


def _settle(
    weights: np.ndarray, grid: Grid, data: np.ndarray, solver: Solver, passes: int,
    gone: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Codes and scales of each block moved to where the row's error is least, given the rest; and e H eᵀ of every row."""
    data, errors, hessian = data.copy(), weights - grid.dequantize(data), solver.hessian
    ridge = solver.ridge(RIDGE_OF_CODEBOOKS if book_of(grid) else RIDGE)
    width = WIDTH if WIDTH % grid.block == 0 else grid.block
    totals, moving = None, np.arange(len(weights))
    for _ in range(passes):
        rows = slice(None) if len(moving) == len(weights) else moving
        total, moved = np.zeros(len(moving), np.float32), np.zeros(len(moving), bool)
        for first in range(0, weights.shape[1], width):
            block = slice(first, first + width)
            held = slice(first // grid.block * grid.block_bytes, block.stop // grid.block * grid.block_bytes)
            corner = hessian[block, block].copy()
            corner.flat[:: len(corner) + 1] += ridge
            before = product(errors[rows, :first], hessian[:first, block])
            pull = product(errors[rows, first:], hessian[first:, block])
            pull += before + ridge * errors[rows, block]
            settled = _settle_block(
                grid, data[rows, held], pull, corner, None if gone is None else gone[rows, block]
            )
            left = weights[rows, block] - grid.dequantize(settled)
            moved |= (left != errors[rows, block]).any(1)
            data[rows, held], errors[rows, block] = settled, left
            # what lies before a block is done with, and H is symmetric: it counts twice
            own = product(left, corner)
            total += ((own + before + before - ridge * left) * left).sum(1)
        if totals is None:
            totals = total
        else:
            totals[rows] = total
        moving = moving[moved]
        if not len(moving):
            break
    return data, _errors(errors, solver) if totals is None else totals


def _settle_block(
    grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray, gone: np.ndarray | None
) -> np.ndarray:
    """One block's encoded rows, with better numbers. pull: e H of its columns, used up; hessian: their block of H."""
    data = np.ascontiguousarray(data)
    if book_of(grid):
        data = _move_codes(grid, data, pull, hessian, False, gone)
        data = _rescale(grid, data, pull, hessian)
    data = refit(grid, data, pull, hessian)
    pairs = len(hessian) <= WIDTH and len(hessian) % LANES == 0
    return _move_codes(grid, data, pull, hessian, pairs, gone)


def _move_codes(
    grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray, pairs: bool,
    gone: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Codes moved to where they are best, the scales fixed; `pull` follows."""
    (scale, _), codes, book = lattice(grid, data), get_codes(grid, data), book_of(grid)
    scale = _without(scale, gone)
    importance = hessian.diagonal()
    if book is None:
        order = np.argsort(-importance, kind="stable")
        descend(pull, hessian, codes, scale, *_levels(grid), order, ROUNDS)
        if pairs:
            move_pairs(pull, hessian, codes, scale, levels_of(grid))
            descend(pull, hessian, codes, scale, *_levels(grid), order, ROUNDS)
    else:
        order = np.argsort(-importance.reshape(-1, book.entries.shape[1]).sum(1), kind="stable")
        descend_entries(pull, hessian, codes, scale, tables_of(book), order, ROUNDS)
        if pairs:
            by_place = (
                hessian.reshape(len(hessian), -1, book.entries.shape[1]).swapaxes(1, 2).reshape(hessian.shape)
            )
            pair_entries(pull, hessian, np.ascontiguousarray(by_place), codes, scale, tables_of(book))
            descend_entries(pull, hessian, codes, scale, tables_of(book), order, ROUNDS)
    return put_codes(grid, data, codes)


def _rescale(grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Scales of sub-blocks moved to the next, and their entries with them; `pull` follows."""
    (scale, _), codes = lattice(grid, data), get_codes(grid, data)
    for numbers in layout_of(grid).parts:
        values, (least, most) = get_numbers(grid, data, numbers), numbers.range
        step = np.where(values < most, 1, -1).astype(np.int32)
        slope = lattice(grid, put_numbers(grid, data, numbers, values + step))[0] - scale
        slope = slope[:, :: slope.shape[1] // step.shape[1]] * step
        rescale_entries(pull, hessian, codes, scale, slope, values, least, most, tables_of(book_of(grid)))
        data = put_numbers(grid, data, numbers, values)
    return put_codes(grid, data, codes)


def _errors(errors: np.ndarray, solver: Solver) -> np.ndarray:
    """e H eᵀ of every row of errors. H is symmetric: what lies right of the diagonal's blocks counts twice."""
    total = np.zeros(len(errors), np.float32)
    for first in range(0, errors.shape[1], WIDTH):
        block, behind = slice(first, first + WIDTH), slice(first + WIDTH, None)
        own = product(errors[:, block], solver.hessian[block, first:])
        total += (own[:, :WIDTH] * errors[:, block]).sum(1)
        total += 2 * (own[:, WIDTH:] * errors[:, behind]).sum(1)
    return total


def _levels(grid: Grid) -> tuple[np.ndarray, np.ndarray, bool]:
    """A grid's levels, the middles between each two, float32, and whether they are 0, 1, 2 ..."""
    levels = levels_of(grid)
    return levels, (levels[1:] + levels[:-1]) / 2, is_uniform(levels)
