"""The bundled calibration texts: each with its origin stated, readable, varied and packaged."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from llmcompress.calibration_data import NAMES, path, read

from llmcompress.errors import RecipeError

KINDS = ("code", "dialogue", "languages", "mathematics", "prose", "tables")
SEPARATOR = "---8<---"


def test_the_kinds_there_are() -> None:
    assert NAMES == KINDS


def test_every_file_has_its_source_stated_and_the_reverse(root: Path) -> None:
    folder = root / "calibration_data"
    sources = tomllib.loads((folder / "SOURCES.toml").read_text(encoding="utf-8"))
    texts = {file.name for file in folder.iterdir() if file.suffix not in {".py", ".toml"} and file.is_file()}
    assert set(sources) == texts == {path(name).name for name in NAMES}
    for source in sources.values():
        assert set(source) == {"kind", "contents", "licence", "origin"} and source["licence"] == "CC0-1.0"


def test_every_file_is_packaged(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["llmcompress.calibration_data"]
    for file in (*map(path, NAMES), root / "calibration_data/SOURCES.toml"):
        assert any(file.match(pattern) for pattern in patterns), file.name


def test_texts_are_utf8_and_large_enough() -> None:
    texts = {name: path(name).read_bytes() for name in NAMES}
    assert sum(map(len, texts.values())) >= 150_000
    for name, data in texts.items():
        assert data.decode("utf-8") == read(name)  # also: no carriage return
        assert "\ufffd" not in read(name) and "\0" not in read(name)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "dialogue"])
def test_documents_are_separated_and_none_is_empty(name: str) -> None:
    documents = f"\n{read(name)}".split(f"\n{SEPARATOR}\n")
    assert len(documents) >= 5
    assert all(document.strip() for document in documents)
    assert not any(SEPARATOR in document for document in documents)


@pytest.mark.parametrize("name", ["prose", "languages", "dialogue"])
def test_no_long_line_is_repeated(name: str) -> None:
    lines = Counter(line for line in read(name).splitlines() if len(line) > 40)
    assert lines and max(lines.values()) == 1


def test_dialogues_are_chats() -> None:
    chats = [json.loads(line)["messages"] for line in read("dialogue").splitlines()]
    assert len(chats) >= 30
    for chat in chats:
        roles = [message["role"] for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2)  # templates insist on turns
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in chat)
    assert any(len(chat) == 2 for chat in chats) and any(len(chat) > 5 for chat in chats)


def test_languages_use_many_scripts() -> None:
    first_of_block = {
        "Greek": 0x370,
        "Cyrillic": 0x400,
        "Hebrew": 0x590,
        "Arabic": 0x600,
        "Devanagari": 0x900,
        "Bengali": 0x980,
        "Thai": 0xE00,
        "Hiragana": 0x3040,
        "Han": 0x4E00,
        "Hangul": 0xAC00,
    }
    text = read("languages")
    for script, first in first_of_block.items():
        written = sum(first <= ord(character) < first + 0x70 for character in text)
        assert written >= 10, script
    assert text.count(SEPARATOR) + 1 >= 14


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'prose'.*mathematics"):
        read("prosa")
