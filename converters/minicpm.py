"""OpenBMB's MiniCPM: Llama that scales its embedding, its residuals and its logits."""

from __future__ import annotations

import math
from dataclasses import replace

from llmcompress.converters.config import Config
from llmcompress.converters.llama import LLAMA, llama_keys

from llmcompress.gguf.value import Metadata, f32


def minicpm_keys(config: Config) -> Metadata:
    layers, hidden = config.need("num_hidden_layers"), config.need("hidden_size")
    return llama_keys(config) | {
        "embedding_scale": f32(config.need("scale_emb")),
        "residual_scale": f32(config.need("scale_depth") / math.sqrt(layers)),
        "logit_scale": f32(hidden / config.need("dim_model_base")),  # what logits are divided by
    }


MINICPM = replace(
    LLAMA,
    name="minicpm",
    classes=("MiniCPMForCausalLM",),
    keys=minicpm_keys,
    defaults=LLAMA.defaults | {
        "scale_emb": 1.0, "scale_depth": 1.0, "dim_model_base": 1, "tie_word_embeddings": True,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (False,), "num_experts": (0,)},
)  # fmt: skip
