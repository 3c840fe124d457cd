"""Pruning in the sweep that quantizes: zeros stay zeros, and the rest makes up for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llmcompress.converters.to_gguf import plan_gguf
from test_sparsegpt import error, layer

import llmcompress
from llmcompress.errors import LlmcompressError, RecipeError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import GRIDS
from llmcompress.grids.integer import integer_grid
from llmcompress.methods import gptq, joint, sparsegpt
from llmcompress.methods.exact_zero import keeps_zeros, zero_code
from llmcompress.methods.joint import Pruning
from llmcompress.methods.masks import parse_pattern
from llmcompress.methods.solver import Solver
from llmcompress.recipe import parse_recipe

EXACT = {"Q3_K": 4, "Q6_K": 32, "Q4_0": 8, "Q5_0": 16}
GIVEN = {"method": "gptq", "calibrate": True, "data": ["prose"], "tokens": 3000}


def test_which_formats_hold_an_exact_zero() -> None:
    found = {name: zero_code(grid) for name, grid in GRIDS.items()}
    assert {name: found[name] for name in EXACT} == EXACT
    assert keeps_zeros(GRIDS["Q8_0"]) and keeps_zeros(GRIDS["BF16"]) and not keeps_zeros(GRIDS["Q4_K"])
    assert all(
        found[name] is None for name in ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "IQ4_NL", "IQ4_XS", "IQ3_S", "F16")
    )
    assert zero_code(integer_grid(4, 128, True)) == 8 and zero_code(integer_grid(4, 128, False)) is None


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["Q3_K", "Q6_K", "Q8_0", "int4", "int4 act-order"])
@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_jointly_is_better_than_rounding_what_is_left(grid: str, pattern: str) -> None:
    weights, products = layer(48, 512)
    solver, act_order = Solver.of(products), grid.endswith("order")
    kind = integer_grid(4, 128, True) if grid.startswith("int4") else GRIDS[grid]
    pruning = Pruning(0.5, parse_pattern(pattern) if pattern else None)
    found = kind.dequantize(joint.quantize(weights, kind, solver, None, "normal", pruning, act_order))
    swept = sparsegpt.prune(weights, solver, 0.5, pruning.pattern, by_row=True)
    after = kind.dequantize(kind.quantize(swept, solver.importance, "normal"))
    assert ((found == 0).sum(1) >= 256).all()
    assert not pattern or ((found.reshape(-1, 4) == 0).sum(1) >= 2).all()
    if grid == "Q8_0":  # whose codes GPTQ does not choose
        assert np.array_equal(found, after)
    else:
        assert error(weights, found, products) < error(weights, after, products)
        once = kind.dequantize(gptq.quantize(swept, kind, solver, "normal", act_order, swept == 0))
        share = 1 if grid == "Q6_K" else 0.97  # whose errors are small beside those of what went
        assert error(weights, found, products) < share * error(weights, once, products)


def test_rows_do_not_depend_on_each_other() -> None:
    weights, products = layer(40, 256)
    solver, grid = Solver.of(products), GRIDS["Q3_K"]
    whole = joint.quantize(weights, grid, solver, None, "normal", Pruning(0.4))
    parts = [
        joint.quantize(weights[rows], grid, solver, None, "normal", Pruning(0.4))
        for rows in (slice(0, 7), slice(7, 40))
    ]
    assert np.array_equal(whole, np.concatenate(parts))


def test_without_inputs_it_is_wanda_and_the_nearest() -> None:
    weights, products = layer(8, 256)
    importance = products.diagonal() / 768
    found = GRIDS["Q8_0"].dequantize(
        joint.quantize(weights, GRIDS["Q8_0"], None, importance, "normal", Pruning(0.5))
    )
    assert ((found == 0).sum(1) >= 128).all() and np.abs(found - weights)[found != 0].max() < 0.05


@pytest.mark.slow
def test_a_gguf_keeps_the_zeros_and_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    llmcompress.quantize(tiny("llama-tied"), out, type="Q3_K_S", pattern="2:4", **GIVEN)
    with GGUFFile.open(out) as file:
        for name, tensor in file.tensors.items():
            if name.startswith("blk.") and tensor.type.name == "Q3_K":
                weights = GRIDS["Q3_K"].dequantize(file.read(name))
                assert ((weights.reshape(-1, 4) == 0).sum(1) >= 2).all(), name
    with llama_cpp.Model(out) as model:
        assert np.isfinite(model.logits([1, 5, 300, 17])).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"format": "gptq", "bits": 4, "group_size": 64}, {"format": "nf4"}])
def test_checkpoints_keep_the_zeros(options: dict, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from llmcompress.checkpoint import Checkpoint

    out = tmp_path / "out"
    llmcompress.quantize(tiny("llama-tied"), out, sparsity=0.5, **GIVEN, **options)
    with Checkpoint.open(out) as made:
        weights = made.read("model.layers.1.mlp.up_proj.weight")
        if weights.dtype == np.uint16:
            weights = (weights.astype(np.uint32) << 16).view(np.float32)
    assert ((weights == 0).sum(1) >= weights.shape[1] // 2).all()


def test_the_plan_says_where_zeros_do_not_survive(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def notes(type: str) -> str:
        recipe = parse_recipe({"types": type, "sparsity": 0.5, **GIVEN})
        plan = plan_gguf(tiny("llama-tied"), tmp_path / "out.gguf", recipe)
        plan.checkpoint.close()
        return " ".join(plan.notes)

    assert "zeros will not survive in" in notes("Q4_K_M") and "zeros" not in notes("Q6_K")


@pytest.mark.slow
def test_a_pruned_model_keeps_its_zeros_if_asked(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """And the plan says that gptq fills them, if not."""
    pruned, given = tmp_path / "pruned", {"type": "Q3_K_S", "pure": True, **GIVEN}
    llmcompress.prune(tiny("llama-tied"), pruned, method="magnitude", sparsity=0.5)
    found = {}
    for held in (False, True):
        result = llmcompress.quantize(pruned, tmp_path / "out.gguf", keep_zeros=held, **given)
        assert any("gptq fills zeros" in note for note in result.notes) != held
        with GGUFFile.open(tmp_path / "out.gguf") as file:
            values = GRIDS["Q3_K"].dequantize(file.read("blk.1.ffn_up.weight"))
        found[held] = float((values == 0).mean())
    assert found[False] < 0.5 <= found[True]


BAD = [
    ({"keep_zeros": True}, "rounding to nearest keeps them"),
    ({"keep_zeros": True, "sparsity": 0.5, **GIVEN}, "leave one out"),
    ({"sparsity": 0.5}, "add --method gptq"),
    ({"pattern": "2:4"}, "add --method gptq"),
    ({"sparsity": 1.5, **GIVEN}, "no share"),
    ({"sparsity": "x", **GIVEN}, "cannot be"),
    ({"pattern": "4:2", **GIVEN}, "write it N:M"),
    ({"pattern": "2:4", "sparsity": 0.7, **GIVEN}, "a sparsity of 0.5"),
]


@pytest.mark.parametrize("given, words", BAD)
def test_recipes_that_make_no_sense(given: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(given)


def test_rows_that_do_not_divide(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match="no multiple of 7"):
        llmcompress.quantize(tiny("llama-tied"), tmp_path / "out.gguf", type="Q6_K", pattern="3:7", **GIVEN)
