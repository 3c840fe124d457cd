"""ByteDance's Seed-OSS."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, MLP, QKV_BIASES, rotary_decoder_keys
from llmcompress.converters.rope import rope_notes

SEED_OSS = Architecture(
    name="seed_oss",
    classes=("SeedOssForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | MLP | {
        "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),  # behind attention, before the MLP
    },
    keys=rotary_decoder_keys,
    biases=QKV_BIASES,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
    assumes={"hidden_act": ("silu",), "mlp_bias": (False,), "attention_out_bias": (False,)},
    check=rope_notes,
)  # fmt: skip
