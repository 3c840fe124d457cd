"""The best options within a budget, against all combinations there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress import allocate as module
from llmcompress.allocate import Option, allocate

OPTIONS = st.builds(Option, st.integers(1, 60), st.integers(0, 1000).map(float))
GROUPS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def total(groups: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [group[number] for group, number in zip(groups, chosen)]
    return sum(option.nbytes for option in taken), sum(option.error for option in taken)


def best_of_all(groups: list[list[Option]], budget: int) -> float | None:
    sums = (total(groups, numbers) for numbers in itertools.product(*(range(len(group)) for group in groups)))
    return min((error for nbytes, error in sums if nbytes <= budget), default=None)


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.integers(1, 320))
def test_nothing_within_the_budget_is_better(groups: list[list[Option]], budget: int) -> None:
    chosen = allocate(groups, budget)
    wanted = best_of_all(groups, budget)
    if chosen is None:
        assert wanted is None
    else:
        nbytes, error = total(groups, chosen)
        assert nbytes <= budget and error == wanted


def tensors(seed: int, count: int = 200) -> list[list[Option]]:
    """Sizes and errors as matrices have them: error falls by four for each bit."""
    generator = np.random.default_rng(seed)
    bits = np.array([2.0625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5])
    groups = []
    for weights in generator.integers(1, 50, count) * 2**20 + 32 * generator.integers(0, 99, count):
        errors = generator.lognormal(sigma=2) * 4.0**-bits * generator.uniform(0.8, 1.25, len(bits))
        groups.append([Option(int(weights * b / 8), float(e)) for b, e in zip(bits, errors)])
    return groups


@pytest.mark.slow
def test_large_sizes_are_met_closely_and_the_same_way_each_time() -> None:
    groups = tensors(0)
    for bits in (2.5, 3.9, 4.8, 7.0):
        budget = int(bits / 8.5 * sum(group[-1].nbytes for group in groups))
        chosen = allocate(groups, budget)
        assert chosen == allocate(groups, budget)
        assert 0.995 * budget <= total(groups, chosen)[0] <= budget


@pytest.mark.slow
def test_more_bytes_never_give_more_error() -> None:
    groups = tensors(1, 30)
    sizes = np.linspace(*(sum(group[end].nbytes for group in groups) for end in (0, -1)), 60)
    errors = [total(groups, allocate(groups, int(size)))[1] for size in sizes]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[0] > errors[-1]


@pytest.mark.slow
def test_no_point_of_the_lagrangian_search_is_better() -> None:
    """Each multiplier's choice is the best of its own size; the units of bytes cost next to nothing."""
    groups = tensors(2)
    for price in np.geomspace(1e-12, 1e-7, 9):
        numbers = [int(np.argmin([o.error + price * o.nbytes for o in group])) for group in groups]
        nbytes, error = total(groups, numbers)
        assert total(groups, allocate(groups, nbytes))[1] <= error * 1.01


def test_coarse_units_stay_within_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(module, "UNITS", 64)
    groups = tensors(3, 10)
    for size in np.linspace(*(sum(group[end].nbytes for group in groups) for end in (0, -1)), 20):
        assert total(groups, allocate(groups, int(size)))[0] <= int(size)


def test_what_fits_nowhere_is_none() -> None:
    assert allocate([[Option(10, 1.0)], [Option(20, 1.0)]], 29) is None
    assert allocate([[Option(10, 1.0)], [Option(20, 1.0)]], 30) == [0, 0]
