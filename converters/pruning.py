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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llmcompress.converters.matrices import Matrix, matrices_of
from llmcompress.converters.sparsity_shares import measured_shares

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint
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
from llmcompress.errors import PlanError
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS
from llmcompress.grids.floats import to_float32
from llmcompress.machine import cores
from llmcompress.methods import magnitude, wanda
from llmcompress.output import filled_path
from llmcompress.plan import FIXED_RAM
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions
from llmcompress.pruning_report import MANIFEST, PruningReport, TensorDensity
from llmcompress.safetensors_files import Entry, lay_out
from llmcompress.sizes import format_size
from llmcompress.tensor_info import TensorInfo
from llmcompress.whole_file import require_free_place
from llmcompress.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from llmcompress.converters.sequential import BlockInputs, SequentialInputs

BYTES_PER_WEIGHT = 24  # of a matrix under way
BYTES_OF_SOLVERS = 36  # for each element of XᵀX: two that are kept, and one in the making
# What was done in place of the method.
FALLBACKS = ("", "magnitude of each row, for too few tokens", "wanda, for H has no Cholesky factor")


@dataclass(frozen=True)
class PruningPlan:
    """Everything a run needs. `model`: what runs it, where the method looks at inputs. `shares`: of the weights of each
    of `matrices`, how many go; known when the job runs, for they may be measured."""

    checkpoint: PartlyPruned
    options: PruningOptions
    matrices: tuple[Matrix, ...]
    output: CheckpointOutput
    model: SequentialInputs | None
    notes: tuple[str, ...]
    shares: tuple[float, ...] = ()

    @cached_property
    def copied(self) -> dict[str, TensorInfo]:
        pruned = {matrix.tensor.name for matrix in self.matrices}
        return {name: tensor for name, tensor in self.checkpoint.index.items() if name not in pruned}

    @cached_property
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
    matrices = tuple(
        matrix for matrix in candidates if options.share_of(matrix.tensor.name, options.share) > 0
    )
    if not matrices:
        raise PlanError(f"{checkpoint.directory}: nothing is left to prune; raise --sparsity, or --keep less")
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
    return PruningPlan(checkpoint, options, matrices, output, live, tuple(notes))


def run_pruning(plan: PruningPlan, progress: Progress = Progress()) -> PruningReport:
    """Carry out `plan`; the folder has its name when it is whole. Raises LlmcompressError as `write_checkpoint` does."""
    started, report = time.monotonic(), []
    copied = list(copies(plan.checkpoint, plan.copied))
    total = sum(tensor.nbytes for tensor in plan.checkpoint.index.values())

    def manifest(files: Files) -> Iterator[tuple[str, bytes]]:
        report.append(_report(plan, files, started))
        yield MANIFEST, (json.dumps(report[0].as_dict(), indent=1) + "\n").encode()

    with plan.checkpoint:
        plan = replace(plan, shares=measured_shares(plan, progress))
        write_checkpoint(plan.output, copied, total, progress, manifest, then=partial(_stages, plan))
    return report[0]


def prune_model(
    model: str | Path, out: str | Path, options: PruningOptions, progress: Progress = Progress()
) -> PruningReport:
    """Prune `model` into the folder `out`. Killed, the same call goes on where it stopped. Raises LlmcompressError."""
    return run_pruning(plan_pruning(model, out, options), progress)


def _model(checkpoint: Checkpoint, options: PruningOptions) -> SequentialInputs:
    from llmcompress.converters.sequential import CalibrationOptions, SequentialInputs

    given = CalibrationOptions(
        data=options.data, tokens=options.tokens, chunk=options.chunk, seed=options.seed, device=options.device,
        dtype=options.dtype, hidden_ram=options.hidden_ram, batch_tokens=options.batch_tokens,
    )  # fmt: skip
    return SequentialInputs(checkpoint, given, products=options.of_products)


def _check_groups(matrices: Sequence[Matrix], options: PruningOptions) -> None:
    for matrix in matrices if options.group else ():
        if matrix.inputs % options.group.group:
            raise PlanError(
                f"--pattern {options.group}: {matrix.tensor.name} has {matrix.inputs} inputs, no multiple of "
                f"{options.group.group}; leave it out with --keep, or choose another pattern"
            )


