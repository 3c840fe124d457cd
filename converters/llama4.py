"""Llama 4 (text)."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, only, renamed, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, expert_keys, partly_rotary_keys
from llmcompress.converters.operations import transposed
from llmcompress.converters.rope import rope_notes, rope_tensors

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, u32


def llama4_keys(config: Config) -> Metadata:
    return partly_rotary_keys(config, rope_tensors=("llama3",)) | expert_keys(config) | {
        "feed_forward_length": u32(config.need("intermediate_size_mlp")),
        "expert_feed_forward_length": u32(config.need("intermediate_size")),
        "interleave_moe_layer_step": u32(config.need("interleave_moe_layer_step")),
    }  # fmt: skip


def _layers(config: Config) -> dict[str, list[int]]:
    layers, step = range(config.need("num_hidden_layers")), config.need("interleave_moe_layer_step")
    experts = [layer for layer in layers if (layer + 1) % step == 0]
    return {"experts": experts, "dense": [layer for layer in layers if layer not in experts]}


def _check(config: Config) -> list[str]:
    layers, experts = config.need("num_hidden_layers"), config.need("num_local_experts")
    if config.get("use_qk_norm", default=True) != (experts != 128):
        raise PlanError(
            "config.json: use_qk_norm; llama.cpp's llama4 norms queries and keys but for the model of 128 experts"
        )
    turned = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if (config.get("no_rope_layers") or turned) != turned:
        raise PlanError(
            "config.json: no_rope_layers is not every fourth layer, which is what llama.cpp's llama4 computes"
        )
    if config.get("moe_layers", default=_layers(config)["experts"]) != _layers(config)["experts"]:
        raise PlanError(
            "config.json: moe_layers is not each that interleave_moe_layer_step names, which llama.cpp takes"
        )
    return rope_notes(config)


LLAMA4 = Architecture(
    name="llama4",
    classes=("Llama4ForCausalLM",),
    prefix="model.",
    # its rotary embedding turns neighbours, as ggml's does
    tensors=EMBEDDING | ATTENTION | only("dense", renamed(MLP, {".mlp.": ".feed_forward."})) | only("experts", {
        "layers.{i}.feed_forward.router": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.feed_forward.experts.gate_up_proj": to(
            "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps", cut=transposed,
        ),
        "layers.{i}.feed_forward.experts.down_proj": to("blk.{i}.ffn_down_exps", cut=transposed),
        "layers.{i}.feed_forward.shared_expert.gate_proj": to("blk.{i}.ffn_gate_shexp"),
        "layers.{i}.feed_forward.shared_expert.up_proj": to("blk.{i}.ffn_up_shexp"),
        "layers.{i}.feed_forward.shared_expert.down_proj": to("blk.{i}.ffn_down_shexp"),
    }) | {"layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm")},
    keys=llama4_keys,
    computed=rope_tensors,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128,
        "rope_theta": 500000.0, "intermediate_size_mlp": 16384, "num_local_experts": 16, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    assumes={
        "hidden_act": ("silu",), "attention_bias": (False,), "attention_chunk_size": (8192,), "floor_scale": (8192,),
        "attn_scale": (0.1,), "attn_temperature_tuning": (True, 4),
    },
    check=_check,
    layers=_layers,
)  # fmt: skip
