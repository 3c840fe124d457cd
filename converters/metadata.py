"""`general.*`: who made the model, under which licence, and what made the file.

The model card is read, and names are taken apart, by gguf-py, so that they come out as llama.cpp's own
converter writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from pathlib import Path

import yaml
from gguf import GGUFWriter
from gguf import Metadata as ModelCard
from gguf.utility import size_label

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError
from llmcompress.gguf.value import Metadata, Value, ValueType, string
from llmcompress.json_object import read_object
from llmcompress.recipe import Recipe
from llmcompress.step import Step

# general.sampling.*: what generation_config.json calls it, the first that it has, and its type.
_SAMPLING: dict[str, tuple[tuple[str, ...], type]] = {
    "sequence": (("sequence",), str),
    "temp": (("temperature",), float),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), float),
    **{name: ((name,), int) for name in ("top_k", "penalty_last_n", "mirostat")},
    **{
        name: ((name,), float)
        for name in ("top_p", "min_p", "xtc_probability", "xtc_threshold", "mirostat_tau", "mirostat_eta")
    },
}


def general_metadata(
    architecture: str, checkpoint: Checkpoint, steps: Sequence[Step], recipe: Recipe
) -> tuple[Metadata, list[str]]:
    """The `general.*` keys and those on what made the file, and notes on what could not be read."""
    total, expert_weights, experts = _count(steps)
    card, notes = _model_card(checkpoint, total)
    card.name = recipe.name or (card.name if isinstance(card.name, str) else checkpoint.name)
    if card.size_label is None and total:
        card.size_label = size_label(total, total - expert_weights * experts, expert_weights, experts)
    _add_sampling(card, checkpoint.directory / "generation_config.json")
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    keys: Metadata = {}
    for key, written in writer.kv_data[0].items():
        value = _value(written)
        if value is None:
            notes.append(f"README.md: {key} cannot be {written.value!r} and is left out")
        else:
            keys[key] = value
    keys["llmcompress.version"] = string(__version__)
    if checkpoint.revision:
        keys["llmcompress.source.revision"] = string(checkpoint.revision)
    return keys, notes


def _model_card(checkpoint: Checkpoint, weights: int) -> tuple[ModelCard, list[str]]:
    notes: list[str] = []
    try:
        card = ModelCard.load_model_card(checkpoint.directory)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        notes.append(f"README.md: its header cannot be read and is left out: {' '.join(str(error).split())}")
        card = {}
    if isinstance(card.get("license"), list):  # gguf-py joins them, but only texts
        card["license"] = ",".join(map(str, card["license"]))
    texts = {key: value for key, value in checkpoint.config.items() if isinstance(value, str)}
    return ModelCard.apply_metadata_heuristic(ModelCard(), card, texts, Path(checkpoint.name), weights), notes


def _add_sampling(card: ModelCard, path: Path) -> None:
    """The sampling defaults the model's authors recommend."""
    defaults = read_object(path) if path.is_file() else {}
    for name, (keys, kind) in _SAMPLING.items():
        key = next((key for key in keys if defaults.get(key) is not None), keys[0])
        value = defaults.get(key)
        if kind is str and isinstance(value, str):
            card.sampling_sequence = value
        elif kind is not str and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not isfinite(value):
                raise CheckpointError(f"{path}: {key} is {value}; it must be a number, or left out")
            setattr(card, f"sampling_{name}", kind(value))


def _count(steps: Sequence[Step]) -> tuple[int, int, int]:
    """Weights in all, weights of one expert, and the number of experts."""
    stacks = [step for step in steps if len(step.shape) > 2]
    experts = stacks[0].shape[0] if stacks else 0
    return sum(step.weights for step in steps), sum(prod(step.shape[1:]) for step in stacks), experts


def _value(written) -> Value | None:
    """gguf-py's value as ours; None where a model card held something of another kind."""
    kind = ValueType(written.type)
    if kind is ValueType.ARRAY:
        words = [word for word in written.value if isinstance(word, str)]
        return Value(kind, words, ValueType.STRING) if len(words) == len(written.value) and words else None
    if kind is ValueType.STRING and not isinstance(written.value, str):
        return None
    return Value(kind, written.value)
