"""Integer grids: the fit against a dense search and the usual min-max, and words against the format's own description."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.grids.integer import BITS, IntegerGrid, integer_grid
from llmcompress.grids.words import pack_words

GRIDS = [(bits, group, symmetric) for bits in BITS for group in (32, 128) for symmetric in (True, False)]


def normal(rows: int = 16, columns: int = 256, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, columns)) * random.uniform(0.01, 2, (rows, 1))).astype(np.float32)


def importance_of(columns: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(0, 1.5, columns).astype(np.float32)


def decoded(grid: IntegerGrid, data: np.ndarray) -> np.ndarray:
    scales, zeros, codes = grid.parts(data)
    runs = codes.reshape(*scales.shape, -1).astype(np.float64)
    return ((runs - zeros[..., None]) * scales[..., None].astype(np.float64)).reshape(codes.shape)


def group_errors(x: np.ndarray, values: np.ndarray, importance: np.ndarray, group: int) -> np.ndarray:
    return ((values - x) ** 2 * importance).reshape(len(x), -1, group).sum(-1)


def min_max(x: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """What AutoGPTQ's quantizer does without a search."""
    runs, top = x.reshape(len(x), -1, group).astype(np.float64), 2**bits - 1
    low, high = np.minimum(runs.min(-1, keepdims=True), 0), np.maximum(runs.max(-1, keepdims=True), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = (high - low) / top
    zero = (top + 1) / 2 if symmetric else np.rint(-low / scale)
    return ((np.clip(np.rint(runs / scale) + zero, 0, top) - zero) * scale).reshape(x.shape)


def dense_search(x: np.ndarray, importance: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """The least error of each group over 1500 scales and every zero near the best one."""
    runs, w = x.reshape(len(x), -1, group).astype(np.float64), importance.reshape(1, -1, group)
    top, peak = 2**bits - 1, np.abs(runs).max(-1, keepdims=True)
    best = np.full(runs.shape[:2], np.inf)
    for finest in np.geomspace(0.2, 2.4, 1500) / 2 ** (bits - 1):
        for sign in (1, -1) if symmetric else (1,):
            scale = sign * peak * finest
            codes = np.rint(runs / scale)
            for zero in [2 ** (bits - 1)] if symmetric else range(top + 1):
                error = ((np.clip(codes, -zero, top - zero) * scale - runs) ** 2 * w).sum(-1)
                best = np.minimum(best, error)
    return best


@pytest.mark.parametrize("bits, group, symmetric", GRIDS)
def test_rows_decode_by_the_formula_and_every_code_is_the_nearest(
    bits: int, group: int, symmetric: bool
) -> None:
    grid, x = integer_grid(bits, group, symmetric), normal()
    data = grid.quantize(x, importance_of(256))
    scales, zeros, codes = grid.parts(data)
    values = decoded(grid, data)
    assert np.allclose(grid.dequantize(data), values, rtol=1e-6, atol=0)
    assert codes.max() < 2**bits and zeros.max() < 2**bits
    assert not symmetric or (zeros == 2 ** (bits - 1)).all()
    step = np.repeat(np.abs(scales.astype(np.float64)), group, axis=1)
    middle = (codes > 0) & (codes < 2**bits - 1)
    assert (np.abs(values - x)[middle] <= 0.5000001 * step[middle]).all()


@pytest.mark.parametrize("bits, group, symmetric", GRIDS)
def test_the_fit_beats_min_max(bits: int, group: int, symmetric: bool) -> None:
    grid, x, importance = integer_grid(bits, group, symmetric), normal(), importance_of(256)
    ours = group_errors(x, decoded(grid, grid.quantize(x, importance)), importance, group)
    theirs = group_errors(x, min_max(x, bits, group, symmetric), importance, group)
    assert ours.sum() <= theirs.sum() * {2: 0.6, 3: 0.8, 4: 0.95, 8: 1.0}[bits]


@pytest.mark.parametrize("bits, symmetric", [(2, True), (2, False), (3, True), (3, False), (4, True)])
def test_the_fit_is_near_the_best_of_a_dense_search(bits: int, symmetric: bool) -> None:
    grid, x, importance = integer_grid(bits, 64, symmetric), normal(8, 128), importance_of(128)
    best = dense_search(x, importance, bits, 64, symmetric)
    errors = {
        effort: group_errors(x, decoded(grid, grid.quantize(x, importance, effort)), importance, 64).sum()
        for effort in ("fast", "normal", "best")
    }
    assert errors["best"] <= errors["normal"] * 1.001 and errors["normal"] <= errors["fast"] * 1.001
    assert errors["normal"] <= 1.05 * best.sum()


def test_rows_do_not_depend_on_their_company() -> None:
    grid, x = integer_grid(4, 128, True), normal(64)
    whole = grid.quantize(x, importance_of(256))
    parts = [grid.quantize(x[first : first + 7], importance_of(256)) for first in range(0, 64, 7)]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_strange_rows_decode_to_finite_numbers(bits: int, symmetric: bool) -> None:
    x = np.zeros((6, 64), np.float32)
    x[1] = 3.0
    x[2, 5] = -1e30
    x[3] = 1e-12
    x[4, ::2] = 1e-30
    x[5, 7] = 1.0
    grid = integer_grid(bits, 32, symmetric)
    for importance in (None, np.zeros(64, np.float32), np.full(64, 1e-30, np.float32)):
        values = grid.dequantize(grid.quantize(x, importance))
        assert np.isfinite(values).all() and not values[0].any()
        assert abs(values[5, 7] - 1) < 0.01 and np.allclose(values[1], 3, rtol=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_one_stream_of_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 5), np.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == np.int32 and words.shape == (96 * bits // 32, 5)
    for column in range(5):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        assert stream.to_bytes(12 * bits, "little") == words[:, column].astype("<i4").tobytes()


def test_three_bits_cross_words_where_autogptq_has_them() -> None:
    def packed(place: int) -> list[int]:
        codes = np.zeros((32, 1), np.uint8)
        codes[place] = 7
        return [int(word) & 0xFFFFFFFF for word in pack_words(codes, 3)[:, 0]]

    assert packed(0) == [7, 0, 0]
    assert packed(10) == [3 << 30, 1, 0]
    assert packed(11) == [0, 7 << 1, 0]
    assert packed(21) == [0, 1 << 31, 3]
    assert packed(22) == [0, 0, 7 << 2]
    assert packed(31) == [0, 0, 7 << 29]
