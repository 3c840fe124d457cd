"""Qwen3-Next and Qwen3.5, dense and with experts: three layers of linear attention (a gated delta rule) to each full one."""

from __future__ import annotations

import numpy as np
from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    expert_keys,
    full_attention_layers,
    partly_rotary_keys,
)
from llmcompress.converters.operations import (
    Make,
    in_groups,
    minus_exp,
    of_columns,
    plus_one,
    runs,
    squeezed,
)
from llmcompress.converters.qwen import SHARED_EXPERT, shared_expert_keys
from llmcompress.converters.rope import rope_notes, rope_parameters

from llmcompress.gguf.value import Metadata, ValueType, array, u32


def _sizes(config: Config) -> tuple[int, int, int, int]:
    """Key heads and their size, value heads and theirs."""
    return (
        config.need("linear_num_key_heads"), config.need("linear_key_head_dim"),
        config.need("linear_num_value_heads"), config.need("linear_value_head_dim"),
    )  # fmt: skip


def _layers(config: Config) -> dict[str, list[int]]:
    full = full_attention_layers(config, every=config.get("full_attention_interval", default=4))
    return {
        "full": full,
        "linear": [layer for layer in range(config.need("num_hidden_layers")) if layer not in full],
    }


def qwen3_next_keys(config: Config) -> Metadata:
    key_heads, key_size, value_heads, value_size = _sizes(config)
    linear = _layers(config)["linear"]
    return partly_rotary_keys(config) | {
        "ssm.conv_kernel": u32(config.need("linear_conv_kernel_dim")),
        "ssm.state_size": u32(key_size),
        "ssm.group_count": u32(key_heads),
        "ssm.time_step_rank": u32(value_heads),
        "ssm.inner_size": u32(value_heads * value_size),
        "full_attention_interval": u32(config.get("full_attention_interval", default=4)),
        "attention.recurrent_layers": array(
            ValueType.BOOL, [layer in linear for layer in range(config.need("num_hidden_layers"))]
        ),
    }  # fmt: skip


def qwen35_keys(config: Config) -> Metadata:
    sections = rope_parameters(config).get("mrope_section", [11, 11, 10])
    return qwen3_next_keys(config) | {
        "rope.dimension_sections": array(ValueType.INT32, [*sections, 0, 0, 0][:4])
    }


def _tiled(config: Config) -> list[int]:
    """Value heads in the order in which ggml repeats key heads for them: 0, 1, 2, 0, 1, 2, not 0, 0, 1, 1, 2, 2."""
    key_heads, _, value_heads, _ = _sizes(config)
    shared = value_heads // key_heads
    return [group * shared + head for head in range(shared) for group in range(key_heads)]


def _value_heads(size: int | None = None, behind_keys: bool = False):
    """A cut that puts value heads, of `size` rows or linear_value_head_dim, into ggml's order."""

    def choose(config: Config, rows: int) -> list[list[range]]:
        key_heads, key_size, _, value_size = _sizes(config)
        each, first = size or value_size, 2 * key_heads * key_size if behind_keys else 0
        heads = [range(first + head * each, first + (head + 1) * each) for head in _tiled(config)]
        return [[range(first), *heads] if first else heads]

    return runs(choose)


def _value_columns() -> Make:
    def order(config: Config) -> np.ndarray:
        size = config.need("linear_value_head_dim")
        return np.concatenate([np.arange(head * size, (head + 1) * size) for head in _tiled(config)])

    return of_columns("value heads", order)


def _qkvz(config: Config) -> tuple[int, tuple[int, int, int, int]]:
    key_heads, key_size, value_heads, value_size = _sizes(config)
    values = value_heads // key_heads * value_size
    return key_heads, (key_size, key_size, values, values)


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden = config.need("hidden_size")
    key_heads, key_size, value_heads, value_size = _sizes(config)
    values = value_heads * value_size
    mixed = 2 * key_heads * key_size + values
    return {
        "attn_q": (2 * config.heads * config.head_dim, hidden),  # with the gate of the output
        "attn_qkv": (mixed, hidden), "attn_gate": (values, hidden), "ssm_out": (hidden, values),
        "ssm_conv1d": (mixed, config.need("linear_conv_kernel_dim")), "ssm_a": (value_heads,), "ssm_norm": (value_size,),
    }  # fmt: skip


