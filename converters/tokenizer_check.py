"""The ids that llama.cpp gives with a file's tokenizer, held against those of the tokenizer it was made from.

The texts are the bundled ones, paragraph by paragraph, and a fuzz of what tokenizers trip over: scripts, marks, digits,
runs of spaces, line ends, contractions, code.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcompress.converters.tokenizer_files import read_files, runnable

from llmcompress import calibration_data, llama_tokenizer
from llmcompress.errors import TokenizerError

FUZZ = 2000  # texts
LONGEST = 400  # letters of a bundled text
SHOWN = 5

_SPACES = (" ", " ", " ", "  ", "   ", "        ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000")
_SMALL = (
    "'s",
    "'S",
    "'re",
    "'LL",
    "'t",
    "\u2019ve",
    "...",
    "!!",
    "?",
    "://",
    "(",
    ")",
    "{}",
    "==",
    "->",
    "#",
    "$",
    "%",
    "_",
    "\\n",
)
_SCRIPTS = (  # first and last letters of runs
    "az", "AZ", "az", "àÿ", "āž", "αω", "ая", "את", "بي", "कह", "กฮ", "ぁん", "ァヶ", "一龥", "가힣", "აჰ", "ሀቐ", "😀😏", "①⑳", "∀⋿", "\u0300\u036f",
)  # fmt: skip


@dataclass(frozen=True)
class Disagreement:
    text: str
    llama_cpp: list[int]
    tokenizer: list[int]


@dataclass(frozen=True)
class Compared:
    """How many texts of a kind were compared, how many have other ids, and the first of those."""

    texts: str
    compared: int
    differ: int
    first: tuple[Disagreement, ...]


@dataclass(frozen=True)
class TokenizerReport:
    """`added` says what is put before and after a text, where the two differ in that."""

    file: Path
    tokenizer: Path
    kinds: tuple[Compared, ...]
    added: Disagreement | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"file": str(self.file), "tokenizer": str(self.tokenizer)}


def check_tokenizer(file: str | Path, directory: str | Path) -> TokenizerReport:
    """Compares a GGUF's tokenizer with that of a model directory.

    Raises GGUFError where llama.cpp refuses the file or is not installed, and TokenizerError where the directory has no
    tokenizer, or one that nothing installed here reads.
    """
    source, encode = _reader(Path(directory))
    kinds = []
    for name, texts in (("bundled texts", bundled_texts()), ("fuzz", fuzz_texts(FUZZ))):
        ours, theirs = llama_tokenizer.ids_of(file, texts), [encode(text, False) for text in texts]
        differ = [Disagreement(*each) for each in zip(texts, ours, theirs, strict=True) if each[1] != each[2]]
        kinds.append(Compared(name, len(texts), len(differ), tuple(differ[:SHOWN])))
    (ours,), theirs = llama_tokenizer.ids_of(file, ["a"], add_special=True), encode("a", True)
    same = theirs is None or ours == theirs
    return TokenizerReport(
        Path(file), source, tuple(kinds), None if same else Disagreement("a", ours, theirs)
    )


Encode = Callable[
    [str, bool], Sequence[int] | None
]  # with the tokens put around a text or without; None: not known


def _reader(directory: Path) -> tuple[Path, Encode]:
    """The file of a tokenizer, and what gives the ids of a text."""
    files = read_files(directory)
    if files.sentencepiece and not files.json and importlib.util.find_spec("sentencepiece"):
        from sentencepiece import (
            SentencePieceProcessor,  # which transformers' own reading of its files is not
        )

        pieces = SentencePieceProcessor(model_file=str(files.source))
        return files.source, lambda text, added: None if added else pieces.encode(text)
    if files.json is None:
        return files.source, _by_transformers(directory)
    tokenizer = runnable(files)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return files.source, lambda text, added: tokenizer.encode(text, add_special_tokens=added).ids


def _by_transformers(directory: Path) -> Encode:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise TokenizerError(f"{directory}: no tokenizer that transformers reads: {said}") from error
    return lambda text, added: tokenizer.encode(text, add_special_tokens=added)


def bundled_texts() -> list[str]:
    """Every fifth paragraph of the bundled texts, as far as LONGEST letters."""
    paragraphs = [
        part for name in calibration_data.NAMES for part in calibration_data.read(name).split("\n\n")
    ]
    return [paragraph[:LONGEST] for paragraph in paragraphs if paragraph.strip()][::5]


def fuzz_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of up to 16 pieces, the same for the same seed."""
    chance = random.Random(seed)
    words = calibration_data.read("prose").split()

    def letters() -> str:
        first, last = chance.choice(_SCRIPTS)
        return "".join(chr(chance.randint(ord(first), ord(last))) for _ in range(chance.randint(1, 6)))

    def piece() -> str:
        kinds: Sequence[Callable[[], str]] = (
            lambda: chance.choice(_SPACES), lambda: chance.choice(_SMALL), letters, lambda: chance.choice(words),
            lambda: str(chance.randrange(10 ** chance.randint(1, 9))),
        )  # fmt: skip
        return chance.choice(kinds)()

    return ["".join(piece() for _ in range(chance.randint(1, 16))) for _ in range(count)]
