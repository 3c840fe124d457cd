"""GPT-NeoX: Pythia and its kin."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import check_square_attention, partly_rotary_keys
from llmcompress.converters.operations import in_groups
from llmcompress.converters.rope import rope_notes

from llmcompress.gguf.value import Metadata, boolean


def heads_of_qkv(config: Config) -> tuple[int, tuple[int, int, int]]:
    """How q, k and v lie together: head by head."""
    return config.heads, (config.head_dim,) * 3


def gpt_neox_keys(config: Config) -> Metadata:
    parallel = config.get("use_parallel_residual", default=True)
    return partly_rotary_keys(config) | {"use_parallel_residual": boolean(parallel)}


GPT_NEOX = Architecture(
    name="gptneox",
    classes=("GPTNeoXForCausalLM",),
    prefix="gpt_neox.",
    tensors={
        "embed_in": to("token_embd"),
        "final_layer_norm": to("output_norm"),
        "embed_out": to("output"),
        "lm_head": to("output"),  # transformers 5
        "layers.{i}.input_layernorm": to("blk.{i}.attn_norm"),
        "layers.{i}.attention.query_key_value": to("blk.{i}.attn_qkv", cut=in_groups(heads_of_qkv, ((0, 1, 2),))),
        "layers.{i}.attention.dense": to("blk.{i}.attn_output"),
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
        "layers.{i}.mlp.dense_h_to_4h": to("blk.{i}.ffn_up"),
        "layers.{i}.mlp.dense_4h_to_h": to("blk.{i}.ffn_down"),
        "layers.{i}.attention.rotary_emb.inv_freq": None,  # buffers, as are the masks below
        "layers.{i}.attention.bias": None,
        "layers.{i}.attention.masked_bias": None,
    },
    keys=gpt_neox_keys,
    biases=frozenset(
        {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}
    ),
    defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rotary_pct": 0.25},
    assumes={"hidden_act": ("gelu", "gelu_new", "gelu_fast"), "attention_bias": (True,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)  # fmt: skip
