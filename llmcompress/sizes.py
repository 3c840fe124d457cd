"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from llmcompress.errors import RecipeError

_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str | int, what: str = "size") -> int:
    """`512MiB`, `4.5 GiB` (binary), `4G`, `500MB` (decimal, as in llama.cpp's tools) or plain bytes.

    Raises RecipeError where the text is no size above zero; `what` names the flag.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", str(text))
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (_BINARY if binary else _DECIMAL)[unit.upper()])
    if size <= 0:
        raise RecipeError(f"{what}: {text!r} is not a size; write it like 512MiB, 4G or 1000000")
    return size


def parse_count(text: str | int, what: str) -> int:
    """A number of tokens: `256k` is 262144, digits alone are what they say. Raises RecipeError."""
    text = str(text)
    return parse_size(f"{text}i" if text[-1:].isalpha() else text, what)


def format_size(count: float) -> str:
    """`1.2 GiB`: binary units, two to four significant digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
