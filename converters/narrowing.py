"""The job of `prune --method width`: a checkpoint with fewer MLP channels and attention heads, as many in all layers.

Block by block, each on what the narrower ones before it give: the inputs of down_proj and o_proj are measured, channels and
groups of heads chosen, and the rest of these two matrices made up for what is gone. While the model runs, what is gone is
columns of zeros; what a block's matrices became is kept beside the folder, so that a killed run goes on behind it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from llmcompress.converters.calibration import rows_and_model
from llmcompress.converters.smaller_folder import (
    SmallerReport,
    calibration_options,
    measured_on,
    place_for,
    require_transformers_shapes,
    write_smaller,
)
from llmcompress.converters.widths import Site, Widths, widths_of

from llmcompress import __version__
from llmcompress.calibrate import batch_tokens_of, batches_of, inputs_of
from llmcompress.checkpoint import READABLE, Checkpoint, read_index
from llmcompress.errors import PlanError, RunError
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS
from llmcompress.grids.floats import to_float32
from llmcompress.linear_inputs import InputSums
from llmcompress.methods import width
from llmcompress.progress import Progress
from llmcompress.smaller import Kept, SmallerCheckpoint
from llmcompress.structure_options import StructureOptions
from llmcompress.whole_file import whole_file
from llmcompress.wrapped import WrappedCheckpoint

TOKENS = 2**16  # to measure on, where nothing is asked for
JOB = "job.txt"


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


class _Blocks:
    """The model on its way, and what its blocks became. `rebuilds`: whether weights that stay change."""

    def __init__(
        self, checkpoint: Checkpoint, widths: Widths, left: Mapping[str, int], options: StructureOptions, folder: Path
    ) -> None:  # fmt: skip
        self.checkpoint, self.left, self.options = _PartlyNarrow(checkpoint), left, options
        self.sites = [site for site in widths.sites if site.part in left]
        self.rebuilds = options.measure == "reconstruction"
        self.folder = folder.with_name(f"{folder.name}.blocks")
        self.rows, self.lockstep = rows_and_model(self.checkpoint, calibration_options(options, TOKENS))
        said = (
            __version__,
            checkpoint.fingerprint(),
            self.rows.sha256,
            self.lockstep.precision,
            options.as_dict(),
        )
        self.job = hashlib.sha256(repr(said).encode()).hexdigest()

    @torch.no_grad()
    def run(self, progress: Progress) -> None:
        """Through all blocks. Raises RunError."""
        self._open()
        batches = batches_of(self.rows.rows, self.options.batch_tokens or batch_tokens_of(self.lockstep))
        progress.start("measure", 2 * len(self.lockstep.blocks) * self.rows.tokens, "tokens x blocks")
        self.lockstep.start(batches)
        for block in range(len(self.lockstep.blocks)):
            if not self._file(block).is_file():
                self._choose(block)
            progress.advance(self.rows.tokens)
            if block + 1 < len(self.lockstep.blocks):
                self._set(block)
                with self.lockstep.loaded(block):
                    self.lockstep.through(block)
            progress.advance(self.rows.tokens)
        self.checkpoint.zeros.clear()

    def made(self) -> Checkpoint:
        """What the blocks became: their new matrices, and beside them the groups that stay."""
        index = {}
        for block in range(len(self.lockstep.blocks)):
            index |= read_index(self._file(block))
        return Checkpoint(self.folder, {}, index)

    def kept(self, made: Checkpoint) -> dict[tuple[int, str], np.ndarray]:
        return {
            (site.layer, site.part): np.frombuffer(
                made.read_bytes(_groups_name(site), 0, 8 * self.left[site.part]), np.int64
            )
            for site in self.sites
        }

    def forget(self) -> None:
        shutil.rmtree(self.folder)

    def _open(self) -> None:
        """The folder of this job; what another left there goes."""
        job = self.folder / JOB
        if not job.is_file() or job.read_text() != self.job:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with whole_file(job) as file:
                file.write(self.job.encode())

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:04}.safetensors"

    def _choose(self, block: int) -> None:
        sites = [site for site in self.sites if site.layer == block]
        targets = self.lockstep.weights.targets
        with self.lockstep.loaded(block) as parameters:
            watched = {name: parameters[name] for name in (targets[site.into].parameter for site in sites)}
            found = inputs_of(partial(self.lockstep.visit, block), watched, True)
            data: dict[str, torch.Tensor] = {}
            for site in sites:
                data |= self._chosen(
                    site,
                    parameters[targets[site.into].parameter],
                    found.sums.get(targets[site.into].parameter),
                )
        with whole_file(self._file(block)) as file:
            file.write(safetensors.torch.save(data))

    def _chosen(self, site: Site, weights: torch.Tensor, sums: InputSums | None) -> dict[str, torch.Tensor]:
        """Of one site the groups that stay, and its matrix."""
        if sums is None or int(sums.tokens[0]) < SHRINKAGE_TOKENS:
            raise RunError(
                f"{site.into}: got {int(sums.tokens[0]) if sums else 0} tokens; give more --tokens"
            )
        tensor = self.checkpoint.index[site.into]
        weights = torch.from_numpy(to_float32(self.checkpoint.base.read(site.into), tensor.dtype)).to(
            weights.device
        )
        count = site.groups - self.left[site.part]
        choose = width.kept_by_reconstruction if self.rebuilds else width.kept_by_norm
        kept = choose(weights, sums.products[0], site.group, count)
        inputs = (kept[:, None] * site.group + torch.arange(site.group, device=kept.device)).flatten()
        new = width.reconstructed(weights, sums.products[0], inputs) if self.rebuilds else weights[:, inputs]
        if not torch.isfinite(new).all():
            raise RunError(f"{site.into}: its new weights are not finite; give more --tokens")
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
        return {site.into: new.to(dtype).cpu().contiguous(), _groups_name(site): kept.cpu()}

    def _set(self, block: int) -> None:
        """Let the checkpoint give what the block became, with zeros for what is gone."""
        self.checkpoint.zeros.clear()
        with Checkpoint(self.folder, {}, read_index(self._file(block))) as made:
            for site in self.sites:
                if site.layer == block:
                    tensor = self.checkpoint.index[site.into]
                    size = 8 * self.left[site.part]
                    kept = np.frombuffer(made.read_bytes(_groups_name(site), 0, size), np.int64)
                    whole = np.zeros((tensor.rows, tensor.columns), READABLE[tensor.dtype])
                    whole[:, _spread(kept, site.group)] = made.read(site.into)
                    self.checkpoint.zeros[site.into] = whole


class _PartlyNarrow(WrappedCheckpoint):
    """A checkpoint with the matrices in `zeros`, raw rows as they are read, in the place of its own."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        self.zeros: dict[str, np.ndarray] = {}

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name in self.zeros:
            out[...] = self.zeros[name][first : first + len(out)]
        else:
            super().read_into(name, first, out)

    def fingerprint(self) -> str:
        return self.base.fingerprint()


def _groups_name(site: Site) -> str:
    return f"groups.{site.layer}.{site.part}"
