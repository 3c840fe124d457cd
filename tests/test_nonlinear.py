"""IQ4_NL and IQ4_XS: levels that are not evenly spaced."""

from __future__ import annotations

import gguf
import numpy as np
from numba import njit

from llmcompress.grids.lanes import load, store
from llmcompress.grids.nonlinear import IQ4_NL, IQ4_XS, LEVELS, nearest_level, nearest_level_code


@njit(error_model="numpy")
def levels_of(values, levels, codes):
    for i in range(len(values)):
        store(levels, i, nearest_level(load(values, i)))
        store(codes, i, nearest_level_code(load(values, i)))


def test_levels_are_gguf_pys():
    assert LEVELS.tolist() == list(gguf.quants.IQ4_NL.kvalues)


def test_every_value_gets_its_nearest_level():
    """Among them the middles between levels, which go to the lower one, and their neighbours in float32."""
    middles = ((LEVELS[1:].astype(float) + LEVELS[:-1]) / 2).astype(np.float32)
    edges = [middles, np.nextafter(middles, np.float32(-999)), np.nextafter(middles, np.float32(999))]
    far = [np.linspace(-200, 200, 4001, dtype=np.float32), np.float32([1e30, -1e30, np.inf, -np.inf])]
    x = np.resize(np.concatenate([*edges, *far]), (300, 16))
    levels, codes = np.empty_like(x), np.empty_like(x)
    levels_of(x, levels, codes)
    expected = np.searchsorted(middles, x)
    assert np.array_equal(codes, expected)
    assert np.array_equal(levels, LEVELS[expected])


def test_a_super_block_takes_scales_of_both_signs():
    rng = np.random.default_rng(1)
    codes, scales = rng.integers(0, 16, (8, 32)), np.array([-32, 31, -20, 17, 5, -3, 9, 1])
    codes[:, 0] = 0  # the level of the largest size, which tells the sign
    x = (LEVELS[codes] * scales[:, None] * np.float32(0.25)).reshape(1, 256).astype(np.float32)
    assert np.array_equal(IQ4_XS.dequantize(IQ4_XS.quantize(x)), x)


def test_one_block_on_the_levels_is_exact():
    x = (LEVELS[np.random.default_rng(2).permutation(np.arange(32) % 16)] * np.float32(-0.125))[None]
    assert np.array_equal(IQ4_NL.dequantize(IQ4_NL.quantize(x)), x)
