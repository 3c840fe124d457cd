"""OWL: a block with more outliers among its |weight| x norm of the input gives up fewer weights (Yin et al.,
arXiv:2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OUTLIER = 5.0  # times the mean of a matrix's scores
SPREAD = 0.08  # a block's share is at most about so far from the mean of all


class Outliers:
    """Counts them over the matrices of a block."""

    def __init__(self) -> None:
        self._found = self._weights = 0

    def add(self, weights: np.ndarray, squares: np.ndarray) -> None:
        """float32 (rows, columns) and the mean squared inputs, (columns,)."""
        scores = np.abs(weights) * np.sqrt(squares)
        self._found += int((scores > OUTLIER * scores.mean(dtype=np.float64)).sum())
        self._weights += weights.size

    @property
    def ratio(self) -> float:
        return self._found / max(1, self._weights)


def shares(ratios: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The share that goes of each block, from its outliers' ratio and its weights: `sparsity` of all weights, the
    blocks 2 x SPREAD apart at most."""
    ratios, sizes = np.array(ratios), np.array(sizes, float)
    span = ratios.max() - ratios.min()
    spread = min(SPREAD, sparsity / 2, (1 - sparsity) / 2)  # none below 0 or above 1
    kept = 2 * spread * (ratios - ratios.min()) / span if span > 0 else np.zeros(len(ratios))
    return list(sparsity + np.average(kept, weights=sizes) - kept)
