"""A model's config.json, whose values go by several names and come from strangers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmcompress.errors import PlanError, shown

KEPT_MTP = "llmcompress_kept_mtp_layers"  # mtp.py's own: how many of num_hidden_layers predict further tokens
_COUNTS = (
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads",
    "head_dim", "n_inner", "vocab_size", "max_position_embeddings", "n_positions", "n_ctx",
    "original_max_position_embeddings", "num_experts", "num_experts_per_tok",
    "index_n_heads", "index_head_dim", "index_topk", "index_topk_freq",
)  # fmt: skip
_SIZES = (
    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "num_nextn_predict_layers", "first_k_dense_replace",
    "shared_intermediate_size", "n_shared_experts", "num_shared_experts", "num_local_experts", "index_skip_topk_offset", KEPT_MTP,
)  # fmt: skip
_COUNTS_OR_LISTS = ("intermediate_size", "moe_intermediate_size")
_NUMBERS = (
    "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "rope_theta", "rope_local_base_freq", "rotary_emb_base",
    "partial_rotary_factor", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
_OBJECTS = ("rope_parameters", "rope_scaling")
_LISTS = ("architectures", "layer_types", "mlp_layer_types", "indexer_types")
_FLAGS = ("tie_word_embeddings",)


class Config:
    """config.json, read by any of the names a value goes by.

    `defaults` are those of the model's class in transformers, for what the file leaves out. Raises PlanError
    for a value of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.values = {**(defaults or {}), **values}
        kinds = self.get("layers_block_type", "hybrid_override_pattern")
        if isinstance(kinds, (list, str)):  # transformers counts these, and need not write the number
            self.values["num_hidden_layers"] = len(kinds)
        for names, wanted, is_wanted in (
            (_COUNTS, "a whole number above zero", _is_count), (_SIZES, "a whole number", _is_size),
            (_COUNTS_OR_LISTS, "a whole number above zero, or a list of them", _is_count_or_list), (_NUMBERS, "a number above zero", is_number),
            (_OBJECTS, "an object", lambda value: isinstance(value, dict)),
            (_LISTS, "a list", lambda value: isinstance(value, list)),
            (_FLAGS, "true or false", lambda value: isinstance(value, bool)),
        ):  # fmt: skip
            for name in names:
                value = self.get(name)
                if value is not None and not is_wanted(value):
                    raise PlanError(f"config.json: {name} is {shown(value)}, it must be {wanted}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` whose value is not null."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise PlanError(
                f"config.json: {' or '.join(names)} is missing; take the file from the model's page"
            )
        return value

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.get("tie_word_embeddings", default=False)

    @property
    def heads(self) -> int:
        return self.need("num_attention_heads", "n_head", "n_heads")

    @property
    def kv_heads(self) -> int:
        return self.get("num_key_value_heads", default=self.heads)

    @property
    def mtp_layers(self) -> int:
        """Layers behind the last that predict further tokens."""
        return self.get("num_nextn_predict_layers", "num_mtp_layers", default=0)

    @property
    def kept_mtp_layers(self) -> int:
        """How many of the layers are such, where they are kept."""
        return self.get(KEPT_MTP, default=0)

    @property
    def head_dim(self) -> int:
        size = self.get(
            "head_dim", default=self.need("hidden_size", "n_embd", "n_embed", "d_model") // self.heads
        )
        if not size:
            raise PlanError(
                f"config.json: {self.heads} attention heads are more than its hidden size has values"
            )
        return size


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_count_or_list(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list) and bool(value) and all(map(_is_count, value)))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
