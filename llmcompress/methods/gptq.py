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

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from llmcompress.grids.code_bits import (
    book_of,
    get_codes,
    get_floats,
    get_numbers,
    lattice_of,
    layout_of,
    levels_of,
    put_codes,
    put_floats,
    put_numbers,
)
from llmcompress.grids.grid import Grid
from llmcompress.grids.lanes import WIDTH as LANES
from llmcompress.methods.columns import HALF, SINGLE, WHOLE, descend, move_pairs, refit, sweep
from llmcompress.methods.entries import descend_entries, pair_entries, rescale_entries, sweep_entries
from llmcompress.methods.entry_search import tables_of
from llmcompress.methods.exact_zero import zero_code

WIDTH = 256  # columns whose codes are chosen before the rest hears of their errors: a multiple of most blocks
DAMPING = 0.01  # of the mean of H's diagonal; doubled while H is not positive definite
LARGEST_DAMPING = 1.0
FLOOR = 1e-6  # of the largest diagonal element
CHOLESKY_BLOCK = 64
LEAST_ROWS = 64  # of a product
# Of the mean of H's diagonal, added to it after the sweep: codes moved freely give up whatever the calibration happens not
# to show. Chosen on the end of sample-llama-6m's held-out text, which no figure of ours is of; KL divergences with 0.03 and
# 0.1: Q4_K 0.000677, 0.000682; IQ3_XXS 0.00472, 0.00461.
RIDGE, RIDGE_OF_CODEBOOKS = 0.03, 0.1
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


@dataclass(frozen=True)
class Solver:
    """H and what error feedback needs of it, both float32 (columns, columns).

    hessian: XᵀX. factor: upper triangular U with UᵀU = (H + damping)⁻¹; None where no damping made H positive
    definite. rung: what it took, in words. Dead columns, which no input reached, stand alone: they are rounded to
    nearest.
    """

    hessian: np.ndarray
    factor: np.ndarray | None
    rung: str

    @classmethod
    def of(cls, products: np.ndarray) -> Solver:
        """From XᵀX, float32 (columns, columns), of any number of tokens."""
        hessian = torch.from_numpy(np.array(products, np.float32))
        dead = hessian.diagonal() <= 0
        hessian[dead, :] = 0
        hessian[:, dead] = 0
        hessian.diagonal()[dead] = DAMPING * hessian.diagonal()[~dead].mean() if not dead.all() else 1
        factor, rung = (None, "rounded to nearest: no inputs") if dead.all() else _factor(hessian)
        return cls(hessian.numpy(), None if factor is None else factor.numpy(), rung)

    @property
    def importance(self) -> np.ndarray:
        """float32 (columns,): the diagonal of H, what an importance matrix holds."""
        return np.ascontiguousarray(self.hessian.diagonal())

    @functools.cached_property
    def damped(self) -> np.ndarray:
        """H with a little on its diagonal, so that no error becomes large that these inputs happen not to show."""
        return self.damped_by(RIDGE)[0]

    def damped_by(self, share: float) -> tuple[np.ndarray, np.float32]:
        """H with that share of its diagonal's mean on it, and how much that is."""
        hessian, ridge = self.hessian.copy(), np.float32(share * self.hessian.diagonal().mean())
        hessian.flat[:: len(hessian) + 1] += ridge
        return hessian, ridge

    @functools.cached_property
    def conditional(self) -> np.ndarray:
        """float32 (columns,): what an error counts in the sweep, where the columns behind make up for what they can."""
        return (1 / self.factor.diagonal() ** 2).astype(np.float32)

    @functools.cached_property
    def by_importance(self) -> tuple[np.ndarray, Solver]:
        """The columns in the order of their importance, the largest first, and the solver for them in that order."""
        order = np.argsort(-self.hessian.diagonal(), kind="stable")
        return order, Solver.of(self.hessian[np.ix_(order, order)])


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


