"""Liquid's LFM2, dense and with experts: short convolutions, and attention in some layers."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, renamed, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    FUSED_EXPERTS,
    SIGMOID,
    check_square_attention,
    expert_keys,
    full_attention_layers,
    rotary_decoder_keys,
    routing_keys,
)
from llmcompress.converters.mamba import kv_heads_of_layers
from llmcompress.converters.operations import squeezed
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import Metadata, f32, u32


def _inner(config: Config) -> int:
    """The MLP's size, which the config may state before it is adjusted."""
    inner = config.get("block_ff_dim", "intermediate_size")
    if not config.get("block_auto_adjust_ff_dim", default=False):
        return inner
    unit, adjusted = config.need("block_multiple_of"), int(2 * inner / 3)
    adjusted = int(config.get("block_ffn_dim_multiplier", default=1.0) * adjusted)
    return -(-adjusted // unit) * unit


def _layers(config: Config) -> dict[str, list[int]]:
    layers = range(config.need("num_hidden_layers"))
    attention = config.get("full_attn_idxs") or full_attention_layers(config, every=1)
    dense = config.get("num_dense_layers", default=len(layers))
    return {
        "attention": list(attention),
        "convolution": [layer for layer in layers if layer not in attention],
        "dense": list(layers[:dense]),
        "experts": list(layers[dense:]),
    }


def lfm2_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | kv_heads_of_layers(config, _layers(config)["attention"]) | {
        "feed_forward_length": u32(_inner(config)),
        "attention.layer_norm_rms_epsilon": f32(config.need("norm_eps")),
        "shortconv.l_cache": u32(config.need("conv_L_cache")),
    }  # fmt: skip


LFM2 = Architecture(
    name="lfm2",
    classes=("Lfm2ForCausalLM", "LFM2ForCausalLM"),
    prefix="model.",
    tensors={
        "embed_tokens": to("token_embd"),
        "embedding_norm": to("token_embd_norm"),  # the last norm, by its name in GGUF
        "lm_head": to("output"),
        "layers.{i}.operator_norm": to("blk.{i}.attn_norm"),
        "layers.{i}.ffn_norm": to("blk.{i}.ffn_norm"),
    } | only("dense", {
        "layers.{i}.feed_forward.w1": to("blk.{i}.ffn_gate"),
        "layers.{i}.feed_forward.w2": to("blk.{i}.ffn_down"),
        "layers.{i}.feed_forward.w3": to("blk.{i}.ffn_up"),
    }) | only("attention", {
        "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q"),
        "layers.{i}.self_attn.k_proj": to("blk.{i}.attn_k"),
        "layers.{i}.self_attn.v_proj": to("blk.{i}.attn_v"),
        "layers.{i}.self_attn.out_proj": to("blk.{i}.attn_output"),
        "layers.{i}.self_attn.q_layernorm": to("blk.{i}.attn_q_norm"),
        "layers.{i}.self_attn.k_layernorm": to("blk.{i}.attn_k_norm"),
    }) | only("convolution", {
        "layers.{i}.conv.conv": to("blk.{i}.shortconv.conv", cut=squeezed),
        "layers.{i}.conv.in_proj": to("blk.{i}.shortconv.in_proj"),
        "layers.{i}.conv.out_proj": to("blk.{i}.shortconv.out_proj"),
    }),
    keys=lfm2_keys,
    defaults={
        "norm_eps": 1e-5, "max_position_embeddings": 128000, "num_key_value_heads": 8, "conv_L_cache": 3,
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    assumes={"conv_bias": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
    layers=_layers,
)  # fmt: skip

LFM2_MOE = replace(
    LFM2,
    name="lfm2moe",
    classes=("Lfm2MoeForCausalLM",),
    tensors=LFM2.tensors | only("experts", {
        **renamed(FUSED_EXPERTS, {".mlp.": ".feed_forward."}),
        "layers.{i}.feed_forward.expert_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
        "layers.{i}.feed_forward.experts.{e}.w1": to("blk.{i}.ffn_gate_exps"),
        "layers.{i}.feed_forward.experts.{e}.w2": to("blk.{i}.ffn_down_exps"),
        "layers.{i}.feed_forward.experts.{e}.w3": to("blk.{i}.ffn_up_exps"),
    }),
    keys=lambda config: lfm2_keys(config) | expert_keys(config) | routing_keys(config, SIGMOID) | {
        "leading_dense_block_count": u32(config.need("num_dense_layers")),
    },
    defaults={
        "norm_eps": 1e-5, "max_position_embeddings": 128000, "num_key_value_heads": 8, "conv_L_cache": 3, "rope_theta": 1e6,
        "tie_word_embeddings": True, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "moe_intermediate_size": 1792,
    },
    assumes={"conv_bias": (False,), "use_expert_bias": (True,), "norm_topk_prob": (True,), "routed_scaling_factor": (1.0,)},
)  # fmt: skip
