"""InternLM 2: Llama, its queries, keys and values in one tensor."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import check_square_attention
from llmcompress.converters.llama import LLAMA, llama_keys
from llmcompress.converters.operations import copied, in_groups, rotary
from llmcompress.converters.rope import rope_notes


def _groups(config: Config) -> tuple[int, tuple[int, int, int]]:
    """With every key head lie its queries, itself and its values."""
    size = config.head_dim
    return config.kv_heads, (config.heads // config.kv_heads * size, size, size)


INTERNLM2 = replace(
    LLAMA,
    name="internlm2",
    classes=("InternLM2ForCausalLM",),
    tensors={
        "tok_embeddings": to("token_embd"),
        "norm": to("output_norm"),
        "output": to("output"),
        "layers.{i}.attention_norm": to("blk.{i}.attn_norm"),
        "layers.{i}.attention.wqkv": to(
            "blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", cut=in_groups(_groups, ((0,), (1,), (2,))),
            operation=(rotary("heads"), rotary("kv_heads"), copied),
        ),
        "layers.{i}.attention.wo": to("blk.{i}.attn_output"),
        "layers.{i}.ffn_norm": to("blk.{i}.ffn_norm"),
        "layers.{i}.feed_forward.w1": to("blk.{i}.ffn_gate"),
        "layers.{i}.feed_forward.w3": to("blk.{i}.ffn_up"),
        "layers.{i}.feed_forward.w2": to("blk.{i}.ffn_down"),
    },
    keys=lambda config: llama_keys(config, rope_tensors=()),
    computed=lambda config: {},
    biases=frozenset(),
    assumes={"hidden_act": ("silu",), "bias": (False,), "tie_word_embeddings": (False,)},
    check=lambda config: check_square_attention(config) + rope_notes(config),
)  # fmt: skip
