"""A tiny model of every architecture, made by transformers from its own config, with a real tokenizer.

Weights are drawn wide enough for the next token to be clear, and norms and biases away from one and zero,
so that a tensor that is swapped, permuted or left out shows in the logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.02 * i for i in range(32)], "long_factor": [1.5 + 0.1 * i for i in range(32)],
}  # fmt: skip

BYTE_BPE = "byte-level BPE"
SENTENCEPIECE = "SentencePiece"

TOKENS = "as many as there are tokens"


@dataclass(frozen=True)
class Tiny:
    """A class of transformers and its config's. `also` are classes of other checkpoints that this one proves: those of
    models with the same tensors, or that `relabel` turns it into (of a state's tensors and the config)."""

    kind: str
    config: str
    values: dict[str, Any]
    also: tuple[str, ...] = ()
    relabel: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] | None = None

    def __call__(self, tokens: int) -> transformers.PreTrainedModel:
        settings = getattr(transformers, self.config)(
            vocab_size=tokens,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            initializer_range=0.08,
            **{key: tokens if value is TOKENS else value for key, value in self.values.items()},
        )
        return getattr(transformers, self.kind)(settings)


def model(
    kind: str, config: str, also: tuple[str, ...] = (), relabel: Callable | None = None, **values: Any
) -> Tiny:
    return Tiny(kind, config, values, also, relabel)


MODELS: dict[str, tuple[Tiny, str]] = {
    "llama": (model("LlamaForCausalLM", "LlamaConfig", **SIZE, tie_word_embeddings=False), SENTENCEPIECE),
    "llama-tied": (model("LlamaForCausalLM", "LlamaConfig", **SIZE, tie_word_embeddings=True), BYTE_BPE),
    "llama-bias": (
        model("LlamaForCausalLM", "LlamaConfig", **SIZE, attention_bias=True, mlp_bias=False),
        SENTENCEPIECE,
    ),
    "llama-3": (model("LlamaForCausalLM", "LlamaConfig", **SIZE, rope_parameters=LLAMA3_ROPE), BYTE_BPE),
    "llama-linear": (
        model("LlamaForCausalLM", "LlamaConfig", **SIZE,
               rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        BYTE_BPE,
    ),
    "mistral": (model("MistralForCausalLM", "MistralConfig", **SIZE, head_dim=32, sliding_window=None), SENTENCEPIECE),
    "qwen2": (model("Qwen2ForCausalLM", "Qwen2Config", **SIZE), BYTE_BPE),
    "llama-yarn": (model("LlamaForCausalLM", "LlamaConfig", **SIZE, rope_parameters=YARN), BYTE_BPE),
    "qwen2-yarn": (
        model("Qwen2ForCausalLM", "Qwen2Config", **SIZE, rope_parameters=YARN | {"attention_factor": 1.5}), BYTE_BPE,
    ),
    "qwen3": (model("Qwen3ForCausalLM", "Qwen3Config", **SIZE, head_dim=128, tie_word_embeddings=True), BYTE_BPE),
    "gemma2": (model("Gemma2ForCausalLM", "Gemma2Config", **SIZE, **GEMMA), SENTENCEPIECE),
    "gemma3": (
        model("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZE | {"num_hidden_layers": 7}, **GEMMA),
        SENTENCEPIECE,
    ),
    "phi3": (model("Phi3ForCausalLM", "Phi3Config", **SIZE), SENTENCEPIECE),
    "phi3-longrope": (
        model("Phi3ForCausalLM", "Phi3Config", **SIZE | {"max_position_embeddings": 2048},
               original_max_position_embeddings=512, rope_parameters=LONGROPE),
        SENTENCEPIECE,
    ),
    "gpt2": (model("GPT2LMHeadModel", "GPT2Config", n_embd=256, n_layer=2, n_head=4, n_positions=512), BYTE_BPE),
    "mixtral": (
        model("MixtralForCausalLM", "MixtralConfig", **SIZE, num_local_experts=4, num_experts_per_tok=2),
        SENTENCEPIECE,
    ),
    "qwen3moe": (
        model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **SIZE, head_dim=64, num_experts=8, num_experts_per_tok=2,
               moe_intermediate_size=256, norm_topk_prob=True),
        BYTE_BPE,
    ),
}  # fmt: skip
FUSED = ("mixtral", "qwen3moe")  # saved a second time with the 3-D expert tensors of transformers 5


def build(
    name: str,
    folder: Path,
    tokenizers: dict[str, Path],
    dtype: torch.dtype = torch.float32,
    models: dict[str, tuple[Tiny, str]] = MODELS,
) -> Path:
    """Save the model called `name` (with "-fused" behind it for 3-D experts) and its tokenizer in `folder`."""
    make, kind = models[name.removesuffix("-fused")]
    torch.manual_seed(7)
    model = make(vocabulary_size(tokenizers[kind])).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.ndim == 1:
                spread = 0.2 * torch.randn_like(parameter)
                around_zero = label.endswith("bias") or name in ("gemma", "gemma2", "gemma3")
                parameter.copy_(spread if around_zero else 1 + spread)
    model.to(dtype).save_pretrained(folder)
    if name.endswith("-fused"):
        state = {
            key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"
        }
        save_file(state | {"lm_head.weight": model.lm_head.weight}, folder / "model.safetensors")
        assert any(value.ndim == 3 for value in load_file(folder / "model.safetensors").values())
    for file in tokenizers[kind].iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder / file.name)
    return folder


def vocabulary_size(tokenizer: Path) -> int:
    return json.loads((tokenizer / "config.json").read_text())["vocab_size"]
