"""GGUF to GGUF: other types, other shards, the same metadata and tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from llmcompress.converters.to_gguf import importance_source

from llmcompress.errors import GGUFError, PlanError, shown
from llmcompress.fallback import MeasuredFallback
from llmcompress.filetypes import FLOATS
from llmcompress.gguf.value import string
from llmcompress.gguf_source import GGUFSource
from llmcompress.mix import ModelTraits
from llmcompress.plan import Plan, make_plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.step import Piece, Step
from llmcompress.target import Target


def plan_requantized(
    path: str | Path, out: str | Path, recipe: Recipe, progress: Progress = Progress()
) -> Plan:
    """What `recipe` will do to the tensors of a GGUF file or of all its shards.

    A tensor whose type does not change is copied as it is. Raises LlmcompressError for all that can be refused
    before a weight is read.
    """
    for field in ("calibrate", "hessian", "adapter"):
        if getattr(recipe, field, None):
            raise PlanError(f"--{field}: needs the model that {path} was made from; give its directory")
    source = GGUFSource.open(path)
    return plan_tensors(source, whole_steps(source), out, recipe, progress)


def whole_steps(source: GGUFSource) -> list[Step]:
    """Every tensor of the file, as it is."""
    return [
        Step(name, tensor.shape, (Piece(tensor, 0, tensor.rows),)) for name, tensor in source.index.items()
    ]


def plan_tensors(
    source: GGUFSource, steps: list[Step], out: str | Path, recipe: Recipe, progress: Progress = Progress()
) -> Plan:
    """The plan of a file made of tensors of another. Raises LlmcompressError as `plan_requantized` does."""
    metadata = dict(source.metadata)
    metadata |= {"general.name": string(recipe.name)} if recipe.name else {}
    metadata |= {"tokenizer.ggml.pre": string(recipe.pre)} if recipe.pre else {}
    return make_plan(
        source, steps, recipe, out, traits(source, bool(recipe.imatrix)), metadata, importance_source(source, steps, recipe),
        _warning(source, recipe), MeasuredFallback(source, recipe.effort) if recipe.fallback == "best" else None,
        Target(source, recipe, progress) if recipe.has_target else None,
    )  # fmt: skip


def _warning(source: GGUFSource, recipe: Recipe) -> list[str]:
    """What types the weights were rounded to already."""
    weights: Counter[str] = Counter()
    for tensor in source.index.values():
        if tensor.packed not in FLOATS:
            weights[tensor.packed] += tensor.rows * tensor.columns
    if not weights or (not recipe.has_target and {name.upper() for name in recipe.types} == {"COPY"}):
        return []
    listed = ", ".join(kind for kind, _ in weights.most_common())
    return [
        f"{source.path.name} is quantized already ({listed}), and its errors stay; the original model gives better files"
    ]


def traits(source: GGUFSource, has_imatrix: bool) -> ModelTraits:
    """What the rules for types ask of a model. Raises GGUFError where the metadata does not say it."""
    name = _value(source, "general.architecture", str)
    heads = _value(source, f"{name}.attention.head_count", int, 0)
    return ModelTraits(
        architecture=name, blocks=_value(source, f"{name}.block_count", int), heads=heads,
        kv_heads=_value(source, f"{name}.attention.head_count_kv", int, heads),
        experts=_value(source, f"{name}.expert_count", int, 0), has_imatrix=has_imatrix,
    )  # fmt: skip


def _value(source: GGUFSource, key: str, kind: type, default: Any = None) -> Any:
    """A value of the metadata; of a list with one for each block, the first block's."""
    held = source.metadata.get(key)
    value = default if held is None else held.value
    if isinstance(value, list) and value and kind is int and all(isinstance(item, int) for item in value):
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GGUFError(f"{source.path}: {key} is {shown(value)}, which no model has; is the file complete?")
    return value
