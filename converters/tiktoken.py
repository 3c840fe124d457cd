"""Tokenizers that come as a file of tiktoken's, a base64 token and its rank on each line, and Python code.

The code is not run. What it says beside the file, the regex and the special tokens, is known by its class.
Source: the tokenization_*.py of Qwen, Hunyuan, Kimi K2 and GLM-4 on their models' pages.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.converters.byte_ranks import added_token, as_json

from llmcompress.errors import TokenizerError, shown
from llmcompress.small_file import read_bytes

NAMES = ("*.tiktoken", "tiktoken.model", "tokenizer.model")  # the last may be SentencePiece's
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = (
    rf"[{marks}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for marks in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
)
_KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        _REST,
    )
)


@dataclass(frozen=True)
class Known:
    """What a tokenizer's code says: its regex, special tokens behind the last rank by their first id, what stands
    before every text, and whether text is brought into Unicode's normal form C."""

    pattern: str
    special: Callable[[int], list[str]] = lambda first: []
    begin: tuple[str, ...] = ()
    normal_form: bool = False


def _with_extras(*names: str) -> Callable[[int], list[str]]:
    return lambda first: [*names, *(f"<|extra_{i}|>" for i in range(205))]


_IN_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_IN_HUNYUAN = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")
CLASSES = {  # by tokenizer_class
    "QWenTokenizer": Known(_DIGIT, _with_extras(*_IN_QWEN), normal_form=True),
    "HYTokenizer": Known(_DIGIT, _with_extras(*_IN_HUNYUAN), normal_form=True),
    "TikTokenTokenizer": Known(_KIMI, lambda first: [f"<|reserved_token_{first + i}|>" for i in range(256)]),
    "ChatGLM4Tokenizer": Known(_DIGIT.replace(r"\p{N}|", r"\p{N}{1,3}|"), begin=("[gMASK]", "<sop>")),
}


def find_tiktoken(directory: Path) -> Path | None:
    """The file of ranks, if there is one."""
    for file in (file for name in NAMES for file in sorted(directory.glob(name))):
        with file.open("rb") as stream:
            if _LINE.match(stream.read(4096)):
                return file
    return None


def read_tiktoken(file: Path, config: dict[str, Any], named: dict[int, str]) -> dict[str, Any]:
    """The tokenizer.json that cuts text as the file and its class do. `config` is tokenizer_config.json, `named` its
    added tokens. A class that is not known leaves out how text is split. Raises TokenizerError."""
    tokens = []
    for number, line in enumerate(read_bytes(file).splitlines()):
        token, _, rank = line.partition(b" ")
        if not line:
            continue
        try:
            if int(rank) != len(tokens):
                raise ValueError("ranks are not in order")
            tokens.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{file}: line {number + 1} is {shown(line)} ({error}); fetch it again"
            ) from None
    known = CLASSES.get(str(config.get("tokenizer_class")))
    special = known.special(len(tokens)) if known else []
    names = dict(enumerate(special, len(tokens))) | named
    return as_json(
        tokens, known and known.pattern, [added_token(id, name) for id, name in sorted(names.items())], where=str(file),
        normalizer={"type": "NFC"} if known and known.normal_form else None, begin=known.begin if known else (),
    )  # fmt: skip
