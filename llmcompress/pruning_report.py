"""What a pruning did, tensor by tensor: the manifest beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcompress import __version__
from llmcompress.json_object import read_object
from llmcompress.methods import PRUNING
from llmcompress.pruning_options import PruningOptions

MANIFEST = "prune.json"


def notes_on_filling(folder: Path, method: str) -> list[str]:
    """What becomes of the zeros of the model in `folder`, if it is pruned, where a quantizer's `method` does not hold them."""
    manifest = folder / MANIFEST
    if method != "gptq" or not manifest.is_file():
        return []
    if read_object(manifest).get("method") not in PRUNING:
        return []
    return ["the model is pruned, and gptq fills zeros as it likes: --keep-zeros holds them"]


@dataclass(frozen=True)
class TensorDensity:
    """What became of one tensor: of its weights, how many are zeros; how many of its matrices were pruned another way
    than asked for, and why."""

    name: str
    shape: tuple[int, ...]
    asked: float
    zeros: int
    weights: int
    fallbacks: Mapping[str, int]

    @property
    def density(self) -> float:
        return 1 - self.zeros / self.weights


@dataclass(frozen=True)
class PruningReport:
    """A finished pruning. `left`: matrices that stay as they are."""

    path: Path
    options: PruningOptions
    tensors: tuple[TensorDensity, ...]
    left: tuple[str, ...]
    model_weights: int
    notes: tuple[str, ...]
    tokens: Mapping[str, Any] | None
    statistics: str | None
    seconds: float
    resumed: int

    @property
    def sparsity(self) -> float:
        """Of the tensors that were pruned."""
        return sum(tensor.zeros for tensor in self.tensors) / max(
            1, sum(tensor.weights for tensor in self.tensors)
        )

    @property
    def sparsity_of_model(self) -> float:
        return sum(tensor.zeros for tensor in self.tensors) / self.model_weights

    def as_dict(self) -> dict[str, Any]:
        """What prune.json holds; `statistics` and `tokens` tell what the inputs were measured on."""
        return {
            "version": __version__,
            **self.options.as_dict(),
            "sparsity_reached": self.sparsity,
            "sparsity_of_model": self.sparsity_of_model,
            "tokens_seen": self.tokens,
            "statistics": self.statistics,
            "tensors": {
                tensor.name: {"density": tensor.density, **asdict(tensor)} for tensor in self.tensors
            },
            "left": self.left,
            "notes": self.notes,
        }
