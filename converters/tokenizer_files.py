"""The files of a Hugging Face tokenizer, parsed and checked for shape; their meaning is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.converters import rwkv_world, tekken, wordpiece
from llmcompress.converters.sentencepiece import SentencePieceModel, read_sentencepiece
from llmcompress.converters.tiktoken import find_tiktoken, read_tiktoken

from llmcompress.errors import TokenizerError
from llmcompress.json_object import read_object
from llmcompress.small_file import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Where a tokenizer is looked for, in this order, and what is read there.
FILES = {
    "tokenizer.json": "byte-level BPE, SentencePiece's BPE and unigram model, WordPiece",
    tekken.NAME: "Mistral's byte-level BPE",
    "*.tiktoken": "byte-level BPE by ranks, also as tiktoken.model or tokenizer.model: Qwen, Hunyuan, Kimi K2, GLM-4",
    wordpiece.NAME: "BERT's WordPiece",
    "tokenizer.model": "SentencePiece's BPE and unigram model, also as spiece.model or tokenizer.model.v3",
    rwkv_world.PATTERN: "RWKV's vocabulary",
    "vocab.json": "GPT-2's and Qwen's byte-level BPE, with merges.txt",
}

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
    """What a directory holds of a tokenizer, and its settings.

    `json` is tokenizer.json, or one that says the same as tekken.json, a tiktoken file or vocab.txt, the `source`.
    `merges` are strings of two parts with a space between, or pairs. Absent files are None or empty.
    """

    directory: Path
    source: Path  # the file that the vocabulary comes from
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
        return str(self.source)

    @property
    def from_ranks(self) -> bool:
        """Whether the merges are made of ranks, by which every token that merges can reach is what they make of it."""
        return self.json is not None and self.source.name not in ("tokenizer.json", wordpiece.NAME)

    @property
    def splits(self) -> bool:
        """Whether it is known how text is split: the code of a tokenizer by ranks may be unknown."""
        return not self.from_ranks or len(self.parts("pre_tokenizer")) > 1  # not the bytes alone

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


def runnable(files: TokenizerFiles) -> Tokenizer:
    """The tokenizers library's own of `files.json`. Raises TokenizerError for one that it does not read, and for one of
    ranks whose code alone says how text is split."""
    from tokenizers import Tokenizer

    if not files.splits:
        raise TokenizerError(f"{files.where}: does not say how text is split, which only its code does")
    try:
        return Tokenizer.from_str(dumps(files.json))
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(f"{files.where}: the tokenizers library does not read it ({error})") from error


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
    config = _read(directory / "tokenizer_config.json")
    special_tokens_map = _read(directory / "special_tokens_map.json")
    source, json = _as_json(directory, config)
    if source and source.name in _ROLES:
        special_tokens_map = _ROLES[source.name] | special_tokens_map
    models = [directory / name for name in ("tokenizer.model", "spiece.model")]
    models = [*models, *sorted(directory.glob("tokenizer.model.v*"), reverse=True)]
    model = next((path for path in models if path.is_file() and path != source), None)
    spm = read_sentencepiece(model) if model else None
    worlds = [] if json or spm else sorted(directory.glob(rwkv_world.PATTERN))
    alone = rwkv_world.read_rwkv(worlds[-1]) if worlds else {}
    source = source or model or (worlds[-1] if worlds else directory / "vocab.json")
    if not (json or spm or alone):
        alone = _read(source)
    if not (json or spm or alone):
        raise TokenizerError(_nothing_found(directory))
    part = _object((json or {}).get("model"))
    merges = _merges_txt(directory / "merges.txt") if alone and not worlds else part.get("merges") or []
    if not isinstance(merges, list):
        raise TokenizerError(f"{source}: merges are not a list; fetch the file again")
    return TokenizerFiles(
        directory=directory,
        source=source,
        json=json,
        sentencepiece=spm,
        vocab=alone or part.get("vocab") or {},
        merges=merges,
        added=_added_tokens(json, config, directory, source),
        config=config,
        generation_config=_read(directory / "generation_config.json"),
        special_tokens_map=special_tokens_map,
    )


# The roles of tokens that the code of a tokenizer gives them.
_ROLES = {tekken.NAME: tekken.ROLES, wordpiece.NAME: wordpiece.ROLES}


def _as_json(directory: Path, config: dict[str, Any]) -> tuple[Path | None, dict[str, Any] | None]:
    """The file that a tokenizer.json can be made of, itself first, and that."""
    for name, reads in (
        ("tokenizer.json", read_object),
        (tekken.NAME, tekken.read_tekken),
        (None, lambda file: read_tiktoken(file, config, _named_ids(directory, config))),
        (wordpiece.NAME, lambda file: wordpiece.read_wordpiece(file, config)),
    ):
        file = directory / name if name else find_tiktoken(directory)
        if file and file.is_file() and (json := reads(file)):
            return file, json
    return None, None


def _nothing_found(directory: Path) -> str:
    return (
        f"{directory}: no tokenizer.json, tokenizer.model, tekken.json, *.tiktoken, vocab.json, vocab.txt or "
        f"{rwkv_world.PATTERN}; save one with transformers: "
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


def _added_tokens(json: dict | None, config: dict, directory: Path, where: Path) -> list[AddedToken]:
    """tokenizer.json's; without one, those of added_tokens.json and of tokenizer_config.json."""
    if json is None:
        return sorted(_named(directory, config).values(), key=lambda token: token.id)
    entries = json.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizerError(f"{where}: added_tokens are not a list; fetch the file again")
    return [_added_token(entry, where) for entry in entries]


def _named(directory: Path, config: dict) -> dict[str, AddedToken]:
    """The added tokens that stand beside the tokenizer, by their texts."""
    where = directory / "added_tokens.json"
    tokens = {text: _added_token({"id": id, "content": text}, where) for text, id in _read(where).items()}
    where = directory / "tokenizer_config.json"
    for id, entry in _object(config.get("added_tokens_decoder")).items():
        token = _added_token(_object(entry) | {"id": int(id) if id.isdecimal() else id}, where)
        tokens[token.content] = token
    return tokens


def _named_ids(directory: Path, config: dict) -> dict[int, str]:
    return {token.id: token.content for token in _named(directory, config).values()}


def _added_token(entry: Any, where: Path) -> AddedToken:
    fields = _object(entry)
    if not isinstance(fields.get("content"), str) or type(fields.get("id")) is not int or fields["id"] < 0:
        raise TokenizerError(
            f"{where}: added token {str(entry)[:80]} lacks a text or an id; fetch the file again"
        )
    flags = {name: fields.get(name) is True for name in ("special", "normalized", "lstrip", "rstrip")}
    return AddedToken(fields["id"], fields["content"], **flags)
