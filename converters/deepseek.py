"""DeepSeek V2 and V3, Kimi K2, GLM-4.7 Flash: attention through a low-rank latent (MLA), and experts."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture, only, optional_keys, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    MLP,
    SHARED_EXPERTS,
    SIGMOID,
    SOFTMAX,
    expert_keys,
    leading_dense,
    rotary_decoder_keys,
    routing_keys,
)
from llmcompress.converters.operations import Part
from llmcompress.converters.rope import rope_notes, rope_parameters

from llmcompress.checkpoint import TensorInfo
from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32
from llmcompress.step import Piece

LITE_LAYERS = (26, 27)  # llama.cpp looks for low-rank queries in models of any other number of layers,
KANANA = (48, 128256)  # but for those with so many layers and tokens


def latent(config: Config, tensor: TensorInfo, part: int, parts: int) -> Part:
    """Of every head's keys and values from the latent, the keys' matrix transposed, or the values'."""
    heads, keys, values = config.heads, config.need("qk_nope_head_dim"), config.need("v_head_dim")
    rank = tensor.columns
    if tensor.shape != (heads * (keys + values), rank):
        raise PlanError(
            f"{tensor.name}: {tensor.rows} rows, by config.json {heads} heads have {keys} + {values} each"
        )
    starts = [head * (keys + values) for head in range(heads)]
    if part == 0:
        return Part((heads, rank, keys), tuple(Piece(tensor, 0, rank, top=start) for start in starts), True)
    return Part((heads, values, rank), tuple(Piece(tensor, start + keys, values) for start in starts))


MLA = {
    "layers.{i}.self_attn.q_a_proj": to("blk.{i}.attn_q_a", layers="low-rank q"),
    "layers.{i}.self_attn.q_a_layernorm": to("blk.{i}.attn_q_a_norm", layers="low-rank q"),
    "layers.{i}.self_attn.q_b_proj": to("blk.{i}.attn_q_b", layers="low-rank q"),
    "layers.{i}.self_attn.q_proj": to("blk.{i}.attn_q", layers="plain q"),
    "layers.{i}.self_attn.kv_a_proj_with_mqa": to("blk.{i}.attn_kv_a_mqa"),
    "layers.{i}.self_attn.kv_a_layernorm": to("blk.{i}.attn_kv_a_norm"),
    "layers.{i}.self_attn.kv_b_proj": to("blk.{i}.attn_k_b", "blk.{i}.attn_v_b", cut=latent),
}


BETAS = {
    "beta_fast": 32,
    "beta_slow": 1,
}  # YaRN's, and all that llama.cpp's deepseek2 has, whatever the file says


def _other_betas(config: Config) -> dict[str, float]:
    rope = rope_parameters(config)
    return {
        name: rope[name]
        for name, usual in BETAS.items()
        if rope["rope_type"] == "yarn" and rope.get(name, usual) != usual
    }


def _rope_of_usual_betas(config: Config) -> Config:
    rope = {name: value for name, value in rope_parameters(config).items() if name not in BETAS}
    return Config(config.values | {"rope_parameters": rope, "rope_scaling": None})


def mla_keys(config: Config) -> Metadata:
    """Attention as llama.cpp runs it: one key and value for all heads, which is the latent and the rotary part."""
    rank, turned = config.need("kv_lora_rank"), config.need("qk_rope_head_dim")
    queries, growth = config.get("q_lora_rank"), rope_parameters(config).get("mscale_all_dim")
    keys = rotary_decoder_keys(_rope_of_usual_betas(config)) | optional_keys({
        "attention.head_count_kv": u32(1),
        "attention.q_lora_rank": None if queries is None else u32(queries),
        "attention.kv_lora_rank": u32(rank),
        "attention.key_length": u32(rank + turned),
        "attention.value_length": u32(rank),
        "attention.key_length_mla": u32(config.need("qk_nope_head_dim") + turned),
        "attention.value_length_mla": u32(config.need("v_head_dim")),
        "rope.dimension_count": u32(turned),
    } | {f"rope.scaling.yarn_{name}": f32(value) for name, value in _other_betas(config).items()})  # fmt: skip
    if growth is not None:
        keys.pop("rope.scaling.attn_factor", None)  # llama.cpp derives it from the next
        keys["rope.scaling.yarn_log_multiplier"] = f32(0.1 * growth)
    return keys


