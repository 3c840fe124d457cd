"""Which decoder layers a model misses least: by block influence, or by what the model loses without them.

Block influence (ShortGPT, arXiv:2403.03853) is one minus the mean cosine of what goes into a block and what comes out: low
where a block hardly turns the hidden states. It takes one run. What is lost is what is wanted itself, measured for every layer left out: the nats for
each token of the text that is read, or the mean KL of the next token's distribution from the whole model's. One run measures all: the model's own batches go through the blocks,
and in front of every block copies of them branch off that leave it out and take all that follow. So a block's weights
are read once, and what lies before a candidate is computed once. Dropping several is a greedy search, a run for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompress.blocks import Lockstep
from llmcompress.divergence import Divergence
from llmcompress.evaluate import scored
from llmcompress.progress import Progress

LOSSES = {"loss": "ln_perplexity_ratio", "kl": "mean_kl"}  # figures of Divergence


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
) -> tuple[list[float], list[torch.Tensor]]:  # fmt: skip
    """What is lost by `measure`, one of LOSSES, in nats a token, when each of the `candidates`, rising numbers of blocks, is left out.

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
    return _compared(model, batches, list(first.values()), LOSSES[measure]), whole


def _compared(
    model: Lockstep, batches: Sequence[torch.Tensor], firsts: Sequence[int], figure: str
) -> list[float]:
    """A figure of Divergence of the copies that begin at `firsts`, beside those behind the batches themselves."""
    found = [Divergence() for _ in firsts]
    order = [first + batch for batch in range(len(batches)) for first in (len(batches), *firsts)]
    logits = model.finish(order)
    for batch in batches:
        at = scored(batch.shape[1], "transformers")
        reference = next(logits)
        for divergence in found:
            without = next(logits)
            for row, tokens in enumerate(batch):
                targets = tokens[at.start + 1 : at.stop + 1].to(reference.device)
                divergence.add(reference[row, at], without[row, at], targets)
            del without
        del reference
    return [divergence.summary()[figure].value for divergence in found]


def _behind(candidates: Sequence[int], block: int) -> int:
    """How many copies go through a block."""
    return sum(candidate < block for candidate in candidates)
