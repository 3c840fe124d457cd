"""Arcee's AFM: Llama with squared ReLU in place of a gate."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, without
from llmcompress.converters.decoder import EMBEDDING, MLP, QKV_BIASES, attention_notes
from llmcompress.converters.llama import ROTARY_ATTENTION, llama_keys
from llmcompress.converters.rope import rope_tensors

ARCEE = Architecture(
    name="arcee",
    classes=("ArceeForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | without(MLP, "gate_proj"),
    keys=lambda config: llama_keys(config, ("llama3",)),
    computed=rope_tensors,
    biases=QKV_BIASES,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    assumes={"hidden_act": ("relu2",), "mlp_bias": (False,), "attention_bias": (False,)},
    check=attention_notes,
)
