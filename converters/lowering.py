"""The job of `prune --method svd` where the architecture has low-rank pairs of its own: a checkpoint of lower ranks.

Block by block, each on what the smaller ones before it give: the inputs of a pair's second matrix are measured, the new latents
chosen (methods/latent.py), what the norm makes of them measured in a second run of the block, and the second matrix
refitted to that. All other linears stay: no architecture has factors in their place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture
from llmcompress.converters.layer_config import number_in
from llmcompress.converters.ranks import Pair, pairs_of
from llmcompress.converters.rebuilding import Rebuilding, require_tokens
from llmcompress.converters.smaller_folder import (
    SmallerReport,
    measured_on,
    place_for,
    require_transformers_shapes,
    write_smaller,
)
from llmcompress.converters.widths import rounded_width

from llmcompress.calibrate import inputs_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.grids.floats import to_float32
from llmcompress.methods import latent
from llmcompress.progress import Progress
from llmcompress.smaller import Kept, SmallerCheckpoint
from llmcompress.structure_options import StructureOptions

TOKENS = 2**16  # to measure on, where nothing is asked for
ALONE = "all linears but the pairs with a rank in config.json stay as they are: nothing runs factors in their place"


def lower_ranks(
    model: str | Path, out: str | Path, options: StructureOptions, progress: Progress = Progress()
) -> SmallerReport:
    """Write `model` with smaller latents to the folder `out`; killed, the same call goes on. Raises LlmcompressError."""
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    folder = place_for(out, checkpoint)
    pairs = pairs_of(checkpoint)
    if not pairs:
        raise PlanError(f"{checkpoint.directory}: its architecture has no low-rank pairs")
    whole = {pair.size: pair.rank for pair in pairs}
    left = {
        size: min(rank, options.rank) if options.rank else rounded_width(rank, options.ratio)
        for size, rank in whole.items()
    }
    left = {size: rank for size, rank in left.items() if rank < whole[size]}
    if not left:
        raise PlanError(f"config.json: {_named(whole)}; none would become less, ask for less")
    pairs = [pair for pair in pairs if pair.size in left]
    require_transformers_shapes(_smaller(checkpoint, pairs, left))
    blocks = _Blocks(checkpoint, pairs, left, options, folder)
    blocks.run(progress)
    with blocks.made() as made:
        smaller = _smaller(checkpoint, pairs, left, made)
        notes = (*checkpoint.notes, *blocks.rows.notes, ALONE, *_left_out(smaller))
        went = {"ranks": left, "ranks_before": {size: whole[size] for size in left}}
        report = write_smaller(
            smaller, folder, options, went, notes, measured_on(blocks.rows), progress, started
        )
    blocks.forget()
    return report


def _named(ranks: Mapping[str, int]) -> str:
    return ", ".join(f"{size} is {rank}" for size, rank in ranks.items())


def _smaller(
    checkpoint: Checkpoint, pairs: Sequence[Pair], left: Mapping[str, int], made: Checkpoint | None = None
) -> SmallerCheckpoint:
    """The view with other latents. Layers that predict further tokens are left out: they would keep theirs."""
    architecture = find_architecture(Config(checkpoint.config))
    config = architecture.config(checkpoint.config)
    layers = config.need("num_hidden_layers")
    places = {name: number_in(architecture, name) for name in checkpoint.index}
    tensors = {name: Kept(name) for name, place in places.items() if not place or place[0] < layers}
    for pair in pairs:
        rank, rows = left[pair.size], checkpoint.index[pair.first].shape[0]
        tensors[pair.first] = Kept(pair.first, ((0, np.arange(rows - pair.rank + rank)),))
        tensors[pair.second] = Kept(pair.second, ((1, np.arange(rank)),))
        tensors[pair.norm] = Kept(pair.norm, ((0, np.arange(rank)),))
    changes = dict(left) | ({"num_nextn_predict_layers": 0} if config.mtp_layers else {})
    values = architecture.with_text_values(checkpoint.config, changes)
    return SmallerCheckpoint(checkpoint, tensors, values, made)


def _left_out(smaller: SmallerCheckpoint) -> list[str]:
    gone = len(smaller.base.index) - len(smaller.index)
    return [f"{gone} tensors of layers that predict further tokens are left out"] if gone else []


class _Blocks(Rebuilding):
    def __init__(
        self, checkpoint: Checkpoint, pairs: Sequence[Pair], left: Mapping[str, int], options: StructureOptions,
        folder: Path,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint, options, folder, TOKENS)
        self.pairs, self.left = pairs, left

    def _choose(self, block: int) -> dict[str, torch.Tensor]:
        pairs = [pair for pair in self.pairs if pair.layer == block]
        targets = self.lockstep.weights.targets
        names = {pair: targets[pair.second].parameter for pair in pairs}
        chosen, seen_as, data = {}, {}, {}
        with self.lockstep.loaded(block) as parameters:
            watched = {name: parameters[name] for name in names.values()}
            run = partial(self.lockstep.visit, block)
            found = inputs_of(run, watched, True).sums
            for pair, name in names.items():
                gain = self.read(pair.norm)[0]
                products = require_tokens(pair.second, found.get(name))
                weights = self.read(pair.second)
                chosen[pair] = latent.projection(weights, gain, products, self.left[pair.size])
                seen_as[name] = partial(_with_new, gain, chosen[pair][0])
            found = inputs_of(run, watched, True, seen_as=seen_as).sums
            for pair, name in names.items():
                data |= self._made(pair, *chosen[pair], found[name].products[0])
        return data

    def _made(
        self, pair: Pair, projection: torch.Tensor, guess: torch.Tensor, products: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        first = self.read(pair.first)
        new = {
            pair.first: torch.cat([projection @ first[: pair.rank], first[pair.rank :]]),
            pair.second: latent.refitted(self.read(pair.second), products, guess),
            pair.norm: torch.ones(len(projection)),
        }
        return {name: self.stored(name, values) for name, values in new.items()}

    def _run_on(self, block: int, made: Checkpoint) -> dict[str, np.ndarray]:
        """Latents with zeros behind them. A norm makes them the longer for that, and the second matrix them shorter."""
        found = {}
        for pair in self.pairs:
            if pair.layer == block:
                rank, gone = self.left[pair.size], pair.rank - self.left[pair.size]
                first, second = made.read(pair.first), made.read(pair.second)
                found[pair.first] = np.insert(first, [rank] * gone, 0, axis=0)
                dtype = self.checkpoint.index[pair.second].dtype
                shorter = torch.from_numpy(to_float32(second, dtype)) * math.sqrt(rank / pair.rank)
                second = self.raw(pair.second, shorter)
                found[pair.norm] = np.pad(made.read(pair.norm), ((0, 0), (0, gone)))
                found[pair.second] = np.pad(second, ((0, 0), (0, gone)))
        return found


def _with_new(gain: torch.Tensor, projection: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The inputs of a second matrix with the new ones behind them."""
    return torch.cat([inputs.float(), latent.projected(inputs, gain, projection)], -1)
