"""The job of `evaluate`: an artefact, whatever its format, against the model it was made from."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from llmcompress.converters.adapter_places import open_with
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.harness import Harness
from llmcompress.converters.model import (
    is_quantized,
    lockstep_of,
    read_tokenizer,
    require_fit,
    transformers_model,
    whole_model,
)

from llmcompress import __version__
from llmcompress.block_weights import WholeWeights
from llmcompress.blocks import DEFAULT_HIDDEN_BYTES, Lockstep
from llmcompress.calibrate import BATCH_TOKENS, batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.compute import DTYPES, compute_device
from llmcompress.errors import LlmcompressError, nearest
from llmcompress.evaluate import WINDOWS, Evaluation, evaluate, evaluate_against, vocabulary
from llmcompress.logits_file import LogitsReader, LogitsWriter
from llmcompress.progress import Progress
from llmcompress.text_sources import weighed_sources
from llmcompress.token_rows import source_text, window_rows
from llmcompress.token_stream import Tokenise

LOGITS_BYTES = 2**28  # of a batch, for each model, if one row does not take more


@dataclass(frozen=True)
class EvaluationOptions:
    """The text and how it is cut, and what to run the models with."""

    data: tuple[str, ...] = ("default",)
    tokens: int | None = None  # at most so many, all by default
    chunk: int = 512
    windows: str = "transformers"
    device: str = "auto"
    dtype: str = "f32"
    hidden_ram: int = DEFAULT_HIDDEN_BYTES
    save_logits: str | None = None
    base: str | None = None  # a reference's logits in llama.cpp's file, in place of the reference
    tasks: tuple[str, ...] = ()
    adapter: str | None = None  # of the reference, or where there is none, of the artefact
    tasks_path: str | None = None  # a folder of tasks, in place of lm-evaluation-harness's own

    def check(self) -> None:
        """Raises LlmcompressError for what does not go together."""
        if self.windows not in WINDOWS:
            known = f"{', '.join(WINDOWS)}{nearest(self.windows, WINDOWS)}"
            raise LlmcompressError(f"--windows {self.windows}: is none of {known}")
        if self.dtype not in DTYPES:
            known = f"{', '.join(DTYPES)}{nearest(self.dtype, DTYPES)}"
            raise LlmcompressError(f"--dtype {self.dtype}: is none of {known}")
        if self.windows == "llama.cpp" and self.chunk < 3:
            raise LlmcompressError(f"--chunk {self.chunk}: llama.cpp's windows predict a token from 3 on")
        if self.base and (self.save_logits or self.data != EvaluationOptions.data):
            other = "--save-logits" if self.save_logits else "--data"
            raise LlmcompressError(
                f"{other}: not with --kl-divergence-base, whose file has its own text and logits"
            )
        if self.save_logits and self.windows != "llama.cpp":
            raise LlmcompressError(
                "--save-logits: such a file holds llama.cpp's windows; add --windows llama.cpp"
            )
        if self.tasks_path and not self.tasks:
            raise LlmcompressError(f"--tasks-path {self.tasks_path}: name its tasks with --tasks")


@dataclass(frozen=True)
class Windows:
    """Rows of tokens, int64 (at most `chunk`,), cut in the style of transformers or llama.cpp."""

    rows: tuple[np.ndarray, ...]
    chunk: int
    style: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """Figures, the growth of the hidden states' error, and what the user should know.

    tasks: scores of the artefact by task; reference_tasks: the reference's, where it was run.
    """

    artefact: str
    reference: str | None  # a model, or a file of its logits
    options: EvaluationOptions
    windows: Windows
    evaluation: Evaluation
    tasks: dict[str, dict[str, float]]
    reference_tasks: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        found = self.evaluation
        return {
            "version": __version__,
            "artefact": self.artefact,
            "reference": self.reference,
            "data": [] if self.options.base else list(self.options.data),
            "windows": self.windows.style,
            "chunk": self.windows.chunk,
            "tokens": sum(map(len, self.windows.rows)),
            "dtype": self.options.dtype,
            "figures": {name: asdict(estimate) for name, estimate in found.figures.items()},
            "hidden_errors": found.hidden_errors,
            "tasks": self.tasks,
            "reference_tasks": self.reference_tasks,
            "notes": list(self.notes),
        }


def evaluate_model(
    artefact: str, reference: str | None, options: EvaluationOptions, progress: Progress
) -> EvaluationReport:
    """Evaluate a GGUF file, or a checkpoint that transformers loads, against the model `reference`.

    Without a reference a checkpoint gets its perplexity alone. A GGUF needs one: for the config and the tokenizer.
    Raises LlmcompressError.
    """
    options.check()
    is_gguf = Path(artefact).is_file() or Path(artefact).suffix == ".gguf"  # checkpoints are folders
    if is_gguf and reference is None:
        raise LlmcompressError(
            f"{artefact}: give --reference, the model it was made from: its config is needed"
        )
    if reference and Path(reference).is_file():
        raise LlmcompressError(
            f"--reference {reference}: a file; give the Hugging Face model's folder or hub id"
        )
    harness = Harness(options.tasks, options.tasks_path) if options.tasks else None
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_with(reference, options.adapter)) if reference else None
        held = stack.enter_context(
            DecodedGGUF.open(artefact, model)
            if is_gguf
            else open_with(artefact, None if reference else options.adapter)
        )
        base = stack.enter_context(LogitsReader(options.base)) if options.base else None
        tokenizer = read_tokenizer((model or held).directory)
        windows = _windows_of_file(tokenizer, base, options) if base else windows_of(tokenizer, options)
        beside = None if base else model
        found = _evaluate(held, beside, base, windows, options, progress)
        tasks = _tasks(harness, held, tokenizer, options)
        reference_tasks = _tasks(harness, beside, tokenizer, options)
        notes = (*windows.notes, *held.notes)
    of = options.base or reference
    return EvaluationReport(artefact, of, options, windows, found, tasks, reference_tasks, notes)


def _evaluate(
    held: Checkpoint | DecodedGGUF, model: Checkpoint | None, base: LogitsReader | None, windows: Windows,
    options: EvaluationOptions, progress: Progress,
) -> Evaluation:  # fmt: skip
    hidden_ram = options.hidden_ram // (2 if model else 1)
    runner = _runner(held, options, hidden_ram)
    require_fit(runner.model, windows.rows)
    batches = batches_of(windows.rows, min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary(runner))))
    if base:
        return evaluate_against(runner, base, batches, progress)
    reference = _runner(model, options, hidden_ram) if model else None
    save = None
    if options.save_logits:
        save = LogitsWriter(options.save_logits, windows.rows, vocabulary(runner), windows.chunk)
    with save or contextlib.nullcontext():
        return evaluate(runner, reference, batches, windows.style, progress, save)


def windows_of(tokenizer: transformers.PreTrainedTokenizerBase, options: EvaluationOptions) -> Windows:
    """The text of the options, cut as they say. Raises LlmcompressError."""
    for source in options.data:
        if not math.isclose(sum(weighed_sources([source]).values()), 1):
            raise LlmcompressError(f"--data {source}: texts are evaluated whole; leave the weight out")
    texts = [source_text(tokenizer, source) for source in options.data]
    found = window_rows(tokenizer, "\n\n".join(text for text, _ in texts), options.chunk, options.windows)
    notes = (*(note for _, refused in texts for note in refused), *found.notes)
    if options.data == EvaluationOptions.data:
        notes += (
            "no --data: this is the bundled calibration text, on which a calibrated artefact looks its best",
        )
    rows = _at_most(options.tokens, found.rows, options.windows)
    return Windows(rows, options.chunk, options.windows, notes)


def _windows_of_file(
    tokenizer: transformers.PreTrainedTokenizerBase, base: LogitsReader, options: EvaluationOptions
) -> Windows:
    """The chunks of a file of logits, with BOS where llama.cpp puts it: the file has the text's own first tokens."""
    tokens = base.tokens.astype(np.int64)
    tokens[:, :1] = Tokenise(tokenizer).start[:1] or tokens[:, :1]
    rows = _at_most(options.tokens, tuple(tokens), "llama.cpp")
    return Windows(rows, base.n_ctx, "llama.cpp", (f"text and windows are those of {base.path}",))


