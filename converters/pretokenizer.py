"""Finds the name by which llama.cpp knows a byte-level BPE tokenizer's pre-tokenizer.

A pre-tokenizer is a list of regexes that split text into words before the merges run. tokenizer.json holds
that list, GGUF only a name. So the list is brought into one canonical form and compared with the lists that
llama.cpp compiles under each name. It depends on neither token ids nor chat template, so a fine-tune keeps
its name; the hash of some encoded text, which is what llama.cpp's converter goes by, is the fallback.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from llmcompress.converters.tokenizer_files import pattern_of

from llmcompress.errors import TokenizerError, nearest

# What ByteLevel splits by: GPT-2's regex.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("pretokenizers.json").read_text("utf-8"))


def known_names() -> list[str]:
    """Every pre-tokenizer name that llama.cpp loads."""
    return [name for group in _table()["groups"] for name in group["names"]]


def check_name(name: str) -> str:
    """The name itself. Raises TokenizerError, with the nearest known one, where llama.cpp has it not."""
    if name not in known_names():
        raise TokenizerError(
            f"--pre {name}: llama.cpp knows no such pre-tokenizer{nearest(name, known_names())}"
        )
    return name


def find_pretokenizer(
    steps: list[dict],
    flags: dict[str, bool],
    encode: Callable[[str], list[int]],
    where: str,
) -> tuple[str, str]:
    """(name, how it was found) for the steps of a tokenizer.json's `pre_tokenizer`.

    `flags` are those of pretokenizers.json that are known of this tokenizer: `ignore_merges`, if there, must agree, and
    of the names left the one that agrees in most others is taken. `encode` gives the ids of a text, special
    tokens included; it is called only where no regex list matches. Raises TokenizerError where nothing does.
    """
    stages = tuple(stage for step in steps if (stage := _stage(step)))
    names = _names_of(stages)
    whole = flags.get("ignore_merges")
    fitting = [name for name in names if whole in (None, "ignore_merges" in names[name])]
    if fitting:
        return max(fitting, key=lambda name: _agreement(names[name], flags)), "its regexes and flags"
    digest = hashlib.sha256(str(encode(_table()["check_text"])).encode()).hexdigest()
    if digest in _table()["hashes"]:
        return _table()["hashes"][digest], "the hash of the check text"
    if names:
        return next(
            iter(names)
        ), "its regexes (llama.cpp has none that treats whole words in the vocabulary so)"
    raise TokenizerError(
        f"{where}: llama.cpp has no pre-tokenizer with the regexes {' then '.join(stages) or '(none)'}; "
        f"the nearest are {', '.join(_nearest_names(stages))}: choose one with --pre NAME"
    )


def _agreement(has: list[str], flags: dict[str, bool]) -> int:
    return sum((flag in has) == value for flag, value in flags.items())


def _names_of(stages: tuple[str, ...]) -> dict[str, list[str]]:
    """The names whose regex list is this one, with their flags."""
    for original in _table()["originals"]:
        if _canonical_list(original["stages"]) == stages:
            return _group(original["like"])
    for group in _table()["groups"]:
        if not group.get("raw") and _canonical_list(group["regexes"]) == stages:
            return group["names"]
    return {}


def _group(name: str) -> dict[str, list[str]]:
    return next(group["names"] for group in _table()["groups"] if name in group["names"])


def _nearest_names(stages: tuple[str, ...]) -> list[str]:
    """The first name of each of the three groups whose regexes read most alike."""
    text = " ".join(stages)

    def likeness(group: dict) -> float:
        return difflib.SequenceMatcher(None, text, " ".join(_canonical_list(group["regexes"]))).ratio()

    return [
        next(iter(group["names"])) for group in sorted(_table()["groups"], key=likeness, reverse=True)[:3]
    ]


def _stage(step: dict) -> str | None:
    """The regex that a step of a pre-tokenizer splits by, canonical; None where it splits nothing."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return canonical(_GPT2) if step.get("use_regex", True) else None
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    regex = pattern_of(step, "Regex")
    if kind != "Split" or regex is None:
        return " ".join(
            str(part) for part in (kind, step.get("behavior"), pattern_of(step, "String")) if part
        )
    # Removing what lies between matches keeps them, as isolating them does where the regex covers all text.
    how = (step.get("behavior"), step.get("invert") is True)
    isolates = how in (("Isolated", False), ("Isolated", True), ("Removed", True))
    return canonical(regex) if isolates else f"{canonical(regex)} {how[0]}"


def _canonical_list(regexes: list[str]) -> tuple[str, ...]:
    return tuple(canonical(regex) for regex in regexes)


def canonical(regex: str) -> str:
    """One spelling of regexes that split alike: no inline flags, possessive quantifiers or last `|\\s+`."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    regex = re.sub(r"\(\?i:((?:\[[^\]]*\]|[^()\[\]])*)\)", lambda m: f"(?:{_either_case(m[1])})", regex)
    regex = regex.replace("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _CONTRACTIONS)
    regex = re.sub(r"((?<!\\)[?*+]|\{[\d,]+\})\+", r"\1", regex).replace("{1}", "")
    # What no alternative matches is kept as a piece of its own, and that is what a last |\s+ would do.
    return regex.removesuffix(r"|\s+")


def _either_case(regex: str) -> str:
    """Spells out case-insensitivity: `[sd]|ll` becomes `[sSdD]|[lL][lL]`."""

    def spell(match: re.Match) -> str:
        text = match[0]
        if text.startswith("["):
            return "".join(c + c.upper() if c.islower() else c for c in text)
        return f"[{text}{text.upper()}]"

    return re.sub(r"\[[^\]]*\]|[a-z]", spell, regex)
