"""TII's Falcon-H1: attention and Mamba 2 side by side in every layer.

The model multiplies by constants on the way (muP); llama.cpp does not, so they go into the weights.
"""

from __future__ import annotations

import numpy as np
from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import EMBEDDING, rotary_decoder_keys
from llmcompress.converters.mamba import (
    MAMBA2_MIXER,
    MAMBA_BIASES,
    check_time_steps,
    groups_of,
    mixer_at,
    ssm_keys,
)
from llmcompress.converters.operations import Make, scaled, times
from llmcompress.converters.rope import rope_notes

from llmcompress.checkpoint import TensorInfo
from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata
from llmcompress.step import Operation


def times_item(name: str, item: int) -> Make:
    """All values times one of a list in the config."""

    def operation(config: Config, tensor: TensorInfo) -> Operation:
        return scaled(np.full((tensor.rows, 1), config.need(name)[item]), f"times {name}[{item}]")

    return operation


def _mixer_in(config: Config, tensor: TensorInfo) -> Operation:
    """Gate, values, B, C and time steps, each with a factor of its own."""
    inner, heads = config.need("mamba_d_ssm"), config.need("mamba_n_heads")
    states = config.need("mamba_n_groups") * config.need("mamba_d_state")
    factors = np.repeat(config.need("ssm_multipliers"), (inner, inner, states, states, heads))
    if len(factors) != tensor.rows:
        raise PlanError(f"{tensor.name}: {tensor.rows} rows, by config.json they are {len(factors)}")
    return scaled(factors[:, None] * config.need("ssm_in_multiplier"), "times ssm_multipliers")


def falcon_h1_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | ssm_keys(
        config, config.need("mamba_d_ssm"), config.need("mamba_d_state"), config.need("mamba_d_conv"),
        config.need("mamba_n_heads"), config.need("mamba_n_groups"),
    )  # fmt: skip


def _check(config: Config) -> list[str]:
    head, embedding = config.need("lm_head_multiplier"), config.need("embedding_multiplier")
    if config.tied and head != embedding:
        raise PlanError(
            f"config.json: the tied head is multiplied by {shown(head)} and the embedding by {shown(embedding)}; "
            "llama.cpp has one tensor for both: untie them"
        )
    if config.get("mamba_rms_norm") and config.get("mamba_norm_before_gate"):
        raise PlanError("config.json: mamba_norm_before_gate is true; llama.cpp norms behind the gate")
    return check_time_steps(config) + rope_notes(config)


FALCON_H1 = Architecture(
    name="falcon-h1",
    classes=("FalconH1ForCausalLM",),
    prefix="model.",
    tensors=without(EMBEDDING, "norm") | mixer_at("layers.{i}.mamba", MAMBA2_MIXER) | {
        "embed_tokens": to("token_embd", operation=times("embedding_multiplier")),
        "lm_head": to("output", operation=times("lm_head_multiplier")),
        "final_layernorm": to("output_norm"),
        "layers.{i}.input_layernorm": to("blk.{i}.attn_norm"),
        "layers.{i}.pre_ff_layernorm.weight": to("blk.{i}.ffn_norm", whole=True),  # llama.cpp forgot the ending
        "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q", operation=times("attention_in_multiplier")),
        "layers.{i}.self_attn.k_proj": to(
            "blk.{i}.attn_k", operation=times("attention_in_multiplier", "key_multiplier"),
        ),
        "layers.{i}.self_attn.v_proj": to("blk.{i}.attn_v", operation=times("attention_in_multiplier")),
        "layers.{i}.self_attn.o_proj": to("blk.{i}.attn_output", operation=times("attention_out_multiplier")),
        "layers.{i}.mamba.in_proj": to("blk.{i}.ssm_in", operation=_mixer_in),
        "layers.{i}.mamba.out_proj": to("blk.{i}.ssm_out", operation=times("ssm_out_multiplier")),
        "layers.{i}.feed_forward.gate_proj": to("blk.{i}.ffn_gate", operation=times_item("mlp_multipliers", 0)),
        "layers.{i}.feed_forward.up_proj": to("blk.{i}.ffn_up"),
        "layers.{i}.feed_forward.down_proj": to("blk.{i}.ffn_down", operation=times_item("mlp_multipliers", 1)),
    } | only("normed", {
        "layers.{i}.mamba.norm": to("blk.{i}.ssm_norm", cut=groups_of("mamba_n_groups")),
    }),
    keys=falcon_h1_keys,
    biases=MAMBA_BIASES,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_key_value_heads": 8, "mamba_d_ssm": 1024,
        "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_rms_norm": False,
        "mamba_norm_before_gate": True, "ssm_multipliers": [1.0] * 5, "ssm_in_multiplier": 1.0, "mlp_multipliers": [1.0] * 2,
        "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0,
    },
    assumes={
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "projectors_bias": (False,),
        "mamba_conv_bias": (True,), "mamba_proj_bias": (False,),
    },
    check=_check,
    layers=lambda config: {
        "normed": range(config.need("num_hidden_layers") if config.get("mamba_rms_norm") else 0)
    },
)  # fmt: skip
