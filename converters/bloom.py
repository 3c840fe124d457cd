"""BLOOM."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import decoder_keys
from llmcompress.converters.gpt_neox import heads_of_qkv
from llmcompress.converters.operations import in_groups

from llmcompress.gguf.value import u32

BLOOM = Architecture(
    name="bloom",
    classes=("BloomForCausalLM",),
    prefix="transformer.",
    tensors={
        "word_embeddings": to("token_embd"),
        "word_embeddings_layernorm": to("token_embd_norm"),
        "ln_f": to("output_norm"),
        "lm_head": to("output"),
        "h.{i}.input_layernorm": to("blk.{i}.attn_norm"),
        "h.{i}.self_attention.query_key_value": to("blk.{i}.attn_qkv", cut=in_groups(heads_of_qkv, ((0, 1, 2),))),
        "h.{i}.self_attention.dense": to("blk.{i}.attn_output"),
        "h.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
        "h.{i}.mlp.dense_h_to_4h": to("blk.{i}.ffn_up"),
        "h.{i}.mlp.dense_4h_to_h": to("blk.{i}.ffn_down"),
    },
    keys=lambda config: decoder_keys(config) | {
        "feed_forward_length": u32(4 * config.need("hidden_size", "n_embed")),
    },
    biases=frozenset({
        "token_embd_norm", "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm",
    }),
    defaults={"layer_norm_epsilon": 1e-5, "seq_length": 2048, "tie_word_embeddings": True},
    assumes={"apply_residual_connection_post_layernorm": (False,)},
)  # fmt: skip
