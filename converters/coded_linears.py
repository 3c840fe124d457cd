"""A checkpoint in which linears of the decoder blocks are codes: what the jobs for GPTQ's and bitsandbytes' formats have
in common. A format says which tensors take a weight's place, and which bytes of them come from a slab of rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps
from llmcompress.converters.linears import Linear, linears_of
from llmcompress.converters.to_gguf import importance_source, open_checkpoint

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.checkpoint_output import (
    COPY_BYTES,
    SHARD_BYTES,
    CheckpointOutput,
    Data,
    Files,
    Place,
    Work,
    check_room,
    copies,
    write_checkpoint,
)
from llmcompress.grids.code_bits import layout_of
from llmcompress.grids.compiling import prepare_kernels
from llmcompress.grids.grid import Grid
from llmcompress.importance import Importance
from llmcompress.output import filled_path, part_path
from llmcompress.plan import fit_memory
from llmcompress.progress import Progress
from llmcompress.pruning_report import notes_on_filling
from llmcompress.recipe import Recipe
from llmcompress.report import FileReport, Result, TensorReport
from llmcompress.safetensors_files import Entry, lay_out
from llmcompress.slab import read_slab
from llmcompress.step import Slab, slabs_of
from llmcompress.verify import Fidelity, squares
from llmcompress.whole_file import require_free_place

BYTES_PER_WEIGHT = 40  # of a slab under way; error feedback takes the most


class Format(Protocol):
    """How a checkpoint stores its linears. `kind` stands for {type} in the folder's name."""

    kind: str
    notes: Sequence[str] = ()  # what `select` found worth saying

    def select(
        self, architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
    ) -> tuple[list[Linear], dict[str, TensorInfo]]:
        """The linears that become codes, and the tensors that stay as they are, by their names in the result.

        Raises PlanError for what the format cannot hold."""

    def unit(self, linear: Linear) -> int:
        """The rows of a slab are a multiple of this, but for the last slab's."""

    def grid(self, linear: Linear) -> Grid: ...

    def entries(self, linear: Linear) -> list[Entry]:
        """The tensors in place of the weight."""

    def places(self, linear: Linear, slab: Slab) -> list[Place]:
        """Where the bytes that a slab makes go."""

    def parts(self, linear: Linear, slab: Slab, data: np.ndarray) -> list[Data]:
        """The bytes for each place, from encoded rows."""

    def texts(self, plan: CodedPlan) -> dict[str, dict[str, Any]]:
        """The JSON files that say what the folder holds, config.json among them."""

    def feeds_errors(self, linear: Linear) -> bool:
        """Whether GPTQ can choose a linear's codes."""
        return layout_of(self.grid(linear)) is not None

    def scratch(self, linear: Linear) -> list[Entry]:
        """Tensors that `finish` needs."""
        return []

    def finish(self, linears: Sequence[Linear], files: Files) -> Iterable[tuple[str, Data]]:
        """Tensors that need all slabs of theirs, when these are done."""
        return ()

    def quantize(
        self, linear: Linear, weights: np.ndarray, importance: np.ndarray | None, solver: Any, effort: str
    ) -> np.ndarray:
        """Encode float32 (rows, inputs); with a `solver` by GPTQ."""
        if solver is None:
            return self.grid(linear).quantize(weights, importance, effort)
        from llmcompress.methods import gptq

        return gptq.quantize(weights, self.grid(linear), solver, effort)

    def dequantize(self, linear: Linear, data: np.ndarray, rows: int) -> np.ndarray:
        """float32 (rows, inputs)."""
        return self.grid(linear).dequantize(data)


@dataclass(frozen=True)
class CodedPlan:
    """Everything a run needs. `kept`: the tensors that stay as they are, by their names in the result."""

    checkpoint: Checkpoint
    recipe: Recipe
    format: Format
    linears: tuple[Linear, ...]
    kept: Mapping[str, TensorInfo]
    importance: Importance
    notes: tuple[str, ...]
    slab_weights: int
    ram: int  # bytes above the interpreter and its libraries
    output: CheckpointOutput

    def method(self, linear: Linear) -> str:
        possible = linear.inputs in self.importance and self.format.feeds_errors(linear)
        return self.recipe.method if possible else "nearest"

    def prunes(self, linear: Linear) -> bool:
        """Whether weights go in the sweep that quantizes a linear."""
        return bool(self.recipe.prunes and self.format.feeds_errors(linear))

    def slabs(self, linear: Linear) -> Iterator[Slab]:
        return slabs_of(0, linear.step, self.slab_weights)


