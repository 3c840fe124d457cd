"""Gemma 3n (text): several streams of hidden states (AltUp), a low-rank side path (Laurel), an embedding for each layer."""

from __future__ import annotations

from llmcompress.converters.architecture import Architecture, to
from llmcompress.converters.config import Config
from llmcompress.converters.decoder import (
    ATTENTION,
    EMBEDDING,
    MLP,
    QK_NORM,
    layer_kinds,
    rotary_decoder_keys,
    sliding_keys,
)
from llmcompress.converters.rope import require_plain_sliding_rope, rope_notes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32

GEMMA_NORMS = {
    "layers.{i}.post_attention_layernorm": to("blk.{i}.post_attention_norm"),
    "layers.{i}.pre_feedforward_layernorm": to("blk.{i}.ffn_norm"),
    "layers.{i}.post_feedforward_layernorm": to("blk.{i}.post_ffw_norm"),
}
PER_LAYER_INPUTS = {
    "embed_tokens_per_layer": to("per_layer_token_embd"),
    "per_layer_model_projection": to("per_layer_model_proj"),
    "per_layer_projection_norm": to("per_layer_proj_norm"),
    "layers.{i}.per_layer_input_gate": to("blk.{i}.inp_gate"),
    "layers.{i}.per_layer_projection": to("blk.{i}.proj"),
    "layers.{i}.post_per_layer_input_norm": to("blk.{i}.post_norm"),
}
BUILT_IN = {
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "laurel_rank": 64,
    "hidden_size_per_layer_input": 256,
}
LAYERS_WITH_KEYS, SPARSE_LAYERS, SPARSITY = 20, 10, 0.95  # of llama.cpp's graph, as the two there are


def gemma3n_keys(config: Config) -> Metadata:
    return rotary_decoder_keys(config) | sliding_keys(config) | {
        "embedding_length_per_layer_input": u32(config.need("hidden_size_per_layer_input")),
        "attention.shared_kv_layers": u32(config.need("num_kv_shared_layers")),
        "altup.num_inputs": u32(config.need("altup_num_inputs")),
        "altup.active_idx": u32(config.need("altup_active_idx")),
        "rope.freq_base_swa": f32(require_plain_sliding_rope(config)),
        "final_logit_softcapping": f32(config.need("final_logit_softcapping")),
    }  # fmt: skip


def _check(config: Config) -> list[str]:
    layers, shared = config.need("num_hidden_layers"), config.need("num_kv_shared_layers")
    if layers - shared != min(layers, LAYERS_WITH_KEYS):
        raise PlanError(
            f"config.json: {layers - shared} layers have keys of their own, in llama.cpp's gemma3n {LAYERS_WITH_KEYS} have"
        )
    usual = [SPARSITY if layer < SPARSE_LAYERS else 0.0 for layer in range(layers)]
    if config.get("activation_sparsity_pattern", default=usual) != usual:
        raise PlanError(
            f"config.json: activation_sparsity_pattern; llama.cpp's gemma3n has {SPARSITY} in the first {SPARSE_LAYERS} layers"
        )
    kinds = ["full_attention" if (layer + 1) % 5 == 0 else "sliding_attention" for layer in range(layers)]
    if layer_kinds(config) != kinds:
        raise PlanError(
            "config.json: layer_types; in llama.cpp's gemma3n every fifth layer sees all tokens, no other"
        )
    return rope_notes(config)


GEMMA3N = Architecture(
    name="gemma3n",
    classes=("Gemma3nForCausalLM",),
    prefix="model.",
    tensors=EMBEDDING | ATTENTION | QK_NORM | MLP | GEMMA_NORMS | PER_LAYER_INPUTS | {
        "altup_projections.{e}": to("altup_proj"),
        "altup_unembed_projections.{e}": to("altup_unembd_proj"),
        "layers.{i}.altup.correction_coefs": to("blk.{i}.altup_correct_coef"),
        "layers.{i}.altup.correct_output_scale": to("blk.{i}.altup_correct_scale"),
        "layers.{i}.altup.prediction_coefs": to("blk.{i}.altup_predict_coef"),
        "layers.{i}.altup.modality_router": to("blk.{i}.altup_router"),
        "layers.{i}.altup.router_norm": to("blk.{i}.altup_router_norm"),
        "layers.{i}.laurel.linear_left": to("blk.{i}.laurel_l"),
        "layers.{i}.laurel.linear_right": to("blk.{i}.laurel_r"),
        "layers.{i}.laurel.post_laurel_norm": to("blk.{i}.laurel_post_norm"),
    },
    keys=gemma3n_keys,
    defaults=BUILT_IN | {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 256,
        "sliding_window": 512, "sliding_window_pattern": 5, "num_kv_shared_layers": 15, "final_logit_softcapping": 30.0,
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
    },
    assumes={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
    | {key: (value,) for key, value in BUILT_IN.items()},
    check=_check,
    tokens_decide_rows=True,
)  # fmt: skip
