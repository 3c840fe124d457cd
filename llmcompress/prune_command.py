"""`llmcompress prune`: a checkpoint with weights taken away."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from llmcompress import structure_command
from llmcompress.errors import RecipeError, nearest
from llmcompress.model_commands import AsJson, Chunk, Data, Device, HiddenRam, patient_threads
from llmcompress.reported import reported
from llmcompress.sizes import parse_count, parse_size

if TYPE_CHECKING:
    from llmcompress.progress import Progress
    from llmcompress.pruning_options import PruningOptions

Sparsity = Annotated[
    Optional[float],
    typer.Option("--sparsity", metavar="SHARE", help="Of the weights of the blocks' linears that become zeros.  [default: of prune 0.5, or the pattern's]"),
]  # fmt: skip
Pattern = Annotated[
    Optional[str],
    typer.Option("--pattern", metavar="N:M", help="Of every M weights in a row N stay, such as 2:4. No runtime here runs it faster: vLLM and llm-compressor have dropped 2:4."),
]  # fmt: skip
KeepZeros = Annotated[
    bool, typer.Option("--keep-zeros", help="Of a pruned model, with --method gptq: zeros stay zeros.")
]

# The options that only some methods know. A new method brings its name in JOBS, and what it alone understands here.
ZEROS = ("magnitude", "wanda", "sparsegpt")
BY_INPUTS = ("wanda", "sparsegpt")
SMALLER = ("layers", "width", "experts")
LOW_RANK = ("svd",)
KNOWN_TO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sparsity", "pattern", "shares", "keep"), ZEROS),
    **dict.fromkeys(("data", "tokens"), (*BY_INPUTS, *SMALLER, *LOW_RANK)),
    **dict.fromkeys(("chunk", "seed", "dtype", "device", "hidden_ram", "batch_tokens"), (*BY_INPUTS, *SMALLER)),
    "allocate": BY_INPUTS,
    "whole_model": ("magnitude",),
    "max_ram": (*ZEROS, *LOW_RANK),
    "drop": ("layers", "experts"),
    "layers": ("layers",),
    "ratio": ("width", "experts", *LOW_RANK),
    **dict.fromkeys(("rank", "hessian"), LOW_RANK),
    "parts": ("width",),
    "by": SMALLER,
    "by_score": ("wanda",),
    "effort": BY_INPUTS,
    **dict.fromkeys(("heal", "schedule", "max_loss", "patience", "heal_method", "heal_steps", "heal_lr"), ZEROS),
    **dict.fromkeys(("imatrix", "reference"), ("layers",)),
}  # fmt: skip
OF_HEALING = ("seed", "device")  # options that mean something to healing, too


@reported
def prune(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id; for --method layers a GGUF, too.")],
    out: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="The folder to make, or of a GGUF the file.")] = "{name}-pruned",
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="Which weights become zeros: magnitude, wanda, sparsegpt. Or what goes as a whole: layers, width, experts. Or svd: linears of low rank.")
    ] = "wanda",
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    whole_model: Annotated[bool, typer.Option("--global", help="Compare magnitudes across the whole model.")] = False,
    by_score: Annotated[
        bool, typer.Option("--by-score", help="Wanda's variant: rows give up the same share of their scores, not of their weights.")
    ] = False,
    shares: Annotated[
        Optional[str], typer.Option("--shares", metavar="FILE", help="JSON or TOML of sparsities by pattern of a tensor's name; the first match wins.")
    ] = None,
    keep: Annotated[
        Optional[list[str]], typer.Option("--keep", metavar="PATTERN", help="Tensors to leave as they are; repeat it.")
    ] = None,
    allocate: Annotated[
        str, typer.Option("--allocate", metavar="HOW", help="uniform, or owl: less where a layer has many outliers.")
    ] = "uniform",
    drop: Annotated[Optional[int], typer.Option("--drop", metavar="N", help="How many layers go, or experts of each layer.")] = None,
    layers: Annotated[
        Optional[str], typer.Option("--layers", metavar="NUMBERS", help="The layers that go, such as 20,21 or 20-22; no --drop.")
    ] = None,
    ratio: Annotated[
        Optional[float], typer.Option("--ratio", metavar="SHARE", help="Of the width, of each layer's experts, or of the ranks, that goes; of linears without ranks, of what two factors save.")
    ] = None,
    rank: Annotated[Optional[int], typer.Option("--rank", metavar="N", help="What is left of every rank, for svd; without ranks in config.json, of every linear.")] = None,
    hessian: Annotated[
        Optional[str], typer.Option("--hessian", metavar="DIR", help="A folder by calibrate --hessian, for svd; without one the model is calibrated on the way.")
    ] = None,
    parts: Annotated[
        Optional[str], typer.Option("--parts", metavar="PARTS", help="ffn, attention.  [default: both]")
    ] = None,
    by: Annotated[
        Optional[str],
        typer.Option("--by", metavar="MEASURE", help="Layers: kl, loss, influence. Width: reconstruction, norm. Experts: reap, output, use.  [default: the first]"),
    ] = None,
    effort: Annotated[
        str, typer.Option("--effort", metavar="EFFORT", help="Of letting what stays make up for what goes: fast, no more than the method's paper does; normal or best.")
    ] = "normal",
    imatrix: Annotated[
        Optional[str], typer.Option("--imatrix", metavar="FILE", help="Of a GGUF: its importance matrix, of which one for the result is made.")
    ] = None,
    reference: Annotated[
        Optional[str], typer.Option("--reference", metavar="MODEL", help="Of a GGUF: the model it was made from, on which --drop measures.")
    ] = None,
    data: Data = None,
    tokens: Annotated[
        Optional[str], typer.Option("--tokens", metavar="N", help="Tokens to calibrate on.  [default: 256k; for layers 16k]")
    ] = None,
    chunk: Chunk = 512,
    seed: Annotated[int, typer.Option("--seed", help="Decides which documents are taken, and their order.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="f32, bf16, mixed, or auto, to run the model in.")
    ] = "auto",
    device: Device = "auto",
    hidden_ram: HiddenRam = "1GiB",
    batch_tokens: Annotated[
        Optional[int], typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens run at once.  [default: by the model's width]")
    ] = None,
    heal: Annotated[
        Optional[list[str]],
        typer.Option("--heal", metavar="FILE", help="Then train on it, zeros held, to predict what the unpruned model does; as finetune's --data."),
    ] = None,
    schedule: Annotated[
        Optional[str], typer.Option("--schedule", metavar="A,B,...", help="With --heal: rising sparsities, each healed and measured.")
    ] = None,
    max_loss: Annotated[
        Optional[float],
        typer.Option("--max-loss", metavar="X", help="Nats for each held-out token that may be lost; a step that loses more is given up."),
    ] = None,
    patience: Annotated[int, typer.Option("--patience", metavar="N", help="Rounds of healing before it is.")] = 1,
    heal_method: Annotated[str, typer.Option("--heal-method", metavar="METHOD", help="full, lora or rslora.")] = "full",
    heal_steps: Annotated[
        Optional[int], typer.Option("--heal-steps", metavar="N", help="Of a round.  [default: by the number of examples]")
    ] = None,
    heal_lr: Annotated[Optional[float], typer.Option("--heal-lr", metavar="X", help="Learning rate.  [default: by the model's width]")] = None,
    split_max_size: Annotated[
        Optional[str], typer.Option("--split-max-size", metavar="SIZE", help="Of a file.  [default: 5GB]")
    ] = None,
    max_ram: Annotated[
        Optional[str], typer.Option("--max-ram", metavar="SIZE", help="Memory above the interpreter and its libraries, one block's weights with it.")
    ] = None,
    threads: Annotated[Optional[int], typer.Option("--threads", metavar="N", help="Workers.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Take weights away: an ordinary checkpoint, with zeros or smaller, and prune.json, which says what went."""
    given = dict(locals())
    _refuse_strangers(method, given)
    patient_threads()
    JOBS[method](given)


