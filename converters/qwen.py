"""Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, Config, to
from llmcompress.converters.decoder import (
    ATTENTION, EMBEDDING, EXPERTS, FUSED_EXPERTS, MLP, QK_NORM, rotary_decoder_keys,
)  # fmt: skip
from llmcompress.converters.rope import rope_notes
from llmcompress.gguf.value import Metadata, u32


def qwen_notes(config: Config) -> list[str]:
    if not config.get("use_sliding_window", default=False):
        return rope_notes(config)
    return ["use_sliding_window: llama.cpp attends to all tokens; contexts beyond the window will differ",
            *rope_notes(config)]  # fmt: skip


def qwen3_moe_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | {"expert_feed_forward_length": u32(config.need("moe_intermediate_size"))}


QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP,
    keys=rotary_decoder_keys,
    assumes={"hidden_act": ("silu",)},
    check=qwen_notes,
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | MLP,
    keys=rotary_decoder_keys,
    assumes={"hidden_act": ("silu",)},
    check=qwen_notes,
)

QWEN3_MOE = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | MLP | FUSED_EXPERTS | {
        "layers.{i}.mlp.experts.{e}.gate_proj": to("blk.{i}.ffn_gate_exps"),
        "layers.{i}.mlp.experts.{e}.up_proj": to("blk.{i}.ffn_up_exps"),
        "layers.{i}.mlp.experts.{e}.down_proj": to("blk.{i}.ffn_down_exps"),
    },
    keys=qwen3_moe_keys,
    assumes={"hidden_act": ("silu",), "norm_topk_prob": (True,)},
    check=qwen_notes,
    optional=EXPERTS | {"blk.{i}.ffn_gate", "blk.{i}.ffn_up", "blk.{i}.ffn_down"},  # a layer is dense or has experts
)  # fmt: skip