NORMS = {
    "norm": to("output_norm", operation=plus_one),
    "layers.{i}.input_layernorm": to("blk.{i}.attn_norm", operation=plus_one),
    "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm", operation=plus_one),
}
FULL_ATTENTION = without(ATTENTION, "input_layernorm") | {
    "layers.{i}.self_attn.q_norm": to("blk.{i}.attn_q_norm", operation=plus_one),
    "layers.{i}.self_attn.k_norm": to("blk.{i}.attn_k_norm", operation=plus_one),
}
LINEAR_ATTENTION = {
    "layers.{i}.linear_attn.conv1d": to("blk.{i}.ssm_conv1d", cut=squeezed),
    "layers.{i}.linear_attn.A_log": to("blk.{i}.ssm_a", operation=minus_exp, whole=True),
    "layers.{i}.linear_attn.dt_bias": to("blk.{i}.ssm_dt.bias", whole=True),
    "layers.{i}.linear_attn.norm": to("blk.{i}.ssm_norm"),
    "layers.{i}.linear_attn.out_proj": to("blk.{i}.ssm_out"),
}
LINEAR_ATTENTION_35 = {
    "layers.{i}.linear_attn.in_proj_qkv": to("blk.{i}.attn_qkv", cut=_value_heads(behind_keys=True)),
    "layers.{i}.linear_attn.in_proj_z": to("blk.{i}.attn_gate", cut=_value_heads()),
    "layers.{i}.linear_attn.in_proj_a": to("blk.{i}.ssm_alpha", cut=_value_heads(size=1)),
    "layers.{i}.linear_attn.in_proj_b": to("blk.{i}.ssm_beta", cut=_value_heads(size=1)),
    "layers.{i}.linear_attn.conv1d": to("blk.{i}.ssm_conv1d", cut=_value_heads(behind_keys=True)),
    "layers.{i}.linear_attn.A_log": to("blk.{i}.ssm_a", operation=minus_exp, cut=_value_heads(size=1), whole=True),
    "layers.{i}.linear_attn.dt_bias": to("blk.{i}.ssm_dt.bias", cut=_value_heads(size=1), whole=True),
    "layers.{i}.linear_attn.norm": to("blk.{i}.ssm_norm"),
    "layers.{i}.linear_attn.out_proj": to("blk.{i}.ssm_out", operation=_value_columns()),
}  # fmt: skip
MOE = without(EXPERTS, "post_attention_layernorm") | SHARED_EXPERT

_DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 256, "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}  # fmt: skip
_MOE_DEFAULTS = {
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
_ASSUMES = {"hidden_act": ("silu",), "attention_bias": (False,), "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}  # fmt: skip
_MTP = {"mtp.": "multi-token prediction", "model.mtp.": "multi-token prediction"}

QWEN3_NEXT = Architecture(
    name="qwen3next",
    classes=("Qwen3NextForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | NORMS | only("full", FULL_ATTENTION) | only("linear", LINEAR_ATTENTION | {
        "layers.{i}.linear_attn.in_proj_qkvz": to(
            "blk.{i}.attn_qkv", "blk.{i}.attn_gate", cut=in_groups(_qkvz, ((0, 1, 2), (3,))),
        ),
        "layers.{i}.linear_attn.in_proj_ba": to("blk.{i}.ssm_ba"),
    }) | MOE,
    keys=lambda config: qwen3_next_keys(config) | expert_keys(config) | shared_expert_keys(config),
    defaults=_DEFAULTS | _MOE_DEFAULTS | {"intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10},
    assumes=_ASSUMES,
    check=rope_notes,
    layers=_layers,
    shapes=_shapes,
    left_out=_MTP,
)  # fmt: skip

QWEN35 = Architecture(
    name="qwen35",
    classes=("Qwen3_5ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | NORMS | only("full", FULL_ATTENTION) | only("linear", LINEAR_ATTENTION_35)
    | without(MLP, "post_attention_layernorm"),
    keys=qwen35_keys,
    defaults=_DEFAULTS | {"num_key_value_heads": 4},
    assumes={"hidden_act": ("silu",), "attention_bias": (False,)},
    check=rope_notes,
    layers=_layers,
    shapes=_shapes,
    left_out=_MTP,
)  # fmt: skip

QWEN35_MOE = Architecture(
    name="qwen35moe",
    classes=("Qwen3_5MoeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | NORMS | only("full", FULL_ATTENTION) | only("linear", LINEAR_ATTENTION_35) | MOE,
    keys=lambda config: qwen35_keys(config) | expert_keys(config) | shared_expert_keys(config),
    defaults=_DEFAULTS | _MOE_DEFAULTS | {"num_experts": 256, "num_experts_per_tok": 8},
    assumes=_ASSUMES,
    check=rope_notes,
    layers=_layers,
    shapes=_shapes,
    left_out=_MTP,
)  # fmt: skip