def _refuse_strangers(method: str, given: dict[str, Any]) -> None:
    """Raise RecipeError for a method that is none, and for an option that means nothing to it."""
    if method not in JOBS:
        raise RecipeError(f"--method {method}: is none of {', '.join(JOBS)}{nearest(method, JOBS)}")
    for name, parameter in inspect.signature(prune).parameters.items():
        known = KNOWN_TO.get(name, (method,))
        if given["heal"] and name in OF_HEALING:
            known = ZEROS
        if method not in known and given[name] != parameter.default:
            flag = "--global" if name == "whole_model" else f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag}: means nothing to --method {method}; it is for {', '.join(known)}")


def _zeros(given: dict[str, Any]) -> None:
    """Weights become zeros: magnitude, wanda, sparsegpt."""
    from llmcompress import model_display
    from llmcompress.converters.pruning import prune_model
    from llmcompress.pruning_options import PruningOptions, read_shares

    sizes = {name: given[name] and parse_size(given[name], f"--{name.replace('_', '-')}") for name in SIZES}
    options = PruningOptions(
        **{name: given[name] for name in SAME}, **sizes, tokens=parse_count(given["tokens"] or "256k", "--tokens"),
        shares=read_shares(given["shares"]) if given["shares"] else (), keep=tuple(given["keep"] or ()),
        data=tuple(given["data"] or ("default",)),
    )  # fmt: skip
    healed = _healed_steps(given, options)
    progress = model_display.live_progress()
    try:
        if healed:
            report, show = _gradual(given, healed, progress), model_display.show_gradual
        else:
            report, show = (
                prune_model(given["model"], given["out"], options, progress),
                model_display.show_pruning,
            )
    finally:
        progress.close()
    if given["as_json"]:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        show(report)


