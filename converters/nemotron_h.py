"""NVIDIA's Nemotron-H and Nemotron 3: each layer is Mamba 2, attention without positions, an MLP or experts."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    QKV_BIASES,
    SIGMOID,
    decoder_keys,
    expert_keys,
    routing_keys,
)
from llmcompress.converters.mamba import (
    BACKBONE,
    MAMBA2_MIXER,
    MAMBA_BIASES,
    check_time_steps,
    groups_of,
    kv_heads_of_layers,
    mixer_at,
    ssm_keys,
)

from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata, ValueType, array, u32

KINDS = {
    "M": "mamba", "mamba": "mamba", "linear_attention": "mamba",
    "*": "attention", "attention": "attention", "full_attention": "attention",
    "-": "dense", "mlp": "dense", "E": "experts", "moe": "experts",
}  # fmt: skip


def _layers(config: Config) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {"mamba": [], "attention": [], "dense": [], "experts": []}
    for layer, name in enumerate(config.need("layers_block_type", "hybrid_override_pattern")):
        if name not in KINDS:
            raise PlanError(
                f"config.json: layer {layer} is {shown(name)}; known are {', '.join(map(repr, KINDS))}"
            )
        kinds[KINDS[name]].append(layer)
    return kinds | {"latent": kinds["experts"] if config.get("moe_latent_size") else []}


def nemotron_h_keys(config: Config) -> Metadata:
    layers, heads, size = _layers(config), config.need("mamba_num_heads"), config.need("mamba_head_dim")
    inner = config.need("intermediate_size" if layers["dense"] else "moe_intermediate_size")
    inside = layers["dense"] + layers["experts"]
    return decoder_keys(config) | kv_heads_of_layers(config, layers["attention"]) | ssm_keys(
        config, heads * size, config.need("ssm_state_size"), config.need("conv_kernel", "mamba_d_conv"), heads,
        config.need("n_groups", "mamba_n_groups"),
    ) | {
        "feed_forward_length": array(
            ValueType.UINT32, [inner if layer in inside else 0 for layer in range(config.need("num_hidden_layers"))]
        ),
    }  # fmt: skip


def moe_keys(config: Config) -> Metadata:
    latent = config.get("moe_latent_size")
    return nemotron_h_keys(config) | expert_keys(config) | routing_keys(config, SIGMOID) | {
        "expert_shared_feed_forward_length": u32(config.need("moe_shared_expert_intermediate_size")),
        "expert_shared_count": u32(config.need("n_shared_experts")),
    } | ({"moe_latent_size": u32(latent)} if latent else {})  # fmt: skip


def _moe_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, experts = config.need("hidden_size"), config.need("n_routed_experts")
    width, inner = config.get("moe_latent_size", default=hidden), config.need("moe_intermediate_size")
    return {
        "ffn_up_exps": (experts, inner, width), "ffn_down_exps": (experts, width, inner),
        "ffn_latent_down": (width, hidden), "ffn_latent_up": (hidden, width),
    }  # fmt: skip


def _check(config: Config) -> list[str]:
    layers, least = _layers(config), config.need("time_step_min")
    if layers["dense"] and layers["experts"]:
        raise PlanError(
            "config.json: some layers are an MLP and some experts; llama.cpp has models of one kind"
        )
    return check_time_steps(config) + [
        f"transformers raises Mamba's steps of time to time_step_min, {least:g}; llama.cpp and NVIDIA's own code do not"
    ]


NEMOTRON_H = Architecture(
    name="nemotron_h",
    classes=("NemotronHForCausalLM",),
    prefix="backbone.",
    tensors=BACKBONE | only("mamba", mixer_at("layers.{i}.mixer", MAMBA2_MIXER) | {
        "layers.{i}.mixer.norm": to("blk.{i}.ssm_norm", cut=groups_of("n_groups", "mamba_n_groups")),
    }) | only("attention", {
        module.replace("self_attn", "mixer"): rule
        for module, rule in without(ATTENTION, "input_layernorm").items()
    }) | only("dense", {
        "layers.{i}.mixer.up_proj": to("blk.{i}.ffn_up"),
        "layers.{i}.mixer.down_proj": to("blk.{i}.ffn_down"),
    }),
    keys=nemotron_h_keys,
    biases=QKV_BIASES | MAMBA_BIASES | {"attn_output", "ffn_up", "ffn_down"},
    defaults={
        "layer_norm_epsilon": 1e-5, "max_position_embeddings": 4096, "head_dim": 128, "num_key_value_heads": 8,
        "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
        "time_step_min": 0.001, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688, "n_shared_experts": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    assumes={
        "mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu",), "use_conv_bias": (True,), "use_bias": (False,),
        "mamba_proj_bias": (False,), "residual_in_fp32": (False, True), "sliding_window": (None,),
    },
    check=_check,
    layers=_layers,
    spellings={"model.": "backbone."},  # transformers' modules, and so adapters, but not its checkpoints
    left_out={"mtp.": "multi-token prediction"},
    instead=lambda config: NEMOTRON_H_MOE if _layers(config)["experts"] else None,
)  # fmt: skip

NEMOTRON_H_MOE = replace(
    NEMOTRON_H,
    name="nemotron_h_moe",
    tensors=without(NEMOTRON_H.tensors, "up_proj", "down_proj") | only("experts", {
        "layers.{i}.mixer.gate": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.mixer.gate.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", whole=True),
        "layers.{i}.mixer.gate.e_score_correction.bias": to("blk.{i}.exp_probs_b.bias", whole=True),
        "layers.{i}.mixer.experts.{e}.up_proj": to("blk.{i}.ffn_up_exps"),
        "layers.{i}.mixer.experts.{e}.down_proj": to("blk.{i}.ffn_down_exps"),
        "layers.{i}.mixer.experts.up_proj": to("blk.{i}.ffn_up_exps"),
        "layers.{i}.mixer.experts.down_proj": to("blk.{i}.ffn_down_exps"),
        "layers.{i}.mixer.shared_experts.up_proj": to("blk.{i}.ffn_up_shexp"),
        "layers.{i}.mixer.shared_experts.down_proj": to("blk.{i}.ffn_down_shexp"),
    }) | only("latent", {
        "layers.{i}.mixer.fc1_latent_proj": to("blk.{i}.ffn_latent_down"),
        "layers.{i}.mixer.fc2_latent_proj": to("blk.{i}.ffn_latent_up"),
    }),
    keys=moe_keys,
    biases=QKV_BIASES | MAMBA_BIASES | {"attn_output"},
    shapes=_moe_shapes,
    instead=lambda config: None,
)  # fmt: skip
