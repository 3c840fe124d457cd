"""Writing a smaller checkpoint: an ordinary folder of safetensors, and prune.json, which says what went and why."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompress.converters.calibration import CalibrationOptions
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps

from llmcompress import __version__
from llmcompress.block_weights import PartWeights, empty_model
from llmcompress.checkpoint import Checkpoint
from llmcompress.checkpoint_output import SHARD_BYTES, CheckpointOutput, check_room, copies, write_checkpoint
from llmcompress.errors import PlanError
from llmcompress.machine import cores
from llmcompress.output import filled_path
from llmcompress.progress import Progress
from llmcompress.safetensors_files import Entry, lay_out
from llmcompress.smaller import SmallerCheckpoint
from llmcompress.structure_options import StructureOptions
from llmcompress.token_rows import TokenRows
from llmcompress.whole_file import require_free_place

MANIFEST = "prune.json"


@dataclass(frozen=True)
class SmallerReport:
    """A finished job. weights: of the model, before and after. went: what did, and the figures it was chosen by."""

    path: Path
    options: StructureOptions
    weights: tuple[int, int]
    went: Mapping[str, Any]
    notes: tuple[str, ...]
    tokens: Mapping[str, Any] | None
    seconds: float

    @property
    def share(self) -> float:
        """Of the model's weights that went."""
        return 1 - self.weights[1] / self.weights[0]

    def as_dict(self) -> dict[str, Any]:
        """What prune.json holds."""
        return {
            "version": __version__, **self.options.as_dict(), **self.went,
            "weights": self.weights[1], "weights_before": self.weights[0], "share_gone": self.share,
            "tokens_seen": self.tokens, "notes": self.notes,
        }  # fmt: skip


def place_for(out: str | Path, checkpoint: Checkpoint) -> Path:
    """The folder to make. Raises LlmcompressError where it is there already."""
    folder = filled_path(out, checkpoint.name, "pruned")
    require_free_place(folder)
    return folder


def calibration_options(options: StructureOptions, tokens: int) -> CalibrationOptions:
    """What importance is measured on, and how; `tokens` where nothing is asked for."""
    same = ("data", "chunk", "seed", "device", "dtype", "hidden_ram", "batch_tokens")
    return CalibrationOptions(
        **{name: getattr(options, name) for name in same}, tokens=options.tokens or tokens
    )


def measured_on(rows: TokenRows | None) -> dict[str, Any] | None:
    """What the manifest says of the tokens that importance was measured on."""
    return rows and {"sha256": rows.sha256, "count": rows.tokens, "sources": list(rows.sources)}


def require_transformers_shapes(smaller: SmallerCheckpoint) -> None:
    """Raise PlanError unless transformers makes a model of the view's config that has the view's tensors."""
    cpu = torch.device("cpu")
    model = empty_model(smaller.directory, torch.float32, cpu)
    state = model.state_dict(keep_vars=True)
    for name, target in PartWeights(model, smaller, cpu).targets.items():
        shape, wanted = smaller.index[name].shape, tuple(state[target.parameter].shape)
        if len(shape) == len(wanted) and shape != wanted:
            raise PlanError(
                f"{name}: would be {shape}, transformers makes it {wanted}; this model cannot be made smaller so"
            )


def write_smaller(
    smaller: SmallerCheckpoint, folder: Path, options: StructureOptions, went: Mapping[str, Any],
    notes: tuple[str, ...], tokens: Mapping[str, Any] | None, progress: Progress, started: float,
) -> SmallerReport:  # fmt: skip
    """Write the view to `folder`, piece by piece; killed, the same call goes on. Raises LlmcompressError."""
    weights = tuple(
        sum(tensor.rows * tensor.columns for tensor in of.index.values()) for of in (smaller.base, smaller)
    )
    notes += tuple(_note_on_gguf(smaller))
    report = SmallerReport(folder, options, weights, went, notes, tokens, time.monotonic() - started)
    texts = {
        name: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for name, value in (("config.json", smaller.config), (MANIFEST, report.as_dict()))
    }
    entries = [[Entry(name, tensor.dtype, tensor.shape)] for name, tensor in smaller.index.items()]
    shards = tuple(lay_out(entries, options.split_max_size or SHARD_BYTES))
    digest = hashlib.sha256(f"{__version__} {folder.resolve()} {smaller.fingerprint()} {texts}".encode())
    for shard in shards:
        digest.update(shard.header)
    output = CheckpointOutput(
        folder, shards, digest.hexdigest(), smaller.directory, texts, options.threads or cores()
    )
    check_room(output)
    with smaller:
        works = copies(smaller, smaller.index)
        write_checkpoint(output, works, sum(tensor.nbytes for tensor in smaller.index.values()), progress)
    return report


def _note_on_gguf(smaller: SmallerCheckpoint) -> Iterator[str]:
    """What llama.cpp cannot compute of the smaller model, if so."""
    architecture = find_architecture(Config(smaller.config))
    try:
        architecture.check_config(architecture.config(smaller.config))
        weight_steps(smaller)
    except PlanError as error:
        yield f"transformers runs this model, a GGUF of it cannot be made: {error}"
