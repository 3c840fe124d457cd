"""A list of steps in a YAML file for `llmcompress run`: each is a command of ours with its options.

    folder: out                  # for all that a step names no place for; by default the file's name without .yaml
    steps:
      - prune: {model: org/name, method: layers, drop: 4}
        name: pruned             # so that a later step can say ${pruned}; by default the command's name
      - finetune: {data: [heal.jsonl]}
      - merge: {model: "${pruned}", adapter: "${finetune}"}
      - quantize: {type: Q4_K_M}

Options are those of the command line, in their long form without dashes in front; a list repeats one. What a step works on, its
command's first argument, is by default what the step before it made. Not to be mistaken for the recipe of one job (recipe.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import RecipeError, nearest, shown
from llmcompress.small_file import read_bytes

COMMANDS = {  # what a step may be, and what becomes of its output's name: an ending
    "prune": "", "finetune": "", "distill": "", "merge": "", "quantize": ".gguf", "convert": ".gguf", "calibrate": ".gguf",
    "evaluate": None, "convert-lora": ".gguf", "compensate": "",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Argument:
    """An argument or option of a command. flag: as it is written, such as --drop; None for an argument.
    repeats: it may be given several times. switch: it takes no value; off: the flag that takes it back."""

    name: str
    flag: str | None
    repeats: bool = False
    switch: bool = False
    off: str | None = None


@dataclass(frozen=True)
class ListedStep:
    """A step, checked. words: what to run. output: what it makes, None for a command that makes nothing. uses: the names
    of earlier steps whose outputs are among its words."""

    name: str
    command: str
    words: tuple[str, ...]
    output: str | None
    uses: tuple[str, ...]


def read_steps(
    path: str | Path, arguments: Callable[[str], Sequence[Argument]]
) -> tuple[Path, list[ListedStep]]:
    """The folder and the steps of a file. `arguments` tells those of a command. Raises RecipeError for whatever is not as above."""
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("steps"), list) or not data["steps"]:
        raise RecipeError(
            f"{path}: has no list of steps; write 'steps:' and below it such as '- quantize: {{model: org/name}}'"
        )
    for key in data.keys() - {"folder", "steps"}:
        raise RecipeError(
            f"{path}: {shown(key)} is none of folder, steps{nearest(str(key), ('folder', 'steps'))}"
        )
    folder = data.get("folder", str(path.with_suffix("")) if path.suffix else f"{path}.out")
    if not isinstance(folder, str) or not folder:
        raise RecipeError(f"{path}: folder is {shown(folder)}, not a folder's name")
    known: dict[str, str] = {}
    steps: list[ListedStep] = []
    previous = None
    for number, said in enumerate(data["steps"], 1):
        step = _step(f"{path}: step {number}", said, Path(folder), known, previous, arguments)
        steps.append(step)
        if step.output:
            known[step.name] = previous = step.output
        else:
            known.setdefault(step.name, "")
    return Path(folder), steps


def _step(
    where: str, said: Any, folder: Path, known: Mapping[str, str], previous: str | None,
    arguments: Callable[[str], Sequence[Argument]],
) -> ListedStep:  # fmt: skip
    if not isinstance(said, Mapping):
        raise RecipeError(
            f"{where}: is a {type(said).__name__}; write it as '- prune: {{method: layers, drop: 4}}'"
        )
    commands = [key for key in said if key != "name"]
    if len(commands) != 1 or commands[0] not in COMMANDS:
        word = str(commands[0]) if commands else ""
        raise RecipeError(
            f"{where}: has to be one of {', '.join(COMMANDS)}, found {shown(commands)}{nearest(word, COMMANDS)}"
        )
    command, options = commands[0], said[commands[0]] or {}
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"{where}: the options of {command} are {shown(options)}, not a mapping such as {{type: Q4_K_M}}"
        )
    name = said.get("name", _free(command, known))
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in known or name == "previous":
        raise RecipeError(
            f"{where}: its name {shown(name)} is taken, or not of letters, digits, dots and dashes"
        )
    filler = _Filler(where, known, previous)
    by_name = {argument.name: argument for argument in arguments(command)}
    options = {str(key).replace("_", "-"): value for key, value in options.items()}
    for key in options:
        if key not in by_name or key == "json":
            raise RecipeError(f"{where}: {command} has no option {shown(key)}{nearest(key, by_name)}")
    positional = [argument for argument in by_name.values() if argument.flag is None]
    if positional and positional[0].name not in options and previous is not None:
        options = {positional[0].name: "${previous}", **options}
    output = None
    if COMMANDS[command] is not None:
        output = filler.filled(options.pop("output", str(folder / f"{name}{COMMANDS[command]}")))
    words = [command]
    for argument in positional:
        if argument.name in options:
            words.append(filler.filled(options.pop(argument.name)))
    for key, value in options.items():
        words += _words(where, by_name[key], value, filler)
    words += ["--output", output] if output else []
    words += ["--json"] if "json" in by_name else []
    return ListedStep(name, command, tuple(words), output, tuple(filler.used))


def _free(command: str, known: Mapping[str, str]) -> str:
    """The command's name, with a number where it comes again."""
    number = 2
    name = command
    while name in known:
        name, number = f"{command}-{number}", number + 1
    return name


def _words(where: str, argument: Argument, value: Any, filler: _Filler) -> list[str]:
    """An option as it is written on the command line."""
    if argument.switch:
        if not isinstance(value, bool):
            raise RecipeError(f"{where}: {argument.name} is {shown(value)}, it must be true or false")
        return [argument.flag] if value else [argument.off] if argument.off else []
    if isinstance(value, list) and not argument.repeats:
        value = ",".join(str(part) for part in value)  # such as layers: [20, 21]
    values = value if isinstance(value, list) else [value]
    return [word for part in values for word in (argument.flag, filler.filled(part))]


class _Filler:
    """Puts what earlier steps made in the place of their names."""

    def __init__(self, where: str, known: Mapping[str, str], previous: str | None) -> None:
        self.where, self.known, self.previous = where, known, previous
        self.used: dict[str, None] = {}

    def filled(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise RecipeError(f"{self.where}: {shown(value)} is no text or number")
        return _REFERENCE.sub(self._output, str(value))

    def _output(self, match: re.Match[str]) -> str:
        name = match[1]
        found = self.previous if name == "previous" else self.known.get(name)
        if not found:
            raise RecipeError(
                f"{self.where}: ${{{name}}} is nothing that a step before it made{nearest(name, self.known)}"
            )
        self.used[next(key for key, output in self.known.items() if output == found)] = None
        return found
