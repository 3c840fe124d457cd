"""What a tokenizer asks for and llama.cpp's algorithms do not do: said to the user, not passed over."""

from __future__ import annotations

from collections.abc import Iterator

from llmcompress.converters.normalization import is_space_rule, read_normalization, space_schemes
from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer_files import TokenizerFiles, pattern_of

# SentencePiece's own steps, which "t5" does itself.
_SENTENCEPIECE_STEPS = {"Precompiled", "Replace", "Strip", "Nmt"}
# BERT's own, which "bert" does.
_BERT_STEPS = {"BertNormalizer", "BertPreTokenizer"}


def find_differences(files: TokenizerFiles, algorithm: str, types: list[int]) -> list[str]:
    """One line for each thing that may make llama.cpp's token ids differ from the tokenizer's own."""
    lines = [*_normalizing(files, algorithm), *_splitting(files, algorithm), *_added(files)]
    like_sentencepiece = algorithm in ("llama", "gemma4", "t5")
    return [*lines, *_spacing(files, algorithm), *_unknown(algorithm, types)] if like_sentencepiece else lines


def _normalizing(files: TokenizerFiles, algorithm: str) -> Iterator[str]:
    names = [str(step.get("type")) for step in files.parts("normalizer") if not is_space_rule(step)]
    if files.json is None and read_normalization(files).charsmap:
        names.append("Precompiled")
    if algorithm == "t5":
        names = [name for name in names if name not in _SENTENCEPIECE_STEPS]
    if algorithm == "bert":
        names = [name for name in names if name not in _BERT_STEPS]
    if names:
        yield f"llama.cpp does not normalize text ({', '.join(names)}): ids differ where text is not so"


def _splitting(files: TokenizerFiles, algorithm: str) -> Iterator[str]:
    steps = files.parts("pre_tokenizer")
    if algorithm == "gpt2":
        if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
            yield "llama.cpp puts no space before the text, which this tokenizer does"
        return
    if algorithm == "bert":
        if read_normalization(files).strip_accents:
            yield "llama.cpp strips marks that take room (as in Indic scripts), too, and keeps Korean syllables whole"
        names = [str(step.get("type")) for step in steps if step.get("type") not in _BERT_STEPS]
        if names or not steps:
            yield f"llama.cpp splits text as BERT does, this tokenizer otherwise ({', '.join(names) or 'not at all'})"
        return
    no_spaces = any(is_space_rule(step) for step in files.parts("normalizer"))
    idle = [step for step in steps if pattern_of(step, "String") == " " and no_spaces]
    names = [str(step.get("type")) for step in steps if step.get("type") != "Metaspace" and step not in idle]
    if names:
        yield f"llama.cpp does not split text before it merges ({', '.join(names)}): ids may differ"


def _added(files: TokenizerFiles) -> Iterator[str]:
    names = [token.content for token in files.added if token.lstrip or token.rstrip]
    if names:
        yield (
            f"{len(names)} added tokens swallow the spaces beside them ({' '.join(names[:3])}), "
            "which GGUF cannot say; llama.cpp does so only where general.name has phi-3 in it"
        )
    late = [token.content for token in files.added if token.normalized and files.parts("normalizer")]
    if late:
        yield (
            f"{len(late)} added tokens are found in normalized text only ({' '.join(late[:3])}), "
            "by llama.cpp in any"
        )


def _spacing(files: TokenizerFiles, algorithm: str) -> Iterator[str]:
    schemes = space_schemes(files)
    if "first" in schemes:
        yield "llama.cpp puts a space after every special token, this tokenizer only at the start of a text"
    if schemes - {"never"}:
        yield "llama.cpp puts a space before a text that begins with one, this tokenizer does not"
    normalization = read_normalization(files)
    if algorithm == "llama" and normalization.remove_extra_whitespaces:
        yield "llama.cpp keeps runs of spaces, which this tokenizer makes one"
    if algorithm == "t5" and normalization.add_space_prefix and not normalization.remove_extra_whitespaces:
        yield "llama.cpp puts a space before the first word, this tokenizer before the text"


def _unknown(algorithm: str, types: list[int]) -> Iterator[str]:
    if algorithm == "llama" and TokenType.BYTE not in types:
        yield "there are no byte tokens: llama.cpp fails on characters that are not in the vocabulary"
    if algorithm == "t5" and TokenType.BYTE in types:
        yield "llama.cpp's unigram algorithm uses no byte tokens: characters outside the vocabulary are <unk>"
