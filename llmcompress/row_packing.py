"""Several examples in one row, none of which sees another: no computing on padding.

Position ids begin anew with each example, by which transformers masks attention between them (models whose masks it
makes do; `packs_cleanly` measures it). An example's first token is never a target, so none is predicted from another
example's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmcompress.tuning_data import Example

IGNORED = -100  # the label of a token that is not learned
CLOSE = 2e-2  # largest difference of logits, as a share of their range, that rounding makes


def rows_of(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """The examples in rows of at most `length` tokens, longest first, each in the first row with room."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        at = next((at for at, free in enumerate(room) if free >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(example)
        room[at] -= size
    return rows


def batch_of(rows: Sequence[Sequence[Example]], pack: bool) -> dict[str, torch.Tensor]:
    """Rows of examples as the model takes them: ids, labels and positions, int64 `(rows, longest)`.

    Tokens behind a row's end are each a sequence of its own and no targets. Without `pack` each row is one example,
    and there is an attention mask instead of positions.
    """
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    ids, positions, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    labels = torch.full((len(rows), longest), IGNORED)
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            place = slice(at, at + len(example.ids))
            ids[number, place] = torch.from_numpy(example.ids.astype(np.int64))
            labels[number, place] = torch.where(
                torch.from_numpy(example.learned), ids[number, place], torch.tensor(IGNORED)
            )
            positions[number, place] = torch.arange(len(example.ids))
            at = place.stop
        mask[number, :at] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch | ({"position_ids": positions} if pack else {"attention_mask": mask})


class Collator:
    """A batch of the Trainer's from what its data set gives: examples, which share rows of at most `length` tokens, or
    rows made before."""

    def __init__(self, length: int, pack: bool) -> None:
        self.length, self.pack = length, pack

    def __call__(self, items: Sequence[Example | list[Example]]) -> dict[str, torch.Tensor]:
        if isinstance(items[0], Example):
            items = rows_of(items, self.length) if self.pack else [[example] for example in items]
        return batch_of(items, self.pack)


@torch.no_grad()
def packs_cleanly(model: Any, examples: Sequence[Example]) -> bool:
    """Whether the model gives the last of some examples in one row the logits that it gives it alone."""
    last, *others = [Example(example.ids[:16], example.learned[:16]) for example in examples[:3]]
    training = model.training
    model.eval()
    try:
        logits = []
        for rows in ([[last]], [[*others, last]] if others else [[last, last]]):
            batch = batch_of(rows, pack=True)
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            logits.append(model(**inputs).logits[0, -len(last.ids) :].float())
    except TypeError:  # a model that knows no positions
        return False
    finally:
        model.train(training)
    alone, together = logits
    return bool((alone - together).abs().max() <= CLOSE * (alone.max() - alone.min()))
