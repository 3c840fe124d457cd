"""Holds a finished file against its source: the table, then rows decoded from what was written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import RunError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.parallel import in_parallel
from llmcompress.plan import Plan, Slab, Step, part_path
from llmcompress.progress import Progress
from llmcompress.slab import read_slab

SAMPLED_WEIGHTS = 2**17  # of each tensor, as a rule
NO_RESEMBLANCE = 0.9  # relative error; rows in the wrong place are at 1.4, the coarsest format at 0.6


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
    is not finite, and a tensor that does not resemble its source.
    """
    files = [[GGUFFile.open(part_path(file.path)) for file in output.files] for output in plan.outputs]
    try:
        _check_tables(plan, files)
        if plan.recipe.verify == "off":
            return {}
        slabs = list(plan.slabs() if plan.recipe.verify == "full" else sample_slabs(plan))
        progress.start("checking", sum(slab.rows * plan.steps[slab.step].columns for slab in slabs))
        found: dict[tuple[int, int], Fidelity] = {}
        for slab, measured in in_parallel(plan.workers, slabs, lambda slab: (slab, _compare(plan, files, slab))):
            for number, fidelity in enumerate(measured):
                key = (number, slab.step)
                found[key] = found.get(key, Fidelity()) + fidelity
            progress.advance(slab.rows * plan.steps[slab.step].columns)
    finally:
        for shards in files:
            for file in shards:
                file.close()
    _check_resemblance(plan, found)
    return found


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
    for output, shards in zip(plan.outputs, files):
        for step, place in zip(plan.steps, output.placements):
            file = shards[place.file]
            stored = file.tensors.get(step.name)
            found = stored and (stored.shape, stored.type.name, stored.offset, stored.nbytes)
            planned = (step.shape, place.grid.name, place.offset, place.nbytes)
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
        decoded = place.grid.dequantize(file.read(step.name, slab.first, slab.rows))
        if not np.isfinite(decoded).all():
            raise RunError(f"{file.path}: {step.name} decodes to a NaN or infinity near row {slab.first}")
        difference = decoded - source.float32
        fidelity = Fidelity(slab.rows, _squares(difference), _squares(source.float32))
        if place.grid.name == step.dtype and step.operation.compute is None and fidelity.squared_error:
            raise RunError(f"{file.path}: {step.name} was copied and yet differs from its source near row {slab.first}")
        measured.append(fidelity)
    return measured


def _squares(values: np.ndarray) -> float:
    flat = values.ravel().astype(np.float64)
    return float(flat @ flat)


def _check_resemblance(plan: Plan, found: dict[tuple[int, int], Fidelity]) -> None:
    for (number, index), fidelity in found.items():
        if fidelity.relative_error > NO_RESEMBLANCE:
            place = plan.outputs[number].placements[index]
            raise RunError(
                f"{plan.outputs[number].files[place.file].path}: {plan.steps[index].name} as {place.grid.name} does not "
                f"resemble its source (relative error {fidelity.relative_error:.3g}, allowed {NO_RESEMBLANCE}); "
                "give it a larger type with --tensor-type"
            )
