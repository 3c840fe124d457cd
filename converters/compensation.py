"""The job of `compensate`: an adapter that takes back what quantizing or pruning a model lost.

Of each linear W of the reference and what the artefact made of it, W', the error E = W - W' becomes a low-rank product
B A, the best there is for the inputs that W meets (methods/low_rank.py). The adapter fits the artefact, not its
reference: as peft's folder on a checkpoint, as GGUF beside a GGUF. One matrix is in memory at a time, and the adapter.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.linears import AS_IT_IS, Linear, is_linear, linears_of
from llmcompress.converters.lora_to_gguf import (
    OUTPUT,
    is_adapted,
    plan_lora,
    require_float,
    run_lora,
)
from llmcompress.converters.to_gguf import importance_source, open_checkpoint
from safetensors.numpy import save

from llmcompress import __version__
from llmcompress.adapter import CONFIG, PREFIX, WEIGHTS
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RunError
from llmcompress.gguf_source import is_gguf
from llmcompress.grids.floats import to_float32
from llmcompress.importance import Importance
from llmcompress.merged import HEAD
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.step import Piece, Step
from llmcompress.whole_file import require_free_place, whole_file

MANIFEST = "compensate.json"
DEFAULT_RANK = 16
EXPERTS = "_exps."  # in the names of a GGUF's tensors


@dataclass(frozen=True)
class CompensationOptions:
    """rank: of every matrix's factors. hessian: a folder by `calibrate --hessian`; without one, the reference is
    calibrated on `tokens` tokens of `data` on the way. type: of a GGUF's tensors."""

    rank: int = DEFAULT_RANK
    hessian: str | None = None
    data: tuple[str, ...] = ("default",)
    tokens: int = 2**18
    type: str = "F32"

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            method="gptq",
            hessian=self.hessian,
            calibrate=not self.hessian,
            data=self.data,
            tokens=self.tokens,
        )


@dataclass(frozen=True)
class CompensatedLinear:
    """One linear: its rank, and the share of |E X|² that the adapter leaves. weighed: whether inputs were known."""

    name: str
    shape: tuple[int, int]
    rank: int
    left: float
    weighed: bool


@dataclass(frozen=True)
class CompensationReport:
    """A finished adapter, and what it takes back of each linear."""

    path: Path
    artefact: str
    reference: str
    options: CompensationOptions
    linears: tuple[CompensatedLinear, ...]
    weights: int  # of the adapter
    notes: tuple[str, ...]
    seconds: float

    @property
    def left(self) -> float:
        """The mean over linears."""
        return float(np.mean([linear.left for linear in self.linears]))

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": __version__, "path": str(self.path), "artefact": self.artefact, "reference": self.reference,
            **asdict(self.options), "weights": self.weights, "left": self.left,
            "linears": {linear.name: asdict(linear) for linear in self.linears}, "notes": list(self.notes),
            "seconds": self.seconds,
        }  # fmt: skip


def compensate(
    artefact: str,
    reference: str | Path,
    out: str | Path,
    options: CompensationOptions = CompensationOptions(),
    progress: Progress = Progress(),
) -> CompensationReport:
    """Write the adapter of `artefact`, a GGUF or a checkpoint, to `out`: a folder, or a `.gguf`.

    Raises PlanError for an artefact of another model and for one without an error, LlmcompressError for what else is
    wrong.
    """
    started, out = time.monotonic(), Path(out)
    as_gguf = out.suffix == ".gguf"
    if options.rank < 1:
        raise PlanError(f"--rank {options.rank}: must be at least 1")
    if as_gguf:
        require_float(options.type)
    else:
        require_free_place(out)
    with open_checkpoint(reference, options.recipe) as model, _opened(artefact, model) as held:
        model.require_plain()
        steps = weight_steps(model)
        architecture = find_architecture(Config(model.config))
        plain = [step for step in steps if EXPERTS not in step.name]
        linears = linears_of(architecture, plain) + _head(model, held, steps)
        _check_same(model, held, linears)
        notes = _notes_on_experts(steps)
        if as_gguf:
            adapted = [linear for linear in linears if _in_llama_cpp(architecture.name, linear, steps)]
            notes += _notes_on_unadapted(linears, adapted)
            linears = adapted
        source = importance_source(model, steps, options.recipe)
        importance = Importance(steps, source)
        importance.check()
        tensors, done = {}, []
        with importance.running():
            progress.start("compensating", len(linears), "linears")
            for linear, factors, found in _solved(model, held, linears, importance, options.rank):
                progress.advance(1)
                if factors:
                    tensors |= factors
                    done.append(found)
        notes += [*source.notes, *importance.complaints, *held.notes]
    if not done:
        raise PlanError(f"{artefact}: its linears are those of {reference}, there is nothing to make up for")
    weights = sum(values.size for values in tensors.values())
    notes += _notes_on_unweighed(done)
    config = _config(artefact, options.rank, done, _has_inputs_first(linears))
    report = CompensationReport(
        out,
        str(artefact),
        str(reference),
        options,
        tuple(done),
        weights,
        tuple(notes),
        time.monotonic() - started,
    )
    if as_gguf:
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
            named = Path(folder) / out.stem
            _write(named, config, tensors, report)
            run_lora(plan_lora(named, reference, out, options.type), progress)
    else:
        _write(out, config, tensors, report)
    return report


def _opened(artefact: str, reference: Checkpoint) -> DecodedGGUF | Checkpoint:
    return DecodedGGUF.open(artefact, reference) if is_gguf(artefact) else Checkpoint.open(artefact)


