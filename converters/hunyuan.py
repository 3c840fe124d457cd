"""Tencent's Hunyuan, dense and with experts."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import ATTENTION, EMBEDDING, EXPERTS, MLP, decoder_keys, expert_keys
from llmcompress.converters.rope import rope_keys, rope_notes, rope_parameters

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32

QK_NORM = {  # behind the rotary embedding
    "layers.{i}.self_attn.query_layernorm": to("blk.{i}.attn_q_norm"),
    "layers.{i}.self_attn.key_layernorm": to("blk.{i}.attn_k_norm"),
}


def hunyuan_keys(config: Config) -> Metadata:
    """Its "dynamic" rope with an alpha is a larger base, whatever the context."""
    rope, size = rope_parameters(config), config.head_dim
    if rope["rope_type"] != "dynamic" or not rope.get("alpha"):
        return decoder_keys(config) | rope_keys(config)
    base = rope["rope_theta"] * rope["alpha"] ** (size / (size - 2))
    return decoder_keys(config) | {"rope.freq_base": f32(base)}


def _notes(config: Config) -> list[str]:
    return [] if rope_parameters(config).get("alpha") else rope_notes(config)


def _check_moe(config: Config) -> list[str]:
    inner, hidden = config.get("moe_intermediate_size"), config.need("intermediate_size")
    shared = config.get("num_shared_expert", default=1)
    if set(inner if isinstance(inner, list) else [inner or hidden]) != {hidden} or set(
        shared if isinstance(shared, list) else [shared]
    ) != {1}:
        raise PlanError(
            "config.json: experts other than one shared of intermediate_size and others of the same are not known here"
        )
    return _notes(config)


_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
_ASSUMES = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}

HUNYUAN_DENSE = Architecture(
    name="hunyuan-dense",
    classes=("HunYuanDenseV1ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | MLP,
    keys=hunyuan_keys,
    defaults=_DEFAULTS,
    assumes=_ASSUMES | {"use_qk_norm": (True,)},
    check=_notes,
)

HUNYUAN_MOE = Architecture(
    name="hunyuan-moe",
    classes=("HunYuanMoEV1ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | EXPERTS | {
        "layers.{i}.mlp.gate.wg": to("blk.{i}.ffn_gate_inp"),
        "layers.{i}.mlp.shared_mlp.gate_proj": to("blk.{i}.ffn_gate_shexp"),
        "layers.{i}.mlp.shared_mlp.up_proj": to("blk.{i}.ffn_up_shexp"),
        "layers.{i}.mlp.shared_mlp.down_proj": to("blk.{i}.ffn_down_shexp"),
    },
    keys=lambda config: hunyuan_keys(config) | expert_keys(config) | {
        "expert_feed_forward_length": u32(config.need("intermediate_size")),
        "expert_shared_feed_forward_length": u32(config.need("intermediate_size")),
        "expert_shared_count": u32(1),
    },
    defaults=_DEFAULTS,
    assumes=_ASSUMES | {"use_qk_norm": (True,), "use_mixed_mlp_moe": (True,)},
    check=_check_moe,
)  # fmt: skip
