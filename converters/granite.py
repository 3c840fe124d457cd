"""Granite, Granite with experts, and the hybrid of attention and Mamba 2."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, optional_keys, renamed, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    EMBEDDING,
    FUSED_EXPERTS,
    MLP,
    QKV_BIASES,
    check_square_attention,
    expert_keys,
    full_attention_layers,
)
from llmcompress.converters.llama import ROTARY_ATTENTION, llama_keys
from llmcompress.converters.mamba import (
    MAMBA2_MIXER,
    MAMBA_BIASES,
    check_time_steps,
    groups_of,
    kv_heads_of_layers,
    mixer_at,
    ssm_keys,
)
from llmcompress.converters.rope import rope_notes, rope_tensors

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, boolean, f32, u32


def granite_keys(config: Config) -> Metadata:
    return llama_keys(config) | scale_keys(config)


def scale_keys(config: Config) -> Metadata:
    """What Granite multiplies by on the way, and divides its logits by."""
    return {
        "attention.scale": f32(config.need("attention_multiplier")),
        "embedding_scale": f32(config.need("embedding_multiplier")),
        "residual_scale": f32(config.need("residual_multiplier")),
        "logit_scale": f32(config.need("logits_scaling")),
    }


def shared_keys(config: Config) -> Metadata:
    inner = config.get("shared_intermediate_size", default=0)
    return optional_keys({"expert_shared_feed_forward_length": u32(inner) if inner else None})


def shared_layers(config: Config) -> dict[str, range]:
    """All layers have a shared expert, or none."""
    return {
        "shared": range(config.need("num_hidden_layers") if config.get("shared_intermediate_size") else 0)
    }


SCALES = {
    "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
GRANITE_EXPERTS = {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    **without(renamed(FUSED_EXPERTS, {".mlp.": ".block_sparse_moe."}), "gate"),
    "layers.{i}.block_sparse_moe.router": to("blk.{i}.ffn_gate_inp"),
    "layers.{i}.block_sparse_moe.router.layer": to("blk.{i}.ffn_gate_inp"),
    "layers.{i}.block_sparse_moe.input_linear": to("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
    "layers.{i}.block_sparse_moe.output_linear": to("blk.{i}.ffn_down_exps"),
    **only("shared", {
        "layers.{i}.shared_mlp.input_linear": to("blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp"),
        "layers.{i}.shared_mlp.output_linear": to("blk.{i}.ffn_down_shexp"),
    }),
}  # fmt: skip

GRANITE = Architecture(
    name="granite",
    classes=("GraniteForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | MLP,
    keys=granite_keys,
    computed=rope_tensors,
    biases=QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    defaults=SCALES | {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    assumes={"hidden_act": ("silu",)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)

GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    tensors=EMBEDDING | ROTARY_ATTENTION | GRANITE_EXPERTS,
    keys=lambda config: granite_keys(config) | expert_keys(config) | shared_keys(config),
    biases=QKV_BIASES | {"attn_output"},
    defaults=GRANITE.defaults | {"num_local_experts": 8, "num_experts_per_tok": 2},
    layers=shared_layers,
)


def _attention(config: Config) -> list[int]:
    return full_attention_layers(config, every=1)


def _hybrid_layers(config: Config) -> dict[str, Container[int]]:
    attention = _attention(config)
    state_spaces = [layer for layer in range(config.need("num_hidden_layers")) if layer not in attention]
    return {"attention": attention, "mamba": state_spaces, **shared_layers(config)}


def _positions(config: Config) -> Metadata:
    """Whether the hybrid's attention turns; for other architectures this key says nothing of the kind."""
    return {"rope.scaling.finetuned": boolean(config.get("position_embedding_type") == "rope")}


def _dense_keys(config: Config) -> Metadata:
    """The size of the shared MLP, where it is the only one."""
    return {"feed_forward_length": u32(config.need("shared_intermediate_size"))}


