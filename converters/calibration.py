"""The job of `calibrate`: a checkpoint and texts to a statistics file under the names of GGUF."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from llmcompress.converters.adapter_places import open_with
from llmcompress.converters.families import weight_steps
from llmcompress.converters.model import lockstep_of, read_tokenizer, require_fit

from llmcompress import __version__
from llmcompress.blocks import DEFAULT_HIDDEN_BYTES, Lockstep
from llmcompress.calibrate import GROUP_TOKENS, Calibration, batch_tokens_of, batches_of, calibrate
from llmcompress.calibration_state import CalibrationState
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError
from llmcompress.gguf.imatrix import scarce_notes
from llmcompress.hessians import Places, write_index
from llmcompress.progress import Progress
from llmcompress.stats import Statistics, TensorStats, statistics_suffix
from llmcompress.step import Step
from llmcompress.token_rows import TokenRows, calibration_rows, source_text, window_rows

WINDOWS = ("packed", "llama.cpp")


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on, and how. Fields behind `hidden_ram` do not change the sums beyond rounding."""

    data: tuple[str, ...] = ("default",)
    tokens: int = 2**18
    chunk: int = 512
    seed: int = 0
    windows: str = "packed"  # documents, or "llama.cpp": the text cut as llama-imatrix does
    adapter: str | None = None  # a peft adapter on the model
    device: str = "auto"
    dtype: str = "auto"
    hidden_ram: int = DEFAULT_HIDDEN_BYTES  # bytes of waiting hidden states, more go to disk
    batch_tokens: int | None = None  # run at once; by the model's width
    save_every: int = GROUP_TOKENS  # tokens


@dataclass(frozen=True)
class CalibrationReport:
    """A finished calibration: the sums, and what the user should know."""

    path: Path
    statistics: Statistics
    tokens: int
    resumed: int  # tokens among them whose sums an earlier run left
    dtype: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        counts = {name: stats.tokens.tolist() for name, stats in self.statistics.entries.items()}
        return {
            "path": str(self.path), "tokens": self.tokens, "resumed": self.resumed, "dtype": self.dtype,
            "tokens_of_weights": counts, "notes": list(self.notes),
        }  # fmt: skip


def calibrate_model(
    model: str | Path,
    out: str | Path,
    options: CalibrationOptions,
    progress: Progress,
    hessian: Path | None = None,
) -> CalibrationReport:
    """Calibrate `model` and write the statistics to `out`, a .gguf or .dat that llama.cpp's tools read too.

    With `hessian`, a folder, XᵀX of every weight goes there. Killed, the same call goes on where it stopped.
    Raises LlmcompressError.
    """
    out = Path(out)
    statistics_suffix(out)
    with open_with(model, options.adapter) as checkpoint:
        checkpoint.require_plain()
        steps = weight_steps(checkpoint)
        rows, lockstep = rows_and_model(checkpoint, options)
        for folder in filter(None, (out.parent, hessian)):
            _make(folder)
        fingerprint = _fingerprint(checkpoint, rows, options, lockstep, hessian)
        state = CalibrationState(out.with_name(f"{out.name}.state"), fingerprint, hessian)
        batches = batches_of(rows.rows, options.batch_tokens or batch_tokens_of(lockstep))
        found = calibrate(lockstep, batches, progress, state, options.save_every)
        statistics = _statistics(entries_of(steps, lockstep, found), checkpoint, lockstep, rows)
        statistics.save(out)
        if hessian:
            about = {"datasets": rows.sources, "chunks": len(rows.rows), "model": checkpoint.name}
            write_index(hessian, places_of(steps, lockstep, found.expected), found.sums, about)
        state.finish()
    notes = (*checkpoint.notes, *rows.notes, *found.complaints, *scarce_notes(_counts(statistics)))
    return CalibrationReport(out, statistics, rows.tokens, found.resumed, lockstep.precision, notes)