def _at_most(tokens: int | None, rows: tuple[np.ndarray, ...], style: str) -> tuple[np.ndarray, ...]:
    """The first `tokens` tokens of `rows`, without a row of one, which predicts nothing; llama.cpp's rows stay whole."""
    left = held = sum(map(len, rows)) if tokens is None else tokens
    kept = []
    for row in rows:
        part = row[:left]
        left -= len(part)
        if len(part) >= (len(row) if style == "llama.cpp" else 2):
            kept.append(part)
    if not kept:
        least = len(rows[0]) if style == "llama.cpp" else 2
        raise LlmcompressError(
            f"{held} tokens: a window in the style of {style} needs {least}; give more --tokens or more text"
        )
    return tuple(kept)


def _runner(checkpoint: Checkpoint | DecodedGGUF, options: EvaluationOptions, hidden_ram: int) -> Lockstep:
    if _is_quantized(checkpoint):
        model = _whole(checkpoint, options)
        return Lockstep(model, WholeWeights(), model.device, hidden_ram)
    return lockstep_of(checkpoint, options.dtype, options.device, hidden_ram)


def _whole(checkpoint: Checkpoint | DecodedGGUF, options: EvaluationOptions) -> transformers.PreTrainedModel:
    load = transformers_model if _is_quantized(checkpoint) else whole_model
    return load(checkpoint, DTYPES[options.dtype], compute_device(options.device))


def _tasks(
    harness: Harness | None, checkpoint: Checkpoint | DecodedGGUF | None, tokenizer: transformers.PreTrainedTokenizerBase,
    options: EvaluationOptions,
) -> dict[str, dict[str, float]]:  # fmt: skip
    if not harness or not checkpoint:
        return {}
    return harness.scores(_whole(checkpoint, options), tokenizer)


def _is_quantized(checkpoint: Checkpoint | DecodedGGUF) -> bool:
    return isinstance(checkpoint, Checkpoint) and is_quantized(checkpoint.config)
