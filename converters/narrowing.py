"""The job of `prune --method width`: a checkpoint with fewer MLP channels and attention heads, as many in all layers.

Block by block, each on what the narrower ones before it give: the inputs of down_proj and o_proj are measured, channels and
groups of heads chosen, and the rest of these two matrices made up for what is gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llmcompress.converters.rebuilding import Rebuilding, require_tokens
from llmcompress.converters.smaller_folder import (
    SmallerReport,
    measured_on,
    place_for,
    require_transformers_shapes,
    write_smaller,
)
from llmcompress.converters.widths import Site, Widths, widths_of

from llmcompress.calibrate import inputs_of
from llmcompress.checkpoint import READABLE, Checkpoint
from llmcompress.errors import PlanError
from llmcompress.methods import width
from llmcompress.progress import Progress
from llmcompress.smaller import Kept, SmallerCheckpoint
from llmcompress.structure_options import StructureOptions

TOKENS = 2**16  # to measure on, where nothing is asked for


def narrow(
    model: str | Path, out: str | Path, options: StructureOptions, progress: Progress = Progress()
) -> SmallerReport:
    """Write a narrower `model` to the folder `out`; killed, the same call goes on. Raises LlmcompressError."""
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    folder = place_for(out, checkpoint)
    widths = widths_of(checkpoint, options.parts)
    left = {part: widths.kept(part, options.ratio) for part in options.parts}
    whole = {site.part: site.groups for site in widths.sites}
    left = {part: count for part, count in left.items() if count < whole[part]}
    if not left:
        raise PlanError(f"--ratio {options.ratio:g}: takes nothing of {_counts(whole)}; give more")
    _check(checkpoint, widths, left)
    blocks = _Blocks(checkpoint, widths, left, options, folder)
    blocks.run(progress)
    with blocks.made() as made:
        smaller = _smaller(checkpoint, widths, left, blocks.kept(made), made if blocks.rebuilds else None)
        went = {"kept": left, "of": {part: whole[part] for part in left}}
        notes = (*checkpoint.notes, *blocks.rows.notes, *_unchanged(options, left))
        report = write_smaller(
            smaller, folder, options, went, notes, measured_on(blocks.rows), progress, started
        )
    blocks.forget()
    return report


def _unchanged(options: StructureOptions, left: Mapping[str, int]) -> list[str]:
    return [
        f"{part}: too few groups for --ratio {options.ratio:g} to take one; it keeps its width"
        for part in options.parts
        if part not in left
    ]


def _counts(groups: Mapping[str, int]) -> str:
    names = {"ffn": "channels", "attention": "key-value heads"}
    return " and ".join(f"{count} {names[part]}" for part, count in groups.items())


def _smaller(
    checkpoint: Checkpoint, widths: Widths, left: Mapping[str, int], kept: Mapping[tuple[int, str], np.ndarray],
    made: Checkpoint | None = None,
) -> SmallerCheckpoint:  # fmt: skip
    """The view in which of every site the groups `kept` stay, int64 rising, by layer and part."""
    tensors = {name: Kept(name) for name in checkpoint.index}
    for site in widths.sites:
        if site.part in left:
            groups = kept[site.layer, site.part]
            columns = len(checkpoint.index[site.into].shape) - 1
            tensors[site.into] = Kept(site.into, ((columns, _spread(groups, site.group)),))
            for name, height in site.rows.items():
                tensors[name] = Kept(name, ((0, _spread(groups, height)),))
    return SmallerCheckpoint(checkpoint, tensors, widths.smaller_config(checkpoint.config, left), made)


def _spread(groups: np.ndarray, size: int) -> np.ndarray:
    return (groups[:, None] * size + np.arange(size)).ravel()


def _check(checkpoint: Checkpoint, widths: Widths, left: Mapping[str, int]) -> None:
    """Raise PlanError unless llama.cpp and transformers take a model of these widths."""
    first = {(site.layer, site.part): np.arange(left.get(site.part, site.groups)) for site in widths.sites}
    smaller = _smaller(checkpoint, widths, left, first)
    try:
        widths.architecture.check_config(widths.architecture.config(smaller.config))
    except PlanError as error:
        remedy = "; give --parts ffn" if "attention" in left and "ffn" in left else ""
        raise PlanError(f"the narrower model could not become a GGUF: {error}{remedy}") from None
    require_transformers_shapes(smaller)


class _Blocks(Rebuilding):
    """The blocks and what of them stays. `rebuilds`: whether weights that stay change."""

    def __init__(
        self, checkpoint: Checkpoint, widths: Widths, left: Mapping[str, int], options: StructureOptions, folder: Path
    ) -> None:  # fmt: skip
        super().__init__(checkpoint, options, folder, TOKENS)
        self.left = left
        self.sites = [site for site in widths.sites if site.part in left]
        self.rebuilds = options.measure == "reconstruction"

    def kept(self, made: Checkpoint) -> dict[tuple[int, str], np.ndarray]:
        return {(site.layer, site.part): self._groups(site, made) for site in self.sites}

    def _groups(self, site: Site, made: Checkpoint) -> np.ndarray:
        return np.frombuffer(made.read_bytes(_groups_name(site), 0, 8 * self.left[site.part]), np.int64)

    def _choose(self, block: int) -> dict[str, torch.Tensor]:
        sites = [site for site in self.sites if site.layer == block]
        targets = self.lockstep.weights.targets
        names = {site.into: targets[site.into].parameter for site in sites}
        with self.lockstep.loaded(block) as parameters:
            watched = {name: parameters[name] for name in names.values()}
            found = inputs_of(partial(self.lockstep.visit, block), watched, True).sums
            data: dict[str, torch.Tensor] = {}
            for site in sites:
                data |= self._chosen(site, require_tokens(site.into, found.get(names[site.into])))
        return data

    def _chosen(self, site: Site, products: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of one site the groups that stay, and its matrix."""
        weights = self.read(site.into)
        count = site.groups - self.left[site.part]
        choose = width.kept_by_reconstruction if self.rebuilds else width.kept_by_norm
        kept = choose(weights, products, site.group, count)
        inputs = (kept[:, None] * site.group + torch.arange(site.group, device=kept.device)).flatten()
        new = width.reconstructed(weights, products, inputs) if self.rebuilds else weights[:, inputs]
        return {site.into: self.stored(site.into, new), _groups_name(site): kept.cpu()}

    def _run_on(self, block: int, made: Checkpoint) -> dict[str, np.ndarray]:
        """Zeros for what is gone."""
        found = {}
        for site in self.sites:
            if site.layer == block:
                tensor = self.checkpoint.index[site.into]
                whole = np.zeros((tensor.rows, tensor.columns), READABLE[tensor.dtype])
                whole[:, _spread(self._groups(site, made), site.group)] = made.read(site.into)
                found[site.into] = whole
        return found


def _groups_name(site: Site) -> str:
    return f"groups.{site.layer}.{site.part}"
