"""GPTQ against a plain reference of its column loop, its promises row by row, and what it does with a bad H."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.grids import GRIDS
from llmcompress.grids.code_bits import (
    LAYOUTS,
    book_of,
    get_codes,
    get_floats,
    lattice_of,
    layout_of,
    levels_of,
    put_floats,
)
from llmcompress.methods import FIRST_RUNG, gptq
from llmcompress.methods import solver as solvers
from llmcompress.methods.scales import refit
from llmcompress.methods.solver import DAMPING, RIDGE, RIDGE_OF_CODEBOOKS, Solver

NAMES = sorted(LAYOUTS)
BOOKS = [name for name in NAMES if book_of(GRIDS[name])]
SINGLE = [name for name in NAMES if name not in BOOKS]
TYPICAL = ("Q4_K", "Q3_K", "IQ4_XS", "Q5_0")


def weights_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """float32, heavier tails than the normal distribution's."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (rows, columns)) * 0.05).astype(np.float32)


def products_of(columns: int, tokens: int = 0, seed: int = 0, rank: int = 0) -> np.ndarray:
    """XᵀX of inputs that go together and differ in size, as a model's do."""
    rng = np.random.default_rng(seed + 1000)
    mixing = rng.standard_normal((rank or columns, columns)) / np.sqrt(columns)
    inputs = rng.standard_normal((tokens or 2 * columns, rank or columns)) @ mixing
    inputs = (inputs + 0.3 * rng.standard_normal((len(inputs), 1))) * np.exp(rng.standard_normal(columns))
    return (inputs.T @ inputs).astype(np.float32)


