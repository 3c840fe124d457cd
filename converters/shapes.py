"""Whether tensors have the sizes that config.json says: llama.cpp takes its word and refuses all others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata
from llmcompress.step import Step


def check_shapes(steps: Sequence[Step], keys: Metadata, tokens: int) -> None:
    """`keys` are those of an architecture without its name. Raises PlanError for the first step of another shape."""
    expected = _expected({key: value.value for key, value in keys.items()}, tokens)
    for step in steps:
        module, _, kind = re.sub(r"^blk\.\d+\.", "", step.name).rpartition(".")
        wanted = expected.get(module, step.shape)[: 1 if kind == "bias" else None]
        if step.pieces and step.shape != wanted:
            raise PlanError(
                f"{step.pieces[0].tensor.name}: makes {step.name} {shape_text(step.shape)}, by config.json it is "
                f"{shape_text(wanted)}; take both from one model"
            )


def _expected(keys: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of each module's weight; a bias has as many values as that has rows."""
    hidden, size, inner = keys["embedding_length"], keys["attention.key_length"], keys["feed_forward_length"]
    query, key = keys["attention.head_count"] * size, keys["attention.head_count_kv"] * size
    experts, expert_inner = keys.get("expert_count", 0), keys.get("expert_feed_forward_length", inner)
    return {
        "token_embd": (tokens, hidden),
        "position_embd": (keys["context_length"], hidden),
        "output": (tokens, hidden),
        **dict.fromkeys(
            ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"), (hidden,)
        ),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (size,)),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_qkv": (query + 2 * key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),  # ffn_up may hold the gate, too
        "ffn_down": (hidden, inner),
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, expert_inner, hidden),
        "ffn_up_exps": (experts, expert_inner, hidden),
        "ffn_down_exps": (experts, hidden, expert_inner),
    }


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "of one number"
