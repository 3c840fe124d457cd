"""One source of texts as a stream of tokenised documents, read as far as it is asked for."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import numpy as np

from llmcompress.documents import Document, rendered
from llmcompress.text_sources import read_documents

PIECE = 32  # characters for each token of a row, so about eight rows: longer texts are cut into pieces


class Tokenise:
    """A tokenizer, and what it puts around a single text: token ids `start` and `end`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        plain, full = self.plain("a"), tokenizer("a", verbose=False)["input_ids"]
        fits = (at for at in range(len(full)) if full[at : at + len(plain)] == plain)
        at = next(fits, 0)
        self.start, self.end = full[:at], full[at + len(plain) :]

    def plain(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`, nothing around them; special tokens written in it are read as such or as text."""
        flags = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        return self.tokenizer(text, **flags)["input_ids"]

    def document(self, text: str) -> np.ndarray:
        """int64 ids of a document with its start and end, once each: chat templates write their own."""
        ids = self.plain(text)
        start, end = self.around(ids, text)
        return np.array([*start, *ids, *end], np.int64)

    def around(self, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        """The start and end of a document that its own `ids`, of `text`, lack."""
        eos = self.tokenizer.eos_token
        start = [] if ids[: len(self.start)] == self.start else self.start
        end = [] if eos and text.rstrip().endswith(eos) else self.end or self._own_end()
        return start, end

    def _own_end(self) -> list[int]:
        """What divides documents where the tokenizer adds no end: EOS, the next start, or an empty line."""
        if self.tokenizer.eos_token:
            return [self.tokenizer.eos_token_id]
        return [] if self.start else self.plain("\n\n")


class Stream:
    """The documents of one source in the order of the seed, tokenised as far as they are asked for."""

    def __init__(self, name: str, tokens: int, chunk: int, seed: int, tokenise: Tokenise) -> None:
        self.name, self.tokenise = name, tokenise
        chance = random.Random(f"{seed} {os.path.basename(name)}")  # the same from any folder

        def pick(rows: int) -> list[int]:  # a row has at least one token
            return sorted(chance.sample(range(rows), min(tokens, rows)))

        documents = read_documents(name, pick)
        pieces = [piece for document in documents for piece in cut(document, PIECE * chunk, chance)]
        chance.shuffle(pieces)
        self.waiting = pieces[::-1]
        self.taken: list[np.ndarray] = []
        self.held = 0  # tokens in `taken`
        self.refusals: Counter[str] = Counter()

    def reach(self, count: int) -> int:
        """Tokenises until there are `count` tokens or no more. How many there are."""
        while self.held < count and self.waiting:
            text = rendered(self.waiting.pop(), self.tokenise.tokenizer, self.refusals)
            self.taken.append(self.tokenise.document(text))
            self.held += len(self.taken[-1])
        return self.held

    def first(self, count: int) -> list[np.ndarray]:
        """The documents of the first `count` tokens, the last one cut."""
        starts = np.cumsum([0, *map(len, self.taken)])
        return [document[: count - at] for document, at in zip(self.taken, starts) if at < count]


def cut(document: Document, length: int, chance: random.Random) -> list[Document]:
    """A text longer than `length` characters in consecutive pieces of at most that; the first ends at random.

    A piece ends with a line, or else before a space, where there is one in its last eighth.
    """
    if not isinstance(document, str) or len(document) <= length:
        return [document]
    pieces: list[Document] = []
    at, end = 0, chance.randint(max(1, length // 2), length)
    while end < len(document):
        soonest = end - (end - at) // 8
        line, space = document.rfind("\n", soonest, end) + 1, document.rfind(" ", soonest, end)
        stop = next((place for place in (line, space) if place > at), end)
        pieces.append(document[at:stop])
        at, end = stop, stop + length
    return [*pieces, document[at:]]


def refused(name: str, refusals: Counter[str]) -> list[str]:
    return [f"{name}: {count} conversations as plain text: {reason}" for reason, count in refusals.items()]
