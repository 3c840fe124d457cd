"""Wanda: of every output's weights go those with the smallest |weight| x norm of their input (Sun et al., arXiv:2306.11695).

The norms are those of a calibration, the very numbers of an importance matrix. There the paper ends, and leaves what stays as
it is. With XᵀX what stays of a row goes to its least squares, given what went (`settling.py`); the masks are the same.
"""

from __future__ import annotations

import numpy as np

from llmcompress.methods.masks import Pattern, count_of, lowest, lowest_of_groups
from llmcompress.methods.settling import ROUNDS, settle
from llmcompress.methods.solver import damped

ROWS = 256  # scored at a time


def prune(
    weights: np.ndarray,
    squares: np.ndarray,
    products: np.ndarray | None,
    sparsity: float,
    pattern: Pattern | None = None,
    effort: str = "normal",
    by_score: bool = False,
) -> np.ndarray:
    """float32 (rows, columns) with zeros where `mask` says. products: XᵀX, float32 (columns, columns), with which the others
    make up for it; without, and with an effort of "fast", they stay as they are, as in the paper."""
    left = np.where(mask(weights, squares, sparsity, pattern, by_score), np.float32(0), weights)
    if products is None or not ROUNDS[effort] or not squares.any():
        return left
    return settle(weights, left, damped(products), ROUNDS[effort])


def mask(
    weights: np.ndarray,
    squares: np.ndarray,
    sparsity: float,
    pattern: Pattern | None = None,
    by_score: bool = False,
) -> np.ndarray:
    """What goes of float32 (rows, columns), bool: of every row `int(columns * sparsity)` weights; with a pattern, of each
    group. squares: float32 (columns,), mean squared inputs.

    by_score, the paper's variant: every row gives up the same share of the sum of its scores, which is not the same
    number of weights; `int(rows * columns * sparsity)` of the matrix.
    """
    norms, found = np.sqrt(squares), np.empty(weights.shape, np.bool_)
    lost = np.empty(weights.shape if by_score else 0, np.float32)
    for first in range(0, len(weights), ROWS):
        rows = slice(first, first + ROWS)
        scores = np.abs(weights[rows]) * norms
        if by_score:
            lost[rows] = _lost(scores)
        elif pattern:
            lowest_of_groups(scores, pattern.kept, pattern.group, found[rows])
        else:
            lowest(scores, count_of(weights.shape[1], sparsity), found[rows])
    if by_score:
        lowest(lost.reshape(1, -1), count_of(lost.size, sparsity), found.reshape(1, -1))
    return found


def _lost(scores: np.ndarray) -> np.ndarray:
    """The share of its row's sum that goes if a weight goes and with it all of lower score. A bound on it, the paper's
    alpha, takes the same share of every row; the lowest of a matrix are below such a bound."""
    order = np.argsort(scores, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(scores, order, 1), axis=1, dtype=np.float64)
    lost = np.empty_like(scores)
    np.put_along_axis(lost, order, sums / np.maximum(sums[:, -1:], np.finfo(np.float64).tiny), 1)
    return lost
