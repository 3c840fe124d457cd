"""Masks against sorting, and the methods that make them against their papers' formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.methods import magnitude, owl, wanda
from llmcompress.methods.masks import Pattern, count_of, lowest, lowest_of_groups, parse_pattern

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((64, 192)).astype(np.float32)
SQUARES = np.exp(2 * RNG.standard_normal(192)).astype(np.float32)


@pytest.mark.parametrize("count", [0, 1, 7, 31, 32])
def test_the_lowest_are_those_of_a_stable_sort(count: int) -> None:
    scores = RNG.integers(0, 6, (50, 32)).astype(np.float32)  # many are equal
    mask = np.empty(scores.shape, np.bool_)
    lowest(scores, count, mask)
    wanted = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(wanted, np.argsort(scores, axis=1, kind="stable")[:, :count], True, 1)
    assert np.array_equal(mask, wanted)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:5", "15:16", "1:2"])
def test_every_group_keeps_its_highest(text: str) -> None:
    pattern = parse_pattern(text)
    scores = RNG.integers(0, 6, (40, 8 * pattern.group)).astype(np.float32)
    mask = np.empty(scores.shape, np.bool_)
    lowest_of_groups(scores, pattern.kept, pattern.group, mask)
    groups = scores.reshape(-1, pattern.group)
    wanted = np.zeros(groups.shape, np.bool_)
    gone = pattern.group - pattern.kept
    np.put_along_axis(wanted, np.argsort(groups, axis=1, kind="stable")[:, :gone], True, 1)
    assert np.array_equal(mask.reshape(-1, pattern.group), wanted)


@pytest.mark.parametrize(
    "text", ["", "2", "4:2", "0:4", "4:4", "2:4:8", "-1:4", "a:b", "1:300", "2:999999999"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--pattern"):
        parse_pattern(text)


def test_a_share_is_counted_as_it_is_written() -> None:
    assert [count_of(100, share / 100) for share in range(100)] == list(range(100))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_wanda_is_its_formula(sparsity: float) -> None:
    """|W| times the norm of the input, sorted along each row: Wanda's own lines."""
    metric = torch.from_numpy(WEIGHTS).abs() * torch.from_numpy(SQUARES).sqrt().reshape(1, -1)
    order = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * sparsity)]
    wanted = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)
    assert np.array_equal(wanda.mask(WEIGHTS, SQUARES, sparsity), wanted.numpy())


def test_wanda_of_groups_is_its_formula() -> None:
    metric = torch.from_numpy(WEIGHTS).abs() * torch.from_numpy(SQUARES).sqrt().reshape(1, -1)
    wanted = torch.zeros_like(metric, dtype=torch.bool)
    for first in range(0, metric.shape[1], 8):
        gone = torch.topk(metric[:, first : first + 8], 4, dim=1, largest=False)[1]
        wanted.scatter_(1, first + gone, True)
    assert np.array_equal(wanda.mask(WEIGHTS, SQUARES, 0.5, Pattern(4, 8)), wanted.numpy())


def test_by_score_is_a_bound_on_what_each_row_loses() -> None:
    """The paper's variant: for some alpha each row gives up its lowest while their sum is below alpha of its own."""
    rows = WEIGHTS * np.exp(RNG.standard_normal((64, 1))).astype(np.float32)
    rows[::2] *= np.abs(rows[::2])  # half of the rows have heavier tails
    found = wanda.mask(rows, SQUARES, 0.5, by_score=True)
    scores = np.abs(rows) * np.sqrt(SQUARES)
    ordered = np.sort(scores, 1).cumsum(1, dtype=np.float64) / scores.sum(1, dtype=np.float64)[:, None]
    alpha = np.sort(ordered.ravel())[count_of(rows.size, 0.5) - 1]
    assert found.sum() == rows.size // 2
    assert np.abs(found.sum(1) - (ordered <= alpha).sum(1)).max() <= 1  # at the bound, float32 rounds
    assert found.sum(1).std() > 3  # which is what it is for
    for mask, score in zip(found, scores):
        assert score[mask].max() <= score[~mask].min()


def test_magnitude_takes_the_smallest_of_a_matrix() -> None:
    found = magnitude.mask(WEIGHTS, 0.6)
    assert found.sum() == int(WEIGHTS.size * 0.6)
    assert np.abs(WEIGHTS[found]).max() < np.abs(WEIGHTS[~found]).min()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("step", [0, 0.25, 1e-3])  # of equal weights none, most, many
def test_counts_across_matrices_are_those_of_sorting_all(share: float, step: float) -> None:
    shapes = [(8, 64), (30, 10), (1, 7), (64, 64)]
    matrices = [RNG.standard_normal(shape).astype(np.float32) * (1 + at) for at, shape in enumerate(shapes)]
    if step:
        matrices = [np.round(matrix / step).astype(np.float32) * np.float32(step) for matrix in matrices]
    everything = np.concatenate([np.abs(matrix).ravel() for matrix in matrices])
    owner = np.repeat(np.arange(len(matrices)), [matrix.size for matrix in matrices])
    wanted = int(share * everything.size)
    first = np.argsort(everything, kind="stable")[:wanted]
    counts = magnitude.counts_across(lambda count: [count(matrix) for matrix in matrices], wanted)
    assert counts == [int((owner[first] == at).sum()) for at in range(len(matrices))]


def test_owl_spares_blocks_with_outliers() -> None:
    shares = owl.shares([0.01, 0.03, 0.02], [100, 100, 200], 0.6)
    assert np.average(shares, weights=[100, 100, 200]) == pytest.approx(0.6)
    assert shares[1] < shares[2] < shares[0] and shares[0] - shares[1] == pytest.approx(2 * owl.SPREAD)
    assert owl.shares([0.01, 0.01], [1, 1], 0.3) == pytest.approx([0.3, 0.3])
    assert all(0 <= share < 1 for share in owl.shares([0.0, 0.5], [1, 9], 0.01))


def test_outliers_are_counted_beside_the_mean() -> None:
    weights = np.ones((2, 10), np.float32)
    weights[0, 3] = 100
    found = owl.Outliers()
    found.add(weights, np.ones(10, np.float32))
    assert found.ratio == 1 / 20
