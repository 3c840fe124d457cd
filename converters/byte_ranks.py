"""Byte-level BPE given as byte strings with ranks, as tiktoken keeps it, in the form of the tokenizer.json that does
the same.

tiktoken joins the two neighbours whose bytes together have the lowest rank, tokenizer.json and GGUF the pair that comes
first in a list. One pair for each token says the same: the two parts that its own bytes have become before the last
join. For until a token is whole no join crosses its ends, and so its parts form as if there were no text around it.
Source: tiktoken (src/lib.rs).
"""

from __future__ import annotations

from typing import Any

from llmcompress.errors import TokenizerError

LONGEST = 2048  # bytes of a token; the longest known have 512

_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PLAIN)
# GPT-2's letter for each byte: its own where that can be seen.
_LETTERS = {byte: chr(byte) for byte in _PLAIN} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}


def spelled(token: bytes) -> str:
    """The token as tokenizer.json and GGUF write it, a letter for each byte."""
    return "".join(map(_LETTERS.__getitem__, token))


def as_json(
    tokens: list[bytes], pattern: str | None, added: list[dict[str, Any]], *, where: str, first_id: int = 0,
    normalizer: dict[str, Any] | None = None, begin: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """A tokenizer.json. `tokens` come in the order of their ranks, ids from `first_id` on; `pattern` is the regex that
    splits text, `added` are tokens of tokenizer.json, of which `begin` stand before every text.

    Raises TokenizerError where a token is empty, too long or there twice, or a byte has no token.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lacking = sum(bytes([byte]) not in ranks for byte in range(256))
    longest = max(map(len, tokens), default=0)
    if len(ranks) < len(tokens) or lacking or b"" in ranks or longest > LONGEST:
        raise TokenizerError(
            f"{where}: {len(tokens)} tokens, {len(ranks)} of them different, up to {longest} bytes long, and {lacking} "
            f"bytes without a token; they must all differ, none be empty or longer than {LONGEST}: fetch it again"
        )
    pairs = [pair for token in tokens if len(token) > 1 and (pair := last_join(token, ranks))]
    unreachable = len(tokens) - 256 - len(pairs)
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    ] * bool(pattern)
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, in_bytes]},
        "post_processor": _before(begin, {token["content"]: token["id"] for token in added}),
        "decoder": in_bytes,
        "model": {
            "type": "BPE",
            "vocab": {spelled(token): first_id + rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in pairs],
            "ignore_merges": unreachable > 0,  # tiktoken takes words that are tokens whole
        },
    }


def last_join(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts of a token before they are joined; None where its bytes do not come to two parts."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        rank = min(joined)
        if rank == len(ranks):
            return None
        at = joined.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def added_token(id: int, content: str) -> dict[str, Any]:
    """A special token as tokenizer.json has it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


def _before(texts: tuple[str, ...], ids: dict[str, int]) -> dict[str, Any] | None:
    """The post_processor that puts special tokens before every text."""
    known = [text for text in texts if text in ids]
    single = [{"SpecialToken": {"id": text, "type_id": 0}} for text in known]
    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in known}
    text, again = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    if not known:
        return None
    return {
        "type": "TemplateProcessing", "single": [*single, text], "pair": [*single, text, again], "special_tokens": special,
    }  # fmt: skip
