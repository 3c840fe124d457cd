"""OpenAI's gpt-oss."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    QKV_BIASES,
    expert_keys,
    rotary_decoder_keys,
    sliding_keys,
)
from llmcompress.converters.operations import every, transposed, transposed_turns, value_parts
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import Metadata, u32


def gpt_oss_keys(config: Config) -> Metadata:
    inner = {"expert_feed_forward_length": u32(config.need("intermediate_size"))}
    return rotary_decoder_keys(config) | expert_keys(config) | inner | sliding_keys(config)


GPT_OSS = Architecture(
    name="gpt-oss",
    classes=("GptOssForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | {
        "layers.{i}.self_attn.sinks": to("blk.{i}.attn_sinks"),
        "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),  # behind attention, before the MLP
        "layers.{i}.mlp.router": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.mlp.experts.gate_up_proj": to(  # gate and up take turns
            "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps", cut=transposed_turns,
        ),
        "layers.{i}.mlp.experts.gate_up_proj_bias": to(
            "blk.{i}.ffn_gate_exps.bias", "blk.{i}.ffn_up_exps.bias",
            operation=(every(0, 2), every(1, 2)), cut=value_parts, whole=True,
        ),
        "layers.{i}.mlp.experts.down_proj": to("blk.{i}.ffn_down_exps", cut=transposed),
        "layers.{i}.mlp.experts.down_proj_bias": to("blk.{i}.ffn_down_exps.bias", whole=True),
    },
    keys=gpt_oss_keys,
    biases=QKV_BIASES | {"attn_output", "ffn_gate_inp"},
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64,
        "sliding_window": 128, "sliding_window_pattern": 2, "num_local_experts": 128, "num_experts_per_tok": 4,
        "rope_theta": 150000.0,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    check=rope_notes,
)  # fmt: skip