def plan_coded(model: str | Path, out: str | Path, recipe: Recipe, format: Format) -> CodedPlan:
    """What `recipe` will do to `model`, from its headers alone.

    `out` is a folder's name, or a template with `{name}` and `{type}`. Raises LlmcompressError for all that can be
    refused before a weight is read.
    """
    if recipe.calibrate or recipe.hessian:
        recipe = replace(recipe, method="gptq")
    checkpoint = open_checkpoint(model, recipe)
    checkpoint.require_plain()
    folder = filled_path(out, checkpoint.name, format.kind)
    require_free_place(folder)
    steps = weight_steps(checkpoint)
    architecture = find_architecture(Config(checkpoint.config))
    chosen, kept = format.select(architecture, checkpoint, linears_of(architecture, steps))
    linears = tuple(_cut_at(linear, format.unit(linear)) for linear in chosen)
    groups = [
        *([Entry(name, tensor.dtype, tensor.shape)] for name, tensor in kept.items()),
        *(format.entries(linear) for linear in linears),
    ]
    shards = tuple(lay_out(groups, recipe.split_max_size or SHARD_BYTES))
    source = importance_source(checkpoint, steps, recipe)
    importance = Importance(steps, source)
    importance.check()
    missing = [linear.inputs for linear in linears if source and linear.inputs not in importance]
    notes = (*checkpoint.notes, *format.notes, *(source.notes if source else ()), *_missing_notes(missing))
    headers = sum(len(shard.header) for shard in shards)
    workers, slab_weights, ram = fit_memory(
        [linear.step for linear in linears], recipe, headers, BYTES_PER_WEIGHT
    )
    output = CheckpointOutput(
        folder, shards, "", checkpoint.directory, {}, workers,
        tuple(entry for linear in linears for entry in format.scratch(linear)),
    )  # fmt: skip
    plan = CodedPlan(checkpoint, recipe, format, linears, kept, importance, notes, slab_weights, ram, output)
    texts = {
        name: json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        for name, values in format.texts(plan).items()
    }
    plan = replace(plan, output=replace(output, texts=texts))
    check_room(plan.output)
    return replace(plan, notes=(*plan.notes, *_zeros_notes(plan)))


