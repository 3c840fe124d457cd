"""`llmcompress merge` and `convert-lora`: what becomes of an adapter that peft trained."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from llmcompress.reported import reported

Adapter = Annotated[str, typer.Argument(help="The folder of a peft adapter, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@reported
def merge(
    model: Annotated[str, typer.Argument(help="The base model: a directory, or a hub id.")],
    adapter: Adapter,
    out: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")] = "{name}-merged",
    onto: Annotated[
        Optional[str],
        typer.Option(
            "--onto", metavar="BASE",
            help="Merge into the weights as they are, 16bit, or rounded to nf4 as QLoRA trains on them.  "
            "[default: as finetune trained it, else 16bit]",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="auto: the base's own; F32, F16 or BF16.")
    ] = "auto",
    split_max_size: Annotated[
        Optional[str], typer.Option("--split-max-size", metavar="SIZE", help="Of a file.  [default: 5GB]")
    ] = None,
    max_ram: Annotated[
        Optional[str],
        typer.Option("--max-ram", metavar="SIZE", help="Memory above the interpreter and its libraries.  [default: 512MiB]"),
    ] = None,
    threads: Annotated[Optional[int], typer.Option("--threads", metavar="N", help="Workers.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a model with an adapter in its weights: an ordinary checkpoint, in bounded memory."""
    from llmcompress import display
    from llmcompress.converters.merge import plan_merge, run_merge
    from llmcompress.recipe import parse_recipe

    flags = {"split_max_size": split_max_size, "max_ram": max_ram, "threads": threads}
    recipe = parse_recipe(
        {key: value for key, value in flags.items() if value is not None}, label="--{}".format
    )
    progress = display.live_progress()
    try:
        result = run_merge(plan_merge(model, adapter, out, recipe, dtype, onto), progress)
    finally:
        progress.close()
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=1, default=str))
    else:
        display.show_result(result)


@reported
def convert_lora(
    adapter: Adapter,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model it was trained on.")],
    out: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The GGUF to write.")] = "adapter.gguf",
    type: Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help="F32, F16 or BF16.")] = "F32",
) -> None:  # fmt: skip
    """Make a GGUF of an adapter, which llama.cpp adds to a model with --lora."""
    from llmcompress import display
    from llmcompress.converters.lora_to_gguf import plan_lora, run_lora

    progress = display.live_progress()
    try:
        plan = plan_lora(adapter, base, out, type)
        path = run_lora(plan, progress)
    finally:
        progress.close()
    typer.echo(f"{path}: {plan.adapter.kind}, {len(plan.pairs)} tensors, {path.stat().st_size:,} bytes")
