"""`llmcompress finetune` and `distill`: train a model, or an adapter for it, on examples."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from llmcompress.machine import see_one_gpu
from llmcompress.model_commands import AsJson, Device, patient_threads
from llmcompress.reported import reported

OUT = "{name}-adapter"
Out = Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")]


@reported
def finetune(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id; 16-bit, or a folder by --format nf4 or int8.")],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE", help="JSONL or Parquet of messages or of prompts and completions, a text, or a data set's name; repeat it, FILE=WEIGHT."),
    ],
    out: Out = OUT,
    qlora: Annotated[bool, typer.Option("--qlora", help="Hold the model in 4 bits (NF4): --load 4bit.")] = False,
    load: Annotated[
        Optional[str], typer.Option("--load", metavar="BITS", help="Hold the model in 4bit, 8bit or 16bit.  [default: as it is]"),
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="lora, rslora, dora, adalora, or full: the model's own weights.")] = "lora",
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
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="Zeros of a pruned model stay zeros; the result is a checkpoint."),
    ] = False,
    teacher: Annotated[
        Optional[list[str]],
        typer.Option("--teacher", metavar="MODEL", help="Learn from this model's predictions; repeat it, MODEL=WEIGHT."),
    ] = None,
    soft: Annotated[float, typer.Option("--soft", metavar="X", help="Share of the teachers' probabilities in the loss.")] = 1.0,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="That they are compared at.")] = 1.0,
    hidden: Annotated[float, typer.Option("--hidden", metavar="X", help="Weight of the teachers' hidden states in the loss.")] = 0.0,
    attention: Annotated[float, typer.Option("--attention", metavar="X", help="Weight of their attention maps.")] = 0.0,
    layer_map: Annotated[
        Optional[str],
        typer.Option("--layer-map", metavar="S:T,...", help="Blocks of the student and theirs, from 0.  [default: evenly]"),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train an adapter (LoRA, QLoRA ...) for a model, or the model itself; the defaults need no flag but --data."""
    patient_threads()
    device = see_one_gpu(device)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels that it would download
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

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
        device=device, dtype=dtype, keep_zeros=keep_zeros, teachers=tuple(teacher or ()), soft=soft,
        temperature=temperature, hidden=hidden, attention=attention, layer_map=layer_map,
    )  # fmt: skip
    disable_progress_bar()
    set_verbosity_error()
    if out == OUT and (keep_zeros or method == "full"):
        out = "{name}-tuned"
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


def with_options_of(command: Callable, without: set[str]) -> Callable[[Callable], Callable]:
    """Give a function that takes **options those of another command, for typer to see."""

    def decorated(function: Callable) -> Callable:
        own = inspect.signature(function, eval_str=True)
        theirs = inspect.signature(command, eval_str=True).parameters
        named = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        without_these = without | {each.name for each in named}
        named += [each for name, each in theirs.items() if name not in without_these]
        keyword = [each.replace(kind=each.KEYWORD_ONLY) for each in named]
        function.__signature__ = own.replace(parameters=keyword)
        return function

    return decorated


@reported
@with_options_of(finetune, without={"model", "qlora", "load", "teacher"})
def distill(
    teacher: Annotated[list[str], typer.Argument(help="Models to learn from, directories or hub ids; MODEL=WEIGHT.")],
    student: Annotated[str, typer.Option("--student", metavar="MODEL", help="The model that learns, of the same tokenizer.")],
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="full: the student's own weights; or lora ...")] = "full",
    out: Out = "{name}-distilled",
    loss: Annotated[str, typer.Option("--loss", metavar="WHICH", help="Tokens to learn: answers, or all.")] = "all",
    **options: Any,
) -> None:  # fmt: skip
    """Teach a model the predictions of another: of a larger one, or of the one that it was pruned from."""
    inspect.unwrap(finetune)(student, teacher=teacher, method=method, out=out, loss=loss, **options)
