"""What is done to spaces, and to text, before a SentencePiece tokenizer cuts it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from llmcompress.converters.tokenizer_files import TokenizerFiles, pattern_of

from llmcompress.errors import TokenizerError


@dataclass(frozen=True)
class Normalization:
    """`charsmap` is SentencePiece's precompiled table of replacements, empty where text is left as it is; `lowercase`
    and `strip_accents` are BERT's."""

    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    lowercase: bool = False
    strip_accents: bool = False


def read_normalization(files: TokenizerFiles) -> Normalization:
    """From tokenizer.json, or else from tokenizer.model; nothing is done where there is neither."""
    if files.json is not None:
        return Normalization(
            _prefixes_space(files), _removes_spaces(files), _charsmap(files), *_of_bert(files)
        )
    spm = files.sentencepiece
    if spm is None:
        return Normalization()
    said = files.config.get("add_prefix_space")
    prefix = said if isinstance(said, bool) else spm.add_dummy_prefix
    return Normalization(prefix, spm.remove_extra_whitespaces, spm.charsmap)


def space_schemes(files: TokenizerFiles) -> set[str]:
    """When tokenizer.json's Metaspace puts a space first: "always", "first" (of a text), "never"."""
    steps = [step for step in files.parts("pre_tokenizer") if step.get("type") == "Metaspace"]
    # Before tokenizers 0.15 it was a flag.
    return {
        str(s.get("prepend_scheme", "always" if s.get("add_prefix_space", True) else "never")) for s in steps
    }


def is_space_rule(step: dict) -> bool:
    """Whether a normalizer only puts ▁ for spaces or before the text, which llama.cpp does itself."""
    replaces = (
        step.get("type") == "Replace" and step.get("content") == "▁" and pattern_of(step, "String") == " "
    )
    return replaces or step.get("type") == "Prepend"


def _prefixes_space(files: TokenizerFiles) -> bool:
    return bool(space_schemes(files) - {"never"}) or any(
        step.get("type") == "Prepend" for step in files.parts("normalizer")
    )


def _removes_spaces(files: TokenizerFiles) -> bool:
    return any(pattern_of(step, "Regex") == " {2,}" for step in files.parts("normalizer"))


def _of_bert(files: TokenizerFiles) -> tuple[bool, bool]:
    """Whether letters are made small, and accents left out, as is done where nothing is said of them if they are."""
    steps = {step.get("type"): step for step in files.parts("normalizer")}
    bert = steps.get("BertNormalizer", {})
    lower = bert.get("lowercase") is True or "Lowercase" in steps
    accents = bert.get("strip_accents")
    stripped = accents is True or (bert.get("lowercase") is True and accents is None)
    return lower, stripped or "StripAccents" in steps


def _charsmap(files: TokenizerFiles) -> bytes:
    for step in files.parts("normalizer"):
        if step.get("type") == "Precompiled":
            try:
                return base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            except (TypeError, ValueError, binascii.Error) as error:
                raise TokenizerError(f"{files.where}: precompiled_charsmap is not base64 ({error})") from None
    return b""
