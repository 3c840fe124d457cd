"""Where the numbers of a block lie among its bytes, for formats whose weights are offset + scale x level[code].

This table is all that a format must bring for a method to choose its codes and scales (methods/gptq.py): where the codes
are, and of what weights are linear while all else stays: floats, and whole numbers, the scales and minima of
sub-blocks. Numbers are read from encoded rows and others put in their place; what a number does to the weights is
found by decoding. So a method knows the bytes of no format. A new format is an entry in LAYOUTS (and in `levels_of`,
if its levels are not 0, 1, 2 ...).

Where four or eight weights share an entry of a codebook, that is their code: the entry in the low bits, the signs
above, set where a weight is negative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmcompress.grids.codebook import Codebook
from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid
from llmcompress.grids.int8 import RowGrid
from llmcompress.grids.integer import HEAD, IntegerGrid
from llmcompress.grids.iquants import BOOK_2_S, BOOK_2_XS, BOOK_2_XXS, BOOK_3_S, BOOK_3_XXS
from llmcompress.grids.nf4 import FourBitGrid
from llmcompress.grids.nonlinear import LEVELS

Piece = tuple[int, int, int]  # byte, shift in it, bits


@dataclass(frozen=True)
class Numbers:
    """Whole numbers in a block, each of the same number of weights: the pieces of each, its lowest bits first.

    A number is `least` where all its bits are 0, or in two's complement if `signed`."""

    pieces: tuple[tuple[Piece, ...], ...]
    least: int = 0
    signed: bool = False

    @property
    def bits(self) -> int:
        return sum(bits for _, _, bits in self.pieces[0])

    @property
    def range(self) -> tuple[int, int]:
        least = -(1 << self.bits - 1) if self.signed else self.least
        return least, least + (1 << self.bits) - 1


@dataclass(frozen=True)
class Layout:
    """codes: of each weight, or of each entry of a codebook. floats: byte and dtype of each; given all else, weights are
    sums of multiples of them. parts: given all else, weights are linear in each."""

    codes: Numbers
    floats: tuple[tuple[int, str], ...]
    parts: tuple[Numbers, ...] = ()


def _numbers(count: int, *pieces: Callable[[int], Piece], **more: int) -> Numbers:
    return Numbers(tuple(tuple(piece(i) for piece in pieces) for i in range(count)), **more)