def run_coded(plan: CodedPlan, progress: Progress | None = None) -> Result:
    """Carry out `plan`; the folder has its name when it is whole. Raises LlmcompressError as `write_checkpoint` does."""
    progress = progress or Progress()
    started = time.monotonic()
    uses = {(plan.format.grid(linear), linear.inputs in plan.importance) for linear in plan.linears}
    prepare_kernels(uses, plan.recipe.effort, progress.say)
    total = sum(tensor.nbytes for tensor in plan.kept.values())
    total += sum(linear.step.source_bytes(linear.step.rows) for linear in plan.linears)
    output = replace(plan.output, fingerprint=_fingerprint(plan))
    pieces = Counter({"": sum(-(-tensor.nbytes // COPY_BYTES) for tensor in plan.kept.values())})
    for linear, numbers in zip(plan.linears, _numbers(plan)):
        pieces[linear.inputs] += len(numbers)
    with plan.importance.running([part_path(output.folder)], pieces):
        written = write_checkpoint(
            output,
            _works(plan),
            total,
            progress,
            partial(plan.format.finish, plan.linears),
            plan.importance.stop,
            finished=plan.importance.finished,
        )
    measured = {
        linear.step.name: sum((Fidelity(*written.noted[n]) for n in numbers), Fidelity())
        for linear, numbers in zip(plan.linears, _numbers(plan))
    }
    return _result(plan, measured, time.monotonic() - started, written.kept)


def planned(plan: CodedPlan) -> Result:
    """The report of a plan that was not carried out."""
    return _result(plan, {}, 0.0, 0)


def _cut_at(linear: Linear, unit: int) -> Linear:
    step = linear.step
    return replace(linear, step=replace(step, operation=replace(step.operation, group=unit)))


def _zeros_notes(plan: CodedPlan) -> list[str]:
    if not plan.recipe.prunes:
        quantizes = plan.recipe.format != "gguf"  # or it is low rank that is coded
        return notes_on_filling(plan.checkpoint.directory, plan.recipe.method) if quantizes else []
    from llmcompress.methods.joint import zeros_notes

    pruned = [
        (linear.step.name, linear.step.columns, plan.format.grid(linear))
        for linear in plan.linears
        if plan.prunes(linear)
    ]
    whole = [linear.step.name for linear in plan.linears if not plan.prunes(linear)]
    more = [f"{len(whole)} linears are not pruned, the first is {whole[0]}"] if whole else []
    return [*zeros_notes(pruned, plan.recipe.pruning), *more]


def _missing_notes(missing: Sequence[str]) -> list[str]:
    return [f"{len(missing)} linears have no statistics and are rounded to nearest, the first is {missing[0]}"] if missing else []  # fmt: skip


def _fingerprint(plan: CodedPlan) -> str:
    """Equal for two plans exactly if they write the same bytes to the same places, slab by slab."""
    parts = [
        __version__, plan.slab_weights, plan.checkpoint.fingerprint(), plan.recipe.as_json(), plan.output.folder.resolve(),
        plan.importance.fingerprint(), plan.output.texts, [shard.header for shard in plan.output.shards],
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _numbers(plan: CodedPlan) -> list[range]:
    """The numbers of each linear's works, behind those of the copies."""
    first = sum(-(-tensor.nbytes // COPY_BYTES) for tensor in plan.kept.values())
    counts = [sum(1 for _ in plan.slabs(linear)) for linear in plan.linears]
    ends = list(accumulate(counts, initial=first))
    return [range(begin, end) for begin, end in zip(ends, ends[1:])]


def _works(plan: CodedPlan) -> Iterator[Work]:
    """The copies, then the linears as their statistics appear."""
    yield from copies(plan.checkpoint, plan.kept)
    live = plan.importance.live
    numbered = list(zip(plan.linears, _numbers(plan)))
    if live:
        numbered.sort(key=lambda pair: live.stage(pair[0].inputs))
    for linear, numbers in numbered:
        if live:
            live.reached(live.stage(linear.inputs))
        for number, slab in zip(numbers, plan.slabs(linear), strict=True):
            places = tuple(plan.format.places(linear, slab))
            yield Work(
                number, places, partial(_make, plan, linear, slab), linear.step.source_bytes(slab.rows),
                linear.inputs,
            )  # fmt: skip


def _make(plan: CodedPlan, linear: Linear, slab: Slab) -> tuple[list[Data], tuple[float, ...]]:
    """The bytes of a slab, and how far its weights are from the checkpoint's."""
    importance = plan.importance.get(linear.inputs)  # may wait for its calibration
    importance = None if importance is None else importance[linear.matrix]
    by_gptq = plan.method(linear) == "gptq"
    solver = plan.importance.solver(linear.inputs, linear.matrix) if by_gptq else None
    weights = read_slab(plan.checkpoint, linear.step, slab).float32
    if plan.prunes(linear):
        from llmcompress.methods import joint

        data = joint.quantize(
            weights, plan.format.grid(linear), solver, importance, plan.recipe.effort, plan.recipe.pruning,
            plan.recipe.desc_act,
        )  # fmt: skip
    else:
        data = plan.format.quantize(linear, weights, importance, solver, plan.recipe.effort)
    errors = plan.format.dequantize(linear, data, slab.rows)
    np.subtract(errors, weights, out=errors)
    return plan.format.parts(linear, slab, data), (slab.rows, squares(errors), squares(weights))


def _result(plan: CodedPlan, measured: Mapping[str, Fidelity], seconds: float, kept: int) -> Result:
    tensors = [
        TensorReport(name, tensor.shape, tensor.dtype, tensor.dtype, "copy", "kept as it is",
                     tensor.nbytes, None, 0, "nearest", {})
        for name, tensor in plan.kept.items()
    ]  # fmt: skip
    tensors += [_linear_report(plan, linear, measured.get(linear.step.name)) for linear in plan.linears]
    works = sum(len(numbers) for numbers in _numbers(plan))
    notes = (*plan.notes, *plan.importance.complaints)
    output = plan.output
    return Result(
        (FileReport(plan.format.kind, output.paths, output.nbytes, tuple(tensors)),),
        notes,
        seconds,
        works,
        kept,
    )


def _linear_report(plan: CodedPlan, linear: Linear, fidelity: Fidelity | None) -> TensorReport:
    step = linear.step
    rung = plan.importance.rungs.get((linear.inputs, linear.matrix))
    return TensorReport(
        step.name, step.shape, step.dtype, plan.format.grid(linear).name, step.operation.name,
        "linear of a decoder block", sum(entry.nbytes for entry in plan.format.entries(linear)),
        fidelity.relative_error if fidelity else None, fidelity.rows if fidelity else 0,
        plan.method(linear), {rung: 1} if rung else {},
    )  # fmt: skip