def mla_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.need("hidden_size"), config.heads
    turned, rank = config.need("qk_rope_head_dim"), config.need("kv_lora_rank")
    queries, shared = config.get("q_lora_rank", default=0), config.get("n_shared_experts", default=0)
    size = heads * (config.need("qk_nope_head_dim") + turned)
    inner = shared * config.get("moe_intermediate_size", default=0)
    return {
        "attn_q": (size, hidden), "attn_q_a": (queries, hidden), "attn_q_a_norm": (queries,), "attn_q_b": (size, queries),
        "attn_kv_a_mqa": (rank + turned, hidden), "attn_kv_a_norm": (rank,),
        "attn_output": (hidden, heads * config.need("v_head_dim")),
        "ffn_gate_shexp": (inner, hidden), "ffn_up_shexp": (inner, hidden), "ffn_down_shexp": (hidden, inner),
    }  # fmt: skip


def deepseek_keys(config: Config) -> Metadata:
    gating = SIGMOID if config.need("scoring_func") == "sigmoid" else SOFTMAX
    return mla_keys(config) | expert_keys(config) | routing_keys(config, gating) | {
        "leading_dense_block_count": u32(len(leading_dense(config)["dense"])),
        "expert_shared_count": u32(config.get("n_shared_experts", default=0)),
    }  # fmt: skip


def _layers(config: Config) -> dict[str, range]:
    layers, low_rank = range(config.need("num_hidden_layers")), config.get("q_lora_rank") is not None
    kinds = leading_dense(config)
    return kinds | {
        "biased": kinds["experts"] if config.need("topk_method") == "noaux_tc" else range(0),
        "low-rank q": layers if low_rank else range(0),
        "plain q": range(0) if low_rank else layers,
    }


def _check(config: Config) -> list[str]:
    layers, tokens, low = (
        config.need("num_hidden_layers"),
        config.get("vocab_size"),
        config.get("q_lora_rank"),
    )
    layers -= config.kept_mtp_layers
    if (low is None) != (layers in LITE_LAYERS or (layers, tokens) == KANANA):
        raise PlanError(
            f"config.json: q_lora_rank is {low} with {layers} layers; llama.cpp's deepseek2 has plain "
            f"queries in models of {' or '.join(map(str, LITE_LAYERS))} layers and low-rank ones in all others"
        )
    if low is None and config.kept_mtp_layers:
        raise PlanError(
            "--mtp keep: llama.cpp drafts with low-rank queries alone, these are plain; leave it out"
        )
    return mla_notes(config)


def mla_notes(config: Config) -> list[str]:
    """What llama.cpp computes otherwise in all models of this kind; raises PlanError for what it cannot."""
    rope = rope_parameters(config)
    if rope.get("mscale_all_dim") != rope.get("mscale") and rope["rope_type"] == "yarn":
        raise PlanError(
            f"config.json: yarn's mscale is {rope.get('mscale')}, mscale_all_dim is {rope.get('mscale_all_dim')}; llama.cpp "
            "computes as if they were the same"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise PlanError(
            f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}; llama.cpp turns all qk_rope_head_dim"
        )
    if not config.get("n_shared_experts"):
        raise PlanError(
            "config.json: n_shared_experts is none; llama.cpp has some in every layer with experts"
        )
    notes = [
        f"yarn's {name} is {value:g}: llama.cpp turns the heads as if it were {BETAS[name]}"
        for name, value in _other_betas(config).items()
    ]
    if config.get("topk_method") == "group_limited_greedy" and config.get("n_group", default=1) > 1:
        notes.append(
            "topk_method is group_limited_greedy: llama.cpp ranks a group of experts by its best two, the model by its "
            "best; some tokens will go to other experts"
        )
    return notes + rope_notes(config)


DEEPSEEK2 = Architecture(
    name="deepseek2",
    classes=("DeepseekV2ForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | without(ATTENTION, "q_proj", "k_proj", "v_proj") | MLA
    | only("dense", MLP) | only("experts", EXPERTS | SHARED_EXPERTS) | {
        "layers.{i}.mlp.gate.e_score_correction_bias": to("blk.{i}.exp_probs_b.bias", layers="biased", whole=True),
        "layers.{i}.post_attention_layernorm": to("blk.{i}.ffn_norm"),
    },
    keys=deepseek_keys,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "first_k_dense_replace": 0, "n_shared_experts": 2, "n_routed_experts": 64, "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,), "norm_topk_prob": (False,)},
    check=_check,
    layers=_layers,
    shapes=mla_shapes,
)  # fmt: skip

DEEPSEEK3 = replace(
    DEEPSEEK2,
    classes=("DeepseekV3ForCausalLM",),
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "first_k_dense_replace": 3, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "num_nextn_predict_layers": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
    assumes={"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,), "rope_interleave": (True,)},
)  # fmt: skip

GLM4_LITE = replace(
    DEEPSEEK3,
    classes=("Glm4MoeLiteForCausalLM",),
    defaults=without(DEEPSEEK3.defaults, "num_nextn_predict_layers", "first_k_dense_replace") | {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256,
    },
)  # fmt: skip
