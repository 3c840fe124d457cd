"""The tensors and the config of a model under the names of a class that transformers has no code for.

Each function takes a state of a model that computes the same, and its config, and changes both in place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import Tiny

State = dict[str, torch.Tensor]


def relabelled(tiny: Tiny, folder: Path, out: Path) -> Path:
    """The checkpoint in `folder` as one of the class that `tiny` stands for, in `out`."""
    shutil.copytree(folder, out)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tiny.relabel(state, config)
    config["architectures"] = list(tiny.also)
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def rename(state: State, words: dict[str, str]) -> None:
    for name in list(state):
        new = name
        for old, word in words.items():
            new = new.replace(old, word)
        state[new] = state.pop(name)


def layers_with(state: State, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in list(state) if name.endswith(ending)]


def internlm2(state: State, config: dict[str, Any]) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for layer in layers_with(state, "self_attn.q_proj.weight"):
        q, k, v = (state.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv")
        size = len(k) // kv_heads
        groups = [
            torch.cat([q.view(kv_heads, heads // kv_heads * size, -1)[head], k.view(kv_heads, size, -1)[head],
                       v.view(kv_heads, size, -1)[head]])
            for head in range(kv_heads)
        ]  # fmt: skip
        state[f"{layer}attention.wqkv.weight"] = torch.cat(groups)
    rename(state, {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    })  # fmt: skip
    config["bias"] = False


def minicpm(state: State, config: dict[str, Any]) -> None:
    """Granite, whose attention is scaled as usual."""
    assert config.pop("attention_multiplier") == 64**-0.5
    config |= {
        "scale_emb": config.pop("embedding_multiplier"),
        "scale_depth": config.pop("residual_multiplier") * config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"] / config.pop("logits_scaling"),
    }


def _fuse_qkv(state: State) -> None:
    for layer in layers_with(state, "self_attn.q_proj.weight"):
        parts = [state.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
        state[f"{layer}attention.query_key_value.weight"] = torch.cat(parts)
    rename(state, {"model.embed_tokens": "model.word_embeddings", "self_attn.o_proj": "attention.dense"})


def bailing_moe(state: State, config: dict[str, Any]) -> None:
    """GraniteMoeShared, all scales as usual; its routing is that of a softmax normed over the chosen."""
    _fuse_qkv(state)
    for layer in layers_with(state, "block_sparse_moe.input_linear.weight"):
        both = state.pop(f"{layer}block_sparse_moe.input_linear.weight")
        down = state.pop(f"{layer}block_sparse_moe.output_linear.weight")
        for expert, (gate_up, back) in enumerate(zip(both, down)):
            gate, up = gate_up.chunk(2)
            for part, value in (("gate", gate), ("up", up), ("down", back)):
                state[f"{layer}mlp.experts.{expert}.{part}_proj.weight"] = value
        gate, up = state.pop(f"{layer}shared_mlp.input_linear.weight").chunk(2)
        state[f"{layer}mlp.shared_experts.gate_proj.weight"] = gate
        state[f"{layer}mlp.shared_experts.up_proj.weight"] = up
    rename(state, {
        "shared_mlp.output_linear": "mlp.shared_experts.down_proj", "block_sparse_moe.router.layer": "mlp.gate",
    })  # fmt: skip
    for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        config.pop(name)
    config |= {
        "num_experts": config.pop("num_local_experts"), "moe_intermediate_size": config["intermediate_size"],
        "num_shared_experts": config.pop("shared_intermediate_size") // config["intermediate_size"],
        "norm_topk_prob": True, "norm_head": False, "first_k_dense_replace": 0,
    }  # fmt: skip


def bailing_moe2(state: State, config: dict[str, Any]) -> None:
    """GLM-4.5 with experts, norms of queries and keys and groups of experts."""
    _fuse_qkv(state)
    rename(state, {
        "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm",
        "e_score_correction_bias": "expert_bias",
    })  # fmt: skip
    config |= {
        "num_experts": config.pop("n_routed_experts"), "num_shared_experts": config.pop("n_shared_experts"),
        "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    }  # fmt: skip