def rows_and_model(checkpoint: Checkpoint, options: CalibrationOptions) -> tuple[TokenRows, Lockstep]:
    """What to calibrate on, and the model, ready to run. Raises LlmcompressError where they do not fit."""
    rows = rows_of(checkpoint, options)
    lockstep = lockstep_of(checkpoint, options.dtype, options.device, options.hidden_ram)
    require_fit(lockstep.model, rows.rows)
    return rows, lockstep


def rows_of(checkpoint: Checkpoint, options: CalibrationOptions) -> TokenRows:
    """The rows of tokens that `options` ask for, by the checkpoint's own tokenizer."""
    tokenizer = read_tokenizer(checkpoint.directory)
    if options.windows not in WINDOWS:
        raise LlmcompressError(f"--windows {options.windows}: is none of {', '.join(WINDOWS)}")
    if options.windows == "packed":
        return calibration_rows(tokenizer, options.data, options.tokens, options.chunk, options.seed)
    texts = [source_text(tokenizer, source) for source in options.data]
    most = max(1, options.tokens // options.chunk)
    rows = window_rows(tokenizer, "".join(text for text, _ in texts), options.chunk, "llama.cpp", most)
    return replace(
        rows, sources=options.data, notes=(*(note for _, notes in texts for note in notes), *rows.notes)
    )


def _statistics(
    entries: dict[str, TensorStats], checkpoint: Checkpoint, lockstep: Lockstep, rows: TokenRows
) -> Statistics:
    return Statistics(
        entries,
        rows.sources,
        len(rows.rows),
        rows.chunk,
        {
            "calibration.tokens_sha256": rows.sha256,
            "calibration.tokens": str(rows.tokens),
            "calibration.dtype": lockstep.precision,
            "calibration.model": checkpoint.name,
            "version": __version__,
        },
    )


def places_of(steps: Sequence[Step], lockstep: Lockstep, expected: Mapping[str, int]) -> dict[str, Places]:
    """For every step whose weights are multiplied with inputs, by name: of each of its matrices, the model's parameter
    and the matrix in it. `expected` has the stacked matrices of every such parameter.

    Left out are steps whose inputs are not those of the model's own product: of columns in another order, and heads that
    llama.cpp multiplies with one by one (MLA's). Whoever wants their statistics hears that there are none.
    """
    places = {}
    for step in steps:
        targets = [lockstep.weights.targets.get(piece.tensor.name) for piece in step.pieces]
        if len(step.shape) < 2 or any(not target or target.parameter not in expected for target in targets):
            continue
        if len(set(targets)) == 1:  # one weight, or experts that the checkpoint has stacked already
            name = targets[0].parameter
            found = [(name, matrix) for matrix in range(expected[name])]
        else:
            found = [(target.parameter, target.matrix) for target in targets]
        if len(found) == math.prod(step.shape[:-2]) and not step.operation.moves_columns:
            places[step.name] = found
    return places


def entries_of(steps: Sequence[Step], lockstep: Lockstep, found: Calibration) -> dict[str, TensorStats]:
    """Sums by parameter of the model to sums by tensor of its GGUF, experts in the order of the step.

    A weight that got no data has zeros.
    """
    columns = {step.name: step.columns for step in steps}
    entries = {}
    for name, places in places_of(steps, lockstep, found.expected).items():
        parts = [(found.sums.get(parameter), matrix) for parameter, matrix in places]
        entries[name] = TensorStats(
            np.array([sums.tokens[matrix] if sums else 0 for sums, matrix in parts]),
            np.stack([sums.squares[matrix] if sums else np.zeros(columns[name]) for sums, matrix in parts]),
        )
    return entries


def _counts(statistics: Statistics) -> dict[str, np.ndarray]:
    return {name: stats.tokens for name, stats in statistics.entries.items()}


def _fingerprint(
    checkpoint: Checkpoint,
    rows: TokenRows,
    options: CalibrationOptions,
    lockstep: Lockstep,
    hessian: Path | None,
) -> str:
    parts = (checkpoint.fingerprint(), rows.sha256, lockstep.precision, options.batch_tokens,
             options.save_every, options.device, str(hessian and hessian.resolve()))  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmcompressError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
