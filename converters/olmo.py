"""OLMo 2 and 3, and OLMoE."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    QK_NORM,
    check_square_attention,
    expert_keys,
    rotary_decoder_keys,
    sliding_keys,
)  # fmt: skip
from llmcompress.converters.rope import require_plain_sliding_rope, rope_notes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32


def olmo3_keys(config: Config) -> Metadata:
    base = require_plain_sliding_rope(config)
    return rotary_decoder_keys(config) | sliding_keys(config) | {"rope.freq_base_swa": f32(base)}


def _wide_norms(config: Config) -> dict[str, tuple[int, ...]]:
    """Queries and keys are normed across all heads."""
    return {
        "attn_q_norm": (config.heads * config.head_dim,),
        "attn_k_norm": (config.kv_heads * config.head_dim,),
    }


def _check_olmoe(config: Config) -> list[str]:
    if config.kv_heads != config.heads:
        raise PlanError(
            f"config.json: {config.heads} heads share {config.kv_heads} keys; in llama.cpp's olmoe each has its own"
        )
    return check_square_attention(config) + rope_notes(config)


OLMO2 = Architecture(
    name="olmo2",
    classes=("Olmo2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "input_layernorm") | QK_NORM | MLP | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),
        "layers.{i}.post_feedforward_layernorm": to("blk.{i}.post_ffw_norm"),
    },
    keys=rotary_decoder_keys,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    assumes={"hidden_act": ("silu",), "attention_bias": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
    shapes=_wide_norms,
)  # fmt: skip

OLMO3 = replace(
    OLMO2,
    classes=("Olmo3ForCausalLM",),
    keys=olmo3_keys,
    defaults=OLMO2.defaults | {"sliding_window": 4096, "sliding_window_pattern": 4},
)

OLMOE = Architecture(
    name="olmoe",
    classes=("OlmoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | EXPERTS,
    keys=lambda config: rotary_decoder_keys(config) | expert_keys(config),
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
        "intermediate_size": 2048,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (False,), "clip_qkv": (None,), "norm_topk_prob": (False,)},
    check=_check_olmoe,
    shapes=_wide_norms,
)  # fmt: skip
