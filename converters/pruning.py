"""The job of `prune`: a checkpoint in which weights of the decoder blocks' linears are zeros, an ordinary folder.

Methods that look at inputs go block by block, each calibrated on the pruned ones before it, with one block's weights in
memory. Every tensor is written to its place as soon as it is pruned, and read back from there to run its block; so a
killed run goes on where it stopped. Embeddings, output matrix, norms and routers stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llmcompress.converters.families import weight_steps
from llmcompress.converters.linears import has_inputs_first, is_linear

from llmcompress import __version__
from llmcompress.checkpoint import READABLE, Checkpoint, TensorInfo
from llmcompress.checkpoint_output import (
    COPY_BYTES,
    SHARD_BYTES,
    CheckpointOutput,
    Files,
    Place,
    Work,
    check_room,
    copies,
    write_checkpoint,
)
from llmcompress.errors import PlanError, RunError
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS
from llmcompress.grids import GRIDS
from llmcompress.grids.floats import first_nonfinite, to_float32
from llmcompress.machine import cores
from llmcompress.methods import magnitude, wanda
from llmcompress.output import filled_path
from llmcompress.plan import FIXED_RAM
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions
from llmcompress.safetensors_files import Entry, lay_out
from llmcompress.sizes import format_size
from llmcompress.whole_file import require_free_place
from llmcompress.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from llmcompress.converters.sequential import BlockInputs, SequentialInputs

MANIFEST = "prune.json"
BYTES_PER_WEIGHT = 16  # of a matrix under way
# What was done in place of the method.
FALLBACKS = ("", "magnitude of each row, for too few tokens", "wanda, for H has no Cholesky factor")


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear: a tensor of the checkpoint, or one of those stacked in it."""

    tensor: TensorInfo
    number: int  # among the stacked
    block: int
    inputs_first: bool  # stored as (inputs, outputs)

    @property
    def place(self) -> Place:
        rows, columns = self.tensor.shape[-2:]
        size = rows * columns * READABLE[self.tensor.dtype].itemsize
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
        """uint8 rows as the checkpoint has them, from float32 (outputs, inputs)."""
        values = np.ascontiguousarray(weights.T) if self.inputs_first else weights
        return GRIDS[self.tensor.dtype].quantize(values, None, "normal")


