"""The job of `prune --method layers`: a checkpoint without the decoder layers that it misses least."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from llmcompress.converters.calibration import rows_of
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture
from llmcompress.converters.layer_config import COUNTS, check_same_layers, number_in, without_layers
from llmcompress.converters.model import lockstep_of, require_fit
from llmcompress.converters.smaller_folder import (
    SmallerReport,
    calibration_options,
    measured_on,
    place_for,
    write_smaller,
)

from llmcompress import __version__
from llmcompress.block_weights import empty_model
from llmcompress.blocks import Lockstep
from llmcompress.calibrate import BATCH_TOKENS, batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.evaluate import vocabulary
from llmcompress.json_object import read_object
from llmcompress.methods import layers
from llmcompress.progress import Progress
from llmcompress.smaller import Kept, SmallerCheckpoint
from llmcompress.structure_options import StructureOptions
from llmcompress.whole_file import whole_file

TOKENS = 2**14  # to measure on, where nothing is asked for
LOGITS_BYTES = 2**27  # of a batch; those of two models are there at once


def drop_layers(model: str | Path, out: str | Path, options: StructureOptions, progress: Progress = Progress()) -> SmallerReport:  # fmt: skip
    """Write `model` without some layers to the folder `out`; killed, the same call goes on. Raises LlmcompressError."""
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    folder = place_for(out, checkpoint)
    count = layer_count(checkpoint)
    rows, figures, dropped = None, {}, list(options.layers)
    if dropped:
        without(checkpoint, dropped)  # refuses what cannot be left out
    else:
        if options.drop >= count:
            raise PlanError(f"--drop {options.drop}: the model has {count} layers, one has to stay")
        search = _Search(checkpoint, options, folder, progress)
        dropped, figures, rows = search.run(), {"figures": search.figures}, search.rows
    smaller = without(checkpoint, dropped)
    went = {"layers_dropped": dropped, "layers": count - len(dropped), "layers_before": count, **figures}
    notes = (*checkpoint.notes, *(rows.notes if rows else ()))
    report = write_smaller(smaller, folder, options, went, notes, measured_on(rows), progress, started)
    state_file(folder).unlink(missing_ok=True)
    return report


def choose_layers(model: str | Path, options: StructureOptions, out: Path, progress: Progress = Progress()) -> list[int]:  # fmt: skip
    """The layers that `options` would let go of `model`, for a file `out` of it. Raises LlmcompressError."""
    with Checkpoint.open(model) as checkpoint:
        checkpoint.require_plain()
        if options.drop >= layer_count(checkpoint):
            raise PlanError(
                f"--drop {options.drop}: the model has {layer_count(checkpoint)} layers, one has to stay"
            )
        dropped = _Search(checkpoint, options, out, progress).run()
    state_file(out).unlink(missing_ok=True)
    return dropped


def without(checkpoint: Checkpoint, dropped: Sequence[int]) -> SmallerCheckpoint:
    """The checkpoint without some layers, the others renumbered. Raises PlanError where they cannot be left out."""
    architecture = find_architecture(Config(checkpoint.config))
    count = layer_count(checkpoint)
    if bad := [layer for layer in dropped if layer >= count]:
        raise PlanError(f"--layers {bad[0]}: the model has {count} layers, 0 to {count - 1}")
    if len(dropped) >= count:
        raise PlanError(f"--layers: names all {count} layers, one has to stay")
    said = transformers.AutoConfig.from_pretrained(checkpoint.directory).get_text_config().to_dict()
    config = without_layers(architecture, checkpoint.config, said, dropped)
    kept = {}
    for name in checkpoint.index:
        place = number_in(architecture, name)
        if place is None:
            kept[name] = Kept(name)
        elif place[0] not in dropped:
            layer, first, last = place
            new = layer - sum(other < layer for other in dropped)
            kept[f"{name[:first]}{new}{name[last:]}"] = Kept(name)
    smaller = SmallerCheckpoint(checkpoint, kept, config)
    models = [empty_model(of.directory, torch.float32, torch.device("cpu")) for of in (checkpoint, smaller)]
    check_same_layers(*models, [layer for layer in range(count) if layer not in dropped])
    return smaller


def layer_count(checkpoint: Checkpoint) -> int:
    config = find_architecture(Config(checkpoint.config)).config(checkpoint.config)
    return config.need(*COUNTS)


class _Search:
    """The choice of the layers that go. What a round has found is kept beside the folder until that is written.

    figures: of each round the layer that went and the figure of every layer that was there, by its number in the model.
    """

    def __init__(
        self, checkpoint: Checkpoint, options: StructureOptions, folder: Path, progress: Progress
    ) -> None:
        self.checkpoint, self.options, self.progress = checkpoint, options, progress
        self.calibration = calibration_options(options, TOKENS)
        self.rows = rows_of(checkpoint, self.calibration)
        self.state = state_file(folder)
        said = (__version__, checkpoint.fingerprint(), self.rows.sha256, options.as_dict())
        self.fingerprint = hashlib.sha256(repr(said).encode()).hexdigest()
        self.figures: list[dict[str, Any]] = self._known()

    def run(self) -> list[int]:
        """The layers that go, in their order in the model."""
        model = self._model(self.checkpoint)
        require_fit(model.model, self.rows.rows)
        batches = batches_of(self.rows.rows, min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary(model))))
        if self.options.measure == "influence":
            found = layers.influence(model, batches, self.progress)
            while len(self.figures) < self.options.drop:
                self._take({layer: found[layer] for layer in self._left()})
            return self.dropped
        by, progress = self.options.measure, self.progress
        whole = layers.losses(model, batches, (), None, progress, by)[1] if self.dropped else None
        while len(self.figures) < self.options.drop:
            if self.dropped:
                model = self._model(without(self.checkpoint, self.dropped))
            left = self._left()
            found, whole = layers.losses(model, batches, range(len(left)), whole, progress, by)
            self._take(dict(zip(left, found)))
            self._keep()
        return self.dropped

    @property
    def dropped(self) -> list[int]:
        return sorted(round["layer"] for round in self.figures)

    def _left(self) -> list[int]:
        return [layer for layer in range(layer_count(self.checkpoint)) if layer not in self.dropped]

    def _take(self, figures: dict[int, float]) -> None:
        """Choose the layer of the least figure, among those that config.json lets go."""
        refused = None
        for layer in sorted(figures, key=figures.get):
            try:
                without(self.checkpoint, sorted([*self.dropped, layer])).close()
            except PlanError as error:
                refused = refused or error
                continue
            self.figures.append({"layer": layer, self.options.measure: figures})
            return
        raise refused

    def _model(self, checkpoint: Checkpoint) -> Lockstep:
        return lockstep_of(checkpoint, self.options.dtype, self.options.device, self.options.hidden_ram)

    def _known(self) -> list[dict[str, Any]]:
        """The rounds that an earlier run of the same job has finished."""
        if not self.state.is_file():
            return []
        held = read_object(self.state)
        if held.get("job") != self.fingerprint:
            return []
        return [
            {
                "layer": round["layer"],
                self.options.measure: {
                    int(layer): figure for layer, figure in round[self.options.measure].items()
                },
            }
            for round in held["rounds"]
        ]

    def _keep(self) -> None:
        with whole_file(self.state) as file:
            file.write(json.dumps({"job": self.fingerprint, "rounds": self.figures}).encode())


def state_file(folder: Path) -> Path:
    """Where a search keeps what it has found."""
    return folder.with_name(f"{folder.name}.search.json")
