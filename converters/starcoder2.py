"""StarCoder 2."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    QKV_BIASES,
    attention_notes,
    check_square_attention,
    rotary_decoder_keys,
)

STARCODER2 = Architecture(
    name="starcoder2",
    classes=("Starcoder2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
        "layers.{i}.mlp.c_fc": to("blk.{i}.ffn_up"),
        "layers.{i}.mlp.c_proj": to("blk.{i}.ffn_down"),
    },
    keys=rotary_decoder_keys,
    biases=QKV_BIASES | {"attn_norm", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"},
    defaults={
        "norm_epsilon": 1e-5, "max_position_embeddings": 4096, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    assumes={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    check=lambda config: check_square_attention(config) + attention_notes(config),
)  # fmt: skip
