"""Tiny models of the architectures beyond those of tiny_models.py, family by family, and what else tests need of them."""

from __future__ import annotations

from tiny_models import BYTE_BPE, LLAMA3_ROPE, SIZE, Make, model

EQUAL = {key: value for key, value in SIZE.items() if key != "num_key_value_heads"}
FOUR = SIZE | {"num_hidden_layers": 4}
MORE: dict[str, tuple[Make, str]] = {
    name: (make, BYTE_BPE)
    for name, make in {
        "olmo2": model("Olmo2ForCausalLM", "Olmo2Config", **SIZE),
        "olmo3": model("Olmo3ForCausalLM", "Olmo3Config", **FOUR, sliding_window=16),
        "granite": model("GraniteForCausalLM", "GraniteConfig", **SIZE, embedding_multiplier=3.0, logits_scaling=0.5,
                         residual_multiplier=0.7, attention_multiplier=0.1),
        "smollm3": model("SmolLM3ForCausalLM", "SmolLM3Config", **FOUR),
        "arcee": model("ArceeForCausalLM", "ArceeConfig", **SIZE, head_dim=64),
        "seed_oss": model("SeedOssForCausalLM", "SeedOssConfig", **SIZE, head_dim=32),
        "cohere": model("CohereForCausalLM", "CohereConfig", **SIZE, logit_scale=0.5),
        "cohere2": model("Cohere2ForCausalLM", "Cohere2Config", **FOUR, head_dim=64, sliding_window=16, logit_scale=0.5),
        "stablelm": model("StableLmForCausalLM", "StableLmConfig", **SIZE, use_qkv_bias=True),
        "stablelm-12b": model("StableLmForCausalLM", "StableLmConfig", **SIZE, qk_layernorm=True, use_parallel_residual=True),
        "starcoder2": model("Starcoder2ForCausalLM", "Starcoder2Config", **SIZE),
        "phi2": model("PhiForCausalLM", "PhiConfig", **SIZE),
        "gptneox": model("GPTNeoXForCausalLM", "GPTNeoXConfig", **EQUAL),
        "gptneox-serial": model("GPTNeoXForCausalLM", "GPTNeoXConfig", **EQUAL, use_parallel_residual=False),
        "falcon-7b": model("FalconForCausalLM", "FalconConfig", **SIZE, ffn_hidden_size=512),
        "falcon-40b": model("FalconForCausalLM", "FalconConfig", **SIZE, ffn_hidden_size=512, num_kv_heads=2,
                            new_decoder_architecture=True),
        "falcon-11b": model("FalconForCausalLM", "FalconConfig", **SIZE, ffn_hidden_size=512, num_kv_heads=2,
                            new_decoder_architecture=True, num_ln_in_parallel_attn=1),
        "bloom": model("BloomForCausalLM", "BloomConfig", hidden_size=256, n_layer=2, n_head=4),
        "mpt": model("MptForCausalLM", "MptConfig", d_model=256, n_layers=2, n_heads=4, max_seq_len=512),
        "nemotron": model("NemotronForCausalLM", "NemotronConfig", **SIZE, head_dim=64),
        "exaone4": model("Exaone4ForCausalLM", "Exaone4Config", **SIZE, sliding_window=None,
                         layer_types=["full_attention"] * 2, rope_parameters=LLAMA3_ROPE),
        "glm": model("GlmForCausalLM", "GlmConfig", **SIZE, head_dim=64),
        "glm4": model("Glm4ForCausalLM", "Glm4Config", **SIZE, head_dim=32),
        "ernie4_5": model("Ernie4_5ForCausalLM", "Ernie4_5Config", **SIZE, head_dim=32),
        "olmoe": model("OlmoeForCausalLM", "OlmoeConfig", **EQUAL, num_experts=4, num_experts_per_tok=2),
        "granitemoe": model("GraniteMoeForCausalLM", "GraniteMoeConfig", **SIZE, num_local_experts=4, num_experts_per_tok=2),
    }.items()
}  # fmt: skip
