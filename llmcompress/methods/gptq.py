"""GPTQ: round a column, and let the columns that follow make up for its error (Frantar et al., arXiv:2210.17323).

The error is measured on the inputs the weight will see: e H eᵀ for a row's rounding error e, H = XᵀX. Here the scales of a
block are fitted on the weights as the columns before it left them, weighed by the diagonal of H as an importance
matrix; then codes go column by column; then all codes of a row are gone through again, each moved to where it is best
given all others, until none moves (coordinate descent, as in QuantEase, arXiv:2309.01885). A row is taken only if
its error is below that of rounding to nearest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from llmcompress.grids.code_bits import code_bits, get_codes, lattice_of, levels_of, put_codes
from llmcompress.grids.grid import Grid
from llmcompress.methods.columns import descend, sweep

WIDTH = 256  # columns whose codes are chosen before the rest hears of their errors: a multiple of every block
DAMPING = 0.01  # of the mean of H's diagonal; doubled while H is not positive definite
LARGEST_DAMPING = 1.0
FLOOR = 1e-6  # of the largest diagonal element
CHOLESKY_BLOCK = 64
LEAST_ROWS = 64  # of a product
ROUNDS = {"fast": 0, "normal": 8, "best": 32}  # of coordinate descent at most


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
        hessian.diagonal()[dead] = 1
        factor, rung = _factor(hessian)
        return cls(hessian.numpy(), None if factor is None else factor.numpy(), rung)

    @property
    def importance(self) -> np.ndarray:
        """float32 (columns,): the diagonal of H, what an importance matrix holds."""
        return np.ascontiguousarray(self.hessian.diagonal())

    @functools.cached_property
    def by_importance(self) -> tuple[np.ndarray, Solver]:
        """The columns in the order of their importance, the largest first, and the solver for them in that order."""
        order = np.argsort(-self.hessian.diagonal(), kind="stable")
        return order, Solver.of(self.hessian[np.ix_(order, order)])


def supports(grid: Grid) -> bool:
    """Whether a grid's codes can be chosen one by one."""
    return code_bits(grid) is not None


def quantize(
    weights: np.ndarray, grid: Grid, solver: Solver, effort: str = "normal", act_order: bool = False
) -> np.ndarray:
    """Round float32 (rows, columns) to `grid`; returns uint8 (rows, row_bytes).

    No row has a larger error e H eᵀ than rounded to nearest with the importance diag(H). With `act_order` the columns
    are rounded in the order of their importance, on the scales of rounding to nearest; so they are where blocks
    are wider than a sweep.
    """
    nearest = grid.quantize(weights, solver.importance, effort)
    if solver.factor is None or not supports(grid):
        return nearest
    if act_order or WIDTH % grid.block:
        fed = _feed_errors_on(weights, grid, nearest, solver, act_order)
    else:
        fed = _feed_errors(weights, grid, solver, effort)
    best = _descend(weights, grid, fed, solver, ROUNDS[effort])
    worse = _errors(weights, grid, best, solver) > _errors(weights, grid, nearest, solver)
    best[worse] = nearest[worse]
    return best


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


def _feed_errors(weights: np.ndarray, grid: Grid, solver: Solver, effort: str) -> np.ndarray:
    """GPTQ's sweep over the columns, scales fitted as it gets to them; returns encoded rows."""
    left = weights.copy()  # the weights, less what the errors so far ask of them
    encoded = []
    for first in range(0, weights.shape[1], WIDTH):
        block = slice(first, first + WIDTH)
        data = grid.quantize(left[:, block], solver.importance[block], effort)
        encoded.append(
            put_codes(grid, data, _round_block(left, block, *lattice_of(grid, data), grid, solver))
        )
    return np.concatenate(encoded, axis=1)


def _feed_errors_on(
    weights: np.ndarray, grid: Grid, data: np.ndarray, solver: Solver, act_order: bool
) -> np.ndarray:
    """The sweep on the scales of `data`, encoded rows, in either order of the columns."""
    order, ordered = solver.by_importance if act_order else (slice(None), solver)
    left = weights[:, order].copy()
    scale, offset = (lattice[:, order] for lattice in lattice_of(grid, data))
    codes = np.empty(weights.shape, np.uint8)
    for first in range(0, weights.shape[1], WIDTH):
        block = slice(first, first + WIDTH)
        codes[:, block] = _round_block(left, block, scale[:, block], offset[:, block], grid, ordered)
    if act_order:
        codes[:, order] = codes.copy()
    return put_codes(grid, data, codes)


def _round_block(
    left: np.ndarray, block: slice, scale: np.ndarray, offset: np.ndarray, grid: Grid, solver: Solver
) -> np.ndarray:
    """The codes of a block of columns, uint8, on scales and offsets of its size; the columns of `left` behind it
    make up for its errors."""
    codes, errors = np.empty(scale.shape, np.uint8), np.empty(scale.shape, np.float32)
    lattice = np.ascontiguousarray(scale), np.ascontiguousarray(offset), *_levels(grid)
    factor = np.ascontiguousarray(solver.factor[block, block])
    sweep(np.ascontiguousarray(left[:, block]), *lattice, factor, codes, errors)
    left[:, block.stop :] -= _product(errors, solver.factor[block, block.stop :])
    return codes


def _descend(weights: np.ndarray, grid: Grid, data: np.ndarray, solver: Solver, rounds: int) -> np.ndarray:
    """Codes moved one at a time to where the row's error is least, the scales of `data` fixed."""
    pull = _product(weights - grid.dequantize(data), solver.hessian)  # e H, (rows, columns)
    scale, _ = lattice_of(grid, data)
    codes = get_codes(grid, data)
    order = np.argsort(-solver.hessian.diagonal(), kind="stable")
    descend(pull, solver.hessian, codes, scale, *_levels(grid), order, rounds)
    return put_codes(grid, data, codes)


def _errors(weights: np.ndarray, grid: Grid, data: np.ndarray, solver: Solver) -> np.ndarray:
    """e H eᵀ of every row."""
    errors = weights - grid.dequantize(data)
    return (_product(errors, solver.hessian) * errors).sum(1)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
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
