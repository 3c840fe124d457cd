"""GPT-2."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import decoder_keys
from llmcompress.converters.operations import transposed

from llmcompress.errors import PlanError


def _check(config: Config) -> list[str]:
    if config.get("scale_attn_by_inverse_layer_idx", default=False) or not config.get(
        "scale_attn_weights", default=True
    ):
        raise PlanError(
            "config.json: attention scaled other than by the head's size, which llama.cpp's gpt2 cannot compute"
        )
    return []


GPT2 = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    prefix="transformer.",
    tensors={
        "wte": to("token_embd"),
        "wpe": to("position_embd"),
        "ln_f": to("output_norm"),
        "lm_head": to("output"),
        "h.{i}.ln_1": to("blk.{i}.attn_norm"),
        "h.{i}.attn.c_attn": to("blk.{i}.attn_qkv", cut=transposed),
        "h.{i}.attn.c_proj": to("blk.{i}.attn_output", cut=transposed),
        "h.{i}.ln_2": to("blk.{i}.ffn_norm"),
        "h.{i}.mlp.c_fc": to("blk.{i}.ffn_up", cut=transposed),
        "h.{i}.mlp.c_proj": to("blk.{i}.ffn_down", cut=transposed),
        "h.{i}.attn.bias": None,  # the causal mask, a buffer
        "h.{i}.attn.masked_bias": None,
    },
    keys=decoder_keys,
    biases=frozenset(
        {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}
    ),
    defaults={"layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True},
    assumes={"activation_function": ("gelu_new", "gelu_pytorch_tanh")},
    check=_check,
)