def _healed_steps(given: dict[str, Any], options: PruningOptions) -> list[PruningOptions]:
    """The steps of a pruning that is healed; none where it is not. Raises RecipeError for what needs --heal."""
    if not given["heal"]:
        parameters = inspect.signature(prune).parameters
        for name in ("schedule", "max_loss", "patience", "heal_method", "heal_steps", "heal_lr"):
            if given[name] != parameters[name].default:
                raise RecipeError(
                    f"--{name.replace('_', '-')}: is for healing; give --heal, data to train on"
                )
        return []
    if given["schedule"] is None:
        return [options]
    if given["sparsity"] is not None or given["pattern"]:
        raise RecipeError("--schedule: has the sparsities; leave --sparsity and --pattern out")
    try:
        return [replace(options, sparsity=float(share)) for share in given["schedule"].split(",")]
    except ValueError:
        raise RecipeError(f"--schedule {given['schedule']}: write it as 0.2,0.35,0.5") from None


def _gradual(given: dict[str, Any], steps: list[PruningOptions], progress: Progress) -> Any:
    import logging

    from transformers.utils.logging import disable_progress_bar

    from llmcompress.checkpoint import Checkpoint
    from llmcompress.converters.gradual import healing_options, prune_gradually

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it asks for kernels
    disable_progress_bar()
    with Checkpoint.open(given["model"]) as checkpoint:
        out = given["out"].replace("{name}", checkpoint.name)
        healing = healing_options(
            checkpoint, method=given["heal_method"], steps=given["heal_steps"], learning_rate=given["heal_lr"],
            seed=given["seed"], device=given["device"],
        )  # fmt: skip
    return prune_gradually(
        given["model"], out, steps, given["heal"], healing, given["max_loss"], given["patience"], progress
    )


SAME = ("method", "sparsity", "pattern", "whole_model", "by_score", "allocate", "effort", "chunk", "seed", "dtype",
        "batch_tokens", "device", "threads")  # fmt: skip


def _low_rank(given: dict[str, Any]) -> None:
    """Linears of low rank, svd: of the ranks that the architecture has, or where it has none, of all."""
    from llmcompress.checkpoint import Checkpoint
    from llmcompress.converters.ranks import pairs_of

    with Checkpoint.open(given["model"]) as checkpoint:
        checkpoint.require_plain()
        pairs = pairs_of(checkpoint)
    if pairs:
        if stray := [f"--{name.replace('_', '-')}" for name in ("hessian", "max_ram") if given[name]]:
            raise RecipeError(
                f"{stray[0]}: not for a model with ranks in its config.json, which runs block by block"
            )
        structure_command.make_smaller(given)
    else:
        _truncated(given)


def _truncated(given: dict[str, Any]) -> None:
    """Every linear the product of two factors."""
    from llmcompress import model_display
    from llmcompress.converters.truncation import plan_truncation, run_truncation
    from llmcompress.display import show_result
    from llmcompress.recipe import Recipe

    sizes = {
        name: parse_size(given[name], f"--{name.replace('_', '-')}") for name in SIZES[1:] if given[name]
    }
    sizes.setdefault("max_ram", UNBOUNDED)
    recipe = Recipe(
        method="gptq", hessian=given["hessian"], calibrate=not given["hessian"], threads=given["threads"],
        data=tuple(given["data"] or ("default",)), tokens=parse_count(given["tokens"] or "256k", "--tokens"), **sizes,
    )  # fmt: skip
    progress = model_display.live_progress()
    try:
        plan = plan_truncation(given["model"], given["out"], recipe, given["rank"], given["ratio"])
        with plan.checkpoint:
            result = run_truncation(plan, progress)
    finally:
        progress.close()
    if given["as_json"]:
        typer.echo(json.dumps(result.as_dict(), indent=1, default=str))
    else:
        show_result(result)


UNBOUNDED = 2**50  # bytes: a worker takes what its matrix does
SIZES = ("hidden_ram", "split_max_size", "max_ram")
JOBS: dict[str, Callable[[dict[str, Any]], None]] = {
    **dict.fromkeys(ZEROS, _zeros),
    **dict.fromkeys(SMALLER, structure_command.make_smaller),
    **dict.fromkeys(LOW_RANK, _low_rank),
}
