"""Ministral 3 and Mistral Small 3.1 and later: Llama, with queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import optional_keys
from llmcompress.converters.config import Config
from llmcompress.converters.llama import MISTRAL, llama_keys
from llmcompress.converters.rope import rope_parameters

from llmcompress.gguf.value import Metadata, f32


def mistral3_keys(config: Config) -> Metadata:
    growth = rope_parameters(config).get("llama_4_scaling_beta")
    return llama_keys(config) | optional_keys({
        "attention.temperature_scale": None if growth is None else f32(growth),
    })  # fmt: skip


MISTRAL3 = replace(
    MISTRAL,
    name="mistral3",
    classes=("Ministral3ForCausalLM",),
    keys=mistral3_keys,
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
)
