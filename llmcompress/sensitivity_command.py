"""`llmcompress sensitivity`: measure once what each tensor loses in each type, for any number of target sizes."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from llmcompress.model_commands import Data, patient_threads
from llmcompress.reported import reported

Gains = Annotated[
    Optional[str],
    typer.Option(
        "--gains",
        metavar="HOW",
        help="How much each tensor's error counts, for a target: measured, on --data, or predicted.  [default: measured "
        "where there is importance]",
    ),
]


@reported
def sensitivity(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id.")],
    out: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The JSON file to write.")
    ] = "{name}-sensitivity.json",
    imatrix: Annotated[
        Optional[str], typer.Option("--imatrix", metavar="FILE", help="Importance matrix: a GGUF or .dat.")
    ] = None,
    hessian: Annotated[
        Optional[str], typer.Option("--hessian", metavar="DIR", help="A folder by calibrate --hessian.")
    ] = None,
    gains: Gains = None,
    data: Data = None,
    types: Annotated[
        Optional[list[str]],
        typer.Option("--types", metavar="A,B", help="The types to choose from, such as Q3_K,Q4_K.  [default: all]"),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="nearest, or gptq: what the file will be made with.")
    ] = "nearest",
    effort: Annotated[
        str, typer.Option("--effort", metavar="EFFORT", help="Of the search for scales: fast, normal or best.")
    ] = "normal",
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors as JSON.")] = False,
) -> None:  # fmt: skip
    """Measure the error of every tensor in every type, and keep it for quantize --target-size --sensitivity FILE."""
    patient_threads()
    from llmcompress import display
    from llmcompress.checkpoint import Checkpoint
    from llmcompress.converters.to_gguf import measure_gguf
    from llmcompress.recipe import Recipe
    from llmcompress.sensitivity import CANDIDATES

    named = tuple(part.upper() for given in types or () for part in given.split(",")) or CANDIDATES
    texts = tuple(data) if data else Recipe.data
    recipe = Recipe(imatrix=imatrix, hessian=hessian, method=method, effort=effort, data=texts)
    path = out.replace("{name}", Checkpoint.open(model).name)
    progress = display.live_progress()
    try:
        found = measure_gguf(model, recipe, named, progress, gains or Recipe.gains)
    finally:
        progress.close()
    found.save(path)
    if as_json:
        typer.echo(json.dumps(found.errors, indent=1))
    else:
        display.show_sensitivity(found)
        typer.echo(path)
