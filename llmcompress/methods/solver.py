"""H = XᵀX and the factor of its inverse, which error feedback goes by, whatever state H is in.

Damping climbs until H has a Cholesky factor, then comes a floor under its diagonal, then float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

DAMPING = 0.01  # of the mean of H's diagonal; doubled while H is not positive definite
LARGEST_DAMPING = 1.0
FLOOR = 1e-6  # of the largest diagonal element
CHOLESKY_BLOCK, PANEL = 64, 256  # columns; of all but the smallest blocks products do the work
LEAST_ROWS = 64  # of a product
# Of the mean of H's diagonal, added to it after the sweep: codes moved freely give up whatever the calibration happens not
# to show. Chosen on the end of sample-llama-6m's held-out text, which no figure of ours is of; KL divergences with 0.03 and
# 0.1: Q4_K 0.000677, 0.000682; IQ3_XXS 0.00472, 0.00461.
RIDGE, RIDGE_OF_CODEBOOKS = 0.03, 0.1


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

    def ridge(self, share: float = RIDGE) -> np.float32:
        """That share of the mean of H's diagonal: a little of it on H, and no error becomes large that these inputs happen
        not to show."""
        return ridge(self.hessian, share)

    @functools.cached_property
    def damped(self) -> np.ndarray:
        """H with its ridge."""
        return damped(self.hessian)

    @functools.cached_property
    def conditional(self) -> np.ndarray:
        """float32 (columns,): what an error counts in the sweep, where the columns behind make up for what they can."""
        return (1 / self.factor.diagonal() ** 2).astype(np.float32)

    @functools.cached_property
    def by_importance(self) -> tuple[np.ndarray, Solver]:
        """The columns in the order of their importance, the largest first, and the solver for them in that order."""
        order = np.argsort(-self.hessian.diagonal(), kind="stable")
        return order, Solver.of(self.hessian[np.ix_(order, order)])


def ridge(hessian: np.ndarray, share: float = RIDGE) -> np.float32:
    return np.float32(share * hessian.diagonal().mean())


def damped(hessian: np.ndarray) -> np.ndarray:
    """H with its ridge, float32 (columns, columns)."""
    found = hessian.copy()
    found.flat[:: len(found) + 1] += ridge(hessian)
    return found


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
    """Upper U with UᵀU = (H + added I)⁻¹: from H = R Rᵀ, R upper, U is R⁻¹."""
    damped = hessian.clone()
    damped.diagonal().add_(added)
    upper = _upper_root(damped)
    if upper is None or not torch.isfinite(upper).all():
        return None
    inverse = torch.zeros_like(upper)
    for panel in _blocks(len(upper), PANEL):
        corner = upper[panel, panel]
        of_corner = torch.linalg.solve_triangular(
            corner, torch.eye(len(corner), dtype=corner.dtype), upper=True
        )
        inverse[panel, panel] = of_corner
        above = upper[: panel.start, panel] @ of_corner
        for rows in _blocks(panel.start, PANEL):  # left of them are zeros
            inverse[rows, panel] = -(inverse[rows, rows.start : panel.start] @ above[rows.start :])
    return inverse if torch.isfinite(inverse).all() else None


def _upper_root(matrix: torch.Tensor) -> torch.Tensor | None:
    """Upper R with R Rᵀ = matrix, None if there is none; `matrix` is used up. From its end, Cholesky's.

    LAPACK's own has other bits on another number of threads, so it gets blocks that it works on with one.
    """
    for panel in reversed(_blocks(len(matrix), PANEL)):
        for block in reversed(_blocks(panel.stop, CHOLESKY_BLOCK, panel.start)):
            first = block.start
            corner, failed = torch.linalg.cholesky_ex(matrix[block, block].flip(0, 1))
            if failed:
                return None
            corner = matrix[block, block] = corner.flip(0, 1)
            column = torch.linalg.solve_triangular(corner, matrix[:first, block].T, upper=True).T.contiguous()
            matrix[:first, block] = column
            matrix[:first, panel.start : first] -= column @ column[panel.start :].T
        column = matrix[: panel.start, panel].contiguous()
        for columns in _blocks(panel.start, PANEL):
            matrix[: columns.stop, columns] -= column[: columns.stop] @ column[columns].T
    return matrix.triu_()


def _blocks(end: int, width: int, first: int = 0) -> list[slice]:
    return [slice(at, min(at + width, end)) for at in range(first, end, width)]


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, so that a row of it does not depend on how many there are: matrices of few rows, for which BLAS has loops of
    their own, get rows of zeros."""
    rows = len(a)
    if rows < LEAST_ROWS:
        a = np.concatenate([a, np.zeros((LEAST_ROWS - rows, a.shape[1]), a.dtype)])
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()[:rows]
