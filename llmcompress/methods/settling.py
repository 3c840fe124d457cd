"""What stays of pruned weights makes up for what went: each row goes to its least squares, given which of its weights are zero."""

from __future__ import annotations

import numpy as np

from llmcompress.methods.solver import product

SETTLED = 1024  # rows at a time
# e H e over that of Wanda at half of the weights, mean of sample-llama-6m's matrices, from sparsegpt's sweep after 0, 2, 4, 8,
# 16 and 32 rounds: 0.242, 0.165, 0.133, 0.114, 0.108, 0.107, which is what solving for each row gives.
ROUNDS = {"fast": 0, "normal": 16, "best": 32}


def settle(weights: np.ndarray, pruned: np.ndarray, hessian: np.ndarray, rounds: int) -> np.ndarray:
    """float32 (rows, columns): what is not zero of `pruned`, moved towards the least e H eᵀ of its row, e being the error
    beside `weights`.

    hessian: float32 (columns, columns), positive definite. The error never grows. Conjugate gradients (Hestenes & Stiefel
    1952) over the weights that stay, H's diagonal as preconditioner, every row by itself.
    """
    found = pruned.copy()
    for first in range(0, len(found) if rounds else 0, SETTLED):
        rows = slice(first, first + SETTLED)
        _descend(weights[rows], found[rows], hessian, rounds)
    return found


def _descend(weights: np.ndarray, found: np.ndarray, hessian: np.ndarray, rounds: int) -> None:
    """In place, rows that are no more than SETTLED."""
    stays, inverse = found != 0, 1 / hessian.diagonal()
    residual = product(weights - found, hessian) * stays
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


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Zeros where there is nothing left to do."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
