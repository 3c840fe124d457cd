"""Leaving out decoder layers: the folder against transformers with that layer passed over, and what is chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Model
from llmcompress.converters import dropping
from llmcompress.converters.calibration import rows_of
from llmcompress.converters.dropping import drop_layers, state_file
from llmcompress.converters.smaller_folder import calibration_options
from test_architectures import assert_same_logits, ids_of
from tiny_families import MORE
from tiny_models import MODELS

import llmcompress
from llmcompress.blocks import Lockstep, decoder_blocks
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RecipeError
from llmcompress.methods import layers
from llmcompress.progress import Progress
from llmcompress.structure_options import StructureOptions, parse_layers


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(folder: Path, ids: list[int], passed: tuple[int, ...] = ()) -> np.ndarray:
    """transformers' logits; the layers `passed` give what they get."""
    model = load(folder)
    for layer in passed:
        block = decoder_blocks(model)[1][layer]
        forward = block.forward

        def identity(hidden, *args, forward=forward, **kwargs):
            output = forward(hidden, *args, **kwargs)
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        block.forward = identity
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def drop(model: Path, out: Path, *dropped: int):
    return drop_layers(model, out, StructureOptions("layers", layers=dropped))


REFUSED = {
    "gemma3n": "has a share for each layer",
    "gemma4": "num_kv_shared_layers is 2: its last layers take keys and values of earlier ones",
    **dict.fromkeys(("nemotron-h", "nemotron-h-moe", "nemotron-h-latent"), "nothing says how many layers"),
    **dict.fromkeys(("falcon-h1", "falcon-h1-norm"), "mlp_multipliers has 2 values"),
    "glm-dsa": "indexer_types has 3 values, as many as there are layers; whether they are the layers' is not known",
    "jamba": "layer 1 would have .* where it has .* config.json of this model cannot say",
}
LLAMA_CPP_COUNTS = ("gemma2", "gemma3")  # which layers slide: no key says so
QUICK = ("llama", "qwen3", "gemma3", "gpt2", "mixtral")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*MODELS, *MORE)]
)
def test_a_model_without_a_layer_is_the_model_that_passes_it_over(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny(name)
    if name in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name]):
            drop(folder, tmp_path / "smaller", 0)
        return
    report = drop(folder, tmp_path / "smaller", 0)
    ids = ids_of(folder)
    wanted = logits(folder, ids, passed=(0,))
    assert np.abs(logits(tmp_path / "smaller", ids) - wanted).max() < 1e-4 * np.ptp(wanted)
    if name in LLAMA_CPP_COUNTS:
        assert "a GGUF of it cannot be made" in report.notes[-1]
    if name in LLAMA_CPP_COUNTS or name not in MODELS:
        return
    (path,) = llmcompress.quantize(tmp_path / "smaller", tmp_path / "smaller.gguf", type="F32").paths
    with Model(path) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


@pytest.mark.slow
@pytest.mark.parametrize("by", ["loss", "kl"])
def test_a_run_measures_what_evaluating_each_smaller_model_would(
    by: str, sample: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round's, which branch off a model that lacks a layer, and are held against the whole one."""
    monkeypatch.setattr(dropping, "MORE", ())
    text = root / "tests" / "data" / "richard-iii.txt"
    given = StructureOptions("layers", drop=2, data=(str(text),), tokens=1024, chunk=128, dtype="f32", by=by)
    report = drop_layers(sample, tmp_path / "smaller", given)
    first, second = report.went["figures"]
    assert report.went["layers_dropped"] == sorted([first["layer"], second["layer"]])
    assert second["layer"] == min(second[by], key=second[by].get)
    rows = json.loads((tmp_path / "smaller" / "prune.json").read_text())["tokens_seen"]["count"]
    assert rows == 1024
    for layer in (0, 5):
        drop(sample, tmp_path / f"without-{layer}", *sorted([first["layer"], layer]))
        found = losses_on_rows(tmp_path / f"without-{layer}", sample, given)[by]
        assert second[by][layer] == pytest.approx(found, rel=1e-3)


def losses_on_rows(artefact: Path, reference: Path, given: StructureOptions) -> dict[str, float]:
    """By whole models, on the very rows, in nats a token."""
    checkpoint = Checkpoint.open(reference)
    rows = rows_of(checkpoint, calibration_options(given, 0)).rows
    models, kl, loss, count = (load(reference), load(artefact)), 0.0, 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in models)
            kl += (p.exp() * (p - q)).sum().item()
            loss += (p - q).gather(1, ids[0, 1:, None]).sum().item()
            count += len(p)
    return {"kl": kl / count, "loss": loss / count}


@pytest.mark.slow
def test_layers_between_which_the_text_does_not_tell_are_measured_on_more(
    sample: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "TIED", 8)
    text = str(root / "tests" / "data" / "richard-iii.txt")
    given = StructureOptions("layers", drop=1, data=(text,), tokens=512, chunk=128, dtype="f32")
    (found,) = drop_layers(sample, tmp_path / "smaller", given).went["figures"]
    (closer, closest) = found["closer"]
    assert (closer["tokens"], closest["tokens"]) == (2048, 2144)  # that is all of it
    assert found["layer"] == min(closest["kl"], key=closest["kl"].get) and 0 not in closest["kl"]
    wanted = losses_on_rows(tmp_path / "smaller", sample, replace(given, tokens=2144))["kl"]
    assert closest["kl"][found["layer"]] == pytest.approx(wanted, rel=1e-3)
    note = json.loads((tmp_path / "smaller" / "prune.json").read_text())["notes"][-1]
    assert note.startswith(f"layer {found['layer']} went, and not ") and "on 2144 tokens" in note


