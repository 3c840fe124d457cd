"""A Hugging Face checkpoint to a GPTQ checkpoint, as AutoGPTQ, GPTQModel, transformers and vLLM read it.

In place of the weight (outputs, inputs) of every linear of the decoder blocks it has

    qweight   int32    (inputs * bits / 32, outputs)   codes, packed along the inputs
    qzeros    int32    (groups, outputs * bits / 32)   zeros, packed along the outputs
    scales    float16  (groups, outputs)
    g_idx     int32    (inputs,)                       the group of each input

and weight = scale * (code - zero). "gptq", the first version, stores zeros less one, which every reader adds again; a
zero of 0 would borrow from its neighbours, so asymmetric checkpoints are "gptq_v2", which stores zeros as they are.
Groups stay in their natural order whatever the order in which columns are rounded.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps
from llmcompress.converters.linears import Linear, linears_of, name_beside_single_experts
from llmcompress.converters.to_gguf import importance_source, open_checkpoint

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.errors import PlanError, RunError
from llmcompress.grids.compiling import prepare_kernels
from llmcompress.grids.integer import IntegerGrid, integer_grid
from llmcompress.grids.words import CODES, pack_words
from llmcompress.importance import Importance
from llmcompress.machine import cores, free_disk
from llmcompress.output import filled_path
from llmcompress.parallel import in_parallel
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import FileReport, Result, TensorReport
from llmcompress.safetensors_files import Entry, SafetensorsFiles, Shard, lay_out
from llmcompress.sizes import format_size
from llmcompress.slab import read_slab
from llmcompress.step import Slab
from llmcompress.verify import Fidelity
from llmcompress.whole_file import require_free_place, whole_folder

SHARD_BYTES = 5 * 10**9
SLAB_WEIGHTS = 2**19
COPY_BYTES = 2**24  # at a time
COMPANIONS = {
    ".json",
    ".model",
    ".txt",
    ".jinja",
    ".tiktoken",
    ".py",
}  # what lies beside the weights and is copied
NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class GptqPlan:
    """Everything a run needs. `copies`: the tensors that stay as they are, by their names in the result."""

    checkpoint: Checkpoint
    recipe: Recipe
    folder: Path
    linears: tuple[Linear, ...]
    copies: Mapping[str, TensorInfo]
    shards: tuple[Shard, ...]
    importance: Importance
    notes: tuple[str, ...]

    @property
    def kind(self) -> str:
        return kind_of(self.recipe)

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def method(self, linear: Linear) -> str:
        return self.recipe.method if linear.inputs in self.importance else "nearest"

    def grid(self, linear: Linear) -> IntegerGrid:
        group = self.recipe.group_size
        columns = linear.step.columns
        return integer_grid(self.recipe.bits, columns if group == -1 else group, self.recipe.sym)


def kind_of(recipe: Recipe) -> str:
    """What stands for {type} in the folder's name."""
    group = "row" if recipe.group_size == -1 else f"{recipe.group_size}g"
    return f"GPTQ-{recipe.bits}bit-{group}" + ("" if recipe.sym else "-asym")


def plan_gptq(model: str | Path, out: str | Path, recipe: Recipe) -> GptqPlan:
    """What `recipe` will do to `model`, from its headers alone.

    `out` is a folder's name, or a template with `{name}` and `{type}`. Raises LlmcompressError for all that can be
    refused before a weight is read.
    """
    if recipe.calibrate or recipe.hessian:
        recipe = replace(recipe, method="gptq")
    checkpoint = open_checkpoint(model, recipe)
    checkpoint.require_plain()
    folder = filled_path(out, checkpoint.name, kind_of(recipe))
    require_free_place(folder)
    steps = weight_steps(checkpoint)
    architecture = find_architecture(Config(checkpoint.config))
    linears = linears_of(architecture, steps)
    for linear in linears:
        _check_shape(linear, recipe)
    copies = _copies(architecture, checkpoint, linears)
    groups = [
        *([Entry(name, tensor.dtype, tensor.shape)] for name, tensor in copies.items()),
        *(_entries(linear, recipe) for linear in linears),
    ]
    shards = tuple(lay_out(groups, recipe.split_max_size or SHARD_BYTES))
    source = importance_source(checkpoint, steps, recipe)
    importance = Importance(steps, source)
    importance.check()
    missing = [linear.inputs for linear in linears if source and linear.inputs not in importance]
    notes = (*source.notes, *_missing_notes(missing)) if source else ()
    plan = GptqPlan(checkpoint, recipe, folder, tuple(linears), copies, shards, importance, notes)
    _check_disk(plan)
    return plan


