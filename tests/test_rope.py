"""Rotary scalings: what is written of them, against transformers' own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers
from llmcompress.converters.config import Config
from llmcompress.converters.families import ARCHITECTURES, CLASSES
from llmcompress.converters.rope import BY_TENSORS, rope_keys, rope_notes, rope_parameters, rope_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmcompress.errors import PlanError

SIZE = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip


def keys(parameters: dict[str, Any]) -> dict[str, Any]:
    found = rope_keys(Config(SIZE | {"rope_parameters": parameters}), tensors=BY_TENSORS)
    return {name.removeprefix("rope.scaling."): value.value for name, value in found.items()}


@pytest.mark.parametrize(
    "more", [{}, {"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 0.7}]
)
def test_yarn_scales_attention_as_transformers(more: dict[str, float]) -> None:
    config = transformers.LlamaConfig(**SIZE, rope_parameters=YARN | more)
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    by_llama_cpp = 1 + 0.1 * math.log(YARN["factor"])
    assert keys(YARN | more).get("attn_factor", 1.0) * by_llama_cpp == pytest.approx(attention)


@pytest.mark.parametrize("more", [{}, {"factor": 2.0}, {"attention_factor": 1.3}])
def test_longrope_scales_attention_as_transformers(more: dict[str, float]) -> None:
    config = transformers.LlamaConfig(**SIZE, rope_parameters=LONGROPE | more)
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    assert keys(LONGROPE | more)["attn_factor"] == pytest.approx(attention)


@pytest.mark.parametrize("key, value", [("beta_fast", 16), ("beta_slow", 0.5)])
def test_yarn_that_llama_cpp_cannot_compute_is_refused(key: str, value: float) -> None:
    assert keys(YARN | {"beta_fast": 32.0, "beta_slow": 1, "truncate": True})["type"] == "yarn"
    with pytest.raises(PlanError, match=f"yarn's {key} is {value}; llama.cpp computes as if it were"):
        keys(YARN | {key: value})


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_the_first_phi_3_configs_are_longrope(kind: str) -> None:
    scaling = {"type": kind, "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
    config = Config(SIZE | {"rope_scaling": scaling, "original_max_position_embeddings": 128})
    assert rope_parameters(config)["rope_type"] == "longrope"
    assert set(rope_tensors(config)) == {"rope_factors_long.weight", "rope_factors_short.weight"}


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"rope_type": "linear"}, "linear rope scaling has no factor"),
        ({"rope_type": "linear", "factor": "8"}, "rope's factor is '8', it must be a number above zero"),
        ({"rope_type": "yrn"}, "rope type 'yrn' is unknown"),
        ({"rope_type": ["yarn"]}, "rope type .* is unknown"),
        (LONGROPE | {"original_max_position_embeddings": 0.5}, "rope scaling of a context of 0 tokens"),
    ],
)
def test_damaged_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        keys(parameters)


@pytest.mark.parametrize("factors", [[1.0] * 7, ["x"] * 8, "x", None])
def test_damaged_longrope_factors_are_refused(factors: Any) -> None:
    with pytest.raises(PlanError, match="rope's long_factor"):
        rope_tensors(
            Config(
                SIZE | {"rope_parameters": LONGROPE | {"long_factor": factors} | {"short_factor": [1.0] * 8}}
            )
        )


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
READ_TENSORS = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Ministral3ForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "ApertusForCausalLM",
    "MiniCPMForCausalLM",
}  # llama.cpp's graphs
LLAMA3_ALONE = {"ArceeForCausalLM", "Exaone4ForCausalLM", "Llama4ForCausalLM"}
ELSE = {
    "gpt2",
    "bloom",
    "mpt",
    "gemma4",
    "mamba",
    "mamba2",
    "jamba",
    "nemotron_h",
    "rwkv7",
    "nemotron_h_moe",
}  # no rope, or one that their check looks at
ROTARY = list(dict.fromkeys(f.classes[0] for f in ARCHITECTURES if f.name not in ELSE and not f.text))


def keys_of(kind: str, rope: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """The metadata of a model of the class `kind`, without the architecture's name."""
    size = SIZE | {"vocab_size": 512, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
                   "moe_intermediate_size": 64, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                   "v_head_dim": 16, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}  # fmt: skip
    config = CLASSES[kind].config(
        size | ({"rope_parameters": {"rope_theta": 1e4} | rope} if rope else {}) | values
    )
    return {key: value.value for key, value in CLASSES[kind].keys(config).items()}