def _workers(matrices: Sequence[Matrix], options: PruningOptions, live: SequentialInputs | None) -> int:
    """As many as fit. Raises PlanError where not even one does."""
    workers = options.threads or cores()
    if options.max_ram is None:
        return workers
    largest = BYTES_PER_WEIGHT * max(matrix.weights for matrix in matrices)
    fixed = FIXED_RAM + (live.ram if live else 0)
    if options.of_products:
        fixed += BYTES_OF_SOLVERS * max(matrix.inputs for matrix in matrices) ** 2
    if fixed + largest > options.max_ram:
        raise PlanError(
            f"--max-ram {format_size(options.max_ram)} is too little: this job needs {format_size(fixed + largest)}, "
            "with one block's weights and hidden states of --hidden-ram"
        )
    return min(workers, (options.max_ram - fixed) // largest)


def _stages(plan: PruningPlan, files: Files) -> Iterator[Sequence[Work]]:
    """The matrices, block by block where the method looks at inputs."""
    every = range(len(plan.matrices))
    if plan.model is None:
        yield [_work(plan, at, None) for at in every]
        return
    plan.checkpoint.files_made = files
    plan.model.start()
    for block in range(plan.model.blocks):
        own, inputs = [at for at in every if plan.matrices[at].block == block], None
        works = [_work(plan, at, None) for at in own]
        if any(files.kept(work) is None for work in works):
            inputs = plan.model.inputs(block)
            works = [_work(plan, at, inputs) for at in own]
        yield works
        if inputs:
            inputs.release()
        plan.checkpoint.rewritten |= {plan.matrices[at].tensor.name for at in own}
        if block + 1 < plan.model.blocks:
            plan.model.go_on(block)


def _work(plan: PruningPlan, at: int, inputs: BlockInputs | None) -> Work:
    place = plan.matrices[at].place
    return Work(plan.first_number + at, (place,), partial(_make, plan, at, inputs), place.size)


def _make(
    plan: PruningPlan, at: int, inputs: BlockInputs | None
) -> tuple[list[np.ndarray], tuple[float, ...]]:
    """A pruned matrix; and its zeros, which of FALLBACKS it took, and the CRC-32 of what was known of its inputs."""
    matrix, share, group = plan.matrices[at], plan.shares[at], plan.options.group
    weights = matrix.read(plan.checkpoint.base)
    if inputs is None:
        weights[magnitude.mask(weights, share, group)] = 0
        fallback = seen = 0
    else:
        weights, fallback, seen = _prune(plan, at, weights, inputs)
    data = matrix.stored(weights)
    return [data], (
        weights.size - int(np.count_nonzero(to_float32(data, matrix.tensor.dtype))),
        fallback,
        seen,
    )


def _prune(
    plan: PruningPlan, at: int, weights: np.ndarray, inputs: BlockInputs
) -> tuple[np.ndarray, int, int]:
    """By what is known of the inputs: the pruned weights, which of FALLBACKS it took, and a CRC-32 of what was known."""
    matrix, share, group, fallback = plan.matrices[at], plan.shares[at], plan.options.group, 0
    known = matrix.tensor.name, matrix.number
    squares, products = inputs.squares(*known), None
    if inputs.tokens(*known) < SHRINKAGE_TOKENS:
        squares, fallback = np.ones(weights.shape[1], np.float32), 1
    elif plan.options.method == "wanda":
        products = inputs.products(*known)
    else:
        from llmcompress.methods import sparsegpt

        solver = inputs.solver(*known)
        if solver.factor is not None:
            return sparsegpt.prune(weights, solver, share, group, plan.options.effort), 0, zlib.crc32(squares)
        fallback = 2
    left = wanda.prune(weights, squares, products, share, group, plan.options.effort, plan.options.by_score)
    return left, fallback, zlib.crc32(squares)


def _report(plan: PruningPlan, files: Files, started: float) -> PruningReport:
    own: dict[str, list[tuple[float, ...]]] = {}
    for at, (matrix, share) in enumerate(zip(plan.matrices, plan.shares)):
        noted = files.written.noted[plan.first_number + at]
        own.setdefault(matrix.tensor.name, []).append((share, *noted))
    tensors = tuple(_density(plan.checkpoint.index[name], found) for name, found in own.items())
    weights = sum(tensor.rows * tensor.columns for tensor in plan.checkpoint.index.values())
    left = tuple(name for name, tensor in plan.copied.items() if len(tensor.shape) > 1)
    rows = plan.model.rows if plan.model else None
    tokens = rows and {"sha256": rows.sha256, "count": rows.tokens, "sources": list(rows.sources)}
    seen = repr({name: [crc for *_, crc in found] for name, found in own.items()})
    notes = (*plan.notes, *(plan.model.complaints if plan.model else ()), *_fallback_notes(tensors))
    return PruningReport(
        plan.output.folder, plan.options, tensors, left, weights, notes, tokens,
        hashlib.sha256(seen.encode()).hexdigest() if rows else None, time.monotonic() - started, files.written.kept,
    )  # fmt: skip


def _density(tensor: TensorInfo, found: Sequence[tuple[float, ...]]) -> TensorDensity:
    """Of one tensor, from the share, the zeros and the fallback of each of its matrices."""
    shares, zeros, fallbacks, _ = zip(*found)
    counts = Counter(FALLBACKS[int(code)] for code in fallbacks if code)
    asked = sum(shares) / len(shares)
    return TensorDensity(
        tensor.name, tensor.shape, asked, int(sum(zeros)), tensor.rows * tensor.columns, dict(counts)
    )


def _fallback_notes(tensors: Sequence[TensorDensity]) -> list[str]:
    return [
        f"{tensor.name}: {count} of its matrices by {words}"
        for tensor in tensors
        for words, count in tensor.fallbacks.items()
    ]
