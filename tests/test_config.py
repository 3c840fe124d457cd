"""config.json: its kinds, and what stands in for what it leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.families import ARCHITECTURES
from llmcompress.converters.to_gguf import plan_gguf
from tiny_families import MORE
from tiny_models import MODELS

from llmcompress.errors import PlanError
from llmcompress.recipe import Recipe

CONFIGS = {
    name: tiny.config for tiny, _ in (*MODELS.values(), *MORE.values()) for name in (tiny.kind, *tiny.also)
}
# What config.json of the models' own code says and transformers' class has no name for.
NOT_IN_TRANSFORMERS = {
    "scoring_func",
    "topk_method",
    "sliding_window_pattern",
    "rope_local_base_freq",
    "seq_length",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.classes[0])
def test_defaults_are_transformers(architecture: Architecture) -> None:
    text = next(family for family in ARCHITECTURES if family.defaults == architecture.defaults)
    if not hasattr(transformers, text.classes[0]):
        pytest.skip("transformers has no such class; the defaults are those of the model's own code")
    known = getattr(transformers, CONFIGS[text.classes[0]])()
    rope = getattr(known, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    turned = {
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_theta": rope.get("rope_theta"),
    }
    turned["rotary_pct"] = turned["partial_rotary_factor"]
    names = architecture.defaults.keys() - NOT_IN_TRANSFORMERS
    said = known.to_dict()  # not by getattr alone, which refuses what layers have for themselves
    found = {key: turned.get(key, said[key] if key in said else getattr(known, key, None)) for key in names}
    assert found == {key: architecture.defaults[key] for key in names}
    assert architecture.config({}).tied == known.tie_word_embeddings


def test_null_is_not_a_default() -> None:
    config = Config({"head_dim": None, "hidden_size": 64, "num_attention_heads": 4}, {"head_dim": 128})
    assert config.head_dim == 16 and config.kv_heads == 4


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', it must be a whole number above zero"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, it must be"),
        ({"num_attention_heads": True}, "num_attention_heads is True, it must be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, it must be a number above zero"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', it must be an object"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', it must be a list"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', it must be true or false"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Config(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["head_dim", "hidden_size", "intermediate_size", "num_key_value_heads"])
def test_a_config_of_another_model_is_refused(root: Path, tmp_path: Path, key: str) -> None:
    """llama.cpp would load none of these files."""
    model = Path(shutil.copytree(root / "examples" / "sample-llama-6m", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"head_dim": 64, key: config.get(key, 64) * 2}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="by config.json it is .*; take both from one model"):
        plan_gguf(model, tmp_path / "x.gguf", Recipe())


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("Qwen3MoeForCausalLM", {}, "norm_topk_prob is False"),
        (
            "Qwen3MoeForCausalLM",
            {"norm_topk_prob": True, "mlp_only_layers": [0]},
            r"mlp_only_layers is \[0\]",
        ),
        (
            "Qwen3MoeForCausalLM",
            {"norm_topk_prob": True, "decoder_sparse_step": 2},
            "decoder_sparse_step is 2",
        ),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias is True"),
        ("Gemma2ForCausalLM", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "attn_logit_softcapping is null"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    name: str, values: dict[str, Any], message: str
) -> None:
    (architecture,) = (known for known in ARCHITECTURES if name in known.classes)
    with pytest.raises(PlanError, match=message):
        architecture.check_config(architecture.config(values))
