"""The search of the codebook formats, slow and obvious: every entry, every legal sign, every scale, many d.

Of a block's 256 weights x, with weights w of squared errors, the error of eight of them at a step s is
`sum w (x - s v)^2 = sum w x^2 - 2 s sum w x v + s^2 sum w v^2`, where v are the format's values at step 1.
"""

from __future__ import annotations

from itertools import product

import gguf
import numpy as np

SIGNS = np.array(list(product((1, -1), repeat=8)))
EVEN = (SIGNS < 0).sum(1) % 2 == 0
SUB_BLOCK = {"IQ2_XXS": 32, "IQ2_XS": 16, "IQ2_S": 16, "IQ3_XXS": 32, "IQ3_S": 32, "IQ1_S": 32, "IQ1_M": 16}
IN_EVEN_SETS = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")
SHIFT_SPAN = {"IQ1_S": 32, "IQ1_M": 8}  # how many weights share a shift of 1/8 up or down
DS = np.geomspace(0.25, 1.6, 90)  # largest step times largest value, over the largest weight


def entries_of(name: str) -> np.ndarray:
    """The table of gguf-py, float64 `(entries, 4 or 8)`; 8 counts as 1 in IQ2, 4 in IQ3_XXS."""
    table = getattr(gguf.quants, name.replace("IQ1_M", "IQ1_S"))
    table.init_grid()
    unit = {"IQ2": 8, "IQ3": 4, "IQ1": 1}[name[:3]] if name != "IQ3_S" else 1
    return table.grid.reshape(table.grid_shape).astype(np.float64) / unit


def least(xv: np.ndarray, vv: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The least `s^2 vv - 2 s xv` of all entries, for each step."""
    return (np.outer(steps**2, vv) - 2 * np.outer(steps, xv)).min(1)


def error_of_signed(name: str, entries: np.ndarray, x: np.ndarray, w: np.ndarray, steps) -> np.ndarray:
    """Of eight weights, for each step, with the best legal signs."""
    size = entries.shape[1]
    runs = [slice(i, i + size) for i in range(0, 8, size)]
    by_parity = []
    for parity in product((0, 1), repeat=len(runs)):
        if name in IN_EVEN_SETS and sum(parity) % 2:
            continue
        total = (w * x**2).sum()
        for run, odd in zip(runs, parity):
            signs = np.unique(SIGNS[:, :size], axis=0)
            signs = signs[(signs < 0).sum(1) % 2 == odd]
            xv = (signs * (w * x)[run]) @ entries.T
            total = total + least(xv.max(0), entries**2 @ w[run], steps)
        by_parity.append(total)
    return np.min(by_parity, axis=0)


def error_of_shifted(entries: np.ndarray, shift: float, x: np.ndarray, w: np.ndarray, steps) -> np.ndarray:
    """Of eight weights, for each step."""
    values = entries + shift
    return (w * x**2).sum() + least(values @ (w * x), values**2 @ w, steps)


def error_of_part(name: str, entries: np.ndarray, x: np.ndarray, w: np.ndarray, steps) -> np.ndarray:
    """Of the weights of a sub-block, for each step."""
    eights = [(x[j : j + 8], w[j : j + 8]) for j in range(0, len(x), 8)]
    if name not in SHIFT_SPAN:
        return sum(error_of_signed(name, entries, *eight, steps) for eight in eights)
    together = SHIFT_SPAN[name] // 8  # eights that share a shift
    shifted = [
        np.array([error_of_shifted(entries, shift, *eight, steps) for eight in eights])
        .reshape(-1, together, len(steps))
        .sum(1)
        for shift in (0.125, -0.125)
    ]
    return np.minimum(*shifted).sum(0)


def least_error(name: str, x: np.ndarray, w: np.ndarray) -> float:
    """The least error of a block, about: `x` and `w` are float64 `(256,)`."""
    entries, size = entries_of(name), SUB_BLOCK[name]
    scales = np.arange(1, 16 if name in SHIFT_SPAN else 32, 2)
    ds = DS * abs(x).max() / entries.max() / scales.max()
    steps = np.outer(ds, scales)
    total = np.zeros(len(ds))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        errors = error_of_part(name, entries, x[part], w[part], steps.reshape(-1))
        total += errors.reshape(steps.shape).min(1)
    return float(total.min())