def errors_of(weights: np.ndarray, name: str, data: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """e H eᵀ of every row in float64."""
    errors = weights.astype(np.float64) - GRIDS[name].dequantize(data)
    return np.einsum("ri,ij,rj->r", errors, hessian.astype(np.float64), errors)


def plain_nearest(at: float, levels: np.ndarray) -> int:
    return int(np.abs(levels - at).argmin())


def plain_sweep(
    weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, offset: np.ndarray, levels: np.ndarray
):
    """Codes by the inverse of what is left of H after each column (Optimal Brain Surgeon), in float64."""
    left, codes = weights.astype(np.float64), np.zeros(weights.shape, np.uint8)
    damped = hessian.astype(np.float64)
    damped = damped + DAMPING * damped.diagonal().mean() * np.eye(len(damped))
    for j in range(weights.shape[1]):
        inverse = np.linalg.inv(damped[j:, j:])
        for row in range(len(weights)):
            step = float(scale[row, j])
            code = plain_nearest((left[row, j] - offset[row, j]) / step, levels) if step else 0
            error = left[row, j] - (offset[row, j] + step * levels[code])
            codes[row, j] = code
            left[row, j:] -= error * inverse[0] / inverse[0, 0]
    return codes


def plain_errors(errors: np.ndarray, hessian: np.ndarray) -> float:
    return float(errors @ hessian @ errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_the_sweep_is_that_of_a_plain_loop(name: str) -> None:
    columns = GRIDS[name].block
    weights, hessian = weights_of(5, columns), products_of(columns)
    data = gptq._feed_errors(weights, GRIDS[name], Solver.of(hessian), "normal")
    scale, offset = lattice_of(GRIDS[name], data)
    expected = plain_sweep(weights, hessian, scale, offset, levels_of(GRIDS[name]))
    found = get_codes(GRIDS[name], data)
    assert (found == expected).mean() > 0.98  # a tie in float32 may go the other way, and its row with it
    plain = [
        errors_of(weights, name, gptq.put_codes(GRIDS[name], data, codes), hessian)
        for codes in (found, expected)
    ]
    np.testing.assert_allclose(plain[0], plain[1], rtol=0.05)


@pytest.mark.parametrize("name", BOOKS)
def test_an_entry_is_the_best_of_all_for_its_signs_given_what_the_columns_behind_can_mend(name: str) -> None:
    grid, book = GRIDS[name], book_of(GRIDS[name])
    weights, hessian, size = weights_of(4, 256), products_of(256), book_of(GRIDS[name]).entries.shape[1]
    solver = Solver.of(hessian)
    data = gptq._feed_errors(weights, grid, solver, "fast")
    scale, rounded = lattice_of(grid, data)[0], grid.dequantize(data)
    factor = solver.factor.astype(np.float64)
    left = weights.astype(np.float64)
    for start in range(0, 256, size):
        group = slice(start, start + size)
        corner = factor[group, group]
        square = np.linalg.inv(corner.T @ corner)
        for row in range(len(weights)):
            tried = (
                left[row, group] - scale[row, group] * np.where(rounded[row, group] < 0, -1, 1) * book.entries
            )
            costs = np.einsum("ni,ij,nj->n", tried, square, tried)
            error = left[row, group] - rounded[row, group]
            assert error @ square @ error <= costs.min() * (1 + 1e-3) + 1e-6 * costs.max()
        errors = (left[:, group] - rounded[:, group]) @ np.linalg.inv(corner)
        left[:, start + size :] -= errors @ factor[group, start + size :]


@pytest.mark.slow
def test_columns_of_later_blocks_hear_of_the_errors_before_them() -> None:
    """The whole sweep over several blocks, whose scales come from the weights as they are by then."""
    grid, weights, hessian = GRIDS["Q4_0"], weights_of(4, 544, 3), products_of(544, seed=3)
    solver = Solver.of(hessian)
    data = gptq._feed_errors(weights, grid, solver, "normal")
    scale, offset = lattice_of(grid, data)
    expected = plain_sweep(weights, hessian, scale, offset, levels_of(grid))
    assert (get_codes(grid, data) == expected).mean() > 0.97


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = products_of(96)
    solver = Solver.of(hessian)
    assert solver.rung == FIRST_RUNG
    np.testing.assert_array_equal(solver.factor, np.triu(solver.factor))
    damped = hessian.astype(np.float64)
    damped += DAMPING * damped.diagonal().mean() * np.eye(96)
    factor = solver.factor.astype(np.float64)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(96), atol=1e-3)


@pytest.mark.parametrize("columns", [32, 256, 512, 800])
def test_the_number_of_threads_changes_no_bit_of_the_factor(columns: int) -> None:
    hessian, before = products_of(columns), torch.get_num_threads()
    try:
        factors = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            factors.append(Solver.of(hessian).factor)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(factors[0], factor) for factor in factors[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_worse_than_nearest_and_most_are_far_better(name: str) -> None:
    weights, hessian = weights_of(24, 512), products_of(512)
    solver = Solver.of(hessian)
    nearest = GRIDS[name].quantize(weights, solver.importance)
    before = errors_of(weights, name, nearest, hessian)
    after = errors_of(weights, name, gptq.quantize(weights, GRIDS[name], solver), hessian)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < (0.55 if name == "Q2_K" or name in BOOKS else 0.5) * before.sum()


@pytest.mark.parametrize("name", [*TYPICAL, "Q4_1", "Q2_K", "IQ3_XXS", "IQ2_S"])
def test_no_pass_over_the_blocks_raises_the_error(name: str) -> None:
    weights, hessian = weights_of(16, 512, 1), products_of(512, seed=1)
    solver, grid = Solver.of(hessian), GRIDS[name]
    data = gptq._feed_errors(weights, grid, solver, "fast")
    damped = hessian + solver.ridge(RIDGE_OF_CODEBOOKS if book_of(grid) else RIDGE) * np.eye(512)
    errors = [errors_of(weights, name, data, damped)]
    for passes in (1, 2, 4):
        settled, of_rows = gptq._settle(weights, grid, data, solver, passes)
        errors.append(errors_of(weights, name, settled, damped))
        np.testing.assert_allclose(of_rows, errors_of(weights, name, settled, hessian), rtol=1e-3)
    for earlier, later in zip(errors, errors[1:]):
        assert (later <= earlier * (1 + 1e-4)).all()
    assert errors[-1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("name", [*TYPICAL, "IQ3_S"])
def test_moved_codes_keep_their_scales_and_the_pull_follows(name: str) -> None:
    weights, hessian = weights_of(6, 256, 9), products_of(256, seed=9)
    grid = GRIDS[name]
    data = grid.quantize(weights)
    pull = (weights - grid.dequantize(data)) @ hessian
    moved = gptq._move_codes(grid, data, pull, hessian, pairs=True)
    for before, after in zip(lattice_of(grid, data), lattice_of(grid, moved)):
        np.testing.assert_array_equal(before, after)
    expected = (weights - grid.dequantize(moved)) @ hessian
    np.testing.assert_allclose(pull, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", TYPICAL)
def test_descent_ends_where_no_single_code_could_be_better(name: str) -> None:
    weights, hessian = weights_of(3, 256, 2), products_of(256, seed=2)
    grid, plain = GRIDS[name], products_of(256, seed=2).astype(np.float64)
    data = grid.quantize(weights)
    for _ in range(6):
        pull = (weights - grid.dequantize(data)) @ hessian
        data = gptq._move_codes(grid, data, pull, hessian, pairs=False)
    (scale, offset), codes, levels = lattice_of(grid, data), get_codes(grid, data), levels_of(grid)
    for row in range(len(weights)):
        errors = weights[row].astype(np.float64) - (offset[row] + scale[row] * levels[codes[row]])
        least = plain_errors(errors, plain)
        for j in range(0, 256, 5):
            for level in levels:
                moved = errors.copy()
                moved[j] = weights[row, j] - (offset[row, j] + scale[row, j] * level)
                assert plain_errors(moved, plain) >= least * (1 - 1e-4)


@pytest.mark.parametrize("name", TYPICAL)
def test_pairs_lower_what_single_codes_cannot(name: str) -> None:
    weights, hessian, grid = weights_of(12, 256, 2), products_of(256, seed=2), GRIDS[name]
    data, errors = grid.quantize(weights), []
    for pairs in (*[False] * 8, True):
        pull = (weights - grid.dequantize(data)) @ hessian
        data = gptq._move_codes(grid, data, pull, hessian, pairs)
        errors.append(errors_of(weights, name, data, hessian).sum())
    assert errors[-2] > 0.9999 * errors[-3] and errors[-1] < 0.996 * errors[-2]


@pytest.mark.parametrize("name", NAMES)
def test_a_refit_is_no_worse_and_close_to_least_squares(name: str) -> None:
    weights, hessian, grid = weights_of(5, 512, 4), products_of(512, seed=4), GRIDS[name]
    data = grid.quantize(weights)
    for place in layout_of(grid).floats:  # far from the best
        data = put_floats(grid, data, place, np.float32(1.05) * get_floats(grid, data, place))
    pull = (weights - grid.dequantize(data)) @ hessian
    errors = [errors_of(weights, name, data, hessian)]
    for _ in range(3):
        data = refit(grid, data, pull, hessian)
        errors.append(errors_of(weights, name, data, hessian))
        assert (errors[-1] <= errors[-2] * (1 + 1e-3)).all()
    assert errors[-1].sum() < 0.9 * errors[0].sum()


def test_more_effort_is_never_worse() -> None:
    weights, hessian = weights_of(16, 512, 4), products_of(512, seed=4)
    solver = Solver.of(hessian)
    fast, normal, best = (
        errors_of(weights, "Q3_K", gptq.quantize(weights, GRIDS["Q3_K"], solver, effort), hessian).sum()
        for effort in ("fast", "normal", "best")
    )
    assert normal < fast and best <= normal * 1.005


@pytest.mark.parametrize("name", TYPICAL)
def test_dead_columns_are_rounded_to_nearest(name: str) -> None:
    weights, hessian = weights_of(8, 512), products_of(512)
    dead = np.zeros(512, bool)
    dead[[0, 7, 100, 300, 511]] = True
    hessian[dead, :] = hessian[:, dead] = 0
    solver, grid = Solver.of(hessian), GRIDS[name]
    assert solver.rung == "damping 0.01"
    data = gptq.quantize(weights, grid, solver)
    scale, offset = lattice_of(grid, data)
    levels = levels_of(grid)
    codes = get_codes(grid, data)
    at = np.where(scale == 0, 0, (weights - offset) / np.where(scale == 0, 1, scale))
    for row in range(len(weights)):
        for j in np.flatnonzero(dead):
            if scale[row, j]:
                best = np.abs(levels - at[row, j]).min()
                assert abs(levels[codes[row, j]] - at[row, j]) <= best + 1e-3


def test_no_inputs_at_all_is_rounding_to_nearest() -> None:
    weights = weights_of(8, 512)
    solver = Solver.of(np.zeros((512, 512), np.float32))
    np.testing.assert_array_equal(solver.hessian, np.eye(512))
    data = gptq.quantize(weights, GRIDS["Q4_K"], solver)
    nearest = GRIDS["Q4_K"].quantize(weights, np.ones(512, np.float32))
    np.testing.assert_array_equal(data, nearest)


def test_few_tokens_leave_a_singular_matrix_that_damping_mends() -> None:
    weights, hessian = weights_of(8, 256), products_of(256, tokens=40, rank=40)
    solver = Solver.of(hessian)
    assert np.linalg.matrix_rank(hessian.astype(np.float64), tol=1e-3 * hessian.max()) < 60
    assert solver.rung == "damping 0.01" and np.isfinite(solver.factor).all()
    nearest = GRIDS["Q4_K"].quantize(weights, solver.importance)
    data = gptq.quantize(weights, GRIDS["Q4_K"], solver)
    assert (
        errors_of(weights, "Q4_K", data, hessian).sum() < errors_of(weights, "Q4_K", nearest, hessian).sum()
    )


@pytest.mark.parametrize(
    ("lowest", "rung"),
    [(0.0, "damping 0.01"), (-0.015, "damping 0.02"), (-0.3, "damping 0.32"), (-30.0, "rounded to nearest")],
)
def test_an_indefinite_matrix_climbs_the_ladder(lowest: float, rung: str) -> None:
    matrix = np.eye(256, dtype=np.float32)
    matrix[:2, :2] = [[1, 1 - lowest], [1 - lowest, 1]]  # its eigenvalues are lowest, 2 - lowest, and ones
    solver, weights, grid = Solver.of(matrix), weights_of(8, 256), GRIDS["Q4_K"]
    assert solver.rung.startswith(rung)
    data = gptq.quantize(weights, grid, solver)
    assert np.isfinite(grid.dequantize(data)).all()
    if solver.factor is None:
        np.testing.assert_array_equal(data, grid.quantize(weights, solver.importance))


def test_the_last_rungs_are_a_floor_and_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, tried = products_of(64), []
    factor = solvers._inverse_factor

    def fails_until(wanted: str):
        def attempt(matrix: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
            tried.append((matrix.dtype, float(added)))
            mean = float(matrix.diagonal().mean())
            kind = (
                "float64"
                if matrix.dtype == torch.float64
                else "floor"
                if added > 1.0000001 * mean
                else "damping"
            )
            return factor(matrix, added) if kind == wanted else None

        return attempt

    for wanted, rung in (("floor", "a floor under the diagonal"), ("float64", "float64")):
        monkeypatch.setattr(solvers, "_inverse_factor", fails_until(wanted))
        solver = Solver.of(hessian)
        assert solver.rung == rung and solver.factor.dtype == np.float32
    dampings = [added for dtype, added in tried[:7]]
    assert np.allclose(np.divide(dampings[1:], dampings[:-1]), 2)


def test_a_type_without_a_layout_is_rounded_to_nearest() -> None:
    weights, solver = weights_of(4, 256), Solver.of(products_of(256))
    for name in ("Q8_0", "MXFP4", "F16"):
        assert not gptq.supports(GRIDS[name])
        np.testing.assert_array_equal(
            gptq.quantize(weights, GRIDS[name], solver), GRIDS[name].quantize(weights, solver.importance)
        )


def test_the_caller_s_arrays_and_the_random_state_are_left_alone() -> None:
    weights, products = weights_of(8, 256), products_of(256)
    products[5] = products[:, 5] = 0
    kept = weights.copy(), products.copy()
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = gptq.quantize(weights, GRIDS["Q4_K"], Solver.of(products))
    again = gptq.quantize(weights, GRIDS["Q4_K"], Solver.of(products))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(weights, kept[0])
    np.testing.assert_array_equal(products, kept[1])
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TYPICAL, "IQ3_XXS"])
def test_rows_are_alone_whatever_slab_and_thread_they_are_in(name: str) -> None:
    weights, solver = weights_of(37, 768, 6), Solver.of(products_of(768, seed=6))
    whole = gptq.quantize(weights, GRIDS[name], solver)
    for size in (1, 5, 16):
        slabs = [weights[first : first + size] for first in range(0, len(weights), size)]
        with ThreadPoolExecutor(4) as threads:
            parts = list(threads.map(lambda slab: gptq.quantize(slab, GRIDS[name], solver), slabs))
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"slabs of {size} rows")


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 600),
    size=st.sampled_from([1e-6, 1.0, 100.0]),
    inputs=st.sampled_from([1e-4, 1.0, 1e3]),
    outlier=st.booleans(),
)
def test_any_weights_and_inputs_give_rows_no_worse_than_nearest(
    name: str, rows: int, blocks: int, seed: int, tokens: int, size: float, inputs: float, outlier: bool
) -> None:
    columns = GRIDS[name].block * blocks
    weights = weights_of(rows, columns, seed) * np.float32(size)
    if outlier:
        weights[0, seed % columns] *= 1000
    products = products_of(columns, tokens, seed) * np.float32(inputs)
    solver = Solver.of(products)
    data = gptq.quantize(weights, GRIDS[name], solver)
    assert np.isfinite(GRIDS[name].dequantize(data)).all()
    nearest = GRIDS[name].quantize(weights, solver.importance)
    before, after = (errors_of(weights, name, found, solver.hessian) for found in (nearest, data))
    sizes = np.abs(weights.astype(np.float64) - GRIDS[name].dequantize(nearest))
    terms = np.einsum("ri,ij,rj->r", sizes, np.abs(solver.hessian).astype(np.float64), sizes)
    assert (after <= before * (1 + 1e-4) + 1e-5 * terms).all()  # what float32 makes of sums of such terms
