"""The bytes in front of a GGUF's tensor data, and the place of every tensor behind them.

All of it follows from metadata, shapes and types, so a file is laid out before a weight is read.
Source: the GGUF specification (ggml/docs/gguf.md); padding and split names as llama.cpp's own
converter (gguf-py `GGUFWriter`) and `llama-gguf-split` write them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.types import TensorType, tensor_bytes
from llmcompress.gguf.value import STRUCT_CODES, Metadata, Value, ValueType, i32, u16, u32

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with its terminating zero


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written. `shape` is in numpy order, slowest axis first: (rows, columns)."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def nbytes(self) -> int:
        try:
            return tensor_bytes(self.type, self.shape)
        except GGUFError as error:
            raise GGUFError(f"tensor {shown(self.name)}: {error}") from None


@dataclass(frozen=True)
class Layout:
    """Where everything in a file lies.

    header: magic, version, metadata, tensor table and the padding up to the data section.
    offsets: byte offset in the file of each tensor. size: bytes of the whole file, its last padding
    included.
    """

    header: bytes
    offsets: tuple[int, ...]
    size: int


def lay_out(metadata: Metadata, tensors: Sequence[TensorEntry], alignment: int = DEFAULT_ALIGNMENT) -> Layout:
    """Place `tensors` one after the other, each at a multiple of `alignment`.

    `alignment` decides what `general.alignment` says, whatever `metadata` had. Raises GGUFError for
    names and shapes that ggml cannot hold, and for values that do not fit their type.
    """
    check_alignment(alignment)
    _check_names(tensors)
    metadata = _with_alignment(metadata, alignment)
    table, relative, position = bytearray(), [], 0
    for tensor in tensors:
        table += _pack_tensor(tensor, position)
        relative.append(position)
        position += padded(tensor.nbytes, alignment)
    counts = struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    header = MAGIC + counts + _pack_metadata(metadata) + table
    start = padded(len(header), alignment)
    return Layout(header.ljust(start, b"\0"), tuple(start + offset for offset in relative), start + position)


def shard_names(path: Path, count: int) -> list[Path]:
    """The files a model of `count` shards is written to; `path` itself where there is one only."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def split(sizes: Sequence[int], max_bytes: int) -> list[range]:
    """Which tensors go into which shard: in order, as many as fit `max_bytes` of tensor data.

    `sizes` are the tensors' bytes. A tensor larger than `max_bytes` gets a shard of its own.
    """
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and filled + size > max_bytes:
            starts.append(index)
            filled = 0
        filled += size
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)])]


def split_metadata(metadata: Metadata, number: int, count: int, tensors: int) -> Metadata:
    """What shard `number` (from 0) of `count` says, `tensors` being the count over all shards.

    The first shard carries the model's metadata, the others only their place in the set.
    """
    place = {"split.no": u16(number), "split.count": u16(count), "split.tensors.count": i32(tensors)}
    return {**metadata, **place} if number == 0 else place


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def check_alignment(alignment: int) -> None:
    """Raises GGUFError unless `alignment` is a power of two."""
    if alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment is {alignment}; it must be a power of two")


def _with_alignment(metadata: Metadata, alignment: int) -> Metadata:
    if alignment != DEFAULT_ALIGNMENT:
        return {**metadata, "general.alignment": u32(alignment)}
    return {key: value for key, value in metadata.items() if key != "general.alignment"}


def _check_names(tensors: Sequence[TensorEntry]) -> None:
    seen = set()
    for tensor in tensors:
        length = len(tensor.name.encode())
        if not 1 <= length <= MAX_NAME_BYTES:
            limits = f"llama.cpp reads 1 to {MAX_NAME_BYTES}"
            raise GGUFError(f"tensor name {shown(tensor.name)} has {length} bytes; {limits}")
        if tensor.name in seen:
            raise GGUFError(f"two tensors are called {shown(tensor.name)}")
        seen.add(tensor.name)


def _pack_tensor(tensor: TensorEntry, offset: int) -> bytes:
    dimensions = tuple(reversed(tensor.shape))  # the file counts the fastest axis first
    fields = (len(dimensions), *dimensions, tensor.type.id, offset)
    return _pack_string(tensor.name) + struct.pack(f"<I{len(dimensions)}QIQ", *fields)


def _pack_metadata(metadata: Metadata) -> bytes:
    return b"".join(_pack_string(key) + _pack_value(key, value) for key, value in metadata.items())


def _pack_value(key: str, value: Value) -> bytes:
    try:
        if value.type is not ValueType.ARRAY:
            return struct.pack("<I", value.type) + _pack_items(value.type, [value.value])
        head = struct.pack("<IIQ", value.type, value.item, len(value.value))
        return head + _pack_items(value.item, value.value)
    except (struct.error, OverflowError) as error:
        kind = value.item if value.type is ValueType.ARRAY else value.type
        raise GGUFError(f"metadata {shown(key)}: a value does not fit {kind.name}: {error}") from None


def _pack_items(type: ValueType, items: Sequence) -> bytes:
    if type is ValueType.STRING:
        return b"".join(map(_pack_string, items))
    if type is ValueType.ARRAY:
        raise GGUFError("arrays of arrays are not written: llama.cpp does not read them")
    return struct.pack(f"<{len(items)}{STRUCT_CODES[type]}", *items)


def _pack_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw
