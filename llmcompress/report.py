"""What a job did, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.methods import FIRST_RUNG
from llmcompress.plan import Plan
from llmcompress.step import Step
from llmcompress.verify import Fidelity


@dataclass(frozen=True)
class TensorReport:
    """`relative_error` is the root of the squared error over the squared weights, of `rows_checked` rows;
    None where nothing was checked. `method` chose the codes. `rungs`: the tensor's matrices by what it took to make
    H positive definite for GPTQ, or why they were rounded to nearest; without those an earlier run finished."""

    name: str
    shape: tuple[int, ...]
    source: str  # dtype in the checkpoint
    type: str
    operation: str
    reason: str
    nbytes: int
    relative_error: float | None
    rows_checked: int
    method: str = "nearest"
    rungs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FileReport:
    """One output: a file or its shards, with every tensor in it."""

    type: str
    paths: tuple[Path, ...]
    nbytes: int
    tensors: tuple[TensorReport, ...]

    @property
    def bits_per_weight(self) -> float:
        weights = sum(prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / weights

    @property
    def type_counts(self) -> dict[str, int]:
        return dict(Counter(tensor.type for tensor in self.tensors))

    def worst(self, count: int = 5) -> list[TensorReport]:
        """The tensors with the largest relative errors."""
        checked = [tensor for tensor in self.tensors if tensor.relative_error]
        return sorted(checked, key=lambda tensor: -(tensor.relative_error or 0.0))[:count]


@dataclass(frozen=True)
class Result:
    """What `llmcompress.quantize` returns."""

    outputs: tuple[FileReport, ...]
    notes: tuple[str, ...]
    seconds: float
    slabs: int
    slabs_kept: int  # of an earlier run of the same job that did not get to its end

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for output in self.outputs for path in output.paths)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for written, output in zip(data["outputs"], self.outputs):
            written["paths"] = [str(path) for path in output.paths]
            written["bits_per_weight"] = output.bits_per_weight
            written["type_counts"] = output.type_counts
        return data


def make_result(
    plan: Plan, errors: Mapping[tuple[int, int], Fidelity], seconds: float, slabs_kept: int = 0
) -> Result:
    """The report of a finished plan; `errors` is what verification measured, by (output, step)."""
    outputs = []
    for number, output in enumerate(plan.outputs):
        tensors = []
        for index, (step, place) in enumerate(zip(plan.steps, output.placements)):
            fidelity = errors.get((number, index))
            tensors.append(TensorReport(
                step.name, step.shape, step.dtype, place.grid.name, step.operation.name, place.reason, place.nbytes,
                fidelity.relative_error if fidelity else None, fidelity.rows if fidelity else 0,
                plan.method(step, place.grid), _rungs(plan, step) if plan.method(step, place.grid) == "gptq" else {},
            ))  # fmt: skip
        paths = tuple(file.path for file in output.files)
        outputs.append(FileReport(output.file_type.name, paths, output.size, tuple(tensors)))
    notes = (*plan.notes, *plan.importance.complaints, *_notes_on_rungs(plan))
    return Result(tuple(outputs), notes, seconds, sum(1 for _ in plan.slabs()), slabs_kept)


def _rungs(plan: Plan, step: Step) -> dict[str, int]:
    """How many matrices of a tensor took which rung, in the order of the matrices."""
    rungs = sorted(
        (matrix, rung) for (name, matrix), rung in plan.importance.rungs.items() if name == step.name
    )
    return dict(Counter(rung for _, rung in rungs))


def _notes_on_rungs(plan: Plan) -> Iterator[str]:
    """A line for each rung but the first, and the first matrix that took it."""
    taken = sorted((rung, name, matrix) for (name, matrix), rung in plan.importance.rungs.items())
    for rung, places in groupby(taken, key=lambda place: place[0]):
        (_, name, matrix), *more = places
        if rung != FIRST_RUNG:
            yield f"gptq, {1 + len(more)} matrices {rung}; the first is {matrix} of {name}"
