"""SparseGPT: weights go where the others can make up for them, and the others do (Frantar & Alistarh, arXiv:2301.00774).

The columns of a weight are swept as GPTQ sweeps them, with the same factor of the same H = XᵀX: a weight w that goes costs
w² / U², U the factor's diagonal, and the columns behind it take up the error. What goes is chosen a block of columns at
a time, from the weights as the columns before left them: the cheapest of the block, or with a pattern of each group.

There the paper ends. Columns behind a weight have made up for it, those before have not; so what stays then goes to its
least squares, given what went, by conjugate gradients (see `settle`).
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.methods.gptq import Solver, product
from llmcompress.methods.masks import Pattern, choose, count_of, lowest

WIDTH = 128  # columns of which the cheapest go, as in the paper
SETTLED = 1024  # rows that go to their least squares at a time
# e H e over that of Wanda at half of the weights, mean of sample-llama-6m's matrices, after 0, 2, 4, 8, 16 and 32 rounds:
# 0.242, 0.165, 0.133, 0.114, 0.108, 0.107, which is what solving for each row gives.
ROUNDS = {"fast": 0, "normal": 16, "best": 32}


def prune(
    weights: np.ndarray,
    solver: Solver,
    sparsity: float,
    pattern: Pattern | None = None,
    effort: str = "normal",
    by_row: bool = False,
) -> np.ndarray:
    """float32 (rows, columns) with zeros in place of what went, and the others as they made up for it.

    The solver has a factor. Without a pattern `int(rows * 128 * sparsity)` weights of every 128 columns go; `by_row`,
    `int(128 * sparsity)` of each row's, so that rows have nothing to do with each other. An effort of "fast" is the paper's.
    """
    left = weights.copy()
    for block in blocks(weights.shape[1], pattern):
        part = np.ascontiguousarray(left[:, block])
        factor = np.ascontiguousarray(solver.factor[block, block])
        gone = np.zeros(part.shape, np.bool_)
        if not pattern:
            scores, found = np.square(part / factor.diagonal()), gone
            if not by_row:
                scores, found = scores.reshape(1, -1), gone.reshape(1, -1)
            lowest(scores, count_of(scores.shape[1], sparsity), found)
        errors = np.zeros_like(part)
        sweep(part, factor, gone, pattern.kept if pattern else 0, pattern.group if pattern else 0, errors)
        left[:, block] = part
        left[:, block.stop :] -= product(errors, solver.factor[block, block.stop :])
    for first in range(0, len(left), SETTLED):
        rows = slice(first, first + SETTLED)
        left[rows] = settle(weights[rows], left[rows], solver.damped, ROUNDS[effort])
    return left


def settle(weights: np.ndarray, pruned: np.ndarray, hessian: np.ndarray, rounds: int) -> np.ndarray:
    """What is not zero of `pruned`, moved towards the least e H eᵀ of its row, e being the error beside `weights`.

    Conjugate gradients over the weights that stay, H's diagonal as preconditioner, every row by itself.
    """
    stays, inverse = pruned != 0, 1 / hessian.diagonal()
    found = pruned.copy()
    residual = product(weights - pruned, hessian) * stays
    direction = residual * inverse
    square = (residual * direction).sum(1, keepdims=True)
    for _ in range(rounds):
        pulled = product(direction, hessian) * stays
        length = _quotient(square, (direction * pulled).sum(1, keepdims=True))
        found += length * direction
        residual -= length * pulled
        before, scaled = square, residual * inverse
        square = (residual * scaled).sum(1, keepdims=True)
        direction = scaled + _quotient(square, before) * direction
    return found


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Zeros where there is nothing left to do."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def blocks(columns: int, pattern: Pattern | None) -> list[slice]:
    """Blocks of columns that cut no group."""
    width = max(pattern.group, WIDTH // pattern.group * pattern.group) if pattern else WIDTH
    return [slice(first, min(first + width, columns)) for first in range(0, columns, width)]


@compiled(fastmath={"contract"})
def sweep(left, factor, gone, kept, group, errors):
    """Zero what is `gone` of a block of columns, in place, and let the columns behind make up for it.

    left: float32 (rows, columns). factor: (columns, columns), upper triangular. gone: bool (rows, columns); with a
    `group`, chosen here as the sweep gets to it. errors: in units of the factor's diagonal, zeros before.
    """
    rows, columns = left.shape
    scores = np.empty(columns, np.float32)
    for row in range(rows):
        for j in range(columns):
            if group and j % group == 0:
                for i in range(j, j + group):
                    scores[i] = (left[row, i] / factor[i, i]) ** 2
                choose(scores[j : j + group], kept, gone[row, j : j + group])
            if gone[row, j]:
                error = left[row, j] / factor[j, j]
                errors[row, j] = error
                for i in range(j + 1, columns):
                    left[row, i] -= error * factor[j, i]
                left[row, j] = np.float32(0)
