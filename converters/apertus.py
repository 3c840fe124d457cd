"""Swiss AI's Apertus: a decoder without gates, whose activation (xIELU, arXiv 2411.13010) has numbers that were trained."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, Table, to, without
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, QK_NORM, QKV_BIASES
from llmcompress.converters.llama import llama_keys
from llmcompress.converters.rope import rope_notes, rope_tensors

TOLD = {f"layers.{{i}}.mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")}
_NORMS: Table = {
    "layers.{i}.attention_layernorm": to("blk.{i}.attn_norm"),
    "layers.{i}.feedforward_layernorm": to("blk.{i}.ffn_norm"),
}

APERTUS = Architecture(
    name="apertus",
    classes=("ApertusForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | _NORMS | without(ATTENTION, "input_layernorm") | QK_NORM
    | without(MLP, "post_attention_layernorm", "gate_proj") | dict.fromkeys(TOLD),
    keys=llama_keys,
    computed=rope_tensors,
    biases=QKV_BIASES | {"attn_output"},
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    },
    assumes={"hidden_act": ("xielu",), "tie_word_embeddings": (False,)},
    check=rope_notes,
    told=TOLD,
)  # fmt: skip
