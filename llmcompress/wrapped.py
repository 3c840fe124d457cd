"""A checkpoint that reads another one, and changes some of its tensors on the way."""

from __future__ import annotations

from llmcompress.checkpoint import Checkpoint


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
