"""The job of `prune --method experts`: a checkpoint with fewer experts, as many in every layer that has some.

The rows of the router go with them, and so do its biases. Experts may be tensors of their own, which are renumbered, or one stacked
tensor.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.calibration import rows_and_model
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps
from llmcompress.converters.smaller_folder import (
    SmallerReport,
    calibration_options,
    measured_on,
    place_for,
    require_transformers_shapes,
    write_smaller,
)

from llmcompress.blocks import Lockstep
from llmcompress.calibrate import batch_tokens_of, batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RunError
from llmcompress.methods.experts import ExpertOutputs, scores
from llmcompress.progress import Progress
from llmcompress.smaller import Kept, SmallerCheckpoint
from llmcompress.step import Step
from llmcompress.structure_options import StructureOptions

TOKENS = 2**16  # to measure on, where nothing is asked for
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Mixture:
    """The experts of a model. layers: of each layer that has some its tensors, and what of them is the experts': the
    axis, or where a tensor is one expert's, its number and where in the name that stands. down: of each layer a tensor of the
    matrices that give the experts' outputs."""

    architecture: Architecture
    experts: int
    used: int
    layers: Mapping[int, Mapping[str, int | tuple[int, int, int]]]
    down: Mapping[int, str]

    def smaller_config(self, values: Mapping[str, Any], left: int) -> dict[str, Any]:
        said = self.architecture.text_values(values)
        changes = {}
        for names, value in ((COUNTS, left), (USED, min(self.used, left))):
            for name in _named(self.architecture, said, names):
                changes[name] = [value] * len(said[name]) if isinstance(said.get(name), list) else value
        return self.architecture.with_text_values(values, changes)


def drop_experts(
    model: str | Path, out: str | Path, options: StructureOptions, progress: Progress = Progress()
) -> SmallerReport:
    """Write `model` with fewer experts to the folder `out`; killed, the same call goes on. Raises LlmcompressError."""
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    folder = place_for(out, checkpoint)
    mixture = mixture_of(checkpoint)
    count = options.drop or round(options.ratio * mixture.experts)
    if not 0 < count < mixture.experts:
        raise PlanError(
            f"{count} experts of {mixture.experts} would go; one at least has to go, and one to stay"
        )
    require_transformers_shapes(
        _smaller(checkpoint, mixture, dict.fromkeys(mixture.layers, np.arange(mixture.experts - count)))
    )
    rows, lockstep = rows_and_model(checkpoint, calibration_options(options, TOKENS))
    batches = batches_of(rows.rows, options.batch_tokens or batch_tokens_of(lockstep))
    found = _measured(lockstep, mixture, batches, options.measure, progress)
    kept = {layer: np.sort(np.argsort(of, kind="stable")[count:]) for layer, of in found.items()}
    went = {
        "experts": mixture.experts - count, "experts_before": mixture.experts,
        "experts_dropped": {layer: sorted(set(range(mixture.experts)) - set(of.tolist())) for layer, of in kept.items()},
        "figures": {layer: of.tolist() for layer, of in found.items()},
    }  # fmt: skip
    notes = (*checkpoint.notes, *rows.notes)
    if mixture.used > mixture.experts - count:
        notes += (
            f"a token used {mixture.used} experts, it uses all {mixture.experts - count} that are left",
        )
    return write_smaller(
        _smaller(checkpoint, mixture, kept),
        folder,
        options,
        went,
        notes,
        measured_on(rows),
        progress,
        started,
    )


def mixture_of(checkpoint: Checkpoint) -> Mixture:
    """Raises PlanError for a model without experts, and for those whose experts cannot be counted anew."""
    architecture = find_architecture(Config(checkpoint.config))
    config = architecture.config(checkpoint.config)
    said = architecture.text_values(checkpoint.config)
    counts, used = (
        {_only(config, name) for name in _named(architecture, said, names)} for names in (COUNTS, USED)
    )
    if not counts:
        raise PlanError(f"config.json: none of {', '.join(COUNTS)}; the model has no experts")
    if len(counts) > 1 or len(used) > 1:
        raise PlanError(
            f"config.json: experts are counted as {counts}, those of a token as {used}; which is right?"
        )
    if config.get("n_group", default=1) > 1:
        raise PlanError(
            f"config.json: the router chooses among {config.get('n_group')} groups of experts; they cannot be thinned yet"
        )
    if config.mtp_layers:
        raise PlanError(
            f"config.json: {config.mtp_layers} layers predict further tokens; they would keep their experts"
        )
    (experts,) = counts
    layers: dict[int, dict[str, int | tuple[int, int, int]]] = defaultdict(dict)
    down = {}
    for step in weight_steps(checkpoint):
        place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias|scale)", step.name)
        if place and place[2].endswith("_exps"):
            layers[int(place[1])] |= _of_experts(step, experts)
            if place[2] == "ffn_down_exps" and place[3] == "weight":
                down[int(place[1])] = step.pieces[0].tensor.name
        elif place and place[2] in ("ffn_gate_inp", "exp_probs_b") and place[3] != "scale":
            tensor = step.pieces[0].tensor
            if experts not in tensor.shape:
                raise PlanError(f"{tensor.name}: {tensor.shape} has no axis of {experts} experts")
            layers[int(place[1])][tensor.name] = tensor.shape.index(experts)
    return Mixture(architecture, experts, *(used or {experts}), dict(layers), down)


