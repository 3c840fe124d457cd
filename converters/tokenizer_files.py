"""The files of a Hugging Face tokenizer, parsed and checked for shape; what they mean is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.converters.sentencepiece import SentencePieceModel, read_sentencepiece
from llmcompress.errors import TokenizerError
from llmcompress.json_object import read_object


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the model's own algorithm sees it."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """Absent files are None or empty. `merges` holds pairs, or strings of two parts with a space between."""

    directory: Path
    json: dict[str, Any] | None
    sentencepiece: SentencePieceModel | None
    vocab: dict[str, int] | None
    merges: list
    added: list[AddedToken]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    special_tokens_map: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        """The `model` part of tokenizer.json."""
        return (self.json or {}).get("model") or {}

    def parts(self, name: str) -> list[dict[str, Any]]:
        """The steps of tokenizer.json's normalizer, pre_tokenizer, decoder or post_processor, flattened."""
        return _flatten((self.json or {}).get(name))


def read_files(directory: Path) -> TokenizerFiles:
    """Reads what is there. Raises TokenizerError where no tokenizer is, or one of a kind not read here."""
    path = directory / "tokenizer.json"
    json = _read(path) or None
    spm_path = directory / "tokenizer.model"
    spm = read_sentencepiece(spm_path) if spm_path.is_file() else None
    vocab = None if json or spm else _read(directory / "vocab.json") or None
    if json is None and spm is None and vocab is None:
        raise TokenizerError(_nothing_found(directory))
    config = _read(directory / "tokenizer_config.json")
    return TokenizerFiles(
        directory,
        json,
        spm,
        vocab,
        _merges_txt(directory / "merges.txt") if vocab else [],
        _added_tokens(json, config, directory),
        config,
        _read(directory / "generation_config.json"),
        _read(directory / "special_tokens_map.json"),
    )


def _nothing_found(directory: Path) -> str:
    others = [p.name for pattern in ("tekken.json", "*.tiktoken", "tokenizer.model.v*") for p in directory.glob(pattern)]
    found = f"found {', '.join(sorted(others))}, which is not read here; " if others else ""
    return (
        f"{directory}: no tokenizer.json, tokenizer.model or vocab.json; {found}save one with transformers: "
        "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
    )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _flatten(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        if isinstance(part.get(key), list):
            return [step for inner in part[key] for step in _flatten(inner)]
    return [part]


def _merges_txt(path: Path) -> list[str]:
    """The lines of GPT-2's merges.txt but its version line."""
    if not path.is_file():
        raise TokenizerError(f"{path}: not there, and vocab.json needs it; fetch the file")
    lines = path.read_text("utf-8").split("\n")
    return [line for line in map(str.rstrip, lines[lines[0].startswith("#version") :]) if line]


def _added_tokens(json: dict | None, config: dict, directory: Path) -> list[AddedToken]:
    """tokenizer.json's; without one tokenizer_config.json's and those of added_tokens.json."""
    if json is not None:
        entries = json.get("added_tokens") or []
        return [_added_token(entry, directory / "tokenizer.json") for entry in entries]
    decoder = config.get("added_tokens_decoder") or {}
    tokens = {}
    for content, number in _read(directory / "added_tokens.json").items():
        tokens[content] = _added_token({"id": number, "content": content}, directory / "added_tokens.json")
    for number, entry in decoder.items():
        where = directory / "tokenizer_config.json"
        if not number.isdecimal() or not isinstance(entry, dict):
            raise TokenizerError(f"{where}: added_tokens_decoder has {number!r} where a token id belongs")
        token = _added_token({**entry, "id": int(number)}, where)
        tokens[token.content] = token
    return sorted(tokens.values(), key=lambda token: token.id)


def _added_token(entry: Any, where: Path) -> AddedToken:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
        raise TokenizerError(f"{where}: added token {str(entry)[:80]} has no text or no id; fetch the file again")
    flags = {name: entry.get(name) is True for name in ("special", "lstrip", "rstrip")}
    return AddedToken(entry["id"], entry["content"], **flags)
