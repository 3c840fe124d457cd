"""SmolLM3: Llama, with no rotary embedding in every fourth layer."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import EMBEDDING, MLP, QKV_BIASES, attention_notes, rotary_decoder_keys
from llmcompress.converters.llama import ROTARY_ATTENTION
from llmcompress.converters.rope import rotary_dimensions

from llmcompress.errors import PlanError
from llmcompress.gguf.value import u32


def _check(config: Config) -> list[str]:
    layers = config.need("num_hidden_layers")
    usual = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if config.get("no_rope_layers", default=usual) != usual or config.get("no_rope_layer_interval") not in (
        None,
        4,
    ):
        raise PlanError(
            "config.json: no_rope_layers is not every fourth layer, which is what llama.cpp's smollm3 computes"
        )
    return attention_notes(config)


SMOLLM3 = Architecture(
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ROTARY_ATTENTION | MLP,
    keys=lambda config: (
        rotary_decoder_keys(config) | {"rope.dimension_count": u32(rotary_dimensions(config))}
    ),
    biases=QKV_BIASES,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    assumes={"hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,)},
    check=_check,
)  # fmt: skip
