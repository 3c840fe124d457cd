"""Safetensors files of which all is known before any weight: headers first, then tensors in any order.

The format stands in safetensors_header.py. Several files come with `model.safetensors.index.json`, which says where
each tensor is, as transformers writes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import LlmcompressError
from llmcompress.tensor_info import DTYPE_BITS

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `dtype` is a key of DTYPE_BITS."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One file: its header, and where in it each of its tensors begins."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def lay_out(groups: Sequence[Sequence[Entry]], max_bytes: int) -> list[Shard]:
    """Files of at most `max_bytes` of tensor data, groups of tensors in order and none of them cut.

    A group larger than that gets a file of its own.
    """
    files: list[list[Entry]] = [[]]
    filled = 0
    for group in groups:
        size = sum(entry.nbytes for entry in group)
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1] += group
        filled += size
    if len(files) == 1:
        return [_shard("model.safetensors", files[0])]
    return [_shard(f"model-{number:05}-of-{len(files):05}.safetensors", entries)
            for number, entries in enumerate(files, 1)]  # fmt: skip


def _shard(file: str, entries: Sequence[Entry]) -> Shard:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, begins = 0, {}
    for entry in entries:
        begins[entry.name] = end
        end += entry.nbytes
        offsets = [begins[entry.name], end]
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(
        file, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end
    )


class SafetensorsFiles:
    """The files of a layout, being written in a folder. Leaving the context puts them on the disk."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder, self._shards = folder, shards
        self._files = ExitStack()
        self._places: dict[str, tuple[int, int, Path]] = {}

    def __enter__(self) -> SafetensorsFiles:
        for shard in self._shards:
            path = self._folder / shard.file
            try:
                file = self._files.enter_context(open(path, "wb", buffering=0))
                file.truncate(shard.size)
            except OSError as error:
                raise _cannot_be_written(path, error) from None
            self._write(file.fileno(), shard.header, 0, path)
            self._places |= {name: (file.fileno(), at, path) for name, at in shard.offsets.items()}
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        with self._files:
            if kind is None:
                self._finish()

    def write(self, name: str, data: bytes | memoryview, position: int = 0) -> None:
        """Write at byte `position` of a tensor. Raises LlmcompressError where the disk does not take it."""
        descriptor, start, path = self._places[name]
        self._write(descriptor, data, start + position, path)

    def _finish(self) -> None:
        for descriptor, path in {(descriptor, path) for descriptor, _, path in self._places.values()}:
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise _cannot_be_written(path, error) from None
        if len(self._shards) > 1:
            _write_index(self._folder / INDEX, self._shards)

    @staticmethod
    def _write(descriptor: int, data: bytes | memoryview, position: int, path: Path) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                count = os.pwrite(descriptor, view, position)
                view, position = view[count:], position + count
        except OSError as error:
            raise _cannot_be_written(path, error) from None


def _write_index(path: Path, shards: Sequence[Shard]) -> None:
    size = sum(shard.size - len(shard.header) for shard in shards)
    where = {name: shard.file for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    try:
        path.write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def _cannot_be_written(path: Path, error: OSError) -> LlmcompressError:
    return LlmcompressError(
        f"{path}: cannot be written: {error.strerror or error}; make room, and start again"
    )
