"""Q1_0 and Q2_0 against ggml."""

from __future__ import annotations

import numpy as np
import pytest
from llama_cpp import Ggml
from test_ternary import three_levels

from llmcompress.grids.binary import Q1_0, Q2_0

NORMAL = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)


@pytest.mark.parametrize("x", [NORMAL, NORMAL * 1e-3, -abs(NORMAL), np.full((1, 128), -0.0, np.float32)])
def test_q1_0_has_ggmls_bytes(x):
    assert np.array_equal(Q1_0.quantize(x), Ggml().quantize(x, Q1_0.ggml_type))


def test_q2_0_keeps_three_levels_exactly():
    x = three_levels()
    assert np.array_equal(Q2_0.dequantize(Q2_0.quantize(x)), x)


def test_q2_0_uses_all_four_levels():
    """ggml takes the largest weight for d, so that 2 d never occurs."""
    x = np.tile(np.float32([-0.5, 0, 0.5, 1]), 16)[None]
    assert np.array_equal(Q2_0.dequantize(Q2_0.quantize(x)), x)
    assert np.array_equal(Q2_0.dequantize(Q2_0.quantize(-x)), -x)