def run_gptq(plan: GptqPlan, progress: Progress | None = None) -> Result:
    """Carry out `plan`; the folder has its name when it is whole. Raises LlmcompressError."""
    progress = progress or Progress()
    started = time.monotonic()
    prepare_kernels({(plan.grid(plan.linears[0]), True)}, plan.recipe.effort, progress.say)
    measured: dict[str, Fidelity] = {}
    with whole_folder(plan.folder) as folder:
        _copy_companions(plan.checkpoint.directory, folder)
        _write_configs(plan, folder)
        with SafetensorsFiles(folder, plan.shards) as files, plan.importance.running():
            progress.start("writing", sum(tensor.nbytes for tensor in plan.copies.values()) + sum(
                linear.step.source_bytes(linear.step.rows) for linear in plan.linears))  # fmt: skip
            for name, tensor in plan.copies.items():
                _copy(plan.checkpoint, tensor, name, files, progress)
            for linear in _in_order(plan):
                tensors, measured[linear.step.name] = _quantized(plan, linear, progress)
                for part, values in tensors.items():
                    files.write(f"{linear.step.name}.{part}", np.ascontiguousarray(values).data)
        _check_written(plan, folder)
    return _result(plan, measured, time.monotonic() - started)


def planned(plan: GptqPlan) -> Result:
    """The report of a plan that was not carried out."""
    return _result(plan, {}, 0.0)


def _check_shape(linear: Linear, recipe: Recipe) -> None:
    """The format packs 32 codes at a time in both directions, and groups do not go beyond a row."""
    rows, columns = linear.step.rows, linear.step.columns
    group = columns if recipe.group_size == -1 else recipe.group_size
    for what, size, unit in (
        ("outputs", rows, CODES),
        ("inputs", columns, CODES),
        ("inputs", columns, group),
    ):
        if size % unit:
            remedy = "choose another --group-size" if unit == group != CODES else "the format cannot hold it"
            raise PlanError(f"{linear.step.name}: {size} {what} are not a multiple of {unit}; {remedy}")


def _copies(
    architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
) -> dict[str, TensorInfo]:
    sources = {linear.step.pieces[0].tensor.name: linear.step.pieces[0].tensor for linear in linears}
    rest = {name: tensor for name, tensor in checkpoint.index.items() if name not in sources}
    if all(len(tensor.shape) < 3 for tensor in sources.values()):
        return rest
    return {name_beside_single_experts(architecture, name): tensor for name, tensor in rest.items()}


