"""Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    QK_NORM,
    QKV_BIASES,
    check_square_attention,
    expert_keys,
    rotary_decoder_keys,
)  # fmt: skip
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import Metadata, u32


def qwen_notes(config: Config) -> list[str]:
    if not config.get("use_sliding_window", default=False):
        return rope_notes(config)
    return ["use_sliding_window: llama.cpp attends to all tokens; contexts beyond the window will differ",
            *rope_notes(config)]  # fmt: skip


def qwen3_moe_keys(config: Config) -> Metadata:
    inner = {"expert_feed_forward_length": u32(config.need("moe_intermediate_size"))}
    return rotary_decoder_keys(config) | expert_keys(config) | inner


_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32}

QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP,
    keys=rotary_decoder_keys,
    biases=QKV_BIASES,
    defaults=_DEFAULTS,
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + qwen_notes(config),
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | MLP,
    keys=rotary_decoder_keys,
    defaults=_DEFAULTS | {"head_dim": 128},
    assumes={"hidden_act": ("silu",), "attention_bias": (False,)},
    check=qwen_notes,
)

QWEN3_MOE = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | EXPERTS,
    keys=qwen3_moe_keys,
    defaults=_DEFAULTS | {"num_key_value_heads": 4, "norm_topk_prob": False, "num_experts": 128, "num_experts_per_tok": 8},
    assumes={
        "hidden_act": ("silu",), "attention_bias": (False,), "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,), "mlp_only_layers": ([],),  # every layer has experts
    },
    check=qwen_notes,
)  # fmt: skip
