"""How many of each matrix's weights go: as many of all, as options say by name, or by what is measured beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmcompress.methods import magnitude, owl
from llmcompress.parallel import in_parallel
from llmcompress.progress import Progress

if TYPE_CHECKING:
    from llmcompress.converters.pruning import PruningPlan


def measured_shares(plan: PruningPlan, progress: Progress) -> tuple[float, ...]:
    """Of the weights of each matrix of a plan, the share that goes."""
    if plan.options.whole_model:
        return _across_model(plan, progress)
    usual = _by_outliers(plan, progress) if plan.options.allocate == "owl" else {}
    share = plan.options.share
    return tuple(plan.options.share_of(m.tensor.name, usual.get(m.block, share)) for m in plan.matrices)


def _across_model(plan: PruningPlan, progress: Progress) -> tuple[float, ...]:
    """So that the smallest weights of all matrices go, wherever they are: two reads of the weights."""
    progress.start("comparing", 2 * sum(matrix.place.size for matrix in plan.matrices))

    def through(count: Callable[[np.ndarray], object]) -> list:
        """What `count` says of each matrix."""
        found = [None] * len(plan.matrices)

        def one(at: int) -> tuple[int, object]:
            return at, count(plan.matrices[at].read(plan.checkpoint))

        for at, result in in_parallel(plan.output.workers, range(len(plan.matrices)), one):
            found[at] = result
            progress.advance(plan.matrices[at].place.size)
        return found

    wanted = int(sum(matrix.weights for matrix in plan.matrices) * plan.options.share)
    counts = magnitude.counts_across(through, wanted)
    return tuple(count / matrix.weights for count, matrix in zip(counts, plan.matrices))


def _by_outliers(plan: PruningPlan, progress: Progress) -> dict[int, float]:
    """OWL's shares by block, from a pass over the model as it is."""
    model, ratios, sizes = plan.model, {}, {}
    progress.start("measuring outliers", sum(matrix.place.size for matrix in plan.matrices))
    model.start()
    for block in range(model.blocks):
        own = [matrix for matrix in plan.matrices if matrix.block == block]
        inputs = model.inputs(block)
        if own:
            found = owl.Outliers()
            for matrix in own:
                squares = inputs.squares(matrix.tensor.name, matrix.number)
                if squares is not None:
                    found.add(matrix.read(plan.checkpoint), squares)
                progress.advance(matrix.place.size)
            ratios[block], sizes[block] = found.ratio, sum(matrix.weights for matrix in own)
        if block + 1 < model.blocks:
            model.go_on(block)
    return dict(zip(ratios, owl.shares(list(ratios.values()), list(sizes.values()), plan.options.share)))
