"""Granite, and Granite with experts."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, optional_keys, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import EMBEDDING, MLP, QKV_BIASES, check_square_attention, expert_keys
from llmcompress.converters.llama import ROTARY_ATTENTION, llama_keys
from llmcompress.converters.rope import rope_notes, rope_tensors

from llmcompress.gguf.value import Metadata, f32, u32


def granite_keys(config: Config) -> Metadata:
    return llama_keys(config) | scale_keys(config)


def scale_keys(config: Config) -> Metadata:
    """What Granite multiplies by on the way, and divides its logits by."""
    return {
        "attention.scale": f32(config.need("attention_multiplier")),
        "embedding_scale": f32(config.need("embedding_multiplier")),
        "residual_scale": f32(config.need("residual_multiplier")),
        "logit_scale": f32(config.need("logits_scaling")),
    }


def shared_keys(config: Config) -> Metadata:
    inner = config.get("shared_intermediate_size", default=0)
    return optional_keys({"expert_shared_feed_forward_length": u32(inner) if inner else None})


def shared_layers(config: Config) -> dict[str, range]:
    """All layers have a shared expert, or none."""
    return {
        "shared": range(config.need("num_hidden_layers") if config.get("shared_intermediate_size") else 0)
    }


SCALES = {
    "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
GRANITE_EXPERTS = {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.block_sparse_moe.router.layer": to("blk.{i}.ffn_gate_inp"),
    "layers.{i}.block_sparse_moe.input_linear": to("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
    "layers.{i}.block_sparse_moe.output_linear": to("blk.{i}.ffn_down_exps"),
    **only("shared", {
        "layers.{i}.shared_mlp.input_linear": to("blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp"),
        "layers.{i}.shared_mlp.output_linear": to("blk.{i}.ffn_down_shexp"),
    }),
}  # fmt: skip

GRANITE = Architecture(
    name="granite",
    classes=("GraniteForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | MLP,
    keys=granite_keys,
    computed=rope_tensors,
    biases=QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    defaults=SCALES | {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)

GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    tensors=EMBEDDING | ROTARY_ATTENTION | GRANITE_EXPERTS,
    keys=lambda config: granite_keys(config) | expert_keys(config) | shared_keys(config),
    biases=QKV_BIASES | {"attn_output"},
    defaults=GRANITE.defaults | {"num_local_experts": 8, "num_experts_per_tok": 2},
    layers=shared_layers,
)
