"""Llama 1, 2, 3 and Mistral."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QKV_BIASES,
    attention_notes,
    rotary_decoder_keys,
)
from llmcompress.converters.operations import rotary
from llmcompress.converters.rope import BY_TENSORS, rope_tensors, rotary_dimensions

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, u32

ROTARY_ATTENTION = ATTENTION | {
    "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q", operation=rotary("heads")),
    "layers.{i}.self_attn.k_proj": to("blk.{i}.attn_k", operation=rotary("kv_heads")),
}


def llama_keys(config: Config, rope_tensors: Collection[str] = BY_TENSORS) -> Metadata:
    turned = rotary_dimensions(config)
    if turned != config.head_dim:
        raise PlanError(
            f"config.json: {turned} of a head's {config.head_dim} dimensions are rotary, in llama.cpp all would be"
        )
    return rotary_decoder_keys(config, rope_tensors) | {"rope.dimension_count": u32(turned)}


LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | MLP,
    keys=llama_keys,
    computed=rope_tensors,
    biases=QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    assumes={"hidden_act": ("silu", "swish")},
    check=attention_notes,
)

MISTRAL = replace(
    LLAMA,
    classes=("MistralForCausalLM",),
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
)  # fmt: skip
