"""A GGUF file read as the Hugging Face checkpoint it was made from, its weights as the file rounded them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from llmcompress.converters.inversion import Part, match

from llmcompress.arrays import SLAB_WEIGHTS
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError, GGUFError, nearest, shown
from llmcompress.gguf.reader import GGUFFile, open_shards
from llmcompress.grids import GRIDS
from llmcompress.grids.floats import first_nonfinite, to_float32
from llmcompress.grids.grid import Grid
from llmcompress.step import Operation, Step, slab_rows


class DecodedGGUF:
    """The weights of a GGUF file under the names and in the shapes of the checkpoint `reference`.

    `index` has every tensor of the reference that some tensor of the file is made from; `notes` say what
    differs beside the weights. Reading is safe from any number of threads. `config` and `directory` are the
    reference's, which stays open and belongs to the caller.
    """

    def __init__(self, files: list[GGUFFile], reference: Checkpoint) -> None:
        self.path = files[0].path
        self.config, self.directory = reference.config, reference.directory
        self.index, self.notes = match(files, reference)
        self._reference = reference
        self._files = files
        self._holders = {name: file for file in files for name in file.tensors}

    @classmethod
    def open(cls, path: str | os.PathLike, reference: Checkpoint) -> DecodedGGUF:
        """Open a GGUF file, or all shards of one given any of them, that was made from `reference`.

        Raises GGUFError for a file that is damaged or was made from another model; PlanError or CheckpointError
        for a reference that no GGUF can be made from.
        """
        files = open_shards(path)
        try:
            return cls(files, reference)
        except BaseException:
            _close(files)
            raise

    def replace(self, tensors: Mapping[str, GGUFFile]) -> None:
        """Take these tensors, by their GGUF names, from other files of the same model; the caller closes those."""
        self._holders |= tensors

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows `first` to `first + rows` (to the end by default) of a tensor seen as a matrix: float32
        `(rows, columns)`. Raises GGUFError for weights that are not finite."""
        tensor = self.index.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: holds no tensor {shown(name)}{nearest(name, self.index)}")
        rows = tensor.rows - first if rows is None else rows
        if first < 0 or rows < 0 or first + rows > tensor.rows:
            raise ValueError(f"{name}: rows {first} to {first + rows} of {tensor.rows}")
        out = np.empty((rows, tensor.columns), np.float32)
        for part in tensor.parts:
            fill = self._fill_from_columns if part.step.operation.transposed else self._fill_from_rows
            fill(out, first, part)
        lacking = max(first, tensor.stored_rows)
        if lacking < first + rows:
            own = self._reference.read(name, lacking, first + rows - lacking)
            out[lacking - first :] = to_float32(own, tensor.source.dtype)
        return out

    def close(self) -> None:
        _close(self._files)

    def __enter__(self) -> DecodedGGUF:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill_from_rows(self, out: np.ndarray, first: int, part: Part) -> None:
        """Put the rows of `part` that lie in `out`, which begins at row `first`, in their places."""
        piece, operation = part.piece, part.step.operation
        begin = max(0, -((piece.first - first) // piece.stride))
        end = min(piece.rows, -((piece.first - first - len(out)) // piece.stride))
        columns = _columns_of(operation, piece.tensor.columns)
        height = slab_rows(part.step, SLAB_WEIGHTS)
        whole = operation.group
        for at in range(begin // whole * whole, end, height):  # whole groups, which are put in order
            rows = min(height, -(-end // whole) * whole - at)
            values = self._decode(part.step, part.start + at, rows)
            low, high = max(at, begin), min(at + rows, end)
            target = slice(
                piece.first - first + low * piece.stride,
                piece.first - first + (high - 1) * piece.stride + 1,
                piece.stride,
            )
            out[target, columns] = values[low - at : high - at]

    def _fill_from_columns(self, out: np.ndarray, first: int, part: Part) -> None:
        """The same where rows of `out` are columns of the GGUF tensor, and `part` some columns of `out`."""
        piece = part.piece
        begin, end = max(first, piece.top), min(first + len(out), piece.top + part.step.columns)
        height = max(1, SLAB_WEIGHTS // max(1, end - begin))
        columns = slice(begin - piece.top, end - piece.top)
        for at in range(0, piece.rows if begin < end else 0, height):
            rows = min(height, piece.rows - at)
            values = self._decode(part.step, part.start + at, rows, columns)
            target = piece.first + at * piece.stride
            chosen = slice(target, target + (rows - 1) * piece.stride + 1, piece.stride)
            out[begin - first : end - first, chosen] = values.T

    def _decode(self, step: Step, first: int, rows: int, columns: slice | None = None) -> np.ndarray:
        """Rows of a GGUF tensor, cut to `columns`, with the step's operation undone but for the transposition:
        float32 `(rows, columns)`. The rows are whole groups."""
        file, columns = self._holders[step.name], columns or slice(0, step.columns)
        grid = GRIDS[file.tensors[step.name].type.name]
        values = _some_columns(grid, file.read(step.name, first, rows, step.columns), columns)
        bad = first_nonfinite(values, "F32")
        if bad >= 0:
            row, column = divmod(bad, values.shape[1])
            raise GGUFError(
                f"{file.path}: {step.name} decodes to a NaN or infinity (row {first + row}, column "
                f"{columns.start + column}); the file is damaged: make or fetch it again"
            )
        if step.operation.factors is not None:
            values = values / step.operation.factors[first : first + rows]
        if step.operation.compute:
            values = step.operation.inverse(values)
        return _in_order(values, step.operation) if step.operation.group > 1 else values


def _close(files: list[GGUFFile]) -> None:
    for file in files:
        file.close()


def _some_columns(grid: Grid, data: np.ndarray, columns: slice) -> np.ndarray:
    """Columns of encoded rows, contiguous; only the blocks they lie in are decoded."""
    begin, end = columns.start // grid.block, -(-columns.stop // grid.block)
    values = grid.dequantize(data[:, begin * grid.block_bytes : end * grid.block_bytes])
    before = begin * grid.block
    return np.ascontiguousarray(values[:, columns.start - before : columns.stop - before])


def _in_order(values: np.ndarray, operation: Operation) -> np.ndarray:
    """Undo what `arrange` does to rows, known by what it does to numbers."""
    numbers = np.arange(len(values)).reshape(-1, 1)
    return np.take(values, np.argsort(operation.arrange(numbers).ravel()), 0)


def _columns_of(operation: Operation, columns: int) -> np.ndarray | slice:
    """The source's columns that an operation within rows takes, in its order, known by what it does to numbers."""
    if operation.arrange is None or operation.group > 1:
        return slice(None)
    return operation.arrange(np.arange(columns).reshape(1, -1)).ravel()
