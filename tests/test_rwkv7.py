"""RWKV 7, which transformers cannot build: llama.cpp's logits against the recurrence as its paper has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Model
from safetensors.numpy import save_file
from test_architectures import assert_same_logits, ids_of

import llmcompress

WIDTH, INNER, LAYERS, HEAD = 256, 512, 3, 64
RANKS = {"w": 32, "a": 64, "v": 32, "g": 96}
Weights = dict[str, np.ndarray]


def random_weights(tokens: int) -> Weights:
    """Under flash-linear-attention's names."""
    chance = np.random.default_rng(7)

    def normal(*shape: int, spread: float = 1.0) -> np.ndarray:
        return (spread * chance.standard_normal(shape)).astype(np.float32)

    found = {
        "model.embeddings.weight": normal(tokens, WIDTH),
        "lm_head.weight": normal(tokens, WIDTH, spread=0.1),
    }
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for layer in range(LAYERS):
        at, inside = f"model.layers.{layer}.attn.", f"model.layers.{layer}.ffn."
        norms += [f"model.layers.{layer}.attn_norm", f"model.layers.{layer}.ffn_norm", f"{at}g_norm"]
        found |= {f"{at}x_{part}": chance.random((1, 1, WIDTH)).astype(np.float32) for part in "rwkvag"}
        found |= {f"{at}{part}_proj.weight": normal(WIDTH, WIDTH, spread=0.08) for part in "rkvo"}
        for part, rank in RANKS.items():
            if part == "v" and layer == 0:
                continue
            found[f"{at}{part}_lora.lora.0.weight"] = normal(rank, WIDTH, spread=0.1)
            found[f"{at}{part}_lora.lora.2.weight"] = normal(WIDTH, rank, spread=0.1)
            if part != "g":
                found[f"{at}{part}_lora.lora.2.bias"] = normal(WIDTH)
        found |= {f"{at}k_k": 1 + normal(WIDTH, spread=0.2), f"{at}k_a": 1 + normal(WIDTH, spread=0.2)}
        found |= {f"{at}r_k": normal(WIDTH // HEAD, HEAD, spread=0.2), f"{inside}x_k": normal(WIDTH)}
        found |= {f"{inside}key.weight": normal(INNER, WIDTH, spread=0.08)}
        found |= {f"{inside}value.weight": normal(WIDTH, INNER, spread=0.08)}
    for name in norms:
        found |= {f"{name}.weight": 1 + normal(WIDTH, spread=0.2), f"{name}.bias": normal(WIDTH, spread=0.2)}
    return found


def norm(
    values: np.ndarray, weights: Weights, name: str, groups: int = 1, epsilon: float = 1e-5
) -> np.ndarray:
    parts = values.reshape(groups, -1)
    parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + epsilon)
    return parts.reshape(-1) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def reference(weights: Weights, ids: list[int]) -> np.ndarray:
    """Logits `(tokens, vocabulary)`, token by token in float64."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    state = np.zeros((LAYERS, WIDTH // HEAD, HEAD, HEAD))  # of each head, values by keys
    last = np.zeros((LAYERS, 2, WIDTH))
    logits = []
    for token in ids:
        x = norm(weights["model.embeddings.weight"][token], weights, "model.layers.0.pre_norm")
        for layer in range(LAYERS):
            at, inside = f"model.layers.{layer}.attn.", f"model.layers.{layer}.ffn."

            def low_rank(part: str, values: np.ndarray, between=lambda inner: inner) -> np.ndarray:
                name = f"{at}{part}_lora.lora."
                made = weights[f"{name}2.weight"] @ between(weights[f"{name}0.weight"] @ values)
                return made + weights.get(f"{name}2.bias", 0)

            normed = norm(x, weights, f"model.layers.{layer}.attn_norm")
            mixed = {p: normed + (last[layer, 0] - normed) * weights[f"{at}x_{p}"].ravel() for p in "rwkvag"}
            last[layer, 0] = normed
            r, k, v = (weights[f"{at}{part}_proj.weight"] @ mixed[part] for part in "rkv")
            decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank("w", mixed["w"], np.tanh)))
            rate = sigmoid(low_rank("a", mixed["a"]))
            gate = low_rank("g", mixed["g"], sigmoid)
            if layer == 0:
                first = v
            else:
                v = v + (first - v) * sigmoid(low_rank("v", mixed["v"]))
            removed = (k * weights[f"{at}k_k"]).reshape(-1, HEAD)
            removed /= np.linalg.norm(removed, axis=-1, keepdims=True)
            k = k * (1 + (rate - 1) * weights[f"{at}k_a"])
            r, k, v, decay, rate = (values.reshape(-1, HEAD) for values in (r, k, v, decay, rate))
            out = []
            for head, memory in enumerate(state[layer]):
                held = memory @ removed[head]
                memory *= decay[head]
                memory += np.outer(v[head], k[head]) - np.outer(held, removed[head] * rate[head])
                out.append(memory @ r[head])
            out = norm(np.concatenate(out), weights, f"{at}g_norm", WIDTH // HEAD, 64e-5)
            bonus = (r * k * weights[f"{at}r_k"]).sum(-1, keepdims=True) * v
            x = x + weights[f"{at}o_proj.weight"] @ ((out + bonus.reshape(-1)) * gate)
            normed = norm(x, weights, f"model.layers.{layer}.ffn_norm")
            mix = normed + (last[layer, 1] - normed) * weights[f"{inside}x_k"]
            last[layer, 1] = normed
            x = (
                x
                + weights[f"{inside}value.weight"] @ np.maximum(weights[f"{inside}key.weight"] @ mix, 0) ** 2
            )
        logits.append(weights["lm_head.weight"] @ norm(x, weights, "model.norm"))
    return np.array(logits)


@pytest.mark.slow
def write_model(folder: Path, example: Path) -> Weights:
    """A checkpoint with the tokenizer of another model, which is there."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example / file, folder / file)
    tokens = json.loads((example / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "hidden_size": WIDTH, "head_dim": HEAD, "norm_eps": 1e-5,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": tokens, "hidden_act": "sqrelu",
        "decay_low_rank_dim": RANKS["w"], "a_low_rank_dim": RANKS["a"], "v_low_rank_dim": RANKS["v"],
        "gate_low_rank_dim": RANKS["g"], "norm_first": True, "norm_bias": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(tokens)
    save_file(weights, folder / "model.safetensors")
    return weights


def test_logits_are_those_of_the_recurrence_and_a_k_type_runs(root: Path, tmp_path: Path) -> None:
    example, folder = root / "examples" / "sample-llama-6m", tmp_path / "model"
    weights = write_model(folder, example)
    ids = ids_of(example)
    wanted = reference(weights, ids)
    result = llmcompress.quantize(folder, tmp_path / "{type}.gguf", type=["F32", "Q4_K_M"], verify="full")
    with Model(result.paths[0]) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
    with Model(result.paths[1]) as model:
        assert np.abs(model.logits(ids) - wanted).mean() < 0.1 * np.ptp(wanted)
