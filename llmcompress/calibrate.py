"""Token rows through a model, block by block, and out come the sums of every weight's inputs.

Batches go in groups: each group is one pass over the weights, after which the sums are saved, so that a killed
calibration goes on with the next group and ends in the same sums.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from llmcompress.blocks import Lockstep
from llmcompress.calibration_state import CalibrationState, add_sums
from llmcompress.linear_inputs import LinearInputs
from llmcompress.progress import Progress
from llmcompress.stats import TensorStats

BATCH_TOKENS = 2048  # at most
FEWEST_TOKENS = 512
ACTIVATION_BYTES = 2**22  # of a batch's widest activation: larger ones leave the cache
GROUP_TOKENS = 2**16  # between two saves


@dataclass
class Calibration:
    """What a calibration found, by the names of the model's parameters.

    sums: the inputs of every weight that got any. expected: the matrices that could have got some, and in how many
    stacked matrices. complaints: tokens left out for NaNs and infinities, a line for each batch. resumed: tokens
    whose sums came from an earlier, killed run.
    """

    sums: dict[str, TensorStats] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    resumed: int = 0


class Rewritten(Protocol):
    """Blocks that have other weights once their inputs are known: the next are calibrated on what these put out."""

    def is_wanted(self, block: int) -> bool:
        """Whether anyone asks for a block's sums. May wait until that is known."""

    def loaded(self, block: int) -> AbstractContextManager:
        """The block's parameters hold the other weights inside this context. May wait until they are there."""


