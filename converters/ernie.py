"""Baidu's ERNIE 4.5."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, partly_rotary_keys
from llmcompress.converters.rope import rope_notes

ERNIE4_5 = Architecture(
    name="ernie4_5",
    classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP,  # its rotary embedding turns neighbours, as ggml's does
    keys=partly_rotary_keys,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 2, "rope_theta": 500000.0,
        "head_dim": 128, "tie_word_embeddings": True,
    },
    assumes={"hidden_act": ("silu",), "use_bias": (False,)},
    check=rope_notes,
)  # fmt: skip
