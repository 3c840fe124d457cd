"""Files that are read whole, and so have to be small."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import CheckpointError

LARGEST = 100_000_000  # bytes; the safetensors library's limit for headers, and the largest tokenizers have 40 million


def read_bytes(path: Path) -> bytes:
    """Raises CheckpointError for a file that is too large to be what its name says."""
    size = path.stat().st_size
    if size > LARGEST:
        raise CheckpointError(f"{path}: {size} bytes, the limit is {LARGEST}; is it the right file?")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Raises CheckpointError, too, for text that is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start}); fetch the file again") from None
