"""The least error that grids without a base can leave, by trying every rounding there is; slow and plain.

As a step d grows from nothing, the codes of a block change only where a weight over d passes the middle between
two codes. Between two such d the codes stay, and least squares gives the least error they can leave.
No d, and none that is a float16, does better than the best of these.
"""

from __future__ import annotations

import numpy as np


def least_errors(x: np.ndarray, w: np.ndarray, low: int, high: int) -> np.ndarray:
    """float64 `(blocks,)`: min over d of the sum of w (x - d l)^2, l the codes in low..high nearest to x / d.

    `x` and `w` are `(blocks, size)`, all `w` positive.
    """
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    middles = np.arange(low, high) + 0.5
    changes = (x[:, :, None] / middles).reshape(len(x), -1)  # d of either sign
    outside = 2 * abs(changes).max(1, keepdims=True) + 1
    changes = np.sort(np.concatenate([-outside, 0 * outside, changes, outside], 1))
    best = np.zeros(len(x))
    for d in ((changes[:, 1:] + changes[:, :-1]) / 2).T:
        inverse = np.divide(1, d, where=d != 0, out=np.zeros_like(d))
        codes = np.clip(np.rint(x * inverse[:, None]), low, high)
        sum_xl, sum_ll = (w * x * codes).sum(1), (w * codes * codes).sum(1)
        best = np.maximum(best, np.divide(sum_xl**2, sum_ll, where=sum_ll > 0, out=np.zeros_like(best)))
    return (w * x * x).sum(1) - best