def _named(architecture: Architecture, said: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The names under which config.json has a value, or where it has none, transformers' default."""
    return [name for name in names if said.get(name) is not None] or [
        name for name in names if architecture.defaults.get(name) is not None
    ]


def _only(config: Config, name: str) -> int | None:
    """A count, or that of all layers where they have one each. Raises PlanError where they differ."""
    value = config.get(name)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise PlanError(
                f"config.json: {name} differs from layer to layer; experts of such a model cannot go yet"
            )
        value = value[0]
    if value is not None and (type(value) is not int or value < 1):
        raise PlanError(f"config.json: {name} is {value!r}, it must be a whole number above zero")
    return value


def _of_experts(step: Step, experts: int) -> dict[str, int | tuple[int, int, int]]:
    """Which axis of a stacked tensor is the experts'; or the number in the name of each expert's own."""
    tensors = list(dict.fromkeys(piece.tensor for piece in step.pieces))
    if len(tensors) == 1:
        if tensors[0].shape[0] != experts:
            raise PlanError(f"{tensors[0].name}: {tensors[0].shape} has no first axis of {experts} experts")
        return {tensors[0].name: 0}
    if len(tensors) != experts:
        raise PlanError(
            f"{step.name}: is made of {len(tensors)} tensors, config.json counts {experts} experts"
        )
    found: dict[str, int | tuple[int, int, int]] = {}
    for expert, tensor in enumerate(tensors):
        *_, number = re.finditer(rf"(?<=\.){expert}(?=\.)", tensor.name)
        found[tensor.name] = expert, number.start(), number.end()
    return found


def _smaller(checkpoint: Checkpoint, mixture: Mixture, kept: Mapping[int, np.ndarray]) -> SmallerCheckpoint:
    """The view in which of every layer the experts `kept` stay, int64 rising."""
    places = {
        name: (layer, place) for layer, names in mixture.layers.items() for name, place in names.items()
    }
    tensors = {}
    for name in checkpoint.index:
        layer, place = places.get(name, (None, None))
        if place is None:
            tensors[name] = Kept(name)
        elif isinstance(place, int):
            tensors[name] = Kept(name, ((place, kept[layer]),))
        elif place[0] in kept[layer]:
            expert, first, last = place
            new = int(np.searchsorted(kept[layer], expert))
            tensors[f"{name[:first]}{new}{name[last:]}"] = Kept(name)
    left = len(next(iter(kept.values())))
    return SmallerCheckpoint(checkpoint, tensors, mixture.smaller_config(checkpoint.config, left))


@torch.no_grad()
def _measured(
    lockstep: Lockstep, mixture: Mixture, batches: Sequence[torch.Tensor], measure: str, progress: Progress
) -> dict[int, np.ndarray]:
    """The figure of every expert, by layer. Raises RunError where it cannot be had."""
    targets, found = lockstep.weights.targets, {}
    of_block = {targets[name].parameter: layer for layer, name in mixture.down.items()}
    progress.start(
        "measure", sum(batch.numel() for batch in batches) * len(lockstep.blocks), "tokens x blocks"
    )
    lockstep.start(batches)
    for block in range(len(lockstep.blocks)):
        with lockstep.loaded(block) as parameters:
            watched = {name: parameters[name] for name in of_block.keys() & parameters.keys()}
            total, watches = ExpertOutputs({}), {}

            def watch(batch: int, watched=watched, watches=watches) -> ExpertOutputs:
                watches[batch] = ExpertOutputs(watched, batch)
                return watches[batch]

            def seen(batch: int, _: torch.Tensor, total=total, watches=watches) -> None:
                total.merge(watches.pop(batch))
                progress.advance(batches[batch].numel())

            lockstep.through(block, seen, watch)
            for name in watched:
                figures = scores(total, name, measure)
                if figures is None:
                    raise RunError(
                        f"{name}: what its experts give cannot be told apart in this model; give --by use"
                    )
                found[of_block[name]] = figures.numpy()
    if missing := mixture.layers.keys() - found.keys():
        raise RunError(f"layer {min(missing)}: its experts were not run; which are of use is not known")
    return dict(sorted(found.items()))
