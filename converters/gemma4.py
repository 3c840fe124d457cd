"""Gemma 4 (text), dense and with experts."""

from __future__ import annotations

import numpy as np
from llmcompress.converters.architecture import Architecture, only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QK_NORM,
    decoder_keys,
    expert_keys,
    layer_kinds,
    sliding_keys,
)
from llmcompress.converters.gemma3n import GEMMA_NORMS, PER_LAYER_INPUTS
from llmcompress.converters.rope import require_plain_sliding_rope, rope_parameters

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, ValueType, array, f32, u32

UNUSED = "keys and values of layers that take an earlier layer's"
STILL = 1e30  # a frequency divided by this does not turn


def _sliding(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in layer_kinds(config)]


def _of_full_layers(config: Config, key: str, older: str, default: int) -> int:
    """A size that layers of full attention have for themselves, in either spelling."""
    found = config.get(older)
    for layer, values in config.get("per_layer_config", default={}).items():
        if not _sliding(config)[int(layer)]:
            found = values.get(key, found)
    return found or default


def gemma4_keys(config: Config) -> Metadata:
    size, layers = config.head_dim, config.need("num_hidden_layers")
    full = _of_full_layers(config, "head_dim", "global_head_dim", size)
    full_kv = _of_full_layers(config, "num_key_value_heads", "num_global_key_value_heads", config.kv_heads)
    inner, shared = config.need("intermediate_size"), config.need("num_kv_shared_layers")
    wide = 2 if config.get("use_double_wide_mlp", default=False) else 1
    cap, base = config.get("final_logit_softcapping", default=0.0), rope_parameters(config)["rope_theta"]
    return decoder_keys(config) | sliding_keys(config) | _moe_keys(config) | {
        "feed_forward_length": array(ValueType.UINT32, [inner if layer < layers - shared else wide * inner for layer in range(layers)]),
        "attention.head_count_kv": array(ValueType.UINT32, [config.kv_heads if slides else full_kv for slides in _sliding(config)]),
        "attention.key_length": u32(full),
        "attention.value_length": u32(full),
        "attention.key_length_swa": u32(size),
        "attention.value_length_swa": u32(size),
        "attention.shared_kv_layers": u32(shared),
        "embedding_length_per_layer_input": u32(config.get("hidden_size_per_layer_input", default=0)),
        "rope.freq_base": f32(base),
        "rope.freq_base_swa": f32(require_plain_sliding_rope(config)),
        "rope.dimension_count": u32(full),
        "rope.dimension_count_swa": u32(size),
        "final_logit_softcapping": f32(cap),  # llama.cpp caps at 30 where the key is missing
    }  # fmt: skip


def _moe_keys(config: Config) -> Metadata:
    if not config.get("enable_moe_block", default=False):
        return {}
    return expert_keys(Config({**config.values, "num_experts_per_tok": config.need("top_k_experts")}))


def frequency_factors(config: Config) -> dict[str, np.ndarray]:
    """Of full layers' frequencies the first quarter turns, spread over the whole head; float32 (head size / 2,)."""
    size = _of_full_layers(config, "head_dim", "global_head_dim", config.head_dim)
    turned = int(size * rope_parameters(config).get("partial_rotary_factor", 1.0) / 2)
    return {
        "rope_freqs.weight": np.where(np.arange(size // 2) < turned, np.float32(1), np.float32(STILL)).astype(
            np.float32
        )
    }


def _layers(config: Config) -> dict[str, list[int]]:
    layers, sliding = range(config.need("num_hidden_layers")), _sliding(config)
    own = [layer for layer in layers if layer < len(layers) - config.need("num_kv_shared_layers")]
    same = config.get("attention_k_eq_v", default=False)
    every, none = list(layers), []
    return {
        "own keys": own,
        "own values": [layer for layer in own if sliding[layer] or not same],
        "inputs": every if config.get("hidden_size_per_layer_input", default=0) else none,
        "experts": every if config.get("enable_moe_block", default=False) else none,
    }


def _check(config: Config) -> list[str]:
    kind = rope_parameters(config)["rope_type"]
    if kind != "proportional":
        raise PlanError(
            f"config.json: full layers have {kind} rope, llama.cpp's gemma4 computes proportional rope"
        )
    return []


GEMMA4 = Architecture(
    name="gemma4",
    classes=("Gemma4ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "k_proj", "v_proj") | MLP | GEMMA_NORMS | only("inputs", PER_LAYER_INPUTS) | {
        "layers.{i}.self_attn.q_norm": QK_NORM["layers.{i}.self_attn.q_norm"],
        "layers.{i}.self_attn.k_proj": to("blk.{i}.attn_k", layers="own keys", elsewhere=UNUSED),
        "layers.{i}.self_attn.k_norm": to("blk.{i}.attn_k_norm", layers="own keys", elsewhere=UNUSED),
        "layers.{i}.self_attn.v_proj": to("blk.{i}.attn_v", layers="own values", elsewhere=UNUSED),
        "layers.{i}.layer_scalar": to("blk.{i}.layer_output_scale"),
    } | only("experts", {
        "layers.{i}.pre_feedforward_layernorm_2": to("blk.{i}.pre_ffw_norm_2"),
        "layers.{i}.post_feedforward_layernorm_1": to("blk.{i}.post_ffw_norm_1"),
        "layers.{i}.post_feedforward_layernorm_2": to("blk.{i}.post_ffw_norm_2"),
        "layers.{i}.router.proj": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.router.scale": to("blk.{i}.ffn_gate_inp.scale", whole=True),
        "layers.{i}.router.per_expert_scale": to("blk.{i}.ffn_down_exps.scale", whole=True),
        "layers.{i}.experts.gate_up_proj": to("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
        "layers.{i}.experts.down_proj": to("blk.{i}.ffn_down_exps"),
    }),
    keys=gemma4_keys,
    computed=frequency_factors,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 512, "sliding_window_pattern": 6, "num_kv_shared_layers": 0, "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 256, "rope_local_base_freq": 10000.0,
    },
    assumes={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "use_bidirectional_attention": (False, "vision")},
    check=_check,
    layers=_layers,
)  # fmt: skip
