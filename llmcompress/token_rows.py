"""Texts to rows of tokens: packed rows for calibration, consecutive windows for evaluation.

Rows are never padded, so no statistic has to know about padding. The seed alone decides what is taken and in
which order; the process's own random state is neither read nor moved.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmcompress.documents import TextError, rendered
from llmcompress.errors import shown
from llmcompress.text_sources import read_documents, weighed_sources
from llmcompress.token_stream import Stream, Tokenise, refused


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, int64 1-D, each at most `chunk` long, and where they come from."""

    rows: tuple[np.ndarray, ...]
    chunk: int
    sources: tuple[str, ...]
    sha256: str  # of every row's length and tokens, as little-endian int64
    notes: tuple[str, ...]  # what the user should know, a line each

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


def calibration_rows(
    tokenizer: Any, sources: Sequence[str], tokens: int, chunk: int, seed: int = 0
) -> TokenRows:
    """`tokens` tokens of `sources` (see text_sources.py), shared out by weight, packed into rows of `chunk`.

    `tokenizer` is a fast tokenizer of transformers. A document gets what it adds to a single text and, where
    it adds no end, its EOS; special tokens written in a text are read as such. Long texts are cut into
    pieces, where is up to the seed; documents and pieces are shuffled and joined, and the last taken of each
    source is cut to fit. A source that runs out leaves its rest to the others.
    Raises TextError for what cannot be read and for tokens or chunk below 1.
    """
    if tokens < 1 or chunk < 1:
        raise TextError(f"{tokens} tokens in rows of {chunk}: both must be at least 1")
    weights = weighed_sources(sources)
    tokenise = Tokenise(tokenizer)
    streams = {name: Stream(name, tokens, chunk, seed, tokenise) for name in weights}
    shares = shared_out(tokens, weights, lambda name, count: streams[name].reach(count))
    documents = [document for name, share in shares.items() for document in streams[name].first(share)]
    random.Random(f"{seed}").shuffle(documents)
    notes = [note for stream in streams.values() for note in refused(stream.name, stream.refusals)]
    notes += _shortage(streams, shares, _shared(tokens, weights))
    return _token_rows(packed(documents, chunk), chunk, tuple(weights), notes)


def window_rows(
    tokenizer: Any, text: str, chunk: int, style: Literal["llama.cpp", "transformers"],
    most: int | None = None,
) -> TokenRows:  # fmt: skip
    """Consecutive windows of `chunk` tokens over the whole text, or the first `most` of them.

    "llama.cpp" is what llama-perplexity and llama-imatrix do with a file: one newline at its end is dropped,
    special tokens written in it are plain text (llama-imatrix has --parse-special), the last, shorter window
    is dropped, and where the tokenizer adds a BOS each window's first token is replaced by it.
    "transformers" is the tokenizer's own reading of the text, its last window shorter.
    Raises TextError for a text of fewer tokens than one window ("llama.cpp") or of none.
    """
    if style not in ("llama.cpp", "transformers"):
        raise TextError(f"windows in the style of {shown(style)}; known are 'llama.cpp' and 'transformers'")
    if chunk < 1:
        raise TextError(f"windows of {chunk} tokens; give at least 1")
    tokenise = Tokenise(tokenizer)
    notes = []
    if style == "transformers":
        ids = np.array([*tokenise.start, *tokenise.plain(text), *tokenise.end], np.int64)
        rows = packed([ids], chunk)
    else:
        ids = np.array([*tokenise.start, *tokenise.plain(text.removesuffix("\n"), special=False)], np.int64)
        rows = [row.copy() for row in packed([ids], chunk) if len(row) == chunk]
        for row in rows:
            row[:1] = tokenise.start[:1] or row[:1]
        if len(ids) % chunk:
            notes.append(
                f"the last {len(ids) % chunk} of {len(ids)} tokens fill no window of {chunk}: left out"
            )
        if tokenise.end:
            notes.append("the tokenizer ends a text with a token, which llama.cpp's windows leave out")
    if most is not None and len(rows) > most:
        notes.append(f"the first {most} of {len(rows)} windows of {chunk} tokens; --tokens asks for no more")
        rows = rows[:most]
    if not rows:
        raise TextError(
            f"the text has {len(ids)} tokens, a window {chunk}; give more text or a smaller chunk"
        )
    return _token_rows(rows, chunk, (), notes)


def source_text(tokenizer: Any, source: str) -> tuple[str, tuple[str, ...]]:
    """A whole source as the one text that `window_rows` reads, empty lines between its documents, and notes.

    A text file comes out as it is. Raises TextError as `calibration_rows` does.
    """
    refusals: Counter[str] = Counter()
    texts = []
    for name in weighed_sources([source]):
        texts += [rendered(document, tokenizer, refusals) for document in read_documents(name)]
    return "\n\n".join(texts), tuple(refused(source, refusals))


def packed(documents: Iterable[np.ndarray], chunk: int) -> list[np.ndarray]:
    """The documents one after the other, cut into rows of `chunk` tokens, the last one maybe shorter."""
    stream = np.concatenate([np.empty(0, np.int64), *documents])
    return [stream[start : start + chunk] for start in range(0, len(stream), chunk)]


def shared_out(tokens: int, weights: Mapping[str, float], reach: Callable[[str, int], int]) -> dict[str, int]:
    """How many tokens each source gives: by weight, and what one does not hold is shared by the others.

    `reach(name, count)` says how many tokens the source holds, or, if those are `count` or more, any number
    from `count` on.
    """
    shares: dict[str, int] = {}
    while len(shares) < len(weights):
        rest = {name: weight for name, weight in weights.items() if name not in shares}
        wanted = _shared(tokens - sum(shares.values()), rest)
        held = {name: reach(name, count) for name, count in wanted.items()}
        dry = {name: count for name, count in held.items() if count < wanted[name]}
        shares |= dry or wanted
    return {name: shares[name] for name in weights}


def _shared(tokens: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`tokens` by weight, in whole tokens, none lost."""
    bounds = np.cumsum([0.0, *weights.values()])
    marks = [round(tokens * (bound / bounds[-1])) for bound in bounds]
    return {name: after - before for name, before, after in zip(weights, marks, marks[1:])}


def _shortage(streams: dict[str, Stream], shares: dict[str, int], wanted: dict[str, int]) -> list[str]:
    total, asked = sum(shares.values()), sum(wanted.values())
    if total < asked:
        return [f"{total} tokens of {asked} asked: that is all there is in {', '.join(shares)}"]
    notes = []
    for name, share in shares.items():
        if streams[name].held == share < wanted[name] and not streams[name].waiting:
            notes.append(f"{name} ran out after {share} of its {wanted[name]} tokens; others fill the rest")
        if not share:
            notes.append(f"{name}: its share of {asked} tokens is none")
    return notes


def _token_rows(
    rows: Sequence[np.ndarray], chunk: int, sources: tuple[str, ...], notes: Iterable[str]
) -> TokenRows:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.astype("<i8").tobytes())
    return TokenRows(tuple(rows), chunk, sources, digest.hexdigest(), tuple(notes))