@dataclass(frozen=True)
class PruningPlan:
    """Everything a run needs. `shares`: the sparsity of each tensor that is pruned, by name, its matrices in order in
    `matrices`. `model`: what runs it, where the method looks at inputs."""

    checkpoint: PartlyPruned
    options: PruningOptions
    matrices: tuple[Matrix, ...]
    shares: Mapping[str, float]
    output: CheckpointOutput
    model: SequentialInputs | None
    notes: tuple[str, ...]

    @property
    def copied(self) -> dict[str, TensorInfo]:
        return {name: tensor for name, tensor in self.checkpoint.index.items() if name not in self.shares}

    @property
    def first_number(self) -> int:
        """Of the matrices' works, behind those of the copies."""
        return sum(-(-tensor.nbytes // COPY_BYTES) for tensor in self.copied.values())


class PartlyPruned(WrappedCheckpoint):
    """A checkpoint with the tensors named in `rewritten` as they stand in the folder that is being made."""

    files_made: Files

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name in self.rewritten:
            size = out.nbytes
            data = self.files_made.read(Place(name, first * size // max(1, len(out)), size))
            out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)
        else:
            super().read_into(name, first, out)

    def fingerprint(self) -> str:
        return self.base.fingerprint()


@dataclass(frozen=True)
class TensorDensity:
    """What became of one tensor: of its weights, how many are zeros; how many of its matrices were pruned another way
    than asked for, and why."""

    name: str
    shape: tuple[int, ...]
    asked: float
    zeros: int
    weights: int
    fallbacks: Mapping[str, int]

    @property
    def density(self) -> float:
        return 1 - self.zeros / self.weights


@dataclass(frozen=True)
class PruningReport:
    """A finished pruning. `left`: matrices that stay as they are."""

    path: Path
    options: PruningOptions
    tensors: tuple[TensorDensity, ...]
    left: tuple[str, ...]
    model_weights: int
    notes: tuple[str, ...]
    tokens: Mapping[str, Any] | None
    statistics: str | None
    seconds: float
    resumed: int

    @property
    def sparsity(self) -> float:
        """Of the tensors that were pruned."""
        return sum(tensor.zeros for tensor in self.tensors) / max(
            1, sum(tensor.weights for tensor in self.tensors)
        )

    @property
    def sparsity_of_model(self) -> float:
        return sum(tensor.zeros for tensor in self.tensors) / self.model_weights

    def as_dict(self) -> dict[str, Any]:
        """What prune.json holds; `statistics` and `tokens` tell what the inputs were measured on."""
        return {
            "version": __version__,
            **self.options.as_dict(),
            "sparsity_reached": self.sparsity,
            "sparsity_of_model": self.sparsity_of_model,
            "tokens_seen": self.tokens,
            "statistics": self.statistics,
            "tensors": {
                tensor.name: {"density": tensor.density, **asdict(tensor)} for tensor in self.tensors
            },
            "left": self.left,
            "notes": self.notes,
        }


def plan_pruning(model: str | Path, out: str | Path, options: PruningOptions) -> PruningPlan:
    """What pruning will do, from headers alone. `out` is a folder's name, in which {name} stands for the model's.
    Raises LlmcompressError for all that can be refused before a weight is read."""
    base = Checkpoint.open(model)
    base.require_plain()
    checkpoint = PartlyPruned(base)
    folder = filled_path(out, checkpoint.name, "pruned")
    require_free_place(folder)
    found = matrices_of(checkpoint)
    live = _model(checkpoint, options) if options.method != "magnitude" else None
    notes = list(checkpoint.notes)
    if live:
        notes += live.rows.notes
        found = [replace(matrix, block=live.block_of(matrix.tensor.name)) for matrix in found]
        outside = sorted({matrix.tensor.name for matrix in found if matrix.block is None})
        if outside:
            notes.append(
                f"{len(outside)} matrices are not run and stay as they are, the first is {outside[0]}"
            )
    candidates = [matrix for matrix in found if matrix.block is not None]
    names = list(dict.fromkeys(matrix.tensor.name for matrix in candidates))
    options.require_matches(names)
    shares = {name: options.share_of(name, options.share) for name in names}
    shares = {name: share for name, share in shares.items() if share > 0}
    matrices = tuple(matrix for matrix in candidates if matrix.tensor.name in shares)
    if not matrices:
        raise PlanError(
            f"{checkpoint.directory}: nothing is left to prune; lower --keep, or raise --sparsity"
        )
    _check_groups(matrices, options)
    entries = [[Entry(name, tensor.dtype, tensor.shape)] for name, tensor in checkpoint.index.items()]
    shards = tuple(lay_out(entries, options.split_max_size or SHARD_BYTES))
    texts = {"config.json": json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n"}
    job = [
        __version__,
        folder.resolve(),
        checkpoint.fingerprint(),
        texts,
        options.as_dict(),
        live and live.about,
    ]
    digest = hashlib.sha256(repr(job).encode())
    for shard in shards:
        digest.update(shard.header)
    workers = _workers(matrices, options, live)
    output = CheckpointOutput(folder, shards, digest.hexdigest(), checkpoint.directory, texts, workers)
    check_room(output)
    return PruningPlan(checkpoint, options, matrices, shares, output, live, tuple(notes))


def run_pruning(plan: PruningPlan, progress: Progress = Progress()) -> PruningReport:
    """Carry out `plan`; the folder has its name when it is whole. Raises LlmcompressError as `write_checkpoint` does."""
    started, report = time.monotonic(), []
    copied = list(copies(plan.checkpoint, plan.copied))
    total = sum(tensor.nbytes for tensor in plan.checkpoint.index.values())

    def manifest(files: Files) -> Iterator[tuple[str, bytes]]:
        report.append(_report(plan, files, started))
        yield MANIFEST, (json.dumps(report[0].as_dict(), indent=1) + "\n").encode()

    with plan.checkpoint:
        write_checkpoint(plan.output, copied, total, progress, manifest, then=partial(_stages, plan))
    return report[0]


def prune_model(
    model: str | Path, out: str | Path, options: PruningOptions, progress: Progress = Progress()
) -> PruningReport:
    """Prune `model` into the folder `out`. Killed, the same call goes on where it stopped. Raises LlmcompressError."""
    return run_pruning(plan_pruning(model, out, options), progress)


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


def _model(checkpoint: Checkpoint, options: PruningOptions) -> SequentialInputs:
    from llmcompress.converters.sequential import CalibrationOptions, SequentialInputs

    given = CalibrationOptions(
        data=options.data, tokens=options.tokens, chunk=options.chunk, seed=options.seed, device=options.device,
        dtype=options.dtype, hidden_ram=options.hidden_ram, batch_tokens=options.batch_tokens,
    )  # fmt: skip
    return SequentialInputs(checkpoint, given, products=options.method == "sparsegpt")


def _check_groups(matrices: Sequence[Matrix], options: PruningOptions) -> None:
    for matrix in matrices if options.group else ():
        inputs = matrix.tensor.shape[-2 if matrix.inputs_first else -1]
        if inputs % options.group.group:
            raise PlanError(
                f"--pattern {options.group}: {matrix.tensor.name} has {inputs} inputs, no multiple of "
                f"{options.group.group}; leave it out with --keep, or choose another pattern"
            )


def _workers(matrices: Sequence[Matrix], options: PruningOptions, live: SequentialInputs | None) -> int:
    """As many as fit. Raises PlanError where not even one does."""
    workers = options.threads or cores()
    if options.max_ram is None:
        return workers
    largest = BYTES_PER_WEIGHT * max(matrix.tensor.shape[-1] * matrix.tensor.shape[-2] for matrix in matrices)
    fixed = FIXED_RAM + (live.ram if live else 0)
    if fixed + largest > options.max_ram:
        raise PlanError(
            f"--max-ram {format_size(options.max_ram)} is too little: this job needs {format_size(fixed + largest)}, "
            "with one block's weights and hidden states of --hidden-ram"
        )
    return min(workers, (options.max_ram - fixed) // largest)


def _stages(plan: PruningPlan, files: Files) -> Iterator[Sequence[Work]]:
    """The matrices, block by block where the method looks at inputs."""
    numbered = list(enumerate(plan.matrices, plan.first_number))
    if plan.model is None:
        yield [_work(plan, number, matrix, None) for number, matrix in numbered]
        return
    plan.checkpoint.files_made = files
    plan.model.start()
    for block in range(plan.model.blocks):
        own = [(number, matrix) for number, matrix in numbered if matrix.block == block]
        works = [_work(plan, number, matrix, None) for number, matrix in own]
        if any(files.kept(work) is None for work in works):
            inputs = plan.model.inputs(block)
            works = [_work(plan, number, matrix, inputs) for number, matrix in own]
        yield works
        plan.checkpoint.rewritten |= {matrix.tensor.name for _, matrix in own}
        if block + 1 < plan.model.blocks:
            plan.model.go_on(block)


def _work(plan: PruningPlan, number: int, matrix: Matrix, inputs: BlockInputs | None) -> Work:
    return Work(number, (matrix.place,), partial(_make, plan, matrix, inputs), matrix.place.size)


def _make(
    plan: PruningPlan, matrix: Matrix, inputs: BlockInputs | None
) -> tuple[list[np.ndarray], tuple[float, ...]]:
    """A pruned matrix; and its zeros, which of FALLBACKS it took, and the CRC-32 of what was known of its inputs."""
    weights = matrix.read(plan.checkpoint.base)
    share, group = plan.shares[matrix.tensor.name], plan.options.group
    if inputs is None:
        weights[magnitude.mask(weights, share, group)] = 0
        fallback = seen = 0
    else:
        weights, fallback, seen = _prune(plan, matrix, weights, inputs)
    data = matrix.stored(weights)
    kept = to_float32(data.reshape(-1).view(READABLE[matrix.tensor.dtype]), matrix.tensor.dtype)
    return [data], (weights.size - int(np.count_nonzero(kept)), fallback, seen)


def _prune(
    plan: PruningPlan, matrix: Matrix, weights: np.ndarray, inputs: BlockInputs
) -> tuple[np.ndarray, int, int]:
    """By what is known of the inputs: the pruned weights, which of FALLBACKS it took, and a CRC-32 of what was known."""
    at, fallback = (matrix.tensor.name, matrix.number), 0
    share, group = plan.shares[matrix.tensor.name], plan.options.group
    squares = inputs.squares(*at)
    if inputs.tokens(*at) < SHRINKAGE_TOKENS:
        squares, fallback = np.ones(weights.shape[1], np.float32), 1
    elif plan.options.method == "sparsegpt":
        from llmcompress.methods import sparsegpt

        solver = inputs.solver(*at)
        if solver.factor is not None:
            return sparsegpt.prune(weights, solver, share, group), 0, zlib.crc32(squares)
        fallback = 2
    weights[wanda.mask(weights, squares, share, group)] = 0
    return weights, fallback, zlib.crc32(squares)


def _report(plan: PruningPlan, files: Files, started: float) -> PruningReport:
    noted = [
        files.written.noted[number]
        for number in range(plan.first_number, plan.first_number + len(plan.matrices))
    ]
    tensors = []
    for name, share in plan.shares.items():
        own = [found for matrix, found in zip(plan.matrices, noted) if matrix.tensor.name == name]
        tensor = plan.checkpoint.index[name]
        fallbacks = {
            words: sum(found[1] == code for found in own) for code, words in enumerate(FALLBACKS) if code
        }
        tensors.append(TensorDensity(
            name, tensor.shape, share, int(sum(found[0] for found in own)), tensor.rows * tensor.columns,
            {words: count for words, count in fallbacks.items() if count},
        ))  # fmt: skip
    index = plan.checkpoint.index
    left = tuple(name for name, tensor in plan.copied.items() if len(tensor.shape) > 1)
    rows = plan.model.rows if plan.model else None
    tokens = rows and {"sha256": rows.sha256, "count": rows.tokens, "sources": list(rows.sources)}
    statistics = hashlib.sha256(repr([found[2] for found in noted]).encode()).hexdigest() if rows else None
    notes = (*plan.notes, *(plan.model.complaints if plan.model else ()), *_fallback_notes(tensors))
    return PruningReport(
        plan.output.folder, plan.options, tuple(tensors), left,
        sum(tensor.rows * tensor.columns for tensor in index.values()), notes, tokens, statistics,
        time.monotonic() - started, files.written.kept,
    )  # fmt: skip


def _fallback_notes(tensors: Sequence[TensorDensity]) -> list[str]:
    return [
        f"{tensor.name}: {count} of its matrices by {words}"
        for tensor in tensors
        for words, count in tensor.fallbacks.items()
    ]
