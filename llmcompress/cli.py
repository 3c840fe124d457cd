"""The program. Commands import what they need when they are called, so that --help answers at once."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, Optional

import typer

from llmcompress import (
    __version__,
    adapter_commands,
    compensate_command,
    finetune_command,
    model_commands,
    prune_command,
    run_command,
    sensitivity_command,
    stats_commands,
)
from llmcompress.errors import RecipeError
from llmcompress.reported import reported

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Hugging Face language models to GGUF: quantized in one pass with bounded memory, calibrated, evaluated.",
)

# Options of quantize alone.
OF_CHECKPOINTS = {"format", "bits", "group_size", "sym", "desc_act", "double_quant", "storage", "keep"}
OUT = "{name}-{type}.gguf"
CONVERT_TYPES = ("auto", "F32", "F16", "BF16", "Q8_0")

Model = Annotated[
    str, typer.Argument(help="A model directory, or a hub id such as org/name or org/name@revision.")
]
Out = Annotated[
    str,
    typer.Option(
        "-o", "--output", metavar="PATH", help="A file, a folder, or a template with {name} and {type}."
    ),
]
Types = Annotated[
    Optional[list[str]],
    typer.Option(
        "--type",
        "-t",
        metavar="TYPE",
        help="File type such as Q4_K_M; repeat for several files from one read.  [default: Q4_K_M, of convert auto]",
    ),
]
TensorTypes = Annotated[
    Optional[list[str]],
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the tensors whose GGUF name the pattern is found in; the first match wins.",
    ),
]
OutputType = Annotated[
    Optional[str], typer.Option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
]
EmbeddingType = Annotated[
    Optional[str], typer.Option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
]
Pure = Annotated[bool, typer.Option("--pure", help="One type for all tensors, no mix.")]
LeaveOutput = Annotated[
    bool, typer.Option("--leave-output-tensor", help="Keep output.weight as the checkpoint has it.")
]
Fallback = Annotated[
    Optional[str],
    typer.Option(
        "--fallback",
        metavar="WHOSE",
        help="Types for rows that do not divide into blocks: llama.cpp's, or the best measured.  [default: llama.cpp]",
    ),
]
Imatrix = Annotated[
    Optional[str],
    typer.Option("--imatrix", metavar="FILE", help="Importance matrix: a GGUF or .dat by llama-imatrix."),
]
Adapter = Annotated[
    Optional[str],
    typer.Option("--adapter", metavar="DIR", help="A peft adapter to merge into the weights on the way."),
]
Onto = Annotated[
    Optional[str],
    typer.Option(
        "--onto",
        metavar="BASE",
        help="Merge it into the weights as they are, 16bit, or rounded to nf4.  [default: as it was trained]",
    ),
]
Calibrate = Annotated[bool, typer.Option("--calibrate", help="Make the importance on the way, from --data.")]
Tokens = Annotated[
    Optional[str], typer.Option("--tokens", metavar="N", help="Tokens to calibrate on.  [default: 256k]")
]
Sequential = Annotated[bool, typer.Option("--sequential", help="Calibrate on the quantized blocks before.")]
Method = Annotated[
    Optional[str],
    typer.Option("--method", metavar="METHOD", help="nearest, or gptq: error feedback.  [default: nearest]"),
]
Hessian = Annotated[
    Optional[str],
    typer.Option("--hessian", metavar="DIR", help="A folder by calibrate --hessian, for --method gptq."),
]
Format = Annotated[
    Optional[str],
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="gguf, or a checkpoint folder: gptq, nf4, fp4, int8.  [default: gguf]",
    ),
]
Bits = Annotated[
    Optional[int],
    typer.Option("--bits", metavar="N", help="2, 3, 4 or 8, for --format gptq.  [default: 4]"),
]
GroupSize = Annotated[
    Optional[int],
    typer.Option(
        "--group-size", metavar="N", help="Weights to a scale: 32, 64, 128, or -1: a row.  [default: 128]"
    ),
]
Sym = Annotated[
    Optional[bool],
    typer.Option("--sym/--no-sym", help="Zero in the middle of the codes, or fitted.  [default: sym]"),
]
DescAct = Annotated[bool, typer.Option("--desc-act", help="Round columns in the order of their importance.")]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="Scales of nf4 and fp4 in eight bits.")]
Storage = Annotated[
    Optional[str],
    typer.Option("--storage", metavar="TYPE", help="What nf4's bytes count as, for FSDP.  [default: uint8]"),
]
Keep = Annotated[
    Optional[list[str]],
    typer.Option(
        "--keep", metavar="PATTERN", help="Linears of nf4, fp4, int8 to leave as they are; repeat it."
    ),
]
TargetSize = Annotated[
    Optional[str],
    typer.Option(
        "--target-size", metavar="SIZE", help="The best file of this size, such as 4.0GiB; no --type."
    ),
]
TargetBpw = Annotated[
    Optional[str],
    typer.Option("--target-bpw", metavar="BITS", help="The same, by bits per weight, such as 4.25."),
]
SensitivityFile = Annotated[
    Optional[str],
    typer.Option(
        "--sensitivity", metavar="FILE", help="Errors measured before by `sensitivity`, for a target."
    ),
]
Confirm = Annotated[
    Optional[int],
    typer.Option(
        "--confirm",
        metavar="N",
        help="Swaps of types to try by measuring KL divergence on --data, for a target.",
    ),
]
Effort = Annotated[
    Optional[str],
    typer.Option(
        "--effort",
        metavar="EFFORT",
        help="How long to search for the best scales: fast, normal or best.  [default: normal]",
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--architecture", metavar="NAME", help="Class to convert as, for one that is another underneath."
    ),
]
Mtp = Annotated[
    Optional[str], typer.Option("--mtp", metavar="WHAT", help="keep or drop the layers that predict further tokens.")
]  # fmt: skip
Pre = Annotated[
    Optional[str],
    typer.Option("--pre", metavar="NAME", help="Name of the pre-tokenizer, where it cannot be found."),
]
Name = Annotated[
    Optional[str], typer.Option("--name", metavar="NAME", help="The model's name in the file (general.name).")
]
Split = Annotated[
    Optional[str],
    typer.Option("--split-max-size", metavar="SIZE", help="Write shards of at most this size, such as 4G."),
]
MaxRam = Annotated[
    Optional[str],
    typer.Option(
        "--max-ram", metavar="SIZE", help="Memory above the interpreter and its libraries.  [default: 512MiB]"
    ),
]
Threads = Annotated[
    Optional[int],
    typer.Option("--threads", metavar="N", help="Workers.  [default: one more than the cores there are]"),
]
Verify = Annotated[
    Optional[str],
    typer.Option(
        "--verify",
        metavar="ROWS",
        help="Rows to decode and compare afterwards: off, sample or full.  [default: sample]",
    ),
]
RecipeFile = Annotated[
    Optional[str],
    typer.Option("--recipe", metavar="FILE", help="YAML file with any of these; a flag wins over it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]


def job(
    name: str, summary: str, types: tuple[str, ...], allowed: tuple[str, ...] = (), dry: bool = False
) -> None:
    """Register a command that makes GGUF files: they differ in default types and in whether they run. `quantize` makes
    checkpoints, too."""

    @reported
    def command(
        model: Model, out: Out = OUT, type: Types = None, tensor_type: TensorTypes = None,
        output_tensor_type: OutputType = None, token_embedding_type: EmbeddingType = None, pure: Pure = False,
        leave_output_tensor: LeaveOutput = False, fallback: Fallback = None, adapter: Adapter = None, onto: Onto = None, imatrix: Imatrix = None,
        target_size: TargetSize = None, target_bpw: TargetBpw = None, sensitivity: SensitivityFile = None,
        gains: sensitivity_command.Gains = None, confirm: Confirm = None, sparsity: prune_command.Sparsity = None, pattern: prune_command.Pattern = None, keep_zeros: prune_command.KeepZeros = False,
        method: Method = None, hessian: Hessian = None, calibrate: Calibrate = False, sequential: Sequential = False, data: model_commands.Data = None, tokens: Tokens = None, effort: Effort = None, architecture: Architecture = None, mtp: Mtp = None, pre: Pre = None, model_name: Name = None, split_max_size: Split = None,
        max_ram: MaxRam = None, threads: Threads = None, verify: Verify = None, recipe: RecipeFile = None,
        as_json: AsJson = False, dry_run: DryRun = False, format: Format = None, bits: Bits = None,
        group_size: GroupSize = None, sym: Sym = None, desc_act: DescAct = False, double_quant: DoubleQuant = False,
        storage: Storage = None, keep: Keep = None,
    ) -> None:  # fmt: skip
        flags = {
            "types": [part for given in type for part in given.split(",")] if type else None,
            "tensor_types": _pairs(tensor_type) if tensor_type else None, "output_tensor_type": output_tensor_type,
            "token_embedding_type": token_embedding_type, "pure": pure or None,
            "leave_output_tensor": leave_output_tensor or None, "fallback": fallback, "adapter": adapter, "onto": onto, "imatrix": imatrix,
            "target_size": target_size, "target_bpw": target_bpw, "sensitivity": sensitivity,
            "gains": gains, "confirm": confirm, "sparsity": sparsity, "pattern": pattern, "keep_zeros": keep_zeros or None,
            "method": method, "hessian": hessian, "calibrate": calibrate or None, "sequential": sequential or None, "data": data, "tokens": tokens,
            "effort": effort, "architecture": architecture, "mtp": mtp, "pre": pre, "name": model_name, "split_max_size": split_max_size, "max_ram": max_ram,
            "threads": threads, "verify": verify, "format": format, "bits": bits, "group_size": group_size, "sym": sym,
            "desc_act": desc_act or None, "double_quant": double_quant or None, "storage": storage, "keep": keep,
        }  # fmt: skip
        merged = _recipe(recipe, {key: value for key, value in flags.items() if value is not None}, types)
        for given in merged.types:
            if allowed and given.upper() not in (word.upper() for word in allowed):
                raise RecipeError(
                    f"--type {given}: {name} writes {', '.join(allowed)}; for {given} use quantize"
                )
        _carry_out(model, out, merged, as_json, dry or dry_run)

    if name != "quantize":
        command.__signature__ = _without(inspect.signature(command, eval_str=True), OF_CHECKPOINTS)
    app.command(name, help=summary)(command)


def _without(signature: inspect.Signature, names: set[str]) -> inspect.Signature:
    kept = [parameter for name, parameter in signature.parameters.items() if name not in names]
    return signature.replace(parameters=kept)


def _recipe(path: str | None, flags: dict[str, Any], types: tuple[str, ...]):
    from llmcompress.recipe import Recipe, parse_recipe, read_recipe

    onto = Recipe(types=types)
    return parse_recipe(flags, read_recipe(path, onto) if path else onto, label=_flag)


def _flag(field: str) -> str:
    """The flag of a recipe's field; those that can be repeated are in the singular."""
    return "--" + {"types": "type", "tensor_types": "tensor-type"}.get(field, field.replace("_", "-"))


