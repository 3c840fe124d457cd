"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmcompress.errors import LlmcompressError


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which is `NAME.part` until the block ends and then replaces `path`, on disk.

    After an exception what `path` held is as it was, and the part is gone. Raises LlmcompressError where
    `path` is no place for a file or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file in a device's place
        raise LlmcompressError(f"{path}: is a folder or a device; give a file name")
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise LlmcompressError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # after success it is not there
            part.unlink()


def require_free_place(path: Path) -> None:
    """Raise LlmcompressError unless a folder can get this name: nothing has it, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LlmcompressError(f"{path}: is there already; remove it, or choose another name")
