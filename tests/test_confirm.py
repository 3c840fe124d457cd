"""Swaps near an optimum, with a divergence that is known."""

from __future__ import annotations

import numpy as np

from llmcompress.allocate import Option
from llmcompress.confirm import confirmed

# Bytes and predicted errors of four groups alike; what is true of them differs.
GROUP = [Option(10, 8.0), Option(20, 4.0), Option(30, 2.0), Option(40, 1.0)]
GROUPS = [GROUP] * 4
TRUE = np.array([1.0, 1.0, 1.0, 9.0])


def divergence(numbers) -> float:
    return float(sum(weight * GROUP[number].error for weight, number in zip(TRUE, numbers)))


def fits(numbers) -> bool:
    return sum(GROUP[number].nbytes for number in numbers) <= 100


def test_a_swap_is_kept_where_the_measured_divergence_falls() -> None:
    start = [2, 2, 1, 1]
    numbers, swaps = confirmed(GROUPS, start, fits, divergence, 8)
    assert numbers[3] > 1 and fits(numbers) and divergence(numbers) < divergence(start)
    kept = [swap for swap in swaps if swap.kept]
    assert kept[0].before == divergence(start) and kept[-1].after == divergence(numbers)
    assert all(swap.kept == (swap.after < swap.before) and swap.better != swap.worse for swap in swaps)


def test_none_is_kept_where_the_prediction_is_the_truth() -> None:
    def predicted(numbers) -> float:
        return sum(GROUP[number].error for number in numbers)

    numbers, swaps = confirmed(GROUPS, [2, 2, 1, 1], fits, predicted, 8)
    assert numbers == [2, 2, 1, 1] and swaps and not any(swap.kept for swap in swaps)


def test_it_tries_no_more_than_it_may_and_the_likeliest_first() -> None:
    asked = []

    def counted(numbers) -> float:
        asked.append(list(numbers))
        return divergence(numbers)

    _, swaps = confirmed(GROUPS, [2, 2, 1, 1], fits, counted, 1)
    assert len(swaps) == 1 and asked == [[2, 2, 1, 1], [1, 2, 2, 1]]  # of equals the first
    assert confirmed(GROUPS, [0, 0, 0, 0], fits, counted, 3)[1] == []  # nothing to take from
    assert confirmed(GROUPS, [2, 2, 1, 1], fits, counted, 0) == ([2, 2, 1, 1], [])
    assert len(confirmed(GROUPS, [2, 2, 1, 1], fits, counted, 100)[1]) <= 16  # each group once a way
