"""One slab of a step: its weights, from the checkpoint through the step's operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RunError
from llmcompress.grids.floats import count_saturated, first_nonfinite, to_float32
from llmcompress.grids.grid import Grid
from llmcompress.step import Piece, Slab, Step

if TYPE_CHECKING:
    from llmcompress.methods.joint import Pruning
    from llmcompress.methods.solver import Solver

LARGEST = {"F16": 65504.0, "BF16": 3.3895314e38}


@dataclass(frozen=True)
class Weights:
    """Weights of a slab, before any rounding, read when they are asked for: `raw` in the checkpoint's dtype, `(rows,
    columns)`, checked. `packed` reads them as the source's own bytes where it has them in a number format, which the
    step names; `first` is their first row."""

    step: Step
    read: Callable[[], np.ndarray]
    dtype: str
    packed: Callable[[], np.ndarray] | None = None
    first: int = 0

    @cached_property
    def raw(self) -> np.ndarray:
        return self.read()

    @cached_property
    def float32(self) -> np.ndarray:
        """float32 `(rows, columns)`, after the step's arithmetic."""
        values = to_float32(self.raw, self.dtype)
        operation = self.step.operation
        values = operation.compute(values) if operation.compute else values
        if operation.factors is None:
            return values
        return values * operation.factors[self.first : self.first + len(values)]

    def encoded(
        self,
        grid: Grid,
        importance: np.ndarray | None,
        effort: str = "normal",
        solver: Solver | None = None,
        pruning: Pruning | None = None,
    ) -> np.ndarray:
        """uint8 `(rows, row_bytes)`; the checkpoint's own bytes where the type does not change and nothing is pruned.

        With a solver by GPTQ, where the grid's codes can be chosen one by one, else rounded to nearest."""
        if pruning:
            from llmcompress.methods import joint

            return joint.quantize(self.float32, grid, solver, importance, effort, pruning)
        if grid.name == self.dtype and not self.step.operation.changes_values:
            return self.raw.view(np.uint8)
        if self.packed and grid.name == self.step.packed:
            return self.packed()
        too_large = count_saturated(self.float32, grid.name) if grid.name in LARGEST else 0
        if too_large:
            raise RunError(
                f"{self.step.name}: {too_large} weights, up to {np.abs(self.float32).max():.6g}, are beyond the largest "
                f"{grid.name}, {LARGEST[grid.name]:.6g}; use {'BF16 or ' if grid.name == 'F16' else ''}F32"
            )
        if solver:
            from llmcompress.methods import gptq

            if gptq.supports(grid):
                return gptq.quantize(self.float32, grid, solver, effort)
        return grid.quantize(self.float32, importance, effort)


def read_slab(checkpoint: Checkpoint, step: Step, slab: Slab) -> Weights:
    """A slab's weights. What reads them raises RunError naming the first NaN or infinity."""
    if step.computed is not None:
        rows = step.computed.reshape(step.rows, step.columns)[slab.first : slab.first + slab.rows]
        return Weights(step, lambda: rows, "F32")
    piece, first = _piece_at(step, slab)
    packed = partial(_read_packed, checkpoint, piece, first, slab.rows) if step.packed else None
    return Weights(step, partial(_read, checkpoint, step, slab, piece, first), step.dtype, packed, slab.first)


def _read(checkpoint: Checkpoint, step: Step, slab: Slab, piece: Piece, first: int) -> np.ndarray:
    if step.operation.transposed:
        columns = range(first, first + (slab.rows - 1) * piece.stride + 1, piece.stride)
        raw = checkpoint.read_columns(piece.tensor.name, columns, piece.top, step.columns)
    else:
        raw = _read_rows(checkpoint, piece, first, slab.rows)
    bad = first_nonfinite(raw, step.dtype)
    if bad >= 0:
        row, column = divmod(bad, raw.shape[1])
        row = first + row * piece.stride
        row, column = (piece.top + column, row) if step.operation.transposed else (row, column)
        raise RunError(
            f"{piece.tensor.file}: tensor {piece.tensor.name!r} holds a NaN or infinity (row {row}, column {column}); "
            "the checkpoint is damaged: fetch or train it again"
        )
    return step.operation.arrange(raw) if step.operation.arrange else raw


def _read_packed(checkpoint: Checkpoint, piece: Piece, first: int, rows: int) -> np.ndarray:
    """The same rows as the source has them; of matrices that are stored turned round, as they are stored."""
    if piece.top:
        first += piece.top // piece.tensor.shape[-2] * piece.tensor.columns
    read = checkpoint.read_packed(piece.tensor.name, first, (rows - 1) * piece.stride + 1)
    return np.ascontiguousarray(read[:: piece.stride])


def _piece_at(step: Step, slab: Slab) -> tuple[Piece, int]:
    """The piece a slab lies in, and the slab's first row in the source."""
    first = slab.first
    for piece in step.pieces:
        if first < piece.rows:
            return piece, piece.first + first * piece.stride
        first -= piece.rows
    raise IndexError(f"{step.name}: no row {slab.first}")


def _read_rows(checkpoint: Checkpoint, piece: Piece, first: int, rows: int) -> np.ndarray:
    if piece.stride == 1:
        return checkpoint.read(piece.tensor.name, first, rows)
    read = checkpoint.read(piece.tensor.name, first, (rows - 1) * piece.stride + 1)
    return np.ascontiguousarray(read[:: piece.stride])
