"""Types for rows that do not divide into 256: llama.cpp's, or the best by measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llmcompress.converters.to_gguf import plan_gguf
from synthetic_checkpoint import Llama, write_checkpoint

from llmcompress.errors import RecipeError
from llmcompress.fallback import candidates, sample, squared_error
from llmcompress.grids import GRIDS
from llmcompress.recipe import Recipe
from llmcompress.slab import read_slab
from llmcompress.step import Step

ODD = Llama(layers=2, hidden=288, feed_forward=544, heads=6, kv_heads=2)  # multiples of 32 only


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "model", ODD)


def test_the_best_by_measure_is_not_larger_and_nearer(odd, tmp_path):
    """Held against the errors of whole tensors."""
    usual = plan_gguf(odd, tmp_path / "a.gguf", Recipe(types=("Q2_K",)))
    best = plan_gguf(odd, tmp_path / "a.gguf", Recipe(types=("Q2_K",), fallback="best"))
    changed = 0
    for step, before, after in zip(best.steps, usual.outputs[0].placements, best.outputs[0].placements):
        assert after.nbytes <= before.nbytes
        if after.grid != before.grid:
            changed += 1
            weights = np.concatenate(
                [read_slab(best.checkpoint, step, slab).float32 for slab in sample(step)]
            )
            grids = (after.grid, before.grid)
            nearer, farther = (squared_error(grid, weights, None, "normal") for grid in grids)
            assert nearer < farther
            assert f"{after.grid.name} has {nearer / farther:.3f} of its squared error" in after.reason
            assert before.reason in after.reason
    assert changed
    assert best.fingerprint() != usual.fingerprint()


def test_rows_that_divide_keep_their_type(tmp_path):
    model = write_checkpoint(tmp_path / "model", Llama(layers=1, hidden=256, feed_forward=512))
    recipes = [Recipe(types=("Q2_K",), fallback=fallback) for fallback in ("llama.cpp", "best")]
    usual, best = (plan_gguf(model, tmp_path / "a.gguf", recipe) for recipe in recipes)
    assert usual.outputs[0].placements[-1].grid == best.outputs[0].placements[-1].grid
    assert [p.reason for p in usual.outputs[0].placements] == [p.reason for p in best.outputs[0].placements]


def test_candidates_take_the_rows_in_no_more_bytes():
    names = candidates(GRIDS["Q4_0"], 288)
    assert names[0] == "Q4_0" and names.count("Q4_0") == 1
    assert {"IQ4_NL", "MXFP4"} <= set(names)
    for name in names:
        assert 288 % GRIDS[name].block == 0
        assert GRIDS[name].row_bytes(288) <= GRIDS["Q4_0"].row_bytes(288)


def test_a_sample_is_spread_over_the_tensor():
    slabs = sample(Step("x", (5000, 512), (), computed=np.zeros((5000, 512), np.float32)))
    assert len(slabs) == 4
    assert slabs[0].first == 0 and slabs[-1].first + slabs[-1].rows == 5000


def test_importance_weighs_columns():
    grid = GRIDS["Q4_0"]
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[::2] = 0
    error = (grid.dequantize(grid.quantize(weights, importance)).astype(np.float64) - weights)[:, 1::2]
    assert squared_error(grid, weights, importance, "normal") == pytest.approx((error**2).sum())


def test_a_fallback_is_one_of_two():
    with pytest.raises(RecipeError, match="fallback: 'bst' is none of llama.cpp, best; did you mean 'best'"):
        Recipe(fallback="bst")
