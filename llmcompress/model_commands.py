"""`llmcompress calibrate` and `evaluate`: the commands that run a model, and so need torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from llmcompress.reported import reported
from llmcompress.sizes import parse_count, parse_size

if TYPE_CHECKING:
    from llmcompress.recipe import Recipe

Data = Annotated[
    Optional[list[str]],
    typer.Option(
        "--data",
        metavar="TEXT",
        help="A text, JSONL or Parquet file, a data set's name, or a bundled text; repeat it.  [default: all bundled]",
    ),
]
Chunk = Annotated[int, typer.Option("--chunk", metavar="N", min=2, help="Tokens in a row.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto.")]
Adapter = Annotated[
    Optional[str], typer.Option("--adapter", metavar="DIR", help="A peft adapter on the model.")
]
HiddenRam = Annotated[
    str,
    typer.Option(
        "--hidden-ram", metavar="SIZE", help="Hidden states that wait in memory; more wait on disk."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@reported
def calibrate(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id.")],
    out: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Statistics to write: .gguf or .dat.")
    ] = "{name}-imatrix.gguf",
    data: Data = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="Tokens to run.")] = "256k",
    chunk: Chunk = 512,
    windows: Annotated[
        str, typer.Option("--windows", metavar="STYLE", help="packed documents, or one text as llama.cpp cuts it.")
    ] = "packed",
    hessian: Annotated[
        Optional[str], typer.Option("--hessian", metavar="DIR", help="Keep XᵀX of every weight there, too.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which documents are taken, and their order.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="f32, bf16, mixed (bf16 products alone), or auto: mixed where bf16 is stored and fast.")
    ] = "auto",
    device: Device = "auto",
    hidden_ram: HiddenRam = "1GiB",
    batch_tokens: Annotated[
        Optional[int],
        typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens run at once.  [default: by the model's width]"),
    ] = None,
    adapter: Adapter = None,
    save_every: Annotated[
        str, typer.Option("--save-every", metavar="N", help="Tokens between two saves, each a pass over the weights.")
    ] = "64k",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run text through a model and write the statistics of what goes into its weights (an importance matrix)."""
    patient_threads()
    from llmcompress import model_display
    from llmcompress.checkpoint import Checkpoint
    from llmcompress.converters.calibration import CalibrationOptions, calibrate_model

    options = CalibrationOptions(
        data=tuple(data or ("default",)), tokens=parse_count(tokens, "--tokens"), chunk=chunk, seed=seed,
        windows=windows, device=device, dtype=dtype, hidden_ram=parse_size(hidden_ram, "--hidden-ram"),
        batch_tokens=batch_tokens, adapter=adapter, save_every=parse_count(save_every, "--save-every"),
    )  # fmt: skip
    path = out.replace("{name}", Checkpoint.open(model).name)
    progress = model_display.live_progress()
    try:
        report = calibrate_model(model, path, options, progress, Path(hessian) if hessian else None)
    finally:
        progress.close()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_calibration(report)


def make_checkpoint(model: str, out: str, recipe: Recipe, as_json: bool, dry: bool) -> None:
    """`quantize` with the format of a checkpoint: plan, and carry out unless `dry`."""
    if recipe.calibrate or recipe.hessian:
        patient_threads()
    from llmcompress import display
    from llmcompress.converters.coded_linears import planned, run_coded
    from llmcompress.converters.to_checkpoint import plan_checkpoint

    plan = plan_checkpoint(model, out, recipe)
    if dry:
        result = planned(plan)
    else:
        progress = display.live_progress()
        try:
            with plan.checkpoint:
                result = run_coded(plan, progress)
        finally:
            progress.close()
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=1, default=str))
    else:
        (display.show_planned if dry else display.show_result)(result)


@reported
def evaluate(
    artefact: Annotated[str, typer.Argument(help="A GGUF file, or a model directory that transformers loads.")],
    reference: Annotated[
        Optional[str], typer.Option("--reference", metavar="MODEL", help="The model it was made from.")
    ] = None,
    data: Data = None,
    tokens: Annotated[
        Optional[str], typer.Option("--tokens", metavar="N", help="At most so many tokens.  [default: all]")
    ] = None,
    chunk: Chunk = 512,
    windows: Annotated[
        str,
        typer.Option("--windows", metavar="STYLE", help="transformers: every token counts; llama.cpp: second halves."),
    ] = "transformers",
    save_logits: Annotated[
        Optional[str],
        typer.Option("--save-logits", metavar="FILE", help="Write the reference's logits, as llama-perplexity does."),
    ] = None,
    base: Annotated[
        Optional[str],
        typer.Option("--kl-divergence-base", metavar="FILE", help="Compare with saved logits, not with a model that runs."),
    ] = None,
    tasks: Annotated[
        Optional[str],
        typer.Option("--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness to run, too."),
    ] = None,
    tasks_path: Annotated[
        Optional[str],
        typer.Option("--tasks-path", metavar="DIR", help="Take them from YAML files there, not from its own."),
    ] = None,
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="f32, bf16 or f16.")] = "f32",
    device: Device = "auto",
    hidden_ram: HiddenRam = "1GiB",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure an artefact against its model: perplexity, KL divergence, agreement, each with its standard error."""
    patient_threads()
    from llmcompress import model_display
    from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model

    options = EvaluationOptions(
        data=tuple(data or ("default",)), tokens=parse_count(tokens, "--tokens") if tokens else None, chunk=chunk,
        windows=windows, device=device, dtype=dtype, hidden_ram=parse_size(hidden_ram, "--hidden-ram"),
        save_logits=save_logits, base=base, adapter=adapter, tasks=tuple(tasks.split(",")) if tasks else (), tasks_path=tasks_path,
    )  # fmt: skip
    progress = model_display.live_progress()
    try:
        report = evaluate_model(artefact, reference, options, progress)
    finally:
        progress.close()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_evaluation(report)


def patient_threads() -> None:
    """Threads of torch that have nothing to do sleep, where they would spin: on cores that others use too, spinning
    took three times as long."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
