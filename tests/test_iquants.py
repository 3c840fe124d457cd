"""IQ1, IQ2 and IQ3 against a search that leaves nothing out, and against bytes written down."""

from __future__ import annotations

import numpy as np
import pytest
from codebook_reference import SUB_BLOCK, least_error
from objectives import error_weights

from llmcompress.grids import GRIDS

# Our error over that of the exhaustive search. It holds that d is stored larger than least squares has it.
ALLOWED = {
    "IQ2_XXS": 1.06, "IQ2_XS": 1.07, "IQ2_S": 1.07, "IQ3_XXS": 1.06, "IQ3_S": 1.11, "IQ1_S": 1.06,
    "IQ1_M": 1.1,
}  # fmt: skip


def blocks() -> np.ndarray:
    rng = np.random.default_rng(3)
    made = [rng.standard_normal((2, 256)), rng.standard_t(4, (2, 256))]
    return np.concatenate(made).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUB_BLOCK)
def test_the_search_is_near_one_that_leaves_nothing_out(name):
    """In weighted error over four blocks, with importance 1."""
    grid, x, ones = GRIDS[name], blocks(), np.ones(256, np.float32)
    w = error_weights(name, x, ones)
    decoded = grid.dequantize(grid.quantize(x, ones))
    ours = (w * (decoded - x.astype(np.float64)) ** 2).sum()
    least = sum(least_error(name, *block) for block in zip(x.astype(np.float64), w))
    assert 0.995 * least < ours < ALLOWED[name] * least  # d has its place between those the reference tries


GOLDEN = {
    "IQ2_XXS": "d729" + ("55ff55ff" + "7fc01fe0") * 8,
    "IQ2_XS": "9a29" + "96feef01" * 16 + "ff" * 8,
    "IQ2_S": "f529" + "50f1" * 16 + "ff00" * 16 + "ee" * 16,
    "IQ3_XXS": "d124" + "a31e6de5" * 16 + "7fc01ff0" * 8,
    "IQ3_S": "0425" + "5221dbd3" * 16 + "99" * 8 + "ff00" * 16 + "ff" * 4,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    """A block of -8, -7 ... 7 over and over, whose bytes any machine must give."""
    x = (np.arange(256) % 16 - 8).astype(np.float32)[None]
    assert GRIDS[name].quantize(x).tobytes().hex() == GOLDEN[name]


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_odd_sets_get_one_wrong_sign(name):
    """Where an odd number of eight weights is negative, one changes its sign: here the smallest."""
    x = np.full((1, 256), 3.0, np.float32)
    x[:, ::8], x[:, 1::8] = -3.0, 0.5
    decoded = GRIDS[name].dequantize(GRIDS[name].quantize(x))
    wrong = np.signbit(decoded) != np.signbit(x)
    assert (wrong.reshape(-1, 8) == (np.arange(8) == 1)).all()
