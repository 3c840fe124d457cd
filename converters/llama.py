"""Llama 1, 2, 3 and Mistral."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, Config, rotary, to
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, rotary_decoder_keys
from llmcompress.converters.rope import rope_notes, rope_tensors, rotary_dimensions
from llmcompress.gguf.value import Metadata, u32

ROTARY_ATTENTION = ATTENTION | {
    "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q", operation=rotary("heads")),
    "layers.{i}.self_attn.k_proj": to("blk.{i}.attn_k", operation=rotary("kv_heads")),
}


def llama_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | {"rope.dimension_count": u32(rotary_dimensions(config))}


def llama_notes(config: Config) -> list[str]:
    window, length = config.get("sliding_window"), config.need("max_position_embeddings")
    if window is None or window >= length:
        return rope_notes(config)
    return [
        f"sliding window of {window} tokens: llama.cpp's llama attends to all tokens; contexts beyond it will differ",
        *rope_notes(config),
    ]


LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | MLP,
    keys=llama_keys,
    computed=rope_tensors,
    assumes={"hidden_act": ("silu", "swish")},
    check=llama_notes,
)
