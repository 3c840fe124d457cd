"""NVIDIA's Nemotron 4 and Minitron."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to, without
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    check_square_attention,
    partly_rotary_keys,
)
from llmcompress.converters.operations import plus_one
from llmcompress.converters.rope import rope_notes

NEMOTRON = Architecture(
    name="nemotron",
    classes=("NemotronForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | without(MLP, "gate_proj") | {
        "norm": to("output_norm", operation=plus_one),
        "layers.{i}.input_layernorm": to("blk.{i}.attn_norm", operation=plus_one),
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm", operation=plus_one),
    },
    keys=partly_rotary_keys,
    biases=frozenset({"attn_norm", "ffn_norm", "output_norm"}),
    defaults={"norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
    assumes={"hidden_act": ("relu2",), "mlp_bias": (False,), "attention_bias": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)  # fmt: skip
