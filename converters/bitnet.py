"""BitNet b1.58: Llama with a norm in front of the last linear of attention and MLP; llmcompress/sources/bitnet.py decodes its weights."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, check_square_attention
from llmcompress.converters.llama import llama_keys
from llmcompress.converters.rope import rope_notes

BITNET = Architecture(
    name="bitnet",
    classes=("BitnetForCausalLM", "BitNetForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP | {
        "layers.{i}.self_attn.attn_sub_norm": to("blk.{i}.attn_sub_norm"),
        "layers.{i}.self_attn.inner_attn_ln": to("blk.{i}.attn_sub_norm"),
        "layers.{i}.mlp.ffn_sub_norm": to("blk.{i}.ffn_sub_norm"),
        "layers.{i}.mlp.ffn_layernorm": to("blk.{i}.ffn_sub_norm"),
    },
    keys=lambda config: llama_keys(config, ()),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    # llama.cpp's graph has the first BitNets' activation, not the relu2 of microsoft's 2B-4T, and no head of its own
    assumes={"hidden_act": ("silu",), "tie_word_embeddings": (True,), "attention_bias": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config) + [
        "the model rounds activations to 8 bits for each token; llama.cpp does for quantized types alone, block by block"
    ],
    shapes=lambda config: {
        "attn_sub_norm": (config.need("hidden_size"),), "ffn_sub_norm": (config.need("intermediate_size"),),
    },
)  # fmt: skip