def batches_of(rows: Sequence[np.ndarray], tokens: int = BATCH_TOKENS) -> list[torch.Tensor]:
    """Rows of one length stacked to int64 (rows, length) of at most about `tokens` tokens; no padding is needed.

    The longest come first, rows of one length in their order.
    """
    batches = []
    for length, alike in itertools.groupby(sorted(rows, key=len, reverse=True), key=len):
        rows_each = max(1, tokens // length)
        alike = list(alike)
        batches += [
            torch.from_numpy(np.stack(alike[first : first + rows_each]).astype(np.int64))
            for first in range(0, len(alike), rows_each)
        ]
    return batches


def batch_tokens_of(lockstep: Lockstep) -> int:
    """How many tokens are best run at once."""
    widest = max(max(value.shape) for value in lockstep.parameters_of(0).values() if value.ndim)
    return min(BATCH_TOKENS, max(FEWEST_TOKENS, ACTIVATION_BYTES // (4 * widest)))


def groups_of(batches: Sequence[torch.Tensor], tokens: int = GROUP_TOKENS) -> Iterator[list[torch.Tensor]]:
    """Batches that go through the model together: about `tokens` tokens."""
    group: list[torch.Tensor] = []
    for batch in batches:
        group.append(batch)
        if sum(member.numel() for member in group) >= tokens:
            yield group
            group = []
    if group:
        yield group


def calibrate(
    lockstep: Lockstep,
    batches: Sequence[torch.Tensor],
    progress: Progress,
    state: CalibrationState | None = None,
    group_tokens: int = GROUP_TOKENS,
    after_block: Callable[[int, Calibration], None] | None = None,
    rewritten: Rewritten | None = None,
) -> Calibration:
    """Run `batches`, int64 (rows, tokens), through the model and add up what goes into each of its weights.

    The output matrix gets its sums too; it is neither read nor multiplied. `state` keeps the sums after each group
    of about `group_tokens` tokens, and XᵀX if it has a folder for them. `after_block(block, calibration)` is called
    when a block is through, with its weights still loaded; all its sums are there in the last group. With `rewritten`
    a block then runs again, with other weights, and what follows gets what it puts out now; that takes one group.
    """
    groups = list(groups_of(batches, group_tokens))
    held = state.load() if state else None
    if state and not held:
        state.save({}, [], 0)  # so that a disk that refuses it does so before the work
    sums, complaints, first = held or ({}, [], 0)
    found = Calibration(sums, expected_of(lockstep), complaints, sum(map(_tokens, groups[:first])))
    progress.start("calibrate", sum(map(_tokens, groups)) * len(lockstep.blocks), "tokens x blocks")
    progress.advance(found.resumed * len(lockstep.blocks))
    for number, group in enumerate(groups[first:], first):
        _Pass(lockstep, group, number, found, progress, state, rewritten).run(after_block)
        if state:
            state.save(found.sums, found.complaints, number + 1)
    return found


@dataclass
class _Pass:
    """One group of batches on its way through all blocks."""

    lockstep: Lockstep
    group: list[torch.Tensor]
    number: int
    found: Calibration
    progress: Progress
    state: CalibrationState | None
    rewritten: Rewritten | None = None
    left_out: dict[int, Counter[str]] = field(default_factory=dict)  # tokens with NaNs, by batch and weight

    @torch.no_grad()
    def run(self, after_block: Callable[[int, Calibration], None] | None) -> None:
        self.lockstep.start(self.group)
        for block in range(len(self.lockstep.blocks)):
            if self.rewritten is None or self.rewritten.is_wanted(block):
                self._look(block, after_block)
            if self.rewritten:
                with self.rewritten.loaded(block):
                    self.lockstep.through(block, lambda batch, output: self._advance(batch))
        self._head()
        self._complain()

    def _look(self, block: int, after_block: Callable[[int, Calibration], None] | None) -> None:
        run = self.lockstep.visit if self.rewritten else self.lockstep.through
        with self.lockstep.loaded(block) as parameters:
            self._take(inputs_of(partial(run, block), parameters, self._products, self._advance))
            if after_block:
                after_block(block, self.found)

    @property
    def _products(self) -> bool:
        return self.state is not None and self.state.products is not None

    def _advance(self, batch: int) -> None:
        self.progress.advance(self.group[batch].numel())

    def _head(self) -> None:
        total = LinearInputs({}, self._products)

        def seen(batch: int, hidden: torch.Tensor) -> None:
            inputs = LinearInputs({}, self._products, batch)
            inputs.add(self.lockstep.head, hidden)
            total.merge(inputs)

        self.lockstep.finish_before_head(seen)
        self._take(total)

    def _take(self, inputs: LinearInputs) -> None:
        """Add a block's sums to those found so far."""
        for name, sums in inputs.sums.items():
            add_sums(self.found.sums, name, sums.tokens.numpy(), sums.squares.cpu().numpy())
        if self._products:
            self.state.add_products(self.number, inputs.sums)
        for name, batch, tokens in inputs.nonfinite:
            self.left_out.setdefault(batch, Counter())[name] += tokens

    def _complain(self) -> None:
        """Tell of NaNs by the weight they first went into; once there, they are in all that follows."""
        for batch, weights in sorted(self.left_out.items()):
            (first, tokens), *others = weights.items()
            more = f"; so were tokens of {len(others)} weights behind it" if others else ""
            self.found.complaints.append(
                f"{first}: inputs of {tokens} tokens of batch {batch + 1} of group {self.number + 1} held a NaN or "
                f"infinity and were left out{more}"
            )


def inputs_of(
    run: Callable[[Callable, Callable], None],
    parameters: Mapping[str, torch.Tensor],
    products: bool,
    advance: Callable[[int], None] = lambda batch: None,
    seen_as: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {},
) -> LinearInputs:
    """What goes into a block's matrices: each batch's own, which may run side by side, added up in order.

    run: `through` or `visit` of a Lockstep's block. advance: called with each batch that is through. seen_as: as of
    LinearInputs."""
    matrices, total, watches = _matrices(parameters), LinearInputs({}, products), {}

    def watch(batch: int) -> LinearInputs:
        watches[batch] = LinearInputs(matrices, products, batch, seen_as)
        return watches[batch]

    def seen(batch: int, output: torch.Tensor) -> None:
        total.merge(watches.pop(batch))
        advance(batch)

    run(seen, watch)
    return total


def _matrices(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in parameters.items() if value.ndim in (2, 3)}


def expected_of(lockstep: Lockstep) -> dict[str, int]:
    """The matrices of the blocks and the output matrix, by parameter: how many are stacked in each."""
    expected = {lockstep.head: 1}
    for block in range(len(lockstep.blocks)):
        for name, value in _matrices(lockstep.parameters_of(block)).items():
            expected[name] = len(value) if value.ndim == 3 else 1
    return expected


def _tokens(group: Sequence[torch.Tensor]) -> int:
    return sum(batch.numel() for batch in group)
