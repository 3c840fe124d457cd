"""Qwen2 and Qwen3, and both with experts."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, optional_keys, to
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
from llmcompress.converters.operations import squeezed
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import Metadata, u32


def qwen_notes(config: Config) -> list[str]:
    if not config.get("use_sliding_window", default=False):
        return rope_notes(config)
    return ["use_sliding_window: llama.cpp attends to all tokens; contexts beyond the window will differ",
            *rope_notes(config)]  # fmt: skip


def shared_expert_keys(config: Config) -> Metadata:
    shared = config.get("shared_expert_intermediate_size")
    return optional_keys({"expert_shared_feed_forward_length": None if shared is None else u32(shared)})


def qwen_moe_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | expert_keys(config) | shared_expert_keys(config)


SHARED_EXPERT = {
    "layers.{i}.mlp.shared_expert_gate": to("blk.{i}.ffn_gate_inp_shexp", cut=squeezed),
    "layers.{i}.mlp.shared_expert.gate_proj": to("blk.{i}.ffn_gate_shexp"),
    "layers.{i}.mlp.shared_expert.up_proj": to("blk.{i}.ffn_up_shexp"),
    "layers.{i}.mlp.shared_expert.down_proj": to("blk.{i}.ffn_down_shexp"),
}
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

QWEN2_MOE = Architecture(
    name="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | EXPERTS | SHARED_EXPERT,
    keys=qwen_moe_keys,
    biases=QKV_BIASES,
    defaults=_DEFAULTS | {
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    assumes={
        "hidden_act": ("silu",), "norm_topk_prob": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
    },
    check=lambda config: check_square_attention(config) + qwen_notes(config),
)  # fmt: skip

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
    keys=qwen_moe_keys,
    defaults=_DEFAULTS | {"num_key_value_heads": 4, "norm_topk_prob": False, "num_experts": 128, "num_experts_per_tok": 8},
    assumes={
        "hidden_act": ("silu",), "attention_bias": (False,), "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,), "mlp_only_layers": ([],),  # every layer has experts
    },
    check=qwen_notes,
)  # fmt: skip
