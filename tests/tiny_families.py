"""Tiny models of the architectures beyond those of tiny_models.py, family by family, and what else tests need of them."""

from __future__ import annotations

from types import SimpleNamespace

import relabelled
import torch
from tiny_models import BYTE_BPE, LLAMA3_ROPE, SIZE, TOKENS, YARN, Tiny, model
from transformers.models.phimoe import modeling_phimoe

EQUAL = {key: value for key, value in SIZE.items() if key != "num_key_value_heads"}


def softmax_routing(scores: torch.Tensor, jitter_eps: float, training: bool, top_k: int = 2) -> tuple:
    """Weights of the experts that llama.cpp chooses for Phi-3.5-MoE, in place of the model's own sparsemixer."""
    weights, chosen = torch.softmax(scores, -1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), chosen


class RootMeanSquareNorm(torch.nn.LayerNorm):
    """What llama.cpp computes for Phi-3.5-MoE, in place of the model's own LayerNorm."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(values, values.shape[-1:], self.weight, self.eps) + self.bias


# A plan's notes say that llama.cpp computes these two otherwise than the model; the rest is proved with them.
modeling_phimoe.sparsemixer = softmax_routing
modeling_phimoe.nn = SimpleNamespace(**vars(torch.nn) | {"LayerNorm": RootMeanSquareNorm})

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
WITHOUT_COUNT = {key: value for key, value in ROUTED.items() if key != "first_k_dense_replace"}
# with few heads most of an indexer's scores are zero, and which of those it takes is chance
INDEXER = {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 64}
LINEAR = {
    "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
GEMMA4 = {
    "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16,
    "per_layer_config": {"1": {"head_dim": 128}, "3": {"head_dim": 128}}, "tie_word_embeddings": True,
}  # fmt: skip
TWO_KINDS = {"layer_types": GEMMA4["layer_types"][:2], "per_layer_config": {"1": {"head_dim": 128}}}
NEMOTRON_H = {key: value for key, value in SIZE.items() if key != "num_hidden_layers"} | {
    "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2, "head_dim": 64, "time_step_min": 1e-30,
}  # fmt: skip
NEMOTRON_EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "routed_scaling_factor": 1.5,
    "moe_shared_expert_intermediate_size": 512,
}  # fmt: skip
SCALES = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.1,
}
GRANITE_HYBRID = {
    "shared_intermediate_size": 256,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
}
FALCON_H1 = {
    "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 2, "mamba_d_state": 32,
    "ssm_multipliers": [0.8, 1.2, 0.7, 0.9, 1.1], "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.6,
    "mlp_multipliers": [0.9, 1.3], "key_multiplier": 0.5, "attention_in_multiplier": 1.5, "attention_out_multiplier": 0.7,
    "embedding_multiplier": 2.0, "lm_head_multiplier": 0.75,
}  # fmt: skip
FOUR = SIZE | {"num_hidden_layers": 4}
MORE: dict[str, tuple[Tiny, str]] = {
    name: (make, BYTE_BPE)
    for name, make in {
        "olmo2": model("Olmo2ForCausalLM", "Olmo2Config", **SIZE),
        "olmo3": model("Olmo3ForCausalLM", "Olmo3Config", **FOUR, sliding_window=16),
        "granite": model("GraniteForCausalLM", "GraniteConfig", **SIZE, **SCALES),
        "smollm3": model("SmolLM3ForCausalLM", "SmolLM3Config", **FOUR),
        "arcee": model("ArceeForCausalLM", "ArceeConfig", **SIZE, head_dim=64),
        "seed_oss": model("SeedOssForCausalLM", "SeedOssConfig", **SIZE, head_dim=32),
        "cohere": model("CohereForCausalLM", "CohereConfig", **SIZE, logit_scale=0.5),
        "cohere2": model("Cohere2ForCausalLM", "Cohere2Config", **FOUR, head_dim=64, sliding_window=16, logit_scale=0.5),
        "stablelm": model("StableLmForCausalLM", "StableLmConfig", ("StableLMEpochForCausalLM",), **SIZE, use_qkv_bias=True),
        "stablelm-12b": model("StableLmForCausalLM", "StableLmConfig", **SIZE, qk_layernorm=True, use_parallel_residual=True),
        "starcoder2": model("Starcoder2ForCausalLM", "Starcoder2Config", **SIZE),
        "phi2": model("PhiForCausalLM", "PhiConfig", **SIZE),
        "gptneox": model("GPTNeoXForCausalLM", "GPTNeoXConfig", **EQUAL),
        "gptneox-serial": model("GPTNeoXForCausalLM", "GPTNeoXConfig", **EQUAL, use_parallel_residual=False),
        "falcon-7b": model("FalconForCausalLM", "FalconConfig", ("RWForCausalLM",), **SIZE, ffn_hidden_size=512),
        "falcon-40b": model("FalconForCausalLM", "FalconConfig", **SIZE, ffn_hidden_size=512, num_kv_heads=2,
                            new_decoder_architecture=True),
        "falcon-11b": model("FalconForCausalLM", "FalconConfig", **SIZE, ffn_hidden_size=512, num_kv_heads=2,
                            new_decoder_architecture=True, num_ln_in_parallel_attn=1),
        "bloom": model("BloomForCausalLM", "BloomConfig", hidden_size=256, n_layer=2, n_head=4),
        "mpt": model("MptForCausalLM", "MptConfig", ("MPTForCausalLM",), d_model=256, n_layers=2, n_heads=4, max_seq_len=512),
        "nemotron": model("NemotronForCausalLM", "NemotronConfig", **SIZE, head_dim=64),
        "exaone4": model("Exaone4ForCausalLM", "Exaone4Config", **SIZE, sliding_window=None,
                         layer_types=["full_attention"] * 2, rope_parameters=LLAMA3_ROPE),
        "glm": model("GlmForCausalLM", "GlmConfig", **SIZE, head_dim=64),
        "glm4": model("Glm4ForCausalLM", "Glm4Config", **SIZE, head_dim=32),
        "ernie4_5": model("Ernie4_5ForCausalLM", "Ernie4_5Config", ("Ernie4_5_ForCausalLM",), **SIZE, head_dim=32),
        "olmoe": model("OlmoeForCausalLM", "OlmoeConfig", **EQUAL, num_experts=4, num_experts_per_tok=2),
        "granitemoe": model("GraniteMoeForCausalLM", "GraniteMoeConfig", **SIZE, num_local_experts=4, num_experts_per_tok=2),
        "granitemoe-shared": model("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", **SIZE, num_local_experts=4,
                                   num_experts_per_tok=2, shared_intermediate_size=256),
        "gemma": model("GemmaForCausalLM", "GemmaConfig", **SIZE, head_dim=64),
        "hunyuan-dense": model("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", **SIZE, head_dim=64),
        "hunyuan-alpha": model("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", **SIZE, head_dim=64,
                               rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "factor": 1.0}),
        "ministral3": model("Ministral3ForCausalLM", "Ministral3Config", **SIZE, head_dim=32, rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
        "qwen2moe": model("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SIZE, **EXPERTS, moe_intermediate_size=256,
                          shared_expert_intermediate_size=256),
        "glm4moe": model("Glm4MoeForCausalLM", "Glm4MoeConfig", **SIZE, **ROUTED, head_dim=64, use_qk_norm=True,
                         attention_bias=True),
        "ernie4_5-moe": model("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", **SIZE, moe_num_experts=4, moe_k=2,
                              moe_intermediate_size=256, moe_layer_end_index=1),
        "minimax-m2": model("MiniMaxM2ForCausalLM", "MiniMaxM2Config", **SIZE, head_dim=64, num_local_experts=4,
                            num_experts_per_tok=2),
        "phimoe": model("PhimoeForCausalLM", "PhimoeConfig", ("PhiMoEForCausalLM",), **SIZE, num_local_experts=4, num_experts_per_tok=2,
                        attention_bias=True, lm_head_bias=True, router_jitter_noise=0.0),
        "hunyuan-moe": model("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", **SIZE, head_dim=64, num_experts=4, moe_topk=2),
        "gpt-oss": model("GptOssForCausalLM", "GptOssConfig", **SIZE, head_dim=64, num_local_experts=4, num_experts_per_tok=2,
                         sliding_window=16, rope_parameters=YARN),
        "llama4": model("Llama4ForCausalLM", "Llama4TextConfig", **FOUR, head_dim=64, num_local_experts=4,
                        num_experts_per_tok=1, intermediate_size_mlp=512, interleave_moe_layer_step=2),
        "deepseek2": model("DeepseekV2ForCausalLM", "DeepseekV2Config", **SIZE | {"num_key_value_heads": 4}, **ROUTED | {"norm_topk_prob": False},
                           **MLA),
        "deepseek3": model("DeepseekV3ForCausalLM", "DeepseekV3Config", **SIZE | {"num_key_value_heads": 4}, **ROUTED | {"n_routed_experts": 8}, **MLA,
                           n_group=2, topk_group=1),
        "deepseek3-yarn": model("DeepseekV3ForCausalLM", "DeepseekV3Config", **SIZE | {"num_key_value_heads": 4}, **ROUTED, **MLA, n_group=1, topk_group=1,
                                rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
        "glm4-lite": model("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", **SIZE | {"num_key_value_heads": 4}, **WITHOUT_COUNT, **MLA,
                           mlp_layer_types=["dense", "sparse"]),
        "deepseek32": model("DeepseekV32ForCausalLM", "DeepseekV32Config", **SIZE | {"num_key_value_heads": 4}, **ROUTED, **MLA, **INDEXER,
                            n_group=1, topk_group=1, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
        "glm-dsa": model("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", **SIZE | {"num_hidden_layers": 3, "num_key_value_heads": 4}, **ROUTED, **MLA,
                         **INDEXER, indexer_types=["full", "shared", "full"]),
        "qwen3next": model("Qwen3NextForCausalLM", "Qwen3NextConfig", **FOUR, **EXPERTS, **LINEAR, moe_intermediate_size=256,
                           shared_expert_intermediate_size=256, norm_topk_prob=True),
        "qwen35": model("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **FOUR, **LINEAR),
        "qwen35moe": model("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", **FOUR, **EXPERTS, **LINEAR,
                           moe_intermediate_size=256, shared_expert_intermediate_size=256),
        "gemma3n": model("Gemma3nForCausalLM", "Gemma3nTextConfig", **SIZE | {"intermediate_size": [512, 512]}, head_dim=64,
                         sliding_window=16, num_kv_shared_layers=0, layer_types=["sliding_attention"] * 2,
                         activation_sparsity_pattern=[0.95] * 2, vocab_size_per_layer_input=TOKENS),
        "gemma4": model("Gemma4ForCausalLM", "Gemma4TextConfig", **FOUR, **GEMMA4, hidden_size_per_layer_input=256,
                        num_kv_shared_layers=2, vocab_size_per_layer_input=TOKENS, use_double_wide_mlp=True),
        "gemma4-moe": model("Gemma4ForCausalLM", "Gemma4TextConfig", **SIZE, **GEMMA4 | TWO_KINDS, hidden_size_per_layer_input=0,
                            enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=256,
                            attention_k_eq_v=True, final_logit_softcapping=30.0),
        "lfm2": model("Lfm2ForCausalLM", "Lfm2Config", ("LFM2ForCausalLM",), **SIZE, layer_types=["conv", "full_attention"]),
        "lfm2moe": model("Lfm2MoeForCausalLM", "Lfm2MoeConfig", **SIZE, **EXPERTS, layer_types=["conv", "full_attention"],
                         num_dense_layers=1, moe_intermediate_size=256),
        "mamba": model("MambaForCausalLM", "MambaConfig", hidden_size=256, num_hidden_layers=2, state_size=16),
        "mamba2": model("Mamba2ForCausalLM", "Mamba2Config", hidden_size=256, num_hidden_layers=2, state_size=32, num_heads=8,
                        head_dim=64, n_groups=2),
        "bitnet": model("BitNetForCausalLM", "BitNetConfig", ("BitnetForCausalLM",), **SIZE, hidden_act="silu",
                        tie_word_embeddings=True),
        "internlm2": model("LlamaForCausalLM", "LlamaConfig", ("InternLM2ForCausalLM",), relabelled.internlm2, **SIZE),
        "minicpm": model("GraniteForCausalLM", "GraniteConfig", ("MiniCPMForCausalLM",), relabelled.minicpm, **SIZE,
                         tie_word_embeddings=True, **SCALES | {"attention_multiplier": 0.125}),
        "bailingmoe": model("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", ("BailingMoeForCausalLM",),
                            relabelled.bailing_moe, **SIZE, num_local_experts=4, num_experts_per_tok=2,
                            shared_intermediate_size=1024, attention_multiplier=0.125),
        "bailingmoe2": model("Glm4MoeForCausalLM", "Glm4MoeConfig", ("BailingMoeV2ForCausalLM",), relabelled.bailing_moe2,
                             **SIZE, **ROUTED | {"n_routed_experts": 8}, n_group=2, topk_group=1, head_dim=64, use_qk_norm=True),
        "nemotron-h": model("NemotronHForCausalLM", "NemotronHConfig", **NEMOTRON_H,
                            layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]),
        "nemotron-h-moe": model("NemotronHForCausalLM", "NemotronHConfig", **NEMOTRON_H, **NEMOTRON_EXPERTS,
                                layers_block_type=["linear_attention", "moe", "full_attention", "moe"], n_group=2),
        "nemotron-h-latent": model("NemotronHForCausalLM", "NemotronHConfig", **NEMOTRON_H, **NEMOTRON_EXPERTS,
                                   layers_block_type=["linear_attention", "full_attention", "moe"], moe_latent_size=256),
        "falcon-h1": model("FalconH1ForCausalLM", "FalconH1Config", **SIZE, **FALCON_H1, mamba_rms_norm=False),
        "falcon-h1-norm": model("FalconH1ForCausalLM", "FalconH1Config", **SIZE, **FALCON_H1, mamba_rms_norm=True,
                                mamba_norm_before_gate=False),
        "apertus": model("ApertusForCausalLM", "ApertusConfig", **SIZE, rope_parameters=LLAMA3_ROPE),
        "jamba": model("JambaForCausalLM", "JambaConfig", **FOUR, **EXPERTS, attn_layer_period=4, attn_layer_offset=1,
                       mamba_dt_rank=16, use_mamba_kernels=False),
        "granitehybrid": model("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **SIZE, **GRANITE_HYBRID, num_local_experts=4,
                               num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"]),
        "granitehybrid-dense": model("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **SIZE, **GRANITE_HYBRID,
                                     num_local_experts=0, mamba_n_groups=2, position_embedding_type="rope",
                                     layer_types=["linear_attention", "full_attention"]),
        "granitehybrid-attention": model("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **SIZE, **GRANITE_HYBRID,
                                         num_local_experts=0, layer_types=["full_attention"] * 2),
        "granitehybrid-attention-moe": model("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **SIZE, **GRANITE_HYBRID,
                                             num_local_experts=4, num_experts_per_tok=2, position_embedding_type="rope",
                                             layer_types=["full_attention"] * 2),
    }.items()
}  # fmt: skip