def _nibbles(start: int, run: int) -> Callable[[int], Piece]:
    """Of each 2 x `run` weights the first half lies in the low nibbles of `run` bytes, the second in the high."""
    return lambda i: (start + i // (2 * run) * run + i % run, 4 * (i // run % 2), 4)


def _pairs_of_bits(start: int) -> Callable[[int], Piece]:
    """Of each 128 weights, in 32 bytes, every 32 lie two bits further up."""
    return lambda i: (start + i // 128 * 32 + i % 32, 2 * (i % 128 // 32), 2)


def _run(start: int, bits: int) -> Callable[[int], Piece]:
    """One after the other, from the lowest bits of a byte up."""
    return lambda i: (start + i * bits // 8, i * bits % 8, bits)


def _bits_of_eight(start: int) -> Callable[[int], Piece]:
    """Byte i has the bits of weights i, i + 32, i + 64 ..."""
    return lambda i: (start + i % 32, i // 32, 1)


def _scales_and_minima(start: int) -> tuple[Numbers, Numbers]:
    """As `pack_scales_and_minima` of kquants.py has them."""
    return tuple(
        _numbers(
            8,
            lambda b: (start + (4 * kind + b if b < 4 else 4 + b), 0 if b < 4 else 4 * kind, 4),
            lambda b: (start + 4 * kind + b % 4, 4 if b < 4 else 6, 2),
        )
        for kind in range(2)
    )


def _entries(size: int, *entry: Callable[[int], Piece], signs: Callable[[int], Piece]) -> Numbers:
    """Codes of `size` weights: pieces of the entry, and the sign of weight i, of no bits where it is implied."""
    return _numbers(256 // size, *entry, *(lambda g, k=k: signs(size * g + k) for k in range(size)))


def _seven_signs(start: int, step: int) -> Callable[[int], Piece]:
    """Four times seven signs in each word, `step` bytes apart; the eighth makes their number even."""

    def place(i: int) -> Piece:
        bit = 7 * (i % 32 // 8) + i % 8
        return start + i // 32 * step + bit // 8, bit % 8, int(i % 8 < 7)

    return place


def _codebook(codes: Numbers, scales: Numbers) -> Layout:
    return Layout(codes, ((0, "<f2"),), (scales,))


D, D_AND_BASE = ((0, "<f2"),), ((0, "<f2"), (2, "<f2"))

# The byte pictures stand in legacy.py, kquants.py, nonlinear.py and iquants.py.
LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(_numbers(32, _nibbles(2, 16)), D),
    "Q4_1": Layout(_numbers(32, _nibbles(4, 16)), D_AND_BASE),
    "Q5_0": Layout(_numbers(32, _nibbles(6, 16), _run(2, 1)), D),
    "Q5_1": Layout(_numbers(32, _nibbles(8, 16), _run(4, 1)), D_AND_BASE),
    "Q2_K": Layout(
        _numbers(256, _pairs_of_bits(16)), ((80, "<f2"), (82, "<f2")),
        (_numbers(16, lambda b: (b, 0, 4)), _numbers(16, lambda b: (b, 4, 4))),
    ),
    "Q3_K": Layout(
        _numbers(256, _pairs_of_bits(32), _bits_of_eight(0)), ((108, "<f2"),),
        (_numbers(16, _nibbles(96, 8), lambda b: (104 + b % 4, b // 4 * 2, 2), least=-32),),
    ),
    "Q4_K": Layout(_numbers(256, _nibbles(16, 32)), D_AND_BASE, _scales_and_minima(4)),
    "Q5_K": Layout(_numbers(256, _nibbles(48, 32), _bits_of_eight(16)), D_AND_BASE, _scales_and_minima(4)),
    "Q6_K": Layout(
        _numbers(256, _nibbles(0, 64), _pairs_of_bits(128)), ((208, "<f2"),), (_numbers(16, _run(192, 8), signed=True),)
    ),
    "IQ4_NL": Layout(_numbers(32, _nibbles(2, 16)), D),
    "IQ4_XS": Layout(_numbers(256, _nibbles(8, 16)), D, (_numbers(8, _run(4, 4), _run(2, 2), least=-32),)),
    "IQ2_XXS": _codebook(
        _entries(8, lambda g: (2 + g // 4 * 8 + g % 4, 0, 8), signs=_seven_signs(6, 8)),
        _numbers(8, lambda b: (9 + 8 * b, 4, 4)),
    ),
    "IQ2_XS": _codebook(
        _entries(8, lambda g: (2 + 2 * g, 0, 8), lambda g: (3 + 2 * g, 0, 1),
                 signs=lambda i: (3 + i // 8 * 2, (1 + i % 8) % 8, int(i % 8 < 7))),
        _numbers(16, _run(66, 4)),
    ),
    "IQ2_S": _codebook(_entries(8, _run(2, 8), _run(66, 2), signs=_run(34, 1)), _numbers(16, _run(74, 4))),
    "IQ3_XXS": _codebook(_entries(4, _run(2, 8), signs=_seven_signs(66, 4)), _numbers(8, lambda b: (69 + 4 * b, 4, 4))),
    "IQ3_S": _codebook(_entries(4, _run(2, 8), _run(66, 1), signs=_run(74, 1)), _numbers(8, _run(106, 4))),
}  # fmt: skip
BOOKS = {
    "IQ2_XXS": BOOK_2_XXS, "IQ2_XS": BOOK_2_XS, "IQ2_S": BOOK_2_S, "IQ3_XXS": BOOK_3_XXS, "IQ3_S": BOOK_3_S
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def layout_of(grid: Grid) -> Layout | None:
    """Where a format's numbers lie; None for a format that is not in the table."""
    if isinstance(grid, IntegerGrid):
        zero = () if grid.symmetric else (_numbers(1, lambda _: (2, 0, grid.bits)),)
        return Layout(_numbers(grid.block, lambda i: (HEAD + i, 0, grid.bits)), D, zero)
    if isinstance(grid, FourBitGrid):
        return Layout(_numbers(grid.block, lambda i: (4 + i // 2, 4 - i % 2 * 4, 4)), ((0, "<f4"),))
    if isinstance(grid, RowGrid):
        return Layout(_numbers(grid.block, lambda i: (4 + i, 0, 8)), ((0, "<f4"),))
    return LAYOUTS.get(grid.name)


def book_of(grid: Grid) -> Codebook | None:
    """The codebook of a format that has one."""
    return BOOKS.get(grid.name)


def levels_of(grid: Grid) -> np.ndarray:
    """float32 (codes,): the level that each code of a single weight stands for, ascending."""
    if isinstance(grid, FourBitGrid):
        return grid.levels
    if grid.name.startswith("IQ4"):
        return np.asarray(LEVELS, np.float32)
    return np.arange(2 ** layout_of(grid).codes.bits, dtype=np.float32)


def lattice_of(grid: Grid, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets, float32 (rows, columns), of encoded rows: weight = offset + scale x level[code], or scale x
    level of a codebook's entry."""
    book = book_of(grid)
    if book is not None:
        weights = _dequantize_all(grid, data, 0)
        return weights / np.tile(book.entries[0], weights.shape[1] // len(book.entries[0])), np.zeros_like(
            weights
        )
    levels = levels_of(grid)
    first, last = (_dequantize_all(grid, data, code) for code in (0, len(levels) - 1))
    scale = (last - first) / (levels[-1] - levels[0])
    return scale, first - scale * levels[0]


def _dequantize_all(grid: Grid, data: np.ndarray, code: int) -> np.ndarray:
    """The weights if all codes were `code`."""
    numbers = layout_of(grid).codes
    shape = len(data), data.shape[1] // grid.block_bytes * len(numbers.pieces)
    return grid.dequantize(put_codes(grid, data, np.full(shape, code, _dtype(numbers))))


def get_codes(grid: Grid, data: np.ndarray) -> np.ndarray:
    """The codes of encoded rows, uint8 or int32 (rows, columns or entries)."""
    numbers = layout_of(grid).codes
    codes = np.empty((len(data), data.shape[1] // grid.block_bytes * len(numbers.pieces)), _dtype(numbers))
    _get(data, codes, grid.block_bytes, _table(numbers))
    book = book_of(grid)
    return _with_implied_signs(codes, book) if book is not None and book.even else codes


def put_codes(grid: Grid, data: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Encoded rows, uint8 (rows, row_bytes), with the scales of `data` and these codes, as `get_codes` has them."""
    data = data.copy()
    _put(data, codes, grid.block_bytes, _table(layout_of(grid).codes))
    return data


def get_numbers(grid: Grid, data: np.ndarray, numbers: Numbers) -> np.ndarray:
    """Some numbers of encoded rows, int32 (rows, numbers)."""
    raw = np.empty((len(data), data.shape[1] // grid.block_bytes * len(numbers.pieces)), np.int32)
    _get(data, raw, grid.block_bytes, _table(numbers))
    least, _ = numbers.range
    return ((raw - least) & (1 << numbers.bits) - 1) + least if numbers.signed else raw + least


def put_numbers(grid: Grid, data: np.ndarray, numbers: Numbers, values: np.ndarray) -> np.ndarray:
    """Encoded rows with other `values` of some numbers, int32 (rows, numbers)."""
    data = data.copy()
    _put(
        data,
        values if numbers.signed else values - np.int32(numbers.least),
        grid.block_bytes,
        _table(numbers),
    )
    return data


def get_floats(grid: Grid, data: np.ndarray, place: tuple[int, str]) -> np.ndarray:
    """One float of every block, float32 (rows, blocks)."""
    return _view(grid, data, place).astype(np.float32)


def put_floats(
    grid: Grid, data: np.ndarray, place: tuple[int, str], values: np.ndarray | float
) -> np.ndarray:
    """Encoded rows with other floats, float32 (rows, blocks), which are rounded to what is stored."""
    data = data.copy()
    blocks = data.reshape(len(data), -1, grid.block_bytes)
    stored = np.broadcast_to(np.asarray(values, place[1]), blocks.shape[:2])[:, :, None]
    blocks[:, :, place[0] : place[0] + stored.itemsize] = np.ascontiguousarray(stored).view(np.uint8)
    return data


def _view(grid: Grid, data: np.ndarray, place: tuple[int, str]) -> np.ndarray:
    blocks = data.reshape(len(data), -1, grid.block_bytes)
    size = np.dtype(place[1]).itemsize
    return np.ascontiguousarray(blocks[:, :, place[0] : place[0] + size]).view(place[1])[:, :, 0]


def _with_implied_signs(codes: np.ndarray, book: Codebook) -> np.ndarray:
    size, first = book.entries.shape[1], entry_bits(book)
    signs = codes.reshape(len(codes), -1, 8 // size) >> first
    parity = np.bitwise_xor.reduce(signs, axis=2)
    for shift in (4, 2, 1):
        parity ^= parity >> shift
    codes = codes.reshape(signs.shape).copy()
    codes[:, :, -1] |= (parity & 1) << (first + size - 1)
    return codes.reshape(len(codes), -1)


def entry_bits(book: Codebook) -> int:
    return (len(book.entries) - 1).bit_length()


def _dtype(numbers: Numbers) -> type:
    return np.uint8 if numbers.bits <= 8 else np.int32


@functools.lru_cache(maxsize=256)
def _table(numbers: Numbers) -> np.ndarray:
    return np.array(numbers.pieces, np.int64)


@compiled()
def _get(data, numbers, block_bytes, table):
    block = len(table)
    for row in range(numbers.shape[0]):
        for number in range(numbers.shape[1]):
            at, i = number // block * block_bytes, number % block
            value, place = 0, 0
            for piece in range(table.shape[1]):
                byte, shift, bits = table[i, piece]
                value |= ((np.int64(data[row, at + byte]) >> shift) & ((1 << bits) - 1)) << place
                place += bits
            numbers[row, number] = value


@compiled()
def _put(data, numbers, block_bytes, table):
    block = len(table)
    for row in range(numbers.shape[0]):
        for number in range(numbers.shape[1]):
            at, i, value = number // block * block_bytes, number % block, np.int64(numbers[row, number])
            for piece in range(table.shape[1]):
                byte, shift, bits = table[i, piece]
                mask = (1 << bits) - 1
                old = np.int64(data[row, at + byte])
                data[row, at + byte] = (old & ~(mask << shift)) | ((value & mask) << shift)
                value >>= bits
