"""The decoder layer that most families share: its table and its metadata keys."""

from __future__ import annotations

from collections.abc import Collection

from llmcompress.converters.architecture import Table, optional_keys, to
from llmcompress.converters.config import Config
from llmcompress.converters.rope import rope_keys, rope_notes, rotary_dimensions

from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata, ValueType, array, boolean, f32, u32

EMBEDDING: Table = {
    "embed_tokens": to("token_embd"),
    "norm": to("output_norm"),
    "lm_head": to("output"),
    "layers.{i}.self_attn.rotary_emb.inv_freq": None,  # a buffer that old releases saved
}
ATTENTION: Table = {
    "layers.{i}.input_layernorm": to("blk.{i}.attn_norm"),
    "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q"),
    "layers.{i}.self_attn.k_proj": to("blk.{i}.attn_k"),
    "layers.{i}.self_attn.v_proj": to("blk.{i}.attn_v"),
    "layers.{i}.self_attn.o_proj": to("blk.{i}.attn_output"),
}
QK_NORM: Table = {
    "layers.{i}.self_attn.q_norm": to("blk.{i}.attn_q_norm"),
    "layers.{i}.self_attn.k_norm": to("blk.{i}.attn_k_norm"),
}
MLP: Table = {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.mlp.gate_proj": to("blk.{i}.ffn_gate"),
    "layers.{i}.mlp.up_proj": to("blk.{i}.ffn_up"),
    "layers.{i}.mlp.down_proj": to("blk.{i}.ffn_down"),
}
FUSED_EXPERTS: Table = {  # the 3-D parameters of transformers 5
    "layers.{i}.mlp.gate": to("blk.{i}.ffn_gate_inp"),
    "layers.{i}.mlp.experts.gate_up_proj": to("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
    "layers.{i}.mlp.experts.down_proj": to("blk.{i}.ffn_down_exps"),
}
SHARED_EXPERTS: Table = {
    "layers.{i}.mlp.shared_experts.gate_proj": to("blk.{i}.ffn_gate_shexp"),
    "layers.{i}.mlp.shared_experts.up_proj": to("blk.{i}.ffn_up_shexp"),
    "layers.{i}.mlp.shared_experts.down_proj": to("blk.{i}.ffn_down_shexp"),
}
EXPERTS: Table = FUSED_EXPERTS | {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.mlp.experts.{e}.gate_proj": to("blk.{i}.ffn_gate_exps"),
    "layers.{i}.mlp.experts.{e}.up_proj": to("blk.{i}.ffn_up_exps"),
    "layers.{i}.mlp.experts.{e}.down_proj": to("blk.{i}.ffn_down_exps"),
}

QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})


