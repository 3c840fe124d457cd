"""Where the codes of a block lie among its bytes, for formats whose weights are offset + scale x level[code].

With that table, codes can be read from encoded rows and others put in their place while the scales stay as they
are; and the scales themselves are known by decoding rows whose codes are all the first or all the last. So a method
that chooses codes works on every format here, and knows the bytes of none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid
from llmcompress.grids.int8 import RowGrid
from llmcompress.grids.integer import HEAD, IntegerGrid
from llmcompress.grids.nf4 import FourBitGrid
from llmcompress.grids.nonlinear import LEVELS

Places = tuple[tuple[int, int], ...]  # byte and shift of each weight's bits


@dataclass(frozen=True)
class CodeBits:
    """For each weight of a block: the byte and shift of its code's low bits, and of its high bits."""

    low_bits: int
    low: Places
    high_bits: int = 0
    high: Places = ()

    @property
    def bits(self) -> int:
        return self.low_bits + self.high_bits


def _places(block: int, place: Callable[[int], tuple[int, int]]) -> Places:
    return tuple(place(weight) for weight in range(block))


def _nibbles(block: int, start: int, run: int) -> Places:
    """Of each 2 x `run` weights the first half lies in the low nibbles of `run` bytes, the second in the high."""
    return _places(block, lambda i: (start + i // (2 * run) * run + i % run, 4 * (i // run % 2)))


def _pairs_of_bits(start: int) -> Places:
    """Of each 128 weights, in 32 bytes, every 32 lie two bits further up."""
    return _places(256, lambda i: (start + i // 128 * 32 + i % 32, 2 * (i % 128 // 32)))


def _single_bits(start: int) -> Places:
    return _places(32, lambda i: (start + i // 8, i % 8))


def _bits_of_eight(start: int) -> Places:
    """Byte i has the bits of weights i, i + 32, i + 64 ..."""
    return _places(256, lambda i: (start + i % 32, i // 32))


# The byte pictures stand in legacy.py, kquants.py and nonlinear.py.
CODE_BITS: dict[str, CodeBits] = {
    "Q4_0": CodeBits(4, _nibbles(32, 2, 16)),
    "Q4_1": CodeBits(4, _nibbles(32, 4, 16)),
    "Q5_0": CodeBits(4, _nibbles(32, 6, 16), 1, _single_bits(2)),
    "Q5_1": CodeBits(4, _nibbles(32, 8, 16), 1, _single_bits(4)),
    "Q2_K": CodeBits(2, _pairs_of_bits(16)),
    "Q3_K": CodeBits(2, _pairs_of_bits(32), 1, _bits_of_eight(0)),
    "Q4_K": CodeBits(4, _nibbles(256, 16, 32)),
    "Q5_K": CodeBits(4, _nibbles(256, 48, 32), 1, _bits_of_eight(16)),
    "Q6_K": CodeBits(4, _places(256, lambda i: (i // 128 * 64 + i % 64, 4 * (i % 128 // 64))), 2, _pairs_of_bits(128)),
    "IQ4_NL": CodeBits(4, _nibbles(32, 2, 16)),
    "IQ4_XS": CodeBits(4, _nibbles(256, 8, 16)),
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def code_bits(grid: Grid) -> CodeBits | None:
    """Where a format's codes lie; None for a format whose weights are not coded one by one."""
    if isinstance(grid, IntegerGrid):
        return CodeBits(grid.bits, _places(grid.block, lambda i: (HEAD + i, 0)))
    if isinstance(grid, FourBitGrid):
        return CodeBits(4, _places(grid.block, lambda i: (4 + i // 2, 4 - i % 2 * 4)))
    if isinstance(grid, RowGrid):
        return CodeBits(8, _places(grid.block, lambda i: (4 + i, 0)))
    return CODE_BITS.get(grid.name)


def levels_of(grid: Grid) -> np.ndarray:
    """float32 (codes,): the level that each code stands for, ascending."""
    if isinstance(grid, FourBitGrid):
        return grid.levels
    if grid.name.startswith("IQ4"):
        return np.asarray(LEVELS, np.float32)
    return np.arange(2 ** code_bits(grid).bits, dtype=np.float32)


def lattice_of(grid: Grid, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets, float32 (rows, columns), of encoded rows: weight = offset + scale x level[code]."""
    levels = levels_of(grid)
    shape = len(data), data.shape[1] // grid.block_bytes * grid.block
    first, last = (
        grid.dequantize(put_codes(grid, data, np.full(shape, code, np.uint8)))
        for code in (0, len(levels) - 1)
    )
    scale = (last - first) / (levels[-1] - levels[0])
    return scale, first - scale * levels[0]


def get_codes(grid: Grid, data: np.ndarray) -> np.ndarray:
    """The codes of encoded rows, uint8 (rows, columns)."""
    codes = np.empty((len(data), data.shape[1] // grid.block_bytes * grid.block), np.uint8)
    _get(data, codes, grid.block_bytes, *_tables(grid))
    return codes


def put_codes(grid: Grid, data: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Encoded rows, uint8 (rows, row_bytes), with the scales of `data` and these codes, uint8 (rows, columns)."""
    data = data.copy()
    _put(data, codes, grid.block_bytes, *_tables(grid))
    return data


@functools.lru_cache(maxsize=64)
def _tables(grid: Grid) -> tuple[np.ndarray, int, np.ndarray, int]:
    bits = code_bits(grid)
    low, high = (np.array(places, np.int64).reshape(-1, 2) for places in (bits.low, bits.high))
    return low, bits.low_bits, high, bits.high_bits


@compiled()
def _get(data, codes, block_bytes, low, low_bits, high, high_bits):
    block = len(low)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            at, i = column // block * block_bytes, column % block
            code = (data[row, at + low[i, 0]] >> low[i, 1]) & ((1 << low_bits) - 1)
            if high_bits:
                code |= ((data[row, at + high[i, 0]] >> high[i, 1]) & ((1 << high_bits) - 1)) << low_bits
            codes[row, column] = code


@compiled()
def _put(data, codes, block_bytes, low, low_bits, high, high_bits):
    block = len(low)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            at, i, code = column // block * block_bytes, column % block, codes[row, column]
            mask = (1 << low_bits) - 1
            byte, shift = at + low[i, 0], low[i, 1]
            data[row, byte] = (data[row, byte] & ~(mask << shift)) | ((code & mask) << shift)
            if high_bits:
                mask = (1 << high_bits) - 1
                byte, shift = at + high[i, 0], high[i, 1]
                data[row, byte] = (data[row, byte] & ~(mask << shift)) | ((code >> low_bits) << shift)
