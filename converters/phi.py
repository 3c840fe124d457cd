"""Phi-3."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    attention_notes,
    check_square_attention,
    rotary_decoder_keys,
)  # fmt: skip
from llmcompress.converters.rope import rope_tensors, rotary_dimensions

from llmcompress.gguf.value import Metadata, u32


def phi3_keys(config: Config) -> Metadata:
    trained = config.get("original_max_position_embeddings", default=config.need("max_position_embeddings"))
    return (
        {"rope.scaling.original_context_length": u32(trained)}
        | rotary_decoder_keys(config, rope_tensors=True)
        | {
            "rope.dimension_count": u32(rotary_dimensions(config)),
            "attention.sliding_window": u32(config.get("sliding_window", default=0)),
        }
    )


def _without_split(table: dict, *modules: str) -> dict:
    """A decoder's table without the modules that Phi-3 keeps fused."""
    return {module: rule for module, rule in table.items() if not module.endswith(modules)}


PHI3 = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | _without_split(ATTENTION, "q_proj", "k_proj", "v_proj") | {
        "layers.{i}.self_attn.qkv_proj": to("blk.{i}.attn_qkv"),
    } | _without_split(MLP, "gate_proj", "up_proj") | {
        "layers.{i}.mlp.gate_up_proj": to("blk.{i}.ffn_up"),  # ggml splits it after the product
    },
    keys=phi3_keys,
    computed=rope_tensors,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + attention_notes(config),
)  # fmt: skip
