"""Phi-2, Phi-3, and Phi-3.5 with experts."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QKV_BIASES,
    attention_notes,
    check_square_attention,
    expert_keys,
    partly_rotary_keys,
    rotary_decoder_keys,
)  # fmt: skip
from llmcompress.converters.mixtral import W_EXPERTS
from llmcompress.converters.rope import BY_TENSORS, rope_notes, rope_tensors, rotary_dimensions

from llmcompress.gguf.value import Metadata, u32


def phi3_keys(config: Config) -> Metadata:
    trained = config.get("original_max_position_embeddings", default=config.need("max_position_embeddings"))
    return (
        {"rope.scaling.original_context_length": u32(trained)}
        | rotary_decoder_keys(config, rope_tensors=BY_TENSORS)
        | {
            "rope.dimension_count": u32(rotary_dimensions(config)),
            "attention.sliding_window": u32(config.get("sliding_window", default=0)),
        }
    )


PHI2 = Architecture(
    name="phi2",
    classes=("PhiForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "o_proj") | {
        "final_layernorm": to("output_norm"),
        "layers.{i}.self_attn.dense": to("blk.{i}.attn_output"),
        "layers.{i}.mlp.fc1": to("blk.{i}.ffn_up"),  # reads the norm that attention reads
        "layers.{i}.mlp.fc2": to("blk.{i}.ffn_down"),
    },
    keys=partly_rotary_keys,
    biases=QKV_BIASES | {"attn_norm", "attn_output", "ffn_up", "ffn_down", "output_norm", "output"},
    defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "partial_rotary_factor": 0.5},
    assumes={"hidden_act": ("gelu_new",), "qk_layernorm": (False,), "tie_word_embeddings": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)  # fmt: skip

PHI3 = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "q_proj", "k_proj", "v_proj") | {
        "layers.{i}.self_attn.qkv_proj": to("blk.{i}.attn_qkv"),
    } | without(MLP, "gate_proj", "up_proj") | {
        "layers.{i}.mlp.gate_up_proj": to("blk.{i}.ffn_up"),  # ggml splits it after the product
    },
    keys=phi3_keys,
    computed=rope_tensors,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + attention_notes(config),
)  # fmt: skip


def _phimoe_notes(config: Config) -> list[str]:
    return check_square_attention(config) + [
        "llama.cpp norms by the root mean square and weighs experts by softmax, the model by LayerNorm and sparsemixer: "
        "the output will differ",
        *attention_notes(config),
    ]


PHIMOE = Architecture(
    name="phimoe",
    classes=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | {"layers.{i}.mlp.router": to("blk.{i}.ffn_gate_inp")} | W_EXPERTS,
    keys=lambda config: phi3_keys(config) | expert_keys(config),
    computed=rope_tensors,
    biases=QKV_BIASES | {"attn_norm", "attn_output", "ffn_norm", "output_norm", "output"},
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
        "num_local_experts": 16, "num_experts_per_tok": 2,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (True,), "lm_head_bias": (True,)},
    check=_phimoe_notes,
)  # fmt: skip
