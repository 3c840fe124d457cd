"""Zhipu's GLM-4 (9B), GLM-4 0414 and GLM-4.5."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to, without
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QKV_BIASES,
    check_square_attention,
    partly_rotary_keys,
)
from llmcompress.converters.rope import rope_notes

_DEFAULTS = {
    "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
_FUSED_MLP = without(MLP, "gate_proj", "up_proj") | {
    "layers.{i}.mlp.gate_up_proj": to("blk.{i}.ffn_up"),  # ggml splits it after the product
}

GLM = Architecture(
    name="chatglm",
    classes=("GlmForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | _FUSED_MLP,
    keys=partly_rotary_keys,
    biases=QKV_BIASES,
    defaults=_DEFAULTS,
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)

GLM4 = Architecture(
    name="glm4",
    classes=("Glm4ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | _FUSED_MLP | {
        "layers.{i}.post_self_attn_layernorm": to("blk.{i}.post_attention_norm"),
        "layers.{i}.post_mlp_layernorm": to("blk.{i}.post_ffw_norm"),
    },
    keys=partly_rotary_keys,
    biases=QKV_BIASES,
    defaults=_DEFAULTS,
    assumes={"hidden_act": ("silu",)},
    check=rope_notes,
)  # fmt: skip