def _pairs(given: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(text.rpartition("=")[::2]) for text in given]
    for text, (pattern, kind) in zip(given, pairs):
        if not pattern or not kind:
            raise RecipeError(f"--tensor-type {text}: write it as PATTERN=TYPE, such as ffn_down=Q6_K")
    return pairs


def _carry_out(model: str, out: str, recipe, as_json: bool, dry: bool) -> None:
    from llmcompress import display
    from llmcompress.converters.to_gguf import plan_gguf
    from llmcompress.run import run

    if recipe.format != "gguf":
        model_commands.make_checkpoint(
            model, out.removesuffix(".gguf") if out == OUT else out, recipe, as_json, dry
        )
        return
    if recipe.calibrate or recipe.method != "nearest":
        model_commands.patient_threads()
    progress = display.live_progress()
    try:
        plan = plan_gguf(model, out, recipe, progress)
        if dry:
            _print(display.plan_dict(plan)) if as_json else display.show_plan(plan)
            return
        with plan.checkpoint:
            result = run(plan, progress)
    finally:
        progress.close()
    _print(result.as_dict()) if as_json else display.show_result(result)


def _print(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=1, default=str))


job(
    "quantize",
    "Make quantized GGUF files, or a checkpoint in GPTQ's or bitsandbytes' formats, of a model.",
    types=("Q4_K_M",),
)
job("convert", "Make an unquantized (or Q8_0) GGUF file of a model.", types=("auto",), allowed=CONVERT_TYPES)
job(
    "plan",
    "Show what quantize would do: every tensor, its type and why, bytes, memory, disk.",
    types=("Q4_K_M",),
    dry=True,
)


