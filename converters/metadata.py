"""`general.*`: who made the model, under which licence, and what made the file.

The model card is read, and names are taken apart, by gguf-py, so that they come out as llama.cpp's own
converter writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod

import yaml
from gguf import GGUFValueType, GGUFWriter
from gguf import Metadata as ModelCard
from gguf.utility import size_label

from pathlib import Path

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint
from llmcompress.gguf.value import Metadata, Value, ValueType, string
from llmcompress.plan import Step
from llmcompress.recipe import Recipe

_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


def general_metadata(
    architecture: str, checkpoint: Checkpoint, steps: Sequence[Step], recipe: Recipe
) -> tuple[Metadata, list[str]]:
    """The `general.*` and `llmcompress.*` keys, and notes on what could not be read."""
    total, expert_weights, experts = _count(steps)
    card, notes = _model_card(checkpoint, total)
    card.name = recipe.name or card.name or checkpoint.name
    if card.size_label is None and total:
        card.size_label = size_label(total, total - expert_weights * experts, expert_weights, experts)
    _add_sampling(card, checkpoint.directory)
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    keys = {key: _value(value) for key, value in writer.kv_data[0].items()}
    keys["llmcompress.version"] = string(__version__)
    keys["llmcompress.recipe"] = string(recipe.as_json())
    if checkpoint.revision:
        keys["llmcompress.source.revision"] = string(checkpoint.revision)
    return keys, notes


def _model_card(checkpoint: Checkpoint, weights: int) -> tuple[ModelCard, list[str]]:
    notes: list[str] = []
    try:
        card = ModelCard.load_model_card(checkpoint.directory)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        notes.append(f"README.md: its header cannot be read and is left out: {' '.join(str(error).split())}")
        card = {}
    named = Path(checkpoint.name)
    return ModelCard.apply_metadata_heuristic(ModelCard(), card, checkpoint.config, named, weights), notes


def _add_sampling(card: ModelCard, directory: Path) -> None:
    """The sampling defaults the model's authors recommend."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return
    defaults = json.loads(path.read_text(encoding="utf-8"))
    for key, name in _SAMPLING.items():
        if isinstance(defaults.get(key), (int, float)):
            setattr(card, f"sampling_{name}", defaults[key])


def _count(steps: Sequence[Step]) -> tuple[int, int, int]:
    """Weights in all, weights of one expert, and the number of experts."""
    stacks = [step for step in steps if len(step.shape) > 2]
    experts = stacks[0].shape[0] if stacks else 0
    return sum(step.weights for step in steps), sum(prod(step.shape[1:]) for step in stacks), experts


def _value(value) -> Value:
    item = None if value.sub_type is None else ValueType(value.sub_type)
    if value.type == GGUFValueType.ARRAY and item is None:  # gguf-py works the element type out when it writes
        item = ValueType(GGUFValueType.get_type(value.value[0]))
    return Value(ValueType(value.type), value.value, item)
