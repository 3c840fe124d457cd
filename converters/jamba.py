"""AI21's Jamba: Mamba, attention in some layers, experts in some."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, only, renamed, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    FUSED_EXPERTS,
    check_square_attention,
    decoder_keys,
    expert_keys,
)
from llmcompress.converters.mamba import MAMBA_BIASES, MAMBA_MIXER, kv_heads_of_layers, mixer_at, ssm_keys

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata


def _each(config: Config, kind: str) -> list[int]:
    period, offset = config.need(f"{kind}_layer_period"), config.need(f"{kind}_layer_offset")
    return [layer for layer in range(config.need("num_hidden_layers")) if layer % period == offset]


def _layers(config: Config) -> dict[str, list[int]]:
    layers, attention = range(config.need("num_hidden_layers")), _each(config, "attn")
    experts = _each(config, "expert") if config.need("num_experts") > 1 else []
    return {
        "attention": attention, "mamba": [layer for layer in layers if layer not in attention],
        "experts": experts, "dense": [layer for layer in layers if layer not in experts],
    }  # fmt: skip


def jamba_keys(config: Config) -> Metadata:
    hidden = config.need("hidden_size")
    rank = config.get("mamba_dt_rank", default="auto")
    return decoder_keys(config) | expert_keys(config) | kv_heads_of_layers(config, _each(config, "attn")) | ssm_keys(
        config, config.need("mamba_expand") * hidden, config.need("mamba_d_state"), config.need("mamba_d_conv"),
        -(-hidden // 16) if rank == "auto" else rank, None,
    )  # fmt: skip


def _check(config: Config) -> list[str]:
    if config.need("mamba_expand") != 2:
        raise PlanError(f"config.json: mamba_expand is {config.get('mamba_expand')}, llama.cpp's jamba has 2")
    return check_square_attention(config)


JAMBA = Architecture(
    name="jamba",
    classes=("JambaForCausalLM",),
    prefix="model.",
    tensors=without(EMBEDDING, "norm") | {
        "final_layernorm": to("output_norm"),
        "layers.{i}.input_layernorm": to("blk.{i}.attn_norm"),
        "layers.{i}.pre_ff_layernorm": to("blk.{i}.ffn_norm"),
    } | only("attention", without(ATTENTION, "input_layernorm")) | only("mamba", mixer_at("layers.{i}.mamba", MAMBA_MIXER) | {
        "layers.{i}.mamba.dt_layernorm": to("blk.{i}.ssm_dt_norm"),
        "layers.{i}.mamba.b_layernorm": to("blk.{i}.ssm_b_norm"),
        "layers.{i}.mamba.c_layernorm": to("blk.{i}.ssm_c_norm"),
    }) | only("dense", {
        "layers.{i}.feed_forward.gate_proj": to("blk.{i}.ffn_gate"),
        "layers.{i}.feed_forward.up_proj": to("blk.{i}.ffn_up"),
        "layers.{i}.feed_forward.down_proj": to("blk.{i}.ffn_down"),
    }) | only("experts", {
        **without(renamed(FUSED_EXPERTS, {".mlp.": ".feed_forward."}), "gate"),
        "layers.{i}.feed_forward.router": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.feed_forward.experts.{e}.gate_proj": to("blk.{i}.ffn_gate_exps"),
        "layers.{i}.feed_forward.experts.{e}.up_proj": to("blk.{i}.ffn_up_exps"),
        "layers.{i}.feed_forward.experts.{e}.down_proj": to("blk.{i}.ffn_down_exps"),
    }),
    keys=jamba_keys,
    biases=MAMBA_BIASES,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "num_key_value_heads": 8, "num_experts": 16,
        "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8,
        "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    },
    assumes={"hidden_act": ("silu",), "mamba_conv_bias": (True,), "mamba_proj_bias": (False,)},
    check=_check,
    layers=_layers,
)  # fmt: skip