def hybrid_keys(config: Config) -> Metadata:
    heads, size = config.need("mamba_n_heads"), config.need("mamba_d_head")
    ssm = ssm_keys(
        config, heads * size, config.need("mamba_d_state"), config.need("mamba_d_conv"), heads, config.need("mamba_n_groups")
    )  # fmt: skip
    return granite_keys(config) | ssm | kv_heads_of_layers(config, _attention(config)) | _positions(config)


def _check_hybrid(config: Config) -> list[str]:
    inner, hidden = config.need("mamba_n_heads") * config.need("mamba_d_head"), config.need("hidden_size")
    if inner != 2 * hidden:
        raise PlanError(f"config.json: state spaces of {inner}, llama.cpp's granitehybrid has {2 * hidden}")
    return check_square_attention(config) + check_time_steps(config) + rope_notes(config)


def _check_attention_alone(config: Config) -> list[str]:
    if config.get("num_local_experts") and config.get("position_embedding_type") != "rope":
        raise PlanError(
            "config.json: attention in all layers, experts and no positions; llama.cpp's granitemoe has positions"
        )
    return GRANITE.check(config)


def _kind_of_hybrid(config: Config) -> Architecture | None:
    """The class stands for any mixture of attention, state spaces and experts."""
    hybrid = len(_attention(config)) < config.need("num_hidden_layers")
    if config.get("num_local_experts"):
        return None if hybrid else GRANITE_ATTENTION_MOE
    return GRANITE_HYBRID_DENSE if hybrid else GRANITE_ATTENTION


_DENSE = {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.shared_mlp.input_linear": to("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "layers.{i}.shared_mlp.output_linear": to("blk.{i}.ffn_down"),
}
_MIXERS = (
    EMBEDDING | {"layers.{i}.input_layernorm": ROTARY_ATTENTION["layers.{i}.input_layernorm"]}
    | only("attention", without(ROTARY_ATTENTION, "input_layernorm"))
    | only("mamba", mixer_at("layers.{i}.mamba", MAMBA2_MIXER) | {
        "layers.{i}.mamba.norm": to("blk.{i}.ssm_norm", cut=groups_of("mamba_n_groups")),
    })
)  # fmt: skip

GRANITE_HYBRID = replace(
    GRANITE,
    name="granitehybrid",
    classes=("GraniteMoeHybridForCausalLM",),
    tensors=_MIXERS | GRANITE_EXPERTS,
    keys=lambda config: hybrid_keys(config) | expert_keys(config) | shared_keys(config),
    biases=QKV_BIASES | {"attn_output"} | MAMBA_BIASES,
    defaults=SCALES | {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": 64,
        "mamba_d_conv": 4,
    },
    assumes={"hidden_act": ("silu",), "mamba_conv_bias": (True,), "mamba_proj_bias": (False,)},
    check=_check_hybrid,
    layers=_hybrid_layers,
    instead=_kind_of_hybrid,
)  # fmt: skip

GRANITE_HYBRID_DENSE = replace(
    GRANITE_HYBRID,
    tensors=_MIXERS | _DENSE,
    keys=lambda config: hybrid_keys(config) | _dense_keys(config),
    instead=lambda config: None,
)

GRANITE_ATTENTION = replace(
    GRANITE_HYBRID_DENSE,
    name="granite",
    tensors=EMBEDDING | ROTARY_ATTENTION | _DENSE,
    keys=lambda config: granite_keys(config) | _dense_keys(config) | _positions(config),
    biases=QKV_BIASES | {"attn_output"},
    check=_check_attention_alone,
    layers=lambda config: {},
)

GRANITE_ATTENTION_MOE = replace(
    GRANITE_ATTENTION,
    name="granitemoe",
    tensors=EMBEDDING | ROTARY_ATTENTION | GRANITE_EXPERTS,
    keys=GRANITE_MOE.keys,
    layers=shared_layers,
)
