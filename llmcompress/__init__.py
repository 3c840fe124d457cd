"""llmcompress: the smallest artefact that still behaves like the model you gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from llmcompress.arrays import dequantize_array, quantize_array
    from llmcompress.converters.finetuning import TuningReport
    from llmcompress.converters.pruning import PruningReport
    from llmcompress.converters.smaller_folder import SmallerReport
    from llmcompress.progress import Progress
    from llmcompress.report import Result

__version__ = "0.1.0"
__all__ = ["dequantize_array", "finetune", "prune", "quantize", "quantize_array"]


def quantize(
    model: str | Path,
    out: str | Path,
    type: str | tuple[str, ...] | list[str] = "Q4_K_M",
    *,
    progress: Progress | None = None,
    **options,
) -> Result:
    """Make GGUF files of a Hugging Face checkpoint, one for each type, in one read; or, with the `format`
    gptq, nf4, fp4 or int8, the folder `out` with a checkpoint.

    `model` is a directory or a hub id; `out` a file, a folder, or a template with `{name}` and `{type}`;
    `type` one or several of llama.cpp's file types, or "auto". `options` are the other fields of
    `llmcompress.recipe.Recipe`: tensor_types, imatrix, max_ram, verify ... Returns what was done to each
    tensor. Raises `llmcompress.errors.LlmcompressError`.
    """
    from llmcompress.converters.to_gguf import plan_gguf
    from llmcompress.recipe import parse_recipe
    from llmcompress.run import run

    recipe = parse_recipe({"types": type} | options, label="quantize(): {}".format)
    if recipe.format != "gguf":
        from llmcompress.converters.coded_linears import run_coded
        from llmcompress.converters.to_checkpoint import plan_checkpoint

        checkpoint_plan = plan_checkpoint(model, out, recipe)
        with checkpoint_plan.checkpoint:
            return run_coded(checkpoint_plan, progress)
    plan = plan_gguf(model, out, recipe)
    with plan.checkpoint:
        return run(plan, progress)


def finetune(
    model: str | Path,
    out: str | Path,
    data: str | list[str],
    *,
    qlora: bool = False,
    progress: Progress | None = None,
    **options,
) -> TuningReport:
    """Train an adapter for a model on one or several sources `data`, and write it to the folder `out` in peft's format.

    `qlora` holds the model in 4 bits. `options` are the fields of `llmcompress.tuning_options.TuningOptions`: method,
    init, rank, learning_rate, epochs ... Raises `llmcompress.errors.LlmcompressError`.
    """
    from llmcompress.converters.finetuning import finetune_model
    from llmcompress.progress import Progress
    from llmcompress.tuning_options import parse_options

    sources = [data] if isinstance(data, str) else data
    given = parse_options(options | ({"load": "4bit"} if qlora else {}))
    return finetune_model(model, out, sources, given, progress or Progress())


def prune(
    model: str | Path, out: str | Path, *, progress: Progress | None = None, **options
) -> PruningReport | SmallerReport:
    """Write the checkpoint `model` to the folder `out` with weights of its decoder blocks' linears set to zero, or
    smaller.

    `options` are the fields of `llmcompress.pruning_options.PruningOptions`: method, sparsity, pattern, data, tokens ...;
    where the method is layers, width or experts, of `llmcompress.structure_options.StructureOptions`: drop, ratio, by ...
    Raises `llmcompress.errors.LlmcompressError`.
    """
    from llmcompress.progress import Progress
    from llmcompress.pruning_options import parse_options
    from llmcompress.structure_options import STRUCTURES, StructureOptions

    if options.get("method") in STRUCTURES:
        from llmcompress.converters.structure import JOBS

        given = parse_options(options, StructureOptions)
        return JOBS[given.method](model, out, given, progress or Progress())
    from llmcompress.converters.pruning import prune_model

    return prune_model(model, out, parse_options(options), progress or Progress())


def __getattr__(name: str):
    """The functions of `arrays`, which is imported when one of them is first wanted: it brings Numba."""
    if name in ("dequantize_array", "quantize_array"):
        from llmcompress import arrays

        return getattr(arrays, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
