"""Where a model's architecture has two matrices with a latent between them, whose size is a number in config.json."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.tensor_info import TensorInfo

# By llama.cpp's name of the architecture, in names of its tensors: what makes a latent in its first rows, what norms that, and
# what takes it; and config.json's name for the latent's size.
PAIRS = {
    "deepseek2": (
        ("attn_q_a", "attn_q_a_norm", "attn_q_b", "q_lora_rank"),
        ("attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b", "kv_lora_rank"),
    ),
}


@dataclass(frozen=True)
class Pair:
    """Names of tensors of one layer: `first`, of which the first `rank` rows make the latent, `norm` and
    `second`. size: config.json's name for the rank."""

    layer: int
    first: str
    norm: str
    second: str
    size: str
    rank: int


def pairs_of(checkpoint: Checkpoint) -> list[Pair]:
    """All pairs of a model; none where its architecture has none. Raises PlanError for tensors that are no pair."""
    known = PAIRS.get(find_architecture(Config(checkpoint.config)).name, ())
    layers: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for step in weight_steps(checkpoint) if known else ():
        if place := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", step.name):
            layers[int(place[1])][place[2]] = step.pieces[0].tensor
    return [
        _pair(layer, tensors[first], tensors[norm], tensors[second], size)
        for layer, tensors in sorted(layers.items())
        for first, norm, second, size in known
        if first in tensors
    ]


def _pair(layer: int, first: TensorInfo, norm: TensorInfo, second: TensorInfo, size: str) -> Pair:
    rank = second.columns
    if first.rows < rank or norm.shape != (rank,):
        raise PlanError(
            f"{second.name}: has {rank} inputs, {first.name} {first.rows} rows, {norm.name} {norm.columns} numbers"
        )
    return Pair(layer, first.name, norm.name, second.name, size, rank)
