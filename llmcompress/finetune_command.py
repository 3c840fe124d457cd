"""`llmcompress finetune`: train an adapter for a model on examples."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Optional

import typer

from llmcompress.model_commands import AsJson, Device, patient_threads
from llmcompress.reported import reported


@reported
def finetune(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id; 16-bit, or a folder by --format nf4 or int8.")],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE", help="JSONL or Parquet of messages or of prompts and completions, a text, or a data set's name; repeat it, FILE=WEIGHT."),
    ],
    out: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The adapter's folder.")] = "{name}-adapter",
    qlora: Annotated[bool, typer.Option("--qlora", help="Hold the model in 4 bits (NF4): --load 4bit.")] = False,
    load: Annotated[
        Optional[str], typer.Option("--load", metavar="BITS", help="Hold the model in 4bit, 8bit or 16bit.  [default: as it is]"),
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="lora, rslora, dora or adalora.")] = "lora",
    init: Annotated[str, typer.Option("--init", metavar="INIT", help="Where the adapter starts: default, pissa or loftq.")] = "default",
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of the adapter's matrices.")] = 64,
    alpha: Annotated[
        Optional[float], typer.Option("--alpha", metavar="X", help="The adapter counts alpha/rank times.  [default: 32, of rslora 4]")
    ] = None,
    dropout: Annotated[float, typer.Option("--dropout", metavar="X", help="Of the adapter's inputs.")] = 0.0,
    target: Annotated[
        Optional[list[str]],
        typer.Option("--target", metavar="MODULE", help="Layers to adapt, such as q_proj; repeat it.  [default: all linear ones]"),
    ] = None,
    train_also: Annotated[
        Optional[list[str]],
        typer.Option("--train-also", metavar="MODULE", help="Modules to train whole, such as embed_tokens; repeat it."),
    ] = None,
    loss: Annotated[str, typer.Option("--loss", metavar="WHICH", help="Tokens to learn: answers, or all.")] = "answers",
    plain: Annotated[bool, typer.Option("--plain", help="Prompt and answer as plain text, without the chat template.")] = False,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Several examples in a row, none of which sees another.")] = True,
    max_length: Annotated[
        Optional[int], typer.Option("--max-length", metavar="N", help="Tokens of an example.  [default: the model's, at most 2048]")
    ] = None,
    validation: Annotated[
        str, typer.Option("--validation", metavar="SHARE|FILE", help="Share of the examples to hold out, or a file of others.")
    ] = "0.05",
    epochs: Annotated[
        Optional[float], typer.Option("--epochs", metavar="X", help="Times that each example is seen.  [default: 1 to 10, by their number]")
    ] = None,
    steps: Annotated[Optional[int], typer.Option("--steps", metavar="N", help="Steps of the optimizer, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Examples in a step, over all devices.")] = 16,
    micro_batch: Annotated[
        Optional[int], typer.Option("--micro-batch", metavar="N", help="Of them at once on each device.  [default: by their length]")
    ] = None,
    lr: Annotated[Optional[float], typer.Option("--lr", metavar="X", help="Learning rate.  [default: by the model's width]")] = None,
    schedule: Annotated[str, typer.Option("--schedule", metavar="NAME", help="cosine, linear, constant_with_warmup ...")] = "cosine",
    optimizer: Annotated[
        str, typer.Option("--optimizer", metavar="NAME", help="One of transformers.  [auto: paged_adamw_8bit on CUDA, else adamw_torch]")
    ] = "auto",
    gradient_checkpointing: Annotated[
        Optional[bool],
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Compute activations twice, keep few.  [default: from 0.5 billion weights on]"),
    ] = None,
    evaluations: Annotated[int, typer.Option("--evaluations", metavar="N", help="Of the held-out loss, each with a checkpoint.")] = 10,
    patience: Annotated[int, typer.Option("--patience", metavar="N", help="Evaluations without progress before it stops; 0: never.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the order, what is held out, and the adapter's start.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="f32, bf16, or auto: bf16 where it is fast.")] = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train an adapter (LoRA, QLoRA ...) for a model; the defaults need no flag but --data."""
    patient_threads()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels that it would download
    from transformers.utils.logging import disable_progress_bar

    from llmcompress import model_display
    from llmcompress.checkpoint import Checkpoint
    from llmcompress.converters.finetuning import finetune_model
    from llmcompress.errors import LlmcompressError
    from llmcompress.tuning_options import TuningOptions

    if qlora and load not in (None, "4bit"):
        raise LlmcompressError(f"--qlora and --load {load}: give one of the two")
    options = TuningOptions(
        load="4bit" if qlora else load, method=method, init=init, rank=rank, alpha=alpha, dropout=dropout,
        targets=tuple(target or ()), train_also=tuple(train_also or ()), loss=loss, plain=plain, pack=pack,
        max_length=max_length, validation=validation, epochs=epochs, steps=steps, batch=batch,
        micro_batch=micro_batch, learning_rate=lr, schedule=schedule, optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing, evaluations=evaluations, patience=patience, seed=seed,
        device=device, dtype=dtype,
    )  # fmt: skip
    disable_progress_bar()
    path = out.replace("{name}", Checkpoint.open(model).name)
    progress = model_display.live_progress()
    try:
        report = finetune_model(model, path, data, options, progress)
    finally:
        progress.close()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_tuning(report)
