"""A GGUF file, or all shards of one, as what another is made from: its tensors decoded row by row, or as they are."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmcompress.checkpoint import READABLE
from llmcompress.errors import GGUFError, nearest, shown
from llmcompress.gguf.layout import MAGIC
from llmcompress.gguf.reader import GGUFFile, open_shards
from llmcompress.gguf.value import Metadata
from llmcompress.tensor_info import TensorInfo


@dataclass(frozen=True, slots=True)
class PackedTensor(TensorInfo):
    """A tensor of a GGUF file; `dtype` is what it decodes to, `packed` the type that it has there."""

    packed: str


def is_gguf(path: str | Path) -> bool:
    """Whether a file is there that begins as a GGUF does."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GGUFSource:
    """What a plan asks of a checkpoint. Reading is safe from any number of threads."""

    def __init__(self, files: list[GGUFFile]) -> None:
        self._files = files
        self.path = files[0].path
        self.directory = self.path.parent
        self.files = tuple(file.path for file in files)
        self.name = re.sub(r"-\d{5}-of-\d{5}$", "", self.path.name.removesuffix(".gguf"))
        self.metadata: Metadata = {
            key: value for key, value in files[0].metadata.items() if not key.startswith("split.")
        }
        self._holders = {name: file for file in files for name in file.tensors}
        self.index = {name: _described(file, name) for name, file in self._holders.items()}

    @classmethod
    def open(cls, path: str | os.PathLike) -> GGUFSource:
        """Open a GGUF file, or all shards of one given any of them. Raises GGUFError for what is damaged or missing, and
        for a tensor of a type that cannot be decoded."""
        files = open_shards(path)
        try:
            return cls(files)
        except BaseException:
            for file in files:
                file.close()
            raise

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows `first` to `first + rows` (to the end by default): float32, or of float types as a checkpoint has them."""
        from llmcompress.grids import GRIDS

        tensor = self.readable(name)
        data = self.read_packed(name, first, tensor.rows - first if rows is None else rows)
        if tensor.packed in READABLE:
            return data.view(READABLE[tensor.packed])
        return GRIDS[tensor.packed].dequantize(data)

    def read_packed(self, name: str, first: int, rows: int) -> np.ndarray:
        """The same rows as the file has them: uint8 (rows, row_bytes)."""
        return self._holders[name].read(name, first, rows)

    def readable(self, name: str) -> PackedTensor:
        """The tensor called `name`. Raises GGUFError if there is none."""
        if name not in self.index:
            raise GGUFError(f"{self.path}: no tensor {shown(name)}{nearest(name, self.index)}")
        return self.index[name]

    def fingerprint(self) -> str:
        """A hash that changes when a file does: of sizes, modification times and headers."""
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        tensors = [
            (tensor.name, tensor.shape, tensor.packed, tensor.offset) for tensor in self.index.values()
        ]
        return hashlib.sha256(repr((stamps, tensors)).encode()).hexdigest()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> GGUFSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _described(file: GGUFFile, name: str) -> PackedTensor:
    from llmcompress.grids import GRIDS

    stored = file.tensors[name]
    kind = stored.type.name
    if kind not in GRIDS:
        raise GGUFError(
            f"{file.path}: tensor {shown(name)} is {kind}, which cannot be decoded (known: {', '.join(GRIDS)})"
        )
    dtype = kind if kind in READABLE else "F32"
    return PackedTensor(name, stored.shape, dtype, file.path, stored.offset, stored.nbytes, kind)
