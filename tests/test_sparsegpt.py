"""SparseGPT against its column loop written out in torch, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.methods import sparsegpt, wanda
from llmcompress.methods.masks import Pattern, parse_pattern
from llmcompress.methods.solver import DAMPING, Solver

RNG = np.random.default_rng(1)


def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and XᵀX of inputs that go together."""
    mixed = RNG.standard_normal((columns, columns)) * np.exp(RNG.standard_normal(columns))
    inputs = (RNG.standard_normal((3 * columns, columns)) @ mixed).astype(np.float32)
    return RNG.standard_normal((rows, columns)).astype(np.float32), inputs.T @ inputs


def plain(
    weights: np.ndarray, products: np.ndarray, sparsity: float, pattern: Pattern | None
) -> torch.Tensor:
    """As its authors wrote it: blocks of 128 columns, each column's error on all that follow at once."""
    hessian = torch.from_numpy(products).double()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = torch.from_numpy(weights).double()
    gone = torch.zeros(left.shape, dtype=torch.bool)
    for j in range(left.shape[1]):
        if not pattern and j % 128 == 0:
            block = slice(j, j + 128)
            scores = left[:, block] ** 2 / upper.diagonal()[block] ** 2
            order = scores.flatten().argsort(stable=True)[: int(scores.numel() * sparsity)]
            gone[:, block] = (
                torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, order, True).view_as(scores)
            )
        if pattern and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            scores = left[:, group] ** 2 / upper.diagonal()[group] ** 2
            order = scores.topk(pattern.group - pattern.kept, dim=1, largest=False)[1]
            gone[:, group] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
        error = torch.where(gone[:, j], left[:, j], 0) / upper[j, j]
        left[:, j:] -= torch.outer(error, upper[j, j:])
        left[gone[:, j], j] = 0
    return left


@pytest.mark.parametrize(
    "rows, columns, sparsity, pattern",
    [(40, 384, 0.5, ""), (40, 200, 0.3, ""), (1, 128, 0.9, ""), (40, 256, 0, "2:4"), (33, 256, 0, "1:8"), (20, 130, 0, "3:5")],
)  # fmt: skip
def test_it_is_the_papers_loop(rows: int, columns: int, sparsity: float, pattern: str) -> None:
    given = parse_pattern(pattern) if pattern else None
    weights, products = layer(rows, columns)
    found = sparsegpt.prune(weights, Solver.of(products), sparsity, given, effort="fast")
    wanted = plain(weights, products, sparsity, given).numpy()
    assert np.array_equal(found == 0, wanted == 0)
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
    if given:
        assert ((found.reshape(-1, given.group) == 0).sum(1) == given.group - given.kept).all()


def error(weights: np.ndarray, pruned: np.ndarray, hessian: np.ndarray) -> float:
    apart = (pruned - weights).astype(np.float64)
    return float(np.einsum("ri,ij,rj->", apart, hessian, apart))


def test_what_stays_makes_up_for_what_goes() -> None:
    weights, products = layer(64, 256)
    solver = Solver.of(products)
    masked = np.where(wanda.mask(weights, products.diagonal() / 768, 0.5), 0, weights)
    swept, settled = (sparsegpt.prune(weights, solver, 0.5, effort=effort) for effort in ("fast", "normal"))
    assert error(weights, swept, products) < 0.8 * error(weights, masked, products)
    assert error(weights, settled, products) < 0.7 * error(weights, swept, products)
    assert np.array_equal((swept == 0).sum(1), (settled == 0).sum(1))


def without(weights: np.ndarray, found: np.ndarray, i: int, hessian: np.ndarray) -> float:
    other = found.copy()
    other[i] = 0
    return error(weights[None], other[None], hessian)


@pytest.mark.parametrize("group", [16, 4])
def test_no_exchange_is_left_that_would_help(group: int) -> None:
    """Of one of the cheapest weights of a row for any other of its group, with all others held."""
    weights, products = layer(6, 16)
    hessian = (products + 0.03 * products.diagonal().mean() * np.eye(16)).astype(np.float32)
    found = np.where(np.arange(16) % 4 < 1, weights, 0).astype(np.float32)  # a quarter is too much gone
    before = error(weights, found, hessian)
    for _ in range(20):
        sparsegpt.exchange(found, (weights - found) @ hessian, hessian, group, group // 2)
    assert ((found.reshape(6, -1, group) == 0).sum(2) == group // 2).all()
    assert error(weights, found, hessian) < before
    for w, x in zip(weights, found):
        now = error(w[None], x[None], hessian)
        stays = np.flatnonzero(x)
        for i in stays[np.argsort([without(w, x, i, hessian) for i in stays])]:
            for j in np.flatnonzero((x == 0) & (np.arange(16) // group == i // group)):
                other = x.copy()
                other[i] = 0
                other[j] = (w - other) @ hessian[j] / hessian[j, j]
                assert error(w[None], other[None], hessian) > now * (1 - 1e-4)


def test_settled_is_the_least_squares_of_every_row() -> None:
    weights, products = layer(24, 192)
    solver = Solver.of(products)
    found = sparsegpt.prune(weights, solver, 0.5, effort="best")
    wanted, hessian = np.zeros_like(weights), solver.damped.astype(np.float64)
    for row, stays in enumerate(found != 0):
        wanted[row, stays] = np.linalg.solve(hessian[np.ix_(stays, stays)], hessian[stays] @ weights[row])
    assert error(weights, found, hessian) < 1.01 * error(weights, wanted, hessian)


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_by_row_a_row_does_not_depend_on_the_others(pattern: str) -> None:
    given = parse_pattern(pattern) if pattern else None
    weights, products = layer(70, 256)
    solver = Solver.of(products)
    whole = sparsegpt.prune(weights, solver, 0.5, given, by_row=True)
    parts = [
        sparsegpt.prune(weights[rows], solver, 0.5, given, by_row=True)
        for rows in (slice(0, 3), slice(3, 70))
    ]
    assert np.array_equal(whole, np.concatenate(parts))
    assert ((whole == 0).sum(1) == 128).all()


def test_dead_inputs_touch_no_other() -> None:
    weights, products = layer(16, 128)
    products[5], products[:, 5] = 0, 0
    found = sparsegpt.prune(weights, Solver.of(products), 0.5, parse_pattern("2:4"))
    stays = found[:, 5] != 0
    np.testing.assert_allclose(found[stays, 5], weights[stays, 5], rtol=1e-6)
    assert np.isfinite(found).all()
