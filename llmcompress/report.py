"""What a job did, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.plan import Plan
from llmcompress.verify import Fidelity


@dataclass(frozen=True)
class TensorReport:
    """`relative_error` is the root of the squared error over the squared weights, of `rows_checked` rows;
    None where nothing was checked."""

    name: str
    shape: tuple[int, ...]
    source: str  # dtype in the checkpoint
    type: str
    operation: str
    reason: str
    nbytes: int
    relative_error: float | None
    rows_checked: int


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
            ))  # fmt: skip
        paths = tuple(file.path for file in output.files)
        outputs.append(FileReport(output.file_type.name, paths, output.size, tuple(tensors)))
    notes = (*plan.notes, *plan.importance.complaints)
    return Result(tuple(outputs), notes, seconds, sum(1 for _ in plan.slabs()), slabs_kept)
