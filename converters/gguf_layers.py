"""The job of `prune --method layers` on a GGUF: the same file without some layers, no weight decoded or rounded anew.

Tensors are copied bit for bit, of whatever type, and those behind a dropped layer get lower numbers; so do the entries
of an importance matrix. llama-quantize's --prune-layers does the names and block_count, and leaves arrays of one value
for each layer as long as they were, so that llama.cpp does not load the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from llmcompress.converters.families import ARCHITECTURES
from llmcompress.converters.layer_numbers import KeptLayers, kept_layers, renumbered
from llmcompress.converters.requantize import plan_tensors, whole_steps

from llmcompress.errors import GGUFError, PlanError, shown
from llmcompress.gguf.value import string
from llmcompress.gguf_source import GGUFSource, PackedTensor
from llmcompress.grids import GRIDS
from llmcompress.output import part_path
from llmcompress.plan import Plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import Result
from llmcompress.run import run
from llmcompress.stats import Statistics
from llmcompress.step import Piece, Step

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors that hold something for every layer, side by side: in columns and in rows.
BY_COLUMNS, BY_ROWS = "per_layer_token_embd.weight", "per_layer_model_proj.weight"


class CutSource(GGUFSource):
    """A GGUF whose tensor BY_COLUMNS, where it has one, has the columns of the layers that stay alone."""

    layers: KeptLayers
    kept: tuple[slice, ...] = ()  # bytes of a row

    def keep(self, layers: KeptLayers) -> None:
        """Raises PlanError where a layer's columns are no whole blocks."""
        self.layers = layers
        if BY_COLUMNS not in self.index:
            return
        tensor = self.index[BY_COLUMNS]
        block, size = GRIDS[tensor.packed].block, GRIDS[tensor.packed].block_bytes
        width = tensor.columns // layers.count
        if tensor.columns % layers.count or width % block:
            raise PlanError(
                f"{self.path}: {BY_COLUMNS} has {tensor.columns} columns for {layers.count} layers, in blocks of {block} "
                f"({tensor.packed}), which cannot be cut at layers; drop the layers from the model it was made from"
            )
        run_bytes = width // block * size
        self.kept = tuple(slice(layer * run_bytes, (layer + 1) * run_bytes) for layer in layers.kept)
        shape = (*tensor.shape[:-1], width * len(layers.kept))
        self.index[BY_COLUMNS] = replace(
            tensor, shape=shape, nbytes=tensor.rows * run_bytes * len(layers.kept)
        )

    def read_packed(self, name: str, first: int, rows: int) -> np.ndarray:
        data = super().read_packed(name, first, rows)
        if name != BY_COLUMNS or not self.kept:
            return data
        return np.concatenate([data[:, place] for place in self.kept], axis=1)


def plan_dropping(
    path: str | Path, out: str | Path, dropped: Sequence[int], recipe: Recipe = Recipe(types=("COPY",))
) -> Plan:
    """What dropping these layers makes of a GGUF, or of all its shards. Raises LlmcompressError for a model that llama.cpp
    would compute in another way, and for one of an architecture of which that is not known."""
    source = CutSource.open(path)
    try:
        name = _architecture(source)
        if name not in {architecture.name for architecture in ARCHITECTURES}:
            raise PlanError(
                f"{path}: it is not known what llama.cpp's {shown(name)} takes from the numbers of its layers; drop them from "
                "the model that the file was made from"
            )
        blocks = source.metadata.get(f"{name}.block_count")
        count = blocks.value if blocks and type(blocks.value) is int else 0
        layers = kept_layers(name, count, dropped)
        metadata = renumbered(source.metadata, layers)
        was = source.metadata.get("llmcompress.layers_dropped")
        listed = ",".join(map(str, layers.dropped))
        metadata["llmcompress.layers_dropped"] = string(f"{was.value}; {listed}" if was else listed)
        source.keep(layers)
        steps = _steps(source, layers)
        source.metadata = metadata
        return plan_tensors(source, steps, out, recipe)
    except BaseException:
        source.close()
        raise


def drop_layers(
    path: str | Path, out: str | Path, dropped: Sequence[int], imatrix: str | Path | None = None,
    recipe: Recipe = Recipe(types=("COPY",)), progress: Progress = Progress(),
) -> tuple[Result, Path | None]:  # fmt: skip
    """Write the GGUF `out` without the layers `dropped`; killed, the same call goes on.

    With `imatrix`, the file's importance matrix, one for the result is written beside it, whose path is returned.
    Raises LlmcompressError.
    """
    plan = plan_dropping(path, out, dropped, recipe)
    with plan.checkpoint:
        beside = _renumber_importance(imatrix, plan, plan.checkpoint.layers) if imatrix else None
        return run(plan, progress), beside


def _architecture(source: GGUFSource) -> str:
    held = source.metadata.get("general.architecture")
    if held is None or not isinstance(held.value, str):
        raise GGUFError(f"{source.path}: general.architecture is missing; is it a model?")
    return held.value


def new_name(name: str, layers: KeptLayers) -> str | None:
    """What a tensor, or an entry of an importance matrix, is called afterwards; None for those of dropped layers."""
    match = BLOCK.fullmatch(name)
    if not match:
        return name
    layer = int(match[1])
    return f"blk.{layers.kept.index(layer)}.{match[2]}" if layer in layers.kept else None


def _steps(source: CutSource, layers: KeptLayers) -> list[Step]:
    steps, seen = [], set()
    for step in whole_steps(source):
        match = BLOCK.fullmatch(step.name)
        seen |= {int(match[1])} if match else set()
        name = new_name(step.name, layers)
        if name == BY_ROWS:
            steps.append(_cut_rows(step, layers))
        elif name:
            steps.append(replace(step, name=name))
    if seen != set(range(layers.count)):
        wrong = min(seen ^ set(range(layers.count)))
        raise GGUFError(
            f"{source.path}: block_count is {layers.count}, its tensors are of {len(seen)} layers, and not of layer {wrong}; "
            "make or fetch the file again"
        )
    return steps


def _cut_rows(step: Step, layers: KeptLayers) -> Step:
    tensor: PackedTensor = step.pieces[0].tensor
    height = tensor.rows // layers.count
    if tensor.rows % layers.count:
        raise PlanError(
            f"{step.name}: has {tensor.rows} rows for {layers.count} layers; is the file complete?"
        )
    pieces = tuple(Piece(tensor, layer * height, height) for layer in layers.kept)
    return replace(step, shape=(height * len(layers.kept), tensor.columns), pieces=pieces)


def _renumber_importance(imatrix: str | Path, plan: Plan, layers: KeptLayers) -> Path:
    """The importance matrix of the result, in the format of that of the source. Raises PlanError for one of another model."""
    statistics = Statistics.load(imatrix)
    known = {piece.tensor.name for step in plan.steps for piece in step.pieces}
    named = {name: new_name(name, layers) for name in statistics.entries}
    if not known & named.keys():
        raise PlanError(f"{imatrix}: none of its {len(named)} entries names a tensor of this model")
    statistics.entries = {new: statistics.entries[name] for name, new in named.items() if new}
    first = plan.files[0].path
    path = first.with_name(f"{re.sub(r'-00001-of-[0-9]{5}$', '', first.stem)}-imatrix{Path(imatrix).suffix}")
    if path.resolve() == Path(imatrix).resolve() or part_path(path).exists():
        raise PlanError(f"{path}: is read by this job; choose another name for the result")
    statistics.save(path)
    return path
