"""Front-to-back reading of binary files whose counts and lengths nobody should trust."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from llmcompress.errors import GGUFError


class Cursor:
    """A position in a little-endian file of `size` bytes.

    Every claim is checked against the bytes that are left before anything is read or allocated.
    `most` bytes are read at most, even where the file goes on.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int, most: int):
        self.file, self.path, self.size, self.most = file, path, size, most
        self.at = 0

    @classmethod
    def open(cls, path: str | os.PathLike, most: int | None = None) -> Cursor:
        """Open a file; the caller closes `file`. Raises GGUFError where that fails."""
        try:
            file = open(path, "rb", buffering=1 << 18)
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}") from None
        size = os.fstat(file.fileno()).st_size
        return cls(file, Path(path), size, size if most is None else most)

    def fail(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")

    def need(self, count: int, what: str) -> None:
        """Raises GGUFError unless `count` more bytes are there."""
        if self.at + count > self.size:
            left = f"{self.size - self.at} are left; the file is cut short or damaged"
            raise self.fail(f"{what} at byte {self.at} needs {count} bytes, but {left}")
        if self.at + count > self.most:
            raise self.fail(f"{what} at byte {self.at} needs {count} bytes; a header ends within {self.most}")

    def take(self, count: int, what: str) -> bytes:
        if self.at + count > self.size or self.at + count > self.most:
            self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"{what} at byte {self.at}: got {len(data)} of {count} bytes; it has changed")
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        """Pass over `count` bytes unread."""
        self.need(count, what)
        self.file.seek(count, os.SEEK_CUR)
        self.at += count

    def numbers(self, codes: str, what: str) -> tuple:
        """Values packed as `codes` say, in the struct module's letters."""
        return struct.unpack("<" + codes, self.take(struct.calcsize("<" + codes), what))
