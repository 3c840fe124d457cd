"""Gemma, Gemma 2 and Gemma 3 (text)."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, optional_keys, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, rotary_decoder_keys
from llmcompress.converters.operations import plus_one
from llmcompress.converters.rope import require_plain_sliding_rope, rope_notes

from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata, f32, u32

GEMMA_TENSORS = EMBEDDING | ATTENTION | MLP | {
    "norm": to("output_norm", operation=plus_one),
    "layers.{i}.input_layernorm": to("blk.{i}.attn_norm", operation=plus_one),
    "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm", operation=plus_one),
    "layers.{i}.pre_feedforward_layernorm": to("blk.{i}.ffn_norm", operation=plus_one),
    "layers.{i}.post_feedforward_layernorm": to("blk.{i}.post_ffw_norm", operation=plus_one),
}  # fmt: skip


def gemma_keys(config: Config) -> Metadata:
    final, attention = config.get("final_logit_softcapping"), config.get("attn_logit_softcapping")
    return rotary_decoder_keys(config) | optional_keys({
        "attention.sliding_window": u32(config.need("sliding_window")),
        "final_logit_softcapping": None if final is None else f32(final),
        "attn_logit_softcapping": None if attention is None else f32(attention),
    })  # fmt: skip


def gemma3_keys(config: Config) -> Metadata:
    return gemma_keys(config) | {"rope.freq_base_swa": f32(require_plain_sliding_rope(config))}


def _check_attention(config: Config, largest_layers: int, pattern: int) -> list[str]:
    """llama.cpp derives the query's scale and the order of layers itself: they must be the model's."""
    scalar = config.get("query_pre_attn_scalar", default=256)
    largest = config.need("num_hidden_layers") == largest_layers
    derived = config.need("hidden_size") // config.heads if largest else config.head_dim
    if scalar != derived:
        raise PlanError(
            f"config.json: query_pre_attn_scalar is {scalar}, llama.cpp would compute with {derived}"
        )
    written = config.get("sliding_window_pattern", "_sliding_window_pattern", default=pattern)
    if written != pattern:
        raise PlanError(
            f"config.json: every {written}th layer sees all tokens, in llama.cpp every {pattern}th would"
        )
    for layer, kind in enumerate(config.get("layer_types", default=())):
        expected = "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
        if kind != expected:
            raise PlanError(
                f"config.json: layer {layer} is {shown(kind)}, llama.cpp would compute {expected}"
            )
    return rope_notes(config)


def _check_caps(config: Config) -> list[str]:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is None:
            raise PlanError(f"config.json: {key} is null, but llama.cpp's gemma2 always caps logits")
    return []


_DEFAULTS = {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
             "tie_word_embeddings": True}  # fmt: skip
_ASSUMES = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}

GEMMA = Architecture(
    name="gemma",
    classes=("GemmaForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP | {
        "norm": to("output_norm", operation=plus_one),
        "layers.{i}.input_layernorm": to("blk.{i}.attn_norm", operation=plus_one),
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm", operation=plus_one),
    },
    keys=rotary_decoder_keys,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256,
        "tie_word_embeddings": True,
    },
    assumes={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    check=rope_notes,
)  # fmt: skip

GEMMA2 = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    prefix="model.",
    tensors=GEMMA_TENSORS,
    keys=gemma_keys,
    defaults=_DEFAULTS | {
        "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    assumes=_ASSUMES | {"tie_word_embeddings": (True,)},
    check=lambda config: _check_caps(config) + _check_attention(config, largest_layers=46, pattern=2),
)  # fmt: skip

GEMMA3 = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM",),
    prefix="model.",
    tensors=GEMMA_TENSORS | {
        "layers.{i}.self_attn.q_norm": to("blk.{i}.attn_q_norm", operation=plus_one),
        "layers.{i}.self_attn.k_norm": to("blk.{i}.attn_k_norm", operation=plus_one),
    },
    keys=gemma3_keys,
    defaults=_DEFAULTS | {
        "num_attention_heads": 8, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
    },
    assumes=_ASSUMES | {"use_bidirectional_attention": (False,)},
    check=lambda config: _check_attention(config, largest_layers=62, pattern=6),
    tokens_decide_rows=True,
)  # fmt: skip
