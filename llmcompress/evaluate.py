"""An artefact beside its reference: both models go through the same text together, block by block.

Neither model is in memory whole, and no logits are kept: a batch's two sets of logits meet once and become a few
numbers for each token (see divergence.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmcompress.blocks import Lockstep
from llmcompress.divergence import Divergence, Estimate, Perplexity
from llmcompress.errors import RunError
from llmcompress.logits_file import LogitsReader, LogitsWriter, scored_positions
from llmcompress.progress import Progress

WINDOWS = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class Evaluation:
    """Figures by name with their standard errors, and the error of the hidden states behind every block:
    √(Σ(artefact − reference)² / Σ reference²), by the block's name; empty without a reference to run."""

    figures: dict[str, Estimate]
    hidden_errors: dict[str, float]


def scored(length: int, windows: str) -> slice:
    """The positions of a window of `length` tokens whose predictions count.

    transformers: all but the last, as its perplexity guide has it where windows do not overlap. llama.cpp: the second
    half's, so that every prediction has at least half a window before it (`tools/perplexity`).
    """
    if windows == "llama.cpp":
        positions = scored_positions(length)
        return slice(positions.start, positions.stop)
    return slice(0, length - 1)


@torch.no_grad()
def evaluate(
    artefact: Lockstep,
    reference: Lockstep | None,
    batches: Sequence[torch.Tensor],
    windows: str,
    progress: Progress,
    save: LogitsWriter | None = None,
) -> Evaluation:
    """Run `batches`, int64 (rows, tokens), through both models, or through one for its perplexity alone.

    `save` gets the reference's logits (the artefact's, where it is alone) of the scored positions, row by row.
    Raises RunError where the models have different blocks or vocabularies.
    """
    models = [model for model in (reference, artefact) if model is not None]
    if reference and len(reference.blocks) != len(artefact.blocks):
        raise RunError(
            f"the artefact has {len(artefact.blocks)} blocks, its reference {len(reference.blocks)}: not of one model"
        )
    errors = {}

    def compare(block: str) -> None:
        if reference:
            errors[block] = _hidden_error(reference, artefact, len(batches))

    _through_blocks(models, batches, progress, compare)
    found = Divergence() if reference else Perplexity()
    for batch, *logits in zip(batches, *(model.finish() for model in models)):
        for row in range(len(batch)):
            at = scored(batch.shape[1], windows)
            both = [each[row, at] for each in logits]
            targets = batch[row, at.start + 1 : at.stop + 1].to(both[0].device)
            if both[0].shape != both[-1].shape:
                raise RunError(
                    f"vocabularies of {both[0].shape[1]} and {both[-1].shape[1]}: not of one model"
                )
            found.add(*both, targets)
            if save:
                save.add(both[0].float().cpu().numpy())
    return Evaluation(found.summary(), errors)


@torch.no_grad()
def evaluate_against(
    artefact: Lockstep, base: LogitsReader, batches: Sequence[torch.Tensor], progress: Progress
) -> Evaluation:
    """The artefact against a file of a reference's log-probabilities, on `batches` of the file's own chunks."""
    _through_blocks([artefact], batches, progress, lambda block: None)
    found = Divergence()
    at = scored(base.n_ctx, "llama.cpp")
    chunks = iter(range(len(base.tokens)))
    for logits in artefact.finish():
        for row, chunk in zip(logits, chunks):
            targets = torch.from_numpy(base.targets(chunk).astype("int64"))
            found.add_log_probs(torch.from_numpy(base.log_probs(chunk)), row[at].cpu(), targets)
    return Evaluation(found.summary(), {})


def _through_blocks(
    models: Sequence[Lockstep],
    batches: Sequence[torch.Tensor],
    progress: Progress,
    after: Callable[[str], None],
) -> None:
    """Take the batches to the end of all blocks, each model's next block in turn."""
    tokens = sum(batch.numel() for batch in batches)
    progress.start("evaluate", tokens * len(models[-1].blocks), "tokens x blocks")
    for model in models:
        model.start(batches)
    for block, name in enumerate(models[-1].blocks):
        for model in models:
            with model.loaded(block):
                model.through(block)
        after(name)
        progress.advance(tokens)


def _hidden_error(reference: Lockstep, artefact: Lockstep, batches: int) -> float:
    difference = size = 0.0
    for batch in range(batches):
        wanted, got = reference.hidden(batch).float(), artefact.hidden(batch).float()
        difference += float((got - wanted).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
    return math.sqrt(difference / size) if size else 0.0
