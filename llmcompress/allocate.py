"""Which option each group of tensors takes, so that the sum of errors is least within so many bytes.

A multiple-choice knapsack, solved by dynamic programming over bytes in whole units. A Lagrangian search along the
convex hulls finds only some of the budgets' optima, and no better ones; this takes a second for a thousand tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNITS = 2**17  # of bytes at most: more would cost time and memory, fewer would waste bytes


@dataclass(frozen=True)
class Option:
    nbytes: int
    error: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """The number of each group's option, such that they take at most `budget` bytes; None where nothing does.

    The sum of errors is least where sizes are multiples of a unit that gives UNITS between the smallest and the
    largest sum; others are rounded up to such, once for each group. A larger budget never gives a larger error.
    """
    smallest = [min(option.nbytes for option in group) for group in groups]
    largest = [max(option.nbytes for option in group) for group in groups]
    if sum(smallest) > budget:
        return None
    more = [[option.nbytes - least for option in group] for group, least in zip(groups, smallest)]
    unit = max(math.gcd(*(extra for group in more for extra in group)), 1)
    unit = max(unit, -(-(sum(largest) - sum(smallest)) // UNITS))
    units = (min(budget, sum(largest)) - sum(smallest)) // unit + 1
    least = np.zeros(units)  # error of the groups so far, in at most so many units
    taken = np.empty((len(groups), units), np.uint8)
    for number, group in enumerate(groups):
        least, taken[number] = _add(least, group, [-(-extra // unit) for extra in more[number]])
    left, chosen = units - 1, []
    for number in reversed(range(len(groups))):
        chosen.append(int(taken[number, left]))
        left -= -(-more[number][chosen[-1]] // unit)
    return chosen[::-1]


def _add(least: np.ndarray, group: Sequence[Option], units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Least errors with one more group, and its option for each: of equals the smaller, then the first."""
    best = np.full(len(least), np.inf)
    taken = np.zeros(len(least), np.uint8)
    for number in sorted(range(len(group)), key=lambda number: (units[number], number)):
        extra = units[number]
        if extra < len(least):
            error = least[: len(least) - extra] + group[number].error
            better = error < best[extra:]
            best[extra:][better] = error[better]
            taken[extra:][better] = number
    return best, taken
