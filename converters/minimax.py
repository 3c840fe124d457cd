"""MiniMax M2."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    QK_NORM,
    SIGMOID,
    expert_keys,
    rotary_decoder_keys,
)
from llmcompress.converters.mixtral import W_EXPERTS
from llmcompress.converters.rope import rope_notes, rotary_dimensions

from llmcompress.gguf.value import Metadata, u32


def minimax_m2_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | expert_keys(config) | {
        "expert_feed_forward_length": u32(config.need("intermediate_size")),
        "expert_gating_func": u32(SIGMOID),
        "rope.dimension_count": u32(config.get("rotary_dim", default=rotary_dimensions(config))),
    }  # fmt: skip


MINIMAX_M2 = Architecture(
    name="minimax-m2",
    classes=("MiniMaxM2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | W_EXPERTS | {
        "layers.{i}.block_sparse_moe.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
        "layers.{i}.mlp.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
    },
    keys=minimax_m2_keys,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 196608, "num_key_value_heads": 8, "head_dim": 128,
        "num_local_experts": 256, "num_experts_per_tok": 8, "rope_theta": 5e6,
    },
    assumes={"hidden_act": ("silu",), "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)},
    check=rope_notes,
    shapes=lambda config: {  # normed across all heads
        "attn_q_norm": (config.heads * config.head_dim,), "attn_k_norm": (config.kv_heads * config.head_dim,),
    },
    left_out={"model.mtp_modules.": "multi-token prediction"},
)  # fmt: skip
