"""What the search of llama.cpp's quantizers minimises, for each format, in plain NumPy.

A weight's squared error counts `importance * sqrt(share * mean square + x^2)` where importance is given;
without, each format has a rule of its own. Facts from `quantize_row_*_impl` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

# Over how many weights the mean square is taken (None: the row), and how often it counts.
_ENERGY = {
    "Q4_0": (None, 1), "Q4_1": (None, 1), "Q5_0": (None, 1), "Q5_1": (None, 1), "IQ4_NL": (32, 2),
    "TQ1_0": (None, 1), "TQ2_0": (None, 1), "MXFP4": (None, 1), "NVFP4": (None, 1), "Q1_0": (None, 1),
    "Q2_0": (None, 1),
    "Q2_K": (256, 1), "Q3_K": (256, 2), "Q4_K": (256, 2), "Q5_K": (256, 2), "IQ4_XS": (256, 2),
    "IQ3_XXS": (256, 2), "IQ3_S": (256, 2), "IQ2_XXS": (256, 1), "IQ2_XS": (256, 1), "IQ2_S": (256, 2),
    "IQ1_S": (256, 2), "IQ1_M": (256, 2),
}  # fmt: skip
_BY_SQUARE = ("Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ1_M")
NEEDS_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ1_S")  # ggml refuses these without


def mean_square(x: np.ndarray, span: int | None) -> np.ndarray:
    """Of each run of `span` weights of a row, at every weight of the run; `x` is `(rows, columns)`."""
    runs = x.reshape(len(x), -1, span or x.shape[1])
    return np.broadcast_to((runs**2).mean(-1, keepdims=True), runs.shape).reshape(x.shape)


def error_weights(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """What each squared error counts, float64 `(rows, columns)`; all of them 1 where nothing is searched."""
    x = x.astype(np.float64)
    if importance is None and name in NEEDS_IMPORTANCE:
        importance = np.ones(x.shape[1])
    if importance is not None:
        if name == "Q6_K":
            return np.broadcast_to(importance, x.shape)
        if name in _ENERGY:
            span, share = _ENERGY[name]
            return importance * np.sqrt(share * mean_square(x, span) + x**2)
    elif name in _BY_SQUARE:
        return x**2
    elif name == "Q2_K":
        return abs(x)
    elif name in ("Q4_K", "Q5_K"):
        return np.sqrt(mean_square(x, 32)) + abs(x)
    elif name == "IQ2_S":
        return 0.5 * mean_square(x, 256) + x**2
    return np.ones_like(x)


def weighted_error(name: str, x: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    """The sum over all weights of what llama.cpp makes small; `x` and `decoded` are `(rows, columns)`."""
    return float((error_weights(name, x, importance) * (decoded.astype(np.float64) - x) ** 2).sum())