def _factor(hessian: torch.Tensor) -> tuple[torch.Tensor | None, str]:
    """The upper factor of the inverse of H, and how far up the ladder it was found."""
    mean, largest = hessian.diagonal().mean(), hessian.diagonal().max()
    damping = DAMPING
    while damping <= LARGEST_DAMPING:
        factor = _inverse_factor(hessian, damping * mean)
        if factor is not None:
            return factor, f"damping {damping:g}"
        damping *= 2
    factor = _inverse_factor(hessian, LARGEST_DAMPING * mean + FLOOR * largest)
    if factor is not None:
        return factor, "a floor under the diagonal"
    factor = _inverse_factor(hessian.double(), DAMPING * mean.double())
    if factor is not None:
        return factor.float(), "float64"
    return None, "rounded to nearest: H has no Cholesky factor"


def _inverse_factor(hessian: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """Upper U with UᵀU = (H + added I)⁻¹: from H = R Rᵀ, R upper, U is R⁻¹. R is H's Cholesky factor from the end."""
    damped = hessian.clone()
    damped.diagonal().add_(added)
    lower = _cholesky(damped.flip(0, 1))
    if lower is None or not torch.isfinite(lower).all():
        return None
    upper = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse if torch.isfinite(inverse).all() else None


def _cholesky(matrix: torch.Tensor) -> torch.Tensor | None:
    """Lower L with L Lᵀ = matrix, None if there is none; `matrix` is used up.

    LAPACK's own has other bits on another number of threads, so it gets blocks that it works on with one.
    """
    for first in range(0, len(matrix), CHOLESKY_BLOCK):
        block, below = slice(first, first + CHOLESKY_BLOCK), slice(first + CHOLESKY_BLOCK, None)
        corner, failed = torch.linalg.cholesky_ex(matrix[block, block])
        if failed:
            return None
        matrix[block, block] = corner
        column = torch.linalg.solve_triangular(corner, matrix[below, block].T, upper=False).T.contiguous()
        matrix[below, block] = column
        matrix[below, below] -= column @ column.T
    return matrix.tril_()


def _feed_errors(
    weights: np.ndarray, grid: Grid, solver: Solver, effort: str, gone: np.ndarray | None = None
) -> np.ndarray:
    """GPTQ's sweep over the columns, scales fitted as it gets to them; returns encoded rows."""
    left = weights.copy()  # the weights, less what the errors so far ask of them
    encoded = []
    for first in range(0, weights.shape[1], WIDTH):
        block = slice(first, first + WIDTH)
        target, least = np.ascontiguousarray(left[:, block]), np.full(len(left), np.inf, np.float32)
        for power, size in itertools.product(WEIGHINGS[effort], SIZES if book_of(grid) else SIZES[:1]):
            if size == SIZES[0]:
                weighing = solver.conditional[block] ** np.float32(power)
                fitted = grid.quantize(_without(target, gone, block), weighing, effort)
            tried = _scaled(grid, fitted, size)
            lattice = (_without(numbers, gone, block) for numbers in lattice_of(grid, tried))
            codes, made = _round_block(target, *lattice, grid, solver.factor[block, block])
            if gone is not None:
                codes[gone[:, block]] = zero_code(grid)
            cost = (made * made).sum(1)
            tried, better = put_codes(grid, tried, codes), cost < least
            if power == WEIGHINGS[effort][0] and size == SIZES[0]:
                data, errors, least = tried, made, cost
            else:
                data[better], errors[better], least[better] = tried[better], made[better], cost[better]
        left[:, block.stop :] -= product(errors, solver.factor[block, block.stop :])
        encoded.append(data)
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
    scale, offset = (_without(numbers, gone)[:, order] for numbers in lattice_of(grid, data))
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
    data, errors = data.copy(), weights - grid.dequantize(data)
    damped, ridge = solver.damped_by(RIDGE_OF_CODEBOOKS if book_of(grid) else RIDGE)
    pull = product(errors, damped)
    width = WIDTH if WIDTH % grid.block == 0 else grid.block
    for _ in range(passes):
        still = True
        for first in range(0, weights.shape[1], width):
            block = slice(first, first + width)
            held = slice(first // grid.block * grid.block_bytes, block.stop // grid.block * grid.block_bytes)
            out = None if gone is None else gone[:, block]
            settled = _settle_block(grid, data[:, held], pull[:, block], damped[block, block], out)
            moved = weights[:, block] - grid.dequantize(settled)
            change = errors[:, block] - moved
            rows = np.flatnonzero(change.any(1))
            if len(rows):
                pull[rows] += product(-change[rows], damped[block])
                data[:, held], errors[:, block], still = settled, moved, False
        if still:
            break
    return data, (pull * errors - ridge * errors * errors).sum(1)


def _settle_block(
    grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray, gone: np.ndarray | None
) -> np.ndarray:
    """One block's encoded rows, with better numbers. pull: e H of its columns, hessian: their block of H."""
    data, pull, hessian = np.ascontiguousarray(data), pull.copy(), np.ascontiguousarray(hessian)
    if book_of(grid):
        data = _move_codes(grid, data, pull, hessian, False, gone)
        data = _rescale(grid, data, pull, hessian)
    data = _refit(grid, data, pull, hessian)
    pairs = len(hessian) <= WIDTH and len(hessian) % LANES == 0
    return _move_codes(grid, data, pull, hessian, pairs, gone)


def _move_codes(
    grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray, pairs: bool,
    gone: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Codes moved to where they are best, the scales fixed; `pull` follows."""
    (scale, _), codes, book = lattice_of(grid, data), get_codes(grid, data), book_of(grid)
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
    (scale, _), codes = lattice_of(grid, data), get_codes(grid, data)
    for numbers in layout_of(grid).parts:
        values, (least, most) = get_numbers(grid, data, numbers), numbers.range
        step = np.where(values < most, 1, -1).astype(np.int32)
        slope = lattice_of(grid, put_numbers(grid, data, numbers, values + step))[0] - scale
        slope = slope[:, :: slope.shape[1] // step.shape[1]] * step
        rescale_entries(pull, hessian, codes, scale, slope, values, least, most, tables_of(book_of(grid)))
        data = put_numbers(grid, data, numbers, values)
    return put_codes(grid, data, codes)


def _refit(grid: Grid, data: np.ndarray, pull: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Scales and minima moved to where they are best, the codes fixed; `pull` follows."""
    layout = layout_of(grid)
    for numbers in layout.parts:
        values, (least, most) = get_numbers(grid, data, numbers), numbers.range
        step = np.where(values < most, 1, -1).astype(np.int32)
        slopes = grid.dequantize(put_numbers(grid, data, numbers, values + step)) - grid.dequantize(data)
        slopes *= np.repeat(step, slopes.shape[1] // step.shape[1], axis=1)
        fitted = values.astype(np.float32)
        refit(pull, hessian, slopes, fitted, WHOLE, least, most)
        data = put_numbers(grid, data, numbers, fitted.astype(np.int32))
    for place in layout.floats:
        fitted, alone = get_floats(grid, data, place), data
        for other in layout.floats:
            alone = put_floats(grid, alone, other, float(other == place))
        refit(pull, hessian, grid.dequantize(alone), fitted, HALF if place[1] == "<f2" else SINGLE, 0, 0)
        data = put_floats(grid, data, place, fitted)
    return data


def _errors(errors: np.ndarray, solver: Solver) -> np.ndarray:
    """e H eᵀ of every row of errors. H is symmetric: what lies right of the diagonal's blocks counts twice."""
    total = np.zeros(len(errors), np.float32)
    for first in range(0, errors.shape[1], WIDTH):
        block, behind = slice(first, first + WIDTH), slice(first + WIDTH, None)
        own = product(errors[:, block], solver.hessian[block, first:])
        total += (own[:, :WIDTH] * errors[:, block]).sum(1)
        total += 2 * (own[:, WIDTH:] * errors[:, behind]).sum(1)
    return total


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, so that a row of it does not depend on how many there are: matrices of few rows, for which BLAS has loops of
    their own, get rows of zeros."""
    rows = len(a)
    if rows < LEAST_ROWS:
        a = np.concatenate([a, np.zeros((LEAST_ROWS - rows, a.shape[1]), a.dtype)])
    return (torch.from_numpy(np.ascontiguousarray(a)) @ torch.from_numpy(np.ascontiguousarray(b))).numpy()[
        :rows
    ]


def _levels(grid: Grid) -> tuple[np.ndarray, np.ndarray, bool]:
    """A grid's levels, the middles between each two, float32, and whether they are 0, 1, 2 ..."""
    levels = levels_of(grid)
    return levels, (levels[1:] + levels[:-1]) / 2, bool((levels == np.arange(len(levels))).all())
