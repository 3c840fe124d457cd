"""INT8: bitsandbytes' eight bits a weight, a row under one float32, as LLM.int8() has it (arXiv:2208.07339).

    weight = largest / 127 * code

Without importance the bytes are those of bitsandbytes 0.50, `int8_vectorwise_quant`: weights go through float16, and
`largest` is the largest size in the row. With importance, the row may be clipped. Here a row is bytes:

    4 bytes    `largest`, float32
    columns    codes + 128, one byte each
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.floats import F16, to_float32
from llmcompress.grids.grid import Grid

HEAD, MIDDLE, TOP = 4, 128, 127
TRIED = {"fast": 4, "normal": 10, "best": 30}  # rows clipped to so many sizes
NARROWEST = 0.8  # of the largest


@dataclass(frozen=True)
class RowGrid(Grid):
    """`block` is the row's length."""

    def parts(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of encoded rows: `largest`, float32 (rows,), and codes, int8 (rows, columns)."""
        largest = np.ascontiguousarray(data[:, :HEAD]).view("<f4")[:, 0]
        return largest, (data[:, HEAD:] ^ np.uint8(MIDDLE)).view(np.int8)


@functools.lru_cache(maxsize=64)
def row_grid(columns: int) -> RowGrid:
    """The grid for rows of this length."""
    by_effort = {
        effort: functools.partial(_quantize, np.linspace(1, NARROWEST, count, dtype=np.float32))
        for effort, count in TRIED.items()
    }
    return RowGrid("INT8", -1, columns, HEAD + columns, by_effort["normal"], _dequantize, by_effort)


def through_half(weights: np.ndarray) -> np.ndarray:
    """float32 rounded to float16 and back, as bitsandbytes casts a weight before it rounds it to eight bits."""
    return to_float32(F16.quantize(weights).view("<f2"), "F16")


def _quantize(tried, weights, importance, out) -> None:
    halves = through_half(weights)
    largest = np.abs(halves).max(1)
    if importance is not None:
        top = importance.max()
        _fit(halves, importance / top if top > 0 else np.ones_like(importance), tried, largest)
    _encode(halves, largest, out)
    out[:, :HEAD] = largest[:, None].view(np.uint8)


def _dequantize(data, out) -> None:
    largest = np.ascontiguousarray(data[:, :HEAD]).view("<f4")
    np.subtract(data[:, HEAD:], np.float32(MIDDLE), out=out, dtype=np.float32)
    out *= largest * np.float32(1 / TOP)


@compiled()
def _encode(weights, largest, out):
    for row in range(weights.shape[0]):
        scale = (
            np.float32(1) / largest[row] * np.float32(127) if largest[row] > np.float32(0) else np.float32(0)
        )
        for j in range(weights.shape[1]):
            code = np.rint(weights[row, j] * scale)
            out[row, HEAD + j] = np.uint8(min(max(code, np.float32(-128)), np.float32(127)) + np.float32(128))


@compiled(fastmath=True)
def _fit(weights, importance, tried, largest):
    """Of the sizes tried for each row, the one with the least squared error, each column's times its importance."""
    for row in range(weights.shape[0]):
        size, least, best = largest[row], np.float32(np.inf), largest[row]
        if size <= np.float32(0):
            continue
        for factor in tried:
            scale, error = np.float32(127) / (factor * size), np.float32(0)
            for j in range(weights.shape[1]):
                x = weights[row, j] * scale
                left = x - min(max(np.rint(x), np.float32(-128)), np.float32(127))
                error += importance[j] * left * left
            error /= scale * scale
            if error < least:
                least, best = error, factor * size
        largest[row] = best
