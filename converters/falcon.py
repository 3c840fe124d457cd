"""Falcon 7B, 40B, 180B and 2."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, optional_keys, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import check_square_attention, rotary_decoder_keys
from llmcompress.converters.operations import in_groups
from llmcompress.converters.rope import rope_notes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, u32


def kv_heads(config: Config) -> int:
    if config.get("new_decoder_architecture", default=False):
        return config.get("num_kv_heads", "n_head_kv", default=config.heads)
    return 1 if config.get("multi_query", default=True) else config.heads


def _qkv(config: Config) -> tuple[int, tuple[int, int, int]]:
    """In each group the queries that share a key, the key, and the value."""
    groups, size = kv_heads(config), config.head_dim
    return groups, (config.heads // groups * size, size, size)


def falcon_keys(config: Config) -> Metadata:
    inner = config.get("ffn_hidden_size")
    return rotary_decoder_keys(config) | optional_keys({
        "attention.head_count_kv": u32(kv_heads(config)),
        "feed_forward_length": u32(inner or 4 * config.need("hidden_size")),
    })  # fmt: skip


def _layers(config: Config) -> dict[str, range]:
    layers, new = (
        config.need("num_hidden_layers", "n_layer"),
        config.get("new_decoder_architecture", default=False),
    )
    two = new and config.get("num_ln_in_parallel_attn", default=2) == 2
    return {"one norm": range(0 if two else layers), "two norms": range(layers if two else 0)}


def _check(config: Config) -> list[str]:
    if not config.get("parallel_attn", default=True) and not config.get(
        "new_decoder_architecture", default=False
    ):
        raise PlanError(
            "config.json: parallel_attn is false; llama.cpp's falcon computes attention and MLP side by side"
        )
    return check_square_attention(config) + rope_notes(config)


FALCON = Architecture(
    name="falcon",
    classes=("FalconForCausalLM", "RWForCausalLM"),
    prefix="transformer.",
    tensors={
        "word_embeddings": to("token_embd"),
        "ln_f": to("output_norm"),
        "lm_head": to("output"),
        "h.{i}.self_attention.query_key_value": to("blk.{i}.attn_qkv", cut=in_groups(_qkv, ((0, 1, 2),))),
        "h.{i}.self_attention.dense": to("blk.{i}.attn_output"),
        "h.{i}.mlp.dense_h_to_4h": to("blk.{i}.ffn_up"),
        "h.{i}.mlp.dense_4h_to_h": to("blk.{i}.ffn_down"),
        "h.{i}.input_layernorm": to("blk.{i}.attn_norm", layers="one norm"),
        "h.{i}.ln_mlp": to("blk.{i}.attn_norm", layers="two norms"),
        "h.{i}.ln_attn": to("blk.{i}.attn_norm_2", layers="two norms"),
    },
    keys=falcon_keys,
    biases=frozenset({"attn_norm", "attn_norm_2", "output_norm"}),
    defaults={"layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    assumes={"alibi": (False,), "bias": (False,), "activation": ("gelu",)},
    check=_check,
    layers=_layers,
)  # fmt: skip
