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
        begin = max(first, part.first) - part.first
        end = min(first + len(out), part.first + part.rows) - part.first
        group = part.step.operation.group
        height = slab_rows(part.step, SLAB_WEIGHTS)
        for at in range(begin // group * group, end, height):  # whole groups, which are put in order
            rows = min(height, -(-end // group) * group - at)
            values = self._decode(part.step, part.start + at, rows)
            low, high = max(at, begin), min(at + rows, end)
            target = part.first - first
            out[target + low : target + high] = values[low - at : high - at]

    def _fill_from_columns(self, out: np.ndarray, first: int, part: Part) -> None:
        """The same where rows of `out` are columns of the GGUF tensor, and `part` some columns of `out`."""
        height = max(1, SLAB_WEIGHTS // max(1, len(out)))
        for at in range(0, part.rows if len(out) else 0, height):
            rows = min(height, part.rows - at)
            columns = slice(first, first + len(out))
            values = self._decode(part.step, part.start + at, rows, columns)
            out[:, part.first + at : part.first + at + rows] = values.T

    def _decode(self, step: Step, first: int, rows: int, columns: slice | None = None) -> np.ndarray:
        """Rows of a GGUF tensor, cut to `columns`, with the step's operation undone but for the transposition:
        float32 `(rows, columns)`. The rows are whole groups."""
        file, columns = self._holders[step.name], columns or slice(0, step.columns)
        grid = GRIDS[file.tensors[step.name].type.name]
        values = _some_columns(grid, file.read(step.name, first, rows), columns)
        bad = first_nonfinite(values, "F32")
        if bad >= 0:
            row, column = divmod(bad, values.shape[1])
            raise GGUFError(
                f"{file.path}: {step.name} decodes to a NaN or infinity (row {first + row}, column "
                f"{columns.start + column}); the file is damaged: make or fetch it again"
            )
        if step.operation.compute:
            values = step.operation.inverse(values)
        return _in_order(values, step.operation) if step.operation.arrange else values


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
    """Undo `arrange`, known by what it does to numbers: of rows, or of columns where a group is one row."""
    axis = 0 if operation.group > 1 else 1
    numbers = np.arange(values.shape[axis]).reshape((-1, 1) if axis == 0 else (1, -1))
    return np.take(values, np.argsort(operation.arrange(numbers).ravel()), axis)
