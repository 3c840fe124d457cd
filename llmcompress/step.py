"""One tensor of the result: where its rows come from, what happens to them, and how they are cut into slabs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from llmcompress.mix import NEVER_QUANTIZED, NEVER_QUANTIZED_NAMES
from llmcompress.tensor_info import TensorInfo


@dataclass(frozen=True)
class Operation:
    """What happens to rows between the checkpoint and the grid.

    `arrange` reorders raw rows `(rows, columns)` of any dtype within runs of `group` rows, or the values of a
    row where `group` is 1; `compute` maps float32 rows to float32 rows, and `inverse` maps them back. `factors`,
    float32 `(rows of the step, 1)`, are what each row is multiplied by.
    `transposed` means that the rows are the source's columns, `moves_columns` that values change places within a row.
    """

    name: str
    group: int = 1
    arrange: Callable[[np.ndarray], np.ndarray] | None = None
    compute: Callable[[np.ndarray], np.ndarray] | None = None
    inverse: Callable[[np.ndarray], np.ndarray] | None = None
    factors: np.ndarray | None = None
    transposed: bool = False
    moves_columns: bool = False

    @property
    def changes_values(self) -> bool:
        return self.compute is not None or self.factors is not None


COPY = Operation("copy")


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a source tensor from row `first` on, each `stride`th; under a transposed operation, columns
    of the source's matrix that begins at row `top`."""

    tensor: TensorInfo
    first: int
    rows: int
    stride: int = 1
    top: int = 0


@dataclass(frozen=True)
class Step:
    """One tensor of the result. `shape` is in NumPy's order; `pieces` follow each other row by row. The file may give
    the same values, row after row, another shape: `stored_as`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    operation: Operation = COPY
    computed: np.ndarray | None = None  # float32 values made from the config, where there is no source
    stored_as: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.stored_as or self.shape

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def dtype(self) -> str:
        return self.pieces[0].tensor.dtype if self.pieces else "F32"

    @property
    def packed(self) -> str | None:
        """The number format whose very bytes the source has, row by row, where it has one."""
        if not self.pieces or self.operation.changes_values or self.operation.arrange:
            return None
        tensor = self.pieces[0].tensor
        as_stored = self.operation.transposed == getattr(tensor, "transposed", False)
        return getattr(tensor, "packed", None) if as_stored else None

    @property
    def wider(self) -> int:
        """Times as large a slab as others have where its rows are columns in the file: all of a matrix is read for each
        slab, or a little of each of its rows."""
        tensor = self.pieces[0].tensor if self.pieces else None
        if self.operation.transposed and not getattr(tensor, "transposed", False):
            return 4
        return 2 if getattr(tensor, "strided", False) else 1

    def source_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows in the checkpoint."""
        return rows * self.columns * (4 if self.dtype == "F32" else 2)


@dataclass(frozen=True)
class Slab:
    """Rows `first` to `first + rows` of a step: the unit of reading, quantizing, writing and resuming."""

    step: int
    first: int
    rows: int


def is_linear(step: Step) -> bool:
    """Whether a tensor of the GGUF is a matrix of a decoder block and neither norm nor router."""
    block_matrix = step.name.startswith("blk.") and step.name.endswith(".weight") and len(step.shape) > 1
    return block_matrix and not any(part in step.name for part in NEVER_QUANTIZED)


def stored_type(step: Step) -> str:
    """The type an unquantized GGUF holds the tensor in: float32 for what is never quantized, such as norms and
    routers, and the checkpoint's own for matrices; what is packed stays so."""
    if step.packed:
        return step.packed
    kept = step.name in NEVER_QUANTIZED_NAMES or any(part in step.name for part in NEVER_QUANTIZED)
    weight = step.name.endswith(".weight") and len(step.stored_shape) > 1  # all else is added, or scales
    return "F32" if kept or not weight or step.computed is not None else step.dtype


def slabs_of(index: int, step: Step, slab_weights: int) -> Iterator[Slab]:
    """Runs of rows that stay inside one piece and one matrix and never cut a group."""
    size = slab_rows(step, slab_weights)
    matrix = step.shape[-2] if len(step.shape) > 2 else step.rows
    first = 0
    for piece in step.pieces or (None,):
        end = first + (piece.rows if piece else step.rows)
        while first < end:
            rows = min(size, end - first, matrix - first % matrix)
            yield Slab(index, first, rows)
            first += rows


def slab_rows(step: Step, slab_weights: int) -> int:
    rows = max(1, slab_weights * step.wider // step.columns)
    return max(rows // step.operation.group, 1) * step.operation.group