@pytest.mark.parametrize("rope", [LLAMA3, LONGROPE], ids=["llama3", "longrope"])
@pytest.mark.parametrize("kind", ROTARY)
def test_a_scaling_by_tensors_is_for_those_whose_tensors_are_read(kind, rope):
    if kind in READ_TENSORS or (kind in LLAMA3_ALONE and rope is LLAMA3):
        assert keys_of(kind, rope)["rope.freq_base"] == 1e4
    else:
        with pytest.raises(
            PlanError, match=f"rope type {rope['rope_type']!r} is one that llama.cpp cannot compute"
        ):
            keys_of(kind, rope)


def test_a_null_is_as_good_as_nothing() -> None:
    assert (
        keys_of("LlamaForCausalLM", {"rope_theta": None, "rope_type": None}, rope_theta=2e4)["rope.freq_base"]
        == 2e4
    )


def test_the_length_before_scaling_is_found_inside_the_rope_parameters():
    assert keys_of("Phi3ForCausalLM", LONGROPE)["rope.scaling.original_context_length"] == 128


def test_gemma_3_has_two_bases():
    full, sliding = (
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        {"rope_type": "default", "rope_theta": 2e4},
    )
    new = keys_of("Gemma3ForCausalLM", {"full_attention": full, "sliding_attention": sliding})
    old = keys_of(
        "Gemma3ForCausalLM", rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=2e4
    )
    rope = {key: value for key, value in new.items() if key.startswith("rope.")}
    assert rope == {key: value for key, value in old.items() if key.startswith("rope.")}
    assert (rope["rope.freq_base"], rope["rope.freq_base_swa"], rope["rope.scaling.factor"]) == (
        1e6,
        2e4,
        8.0,
    )


def test_gemma_3_with_scaled_sliding_layers_is_refused():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(PlanError, match="sliding layers have linear rope"):
        keys_of("Gemma3ForCausalLM", {"full_attention": linear, "sliding_attention": linear})


@pytest.mark.parametrize("kind", ["Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_heads_that_are_not_the_hidden_size_are_refused_where_llama_cpp_takes_them_for_it(kind):
    config = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 512}
    with pytest.raises(PlanError, match="4 heads of 32 are not the hidden size of 256"):
        CLASSES[kind].check_config(CLASSES[kind].config(config))


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("values", [{"partial_rotary_factor": 0.5}, {"rope": {"partial_rotary_factor": 0.5}}])
def test_a_llama_that_turns_a_part_of_each_head_is_refused(kind: str, values: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="8 of a head's 16 dimensions are rotary"):
        keys_of(kind, **values)


def test_what_llama_cpp_does_otherwise_is_said() -> None:
    def notes(rope: dict[str, Any]) -> list[str]:
        return rope_notes(Config(SIZE | {"rope_parameters": rope}))

    assert notes(YARN) == notes(LONGROPE | {"original_max_position_embeddings": 512}) == []
    assert "contexts beyond 512 tokens will differ" in notes({"rope_type": "dynamic", "factor": 2.0})[0]
    assert "when its context is beyond 128 tokens" in notes(LONGROPE)[0]


def test_kimi_k2_has_betas_that_llama_cpp_does_not_read() -> None:
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}  # fmt: skip
    kimi = {
        "rope_theta": 5e4,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 61,
        "q_lora_rank": 1536,
    }
    keys = keys_of("DeepseekV3ForCausalLM", rope, **kimi)
    assert (keys["rope.scaling.type"], keys["rope.scaling.yarn_beta_fast"]) == ("yarn", 1.0)
    family = CLASSES["DeepseekV3ForCausalLM"]
    config = family.config(SIZE | kimi | {"rope_scaling": rope})
    assert "yarn's beta_fast is 1: llama.cpp turns the heads as if it were 32" in family.check_config(config)
