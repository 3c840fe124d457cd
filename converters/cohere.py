"""Cohere's Command R, and Command R7B and A (Cohere 2)."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QKV_BIASES,
    check_square_attention,
    rotary_decoder_keys,
    sliding_keys,
)  # fmt: skip
from llmcompress.converters.rope import rope_notes, rotary_dimensions

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32

QK_NORM_LAYERS = 64  # llama.cpp looks for them in models of this many layers or more
# Attention and MLP read the same norm; its rotary embedding turns neighbours, as ggml's does.
TENSORS = EMBEDDING | ATTENTION | without(MLP, "post_attention_layernorm")


def cohere_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | {
        "logit_scale": f32(config.need("logit_scale")),
        "rope.dimension_count": u32(rotary_dimensions(config)),
    }


def _check(config: Config) -> list[str]:
    check_square_attention(config)
    normed, layers = config.get("use_qk_norm", default=False), config.need("num_hidden_layers")
    if normed != (layers >= QK_NORM_LAYERS):
        raise PlanError(
            f"config.json: use_qk_norm is {normed} with {layers} layers; llama.cpp's command-r norms queries and keys "
            f"from {QK_NORM_LAYERS} layers on"
        )
    return rope_notes(config)


_DEFAULTS = {
    "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "logit_scale": 0.0625, "tie_word_embeddings": True,
}  # fmt: skip
_ASSUMES = {"hidden_act": ("silu",), "tie_word_embeddings": (True,)}

COHERE = Architecture(
    name="command-r",
    classes=("CohereForCausalLM",),
    prefix="model.",
    tensors=TENSORS | only("qk_norm", {
        "layers.{i}.self_attn.q_norm": to("blk.{i}.attn_q_norm"),
        "layers.{i}.self_attn.k_norm": to("blk.{i}.attn_k_norm"),
    }),
    keys=cohere_keys,
    biases=QKV_BIASES,
    defaults=_DEFAULTS | {"rope_theta": 500000.0},
    assumes=_ASSUMES,
    check=_check,
    layers=lambda config: {
        "qk_norm": range(config.need("num_hidden_layers") if config.get("use_qk_norm") else 0)
    },
    shapes=lambda config: {
        "attn_q_norm": (config.heads, config.head_dim), "attn_k_norm": (config.kv_heads, config.head_dim),
    },
)  # fmt: skip

COHERE2 = Architecture(
    name="cohere2",
    classes=("Cohere2ForCausalLM",),
    prefix="model.",
    tensors=TENSORS,
    keys=lambda config: cohere_keys(config) | sliding_keys(config),
    biases=QKV_BIASES,
    defaults=_DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": 4},
    assumes=_ASSUMES,
    check=lambda config: check_square_attention(config) + rope_notes(config),
)
