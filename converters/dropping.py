"""The job of `prune --method layers`: a checkpoint without the decoder layers that it misses least."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from llmcompress.token_rows import TokenRows
from llmcompress.whole_file import whole_file

TOKENS = 2**14  # to measure on, where nothing is asked for
MORE = (4, 8)  # times as many tokens for layers between which these do not tell
LOGITS_BYTES = 2**27  # of a batch; those of two models are there at once


def drop_layers(model: str | Path, out: str | Path, options: StructureOptions, progress: Progress = Progress()) -> SmallerReport:  # fmt: skip
    """Write `model` without some layers to the folder `out`; killed, the same call goes on. Raises LlmcompressError."""
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    folder = place_for(out, checkpoint)
    count = layer_count(checkpoint)
    rows, figures, dropped, tied = None, {}, list(options.layers), ()
    if dropped:
        without(checkpoint, dropped)  # refuses what cannot be left out
    else:
        if options.drop >= count:
            raise PlanError(f"--drop {options.drop}: the model has {count} layers, one has to stay")
        search = _Search(checkpoint, options, folder, progress)
        dropped, figures, rows = search.run(), {"figures": search.figures}, search.rows
        tied = search.notes
    smaller = without(checkpoint, dropped)
    went = {"layers_dropped": dropped, "layers": count - len(dropped), "layers_before": count, **figures}
    notes = (*checkpoint.notes, *(rows.notes if rows else ()), *tied)
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
        search = _Search(checkpoint, options, out, progress)
        dropped = search.run()
    for note in search.notes:
        progress.say(note)
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

    figures: of each round the layer that went and the figure of every layer that was there, by its number in the model; of
    layers between which the text did not tell, those on more of it, as often as that was asked.
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
        self._whole: list[torch.Tensor] | None = None  # the whole model's last hidden states for the rows

    def run(self) -> list[int]:
        """The layers that go, in their order in the model."""
        if self.options.measure == "influence":
            model = self._model(self.checkpoint)
            found = layers.influence(model, self._batches(model, self.rows), self.progress)
            while len(self.figures) < self.options.drop:
                self._take({layer: found[layer] for layer in self._left()})
            return self.dropped
        while len(self.figures) < self.options.drop:
            self._take(*self._round())
            self._keep()
        return self.dropped

    @property
    def dropped(self) -> list[int]:
        return sorted(round["layer"] for round in self.figures)

    @property
    def notes(self) -> list[str]:
        """What the text did not tell."""
        return [
            f"layer {round['layer']} went, and not {' or '.join(map(str, tie['layers']))}, by a lead of {tie['lead']:.4f} nats with a "
            f"standard error of {tie['error']:.4f} on {tie['tokens']} tokens: more --tokens may choose another"
            for round in self.figures
            if (tie := round.get("tied"))
        ]  # fmt: skip

    def _round(self) -> tuple[dict[int, float], list[dict[str, Any]], dict[str, Any] | None]:
        """What is lost without each layer that is left; of those that tie, more exactly; and what still ties."""
        found, rows = self._losses(self._left(), self.rows), self.rows
        figures = {layer: float(by_row.mean()) for layer, by_row in found.items()}
        closer: list[dict[str, Any]] = []
        for times in MORE:
            if len(close := layers.tied(found)) == 1:
                break
            more = rows_of(self.checkpoint, replace(self.calibration, tokens=times * self.calibration.tokens))
            if more.tokens <= rows.tokens:
                break  # that is all the text there is
            rows, found = more, self._losses(sorted(close), more)
            closer.append({
                "tokens": rows.tokens, "sha256": rows.sha256,
                self.options.measure: {layer: float(by_row.mean()) for layer, by_row in found.items()},
            })  # fmt: skip
        best, *close = layers.tied(found)
        tie = None
        if close:
            nearest = min(close, key=lambda layer: found[layer].mean())
            lead = layers.difference(found[nearest], found[best])
            tie = {"layers": close, "lead": lead.value, "error": lead.error or 0.0, "tokens": rows.tokens}
        return figures, closer, tie

    def _losses(self, candidates: Sequence[int], rows: TokenRows) -> dict[int, np.ndarray]:
        """By row of tokens, what is lost without the layers that went and each of `candidates`."""
        by, progress, left = self.options.measure, self.progress, self._left()
        model = self._model(without(self.checkpoint, self.dropped) if self.dropped else self.checkpoint)
        batches = self._batches(model, rows)
        whole = self._whole if rows is self.rows else None
        if self.dropped and whole is None:
            whole = layers.losses(self._model(self.checkpoint), batches, (), None, progress, by)[1]
        places = [left.index(layer) for layer in candidates]
        found, whole = layers.losses(model, batches, places, whole, progress, by)
        if rows is self.rows:
            self._whole = whole
        return dict(zip(candidates, found))

    def _batches(self, model: Lockstep, rows: TokenRows) -> list[torch.Tensor]:
        require_fit(model.model, rows.rows)
        return batches_of(rows.rows, min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary(model))))

    def _left(self) -> list[int]:
        return [layer for layer in range(layer_count(self.checkpoint)) if layer not in self.dropped]

    def _take(
        self, figures: dict[int, float], closer: Sequence[dict[str, Any]] = (), tie: dict[str, Any] | None = None
    ) -> None:  # fmt: skip
        """Choose the layer of the least figure, the last that was measured, among those that config.json lets go."""
        refused, last = None, closer[-1][self.options.measure] if closer else {}
        for layer in sorted(figures, key=lambda layer: (layer not in last, last.get(layer, figures[layer]))):
            try:
                without(self.checkpoint, sorted([*self.dropped, layer])).close()
            except PlanError as error:
                refused = refused or error
                continue
            said = {"closer": list(closer), "tied": tie}
            self.figures.append(
                {"layer": layer, self.options.measure: figures}
                | {name: value for name, value in said.items() if value}
            )
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
        by = self.options.measure
        return [
            round | {by: {int(layer): figure for layer, figure in round[by].items()}}
            for round in held["rounds"]
        ]

    def _keep(self) -> None:
        with whole_file(self.state) as file:
            file.write(json.dumps({"job": self.fingerprint, "rounds": self.figures}).encode())


def state_file(folder: Path) -> Path:
    """Where a search keeps what it has found."""
    return folder.with_name(f"{folder.name}.search.json")
