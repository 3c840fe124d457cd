"""What may happen to a tensor on its way into a GGUF, each with a name that tables use.

An operation changes rows or values and keeps their number; a cut says which rows of a checkpoint's tensor one of
its targets gets, and in which shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from llmcompress.converters.config import Config

from llmcompress.checkpoint import TensorInfo
from llmcompress.errors import PlanError
from llmcompress.step import COPY, Operation, Piece

Make = Callable[[Config, TensorInfo], Operation]
Shape = tuple[int, ...]


class Part(NamedTuple):
    """What a target gets of a tensor; with `transposed`, pieces count columns. `stored_as` is the file's shape of the
    values, where it is another."""

    shape: Shape
    pieces: tuple[Piece, ...]
    transposed: bool = False
    stored_as: Shape | None = None


Cut = Callable[[Config, TensorInfo, int, int], Part]  # part number `part` of `parts`


def copied(config: Config, tensor: TensorInfo) -> Operation:
    return COPY


def rotary(heads: str) -> Make:
    """Rows of each head from transformers' two halves to the interleaved pairs ggml's NORM rope turns.

    `heads` names the Config property that counts the heads. Of a head that turns in part, the first dimensions turn.
    """

    def operation(config: Config, tensor: TensorInfo) -> Operation:
        count = getattr(config, heads)
        values = tensor.shape[0]
        if values % (2 * count):
            raise PlanError(f"{tensor.name}: {values} rows cannot be {count} heads of an even size")
        size = values // count
        if len(tensor.shape) == 1:
            return Operation(
                "rotary pairs", 1, lambda row: _interleave(row.reshape(-1, 1), size).reshape(1, -1)
            )
        return Operation("rotary pairs", size, lambda rows: _interleave(rows, size))

    return operation


def _interleave(rows: np.ndarray, size: int) -> np.ndarray:
    heads = rows.reshape(-1, 2, size // 2, rows.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def plus_one(config: Config, tensor: TensorInfo) -> Operation:
    """A norm whose weight is kept as its distance from one (Gemma's); ggml multiplies by the weight itself."""
    if tensor.name.endswith(".bias"):
        return COPY
    one = np.float32(1)
    return Operation("plus one", 1, compute=lambda rows: rows + one, inverse=lambda rows: rows - one)


def minus_exp(config: Config, tensor: TensorInfo) -> Operation:
    """The decay of a state space, kept as the logarithm of its negative."""
    return Operation("minus exp", 1, compute=lambda rows: -np.exp(rows), inverse=lambda rows: np.log(-rows))


def equal_parts(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """The rows in equal parts, one for each target: of each matrix, where the tensor is a stack of them."""
    return _matrices(tensor, parts, lambda rows: (part * rows // parts, rows // parts, 1))


def transposed(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """The same of a linear, or a stack of them, that is kept as (in, out), as GPT-2's are."""
    return _matrices(tensor, parts, lambda rows: (part * rows // parts, rows // parts, 1), True)


def transposed_turns(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """The same where the targets take turns, output by output."""
    return _matrices(tensor, parts, lambda rows: (part, rows // parts, parts), True)


def times(*names: str, default: float = 1.0) -> Make:
    """All values times those of the config, which llama.cpp does not multiply by on the way."""

    def operation(config: Config, tensor: TensorInfo) -> Operation:
        factor = np.float32(np.prod([config.get(name, default=default) for name in names]))
        return scaled(np.full((tensor.rows, 1), factor), "times " + ", ".join(names))

    return operation


def scaled(factors: np.ndarray, name: str) -> Operation:
    """Each row times its factor, float32 `(rows, 1)`; nothing where all are one."""
    return COPY if (factors == 1).all() else Operation(name, factors=factors.astype(np.float32))


def whole(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """All of it for each target."""
    return equal_parts(config, tensor, 0, 1)


def reshaped(shape: Callable[[Config, TensorInfo], Shape]) -> Cut:
    """All of it, in the shape that `shape` gives."""

    def cut(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
        wanted, held = shape(config, tensor), squeezed(config, tensor, part, parts)
        if math.prod(wanted) != math.prod(held.shape):
            raise PlanError(
                f"{tensor.name}: {math.prod(held.shape)} values, by config.json they are "
                f"{'x'.join(map(str, wanted))}"
            )
        return held._replace(stored_as=wanted)

    return cut


def squeezed(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """All of it, without the axes of length one: the kernels of convolutions."""
    return Part(tuple(size for size in tensor.shape if size != 1), (Piece(tensor, 0, tensor.rows),))


def column(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """A vector as a matrix of one column, which is how ggml wants some of them."""
    return Part((tensor.columns, 1), (Piece(tensor, 0, tensor.columns),), True)


def every(part: int, parts: int) -> Make:
    """Of each row, the values that are this part's where parts take turns; `value_parts` is the cut that goes with it."""

    def arrange(rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows[:, part::parts])

    return lambda config, tensor: Operation(f"every {parts}th value from {part}", 1, arrange)


def of_columns(name: str, order: Callable[[Config], np.ndarray]) -> Make:
    """The values of each row in the order that `order` gives."""

    def operation(config: Config, tensor: TensorInfo) -> Operation:
        chosen = order(config)
        if len(chosen) != tensor.columns:
            raise PlanError(f"{tensor.name}: {tensor.columns} columns, by config.json they are {len(chosen)}")
        return Operation(name, 1, lambda rows: np.ascontiguousarray(rows[:, chosen]), moves_columns=True)

    return operation


def value_parts(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """All rows, each with its share of the values, which an operation picks."""
    return Part((*tensor.shape[:-1], tensor.columns // parts), (Piece(tensor, 0, tensor.rows),))


def runs(choose: Callable[[Config, int], Sequence[Sequence[range]]]) -> Cut:
    """Runs of rows in any order: `choose` takes the config and the number of rows, and gives those of each target."""

    def cut(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
        rows = tensor.shape[0]
        chosen = choose(config, rows)[part]
        if any(run.stop > rows for run in chosen):
            raise PlanError(f"{tensor.name}: {rows} rows are not what config.json says they are made of")
        pieces = tuple(Piece(tensor, run.start, len(run)) for run in chosen)
        return Part((sum(map(len, chosen)), *(size for size in tensor.shape[1:] if size != 1)), pieces)

    return cut


def in_groups(sizes: Callable[[Config], tuple[int, Sequence[int]]], order: Sequence[Sequence[int]]) -> Cut:
    """Rows that lie group by group, in each group one run for every size that `sizes` gives behind the number of groups.

    `order` says which runs, of all groups one after the other, each target gets: fused q, k and v of every head
    become those of all heads by ((0, 1, 2),), and three tensors by ((0,), (1,), (2,)).
    """

    def choose(config: Config, rows: int) -> Sequence[Sequence[range]]:
        groups, lengths = sizes(config)
        starts, whole = np.cumsum([0, *lengths]), sum(lengths)
        if groups * whole != rows:
            raise PlanError(
                f"config.json: {groups} groups of {whole} rows, the checkpoint's fused tensor has {rows}"
            )
        return [
            [range(group * whole + int(starts[run]), group * whole + int(starts[run + 1]))
             for run in target for group in range(groups)]
            for target in order
        ]  # fmt: skip

    return runs(choose)


def picked(tensor: TensorInfo, operation: Operation, pieces: Sequence[Piece]) -> tuple[Operation, Piece]:
    """Of a vector, the runs of values that `pieces` name, as one piece and the operation that picks them."""
    chosen = np.concatenate([np.arange(piece.rows) * piece.stride + piece.first for piece in pieces])

    def arrange(row: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(row[:, chosen])
        return operation.arrange(values) if operation.arrange else values

    return replace(operation, name=f"picked, {operation.name}", arrange=arrange), Piece(tensor, 0, 1)


def _matrices(
    tensor: TensorInfo, parts: int, choose: Callable[[int], tuple[int, int, int]], transposed: bool = False
) -> Part:
    """Some rows of every matrix of a tensor of at most three dimensions, or of its transpose; a vector is whole, or
    a column that is cut."""
    if len(tensor.shape) > 3:
        raise PlanError(f"{tensor.name}: has {len(tensor.shape)} dimensions, at most 3 are known")
    if len(tensor.shape) < 2 and parts == 1:
        return Part(tensor.shape, (Piece(tensor, 0, 1),))
    *stack, height, width = tensor.shape if len(tensor.shape) > 1 else (tensor.columns, 1)
    transposed = transposed and len(tensor.shape) > 1
    rows, columns = (width, height) if transposed else (height, width)
    if rows % parts:
        raise PlanError(f"{tensor.name}: {rows} rows cannot be cut into {parts} equal parts")
    first, count, stride = choose(rows)
    tops = [matrix * height for matrix in range(stack[0] if stack else 1)]
    pieces = tuple(
        Piece(tensor, first, count, stride, top) if transposed else Piece(tensor, top + first, count, stride)
        for top in tops
    )
    return Part((*stack, count, columns) if len(tensor.shape) > 1 else (count,), pieces, transposed)