def _entries(linear: Linear, recipe: Recipe) -> list[Entry]:
    rows, columns, bits = linear.step.rows, linear.step.columns, recipe.bits
    groups = 1 if recipe.group_size == -1 else columns // recipe.group_size
    return [
        Entry(f"{linear.step.name}.{part}", dtype, shape)
        for part, dtype, shape in (
            ("qweight", "I32", (columns * bits // 32, rows)),
            ("qzeros", "I32", (groups, rows * bits // 32)),
            ("scales", "F16", (groups, rows)),
            ("g_idx", "I32", (columns,)),
        )
    ]


def _missing_notes(missing: Sequence[str]) -> list[str]:
    return [f"{len(missing)} linears have no statistics and are rounded to nearest, the first is {missing[0]}"] if missing else []  # fmt: skip


def _check_disk(plan: GptqPlan) -> None:
    parent = plan.folder.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if plan.nbytes > free_disk(parent):
        raise PlanError(
            f"{parent}: {format_size(plan.nbytes)} are needed and {format_size(free_disk(parent))} are free; "
            "make room or choose another place with -o"
        )


def _in_order(plan: GptqPlan) -> Iterator[Linear]:
    """The linears as their statistics appear."""
    live = plan.importance.live
    if live is None:
        yield from plan.linears
        return
    for linear in sorted(plan.linears, key=lambda linear: live.stage(linear.inputs)):
        live.reached(live.stage(linear.inputs))
        yield linear


def _quantized(plan: GptqPlan, linear: Linear, progress: Progress) -> tuple[dict[str, np.ndarray], Fidelity]:
    """The four tensors of a linear by their last names, and how far its weights are from the checkpoint's."""
    step, grid, bits, effort = linear.step, plan.grid(linear), plan.recipe.bits, plan.recipe.effort
    importance = plan.importance.get(linear.inputs)  # may wait for its calibration
    importance = None if importance is None else importance[linear.matrix]
    by_gptq = plan.method(linear) == "gptq"
    solver = plan.importance.solver(linear.inputs, linear.matrix) if by_gptq else None
    if solver and plan.recipe.desc_act:
        solver.by_importance  # once, before the threads ask for it
    entries = _entries(linear, plan.recipe)
    qweight, qzeros, scales = (
        np.empty(entry.shape, dtype) for entry, dtype in zip(entries, ("<i4", "<i4", "<f2"))
    )

    def do(slab: Slab) -> tuple[Slab, Fidelity]:
        weights = read_slab(plan.checkpoint, step, slab).float32
        if solver:
            from llmcompress.methods import gptq

            data = gptq.quantize(weights, grid, solver, effort, plan.recipe.desc_act)
        else:
            data = grid.quantize(weights, importance, effort)
        outputs = slice(slab.first, slab.first + slab.rows)
        words = slice(slab.first * bits // 32, (slab.first + slab.rows) * bits // 32)
        scale, zeros, codes = grid.parts(data)
        qweight[:, outputs] = pack_words(codes.T, bits)
        qzeros[:, words] = pack_words(zeros - np.uint8(plan.recipe.sym), bits).T
        scales[:, outputs] = scale.T
        errors = grid.dequantize(data).astype(np.float64) - weights
        return slab, Fidelity(
            slab.rows, float((errors**2).sum()), float((weights.astype(np.float64) ** 2).sum())
        )

    found: dict[int, Fidelity] = {}
    workers = plan.recipe.threads or cores()
    with closing(in_parallel(workers, _slabs(linear), do)) as done:
        for slab, fidelity in done:
            found[slab.first] = fidelity
            progress.advance(step.source_bytes(slab.rows))
    group = np.arange(step.columns, dtype="<i4") // np.int32(grid.block)
    total = sum((found[first] for first in sorted(found)), Fidelity())
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": group}, total


def _slabs(linear: Linear) -> Iterator[Slab]:
    """Runs of rows whose codes fill whole words."""
    size = max(CODES, SLAB_WEIGHTS // linear.step.columns // CODES * CODES)
    for first in range(0, linear.step.rows, size):
        yield Slab(0, first, min(size, linear.step.rows - first))


def _copy(
    checkpoint: Checkpoint, tensor: TensorInfo, name: str, files: SafetensorsFiles, progress: Progress
) -> None:
    for position in range(0, tensor.nbytes, COPY_BYTES):
        size = min(COPY_BYTES, tensor.nbytes - position)
        files.write(name, checkpoint.read_bytes(tensor.name, position, size), position)
        progress.advance(size)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, chat template, licence and the model's own code."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in COMPANIONS or file.name.upper().startswith("LICENSE")
        if (
            wanted
            and file.is_file()
            and not file.name.endswith(".index.json")
            and file.name not in NOT_COPIED
        ):
            shutil.copyfile(file, folder / file.name)


def _write_configs(plan: GptqPlan, folder: Path) -> None:
    """The same settings where transformers and vLLM look for them, and where AutoGPTQ does."""
    settings = quantization_config(plan.recipe, _left_out(plan))
    for name, values in (
        ("config.json", plan.checkpoint.config | {"quantization_config": settings}),
        ("quantize_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def quantization_config(recipe: Recipe, left_out: Sequence[str] = ()) -> dict[str, object]:
    """The settings of a checkpoint. `left_out`: patterns of the modules whose weights are not codes."""
    version = "gptq" if recipe.sym else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "desc_act": False,  # groups are in their natural order, whatever the order of rounding
        "static_groups": recipe.desc_act or recipe.group_size == -1,
        "sym": recipe.sym,
        "checkpoint_format": version,
        "format": version,
        "method": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": False,
        "damp_percent": 0.01,
        "dynamic": {f"-:{pattern}": {} for pattern in left_out},
        "meta": {"quantizer": [f"llmcompress:{__version__}"], "act_group_aware": False},
    }


def _left_out(plan: GptqPlan) -> list[str]:
    """Patterns for the output matrix, and for routers."""
    routers = {
        name.removesuffix(".weight").rpartition(".layers.")[2].partition(".")[2]
        for name, tensor in plan.copies.items()
        if ".layers." in name and name.endswith(".weight") and len(tensor.shape) > 1
    }
    return [".*lm_head.*", *(rf".*\.{re.escape(name)}$" for name in sorted(routers))]


def _check_written(plan: GptqPlan, folder: Path) -> None:
    """Reopen what was written and hold its table against the plan."""
    wanted = {(name, tensor.dtype, tensor.shape) for name, tensor in plan.copies.items()}
    wanted |= {
        (entry.name, entry.dtype, entry.shape)
        for linear in plan.linears
        for entry in _entries(linear, plan.recipe)
    }
    with Checkpoint.open(folder) as written:
        found = {(tensor.name, tensor.dtype, tensor.shape) for tensor in written.index.values()}
    if found != wanted:
        raise RunError(f"{folder}: {len(found ^ wanted)} tensors are not those of the plan; run it again")


def _result(plan: GptqPlan, measured: dict[str, Fidelity], seconds: float) -> Result:
    tensors = [
        TensorReport(name, tensor.shape, tensor.dtype, tensor.dtype, "copy", "no linear of a decoder block",
                     tensor.nbytes, None, 0, "nearest", {})
        for name, tensor in plan.copies.items()
    ]  # fmt: skip
    tensors += [_linear_report(plan, linear, measured.get(linear.step.name)) for linear in plan.linears]
    paths = tuple(plan.folder / shard.file for shard in plan.shards)
    slabs = sum(1 for linear in plan.linears for _ in _slabs(linear))
    notes = (*plan.notes, *plan.importance.complaints)
    return Result((FileReport(plan.kind, paths, plan.nbytes, tuple(tensors)),), notes, seconds, slabs, 0)


def _linear_report(plan: GptqPlan, linear: Linear, fidelity: Fidelity | None) -> TensorReport:
    step = linear.step
    rung = plan.importance.rungs.get((linear.inputs, linear.matrix))
    return TensorReport(
        step.name, step.shape, step.dtype, plan.grid(linear).name, step.operation.name,
        "linear of a decoder block", sum(entry.nbytes for entry in _entries(linear, plan.recipe)),
        fidelity.relative_error if fidelity else None, fidelity.rows if fidelity else 0,
        plan.method(linear), {rung: 1} if rung else {},
    )  # fmt: skip
