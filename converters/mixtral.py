"""Mixtral: Llama's architecture in GGUF, with experts."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import EMBEDDING, FUSED_EXPERTS, attention_notes, expert_keys
from llmcompress.converters.llama import ROTARY_ATTENTION, llama_keys
from llmcompress.converters.rope import rope_tensors

W_EXPERTS = FUSED_EXPERTS | {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.block_sparse_moe.gate": to("blk.{i}.ffn_gate_inp"),
    "layers.{i}.block_sparse_moe.experts.{e}.w1": to("blk.{i}.ffn_gate_exps"),
    "layers.{i}.block_sparse_moe.experts.{e}.w2": to("blk.{i}.ffn_down_exps"),
    "layers.{i}.block_sparse_moe.experts.{e}.w3": to("blk.{i}.ffn_up_exps"),
}

MIXTRAL = Architecture(
    name="llama",
    classes=("MixtralForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | W_EXPERTS,
    keys=lambda config: llama_keys(config) | expert_keys(config),
    computed=rope_tensors,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    assumes={"hidden_act": ("silu", "swish")},
    check=attention_notes,
)  # fmt: skip
