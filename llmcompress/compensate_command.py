"""`llmcompress compensate`: an adapter that takes back what quantizing or pruning lost."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from llmcompress.model_commands import AsJson, Data, patient_threads
from llmcompress.reported import reported
from llmcompress.sizes import parse_count


@reported
def compensate(
    artefact: Annotated[str, typer.Argument(help="A GGUF, or a checkpoint folder: quantized, or pruned.")],
    reference: Annotated[str, typer.Option("--reference", metavar="MODEL", help="The model it was made from.")],
    out: Annotated[
        str, typer.Option("-o", "--output", metavar="PATH", help="A folder for peft, or a .gguf for llama.cpp's --lora.")
    ],
    rank: Annotated[int, typer.Option("--rank", metavar="N", min=1, help="Of the adapter's matrices.")] = 16,
    hessian: Annotated[
        Optional[str],
        typer.Option("--hessian", metavar="DIR", help="A folder by calibrate --hessian; without one, the reference is calibrated on the way."),
    ] = None,
    data: Data = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="Tokens to calibrate on.")] = "256k",
    type: Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help="Of a .gguf: F32, F16 or BF16.")] = "F32",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a LoRA of what an artefact lost: of each linear's error the low-rank part that its inputs show most."""
    patient_threads()
    from llmcompress import model_display
    from llmcompress.converters.compensation import CompensationOptions, compensate

    options = CompensationOptions(
        rank, hessian, tuple(data or ("default",)), parse_count(tokens, "--tokens"), type
    )
    progress = model_display.live_progress()
    try:
        report = compensate(artefact, reference, out, options, progress)
    finally:
        progress.close()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_compensation(report)
