"""Types for rows that do not divide into a format's blocks: `--fallback best` measures what llama.cpp lays down.

Of all formats that take the rows in no more bytes than the type llama.cpp puts there, the one with the least
error on a sample of the tensor's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmcompress.checkpoint import Checkpoint
from llmcompress.filetypes import FLOATS, TypeChoice
from llmcompress.grids import GRIDS
from llmcompress.grids.grid import Grid
from llmcompress.slab import read_slab
from llmcompress.step import Slab, Step, slabs_of

SAMPLES = 4  # runs of rows, spread evenly over a tensor
SAMPLE_WEIGHTS = 2**15  # in each


@dataclass(frozen=True)
class MeasuredFallback:
    """Replaces llama.cpp's fallback types, with the effort that the job has."""

    checkpoint: Checkpoint
    effort: str

    def __call__(self, step: Step, choice: TypeChoice, importance: np.ndarray | None) -> TypeChoice:
        """The choice for `step`, another type in it where that one is nearer and not larger.

        `importance` is float32 `(matrices, columns)`. Raises RunError for weights that are not finite.
        """
        if choice.instead_of is None or choice.type in FLOATS:
            return choice
        rivals = candidates(GRIDS[choice.type], step.columns)
        errors = dict.fromkeys(rivals, 0.0)
        for slab in sample(step):
            weights = read_slab(self.checkpoint, step, slab).float32
            matrix = None if importance is None else importance[slab.first // step.shape[-2]]
            for name in rivals:
                errors[name] += squared_error(GRIDS[name], weights, matrix, self.effort)
        best = min(rivals, key=errors.__getitem__)
        if best == choice.type:
            return replace(choice, reason=f"{choice.reason}, the best of {len(rivals)} measured")
        share = errors[best] / errors[choice.type]
        return replace(
            choice, type=best, reason=f"{choice.reason}; {best} has {share:.3f} of its squared error"
        )


def candidates(usual: Grid, columns: int) -> list[str]:
    """The formats for rows of `columns` in at most the bytes of `usual`; it comes first."""
    fits = [grid for grid in GRIDS.values() if grid.block > 1 and columns % grid.block == 0]
    others = [grid.name for grid in fits if grid.bits_per_weight <= usual.bits_per_weight and grid != usual]
    return [usual.name, *others]


def sample(step: Step) -> list[Slab]:
    slabs = list(slabs_of(0, step, SAMPLE_WEIGHTS))
    chosen = np.linspace(0, len(slabs) - 1, min(SAMPLES, len(slabs)))
    return [slabs[round(place)] for place in chosen]


def squared_error(grid: Grid, weights: np.ndarray, importance: np.ndarray | None, effort: str) -> float:
    """Of float32 `(rows, columns)` rounded to the format, each column's times its importance `(columns,)`."""
    difference = grid.dequantize(grid.quantize(weights, importance, effort)).astype(np.float64) - weights
    columns = (difference**2).sum(axis=0)
    return float(columns.sum() if importance is None else columns @ importance)
