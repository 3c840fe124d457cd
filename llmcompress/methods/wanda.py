"""Wanda: of every output's weights go those with the smallest |weight| x norm of their input (Sun et al., arXiv:2306.11695).

The norms are those of a calibration, the very numbers of an importance matrix; no weight that stays is changed.
"""

from __future__ import annotations

import numpy as np

from llmcompress.methods.masks import Pattern, lowest, lowest_of_groups

ROWS = 256  # scored at a time


def mask(
    weights: np.ndarray, squares: np.ndarray, sparsity: float, pattern: Pattern | None = None
) -> np.ndarray:
    """What goes of float32 (rows, columns), bool: of every row `int(columns * sparsity)` weights; with a pattern, of each
    group. squares: float32 (columns,), mean squared inputs."""
    norms, found = np.sqrt(squares), np.empty(weights.shape, np.bool_)
    for first in range(0, len(weights), ROWS):
        rows = slice(first, first + ROWS)
        scores = np.abs(weights[rows]) * norms
        if pattern:
            lowest_of_groups(scores, pattern.kept, pattern.group, found[rows])
        else:
            lowest(scores, int(weights.shape[1] * sparsity), found[rows])
    return found
