"""The merges of a BPE tokenizer: GGUF's spelling, and scores by which SentencePiece's algorithm agrees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from llmcompress.errors import TokenizerError


def pairs(merges: Iterable, where: str) -> Iterator[tuple[str, str]]:
    """The two halves of each merge, written `"a b"` or, since transformers 4.45, `["a", "b"]`."""
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(halves, list)
            or len(halves) != 2
            or not all(isinstance(half, str) for half in halves)
        ):
            raise TokenizerError(
                f"{where}: {str(merge)[:60]!r} is not a merge of two parts; fetch the file again"
            )
        yield halves[0], halves[1]


def spelled(merges: Iterable[tuple[str, str]]) -> list[str]:
    """GGUF's merges: a space between the halves, Ġ for one inside a half, as llama.cpp's converter does."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]


def unknown(merges: Iterable[tuple[str, str]], ids: dict[str, int]) -> int:
    """How many merges have a half, or a result, that is no token: they never apply."""
    return sum(left not in ids or right not in ids or left + right not in ids for left, right in merges)


def scores(merges: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Merged token -> score for llama.cpp's SentencePiece algorithm: it joins the pair that scores best.

    Hugging Face joins the pair that comes first in the list, so the score is minus the first such position.
    """
    result: dict[str, float] = {}
    for position, (left, right) in enumerate(merges):
        result.setdefault(left + right, -float(position))
    return result


def follow(merges: Iterable[tuple[str, str]], scores: dict[str, float]) -> bool:
    """Whether the merges come in the order of their results' scores, the best first."""
    before = math.inf
    for left, right in merges:
        score = scores.get(left + right, math.inf)
        if score > before:
            return False
        before = score
    return True


def lacking(merges: list[tuple[str, str]], tokens: set[str]) -> int:
    """In how many ways two tokens join to a third without a merge saying so.

    SentencePiece's algorithm needs no such permission: with any missing, it may join where the merges do not.
    """
    ways = sum(
        token[:cut] in tokens and token[cut:] in tokens for token in tokens for cut in range(1, len(token))
    )
    return ways - len({merge for merge in merges if merge[0] in tokens and merge[1] in tokens})
