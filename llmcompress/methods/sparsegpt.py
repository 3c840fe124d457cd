"""SparseGPT: weights go where the others can make up for them, and the others do (Frantar & Alistarh, arXiv:2301.00774).

The columns of a weight are swept as GPTQ sweeps them, with the same factor of the same H = XᵀX: a weight w that goes costs
w² / U², U the factor's diagonal, and the columns behind it take up the error. What goes is chosen a block of columns at
a time, from the weights as the columns before left them: the cheapest of the block, or with a pattern of each group.

There the paper ends. Columns behind a weight have made up for it, those before have not; so what stays then goes to its
least squares, given what went (`settling.py`). And what went was chosen before all was known; so
weights come back in place of others of their row while that lowers the error (see `exchange`), and it settles again.
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.methods.masks import Pattern, choose, count_of, lowest
from llmcompress.methods.settling import ROUNDS, SETTLED, settle
from llmcompress.methods.solver import Solver, product

WIDTH = 128  # columns of which the cheapest go, as in the paper
# Of exchanging and settling. e H e over that without, sample-llama-6m's q of block 1, o of 2, up of 3, down of 4: 0.77, 0.57,
# 0.76, 0.93 after one, 0.72, 0.51, 0.74, 0.92 after two, 0.72, 0.49, 0.74, 0.92 after four.
EXCHANGES = {"fast": 0, "normal": 2, "best": 4}
CANDIDATES = 8  # of the weights that are cheapest to give up, of which one goes
MOST = 8  # at most a weight for that many columns is exchanged in a row at once


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
        behind = solver.factor[block, block.stop :]
        for first in range(0, len(left), SETTLED):
            rows = slice(first, first + SETTLED)
            left[rows, block.stop :] -= product(errors[rows], behind)
    if not ROUNDS[effort] and not EXCHANGES[effort]:
        return left
    hessian, columns = solver.damped, weights.shape[1]
    left = settle(weights, left, hessian, ROUNDS[effort])
    for _ in range(EXCHANGES[effort]):
        left = rechosen(
            weights, left, hessian, ROUNDS[effort], pattern.group if pattern else columns, columns
        )
    return left


def rechosen(
    weights: np.ndarray, pruned: np.ndarray, hessian: np.ndarray, rounds: int, group: int, zeros: int
) -> np.ndarray:
    """What is better than `pruned` for `exchange`, settled. float32 (rows, columns)."""
    found = pruned.copy()
    for first in range(0, len(found), SETTLED):
        rows = slice(first, first + SETTLED)
        exchange(found[rows], product(weights[rows] - found[rows], hessian), hessian, group, zeros)
        found[rows] = settle(weights[rows], found[rows], hessian, rounds)
    return found


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


@compiled(fastmath={"contract"})
def move(x, r, hessian, i, value):
    """Set a weight of a row, and bring the row's residual up to date."""
    by = value - x[i]
    for j in range(len(r)):
        r[j] -= hessian[i, j] * by
    x[i] = value


@compiled(fastmath={"contract"})
def exchange(left, residual, hessian, group, zeros):
    """Let weights that are zero come back for others of their row, in place, while e H eᵀ falls.

    left: float32 (rows, columns). residual: e H, e the weights less `left`; it changes, too. One comes for another of the same
    `group` of columns, and for none where more than `zeros` of a group are zero. With all others held, a weight x that goes
    costs x² H_xx + 2 x r_x, and one that comes wins r² / H.
    """
    rows, columns = left.shape
    cost, cheapest = np.empty(CANDIDATES, np.float32), np.empty(CANDIDATES, np.int64)
    for row in range(rows):
        x, r = left[row], residual[row]
        for first in range(0, columns, group):
            for _ in range((x[first : first + group] == 0).sum() - zeros):
                wins, comes = np.float32(0), -1
                for j in range(first, min(first + group, columns)):
                    if x[j] == 0 and r[j] * r[j] / hessian[j, j] > wins:
                        wins, comes = r[j] * r[j] / hessian[j, j], j
                if comes >= 0:
                    move(x, r, hessian, comes, r[comes] / hessian[comes, comes])
        for _ in range(columns // MOST):
            cost[:] = np.inf
            for i in range(columns):
                if x[i] != 0:
                    lost = x[i] * (x[i] * hessian[i, i] + 2 * r[i])
                    at = CANDIDATES - 1
                    if lost < cost[at]:
                        while at > 0 and cost[at - 1] > lost:
                            cost[at], cheapest[at] = cost[at - 1], cheapest[at - 1]
                            at -= 1
                        cost[at], cheapest[at] = lost, i
            best, goes, comes = np.float32(0), -1, -1
            for lost, i in zip(cost, cheapest):
                if lost < np.inf:
                    first = i // group * group
                    for j in range(first, min(first + group, columns)):
                        if x[j] == 0:
                            pull = r[j] + hessian[i, j] * x[i]
                            change = lost - pull * pull / hessian[j, j]
                            if change < best:
                                best, goes, comes = change, i, j
            if goes < 0:
                break
            move(x, r, hessian, goes, np.float32(0))
            move(x, r, hessian, comes, r[comes] / hessian[comes, comes])
