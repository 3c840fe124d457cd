"""SparseGPT: weights go where the others can make up for them, and the others do (Frantar & Alistarh, arXiv:2301.00774).

The columns of a weight are swept as GPTQ sweeps them, with the same factor of the same H = XᵀX: a weight w that goes costs
w² / U², U the factor's diagonal, and the columns behind it take up the error. What goes is chosen a block of columns at
a time, from the weights as the columns before left them: the cheapest of the block, or with a pattern of each group.
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.methods.gptq import Solver, product
from llmcompress.methods.masks import Pattern, choose, count_of, lowest

WIDTH = 128  # columns of which the cheapest go, as in the paper


def prune(weights: np.ndarray, solver: Solver, sparsity: float, pattern: Pattern | None = None) -> np.ndarray:
    """float32 (rows, columns) with zeros in place of what went, and the others as they made up for it.

    The solver has a factor. Without a pattern `int(rows * 128 * sparsity)` weights of every 128 columns go.
    """
    left = weights.copy()
    for block in blocks(weights.shape[1], pattern):
        part = np.ascontiguousarray(left[:, block])
        factor = np.ascontiguousarray(solver.factor[block, block])
        gone = np.zeros(part.shape, np.bool_)
        if not pattern:
            scores = np.square(part / factor.diagonal())
            lowest(scores.reshape(1, -1), count_of(scores.size, sparsity), gone.reshape(1, -1))
        errors = np.zeros_like(part)
        sweep(part, factor, gone, pattern.kept if pattern else 0, pattern.group if pattern else 0, errors)
        left[:, block] = part
        left[:, block.stop :] -= product(errors, solver.factor[block, block.stop :])
    return left


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
