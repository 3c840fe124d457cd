"""The job of `evaluate`: an artefact, whatever its format, against the model it was made from."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.model import (
    is_quantized,
    loaded_by_transformers,
    lockstep_of,
    read_tokenizer,
    whole_model,
)

from llmcompress.blocks import DEFAULT_HIDDEN_BYTES, Lockstep
from llmcompress.calibrate import BATCH_TOKENS, batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.compute import DTYPES, compute_device
from llmcompress.errors import LlmcompressError, nearest
from llmcompress.evaluate import WINDOWS, Evaluation, evaluate, evaluate_against
from llmcompress.logits_file import LogitsReader, LogitsWriter
from llmcompress.progress import Progress
from llmcompress.token_rows import TokenRows, source_text, window_rows
from llmcompress.token_stream import Tokenise


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


@dataclass(frozen=True)
class EvaluationReport:
    """Figures, the growth of the hidden states' error, scores of tasks, and what the user should know."""

    evaluation: Evaluation
    windows: str
    chunk: int
    tokens: int
    tasks: dict[str, Any]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        found = self.evaluation
        return {
            "windows": self.windows,
            "chunk": self.chunk,
            "tokens": self.tokens,
            "figures": {name: asdict(estimate) for name, estimate in found.figures.items()},
            "hidden_errors": found.hidden_errors,
            "tasks": self.tasks,
            "notes": list(self.notes),
        }


def evaluate_model(
    artefact: str, reference: str | None, options: EvaluationOptions, progress: Progress
) -> EvaluationReport:
    """Evaluate a GGUF file, or a checkpoint that transformers loads, against the model `reference`.

    Without a reference a checkpoint gets its perplexity alone. A GGUF needs one: for the config and the tokenizer.
    Raises LlmcompressError.
    """
    if options.windows not in WINDOWS:
        raise LlmcompressError(
            f"--windows {options.windows}: is none of {', '.join(WINDOWS)}{nearest(options.windows, WINDOWS)}"
        )
    if options.dtype not in DTYPES:
        raise LlmcompressError(f"--dtype {options.dtype}: is none of {', '.join(DTYPES)}")
    is_gguf = Path(artefact).suffix == ".gguf"
    if is_gguf and reference is None:
        raise LlmcompressError(
            f"{artefact}: give --reference, the model it was made from: its config is needed"
        )
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Checkpoint.open(reference)) if reference else None
        held = stack.enter_context(
            DecodedGGUF.open(artefact, model) if is_gguf else Checkpoint.open(artefact)
        )
        base = stack.enter_context(LogitsReader(options.base)) if options.base else None
        tokenizer = read_tokenizer((model or held).directory)
        rows, windows = _rows(tokenizer, options, base)
        batches = batches_of(rows.rows, max(options.chunk, BATCH_TOKENS))
        runner = _runner(held, options)
        if base:
            found = evaluate_against(runner, base, batches, progress)
        else:
            save = _writer(options, rows, runner)
            with save or contextlib.nullcontext():
                beside = _runner(model, options) if model else None
                found = evaluate(runner, beside, batches, windows, progress, save)
        tasks = _tasks(held, tokenizer, options) if options.tasks else {}
        notes = (*rows.notes, *(held.notes if is_gguf else ()))
        return EvaluationReport(found, windows, rows.chunk, rows.tokens, tasks, notes)


def _rows(tokenizer: Any, options: EvaluationOptions, base: LogitsReader | None) -> tuple[TokenRows, str]:
    """Windows of the text, or those of a file of logits, which are in llama.cpp's style."""
    if base:
        rows = tuple(base.tokens.astype("int64"))
        for row in rows:  # the file has the text's own first tokens
            row[:1] = Tokenise(tokenizer).start[:1] or row[:1]
        return TokenRows(
            rows, base.n_ctx, (), "", (f"text and windows are those of {base.path}",)
        ), "llama.cpp"
    texts = [source_text(tokenizer, source) for source in options.data]
    text = "\n\n".join(text for text, _ in texts) if len(texts) > 1 else texts[0][0]
    rows = window_rows(tokenizer, text, options.chunk, options.windows)
    kept = [row for row in rows.rows if len(row) > 1]
    if options.tokens:
        kept = kept[: max(1, options.tokens // options.chunk)]
    notes = (*(note for _, found in texts for note in found), *rows.notes)
    if options.data == ("default",):
        notes += (
            "no --data: this is the bundled calibration text, on which a calibrated artefact looks its best",
        )
    return TokenRows(tuple(kept), rows.chunk, options.data, rows.sha256, notes), options.windows


def _runner(checkpoint: Checkpoint | DecodedGGUF, options: EvaluationOptions) -> Lockstep:
    if isinstance(checkpoint, Checkpoint) and is_quantized(checkpoint.config):
        return loaded_by_transformers(
            checkpoint.directory, DTYPES[options.dtype], compute_device(options.device)
        )
    return lockstep_of(checkpoint, options.dtype, options.device, options.hidden_ram)


def _writer(options: EvaluationOptions, rows: TokenRows, runner: Lockstep) -> LogitsWriter | None:
    if not options.save_logits:
        return None
    if options.windows != "llama.cpp":
        raise LlmcompressError(
            "--save-logits: llama.cpp's file holds its own windows; add --windows llama.cpp"
        )
    return LogitsWriter(options.save_logits, rows.rows, runner.model.config.vocab_size, rows.chunk)


def _tasks(
    checkpoint: Checkpoint | DecodedGGUF, tokenizer: Any, options: EvaluationOptions
) -> dict[str, Any]:
    """Scores by lm-evaluation-harness, which loads tasks and runs the artefact, in memory as a whole."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise LlmcompressError(
            "--tasks: lm-evaluation-harness is not installed; pip install lm_eval"
        ) from None
    device = compute_device(options.device)
    if isinstance(checkpoint, Checkpoint) and is_quantized(checkpoint.config):
        model = loaded_by_transformers(checkpoint.directory, DTYPES[options.dtype], device).model
    else:
        model = whole_model(checkpoint, DTYPES[options.dtype], device)
    with torch.no_grad():
        scores = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(options.tasks)
        )
    return _numbers(scores["results"])


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {key: value for key, value in scores.items() if isinstance(value, (int, float, str))}
        for task, scores in results.items()
    }
