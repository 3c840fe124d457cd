"""StableLM 2 and StableLM Zephyr."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QKV_BIASES,
    check_square_attention,
    partly_rotary_keys,
)
from llmcompress.converters.rope import rope_notes


def _layers(config: Config) -> dict[str, range]:
    layers = config.need("num_hidden_layers")
    return {
        "serial": range(0 if config.get("use_parallel_residual", default=False) else layers),
        "qk_norm": range(layers if config.get("qk_layernorm", default=False) else 0),
    }


STABLELM = Architecture(
    name="stablelm",
    classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | without(MLP, "post_attention_layernorm") | only("serial", {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    }) | only("qk_norm", {
        "layers.{i}.self_attn.q_layernorm.norms.{e}": to("blk.{i}.attn_q_norm"),  # one for each head
        "layers.{i}.self_attn.k_layernorm.norms.{e}": to("blk.{i}.attn_k_norm"),
    }),
    keys=partly_rotary_keys,
    biases=QKV_BIASES | {"attn_norm", "ffn_norm", "output_norm"},
    defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "rotary_pct": 0.25},
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
    layers=_layers,
    shapes=lambda config: {
        "attn_q_norm": (config.heads, config.head_dim), "attn_k_norm": (config.kv_heads, config.head_dim),
    },
)  # fmt: skip
