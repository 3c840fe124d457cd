"""HQQ checkpoints: 1, 2, 3, 4 or 8 bits, groups along the inputs (axis 1) or across (axis 0).

The weight, row by row, is taken as a matrix (groups, group_size), or (group_size, groups) with axis 0, and its rows are
packed: a byte (or a word, of 3 bits) holds rows r, r + step, r + 2 step and so on, the first in the highest bits.

    W_q      uint8, of 3 bits int32 (step, columns)
    scale, zero   float, one for each group
    nbits, group_size, axis, shape, packing ...   settings, each a small tensor of its own

and weight = (code - zero) * scale, rounded to the compute dtype after each step. Source: hqq/core/quantize.py, bitpack.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import shown
from llmcompress.sources.blocked import matrix
from llmcompress.sources.codes import floats, rounded, scaled
from llmcompress.sources.stored import DTYPES, FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo, is_shape

FIELDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in a byte or word
SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero",
    "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
READS = "1, 2, 3, 4, 8 bits, both axes"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that is stored as `W_q`. Raises CheckpointError."""
    for module, codes in stored.ending(".W_q"):
        yield _weight(stored, module, codes)


def _weight(stored: Stored, module: str, codes: TensorInfo) -> DecodedTensor:
    def number(name: str) -> int:
        tensor = stored.need(f"{module}.{name}", ("I32", "I64", "U8", "BOOL"))
        values = stored.small(tensor)
        if values.size != 1:
            raise wrong(tensor, f"has {values.size} values, not one")
        return int(values[0])

    bits, axis = number("nbits"), number("axis")
    shape = tuple(stored.small(stored.need(f"{module}.shape", ("I64", "I32"))).tolist())
    if bits not in FIELDS or axis not in (0, 1) or len(shape) != 2 or not is_shape(shape) or not all(shape):
        raise wrong(
            codes,
            f"has {bits} bits, axis {axis}, shape {list(shape)}; known are {list(FIELDS)} bits of matrices",
        )
    for flag in ("view_as_float", "quant_scale", "quant_zero"):
        if stored.get(f"{module}.{flag}") and number(flag):
            raise wrong(codes, f"is stored with {flag}, which is not known")
    count = shape[0] * shape[1]
    group = number("group_size") if stored.get(f"{module}.group_size") else shape[1 if axis else 0]
    if group < 1 or count % group:
        raise wrong(codes, f"has groups of {group}, which {count} weights do not divide into")
    groups = count // group
    rows, columns = (groups, group) if axis else (group, groups)
    stored.need(codes.name, "I32" if bits == 3 else "U8")
    step = -(-rows // FIELDS[bits])
    scales, zeros = (stored.need(f"{module}.{name}", FLOATS) for name in ("scale", "zero"))
    dtype = _compute_dtype(stored, module) or scales.dtype
    layout = _Layout(
        matrix(codes, step, columns), matrix(scales, groups, 1), matrix(zeros, groups, 1), bits, bool(axis), step, columns,
        shape[1], dtype,
    )  # fmt: skip
    settings = [stored.get(f"{module}.{name}") for name in SETTINGS]
    form = f"HQQ {bits}-bit, group {group}" + ("" if axis else ", axis 0")
    return stored.weight(
        f"{module}.weight", shape, dtype, (codes, scales, zeros, *settings), form, layout.decode
    )


def _compute_dtype(stored: Stored, module: str) -> str | None:
    said = stored.get(f"{module}.compute_dtype")
    if said is None:
        return None
    name = stored.small(stored.need(said.name, "U8")).tobytes().decode(errors="replace")
    if name.removeprefix("torch.") not in DTYPES:
        raise wrong(said, f"names {shown(name)}, not one of {', '.join(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


@dataclass(frozen=True)
class _Layout:
    codes: TensorInfo  # (step, columns)
    scales: TensorInfo  # (groups, 1)
    zeros: TensorInfo
    bits: int
    by_rows: bool  # a row of the matrix that is packed is a group; else a column is
    step: int
    columns: int
    inputs: int
    dtype: str

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        """float32 (rows, inputs): of the rows of the packed matrix that these lie in, cut to them."""
        start, end = first * self.inputs, (first + rows) * self.inputs
        top, bottom = start // self.columns, -(-end // self.columns)
        if self.by_rows or bottom - top > 1:
            values = [
                self._run(read, row, count, slice(0, self.columns)) for row, count in self._runs(top, bottom)
            ]
            return (
                np.concatenate(values)
                .reshape(-1)[start - top * self.columns :][: end - start]
                .reshape(rows, -1)
            )
        columns = slice(start - top * self.columns, end - top * self.columns)
        return self._run(read, top, 1, columns).reshape(rows, self.inputs)

    def _runs(self, top: int, bottom: int) -> Iterator[tuple[int, int]]:
        """Rows that lie in the same bits: (first, count)."""
        while top < bottom:
            count = min(self.step - top % self.step, bottom - top)
            yield top, count
            top += count

    def _run(self, read: Read, top: int, count: int, columns: slice) -> np.ndarray:
        """float32 (count, columns) of rows of the packed matrix that lie in the same bits."""
        place, row = divmod(top, self.step)
        shift = (FIELDS[self.bits] - 1 - place) * self.bits
        stored = read(self.codes, row, count, columns)
        codes = (
            stored.view(np.uint32 if self.bits == 3 else np.uint8) >> shift & ((1 << self.bits) - 1)
        ).astype(np.uint8)
        at, number = (top, count) if self.by_rows else (columns.start, columns.stop - columns.start)
        scales, zeros = (
            floats(read(tensor, at, number), tensor.dtype) for tensor in (self.scales, self.zeros)
        )
        if not self.by_rows:
            scales, zeros = scales.T, zeros.T
        ones = np.ones((count, 1), np.float32)
        values = scaled(codes, ones)
        values -= zeros
        return rounded(values, self.dtype) * scales
