"""The job of `merge`: a checkpoint with an adapter in its weights, an ordinary folder of safetensors.

Every weight that the adapter changes is added up in float32, a slab of rows at a time, and rounded once. All else is
copied byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcompress.converters.adapter_places import with_adapter

from llmcompress import __version__
from llmcompress.checkpoint import READABLE, Checkpoint
from llmcompress.checkpoint_output import (
    SHARD_BYTES,
    CheckpointOutput,
    Place,
    Work,
    check_room,
    copies,
    write_checkpoint,
)
from llmcompress.errors import PlanError, nearest
from llmcompress.grids import GRIDS
from llmcompress.grids.compiling import prepare_kernels
from llmcompress.merged import MergedCheckpoint
from llmcompress.output import filled_path
from llmcompress.plan import fit_memory
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import FileReport, Result, TensorReport
from llmcompress.safetensors_files import Entry, lay_out
from llmcompress.slab import read_slab
from llmcompress.step import Piece, Step, slabs_of
from llmcompress.whole_file import require_free_place

BYTES_PER_WEIGHT = 20  # of a slab under way
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # and what config.json calls them


@dataclass(frozen=True)
class MergePlan:
    """Everything a run needs. `types`: the dtype of each tensor in the result."""

    checkpoint: MergedCheckpoint
    types: Mapping[str, str]
    output: CheckpointOutput
    slab_weights: int
    notes: tuple[str, ...]

    @property
    def steps(self) -> dict[str, Step]:
        """The tensors that are not copied."""
        index = self.checkpoint.index
        return {
            name: _step(self.checkpoint, name)
            for name in index
            if name in self.checkpoint.changed or self.types[name] != index[name].dtype
        }


def plan_merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    recipe: Recipe,
    dtype: str = "auto",
    onto: str | None = None,
) -> MergePlan:
    """What merging will do, from headers alone. `out` is a folder's name, in which {name} stands for the model's; of
    `recipe`, how the job is run. Raises LlmcompressError for all that can be refused before a weight is read."""
    wanted = dtype.upper()
    if wanted not in ("AUTO", *TYPES):
        raise PlanError(f"--dtype {dtype}: none of auto, {', '.join(TYPES)}{nearest(dtype, TYPES)}")
    base = Checkpoint.open(model)
    base.require_plain()
    checkpoint = with_adapter(base, adapter, onto)
    folder = filled_path(out, checkpoint.name, "merged")
    require_free_place(folder)
    types = {name: _type(checkpoint, name, wanted) for name in checkpoint.index}
    entries = [[Entry(name, types[name], tensor.shape)] for name, tensor in checkpoint.index.items()]
    shards = tuple(lay_out(entries, recipe.split_max_size or SHARD_BYTES))
    steps = [_step(checkpoint, name) for name in checkpoint.index]
    workers, slab_weights, _ = fit_memory(
        steps, recipe, sum(len(shard.header) for shard in shards), BYTES_PER_WEIGHT
    )
    texts = {"config.json": json.dumps(_config(checkpoint, wanted), indent=2, ensure_ascii=False) + "\n"}
    job = f"{__version__} {folder.resolve()} {slab_weights} {checkpoint.fingerprint()} {texts}"
    digest = hashlib.sha256(job.encode())
    for shard in shards:
        digest.update(shard.header)
    output = CheckpointOutput(folder, shards, digest.hexdigest(), checkpoint.directory, texts, workers)
    check_room(output)
    return MergePlan(checkpoint, types, output, slab_weights, tuple(checkpoint.notes))


def run_merge(plan: MergePlan, progress: Progress = Progress()) -> Result:
    """Carry out `plan`; the folder has its name when it is whole. Raises LlmcompressError as `write_checkpoint` does."""
    started = time.monotonic()
    prepare_kernels(
        {(GRIDS[type], False) for type in set(plan.types.values()) & TYPES.keys()}, "normal", progress.say
    )
    with plan.checkpoint:
        works = list(_works(plan))
        written = write_checkpoint(plan.output, works, sum(work.source_bytes for work in works), progress)
    tensors = tuple(
        TensorReport(
            name, tensor.shape, tensor.dtype, plan.types[name], "merge" if name in plan.checkpoint.changed else "copy",
            "changed by the adapter" if name in plan.checkpoint.changed else "as it is", entry.nbytes, None, 0,
        )
        for (name, tensor), entry in zip(plan.checkpoint.index.items(), _entries(plan))
    )  # fmt: skip
    report = FileReport("merged", plan.output.paths, plan.output.nbytes, tensors)
    return Result((report,), plan.notes, time.monotonic() - started, len(works), written.kept)


def _entries(plan: MergePlan) -> Iterator[Entry]:
    yield from (entry for shard in plan.output.shards for entry in shard.entries)


def _type(checkpoint: MergedCheckpoint, name: str, wanted: str) -> str:
    """The dtype asked for; by default the base's own, and that of the embedding for a head it did not have."""
    own = checkpoint.original.index[checkpoint.source_name(name)].dtype
    return own if wanted == "AUTO" or own not in READABLE else wanted


def _step(checkpoint: MergedCheckpoint, name: str) -> Step:
    tensor = checkpoint.index[name]
    return Step(name, (tensor.rows, tensor.columns), (Piece(tensor, 0, tensor.rows),))


def _config(checkpoint: MergedCheckpoint, wanted: str) -> dict:
    if wanted == "AUTO":
        return checkpoint.config
    known = [key for key in ("dtype", "torch_dtype") if key in checkpoint.config] or ["dtype"]
    return checkpoint.config | dict.fromkeys(known, TYPES[wanted])


def _works(plan: MergePlan) -> Iterator[Work]:
    steps = plan.steps
    copied = {name: tensor for name, tensor in plan.checkpoint.index.items() if name not in steps}
    number = 0
    for work in copies(plan.checkpoint, copied):
        yield work
        number = work.number + 1
    for step in steps.values():
        grid = GRIDS[plan.types[step.name]]
        width = grid.row_bytes(step.columns)
        for slab in slabs_of(0, step, plan.slab_weights):

            def make(step=step, slab=slab, grid=grid):
                return [read_slab(plan.checkpoint, step, slab).encoded(grid, None)], ()

            place = Place(step.name, slab.first * width, slab.rows * width)
            yield Work(number, (place,), make, step.source_bytes(slab.rows))
            number += 1