app.command("calibrate")(model_commands.calibrate)
app.command("evaluate")(model_commands.evaluate)
app.command("finetune")(finetune_command.finetune)
app.command("compensate")(compensate_command.compensate)
app.command("prune")(prune_command.prune)
app.command("run")(run_command.run)
app.command("distill")(finetune_command.distill)
app.command("merge")(adapter_commands.merge)
app.command("convert-lora")(adapter_commands.convert_lora)
app.command("sensitivity")(sensitivity_command.sensitivity)
app.add_typer(stats_commands.app, name="stats")


@app.command("inspect")
@reported
def inspect_command(
    path: Annotated[str, typer.Argument(help="A GGUF or safetensors file, or a model directory.")],
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    tokenizer: Annotated[
        Optional[str],
        typer.Option(
            "--tokenizer", metavar="MODEL", help="Hold llama.cpp's ids of many texts against this model's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a file's metadata, tensors and bits per weight, or how far its tokenizer agrees with its model's."""
    from llmcompress import display

    if tokenizer:
        from llmcompress import hub
        from llmcompress.converters.tokenizer_check import check_tokenizer

        checked = check_tokenizer(path, hub.resolve(tokenizer))
        _print(checked.as_dict()) if as_json else display.show_tokenizer_check(checked)
        return
    from llmcompress.inspect import inspect

    found = inspect(path)
    _print(found.as_dict()) if as_json else display.show_inspection(found, tensors)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmcompress {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before a command."""


def main() -> None:
    app()
