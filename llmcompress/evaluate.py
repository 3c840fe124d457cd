"""An artefact beside its reference: both models go through the same text together, block by block.

Neither model is in memory whole, and no logits are kept: a batch's two sets of logits meet once and become a few
numbers for each token (see divergence.py).
"""

from __future__ import annotations

import contextlib
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


def vocabulary(model: Lockstep) -> int:
    """How many logits a position has."""
    return model.model.config.get_text_config().vocab_size


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
    Without a reference of as many blocks, and as wide ones, there are no errors of hidden states. Raises RunError where the models have
    different vocabularies, and for what is not finite.
    """
    models = [model for model in (reference, artefact) if model is not None]
    if reference:
        _check_same("tokens in its vocabulary", vocabulary(artefact), vocabulary(reference))
    errors, alike = {}, reference and _shape(reference) == _shape(artefact)

    def compare(block: int) -> None:
        if alike:
            name = artefact.blocks[block]
            errors[name] = _hidden_error(name, reference, artefact, len(batches))

    _through_blocks(models, batches, progress, compare)
    found = Divergence() if reference else Perplexity()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(model.finish())) for model in models]
        for batch in batches:
            logits = [next(stream) for stream in streams]
            at = scored(batch.shape[1], windows)
            for row, tokens in enumerate(batch):
                found.add(*(each[row, at] for each in logits), tokens[_targets(at)].to(logits[0].device))
                if save:
                    save.add(logits[0][row, at].float().cpu().numpy())
            del logits  # or they would still be there while the next are computed
    return Evaluation(found.summary(), errors)


@torch.no_grad()
def evaluate_against(
    artefact: Lockstep, base: LogitsReader, batches: Sequence[torch.Tensor], progress: Progress
) -> Evaluation:
    """The artefact against a file of a reference's log-probabilities, on `batches` of the file's first chunks.

    Raises RunError where the vocabularies differ.
    """
    _check_same("tokens in its vocabulary", vocabulary(artefact), base.n_vocab)
    _through_blocks([artefact], batches, progress, lambda block: None)
    found = Divergence()
    at = scored(base.n_ctx, "llama.cpp")
    chunk = 0
    for logits in artefact.finish():
        for row in logits:
            targets = torch.from_numpy(base.targets(chunk).astype("int64"))
            found.add_log_probs(torch.from_numpy(base.log_probs(chunk)), row[at].cpu(), targets)
            chunk += 1
        del logits, row
    return Evaluation(found.summary(), {})


def _check_same(what: str, artefact: int, reference: int) -> None:
    if artefact != reference:
        raise RunError(
            f"the artefact has {artefact} {what}, its reference {reference}; give the model it was made from"
        )


def _shape(model: Lockstep) -> tuple[int, int]:
    """How many blocks a model has, and how wide its hidden states are."""
    return len(model.blocks), model.model.config.get_text_config().hidden_size


def _targets(at: slice) -> slice:
    """The tokens that the positions `at` predict."""
    return slice(at.start + 1, at.stop + 1)


def _through_blocks(
    models: Sequence[Lockstep],
    batches: Sequence[torch.Tensor],
    progress: Progress,
    after: Callable[[int], None],
) -> None:
    """Take the batches to the end of all blocks, each model's next block in turn."""
    tokens = sum(batch.numel() for batch in batches)
    most = max(len(model.blocks) for model in models)
    progress.start("evaluate", tokens * most, "tokens x blocks")
    for model in models:
        model.start(batches)
    for block in range(most):
        for model in models:
            if block < len(model.blocks):
                with model.loaded(block):
                    model.through(block)
        after(block)
        progress.advance(tokens)


def _hidden_error(block: str, reference: Lockstep, artefact: Lockstep, batches: int) -> float:
    difference = size = 0.0
    for batch in range(batches):
        wanted, got = reference.hidden(batch).float(), artefact.hidden(batch).float()
        difference += float((got - wanted).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
    if not math.isfinite(difference + size):
        whose = "artefact" if math.isfinite(size) else "reference"
        raise RunError(f"{block}: its output in the {whose} holds a NaN or infinity; is --dtype f32 finite?")
    return math.sqrt(difference / size) if size else 0.0
