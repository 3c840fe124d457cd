"""Which decoder layers a model misses least: by block influence, or by what the model loses without them.

Block influence (ShortGPT, arXiv:2403.03853) is one minus the mean cosine of what goes into a block and what comes out: low
where a block hardly turns the hidden states. It takes one run. What is lost is what is wanted itself, measured for every layer left out: the nats for
each token of the text that is read, or the mean KL of the next token's distribution from the whole model's. One run measures all: the model's own batches go through the blocks,
and in front of every block copies of them branch off that leave it out and take all that follow. So a block's weights
are read once, and what lies before a candidate is computed once. Dropping several is a greedy search, a run for each.

What is lost differs much from text to text. So figures are kept by row of tokens, and the difference of two layers has the
standard error of the rows' differences (`tied`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from llmcompress.blocks import Lockstep
from llmcompress.divergence import Divergence, Estimate, TokenFigures
from llmcompress.evaluate import scored
from llmcompress.progress import Progress

LOSSES: dict[str, Callable[[TokenFigures], np.ndarray]] = {
    "loss": lambda tokens: tokens.nll - tokens.reference_nll,
    "kl": lambda tokens: tokens.kl,
}
TIED = 2  # standard errors, by which the best has to lead


@torch.no_grad()
def influence(model: Lockstep, batches: Sequence[torch.Tensor], progress: Progress) -> list[float]:
    """1 - mean cosine, of each block. batches: int64 (rows, tokens)."""
    tokens = sum(batch.numel() for batch in batches)
    progress.start("influence", tokens * len(model.blocks), "tokens x blocks")
    model.start(batches)
    found = []
    for block in range(len(model.blocks)):
        before, cosines = [model.hidden(batch) for batch in range(len(batches))], []

        def seen(batch: int, after: torch.Tensor) -> None:
            cosines.append(torch.cosine_similarity(before[batch].float(), after.float(), dim=-1).flatten())
            progress.advance(batches[batch].numel())

        with model.loaded(block):
            model.through(block, seen)
        found.append(1 - torch.cat(cosines).double().mean().item())
    return found


@torch.no_grad()
def losses(
    model: Lockstep, batches: Sequence[torch.Tensor], candidates: Sequence[int], whole: Sequence[torch.Tensor] | None,
    progress: Progress, measure: str = "loss",
) -> tuple[list[np.ndarray], list[torch.Tensor]]:  # fmt: skip
    """What is lost by `measure`, one of LOSSES, when each of the `candidates`, rising numbers of blocks, is left out: float64
    (rows,), in nats a token, each row's share of the mean of all tokens times the number of rows.

    batches: int64 (rows, tokens), a token or more of each predicted. whole: what the whole model's last block gave for them, (rows,
    tokens, hidden); None where `model` is whole. Returns that, too.
    """
    runs = len(batches)
    first = {
        block: runs * (place + 2) for place, block in enumerate(candidates)
    }  # copies of the whole model come before
    tokens = sum(batch.numel() for batch in batches)
    progress.start(
        measure,
        tokens * sum(1 + _behind(candidates, block) for block in range(len(model.blocks))),
        "tokens x blocks",
    )
    model.start(batches, copies=1 + len(candidates))
    for block in range(len(model.blocks)):
        before = [model.hidden(batch) for batch in range(runs)]
        with model.loaded(block):
            model.through(block, lambda batch, _: progress.advance(batches[batch % runs].numel()))
        for batch, hidden in enumerate(before):
            if block in first:
                model.branch(block, first[block] + batch, hidden)
    whole = [model.hidden(batch) for batch in range(runs)] if whole is None else list(whole)
    for batch, hidden in enumerate(whole):
        model.branch(len(model.blocks) - 1, runs + batch, hidden)
    return _compared(model, batches, list(first.values()), measure), whole


def difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """The mean of `one` less that of `other`, of the same rows, and its standard error, None of a single row."""
    apart = one - other
    error = float(apart.std(ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else None
    return Estimate(float(apart.mean()), error)


def tied(found: Mapping[int, np.ndarray]) -> list[int]:
    """The layer of the least figure, and those that lie no more than TIED standard errors above it."""
    best = min(found, key=lambda layer: found[layer].mean())
    apart = {layer: difference(rows, found[best]) for layer, rows in found.items()}
    close = (
        layer
        for layer, by in apart.items()
        if layer != best and (by.error is None or by.value <= TIED * by.error)
    )
    return [best, *close]


def _compared(
    model: Lockstep, batches: Sequence[torch.Tensor], firsts: Sequence[int], measure: str
) -> list[np.ndarray]:
    """The figure of the copies that begin at `firsts`, beside those behind the batches themselves, by row."""
    found: list[list[float]] = [[] for _ in firsts]
    order = [first + batch for batch in range(len(batches)) for first in (len(batches), *firsts)]
    logits, count = model.finish(order), 0
    for batch in batches:
        at = scored(batch.shape[1], "transformers")
        reference = next(logits)
        for sums in found:
            without = next(logits)
            for row, tokens in enumerate(batch):
                divergence = Divergence()
                targets = tokens[at.start + 1 : at.stop + 1].to(reference.device)
                divergence.add(reference[row, at], without[row, at], targets)
                sums.append(float(LOSSES[measure](divergence.per_token()).sum()))
            del without
        count += batch[:, at].numel()
        del reference
    return [np.array(sums) * (len(sums) / count) for sums in found]


def _behind(candidates: Sequence[int], block: int) -> int:
    """How many copies go through a block."""
    return sum(candidate < block for candidate in candidates)
