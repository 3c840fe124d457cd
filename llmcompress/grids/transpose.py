"""Runs of sixteen values to sixteen lanes, and back: how blocks come to lie side by side."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llmcompress.grids.lanes import _INTS, WIDTH, _data, _element, _index


def _transposition(to_rows: bool):
    def lower(context, builder, sig, args):
        flat_type, offsets_type, rows_type, _ = sig.args
        flat, offsets, rows, first = args
        vector = ir.VectorType(context.get_data_type(flat_type.dtype), WIDTH)
        offsets = _data(context, builder, offsets_type, offsets)

        def run(lane):
            offset = builder.load(builder.gep(offsets, [_index(lane)]))
            return _element(context, builder, flat_type, flat, builder.add(offset, first), vector)

        def row(k):
            start = builder.mul(builder.add(first, _index(k)), _index(WIDTH))
            return _element(context, builder, rows_type, rows, start, vector)

        source, target = (run, row) if to_rows else (row, run)
        square = [builder.load(source(k), align=1) for k in range(WIDTH)]
        for k, column in enumerate(_transpose_square(builder, square)):
            builder.store(column, target(k), align=1)
        return context.get_dummy_value()

    return lower


@intrinsic
def to_lanes(typing_context, flat, offsets, rows, first):
    """Make the runs `flat[offset + first : offset + first + 16]`, one to a lane, `rows[first : first + 16]`.

    `offsets` is int64 `(16,)`; `rows` is `(n, 16)`, of the element type of the flat array `flat`.
    """
    return types.void(flat, offsets, rows, types.int64), _transposition(to_rows=True)


@intrinsic
def from_lanes(typing_context, flat, offsets, rows, first):
    """The way back of `to_lanes`: `rows[first : first + 16]` are written to sixteen places in `flat`."""
    return types.void(flat, offsets, rows, types.int64), _transposition(to_rows=False)


def _transpose_square(builder, square: list) -> list:
    """Transpose 16 vectors of 16: four rounds of interleaving rows k and k + 8."""
    low = ir.Constant(_INTS, [k // 2 + WIDTH * (k % 2) for k in range(WIDTH)])
    high = ir.Constant(_INTS, [k // 2 + 8 + WIDTH * (k % 2) for k in range(WIDTH)])
    for _ in range(4):
        square = [
            builder.shuffle_vector(square[k], square[k + 8], half) for k in range(8) for half in (low, high)
        ]
    return square
