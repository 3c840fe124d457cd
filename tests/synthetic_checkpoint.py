"""Checkpoints of any size with random weights, written byte by byte: no torch, no model class."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

TOKENIZER = Path(__file__).parent / "data" / "stories260K"  # 512 tokens
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Llama:
    """A Llama with stories260K's tokenizer."""

    layers: int = 2
    hidden: int = 256
    feed_forward: int = 512
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 512

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.tokens,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        }  # fmt: skip

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        shapes = {
            "model.embed_tokens.weight": (self.tokens, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            shapes |= {block + f"self_attn.{p}_proj.weight": (self.hidden, self.hidden) for p in "qo"}
            shapes |= {block + f"self_attn.{p}_proj.weight": (kv, self.hidden) for p in "kv"}
            shapes |= {
                block + f"mlp.{p}_proj.weight": (self.feed_forward, self.hidden) for p in ("gate", "up")
            }
            shapes[block + "mlp.down_proj.weight"] = (self.hidden, self.feed_forward)
            shapes |= {block + f"{p}_layernorm.weight": (self.hidden,) for p in ("input", "post_attention")}
        return shapes | {"lm_head.weight": (self.tokens, self.hidden)}


def write_checkpoint(folder: Path, model: Llama = Llama(), dtype: str = "BF16", seed: int = 0) -> Path:
    """A model directory with tokenizer, config and `model.safetensors`, its weights drawn from a normal."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(model.config))
    write_safetensors(folder / "model.safetensors", model.shapes, dtype, seed)
    return folder


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    packed = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        for shape in shapes.values():
            for values in weights(shape, np.random.default_rng([seed, file.tell()])):
                file.write(encoded(values, dtype))


def weights(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    """float32, a few million at a time: norms near one, matrices small enough for sane activations."""
    spread, middle = (0.1, 1.0) if len(shape) == 1 else (shape[-1] ** -0.5, 0.0)
    for first in range(0, prod(shape), 2**22):
        yield middle + spread * random.standard_normal(min(2**22, prod(shape) - first), np.float32)


def encoded(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "F32" else "<f2").tobytes()


def poke(folder: Path, tensor: str, index: int, value: float) -> None:
    """Overwrite one weight, by its flat index."""
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[tensor]
        file.seek(8 + length + entry["data_offsets"][0] + index * BYTES[entry["dtype"]])
        file.write(encoded(np.array([value], np.float32), entry["dtype"]))
