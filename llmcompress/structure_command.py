"""What `llmcompress prune` does where layers, widths, experts or ranks go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmcompress.errors import RecipeError
from llmcompress.sizes import parse_count, parse_size

if TYPE_CHECKING:
    from llmcompress.structure_options import StructureOptions


def make_smaller(given: dict[str, Any]) -> None:
    """--method layers, width, experts, and svd of ranks: `given` holds the command's options. Raises LlmcompressError."""
    from llmcompress import model_display
    from llmcompress.converters.structure import JOBS
    from llmcompress.gguf_source import is_gguf
    from llmcompress.structure_options import StructureOptions, parse_layers, parse_parts

    same = (
        "method",
        "drop",
        "ratio",
        "rank",
        "by",
        "chunk",
        "seed",
        "dtype",
        "batch_tokens",
        "device",
        "threads",
    )
    options = StructureOptions(
        **{name: given[name] for name in same},
        **{name: given[name] and parse_size(given[name], f"--{name.replace('_', '-')}") for name in ("hidden_ram", "split_max_size")},
        tokens=given["tokens"] and parse_count(given["tokens"], "--tokens"),
        layers=parse_layers(given["layers"]) if given["layers"] else (),
        parts=parse_parts(given["parts"]),
        data=tuple(given["data"] or ("default",)),
    )  # fmt: skip
    if is_gguf(given["model"]):
        _drop_from_gguf(given, options)
        return
    if stray := [f"--{name}" for name in ("imatrix", "reference") if given[name]]:
        raise RecipeError(f"{stray[0]}: is for a GGUF, {given['model']} is none")
    progress = model_display.live_progress()
    try:
        report = JOBS[options.method](given["model"], given["out"], options, progress)
    finally:
        progress.close()
    if given["as_json"]:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_smaller(report)


def _drop_from_gguf(given: dict[str, Any], options: StructureOptions) -> None:
    """--method layers on a GGUF, which is copied without them."""
    from llmcompress import model_display
    from llmcompress.converters.gguf_layers import drop_layers
    from llmcompress.display import show_result
    from llmcompress.recipe import Recipe

    model, out = given["model"], given["out"]
    if options.method != "layers":
        raise RecipeError(f"--method {options.method}: not on a GGUF; give the model it was made from")
    if options.drop and not given["reference"]:
        raise RecipeError("--drop: what a layer is worth is measured on the model the GGUF was made from; add --reference, or name --layers")  # fmt: skip
    if given["reference"] and not options.drop:
        raise RecipeError("--reference: is for --drop; the layers are named already")
    out = out if out.endswith(".gguf") else f"{out}.gguf"
    recipe = Recipe(types=("COPY",), threads=options.threads, split_max_size=options.split_max_size)
    progress = model_display.live_progress()
    try:
        layers = options.layers
        if options.drop:
            from llmcompress.converters.dropping import choose_layers

            layers = choose_layers(given["reference"], options, Path(out), progress)
        result, importance = drop_layers(model, out, layers, given["imatrix"], recipe, progress)
    finally:
        progress.close()
    if given["as_json"]:
        said = {"layers_dropped": list(layers), "imatrix": importance and str(importance)}
        typer.echo(json.dumps(result.as_dict() | said, indent=1, default=str))
        return
    show_result(result)
    typer.echo(f"layers dropped: {', '.join(map(str, layers))}")
    if importance:
        typer.echo(f"{importance}: the importance matrix, renumbered")
