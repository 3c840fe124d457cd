"""Integers of 2, 3, 4 or 8 bits; a group of weights shares a scale and a zero point.

    weight = scale * (code - zero)    0 <= code, zero < 2^bits

Symmetric grids have zero = 2^(bits - 1) everywhere, and a negative scale where the largest weight is positive, as there is
one code more below zero than above it. Checkpoints pack codes, scales and zeros into tensors of their own (to_gptq.py);
here a group is bytes, so that methods work on it as on a block of any other grid:

    2 bytes    scale, float16
    1 byte     zero
    group      codes, one byte each
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)  # -1: the row
HEAD = 3  # bytes before the codes

# How much of its range a group is clipped to, as a factor on the finest scale that clips nothing. Wide groups of normal
# weights are best clipped at some 2.5 (4 bits) to 1.5 (2 bits) standard deviations.
CLIPPING = {"fast": 8, "normal": 20, "best": 60}  # candidates
WIDEST = {2: 2.4, 3: 2.0, 4: 1.7, 8: 1.1}
REFITS = 4  # at most
SMALLEST, LARGEST = 2.0**-24, 65504.0  # float16


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """`block` is the group's size in weights, the row's length where the row is the group."""

    bits: int = 4
    symmetric: bool = True

    def parts(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of encoded rows: scales, float16 (rows, groups), zeros, uint8 (rows, groups), codes, uint8 (rows, columns)."""
        groups = data.reshape(len(data), -1, self.block_bytes)
        scales = np.ascontiguousarray(groups[:, :, :2]).view("<f2")[:, :, 0]
        return scales, groups[:, :, 2], groups[:, :, HEAD:].reshape(len(data), -1)


@functools.lru_cache(maxsize=64)
def integer_grid(bits: int, group: int, symmetric: bool) -> IntegerGrid:
    """The grid of `bits` bits with `group` weights to a scale."""
    by_effort = {
        effort: functools.partial(_quantize, bits, group, symmetric, np.geomspace(0.92, WIDEST[bits], count, dtype=np.float32))
        for effort, count in CLIPPING.items()
    }  # fmt: skip
    return IntegerGrid(
        f"INT{bits}", -1, group, HEAD + group, by_effort["normal"], functools.partial(_dequantize, group),
        by_effort, bits, symmetric,
    )  # fmt: skip


def _quantize(bits, group, symmetric, clipping, weights, importance, out) -> None:
    rows, columns = weights.shape
    importance = _weighing(importance, columns, group)
    scales = np.empty((rows, columns // group), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    _fit(weights, importance, bits, group, symmetric, clipping, scales, zeros)
    size = np.clip(np.abs(scales), SMALLEST, LARGEST)
    halves = np.copysign(size, scales).astype("<f2")
    blocks = out.reshape(rows, -1, HEAD + group)
    blocks[:, :, :2] = halves.view(np.uint8).reshape(rows, -1, 2)
    blocks[:, :, 2] = zeros
    codes = np.empty((rows, columns), np.uint8)
    _encode(weights, halves.astype(np.float32), zeros, bits, group, codes)
    blocks[:, :, HEAD:] = codes.reshape(rows, -1, group)


def _weighing(importance: np.ndarray | None, columns: int, group: int) -> np.ndarray:
    """The importance over its largest in each group, so that no product underflows; ones for groups without any."""
    if importance is None:
        return np.ones(columns, np.float32)
    groups = importance.reshape(-1, group)
    largest = groups.max(1, keepdims=True)
    return np.divide(groups, largest, out=np.ones_like(groups), where=largest > 0).reshape(columns)


def _dequantize(group, data, out) -> None:
    blocks = data.reshape(len(data), -1, HEAD + group)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    levels = blocks[:, :, HEAD:].astype(np.float32) - blocks[:, :, 2:HEAD].astype(np.float32)
    np.multiply(levels, scales, out=out.reshape(blocks.shape[0], -1, group))


@compiled(fastmath=True)
def _fit(weights, importance, bits, group, symmetric, clipping, scales, zeros):
    """Scales and zeros with the least squared error, each column's times its importance."""
    rows, groups = scales.shape
    for row in range(rows):
        for g in range(groups):
            x, w = weights[row, g * group : (g + 1) * group], importance[g * group : (g + 1) * group]
            if symmetric:
                scales[row, g], zeros[row, g] = _best_symmetric(x, w, bits, clipping), 1 << (bits - 1)
            else:
                scales[row, g], zeros[row, g] = _best_affine(x, w, bits, clipping)


@compiled(fastmath=True, inline="always")
def _gain(x, w, inverse, low, high):
    """What rounding x * inverse to whole numbers from low to high takes off the error Σ w x², with the best scale for
    them; and that scale."""
    product, square = np.float32(0), np.float32(0)
    for j in range(len(x)):
        level = min(max(np.rint(x[j] * inverse), low), high)
        product += w[j] * x[j] * level
        square += w[j] * level * level
    if square <= np.float32(0):
        return np.float32(0), np.float32(0)
    return product * product / square, product / square


@compiled(fastmath=True, inline="always")
def _refit(x, w, scale, best, low, high):
    """Rounding and fitting in turn, as long as it helps."""
    for _ in range(REFITS):
        if scale == np.float32(0):
            break
        gain, fitted = _gain(x, w, np.float32(1) / scale, low, high)
        if gain <= best:
            break
        best, scale = gain, fitted
    return best, scale


@compiled(fastmath=True)
def _best_symmetric(x, w, bits, clipping):
    half = np.float32(1 << (bits - 1))
    peak = np.float32(0)
    for j in range(len(x)):
        peak = max(peak, abs(x[j]))
    best, scale = np.float32(0), np.float32(0)
    if peak > np.float32(0):
        for factor in clipping:
            for sign in (np.float32(1), np.float32(-1)):
                gain, fitted = _gain(x, w, sign * factor * half / peak, -half, half - np.float32(1))
                if gain > best:
                    best, scale = gain, fitted
    return _refit(x, w, scale, best, -half, half - np.float32(1))[1]


@compiled(fastmath=True)
def _best_affine(x, w, bits, clipping):
    top = np.float32((1 << bits) - 1)
    least, most = np.float32(0), np.float32(0)  # zero is on every grid
    for j in range(len(x)):
        least, most = min(least, x[j]), max(most, x[j])
    best, scale, best_zero = np.float32(0), np.float32(0), np.float32(1 << (bits - 1))
    if most > least:
        for factor in clipping:
            inverse = factor * top / (most - least)
            middle = np.rint(np.float32(0.5) * (top - (least + most) * inverse))
            for near in range(-1, 2):
                zero = min(max(middle + np.float32(near), np.float32(0)), top)
                gain, fitted = _gain(x, w, inverse, -zero, top - zero)
                if gain > best:
                    best, scale, best_zero = gain, fitted, zero
    return _refit(x, w, scale, best, -best_zero, top - best_zero)[1], np.uint8(best_zero)


@compiled()
def _encode(weights, scales, zeros, bits, group, codes):
    """The nearest code of every weight, on the scales as they are stored."""
    top = np.float32((1 << bits) - 1)
    rows, columns = weights.shape
    for row in range(rows):
        for j in range(columns):
            zero = np.float32(zeros[row, j // group])
            code = np.rint(weights[row, j] / scales[row, j // group]) + zero
            codes[row, j] = np.uint8(min(max(code, np.float32(0)), top))
