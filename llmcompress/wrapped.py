"""A checkpoint that reads another one, and changes some of its tensors on the way."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress.checkpoint import Checkpoint, turned


class WrappedCheckpoint(Checkpoint):
    """As `base` is. Whoever derives from it replaces entries of `index` and `config`, names the tensors in `rewritten`,
    and gives `read_into` for those, and `fingerprint`."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.directory, self.config, self.index = base.directory, dict(base.config), dict(base.index)
        self.files, self.name = base.files, base.name
        self.repository, self.revision = base.repository, base.revision
        self.rewritten: set[str] = set()

    @property
    def original(self) -> Checkpoint:
        """What lies on the disk."""
        return self.base.original if isinstance(self.base, WrappedCheckpoint) else self.base

    def read_into(self, name, first, out):  # as Checkpoint's
        self.base.read_into(name, first, out)

    def read_columns(self, name: str, columns: range, top: int, height: int) -> np.ndarray:
        if name not in self.rewritten:
            return self.base.read_columns(name, columns, top, height)
        return turned(partial(self.read, name), self.index[name], columns, top, height)

    def read_packed(self, name: str, first: int, rows: int) -> np.ndarray:
        if name in self.rewritten:
            raise ValueError(f"{name}: is rewritten, so that it has no bytes of its own")
        return self.base.read_packed(name, first, rows)

    def read_bytes(self, name: str, position: int, size: int) -> bytes:
        if name not in self.rewritten:
            return self.base.read_bytes(name, position, size)
        tensor = self.index[name]
        width = tensor.nbytes // tensor.rows
        first, end = position // width, -(-(position + size) // width)
        return self.read(name, first, end - first).tobytes()[position - first * width :][:size]

    def require_plain(self) -> None:
        self.base.require_plain()

    @property
    def notes(self) -> list[str]:
        return self.base.notes

    def let_go(self, names: set[str]) -> None:
        """Pass on what a calibration has done with, to a base that keeps tensors for it."""
        self.base.let_go(names)

    def close(self) -> None:
        self.base.close()


def folder_of_links(
    base: Checkpoint, config: Mapping[str, Any], without: Iterable[str] = ()
) -> tempfile.TemporaryDirectory:
    """A folder that stands in for the base's, with another config.json; of the files beside the weights it has links to all
    but those of the names in `without`. It is gone with the object."""
    made = tempfile.TemporaryDirectory(prefix="llmcompress-")
    folder, left_out = Path(made.name), {"config.json", *without}
    for file in sorted(base.directory.iterdir()):
        if file.is_file() and file.name not in left_out and file not in base.files:
            os.symlink(file.resolve(), folder / file.name)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return made
