"""Checkpoints that hold more than a text model: its tensors alone convert, and the plan says what is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from llmcompress.converters.config import Config
from llmcompress.converters.families import ARCHITECTURES, CLASSES, find_architecture
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.torch import load_file, save_file
from tiny_families import MORE
from tiny_models import MODELS

from llmcompress.errors import PlanError
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe

ALL = MODELS | MORE
WITH_MORE = [family for family in ARCHITECTURES if family.text]


def tiny_of(architecture: str) -> str:
    """The tiny text model of an architecture."""
    return next(
        name for name, (made, _) in ALL.items()
        if made.kind in CLASSES and CLASSES[made.kind].name == architecture and "deepseek2" != name
    )  # fmt: skip


def names_and_keys(plan: Plan) -> tuple[list, dict]:
    (output,) = plan.outputs
    return [(step.name, step.shape) for step in plan.steps], {
        file.path.name: file.size for file in output.files
    }


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("family", WITH_MORE, ids=lambda family: family.classes[0])
def test_the_text_part_is_the_text_model(family, older, tiny, tmp_path: Path) -> None:
    text = tiny(tiny_of(family.name))
    both = tmp_path / "both"
    shutil.copytree(text, both)
    config = json.loads((text / "config.json").read_text())
    (both / "config.json").write_text(
        json.dumps({"architectures": list(family.classes), "text_config": config, "vision_config": {}})
    )
    prefix = "language_model.model." if older else "model.language_model."
    head = "language_model.lm_head." if older else "lm_head."
    tensors = {
        name.replace("lm_head.", head)
        if name.startswith("lm_head.")
        else prefix + name.removeprefix("model."): value
        for name, value in load_file(text / "model.safetensors").items()
    }
    seen = next(iter(tensors.values())).clone()
    tower = "vision_tower." if older else "model.vision_tower."
    save_file(
        tensors | {f"{tower}layers.{i}.weight": seen.clone() for i in range(3)}, both / "model.safetensors"
    )
    plans = [plan_gguf(folder, tmp_path / "out.gguf", Recipe(name="same")) for folder in (text, both)]
    assert names_and_keys(plans[0]) == names_and_keys(plans[1])
    assert "the part that sees: left out, 3 tensors" in plans[1].notes
    assert not any("left out" in note and "sees" in note for note in plans[0].notes)


def test_a_class_without_a_table_converts_as_another(tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BrandNewForCausalLM"]}))
    with pytest.raises(
        PlanError, match="no table for BrandNew.*model_type is llama; --architecture LlamaForCausalLM"
    ):
        plan_gguf(folder, tmp_path / "out.gguf", Recipe())
    with pytest.raises(
        PlanError, match="no table for LamaForCausalLM; did you mean 'Llama.*name that with --arch"
    ):
        find_architecture(Config({"architectures": ["LamaForCausalLM"], "model_type": "lama"}))
    for name in ("LlamaForCausalLM", "llama"):
        plan = plan_gguf(folder, tmp_path / "out.gguf", Recipe(architecture=name))
        assert any(step.name == "blk.1.ffn_down.weight" for step in plan.steps)
    with pytest.raises(
        PlanError, match="--architecture lama: there is no table for it; did you mean 'llama'"
    ):
        plan_gguf(folder, tmp_path / "out.gguf", Recipe(architecture="lama"))
