"""A Hugging Face tokenizer, read for GGUF.

llama.cpp has three algorithms that take one: "gpt2", byte-level BPE by merges; "llama", SentencePiece's BPE by
scores; "t5", SentencePiece's unigram model. Which of them, and with what settings, the tokenizer's files say.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompress.converters import merges as bpe
from llmcompress.converters import sentencepiece
from llmcompress.converters.chat_template import read_chat_templates
from llmcompress.converters.pretokenizer import check_name, find_pretokenizer
from llmcompress.converters.special_tokens import SpecialTokens, find_special_tokens
from llmcompress.converters.token_table import TokenTable, TokenType
from llmcompress.converters.tokenizer_differences import find_differences
from llmcompress.converters.tokenizer_files import TokenizerFiles, read_files
from llmcompress.converters.vocabulary import Vocabulary
from llmcompress.errors import TokenizerError

__all__ = ["Vocabulary", "read_vocabulary"]

# Pre-tokenizers of tokenizers that come as vocab.json and merges.txt, by tokenizer_class or model_type.
_BY_CLASS = {
    "GPT2Tokenizer": "gpt-2",
    "gpt2": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
}


def read_vocabulary(
    directory: Path,
    config: dict[str, Any],
    *,
    rows: int | None = None,
    pad: bool = True,
    pre: str | None = None,
    kind: str | None = None,
) -> Vocabulary:
    """Reads the tokenizer in `directory`. `config` is the model's config.json.

    `rows` is the number of rows of the embedding (config.json's vocab_size if not given); with `pad`, tokens are
    added until there are as many. `pre` is the name of the pre-tokenizer, to say what is not found by itself, and
    `kind` the one algorithm that will do. Raises TokenizerError where the tokenizer cannot be written faithfully.
    """
    files = read_files(Path(directory))
    model = _algorithm(files)
    if kind not in (None, model):
        raise TokenizerError(f"{directory}: the tokenizer is of kind {model!r}, this architecture's is {kind!r}")
    table = TokenTable(rows or _vocab_size(config, files), str(directory))
    notes = _FILL[model](files, table)
    _add_tokens(files, table, notes)
    notes += _padding(table, pad)
    table.check()
    special = find_special_tokens(files, config, table.ids, len(table.texts), add_bos=model == "llama")
    if files.json is None:
        _make_control(table, special)
    pre, how = _pretokenizer(files, config, model, special, pre)
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=table.texts,
        token_types=table.types,
        scores=None if model == "gpt2" else table.scores,
        merges=bpe.spelled(_merges(files)) if model == "gpt2" else None,
        special=special,
        add_space_prefix=_adds_space(files, model),
        remove_extra_whitespaces=_removes_spaces(files),
        charsmap=_charsmap(files),
        chat_templates=read_chat_templates(files.directory, files.config),
        notes=(how, *notes, *special.notes, *find_differences(files, model, table.types)),
    )


def _vocab_size(config: dict[str, Any], files: TokenizerFiles) -> int:
    for source in (config, config.get("text_config") or {}):
        if type(source.get("vocab_size")) is int and source["vocab_size"] > 0:
            return source["vocab_size"]
    raise TokenizerError(f"{files.directory / 'config.json'}: no vocab_size in it; add the embedding's number of rows")


def _algorithm(files: TokenizerFiles) -> str:
    if files.json is None:
        if files.sentencepiece is None:
            return "gpt2"
        names = {sentencepiece.BPE: "llama", sentencepiece.UNIGRAM: "t5"}
        if files.sentencepiece.model_type not in names:
            raise TokenizerError(f"{files.directory / 'tokenizer.model'}: neither a BPE nor a unigram model")
        return names[files.sentencepiece.model_type]
    vocab = files.model.get("vocab")
    kind = files.model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE")
    affixes = files.model.get("continuing_subword_prefix") or files.model.get("end_of_word_suffix")
    if kind == "Unigram" and isinstance(vocab, list):
        return "t5"
    if kind == "BPE" and isinstance(vocab, dict) and not affixes:
        steps = files.parts("pre_tokenizer") + files.parts("decoder")
        return "gpt2" if any(step.get("type") == "ByteLevel" for step in steps) else "llama"
    raise TokenizerError(
        f"{files.directory / 'tokenizer.json'}: a {kind} model{' with subword affixes' if affixes else ''}, "
        "which llama.cpp has no algorithm for among those of causal language models"
    )


def _fill_gpt2(files: TokenizerFiles, table: TokenTable) -> list[str]:
    for text, number in (files.vocab or files.model["vocab"]).items():
        table.put(number, text, TokenType.NORMAL)
    lost = bpe.unknown(_merges(files), table.ids)
    return [f"{lost} merges name tokens that are not in the vocabulary and never apply"] if lost else []


def _fill_llama(files: TokenizerFiles, table: TokenTable) -> list[str]:
    spm, vocab = files.sentencepiece, files.model.get("vocab")
    if spm and (vocab is None or all(vocab.get(piece) == number for number, piece in enumerate(spm.pieces))):
        _put_pieces(files, table)
        return []
    merges = list(_merges(files))
    scores = bpe.scores(merges)
    unknown = files.model.get("unk_token")
    for text, number in vocab.items():
        kind = TokenType.UNKNOWN if text == unknown else TokenType.BYTE if _is_byte(text) else TokenType.NORMAL
        table.put(number, text, kind, scores.get(text, 0.0))
    notes = ["tokenizer.model differs from tokenizer.json, which is what transformers reads: not used"] if spm else []
    return notes + _unordered(table, merges)


def _unordered(table: TokenTable, merges: list[tuple[str, str]]) -> list[str]:
    lacking = bpe.missing(merges, {text for text, kind in zip(table.texts, table.types) if kind == TokenType.NORMAL})
    if not lacking:
        return []
    return [
        f"{lacking} pairs of tokens join to a token without a merge of their own: "
        "llama.cpp's SentencePiece algorithm may join them where this tokenizer does not"
    ]


def _fill_t5(files: TokenizerFiles, table: TokenTable) -> list[str]:
    if files.json is None:
        _put_pieces(files, table)
        return []
    for number, entry in enumerate(files.model["vocab"]):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TokenizerError(f"{files.directory / 'tokenizer.json'}: vocab entry {number} is not a text and a score")
        kind = TokenType.UNKNOWN if number == files.model.get("unk_id") else TokenType.NORMAL
        table.put(number, entry[0], kind, float(entry[1]))
    return []


_FILL: dict[str, Callable[[TokenizerFiles, TokenTable], list[str]]] = {
    "gpt2": _fill_gpt2,
    "llama": _fill_llama,
    "t5": _fill_t5,
}


def _put_pieces(files: TokenizerFiles, table: TokenTable) -> None:
    spm = files.sentencepiece
    for number, (piece, score, kind) in enumerate(zip(spm.pieces, spm.scores, spm.types)):
        table.put(number, piece, kind, score)
        if kind == TokenType.USER_DEFINED:
            table.texts[number] = piece.replace("▁", " ")


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merges(files: TokenizerFiles):
    where = "merges.txt" if files.vocab else "tokenizer.json"
    return bpe.pairs(files.merges if files.vocab else files.model.get("merges") or [], str(files.directory / where))


def _add_tokens(files: TokenizerFiles, table: TokenTable, notes: list[str]) -> None:
    for token in files.added:
        table.put_added(token)
    if table.left_out:
        notes.append(
            f"{len(table.left_out)} added tokens lie past the embedding's {table.rows} rows and are left out: "
            f"{' '.join(table.left_out[:5])}"
        )


def _padding(table: TokenTable, pad: bool) -> list[str]:
    added = table.fill(pad)
    return [f"{added} unused tokens named [PAD...] stand for ids that the tokenizer leaves free"] if added else []


def _make_control(table: TokenTable, special: SpecialTokens) -> None:
    """vocab.json does not say which of its tokens are special: those with a role are."""
    for role, number in special.ids.items():
        if table.types[number] == TokenType.NORMAL and role != "unk":
            table.types[number] = int(TokenType.CONTROL)


def _pretokenizer(
    files: TokenizerFiles, config: dict[str, Any], model: str, special: SpecialTokens, pre: str | None
) -> tuple[str, str]:
    """(name, a note on how it was found)."""
    if model != "gpt2":
        if pre is not None:
            raise TokenizerError(f"--pre {pre}: only byte-level BPE has a pre-tokenizer, this tokenizer is {model!r}")
        return "default", f"tokenizer {model!r}, which has no pre-tokenizer"
    if pre is not None:
        return check_name(pre), f"pre-tokenizer {pre!r} by --pre"
    if files.json is None:
        name, how = _by_class(files, config)
    else:
        name, how = find_pretokenizer(
            files.json.get("pre_tokenizer"),
            _flags(files, special),
            lambda text: _encode(files, text),
            str(files.directory / "tokenizer.json"),
        )
    return name, f"pre-tokenizer {name!r} by {how}"


def _by_class(files: TokenizerFiles, config: dict[str, Any]) -> tuple[str, str]:
    said = files.config.get("tokenizer_class") or config.get("model_type") or "none"
    name = _BY_CLASS.get(str(said).removesuffix("Fast"))
    if name is None:
        raise TokenizerError(
            f"{files.directory}: vocab.json and merges.txt do not say how text is split, and neither does tokenizer "
            f"class {said!r}; add the tokenizer.json, or choose with --pre NAME"
        )
    return name, f"its class {said}"


def _flags(files: TokenizerFiles, special: SpecialTokens) -> dict[str, bool]:
    flags = {"ignore_merges": files.model.get("ignore_merges") is True, "no_bos": "bos" not in special.ids}
    clean = files.config.get("clean_up_tokenization_spaces")
    return flags | ({"keep_spaces": not clean} if isinstance(clean, bool) else {})


def _encode(files: TokenizerFiles, text: str) -> list[int]:
    from tokenizers import Tokenizer

    path = files.directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path)).encode(text).ids
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(f"{path}: the tokenizers library does not read it ({error})") from error


def _adds_space(files: TokenizerFiles, model: str) -> bool:
    """Whether a space goes before the text: SentencePiece's dummy prefix, in its several spellings."""
    if model == "gpt2":
        return False
    if files.json is None:
        said = files.config.get("add_prefix_space")
        return said if isinstance(said, bool) else files.sentencepiece.add_dummy_prefix
    metaspaces = [step for step in files.parts("pre_tokenizer") if step.get("type") == "Metaspace"]
    if any(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) for step in metaspaces):
        return True
    return any(step.get("type") == "Prepend" for step in files.parts("normalizer"))


def _removes_spaces(files: TokenizerFiles) -> bool:
    if files.json is None:
        return files.sentencepiece is not None and files.sentencepiece.remove_extra_whitespaces
    replacements = [step for step in files.parts("normalizer") if step.get("type") == "Replace"]
    return any((step.get("pattern") or {}).get("Regex") == " {2,}" for step in replacements)


def _charsmap(files: TokenizerFiles) -> bytes:
    if files.json is None:
        return files.sentencepiece.charsmap if files.sentencepiece else b""
    maps = [step.get("precompiled_charsmap") for step in files.parts("normalizer") if step.get("type") == "Precompiled"]
    return base64.b64decode(maps[0]) if maps and maps[0] else b""
