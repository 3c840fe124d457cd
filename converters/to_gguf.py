"""The main job: a Hugging Face checkpoint to GGUF files of any types, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from llmcompress.converters.adapter_places import with_adapter
from llmcompress.converters.architecture import Architecture, steps_of, told_keys
from llmcompress.converters.config import Config
from llmcompress.converters.families import class_called, find_architecture
from llmcompress.converters.metadata import general_metadata
from llmcompress.converters.mtp import keep_mtp
from llmcompress.converters.tokenizer import read_vocabulary

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError
from llmcompress.fallback import MeasuredFallback
from llmcompress.filetypes import FLOATS, tensor_order
from llmcompress.gguf.imatrix import read_imatrix
from llmcompress.gguf.value import Metadata
from llmcompress.gguf_source import is_gguf
from llmcompress.hessians import HessianFolder
from llmcompress.importance import Importance, Source
from llmcompress.mix import ModelTraits
from llmcompress.plan import Plan, make_plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe, check_gains
from llmcompress.sensitivity import CANDIDATES, Sensitivity, measure
from llmcompress.step import Step
from llmcompress.target import Target


def plan_gguf(model: str | Path, out: str | Path, recipe: Recipe, progress: Progress = Progress()) -> Plan:
    """What `recipe` will do to `model`, a checkpoint or a GGUF, from its headers, config and tokenizer alone; of rows
    that --fallback best or a target measure, from these, too.

    `out` is a file name, a template with `{name}` and `{type}`, or a folder. Raises LlmcompressError for all that
    can be refused before a weight is read.
    """
    if is_gguf(model):
        from llmcompress.converters.requantize import plan_requantized

        return plan_requantized(model, out, recipe, progress)
    checkpoint = open_checkpoint(model, recipe)
    checkpoint.require_plain()
    architecture = find_architecture(Config(checkpoint.config))
    if recipe.mtp == "keep":
        architecture = keep_mtp(architecture, checkpoint)
    config = architecture.config(checkpoint.config)
    notes = architecture.check_config(config)
    vocabulary = read_vocabulary(
        checkpoint.directory,
        checkpoint.config,
        rows=config.need("vocab_size"),
        pre=recipe.pre,
        pad=not architecture.tokens_decide_rows,
    )
    steps, more_notes = steps_of(architecture, checkpoint, len(vocabulary.tokens))
    by_name = {step.name: step for step in steps}
    steps = [by_name[name] for name in tensor_order(list(by_name))]
    general, card_notes = general_metadata(architecture.name, checkpoint, steps, recipe)
    metadata = general | architecture.metadata(config) | told_keys(architecture, config, checkpoint)
    metadata |= vocabulary.metadata()
    return make_plan(
        checkpoint,
        steps,
        recipe,
        out,
        _traits(architecture, config, has_imatrix=bool(recipe.calibrate or recipe.hessian or recipe.imatrix)),
        metadata,
        importance_source(checkpoint, steps, recipe),
        [*checkpoint.notes, *notes, *vocabulary.notes, *more_notes, *card_notes],
        MeasuredFallback(checkpoint, recipe.effort) if recipe.fallback == "best" else None,
        _target(checkpoint, recipe, metadata, progress) if recipe.has_target else None,
    )


def _target(checkpoint: Checkpoint, recipe: Recipe, metadata: Metadata, progress: Progress) -> Target:
    notes: list[str] = []
    gains = partial(_gains, checkpoint, recipe.gains, recipe.data, progress, notes)
    if not recipe.confirm:
        return Target(checkpoint, recipe, progress, gains=gains, notes=notes)
    from llmcompress.converters.confirmation import measured_divergence

    measure = partial(measured_divergence, checkpoint, recipe, metadata, progress)
    return Target(checkpoint, recipe, progress, measure, gains, notes)


def _gains(
    checkpoint: Checkpoint, how: str, data: Sequence[str], progress: Progress, notes: list[str], steps: Sequence[Step],
    importance: Importance, energies: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """What `measure_gains` gives; none, and a note that says why, where the model is not run."""
    if how == "predicted" or not importance:
        return {}
    try:
        from llmcompress.converters.measured_gains import measure_gains

        return measure_gains(checkpoint, steps, importance, energies, data, progress)
    except (ImportError, LlmcompressError) as error:
        remedy = "; pip install 'llmcompress[calibrate]'" if isinstance(error, ImportError) else ""
        notes.append(f"how much each tensor's error counts is predicted, not measured: {error}{remedy}")
        return {}


def measure_gguf(
    model: str | Path, recipe: Recipe, types: Sequence[str] = CANDIDATES, progress: Progress = Progress(),
    gains: str = Recipe.gains,
) -> Sensitivity:  # fmt: skip
    """The error of each tensor of `model` that can be quantized, in each of `types`, with the recipe's importance, method
    and effort; and how much it counts, as `gains` says, one of recipe.GAINS. Raises LlmcompressError as `plan_gguf` and
    `measure` do."""
    check_gains(gains)
    plan, notes = plan_gguf(model, "sensitivity.gguf", recipe), []
    quantized = [
        step for step, place in zip(plan.steps, plan.outputs[0].placements) if place.grid.name not in FLOATS
    ]
    with plan.checkpoint:
        gains_of = partial(
            _gains, plan.checkpoint, gains, recipe.data, progress, notes, quantized, plan.importance
        )
        found = measure(
            plan.checkpoint,
            quantized,
            plan.importance,
            recipe.method,
            recipe.effort,
            types,
            progress,
            gains_of,
        )
    for note in notes:
        progress.say(note)
    return found


def open_checkpoint(model: str | Path, recipe: Recipe) -> Checkpoint:
    """The checkpoint, with the recipe's adapter in it; one whose tensors stay in memory from calibrating to quantizing
    where both are asked for."""
    if recipe.calibrate:
        from llmcompress.converters.live_calibration import HeldCheckpoint

        checkpoint = HeldCheckpoint.open(model)
    else:
        checkpoint = Checkpoint.open(model)
    if recipe.architecture:
        checkpoint.config = {**checkpoint.config, "architectures": [class_called(recipe.architecture)]}
    return with_adapter(checkpoint, recipe.adapter, recipe.onto) if recipe.adapter else checkpoint


def importance_source(checkpoint: Checkpoint, steps: list[Step], recipe: Recipe) -> Source | None:
    """Where the recipe takes the importance of the inputs from, if it does."""
    if recipe.imatrix:
        return read_imatrix(Path(recipe.imatrix))
    if recipe.hessian:
        return HessianFolder(recipe.hessian)
    if not recipe.calibrate:
        return None
    from llmcompress.converters.live_calibration import CalibrationOptions, LiveImportance
    from llmcompress.converters.sequential_importance import SequentialImportance

    live = SequentialImportance if recipe.sequential else LiveImportance
    options = CalibrationOptions(data=recipe.data, tokens=recipe.tokens)
    return live(checkpoint, steps, options, products=recipe.method == "gptq")


def _traits(architecture: Architecture, config: Config, has_imatrix: bool) -> ModelTraits:
    keys = {key: value.value for key, value in architecture.keys(config).items()}
    kv_heads = keys.get("attention.head_count_kv", 0)
    return ModelTraits(
        architecture=architecture.name,
        blocks=keys["block_count"],
        heads=keys["attention.head_count"],
        kv_heads=kv_heads[0] if isinstance(kv_heads, list) else kv_heads,
        experts=keys.get("expert_count", 0),
        has_imatrix=has_imatrix,
    )