def _head(model: Checkpoint, held: Checkpoint | DecodedGGUF, steps: Sequence[Step]) -> list[Linear]:
    """The output matrix, where it is a tensor of its own in both: an adapter of a tied one would be the embedding's."""
    if HEAD not in held.index or OUTPUT not in {step.name for step in steps} or HEAD not in model.index:
        return []
    tensor = model.index[HEAD]
    step = Step(HEAD.removesuffix(".weight"), tensor.shape, (Piece(tensor, 0, tensor.rows),), AS_IT_IS)
    return [Linear(step, OUTPUT, 0)]


def _check_same(model: Checkpoint, held: Checkpoint | DecodedGGUF, linears: Sequence[Linear]) -> None:
    """Raise PlanError where the artefact is of another model."""
    for linear in linears:
        tensor = linear.step.pieces[0].tensor
        other = held.index.get(tensor.name)
        if other is None or other.shape != tensor.shape:
            has = f"has it as {other.shape}" if other else "has no such tensor"
            where = getattr(held, "path", held.directory)
            raise PlanError(
                f"{where}: {tensor.name} is {tensor.shape} in {model.directory}, the artefact {has}; give the model it "
                "was made from"
            )


def _solved(
    model: Checkpoint,
    held: Checkpoint | DecodedGGUF,
    linears: Sequence[Linear],
    importance: Importance,
    rank: int,
) -> Iterator[tuple[Linear, dict[str, np.ndarray], CompensatedLinear | None]]:
    """The factors of every linear by their names in the adapter, in the order in which the inputs become known; none
    where the artefact has the very weights."""
    from llmcompress.methods.low_rank import factorize

    live = importance.live
    for linear in sorted(linears, key=lambda linear: live.stage(linear.inputs)) if live else linears:
        if live:
            live.reached(live.stage(linear.inputs))
        error = _weights(model, linear) - _weights(held, linear)
        name, shape = linear.step.name, error.shape
        if not np.isfinite(error).all():
            raise RunError(
                f"{name}: the model or the artefact holds a NaN or infinity; make or fetch it again"
            )
        if not error.any():
            yield linear, {}, None
            continue
        if linear.inputs in importance:
            importance[linear.inputs]  # a running calibration has the products when it has this
        products = importance.products(linear.inputs, linear.matrix)
        found = factorize(error, products, rank)
        kept = max(1, int((found.taken > 0).sum()))
        left = found.after / found.before if found.before else 1.0
        factors = {
            f"{PREFIX}{name}.lora_A.weight": np.ascontiguousarray(found.a[:kept]),
            f"{PREFIX}{name}.lora_B.weight": np.ascontiguousarray(found.b[:, :kept]),
        }
        yield linear, factors, CompensatedLinear(name, shape, kept, left, products is not None)


def _weights(checkpoint: Checkpoint | DecodedGGUF, linear: Linear) -> np.ndarray:
    """float32 (outputs, inputs)."""
    tensor = linear.step.pieces[0].tensor
    values = to_float32(checkpoint.read(tensor.name), checkpoint.index[tensor.name].dtype)
    return np.ascontiguousarray(values.T) if linear.step.operation.transposed else values


def _in_llama_cpp(architecture: str, linear: Linear, steps: Sequence[Step]) -> bool:
    """Whether every tensor of the GGUF that is made of a linear can be changed by an adapter."""
    source = linear.step.pieces[0].tensor.name
    made = [step for step in steps if any(piece.tensor.name == source for piece in step.pieces)]
    return all(is_adapted(architecture, step.name) and not step.operation.compute for step in made)


def _has_inputs_first(linears: Sequence[Linear]) -> bool:
    return any(linear.step.operation.transposed for linear in linears)


def _config(
    artefact: str, rank: int, linears: Sequence[CompensatedLinear], inputs_first: bool
) -> dict[str, Any]:
    """adapter_config.json as peft reads it. Matrices too small for the rank have their own, and the same scale of 1."""
    others = {linear.name: linear.rank for linear in linears if linear.rank != rank}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(artefact), "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": inputs_first,
        "target_modules": [linear.name for linear in linears], "rank_pattern": others, "alpha_pattern": others,
    }  # fmt: skip


def _write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], report: CompensationReport
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((CONFIG, config), (MANIFEST, report.as_dict())):
        with whole_file(folder / name) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
    with whole_file(folder / WEIGHTS[0]) as file:
        file.write(save(dict(tensors), metadata={"format": "pt"}))


def _notes_on_experts(steps: Sequence[Step]) -> list[str]:
    found = [step.name for step in steps if is_linear(step) and EXPERTS in step.name]
    return [f"{len(found)} tensors of experts stay as they are, the first is {found[0]}"] if found else []


def _notes_on_unadapted(linears: Sequence[Linear], adapted: Sequence[Linear]) -> list[str]:
    kept = {linear.step.name for linear in adapted}
    left = [linear.step.name for linear in linears if linear.step.name not in kept]
    return [f"{len(left)} linears stay as they are, since llama.cpp adapts them not, the first is {left[0]}"] if left else []  # fmt: skip


def _notes_on_unweighed(done: Sequence[CompensatedLinear]) -> list[str]:
    bare = [linear.name for linear in done if not linear.weighed]
    return [f"{len(bare)} linears have too few tokens or no statistics, and all inputs count alike there, the first is {bare[0]}"] if bare else []  # fmt: skip
