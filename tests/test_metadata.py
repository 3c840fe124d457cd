"""`general.*` from the model card, and the keys that say what made a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from llmcompress.converters.metadata import general_metadata
from llmcompress.converters.to_gguf import plan_gguf

from llmcompress import __version__
from llmcompress.gguf.reader import GGUFFile
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe
from llmcompress.run import run

CARD = """---
license: apache-2.0
language:
- en
- de
tags:
- stories
base_model: someone/Base-7B-v0.1
datasets:
- someone/stories
---
# A model
"""


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    """The example model under a name with all the parts that names have."""
    return Path(
        shutil.copytree(root / "examples" / "sample-llama-6m", tmp_path / "Sample-Llama-6M-Instruct-v2")
    )


def keys_of(model: Path, recipe: Recipe = Recipe()) -> tuple[dict, list[str]]:
    plan: Plan = plan_gguf(model, model.parent / "x.gguf", recipe)
    keys, notes = general_metadata("llama", plan.checkpoint, plan.steps, recipe)
    return {key: value.value for key, value in keys.items()}, notes


def test_the_model_card_and_the_name_are_taken_apart(model: Path) -> None:
    (model / "README.md").write_text(CARD)
    keys, notes = keys_of(model)
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "Sample Llama 6M Instruct v2",
        "general.basename": "Sample-Llama", "general.finetune": "Instruct", "general.version": "v2",
        "general.size_label": "6M", "general.license": "apache-2.0", "general.languages": ["en", "de"],
        "general.tags": ["stories"], "general.base_model.count": 1, "general.base_model.0.name": "Base 7B v0.1",
        "general.base_model.0.organization": "Someone", "general.base_model.0.version": "v0.1",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/Base-7B-v0.1",
        "general.dataset.count": 1, "general.dataset.0.name": "Stories",
    }  # fmt: skip
    assert {key: keys[key] for key in expected} == expected and not notes


def test_the_file_says_what_made_it(model: Path, tmp_path: Path) -> None:
    asked = Recipe(types=("Q6_K", "Q8_0"), name="Mine", tensor_types=(("attn_v", "Q8_0"),))
    run(plan_gguf(model, tmp_path / "{type}.gguf", asked))
    with GGUFFile.open(tmp_path / "Q6_K.gguf") as file:
        keys = {key: value.value for key, value in file.metadata.items()}
    assert keys["general.name"] == "Mine" and keys["llmcompress.version"] == __version__
    recipe = json.loads(keys["llmcompress.recipe"])  # of this file alone, so that it can be made again
    assert recipe == {"types": ["Q6_K"], "name": "Mine", "tensor_types": [["attn_v", "Q8_0"]]}


def test_the_revision_of_a_hub_snapshot_is_kept(model: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--Tiny-6M" / "snapshots" / commit
    shutil.copytree(model, snapshot)
    keys, _ = keys_of(snapshot)
    assert keys["llmcompress.source.revision"] == commit and keys["general.name"] == "Tiny 6M"


def test_sampling_defaults_are_kept(model: Path) -> None:
    (model / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "min_p": null}'
    )
    keys, _ = keys_of(model)
    assert (keys["general.sampling.temp"], keys["general.sampling.top_k"]) == (0.6, 20)
    assert "general.sampling.min_p" not in keys


def test_card_and_sampling_are_what_gguf_py_makes_of_them(model: Path) -> None:
    """Licence, authors, languages, base models and all the sampling keys, as llama.cpp's converter writes them."""
    (model / "README.md").write_text(
        CARD.replace("tags:", "license_name: mine\nlicense_link: x.org\nauthor: A. U. Thor\ntags:")
    )
    sampling = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "penalty_last_n": 64,
        "xtc_probability": 0.5, "xtc_threshold": 0.1, "mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
        "sequence": "top_k;temperature",
    }  # fmt: skip
    (model / "generation_config.json").write_text(json.dumps(sampling))
    writer = gguf.GGUFWriter(None, "llama")
    theirs = gguf.Metadata.load(None, model, None, 0)
    theirs.set_gguf_meta_model(writer)
    expected = {key: value.value for key, value in writer.kv_data[0].items()}
    keys, notes = keys_of(model)
    assert not notes and len([key for key in keys if key.startswith("general.sampling.")]) == len(sampling)
    assert {key: keys.get(key) for key in expected if key != "general.size_label"} == {
        key: value for key, value in expected.items() if key != "general.size_label"
    }
    assert keys["general.license.name"] == "mine" and keys["general.sampling.penalty_repeat"] == 1.1


@pytest.mark.parametrize(
    "card, note",
    [
        ("---\ntags: [1, null, x]\n---\n", "general.tags cannot be [1, None, 'x'] and is left out"),
        ("---\nlicense: {a: b}\n---\n", "general.license cannot be {'a': 'b'} and is left out"),
        ("---\n: : :\n\t- [\n---\n", "its header cannot be read and is left out"),
    ],
)
def test_what_a_model_card_gets_wrong_is_left_out_and_said(model: Path, card: str, note: str) -> None:
    (model / "README.md").write_text(card)
    _, notes = keys_of(model)
    assert len(notes) == 1 and note in notes[0]


def test_everything_reads_back(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text(CARD)
    plan = plan_gguf(model, tmp_path / "x.gguf", Recipe(types=("F16",)))
    run(plan)
    keys, _ = general_metadata("llama", plan.checkpoint, plan.steps, plan.recipe)
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert {key: file.metadata[key] for key in keys} == keys
        assert file.metadata["general.file_type"].value == 1
        assert file.metadata["general.quantization_version"].value == 2
