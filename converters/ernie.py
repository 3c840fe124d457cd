"""Baidu's ERNIE 4.5, and ERNIE 4.5 with experts."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    SHARED_EXPERTS,
    expert_keys,
    partly_rotary_keys,
)
from llmcompress.converters.operations import squeezed
from llmcompress.converters.rope import rope_notes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, u32

ERNIE4_5 = Architecture(
    name="ernie4_5",
    classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP,  # its rotary embedding turns neighbours, as ggml's does
    keys=partly_rotary_keys,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 2, "rope_theta": 500000.0,
        "head_dim": 128, "tie_word_embeddings": True,
    },
    assumes={"hidden_act": ("silu",), "use_bias": (False,)},
    check=rope_notes,
)  # fmt: skip


def _layers(config: Config) -> dict[str, list[int]]:
    layers = range(config.need("num_hidden_layers"))
    first, step = config.need("moe_layer_start_index"), config.need("moe_layer_interval")
    experts = [layer for layer in layers if layer >= first and (layer + 1) % step == 0]
    return {"experts": experts, "dense": [layer for layer in layers if layer not in experts]}


def ernie_moe_keys(config: Config) -> Metadata:
    shared = config.need("moe_num_shared_experts") * config.need("moe_intermediate_size")
    return partly_rotary_keys(config) | expert_keys(config) | {
        "interleave_moe_layer_step": u32(config.need("moe_layer_interval")),
        "leading_dense_block_count": u32(config.need("moe_layer_start_index")),
        "expert_shared_count": u32(config.need("moe_num_shared_experts")),
        "expert_shared_feed_forward_length": u32(shared),
    }  # fmt: skip


def _check_moe(config: Config) -> list[str]:
    layers, last = config.need("num_hidden_layers"), config.get("moe_layer_end_index", default=-1)
    if last not in (-1, layers - 1):
        raise PlanError(
            f"config.json: layers behind moe_layer_end_index {last} have no experts, in llama.cpp they would"
        )
    return rope_notes(config)


ERNIE4_5_MOE = replace(
    ERNIE4_5,
    name="ernie4_5-moe",
    classes=("Ernie4_5_MoeForCausalLM",),
    tensors=EMBEDDING | ATTENTION | only("dense", MLP) | only("experts", EXPERTS | SHARED_EXPERTS | {
        "layers.{i}.mlp.moe_statics.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", cut=squeezed, whole=True),
    }) | {"layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm")},
    keys=ernie_moe_keys,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 4, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_intermediate_size": 1536,
    },
    check=_check_moe,
    layers=_layers,
    left_out=dict.fromkeys(("model.mtp_",), "multi-token prediction"),
)  # fmt: skip
