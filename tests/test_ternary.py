"""TQ1_0 and TQ2_0: what BitNet's weights become."""

from __future__ import annotations

import numpy as np
import pytest
from llama_cpp import Ggml

from llmcompress.grids.ternary import TQ1_0, TQ2_0


def three_levels() -> np.ndarray:
    """Blocks of -s, 0 and s, from almost empty to full, s in bfloat16."""
    rng = np.random.default_rng(1)
    signs = rng.choice([-1, 1], (64, 1024)) * (rng.random((64, 1024)) < rng.uniform(0.02, 1, (64, 1)))
    scales = (10.0 ** rng.uniform(-3, 2, (64, 1))).astype(np.float32)
    return (signs * (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)).astype(np.float32)


@pytest.mark.parametrize("grid", [TQ1_0, TQ2_0], ids=lambda grid: grid.name)
def test_three_levels_are_exact_and_have_ggmls_bytes(grid):
    x = three_levels()
    data = grid.quantize(x)
    assert np.array_equal(grid.dequantize(data), x)
    assert np.array_equal(data, Ggml().quantize(x, grid.ggml_type))
    importance = np.random.default_rng(2).lognormal(0, 1, x.shape[1]).astype(np.float32)
    assert np.array_equal(grid.dequantize(grid.quantize(x, importance)), x)


@pytest.mark.parametrize("grid", [TQ1_0, TQ2_0], ids=lambda grid: grid.name)
def test_the_scale_is_within_two_percent_of_the_best(grid):
    """The best d leaves out the smallest weights: try every number of them."""
    x = np.random.default_rng(3).standard_t(4, (200, 256)).astype(np.float32)
    sizes = -np.sort(-abs(x.astype(np.float64)))
    gains = np.cumsum(sizes, 1) ** 2 / np.arange(1, 257)
    best = (sizes**2).sum() - gains.max(1).sum()
    error = ((grid.dequantize(grid.quantize(x)) - x.astype(np.float64)) ** 2).sum()
    assert best * 0.999 <= error <= best * 1.02
