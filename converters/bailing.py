"""Ant's Ling (Bailing), 1 and 2: experts beside one that all tokens take, attention in one fused tensor."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, Table, only, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    EXPERTS,
    MLP,
    SHARED_EXPERTS,
    SIGMOID,
    SOFTMAX,
    check_square_attention,
    expert_keys,
    leading_dense,
    partly_rotary_keys,
    routing_keys,
)
from llmcompress.converters.llama import llama_keys
from llmcompress.converters.operations import copied, in_groups, rotary
from llmcompress.converters.rope import rope_notes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, u32


def _qkv(config: Config) -> tuple[int, tuple[int, int, int]]:
    size = config.head_dim
    return 1, (config.heads * size, config.kv_heads * size, config.kv_heads * size)


def _shared_size(config: Config) -> int:
    return config.get("moe_shared_expert_intermediate_size", default=config.need("moe_intermediate_size"))


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.need("hidden_size"), _shared_size(config) * config.need("num_shared_experts")
    return {
        "ffn_gate_shexp": (inner, hidden),
        "ffn_up_shexp": (inner, hidden),
        "ffn_down_shexp": (hidden, inner),
    }


def _moe_keys(config: Config) -> Metadata:
    return expert_keys(config) | {
        "leading_dense_block_count": u32(len(leading_dense(config)["dense"])),
        "expert_shared_count": u32(config.need("num_shared_experts")),
    }


def _check(config: Config) -> list[str]:
    if _shared_size(config) != config.need("moe_intermediate_size"):
        raise PlanError(
            "config.json: moe_shared_expert_intermediate_size; llama.cpp takes moe_intermediate_size"
        )
    if config.get("first_k_dense_replace"):
        raise PlanError(
            "config.json: first_k_dense_replace; llama.cpp's bailingmoe has experts in all layers"
        )
    return rope_notes(config)


_OUTSIDE: Table = {
    "word_embeddings": to("token_embd"),
    "norm": to("output_norm"),
    "lm_head": to("output"),
    "layers.{i}.input_layernorm": to("blk.{i}.attn_norm"),
    "layers.{i}.attention.dense": to("blk.{i}.attn_output"),
}
_ASSUMES = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "tie_word_embeddings": (False,),
}

BAILING_MOE = Architecture(
    name="bailingmoe",
    classes=("BailingMoeForCausalLM",),
    prefix="model.",
    tensors=_OUTSIDE | EXPERTS | SHARED_EXPERTS | {
        "layers.{i}.attention.query_key_value": to(
            "blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", cut=in_groups(_qkv, ((0,), (1,), (2,))),
            operation=(rotary("heads"), rotary("kv_heads"), copied),
        ),
    },
    keys=lambda config: llama_keys(config, ()) | _moe_keys(config) | routing_keys(config, SOFTMAX),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "num_shared_experts": 0, "norm_topk_prob": True},
    assumes=_ASSUMES | {"norm_head": (False,), "multi_gate": (False,)},
    check=_check,
    shapes=_shapes,
)  # fmt: skip

BAILING_MOE2 = Architecture(
    name="bailingmoe2",
    classes=("BailingMoeV2ForCausalLM",),
    prefix="model.",
    tensors=_OUTSIDE | {
        "layers.{i}.attention.query_key_value": to("blk.{i}.attn_qkv"),
        "layers.{i}.attention.query_layernorm": to("blk.{i}.attn_q_norm"),
        "layers.{i}.attention.key_layernorm": to("blk.{i}.attn_k_norm"),
    } | only("dense", MLP) | only("experts", EXPERTS | SHARED_EXPERTS) | only("biased", {
        "layers.{i}.mlp.gate.expert_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
    }) | {"layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm")},
    keys=lambda config: partly_rotary_keys(config) | _moe_keys(config) | routing_keys(config, SIGMOID) | {
        "expert_shared_feed_forward_length": u32(_shared_size(config)),
    },
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_shared_experts": 0, "norm_topk_prob": True,
        "partial_rotary_factor": 0.5, "n_group": 1, "topk_group": 1, "moe_router_enable_expert_bias": True,
    },
    assumes=_ASSUMES | {
        "use_qk_norm": (True,), "score_function": ("sigmoid",), "norm_topk_prob": (True,),
    },
    check=lambda config: check_square_attention(config) + rope_notes(config),
    layers=lambda config: leading_dense(config) | {
        "biased": leading_dense(config)["experts"] if config.get("moe_router_enable_expert_bias") else range(0),
    },
    shapes=_shapes,
)  # fmt: skip
