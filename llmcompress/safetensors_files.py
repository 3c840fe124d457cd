"""How safetensors files are laid out before any weight is read: which tensor goes where, and under which header.

The format stands in safetensors_header.py. Several files come with `model.safetensors.index.json`, which says where
each tensor is, as transformers writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmcompress.tensor_info import DTYPE_BITS

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `dtype` is a key of DTYPE_BITS.

    `at_most`: its only dimension is an upper bound, as of text that is written when all else is; it comes at the
    end of its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    at_most: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One file: its header, its tensors, and where in it each of them begins."""

    file: str
    header: bytes
    entries: tuple[Entry, ...]
    offsets: Mapping[str, int]
    size: int

    def with_lengths(self, lengths: Mapping[str, int]) -> Shard:
        """The file with the sizes of its `at_most` tensors, its header as long as before."""
        known = [
            replace(entry, shape=(lengths[entry.name],), at_most=False) if entry.at_most else entry
            for entry in self.entries
        ]
        return _shard(self.file, known, len(self.header))


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


def index_of(shards: Sequence[Shard]) -> str:
    """The text of the index of several files."""
    size = sum(shard.size - len(shard.header) for shard in shards)
    where = {name: shard.file for shard in shards for name in shard.offsets}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"


def _shard(file: str, entries: Sequence[Entry], header_bytes: int = 0) -> Shard:
    entries = sorted(entries, key=lambda entry: entry.at_most)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, begins = 0, {}
    for entry in entries:
        begins[entry.name] = end
        end += entry.nbytes
        offsets = [begins[entry.name], end]
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(max(header_bytes - 8, -(-len(text) // 8) * 8))
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + begin for name, begin in begins.items()}
    return Shard(file, header, tuple(entries), offsets, len(header) + end)
