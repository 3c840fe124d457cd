"""The files of a Hugging Face tokenizer, parsed and checked for shape; their meaning is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.converters.sentencepiece import SentencePieceModel, read_sentencepiece

from llmcompress.errors import TokenizerError
from llmcompress.json_object import read_object
from llmcompress.small_file import read_text

_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the model's own algorithm sees it."""

    id: int
    content: str
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """What a directory holds of tokenizer.json, tokenizer.model, vocab.json with merges.txt, and settings.

    `merges` are strings of two parts with a space between, or pairs. Absent files are None or empty.
    """

    directory: Path
    json: dict[str, Any] | None
    sentencepiece: SentencePieceModel | None
    vocab: dict[str, Any] | list
    merges: list
    added: list[AddedToken]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    special_tokens_map: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """The `model` part of tokenizer.json."""
        return _object((self.json or {}).get("model"))

    @property
    def where(self) -> str:
        """The file that the vocabulary comes from, for messages."""
        name = "tokenizer.json" if self.json else "tokenizer.model" if self.sentencepiece else "vocab.json"
        return str(self.directory / name)

    def parts(self, name: str) -> list[dict[str, Any]]:
        """The steps of tokenizer.json's normalizer, pre_tokenizer, decoder or post_processor, in order."""
        steps, left = [], [(self.json or {}).get(name) or {}]
        while left:
            part = left.pop()
            inner = next((part[key] for key in _SEQUENCES if isinstance(_object(part).get(key), list)), None)
            if inner is not None:
                left += reversed(inner)
            elif isinstance(part, dict) and isinstance(part.get("type"), str):
                steps.append(part)
            elif part:
                raise TokenizerError(f"{self.where}: {name} has {str(part)[:40]!r} where a step belongs")
        return steps


def pattern_of(step: dict[str, Any], kind: str) -> str | None:
    """The `Regex` or `String` of a step that has one."""
    text = _object(step.get("pattern")).get(kind)
    return text if isinstance(text, str) else None


def configs_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """config.json, and its part on the text model where it has several."""
    return [config, _object(config.get("text_config"))]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_files(directory: Path) -> TokenizerFiles:
    """Reads what is there. Raises TokenizerError where no tokenizer is, or one of a kind not read here."""
    json = _read(directory / "tokenizer.json") or None
    model = directory / "tokenizer.model"
    spm = read_sentencepiece(model) if model.is_file() else None
    alone = {} if json or spm else _read(directory / "vocab.json")
    if not (json or spm or alone):
        raise TokenizerError(_nothing_found(directory))
    part = _object((json or {}).get("model"))
    merges = _merges_txt(directory / "merges.txt") if alone else part.get("merges") or []
    if not isinstance(merges, list):
        raise TokenizerError(f"{directory / 'tokenizer.json'}: merges are not a list; fetch the file again")
    config = _read(directory / "tokenizer_config.json")
    return TokenizerFiles(
        directory=directory,
        json=json,
        sentencepiece=spm,
        vocab=alone or part.get("vocab") or {},
        merges=merges,
        added=_added_tokens(json, config, directory),
        config=config,
        generation_config=_read(directory / "generation_config.json"),
        special_tokens_map=_read(directory / "special_tokens_map.json"),
    )


def _nothing_found(directory: Path) -> str:
    patterns = ("tekken.json", "*.tiktoken", "tokenizer.model.*")
    others = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    found = f"found {', '.join(others)}, which is not read here; " if others else ""
    return (
        f"{directory}: no tokenizer.json, tokenizer.model or vocab.json; {found}save one with transformers: "
        "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
    )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _merges_txt(path: Path) -> list[str]:
    """The lines of GPT-2's merges.txt but its version line."""
    if not path.is_file():
        raise TokenizerError(f"{path}: not there, and vocab.json is nothing without it; fetch the file")
    lines = read_text(path).split("\n")
    return [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]


def _added_tokens(json: dict | None, config: dict, directory: Path) -> list[AddedToken]:
    """tokenizer.json's; without one, those of added_tokens.json and of tokenizer_config.json."""
    if json is not None:
        where = directory / "tokenizer.json"
        entries = json.get("added_tokens") or []
        if not isinstance(entries, list):
            raise TokenizerError(f"{where}: added_tokens are not a list; fetch the file again")
        return [_added_token(entry, where) for entry in entries]
    where = directory / "added_tokens.json"
    tokens = {text: _added_token({"id": id, "content": text}, where) for text, id in _read(where).items()}
    where = directory / "tokenizer_config.json"
    for id, entry in _object(config.get("added_tokens_decoder")).items():
        token = _added_token(_object(entry) | {"id": int(id) if id.isdecimal() else id}, where)
        tokens[token.content] = token
    return sorted(tokens.values(), key=lambda token: token.id)


def _added_token(entry: Any, where: Path) -> AddedToken:
    fields = _object(entry)
    if not isinstance(fields.get("content"), str) or type(fields.get("id")) is not int or fields["id"] < 0:
        raise TokenizerError(
            f"{where}: added token {str(entry)[:80]} lacks a text or an id; fetch the file again"
        )
    flags = {name: fields.get(name) is True for name in ("special", "normalized", "lstrip", "rstrip")}
    return AddedToken(fields["id"], fields["content"], **flags)
