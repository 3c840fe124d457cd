from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters.config import KEPT_MTP
from llmcompress.converters.deepseek import DEEPSEEK3
from llmcompress.converters.families import ARCHITECTURES
from llmcompress.converters.mtp import keep_mtp
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.torch import load_file, save_file
from tiny_families import MORE
from tiny_models import build

import llmcompress
from llmcompress.errors import PlanError, RecipeError
from llmcompress.llama_tokenizer import LlamaTokenizer
from llmcompress.recipe import Recipe

KINDS = {"deepseek3": "deepseek2"}  # general.architecture, where it is another name
IDS = [1, 5, 300, 17, 250, 99, 4, 77]
HIDDEN = 256


def tiny(name: str, root: Path, folder: Path) -> Path:
    return build(name, folder / "tiny", {MORE[name][1]: root / "examples" / "sample-llama-6m"}, models=MORE)


def add_layer(folder: Path, prefix: str, like: str, extra: dict[str, str]) -> dict[str, torch.Tensor]:
    """Puts a layer behind the last: a copy of the one called `like`, and the parts that it has beside."""
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    own = {
        prefix + name.removeprefix(like): value for name, value in tensors.items() if name.startswith(like)
    }
    own |= {
        f"{name}.weight": torch.randn(HIDDEN, 2 * HIDDEN) if part == "eh_proj" else torch.randn(HIDDEN)
        for part, name in extra.items()
    }
    assert len(own) > len(extra)
    save_file(tensors | {name: value.clone() for name, value in own.items()}, folder / "model.safetensors")
    return own


def glm(name: str, root: Path, folder: Path) -> tuple[Path, dict]:
    """DeepSeek's names, which GLM has, too."""
    made = tiny(name, root, folder)
    names = {"eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "shared_head_norm": "shared_head.norm"}
    config = json.loads((made / "config.json").read_text())
    start, like = (f"model.layers.{config['num_hidden_layers'] - back}." for back in (0, 1))
    own = add_layer(made, start, like, {part: start + name for part, name in names.items()})
    (made / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return made, own


def qwen(name: str, root: Path, folder: Path) -> tuple[Path, dict]:
    made = tiny(name, root, folder)
    types = json.loads((made / "config.json").read_text())["layer_types"]
    names = {
        "eh_proj": "fc",
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "shared_head_norm": "norm",
    }
    like = f"model.layers.{types.index('full_attention')}."
    return made, add_layer(made, "mtp.layers.0.", like, {part: f"mtp.{name}" for part, name in names.items()})


MADE = dict.fromkeys(("glm4moe", "deepseek3", "glm-dsa"), glm) | dict.fromkeys(
    ("qwen3next", "qwen35", "qwen35moe"), qwen
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_kept_layers_are_there_and_change_nothing_before_them(name: str, root: Path, tmp_path: Path) -> None:
    folder, own = MADE[name](name, root, tmp_path)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    dropped, kept = (
        plan_gguf(folder, tmp_path / "x.gguf", Recipe(types=("F32",), mtp=mtp)) for mtp in ("drop", "keep")
    )
    more = {step.name: step for step in kept.steps}
    for step in dropped.steps:
        more.pop(step.name)
    assert all(step.startswith(f"blk.{layers}.") for step in more)
    assert any("multi-token prediction: left out" in note for note in dropped.notes)
    assert not any("multi-token prediction" in note for note in kept.notes)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, layers + 1)  # the names are one for all
    parts = {
        "eh_proj": (HIDDEN, 2 * HIDDEN),
        "enorm": (HIDDEN,),
        "hnorm": (HIDDEN,),
        "shared_head.norm": (HIDDEN,),
    }
    for part, shape in parts.items():
        assert more[f"{theirs.get_name(f'model.layers.{layers}.{part}')}.weight"].shape == shape
    found = []
    for mtp in ("drop", "keep"):
        (path,) = llmcompress.quantize(folder, tmp_path / f"{mtp}.gguf", type="F32", mtp=mtp).paths
        with Model(path) as model:
            found.append(model.logits(IDS))
            count, further = (
                model.meta(f"{KINDS.get(name, name)}.{key}")
                for key in ("block_count", "nextn_predict_layers")
            )
        assert (int(count), int(further or 0)) == (layers + (mtp == "keep"), int(mtp == "keep"))
    assert np.array_equal(*found)
    LlamaTokenizer(
        tmp_path / "keep.gguf", vocab_only=False, load_mtp=True
    ).close()  # each of its tensors, as drafting does
    reader = gguf.GGUFReader(tmp_path / "keep.gguf")
    written = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    norm = next(
        value for key, value in own.items() if key.endswith(("hnorm.weight", "pre_fc_norm_hidden.weight"))
    )
    assert np.array_equal(written[f"blk.{layers}.nextn.hnorm.weight"], norm.numpy() + name.startswith("qwen"))


def test_what_cannot_be_kept_is_refused(root: Path, tmp_path: Path, tiny) -> None:
    with pytest.raises(PlanError, match="llama.cpp's llama does not run such layers .known: glm4moe"):
        plan_gguf(tiny("llama"), tmp_path / "x.gguf", Recipe(mtp="keep"))
    with pytest.raises(PlanError, match="nemotron_h_moe, which llama.cpp runs, are not written yet"):
        plan_gguf(tiny("nemotron-h-moe"), tmp_path / "x.gguf", Recipe(mtp="keep"))
    for name in ("bailingmoe2", "ernie4_5-moe", "nemotron_h"):
        with pytest.raises(PlanError, match="llama.cpp's .* does not run such layers"):
            keep_mtp(next(table for table in ARCHITECTURES if table.name == name), None)
    with pytest.raises(RecipeError, match="mtp: 'kep' is none of drop, keep.*did you mean 'keep'"):
        Recipe(mtp="kep")


def test_plain_queries_draft_nothing() -> None:
    values = {
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "num_attention_heads": 4,
        "hidden_size": 256,
        "vocab_size": 9,
    }
    assert DEEPSEEK3.check_config(DEEPSEEK3.config(values)) == []
    with pytest.raises(PlanError, match="--mtp keep: llama.cpp drafts with low-rank queries alone"):
        DEEPSEEK3.check_config(DEEPSEEK3.config(values | {KEPT_MTP: 1}))


def test_a_checkpoint_without_such_layers_is_refused(root: Path, tmp_path: Path) -> None:
    made = build(
        "glm4moe", tmp_path / "tiny", {MORE["glm4moe"][1]: root / "examples" / "sample-llama-6m"}, models=MORE
    )
    with pytest.raises(PlanError, match="--mtp keep: it has no layers behind the 2 of config.json"):
        plan_gguf(made, tmp_path / "x.gguf", Recipe(mtp="keep"))
