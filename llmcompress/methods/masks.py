"""Which weights go: so many of the lowest scores, or of every M in a row all but the N highest."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import RecipeError
from llmcompress.grids.compiled import compiled

LARGEST_GROUP = 256


@dataclass(frozen=True)
class Pattern:
    """N:M as papers and GPUs have it: of every `group` weights that follow each other in a row, `kept` stay."""

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def parse_pattern(text: str) -> Pattern:
    """`2:4`. Raises RecipeError."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text.strip())
    kept, group = map(int, match.groups()) if match else (0, 0)
    if not 0 < kept < group <= LARGEST_GROUP:
        raise RecipeError(
            f"--pattern {text}: write it N:M, such as 2:4: of every M weights in a row N stay, 0 < N < M <= "
            f"{LARGEST_GROUP}"
        )
    return Pattern(kept, group)


def matching_pattern(text: str, sparsity: float | None) -> Pattern:
    """The pattern, which goes with the sparsity where one is given. Raises RecipeError."""
    pattern = parse_pattern(text)
    if sparsity is not None and not math.isclose(sparsity, pattern.sparsity):
        raise RecipeError(
            f"--pattern {pattern} and --sparsity {sparsity:g}: of every {pattern.group} weights {pattern.kept} stay, "
            f"a sparsity of {pattern.sparsity:g}; leave one out"
        )
    return pattern


def count_of(size: int, share: float) -> int:
    """How many of `size` weights are that share, rounded down; 0.29 of 100 are 29, whatever float arithmetic says."""
    return int(size * share + 1e-6)


@compiled()
def lowest(scores: np.ndarray, count: int, mask: np.ndarray) -> None:
    """Set `mask`, bool (rows, columns), where one of the `count` lowest scores of its row stands; of equal ones, the
    first. scores: float32 (rows, columns), none of them NaN."""
    rows, columns = scores.shape
    for row in range(rows):
        if count <= 0 or count >= columns:
            mask[row] = count > 0
            continue
        bound = np.partition(scores[row], count - 1)[count - 1]
        left = count
        for j in range(columns):
            left -= scores[row, j] < bound
        for j in range(columns):
            equal = scores[row, j] == bound and left > 0
            left -= equal
            mask[row, j] = scores[row, j] < bound or equal


@compiled(inline="always")
def choose(scores, kept, gone):
    """Set `gone`, bool, but for the `kept` highest of a group's scores; of equal ones, the last stay."""
    for j in range(len(scores)):
        higher = 0
        for i in range(len(scores)):
            higher += scores[i] > scores[j] or (i > j and scores[i] == scores[j])
        gone[j] = higher >= kept


@compiled()
def lowest_of_groups(scores: np.ndarray, kept: int, group: int, mask: np.ndarray) -> None:
    """Set `mask`, bool (rows, columns), but for the `kept` highest scores of every `group` columns; of equal ones, the
    last stay. scores: float32 (rows, columns), columns a multiple of `group`."""
    rows, columns = scores.shape
    for row in range(rows):
        for first in range(0, columns, group):
            choose(scores[row, first : first + group], kept, mask[row, first : first + group])
