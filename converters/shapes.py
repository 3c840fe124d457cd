"""Whether tensors have the sizes that config.json says: llama.cpp takes its word and refuses all others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata
from llmcompress.step import Step


def check_shapes(
    steps: Sequence[Step],
    keys: Metadata,
    tokens: int,
    more: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """`keys` are those of an architecture without its name; `more` are its own shapes of modules, which win. Raises
    PlanError for the first step of another shape."""
    for step in steps:
        layer = re.match(r"blk\.(\d+)\.", step.name)
        values = {key: _of_layer(value.value, int(layer[1]) if layer else 0) for key, value in keys.items()}
        expected = _expected(values, tokens) | dict(more)
        module, _, kind = re.sub(r"^blk\.\d+\.", "", step.name).rpartition(".")
        wanted = expected.get(module, step.shape if kind != "bias" else (*step.shape, 0))
        wanted = wanted[:-1] if kind == "bias" and len(wanted) > 1 else wanted
        if step.pieces and kind in ("weight", "bias") and step.shape != wanted:
            raise PlanError(
                f"{step.pieces[0].tensor.name}: makes {step.name} {shape_text(step.shape)}, by config.json it is "
                f"{shape_text(wanted)}; take both from one model"
            )


def _of_layer(value: Any, layer: int) -> Any:
    """A key's value for one layer, of which some keys have one each."""
    return value[min(layer, len(value) - 1)] if isinstance(value, list) and value else value


def _expected(keys: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of each module's weight; a bias has as many values as that has rows."""
    hidden, inner = keys["embedding_length"], keys.get("feed_forward_length", 0)
    size, value_size = keys.get("attention.key_length", 0), keys.get("attention.value_length", 0)
    if keys.get("attention.sliding_window_pattern") is True and "attention.key_length_swa" in keys:
        size, value_size = keys["attention.key_length_swa"], keys["attention.value_length_swa"]
    heads, kv_heads = keys.get("attention.head_count", 0), keys.get("attention.head_count_kv", 0)
    query, key = heads * size, kv_heads * size
    experts, expert_inner = keys.get("expert_count", 0), keys.get("expert_feed_forward_length", inner)
    return {
        "token_embd": (tokens, hidden),
        "per_layer_token_embd": (
            tokens,
            keys["block_count"] * keys.get("embedding_length_per_layer_input", 0),
        ),
        "position_embd": (keys["context_length"], hidden),
        "output": (tokens, hidden),
        **dict.fromkeys(
            ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"), (hidden,)
        ),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (size,)),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (kv_heads * value_size, hidden),
        "attn_qkv": (query + key + kv_heads * value_size, hidden),
        "attn_output": (hidden, heads * value_size),
        "ffn_gate": (inner, hidden),  # ffn_up may hold the gate, too
        "ffn_down": (hidden, inner),
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, expert_inner, hidden),
        "ffn_up_exps": (experts, expert_inner, hidden),
        "ffn_down_exps": (experts, hidden, expert_inner),
    }


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "of one number"
