"""MosaicML's MPT."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, optional_keys, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import decoder_keys

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32


def mpt_keys(config: Config) -> Metadata:
    attention = config.get("attn_config", default={})
    clip = attention.get("clip_qkv")
    return decoder_keys(config) | optional_keys({
        "feed_forward_length": u32(config.need("d_model") * config.need("expansion_ratio")),
        "attention.clamp_kqv": f32(clip) if clip else None,
        "attention.max_alibi_bias": f32(attention.get("alibi_bias_max", 8.0) if attention.get("alibi", True) else 0.0),
    })  # fmt: skip


def _check(config: Config) -> list[str]:
    attention = config.get("attn_config", default={})
    for key, known in (
        ("softmax_scale", (None,)),
        ("prefix_lm", (None, False)),
        ("qk_ln", (None, False)),
        ("attn_type", (None, "multihead_attention")),
    ):
        if attention.get(key) not in known:
            raise PlanError(
                f"config.json: attn_config's {key} is {attention[key]!r}, which is not known here"
            )
    return []


MPT = Architecture(
    name="mpt",
    classes=("MPTForCausalLM", "MptForCausalLM"),
    prefix="transformer.",
    tensors={
        "wte": to("token_embd"),
        "norm_f": to("output_norm"),
        "lm_head": to("output"),
        "blocks.{i}.norm_1": to("blk.{i}.attn_norm"),
        "blocks.{i}.attn.Wqkv": to("blk.{i}.attn_qkv"),
        "blocks.{i}.attn.out_proj": to("blk.{i}.attn_output"),
        "blocks.{i}.norm_2": to("blk.{i}.ffn_norm"),
        "blocks.{i}.ffn.up_proj": to("blk.{i}.ffn_up"),
        "blocks.{i}.ffn.down_proj": to("blk.{i}.ffn_down"),
    },
    keys=mpt_keys,
    biases=frozenset(
        {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}
    ),
    defaults={
        "layer_norm_epsilon": 1e-5,
        "max_seq_len": 2048,
        "expansion_ratio": 4,
        "tie_word_embeddings": True,
    },
    assumes={"logit_scale": (None,)},
    check=_check,
)
