"""Zhipu's GLM-4 (9B), GLM-4 0414 and GLM-4.5."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    QK_NORM,
    QKV_BIASES,
    SHARED_EXPERTS,
    SIGMOID,
    check_square_attention,
    expert_keys,
    leading_dense,
    partly_rotary_keys,
    routing_keys,
)
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import u32

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

GLM4_MOE = Architecture(
    name="glm4moe",
    classes=("Glm4MoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | only("qk_norm", QK_NORM) | only("dense", MLP) | only("experts", EXPERTS | SHARED_EXPERTS | {
        "layers.{i}.mlp.gate.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
    }) | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),  # behind attention, before the MLP
    },
    keys=lambda config: partly_rotary_keys(config) | expert_keys(config) | routing_keys(config, SIGMOID) | {
        "leading_dense_block_count": u32(len(leading_dense(config)["dense"])),
        "expert_shared_count": u32(config.need("n_shared_experts")),
    },
    biases=QKV_BIASES,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "moe_intermediate_size": 1408, "num_nextn_predict_layers": 1,
    },
    assumes={"hidden_act": ("silu",), "n_shared_experts": (1,)},
    check=rope_notes,
    layers=lambda config: leading_dense(config) | {
        "qk_norm": range(config.need("num_hidden_layers") if config.get("use_qk_norm", default=False) else 0),
    },
)  # fmt: skip