def decoder_keys(config: Config) -> Metadata:
    """What llama.cpp reads of every decoder, each value under any of the names it goes by."""
    rms = config.get("rms_norm_eps")
    layer_norm = config.get("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
    inner = config.get("intermediate_size", "n_inner", default=4 * config.get("n_embd", default=0))
    return optional_keys({
        "vocab_size": u32(config.need("vocab_size")),
        "context_length": u32(config.need("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")),
        "embedding_length": u32(config.need("hidden_size", "n_embd", "d_model")),
        "block_count": u32(config.need("num_hidden_layers", "n_layer", "n_layers")),
        "feed_forward_length": array(ValueType.UINT32, inner) if isinstance(inner, list) else u32(inner),
        "attention.head_count": u32(config.heads),
        "attention.head_count_kv": u32(config.kv_heads),
        "attention.layer_norm_rms_epsilon": None if rms is None else f32(rms),
        "attention.layer_norm_epsilon": None if layer_norm is None else f32(layer_norm),
        "attention.key_length": u32(config.head_dim),
        "attention.value_length": u32(config.head_dim),
    })  # fmt: skip


SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # expert_gating_func


def expert_keys(config: Config) -> Metadata:
    experts = config.need("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    used = config.need("num_experts_per_tok", "moe_k", "moe_topk")
    used = used[0] if isinstance(used, list) and len(set(used)) == 1 else used
    if type(used) is not int or not 0 < used <= experts:
        raise PlanError(f"config.json: num_experts_per_tok is {shown(used)}, of {experts} experts in all")
    inner = config.get("moe_intermediate_size")
    inner = inner[0] if isinstance(inner, list) and len(set(inner)) == 1 else inner
    return {"expert_count": u32(experts), "expert_used_count": u32(used)} | optional_keys(
        {"expert_feed_forward_length": None if inner is None else u32(inner)}
    )


def routing_keys(config: Config, gating: int) -> Metadata:
    """How experts are chosen and weighed, where that is not the same in all models of an architecture."""
    groups, used = config.get("n_group", default=1), config.get("topk_group", default=1)
    scale = config.get("routed_scaling_factor")
    keys = {
        "expert_gating_func": u32(gating),
        "expert_weights_norm": boolean(config.get("norm_topk_prob", default=False)),
    }
    if groups > 1:
        keys |= {"expert_group_count": u32(groups), "expert_group_used_count": u32(used)}
    return keys | optional_keys({"expert_weights_scale": None if scale is None else f32(scale)})


def leading_dense(config: Config) -> dict[str, range]:
    """The first layers have one MLP, all others experts: by `mlp_layer_types`, or by how many are dense."""
    layers, kinds = config.need("num_hidden_layers"), config.get("mlp_layer_types")
    first = min(config.get("first_k_dense_replace", default=0), layers)
    if kinds is not None:
        first = kinds.count("dense")
        if kinds[:first] != ["dense"] * first:
            raise PlanError(
                "config.json: mlp_layer_types; in llama.cpp the first layers are dense, no others"
            )
    return {"dense": range(first), "experts": range(first, layers)}


def check_square_attention(config: Config) -> list[str]:
    """For families in which llama.cpp takes the hidden size for that of all heads together."""
    hidden = config.need("hidden_size")
    if config.heads * config.head_dim != hidden:
        raise PlanError(
            f"config.json: {config.heads} heads of {config.head_dim} are not the hidden size of {hidden}, "
            "which is all that llama.cpp can compute for this class of models"
        )
    return []


def attention_notes(config: Config) -> list[str]:
    """What llama.cpp leaves out of the attention of Llama and its kin."""
    window, length = config.get("sliding_window"), config.need("max_position_embeddings")
    notes = rope_notes(config)
    if not window or window >= length:
        return notes
    return [
        f"sliding window of {window} tokens: llama.cpp attends to all tokens; contexts beyond it will differ",
        *notes,
    ]


def rotary_decoder_keys(config: Config, rope_tensors: Collection[str] = ()) -> Metadata:
    return decoder_keys(config) | rope_keys(config, rope_tensors)


def partly_rotary_keys(config: Config, rope_tensors: Collection[str] = ()) -> Metadata:
    """For families whose heads turn in part."""
    return rotary_decoder_keys(config, rope_tensors) | {
        "rope.dimension_count": u32(rotary_dimensions(config))
    }


def layer_kinds(config: Config) -> list[str]:
    """Whether each layer's attention slides, in transformers' words: `layer_types`, or by `sliding_window_pattern`."""
    layers, pattern = config.need("num_hidden_layers"), config.get("sliding_window_pattern", default=0)
    usual = [
        "full_attention" if not pattern or (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(layers)
    ]
    kinds = config.get("layer_types", default=usual)
    if len(kinds) != layers:
        raise PlanError(f"config.json: layer_types has {len(kinds)} layers, num_hidden_layers is {layers}")
    return kinds


def sliding_keys(config: Config) -> Metadata:
    slides = [kind == "sliding_attention" for kind in layer_kinds(config)]
    return {
        "attention.sliding_window": u32(config.need("sliding_window")),
        "attention.sliding_window_pattern": array(ValueType.BOOL, slides),
    }


def full_attention_layers(config: Config, every: int) -> list[int]:
    """The layers of a hybrid that attend to all tokens: by `layer_types`, or each `every`th."""
    kinds = config.get("layer_types")
    if kinds is None:
        return [layer for layer in range(config.need("num_hidden_layers")) if (layer + 1) % every == 0]
    return [
        layer for layer, kind in enumerate(layer_kinds(config)) if kind in ("full_attention", "attention")
    ]
