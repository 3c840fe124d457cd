"""`llmcompress run`: several commands in a row, the outputs of one feeding the next.

All steps are checked before the first begins. Each runs as a process of its own, so that what it held is given back. What is
finished is noted in `run.json` of the folder, with a fingerprint of the command, of the files it was given and of the steps it
builds on; it is not done again while that stays the same. A step that was stopped goes on as its command does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress import __version__
from llmcompress.errors import InterruptedRun, RecipeError
from llmcompress.json_object import parse_object, read_object
from llmcompress.reported import reported
from llmcompress.step_list import Argument, ListedStep, read_steps
from llmcompress.whole_file import whole_file

REPORT = "run.json"
UsageError = typer.BadParameter.__mro__[1]  # of the click that typer brings, or uses


@reported
def run(
    context: typer.Context,
    steps: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file with a list of steps.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all steps, print their commands and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:  # fmt: skip
    """Run a list of steps: prune, heal, quantize and the like; finished ones are not done again."""
    program = context.find_root().command
    folder, listed = read_steps(steps, lambda command: _arguments(program, context, command))
    done = _Done(folder)
    states = [(step, done.fingerprint(step)) for step in listed]
    for step, fingerprint in states:
        _check(program, context, step, done.has(step, fingerprint))
    for step, fingerprint in states:
        finished = done.has(step, fingerprint)
        if not as_json:
            typer.echo(
                f"{step.name}: {'finished before' if finished else ''} llmcompress {' '.join(step.words)}"
            )
        if not dry_run and not finished:
            done.add(step, fingerprint)  # whatever a step makes has its name only when it is whole
            done.add(step, fingerprint, *_carried_out(step))
    if not dry_run:
        report = done.report([step.name for step in listed])
        typer.echo(json.dumps(report, indent=1)) if as_json else _show(report)


def _arguments(program: Any, context: typer.Context, command: str) -> list[Argument]:
    """What a command takes. Raises RecipeError for one that this version does not have."""
    found = program.get_command(context, command)
    if found is None:
        raise RecipeError(f"{command}: this llmcompress has no such command")
    arguments = []
    for parameter in found.params:
        flags = [flag for flag in getattr(parameter, "opts", ()) if flag.startswith("--")]
        if parameter.param_type_name == "argument":
            arguments.append(Argument(parameter.name.replace("_", "-"), None))
        elif flags and "--help" not in flags:
            off = next(iter(parameter.secondary_opts), None)
            arguments.append(
                Argument(flags[0][2:], flags[0], bool(parameter.multiple), bool(parameter.is_flag), off)
            )
    return arguments


def _check(program: Any, context: typer.Context, step: ListedStep, finished: bool) -> None:
    """Raise RecipeError for words that the command would refuse, and for an output that another run has made."""
    try:
        program.get_command(context, step.command).make_context(step.command, list(step.words[1:]))
    except UsageError as error:
        raise RecipeError(
            f"step {step.name} ({step.command}): {' '.join(error.format_message().split())}"
        ) from None
    output = Path(step.output) if step.output and "{" not in step.output else None
    if output and output.exists() and not finished:
        raise RecipeError(
            f"step {step.name}: {output} is there already, not by these steps; remove it, or name another output"
        )


def _carried_out(step: ListedStep) -> tuple[float, dict[str, Any]]:
    """Seconds, and the command's own report. Raises InterruptedRun where it failed."""
    started = time.monotonic()
    if step.output:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "llmcompress", *step.words], stdout=subprocess.PIPE, check=False
        )
    except OSError as error:
        raise InterruptedRun(f"step {step.name}: cannot be started: {error.strerror}") from None
    if ended.returncode:
        raise InterruptedRun(
            f"step {step.name} ({step.command}) ended with exit code {ended.returncode}; the same command goes on from there"
        )
    text = ended.stdout
    if "--json" not in step.words:
        return time.monotonic() - started, {"said": text.decode(errors="replace").strip()}
    return time.monotonic() - started, parse_object(text, f"step {step.name}")


class _Done:
    """What is finished, by the step's name. Raises LlmcompressError for a folder that is none or a damaged report."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / REPORT
        self.steps: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            held = read_object(self.file).get("steps")
            if not isinstance(held, dict) or not all(isinstance(step, dict) for step in held.values()):
                raise RecipeError(f"{self.file}: is damaged; remove it, and the outputs beside it")
            self.steps = held
        self._fingerprints: dict[str, str] = {}
        self._outputs: dict[str, str | None] = {}

    def fingerprint(self, step: ListedStep) -> str:
        """Equal for two runs of a step that make the same."""
        made = {self._outputs[name] for name in step.uses}
        stamps = [_stamp(Path(word)) for word in step.words[1:] if word not in made and word != step.output]
        before = [self._fingerprints[name] for name in step.uses]
        said = repr((__version__, step.words, before, stamps))
        self._fingerprints[step.name] = hashlib.sha256(said.encode()).hexdigest()
        self._outputs[step.name] = step.output
        return self._fingerprints[step.name]

    def has(self, step: ListedStep, fingerprint: str) -> bool:
        """Whether the step is finished, and what it made still there."""
        known = self.steps.get(step.name)
        outputs = [step.output] if step.output and "{" not in step.output else []
        if not known or known.get("fingerprint") != fingerprint:
            return False
        return all(Path(path).exists() for path in outputs) if outputs else bool(known.get("report"))

    def add(
        self, step: ListedStep, fingerprint: str, seconds: float = 0.0, report: dict[str, Any] | None = None
    ) -> None:
        """Note a step that begins; and again, with its report, one that is finished."""
        self.steps[step.name] = {
            "command": ["llmcompress", *step.words], "output": step.output, "fingerprint": fingerprint,
            "seconds": round(seconds, 1), "report": report or {},
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.file) as file:
            file.write((json.dumps({"version": __version__, "steps": self.steps}, indent=1) + "\n").encode())

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        return {"version": __version__, "steps": {name: self.steps[name] for name in names}}


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of the files in a folder; nothing for a word that is neither."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    except OSError:  # a name that cannot be one of a file
        return []


def _show(report: dict[str, Any]) -> None:
    """What every step made, how large it is and how long it took; of evaluations, the figures."""
    for name, step in report["steps"].items():
        output = Path(step["output"]) if step["output"] else None
        size = ""
        if output and output.exists():
            files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
            size = f"{output}, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB, "
        figures = step["report"].get("figures") if step["command"][1] == "evaluate" else None
        found = [
            f"{key} {figures[key]['value']:.4f}"
            for key in ("perplexity", "reference_perplexity", "mean_kl")
            if figures and key in figures
        ]
        typer.echo(f"{name}: {size}{step['seconds']} s{', ' if found else ''}{', '.join(found)}")
