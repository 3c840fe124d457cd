"""Pruning and quantizing in one go: GPTQ rounds what SparseGPT leaves, and zeros stay zero while its errors are made up for.

What SparseGPT leaves is the least squares of what stays, so an error beside that counts as one beside the weights themselves
does. Scales fitted on it are better than those fitted on the weights before: e H e 1.5 against 2.0 of pruning's alone,
Q3_K at half of the weights, a block of sample-llama-6m; 2.1 rounded to nearest. Then what goes is chosen again, from what
rounding has left: some of what stayed became zero, and weights that look small between others may be what makes up for them. Where a number format holds no exact zero, GPTQ fills
what was zero as any other weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import PlanError
from llmcompress.grids.grid import Grid
from llmcompress.methods import gptq, sparsegpt, wanda
from llmcompress.methods.exact_zero import keeps_zeros, zero_code
from llmcompress.methods.masks import Pattern, count_of, matching_pattern
from llmcompress.methods.settling import ROUNDS
from llmcompress.methods.solver import Solver, product

# Of choosing again. e H e of Q3_K over that of the first choice, sample-llama-6m's q of block 1, o of 2, up of 3, down of 4:
# 0.93, 0.94, 0.94, 0.96 after one, 0.91, 0.92, 0.91, 0.95 after two, 0.89, 0.90, 0.89, 0.94 after three.
CHOICES = {"fast": 0, "normal": 3, "best": 6}


@dataclass(frozen=True)
class Pruning:
    """What goes of every row: a share, or with a pattern that of each group. With a share of 0, what is zero already."""

    share: float
    pattern: Pattern | None = None


def pruning_of(sparsity: float | None, pattern: str | None) -> Pruning:
    """From what a recipe says. Raises RecipeError."""
    group = matching_pattern(pattern, sparsity) if pattern else None
    return Pruning(group.sparsity if group else sparsity, group)


def zeros_notes(pruned: Sequence[tuple[str, int, Grid]], pruning: Pruning) -> list[str]:
    """Which number formats will not keep the zeros, of tensors by name, columns and format. Raises PlanError for a pattern
    that rows do not divide into."""
    group = pruning.pattern.group if pruning.pattern else 1
    for name, columns, _ in pruned:
        if columns % group:
            raise PlanError(
                f"--pattern {pruning.pattern}: {name} has {columns} inputs, no multiple of {group}"
            )
    lost = Counter(grid.name for *_, grid in pruned if not keeps_zeros(grid))
    listed = ", ".join(f"{count} {name}" for name, count in lost.items())
    kept = "Q3_K, Q6_K, Q8_0, Q4_0, Q5_0, NF4 and symmetric GPTQ do"
    return [f"zeros will not survive in {listed}: no exact zero; {kept}"] if lost else []


def quantize(
    weights: np.ndarray,
    grid: Grid,
    solver: Solver | None,
    importance: np.ndarray | None,
    effort: str,
    pruning: Pruning,
    act_order: bool = False,
) -> np.ndarray:
    """Prune and round float32 (rows, columns) to `grid`, rows independent of each other; uint8 (rows, row_bytes).

    Without a solver that has a factor by Wanda, with the `importance` (columns,), and to nearest."""
    share, pattern = pruning.share, pruning.pattern
    if solver is None or solver.factor is None:
        squares = np.ones(weights.shape[1], np.float32) if importance is None else importance
        return grid.quantize(
            np.where(wanda.mask(weights, squares, share, pattern), 0, weights), importance, effort
        )
    left = sparsegpt.prune(weights, solver, share, pattern, effort, by_row=True) if share else weights
    if zero_code(grid) is None:
        return gptq.quantize(left, grid, solver, effort, act_order)
    if not share:
        return gptq.quantize(left, grid, solver, effort, act_order, left == 0)
    if pattern:
        group, zeros = pattern.group, pattern.group - pattern.kept
    else:
        group = weights.shape[1]
        zeros = sum(count_of(len(range(group)[block]), share) for block in sparsegpt.blocks(group, None))
    data = gptq.quantize(left, grid, solver, effort, act_order, left == 0)
    best = data.copy()
    least = _errors(weights - grid.dequantize(data), solver)
    for _ in range(CHOICES[effort]):
        values, rounds = grid.dequantize(data), ROUNDS[effort]
        left = sparsegpt.rechosen(weights, values, solver.damped, rounds, group, zeros)
        data = gptq.quantize(left, grid, solver, effort, act_order, left == 0)
        found = _errors(weights - grid.dequantize(data), solver)
        better = found < least
        best[better], least[better] = data[better], found[better]
    return best


def _errors(errors: np.ndarray, solver: Solver) -> np.ndarray:
    """e H eᵀ of every row."""
    return (product(errors, solver.hessian) * errors).sum(1)
