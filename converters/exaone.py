"""LG's EXAONE 4."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QK_NORM,
    check_square_attention,
    layer_kinds,
    rotary_decoder_keys,
    sliding_keys,
)  # fmt: skip
from llmcompress.converters.rope import rope_notes, rope_tensors

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata

SLIDING_LAYERS = (
    64  # llama.cpp lets the window slide, and rope rest in every fourth layer, in models of this size alone
)
SLIDING_WINDOW = 4096


def exaone4_keys(config: Config) -> Metadata:
    keys = rotary_decoder_keys(config, rope_tensors=("llama3",))
    return keys | (sliding_keys(config) if config.need("num_hidden_layers") == SLIDING_LAYERS else {})


def _check(config: Config) -> list[str]:
    slides = config.get("sliding_window") is not None and "sliding_attention" in layer_kinds(config)
    layers = config.need("num_hidden_layers")
    if slides != (layers == SLIDING_LAYERS):
        raise PlanError(
            f"config.json: {layers} layers {'with' if slides else 'without'} a sliding window; llama.cpp's exaone4 has "
            f"one in models of {SLIDING_LAYERS} layers and no others"
        )
    return check_square_attention(config) + rope_notes(config)


EXAONE4 = Architecture(
    name="exaone4",
    classes=("Exaone4ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "input_layernorm") | QK_NORM | MLP | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),
        "layers.{i}.post_feedforward_layernorm": to("blk.{i}.post_ffw_norm"),
    },
    keys=exaone4_keys,
    computed=rope_tensors,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "sliding_window_pattern": 4,
    },
    assumes={"hidden_act": ("silu",)},
    check=_check,
)  # fmt: skip
