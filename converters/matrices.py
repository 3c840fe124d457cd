"""The weights of the decoder blocks' linears, matrix by matrix, where the checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llmcompress.converters.families import weight_steps
from llmcompress.converters.linears import has_inputs_first

from llmcompress.checkpoint import READABLE, Checkpoint
from llmcompress.checkpoint_output import Place
from llmcompress.errors import RunError
from llmcompress.grids import GRIDS
from llmcompress.grids.floats import count_saturated, first_nonfinite, to_float32
from llmcompress.step import is_linear
from llmcompress.tensor_info import TensorInfo


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear: a tensor of the checkpoint, or one of those stacked in it."""

    tensor: TensorInfo
    number: int  # among those stacked in it
    block: int
    inputs_first: bool  # stored as (inputs, outputs)

    @property
    def outputs(self) -> int:
        return self.tensor.shape[-1 if self.inputs_first else -2]

    @property
    def inputs(self) -> int:
        return self.tensor.shape[-2 if self.inputs_first else -1]

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def place(self) -> Place:
        size = self.weights * READABLE[self.tensor.dtype].itemsize
        return Place(self.tensor.name, self.number * size, size)

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """float32 (outputs, inputs). Raises RunError for a NaN or infinity."""
        rows = self.tensor.shape[-2]
        raw = checkpoint.read(self.tensor.name, self.number * rows, rows)
        bad = first_nonfinite(raw, self.tensor.dtype)
        if bad >= 0:
            row, column = divmod(bad, raw.shape[1])
            raise RunError(
                f"{self.tensor.file}: tensor {self.tensor.name!r} holds a NaN or infinity (row {row}, column {column}); "
                "the checkpoint is damaged: fetch or train it again"
            )
        values = to_float32(raw, self.tensor.dtype)
        return np.ascontiguousarray(values.T) if self.inputs_first else np.array(values)

    def stored(self, weights: np.ndarray) -> np.ndarray:
        """What the checkpoint has in its place, in the dtype `read` of a checkpoint gives, from float32 (outputs, inputs).
        Raises RunError for a weight beyond that dtype."""
        dtype = self.tensor.dtype
        if count_saturated(weights, dtype):
            raise RunError(
                f"{self.tensor.name}: weights up to {np.abs(weights).max():.6g} are beyond the largest {dtype}"
            )
        values = np.ascontiguousarray(weights.T) if self.inputs_first else weights
        return GRIDS[dtype].quantize(values, None).view(READABLE[dtype])


def matrices_of(checkpoint: Checkpoint) -> list[Matrix]:
    """The linears of the decoder blocks; embeddings, output matrix, norms and routers are not among them."""
    found: dict[tuple[str, int], Matrix] = {}
    for step in filter(is_linear, weight_steps(checkpoint)):
        for piece in step.pieces:
            tensor = piece.tensor
            first = has_inputs_first(step, tensor)
            for number in range(tensor.shape[0] if len(tensor.shape) == 3 else 1):
                found.setdefault(
                    (tensor.name, number), Matrix(tensor, number, int(step.name.split(".")[1]), first)
                )
    return list(found.values())
