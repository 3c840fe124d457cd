"""Weights stored row by row, each block of rows and columns under one scale: what most formats are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmcompress.sources.codes import CODE, EIGHT_BITS, floats, scaled, scaled_pairs, signed, unpack
from llmcompress.sources.stored import Read, wrong
from llmcompress.tensor_info import TensorInfo

Rows = Callable[[Read, int, int], np.ndarray]  # (read, first, rows) to float32 (rows, groups)


@dataclass(frozen=True)
class Blocked:
    """Codes (rows, bytes) of `bits` bits, the lowest first, that stand for `table`; the weight is
    (table[code] - zero) * scale, its scales and zeros (rows, groups), a group `width` columns."""

    codes: TensorInfo
    bits: int
    columns: int
    width: int
    scales: Rows
    table: np.ndarray
    zeros: Rows | float = 0.0

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        """float32 (rows, columns)."""
        scales = self.scales(read, first, rows)
        zeros = self.zeros(read, first, rows) if callable(self.zeros) else self.zeros
        data = read(self.codes, first, rows)
        data = signed(data) if self.codes.dtype == "I8" and self.bits == 8 else data.view(np.uint8)
        if self.bits == 4 and self.columns % 2 == 0 and self.width % 2 == 0:
            return scaled_pairs(data[:, : self.columns // 2], scales, zeros, self.width, self.table)
        return scaled(unpack(data, self.bits, self.columns), scales, zeros, self.width, self.table)


def bytes_of(codes: TensorInfo) -> tuple[np.ndarray, float]:
    """What the bytes of a tensor stand for, and the zero that makes signed ones of them."""
    return (CODE, 128.0) if codes.dtype == "I8" else (EIGHT_BITS[codes.dtype], 0.0)


def scale_rows(
    tensor: TensorInfo, height: int, values: Callable[[np.ndarray], np.ndarray] | None = None
) -> Rows:
    """Rows of a matrix of scales, each for `height` rows of the weight; `values` makes numbers of what is stored."""
    values = values or (lambda raw: floats(raw, tensor.dtype))

    def of(read: Read, first: int, rows: int) -> np.ndarray:
        top, bottom = first // height, -(-(first + rows) // height)
        found = values(read(tensor, top, bottom - top))
        if height == 1:
            return found
        return np.repeat(found, height, axis=0)[first - top * height :][:rows]

    return of


def powers(raw: np.ndarray) -> np.ndarray:
    """float32 of exponents in bytes, as E8M0 has them."""
    return EIGHT_BITS["F8_E8M0"][raw.view(np.uint8)]


def matrix(tensor: TensorInfo, rows: int, columns: int) -> TensorInfo:
    """The tensor as (rows, columns). Raises CheckpointError where it has not so many values."""
    if tensor.rows * tensor.columns != rows * columns:
        raise wrong(tensor, f"has shape {list(tensor.shape)}, its weight makes that {[rows, columns]}")
    return TensorInfo(tensor.name, (rows, columns), tensor.dtype, tensor.file, tensor.offset, tensor.nbytes)


def block_of(
    scales: TensorInfo, shape: tuple[int, ...], known: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The rows and columns that share a scale: `known` where that gives as many scales as there are, else what
    divides. Raises CheckpointError where nothing does. Of stacked matrices, a block lies in one."""
    rows, columns = shape[-2:] if len(shape) > 1 else (0, 0)
    count = scales.rows * scales.columns
    if not rows or not columns:
        raise wrong(scales, f"belongs to a weight of shape {list(shape)}")
    if count == 1:
        return max(1, len_of(shape)), columns
    matrices = len_of(shape) // rows
    down, across = (scales.rows // matrices if matrices else 0), scales.columns
    if len(scales.shape) == 1:
        down, across = scales.shape[0], 1
    for height, width in [known] if known else []:
        fits = -(-rows // height) == down and -(-columns // width) == across
        if fits and (matrices == 1 or rows % height == 0):
            return height, width
    if not down or not across or down * across * matrices != count or rows % down or columns % across:
        raise wrong(
            scales, f"has shape {list(scales.shape)}, which no blocks of a weight of {list(shape)} make"
        )
    return rows // down, columns // across


def len_of(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of that shape, seen as a matrix."""
    return int(np.prod(shape[:-1], dtype=np.int64))
