"""What a tokenizer asks for that llama.cpp's algorithms do not do, said to the user instead of passed over."""

from __future__ import annotations

from collections.abc import Iterator

from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer_files import TokenizerFiles


def find_differences(files: TokenizerFiles, model: str, types: list[int]) -> list[str]:
    """One line for each thing that may make llama.cpp's token ids differ from the tokenizer's own."""
    lines = [*_normalizers(files, model), *_splits(files, model), *_stripping(files)]
    if model != "gpt2":
        lines += [*_spaces(files, model), *_bytes(model, types)]
    return lines


def _normalizers(files: TokenizerFiles, model: str) -> Iterator[str]:
    names = [str(step.get("type")) for step in files.parts("normalizer") if not _is_space_rule(step)]
    if model == "t5":
        names = [name for name in names if name not in ("Precompiled", "Replace", "Strip", "Nmt")]
    if names:
        yield f"llama.cpp does not normalize text: {', '.join(names)} is left out, which matters to text not so yet"


def _is_space_rule(step: dict) -> bool:
    """Prepend and Replace put ▁ for spaces, as llama.cpp does itself."""
    return step.get("type") == "Prepend" or (
        step.get("type") == "Replace" and step.get("content") == "▁" and (step.get("pattern") or {}).get("String") == " "
    )


def _splits(files: TokenizerFiles, model: str) -> Iterator[str]:
    steps = files.parts("pre_tokenizer")
    if model == "gpt2" and any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in steps):
        yield "llama.cpp does not put a space before the text, which this tokenizer does"
    if model != "gpt2":
        others = [str(s.get("type")) for s in steps if s.get("type") != "Metaspace" and not _never_splits(s, files)]
        if others:
            yield f"llama.cpp does not split text before merging: {', '.join(others)} is left out"


def _never_splits(step: dict, files: TokenizerFiles) -> bool:
    """A split at spaces, of which the normalizer has left none."""
    return (step.get("pattern") or {}).get("String") == " " and any(_is_space_rule(n) for n in files.parts("normalizer"))


def _stripping(files: TokenizerFiles) -> Iterator[str]:
    names = [token.content for token in files.added if token.lstrip or token.rstrip]
    if names:
        yield (
            f"{len(names)} added tokens take the space beside them ({' '.join(names[:3])}), which GGUF cannot say; "
            "llama.cpp does it where general.name has phi-3 in it"
        )


def _spaces(files: TokenizerFiles, model: str) -> Iterator[str]:
    schemes = [step.get("prepend_scheme", "always") for step in files.parts("pre_tokenizer") if step.get("type") == "Metaspace"]
    if "first" in schemes:
        yield "llama.cpp puts a space after every special token, this tokenizer only at the beginning of a text"
    if {"first", "always"} & set(schemes):
        yield "llama.cpp puts a space before a text that begins with one, this tokenizer does not"
    if files.json is None and model == "llama" and files.sentencepiece.remove_extra_whitespaces:
        yield "llama.cpp keeps runs of spaces, which this tokenizer makes one"
    if files.json is None and model == "llama" and files.sentencepiece.charsmap:
        yield "llama.cpp does not normalize text, which this tokenizer does"


def _bytes(model: str, types: list[int]) -> Iterator[str]:
    if model == "llama" and TokenType.BYTE not in types:
        yield "there are no byte tokens: llama.cpp fails on characters that are not in the vocabulary"
    if model == "t5" and TokenType.BYTE in types:
        yield "llama.cpp's unigram algorithm uses no byte tokens: characters not in the vocabulary become unknown"
