"""Mixtral: Llama's architecture in GGUF, with experts."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import EMBEDDING, FUSED_EXPERTS
from llmcompress.converters.llama import ROTARY_ATTENTION, llama_keys, llama_notes

MIXTRAL = Architecture(
    name="llama",
    classes=("MixtralForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | FUSED_EXPERTS | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
        "layers.{i}.block_sparse_moe.gate": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.block_sparse_moe.experts.{e}.w1": to("blk.{i}.ffn_gate_exps"),
        "layers.{i}.block_sparse_moe.experts.{e}.w2": to("blk.{i}.ffn_down_exps"),
        "layers.{i}.block_sparse_moe.experts.{e}.w3": to("blk.{i}.ffn_up_exps"),
    },
    keys=llama_keys,
    assumes={"hidden_act": ("silu", "swish")},
    check=llama_notes,
)  # fmt: skip
