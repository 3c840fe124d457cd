"""Gains by noise, against a whole model with the same noise; what is measured together, and what is told where nothing can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llmcompress.converters import measured_gains
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model, rows_of
from llmcompress.converters.measured_gains import NOISE, NoisyCheckpoint, parts_of
from llmcompress.converters.to_gguf import measure_gguf, plan_gguf
from transformers import AutoModelForCausalLM

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RecipeError, RunError
from llmcompress.gains import completed
from llmcompress.hessians import HessianFolder
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.sensitivity import Sensitivity
from llmcompress.slab import read_slab
from llmcompress.step import slabs_of

# A head of its own; norms behind the matrices, an embedding that is scaled and the head, too; stacked experts.
MODELS = ("llama", "gemma3", "qwen3moe-fused")


TOKENS = 512


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_gains, "TOKENS", TOKENS)


def sums_of(model: Path) -> Recipe:
    """A recipe with the XᵀX of a few tokens, and the text they are from."""
    folder = model.with_name(f"{model.name}-hessian")
    if not folder.exists():
        options = CalibrationOptions(data=("prose",), tokens=TOKENS)
        calibrate_model(model, folder.with_suffix(".gguf"), options, Progress(), folder)
    return Recipe(hessian=str(folder), data=("prose",))


@pytest.fixture
def measured(tiny: Callable[[str], Path]) -> Callable[[str], tuple[Path, Recipe, Sensitivity]]:
    def of(name: str) -> tuple[Path, Recipe, Sensitivity]:
        model = tiny(name)
        recipe = sums_of(model)
        return model, recipe, measure_gguf(model, recipe, ("Q8_0", "Q5_0", "Q4_K"))

    return of


def kept_spreads(monkeypatch: pytest.MonkeyPatch) -> list[NoisyCheckpoint]:
    """The checkpoints with noise that are made from here on."""
    made: list[NoisyCheckpoint] = []

    class Kept(NoisyCheckpoint):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(measured_gains, "NoisyCheckpoint", Kept)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_gain_is_what_noise_does_to_the_whole_model(name: str, measured: Callable, monkeypatch) -> None:
    made = kept_spreads(monkeypatch)
    model, recipe, found = measured(name)
    noisy = made[0]
    plan = plan_gguf(model, "x.gguf", recipe)
    rows = rows_of(plan.checkpoint, CalibrationOptions(data=recipe.data, tokens=TOKENS)).rows
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    parts = parts_of([step for step in plan.steps if step.name in found.errors])
    assert {step for part in parts for step in part.steps} == set(found.gains) == set(found.errors)
    with torch.no_grad():
        reference = [torch.log_softmax(whole(torch.from_numpy(row)[None]).logits[0, :-1], -1) for row in rows]
        for part in parts[:: max(1, len(parts) // 4)] + parts[-1:]:
            for tensor in part.tensors:
                held = whole.state_dict()
                if tensor not in held:
                    break
                with noisy.disturbed([tensor]):
                    values = noisy.read(tensor)
                held[tensor].copy_(torch.from_numpy(values).view(held[tensor].shape))
            else:
                kl = [
                    (was.exp() * (was - torch.log_softmax(whole(torch.from_numpy(row)[None]).logits[0, :-1], -1)))
                    .sum(-1).double()
                    for was, row in zip(reference, rows)
                ]  # fmt: skip
                wanted = torch.cat(kl).mean().item() / NOISE / len(part.steps)
                for step in part.steps:
                    assert found.gains[step] == pytest.approx(wanted, rel=0.05), step
            for tensor in part.tensors:
                if tensor in held:
                    held[tensor].copy_(torch.from_numpy(noisy.read(tensor)).view(held[tensor].shape))


@pytest.mark.slow
def test_noise_is_a_known_share_of_what_a_tensor_puts_out(measured: Callable, monkeypatch) -> None:
    made = kept_spreads(monkeypatch)
    model, recipe, found = measured("llama")
    assert measure_gguf(model, recipe, ("Q8_0",)).gains == found.gains and min(found.gains.values()) > 0
    noisy, sums = made[0], HessianFolder(recipe.hessian)
    steps = {step.name: step for step in plan_gguf(model, "x.gguf", recipe).steps}
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_output.weight", "output.weight"):
        step = steps[name]
        (piece,) = step.pieces
        products = sums.products(name, 0).astype(np.float64)
        clean = noisy.read(piece.tensor.name).astype(np.float64)
        with noisy.disturbed([piece.tensor.name]):
            noise = noisy.read(piece.tensor.name) - clean
            again = noisy.read(piece.tensor.name) - clean
        assert np.array_equal(noise, again)
        share = np.einsum("rc,cd,rd", noise, products, noise) / np.einsum("rc,cd,rd", clean, products, clean)
        assert share == pytest.approx(NOISE, rel=0.2), name
    (slab, *_) = slabs_of(0, steps["blk.0.attn_q.weight"], 2**30)
    assert np.array_equal(
        read_slab(noisy, steps["blk.0.attn_q.weight"], slab).float32,
        read_slab(Checkpoint.open(model), steps["blk.0.attn_q.weight"], slab).float32,
    )  # undisturbed


def test_steps_of_one_tensor_are_disturbed_together(tiny: Callable) -> None:
    steps = plan_gguf(tiny("qwen3moe-fused"), "x.gguf", Recipe()).steps
    together = [set(part.steps) for part in parts_of(steps) if len(part.steps) > 1]
    assert {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"} in together
    assert sum(len(part.steps) for part in parts_of(steps)) == len(steps)


def test_what_is_not_measured_is_predicted_on_the_same_scale() -> None:
    found = completed({"a": 4.0, "b": 20.0, "c": 1.0}, {"a": 2.0, "b": 2.0, "c": 1.0, "d": 5.0})
    assert found == {"a": 4.0, "b": 20.0, "c": 1.0, "d": 10.0}
    assert completed({}, {"a": 2.0}) == {"a": 2.0}


def test_a_model_that_cannot_be_run_is_predicted_and_said(tiny: Callable, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RunError("its blocks return more than hidden states")

    monkeypatch.setattr(measured_gains, "measure_gains", fails)
    model = tiny("llama")
    plan = plan_gguf(
        model, "x.gguf", Recipe(target_bpw=6.0, types=("Q4_K_M",), hessian=sums_of(model).hessian)
    )
    assert any("predicted, not measured: its blocks return more" in note for note in plan.notes)
    assert not measure_gguf(model, sums_of(model), ("Q8_0",), gains="predicted").gains
    assert not measure_gguf(model, Recipe(), ("Q8_0",)).gains  # nothing says what its inputs are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gains": "guessed", "target_bpw": 4.0}, "'guessed' is none of measured, predicted"),
        ({"gains": "predicted"}, "is for a target"),
        ({"gains": "predicted", "target_bpw": 4.0, "sensitivity": "x.json"}, "are in the sensitivity file"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**options)