def test_a_tie_is_less_than_two_standard_errors_of_the_rows_differences() -> None:
    common, chance = np.arange(100.0), np.random.default_rng(0)
    apart = chance.standard_normal(100)
    apart = (apart - apart.mean()) / apart.std(ddof=1)  # a mean's standard error is a tenth
    found = {3: common, 5: common + 0.19 + apart, 7: common + 0.21 + apart, 9: common + 0.1}
    assert layers.tied(found) == [3, 5]
    assert layers.difference(found[5], common).error == pytest.approx(0.1)
    assert layers.tied({layer: rows[:1] for layer, rows in found.items()})[1:]  # a single row tells nothing


@pytest.mark.slow
def test_a_killed_search_goes_on(
    sample: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = StructureOptions(
        "layers",
        drop=2,
        data=(str(root / "tests" / "data" / "richard-iii.txt"),),
        tokens=512,
        chunk=128,
        dtype="f32",
    )
    monkeypatch.setattr(dropping, "MORE", ())
    wanted = drop_layers(sample, tmp_path / "undisturbed", given)
    runs, measure = [], layers.losses

    def killed_in_the_second(model, batches, candidates, whole, progress, by):
        runs.append(len(candidates))
        if runs == [6, 5]:
            raise KeyboardInterrupt
        return measure(model, batches, candidates, whole, progress, by)

    monkeypatch.setattr(layers, "losses", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        drop_layers(sample, tmp_path / "killed", given)
    assert state_file(tmp_path / "killed").is_file() and not (tmp_path / "killed").exists()
    found = drop_layers(sample, tmp_path / "killed", given)
    assert runs == [6, 5, 0, 5]  # of the whole model no more than its last hidden states
    assert found.went["layers_dropped"] == wanted.went["layers_dropped"]
    assert not state_file(tmp_path / "killed").exists()
    names = ("model.safetensors", "config.json")
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@torch.no_grad()
def test_influence_is_of_the_plain_models_hidden_states(sample: Path) -> None:
    model = load(sample)
    ids = torch.arange(2, 130)[None]
    hidden = []
    for block in decoder_blocks(model)[1]:
        block.register_forward_hook(lambda _, inputs, output: hidden.append((inputs[0], output)))
    model(ids)
    wanted = [1 - torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in hidden]
    lockstep = Lockstep.of(Checkpoint.open(sample), torch.float32, torch.device("cpu"))
    assert layers.influence(lockstep, [ids, ids], Progress()) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_what_config_says_of_each_layer_goes_with_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    whole = json.loads((tiny("gemma3") / "config.json").read_text())
    drop(tiny("gemma3"), tmp_path / "smaller", 1, 3)
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [whole["layer_types"][layer] for layer in (0, 2, 4, 5, 6)]
    manifest = json.loads((tmp_path / "smaller" / "prune.json").read_text())
    assert manifest["layers_dropped"] == [1, 3] and manifest["method"] == "layers"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": (6,)}, "--layers 6: the model has 6 layers, 0 to 5"),
        ({"layers": tuple(range(6))}, "names all 6 layers, one has to stay"),
        ({"drop": 6}, "--drop 6: the model has 6 layers, one has to stay"),
    ],
)
def test_layers_that_cannot_go(values: dict, message: str, sample: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        drop_layers(sample, tmp_path / "smaller", StructureOptions("layers", **values))
    assert not list(tmp_path.iterdir())


def test_a_list_of_unknown_meaning_is_refused(sample: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(sample, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"layer_moods": [1, 2, 3, 4, 5, 6]}))
    with pytest.raises(PlanError, match="layer_moods has 6 values, as many as there are layers"):
        drop(odd, tmp_path / "smaller", 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "layer", "drop": 1},
            "--method layer: is none of layers, width, experts, svd; did you mean 'layers'",
        ),
        ({"method": "layers"}, "say how much goes, by --drop or --layers"),
        ({"method": "layers", "drop": 1, "layers": (1,)}, "say how much goes"),
        ({"method": "layers", "drop": 1, "by": "luck"}, "--by luck: is none of kl, loss, influence"),
        ({"method": "width", "ratio": 1.0}, "--ratio 1: is no share"),
        (
            {"method": "width", "ratio": 0.5, "parts": ("fnn",)},
            "--parts fnn: is none of ffn, attention; did you mean 'ffn'",
        ),
    ],
)
def test_options_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StructureOptions(**values)


@pytest.mark.parametrize("text", ["", "1,", "-1", "a", "1,1", "3-2", "1-" + "9" * 30])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="--layers"):
        parse_layers(text)


def test_numbers_and_ranges() -> None:
    assert parse_layers("7, 2-4") == (2, 3, 4, 7)
