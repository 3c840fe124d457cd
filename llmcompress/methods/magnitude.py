"""Magnitude pruning: the smallest weights go, of a matrix or of the whole model (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmcompress.methods.masks import Pattern, count_of, lowest, lowest_of_groups

HIGH = 16  # bits of a magnitude that are counted first


def mask(weights: np.ndarray, sparsity: float, pattern: Pattern | None = None) -> np.ndarray:
    """What goes of float32 (rows, columns), bool: the `sparsity` of all that is smallest; with a pattern, of each group."""
    found = np.empty(weights.shape, np.bool_)
    sizes = np.abs(weights)
    if pattern:
        lowest_of_groups(sizes, pattern.kept, pattern.group, found)
    else:
        lowest(sizes.reshape(1, -1), count_of(sizes.size, sparsity), found.reshape(1, -1))
    return found


def counts_across(through: Callable[[Callable[[np.ndarray], object]], list], wanted: int) -> list[int]:
    """Of how many weights each matrix is rid when the `wanted` smallest of all go; of equal ones, the first.

    `through(count)` gives `count(weights)` of every matrix, float32 of any shape, in order; it is called twice. The
    bits of a float32 without its sign are in the order of its size.
    """
    totals = np.cumsum(sum(through(_high_counts)))
    bound = int(np.searchsorted(totals, wanted))  # the high bits of the largest that goes
    below, lows = zip(*through(lambda weights: _at(weights, bound)))
    left = wanted - sum(below)
    values = np.sort(np.concatenate([np.repeat(*found) for found in lows])) if left > 0 else []
    counts = []
    if left > 0:
        last = values[left - 1]  # the low bits of the largest that goes
        ties = left - int((values < last).sum())
    for low, (found, times) in zip(below, lows):
        count = low
        if left > 0:
            equal = min(ties, int(times[found == last].sum()))
            count += int(times[found < last].sum()) + equal
            ties -= equal
        counts.append(count)
    return counts


def _bits(weights: np.ndarray) -> np.ndarray:
    return np.abs(weights).view(np.uint32).ravel()


def _high_counts(weights: np.ndarray) -> np.ndarray:
    return np.bincount(_bits(weights) >> HIGH, minlength=1 << HIGH)


def _at(weights: np.ndarray, bound: int) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """How many weights have high bits below `bound`; and of those that have these, the low bits and how often."""
    bits = _bits(weights)
    high = bits >> HIGH
    return int((high < bound).sum()), np.unique(bits[high == bound] & (1 << HIGH) - 1, return_counts=True)
