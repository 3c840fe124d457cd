"""Files that are read whole, and so have to be small."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import TokenizerError

LARGEST = 100_000_000  # bytes; the largest tokenizers there are have 40 million


def read_bytes(path: Path) -> bytes:
    """Raises TokenizerError for a file that is too large to be what its name says."""
    size = path.stat().st_size
    if size > LARGEST:
        raise TokenizerError(f"{path}: {size} bytes, the limit is {LARGEST}; is it the right file?")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Raises TokenizerError, too, for text that is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text (byte {error.start}); fetch the file again") from None
