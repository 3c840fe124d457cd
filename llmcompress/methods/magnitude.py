"""Magnitude pruning: the smallest weights go, of a matrix or of the whole model (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

import numpy as np

from llmcompress.methods.masks import Pattern, lowest, lowest_of_groups


def mask(weights: np.ndarray, sparsity: float, pattern: Pattern | None = None) -> np.ndarray:
    """What goes of float32 (rows, columns), bool: the `sparsity` of all that is smallest; with a pattern, of each group."""
    found = np.empty(weights.shape, np.bool_)
    sizes = np.abs(weights)
    if pattern:
        lowest_of_groups(sizes, pattern.kept, pattern.group, found)
    else:
        lowest(sizes.reshape(1, -1), int(sizes.size * sparsity), found.reshape(1, -1))
    return found
