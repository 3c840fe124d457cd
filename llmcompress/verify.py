"""Holds a finished file against its source: the table, then rows decoded from what was written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import RunError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.output import part_path
from llmcompress.parallel import in_parallel
from llmcompress.plan import Plan
from llmcompress.progress import Progress
from llmcompress.slab import read_slab
from llmcompress.step import Slab

SAMPLED_WEIGHTS = 2**17  # of each tensor, as a rule
NO_RESEMBLANCE = 0.9  # relative error; rows in the wrong place are at 1.4, the coarsest format at 0.6
PRUNED_RESEMBLANCE = 1.2


@dataclass(frozen=True)
class Fidelity:
    """Sums over the rows of one tensor that were decoded and compared."""

    rows: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.rows + other.rows,
            self.squared_error + other.squared_error,
            self.squared_weights + other.squared_weights,
        )

    @property
    def relative_error(self) -> float:
        """Root of squared error over squared weights; infinite for an error on all-zero weights."""
        if not self.squared_error:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_weights) if self.squared_weights else math.inf


def verify(plan: Plan, progress: Progress) -> dict[tuple[int, int], Fidelity]:
    """Reopen the partial files and check them; returns what was measured by (output, step).

    Raises RunError for a table that is not the plan's, a copied tensor that is not identical, a value that
    is not finite, and rows that do not resemble their source.
    """
    with ExitStack() as opened:
        files = [
            [opened.enter_context(GGUFFile.open(part_path(file.path))) for file in output.files]
            for output in plan.outputs
        ]
        _check_tables(plan, files)
        if plan.recipe.verify == "off":
            return {}
        slabs = list(plan.slabs() if plan.recipe.verify == "full" else sample_slabs(plan))
        progress.start("checking", sum(plan.steps[slab.step].source_bytes(slab.rows) for slab in slabs))
        found: dict[tuple[int, int], list[tuple[int, Fidelity]]] = {}
        with closing(
            in_parallel(plan.workers, slabs, lambda slab: (slab, _compare(plan, files, slab)))
        ) as compared:
            for slab, measured in compared:
                for number, fidelity in enumerate(measured):
                    found.setdefault((number, slab.step), []).append((slab.first, fidelity))
                progress.advance(plan.steps[slab.step].source_bytes(slab.rows))
    return {place: _resembling(plan, *place, parts) for place, parts in found.items()}


def sample_slabs(plan: Plan) -> Iterator[Slab]:
    """A few evenly spaced groups of rows of each tensor, its first and last among them."""
    for index, step in enumerate(plan.steps):
        group = step.operation.group
        groups = step.rows // group
        most = 2 if step.operation.transposed else 8  # each costs a pass over a transposed source
        count = min(groups, max(2, min(most, SAMPLED_WEIGHTS // (group * step.columns))))
        chosen = np.unique(np.linspace(0, groups - 1, count).round().astype(int))
        yield from (Slab(index, int(first) * group, group) for first in chosen)


def _check_tables(plan: Plan, files: list[list[GGUFFile]]) -> None:
    for file in plan.files:
        with part_path(file.path).open("rb") as written:
            if written.read(len(file.header)) != file.header:
                raise RunError(
                    f"{file.path}: its header reads back otherwise than written; see whether the disk is sound"
                )
    for output, shards in zip(plan.outputs, files):
        for step, place in zip(plan.steps, output.placements):
            file = shards[place.file]
            stored = file.tensors.get(step.name)
            found = stored and (stored.shape, stored.type.name, stored.offset, stored.nbytes)
            planned = (step.stored_shape, place.grid.name, place.offset, place.nbytes)
            if found != planned:
                raise RunError(f"{file.path}: {step.name} reads back as {found}, {planned} was written")


def _compare(plan: Plan, files: list[list[GGUFFile]], slab: Slab) -> list[Fidelity]:
    """One Fidelity for each output."""
    step = plan.steps[slab.step]
    source = read_slab(plan.checkpoint, step, slab)
    measured = []
    for output, shards in zip(plan.outputs, files):
        place = output.placements[slab.step]
        file = shards[place.file]
        decoded = place.grid.dequantize(file.read(step.name, slab.first, slab.rows, step.columns))
        if not np.isfinite(decoded).all():
            raise RunError(f"{file.path}: {step.name} decodes to a NaN or infinity near row {slab.first}")
        np.subtract(decoded, source.float32, out=decoded)
        fidelity = Fidelity(slab.rows, squares(decoded), squares(source.float32))
        unchanged = place.grid.name == step.dtype and not plan.pruning(step)
        if unchanged and not step.operation.changes_values and fidelity.squared_error:
            raise RunError(
                f"{file.path}: {step.name} was copied and yet differs from its source near row {slab.first}"
            )
        measured.append(fidelity)
    return measured


def squares(values: np.ndarray) -> float:
    """The sum of squares in float64; einsum casts piece by piece, and starts no threads as a BLAS product does."""
    return float(np.einsum("i,i->", values.ravel(), values.ravel(), dtype=np.float64))


def _resembling(plan: Plan, number: int, index: int, parts: list[tuple[int, Fidelity]]) -> Fidelity:
    """The sum of what was measured of one tensor. Raises RunError if rows are far from their source.

    Rows are held against their own size, or the tensor's usual one where they are smaller: rows of almost
    nothing, such as embeddings that were never trained, round to nothing.
    """
    total = sum((fidelity for _, fidelity in parts), Fidelity())
    for first, part in parts:
        usual = total.squared_weights * part.rows / total.rows
        allowed = PRUNED_RESEMBLANCE if plan.pruning(plan.steps[index]) else NO_RESEMBLANCE
        if part.squared_error > allowed**2 * max(part.squared_weights, usual):
            place = plan.outputs[number].placements[index]
            raise RunError(
                f"{plan.outputs[number].files[place.file].path}: {plan.steps[index].name} as {place.grid.name} does not "
                f"resemble its source near row {first} (relative error {part.relative_error:.3g}, allowed "
                f"{allowed}); give it a larger type with --tensor-type, or see whether the disk is sound"
            )
    return total
