"""Writes a checkpoint with a real model's shapes and random weights, for measurements.

    python tools/synthetic.py FOLDER --size tinyllama          # TinyLlama-1.1B: 2.2 GB of bf16
    python tools/synthetic.py FOLDER --size 0.5b               # the widths of Qwen2.5-0.5B's layers: 1 GB
    python tools/synthetic.py FOLDER --size 3b --shard-size 2G  # TinyLlama's proportions, about 3e9 weights

A Llama in bf16, written a few million weights at a time. The tokenizer is the small SentencePiece one of
tests/data/stories260K; converters fill its vocabulary up to the model's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from llmcompress.gguf.layout import split
from llmcompress.sizes import parse_size

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "data" / "stories260K"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_SIZE = 512
DEVIATION = 0.02  # of the weights, as models are initialised
CHUNK = 2**22  # weights made at a time
HEAD = 64  # columns of an attention head

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What decides a Llama's tensors; the heads have 64 columns."""

    hidden: int
    ffn: int
    layers: int
    kv_heads: int
    vocabulary: int

    def layer(self, number: int) -> list[Tensor]:
        hidden, ffn, kv = self.hidden, self.ffn, self.kv_heads * HEAD
        shapes = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "mlp.down_proj": (hidden, ffn), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "self_attn.k_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (kv, hidden),
        }  # fmt: skip
        return [(f"model.layers.{number}.{name}.weight", shape) for name, shape in shapes.items()]

    def tensors(self) -> list[Tensor]:
        layers = [tensor for number in range(self.layers) for tensor in self.layer(number)]
        table = (self.vocabulary, self.hidden)
        ends = [("model.norm.weight", table[1:]), ("lm_head.weight", table)]
        return [("model.embed_tokens.weight", table), *layers, *ends]

    @property
    def weights(self) -> int:
        per_layer = sum(prod(shape) for _, shape in self.layer(0))
        return 2 * self.vocabulary * self.hidden + self.hidden + self.layers * per_layer

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // HEAD, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


TINYLLAMA = Shape(hidden=2048, ffn=5632, layers=22, kv_heads=4, vocabulary=32000)
# Qwen2.5-0.5B's widths. Of its 0.5e9 weights more than a quarter are its vocabulary's; here more layers make them up,
# so that the time of a run is that of its layers.
HALF_BILLION = Shape(hidden=896, ffn=4864, layers=30, kv_heads=2, vocabulary=32000)
NAMED = {"tinyllama": TINYLLAMA, "0.5b": HALF_BILLION}


def shape_of(size: str) -> Shape:
    """The shape for `tinyllama` or `0.5b`, or for a number of weights such as `200m` or `3b`: TinyLlama's proportions,
    its layers counted so that the number comes out as closely as whole layers let it. Raises ValueError."""
    if size.lower() in NAMED:
        return NAMED[size.lower()]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mb])", size.lower())
    if not match:
        raise ValueError(f"--size {size}: write tinyllama, or a number of weights such as 200m or 3b")
    wanted = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
    vocabulary = TINYLLAMA.vocabulary if wanted >= 1e8 else TOKENIZER_SIZE
    widths = (256, *range(512, 16384 + 1, 512))
    candidates = [_of_width(width, vocabulary, wanted) for width in widths]
    aspect = TINYLLAMA.layers / TINYLLAMA.hidden
    return min(candidates, key=lambda shape: abs(shape.layers - aspect * shape.hidden))


def _of_width(width: int, vocabulary: int, weights: float) -> Shape:
    """A Llama of that width with as many layers as come nearest to `weights`."""
    ffn = -(-width * TINYLLAMA.ffn // TINYLLAMA.hidden // 256) * 256  # rows that K types can hold
    single = Shape(width, ffn, 1, max(1, width // 512), vocabulary)
    per_layer = sum(prod(shape) for _, shape in single.layer(0))
    return replace(single, layers=max(1, round((weights - single.weights) / per_layer) + 1))


def write_checkpoint(folder: Path, shape: Shape, shard_size: int | None = None, seed: int = 0) -> None:
    """Write the whole model directory; config.json comes last, so that where it is, all is."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shape.tensors()
    sizes = [2 * prod(dims) for _, dims in tensors]
    groups = split(sizes, shard_size) if shard_size else [range(len(tensors))]
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        listed = {tensors[i][0]: name for name, group in zip(names, groups) for i in group}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": listed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    random = np.random.Generator(np.random.SFC64(seed))
    for name, group in zip(names, groups):
        _write_shard(folder / name, [tensors[i] for i in group], random)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def _write_shard(file: Path, tensors: list[Tensor], random: np.random.Generator) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            for chunk in _bf16_weights(shape, random):
                stream.write(chunk)


def _bf16_weights(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    """A tensor in chunks, uint16 bits of bfloat16: norms near one, matrices near zero."""
    for start in range(0, prod(shape), CHUNK):
        values = random.standard_normal(min(CHUNK, prod(shape) - start), np.float32) * np.float32(DEVIATION)
        bits = (values + np.float32(len(shape) == 1)).view(np.uint32)
        yield ((bits + 0x8000) >> 16).astype(np.uint16)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="tinyllama", help="tinyllama, 0.5b, or weights such as 200m or 3b")
    parser.add_argument("--shard-size", help="most bytes in one file, such as 2G")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        shape = shape_of(given.size)
    except ValueError as error:
        parser.error(str(error))
    shard_size = parse_size(given.shard_size, "--shard-size") if given.shard_size else None
    write_checkpoint(given.folder, shape, shard_size, given.seed)
    millions = shape.weights / 1e6
    print(f"{given.folder}: {millions:.1f} million weights, {shape.layers} layers of width {shape.hidden}")


if __name__ == "__main__":
    main()
