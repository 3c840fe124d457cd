"""Chat templates, wherever transformers has kept them over the years."""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from llmcompress.errors import TokenizerError
from llmcompress.json_object import read_object
from llmcompress.small_file import read_text

DEFAULT = "default"


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> Jinja source. `config` is tokenizer_config.json.

    As transformers does: chat_template.jinja with additional_chat_templates/*.jinja goes before
    tokenizer_config.json, which goes before chat_template.json.
    """
    file = directory / "chat_template.jinja"
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if file.is_file() or more:
        files = ([(DEFAULT, file)] if file.is_file() else []) + [(path.stem, path) for path in more]
        return {_plain(name): read_text(path) for name, path in files}
    where, entry = directory / "tokenizer_config.json", config.get("chat_template")
    if entry is None and (directory / "chat_template.json").is_file():
        where = directory / "chat_template.json"
        entry = read_object(where).get("chat_template")
    if entry is None:
        return {}
    return {_plain(name): text for name, text in _named(entry, where)}


def _named(entry: Any, where: Path) -> list[tuple[str, str]]:
    """One template is a string; several are a list of `{"name", "template"}`, or an object of names."""
    if isinstance(entry, str):
        return [(DEFAULT, entry)]
    if isinstance(entry, dict):
        named = list(entry.items())
    else:
        items = entry if isinstance(entry, list) else []
        named = [(item.get("name"), item.get("template")) for item in items if isinstance(item, dict)]
    if not named or not all(isinstance(part, str) for pair in named for part in pair):
        raise TokenizerError(
            f"{where}: chat_template is neither text nor a list of named texts; correct or remove it"
        )
    return named


def _plain(name: str) -> str:
    """The name as it can stand in a metadata key."""
    return "".join(c if c in ascii_letters + digits else "_" for c in name)
