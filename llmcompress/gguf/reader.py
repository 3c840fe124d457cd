"""GGUF files: a validated header, and rows of tensors on demand.

Source: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3. A header is read from front to
back in buffered pieces; no count, length or offset in it is believed before it was held against the
size of the file.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.cursor import Cursor
from llmcompress.gguf.layout import DEFAULT_ALIGNMENT, MAGIC, check_alignment, padded, shard_names
from llmcompress.gguf.types import BY_ID, MAX_DIMENSIONS, TensorType, row_bytes, tensor_bytes
from llmcompress.gguf.value import STRUCT_CODES, Metadata, Value, ValueType

# Ten times the largest known (a 262k vocabulary with its merges): what a hostile header can make us hold.
MAX_HEADER_BYTES = 1 << 27
SMALLEST_KEY = 13  # bytes: an empty key, its type, a one-byte value
SMALLEST_TENSOR = 24  # bytes: an empty name, no dimensions, type, offset


@dataclass(frozen=True)
class StoredTensor:
    """A tensor `offset` bytes into a file. `shape` is in numpy order, slowest axis first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: its metadata, and its tensors by name in the order of its table."""

    def __init__(self, cursor: Cursor):
        self.path, self._file = cursor.path, cursor.file
        self.version = _read_version(cursor)
        tensors, keys = cursor.numbers("QQ", "tensor and metadata counts")
        self.metadata = _read_metadata(cursor, keys)
        self.alignment = _alignment(cursor, self.metadata)
        self.tensors, self.data_offset = _read_tensors(cursor, tensors, self.alignment)
        self.size = cursor.size

    @classmethod
    def open(cls, path: str | os.PathLike) -> GGUFFile:
        """Read and validate the header of `path`; no tensor data is touched.

        Raises GGUFError for whatever in it does not hold together.
        """
        cursor = Cursor.open(path, most=MAX_HEADER_BYTES)
        try:
            return cls(cursor)
        except BaseException:
            cursor.file.close()
            raise

    def read(
        self, name: str, first: int = 0, rows: int | None = None, columns: int | None = None
    ) -> np.ndarray:
        """Rows of a tensor flattened to (rows, columns), by the last axis or of as many `columns`, from `first` on:
        uint8 (rows, row_bytes)."""
        tensor = self.tensors[name]
        width = row_bytes(tensor.type, (columns,) if columns else tensor.shape)
        total = tensor.nbytes // width
        rows = total - first if rows is None else rows
        if not 0 <= first <= first + rows <= total:
            asked = f"rows {first} to {first + rows} were asked for"
            raise GGUFError(f"{self.path}: tensor {shown(name)} has {total} rows; {asked}")
        data = self._pread(tensor.offset + first * width, rows * width)
        return np.frombuffer(data, np.uint8).reshape(rows, width)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _pread(self, offset: int, count: int) -> bytes:
        pieces = []
        while count:
            pieces.append(os.pread(self._file.fileno(), count, offset))
            if not pieces[-1]:
                raise GGUFError(f"{self.path}: ends at byte {offset}, {count} bytes early; it has changed")
            offset, count = offset + len(pieces[-1]), count - len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def open_shards(path: str | os.PathLike) -> list[GGUFFile]:
    """All files of a split model, in order, given any one of them; `[file]` where it is not split.

    Raises GGUFError where one is missing or they do not belong together.
    """
    with ExitStack() as opened:
        given = opened.enter_context(GGUFFile.open(path))
        count = _split_number(given, "split.count")
        names = _siblings(given.path, count) if count > 1 else [given.path]
        files = [given if name == given.path else opened.enter_context(GGUFFile.open(name)) for name in names]
        if count > 1:
            _check_places(files)
            _check_tensors(files)
        opened.pop_all()
    return files


def _siblings(path: Path, count: int) -> list[Path]:
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not match or int(match[2]) != count:
        ending = f"-NNNNN-of-{count:05d}.gguf"
        raise GGUFError(f"{path}: split.count is {count}, but its name does not end in {ending}")
    names = shard_names(path.with_name(match[1] + ".gguf"), count)
    if missing := [name.name for name in names if not name.is_file()]:
        listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise GGUFError(f"{path}: {len(missing)} of its {count} shards are missing: {listed}")
    return names


def _check_places(files: list[GGUFFile]) -> None:
    for number, file in enumerate(files):
        says = _split_number(file, "split.no"), _split_number(file, "split.count")
        if says != (number, len(files)):
            place = f"split.no is {says[0]} and split.count is {says[1]}"
            raise GGUFError(f"{file.path}: {place}; by its name they must be {number} and {len(files)}")


def _check_tensors(files: list[GGUFFile]) -> None:
    names: set[str] = set()
    for file in files:
        if twice := names & file.tensors.keys():
            raise GGUFError(f"{file.path}: tensor {shown(min(twice))} is in an earlier shard too")
        names |= file.tensors.keys()
    expected = _split_number(files[0], "split.tensors.count")
    if expected != len(names):
        held = f"the {len(files)} shards hold {len(names)} tensors"
        raise GGUFError(f"{files[0].path}: split.tensors.count is {expected}, but {held}")


def _split_number(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key)
    if value is None:
        return 0
    if not isinstance(value.value, int):
        raise GGUFError(f"{file.path}: {key} is a {value.type.name}; it must be a whole number")
    return value.value


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4, "GGUF magic")
    if magic != MAGIC:
        raise cursor.fail(f"is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    (version,) = cursor.numbers("I", "GGUF version")
    if version and version & 0xFFFF == 0:
        raise cursor.fail("is a big-endian GGUF file; convert it with gguf-py's gguf-convert-endian first")
    if version not in (2, 3):
        raise cursor.fail(f"is GGUF version {version}; versions 2 and 3 can be read")
    return version


def _read_metadata(cursor: Cursor, count: int) -> Metadata:
    cursor.need(count * SMALLEST_KEY, f"metadata of {count} keys")
    metadata: Metadata = {}
    for _ in range(count):
        key = _read_name(cursor, "metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {shown(key)} appears twice")
        metadata[key] = _read_value(cursor, f"metadata {shown(key)}")
    return metadata


def _read_value(cursor: Cursor, what: str) -> Value:
    kind = _read_value_type(cursor, what)
    if kind is not ValueType.ARRAY:
        return Value(kind, _read_items(cursor, what, kind, 1)[0])
    item = _read_value_type(cursor, what)
    if item is ValueType.ARRAY:
        raise cursor.fail(f"{what} is an array of arrays, which llama.cpp does not read either")
    (count,) = cursor.numbers("Q", what)
    return Value(kind, _read_items(cursor, what, item, count), item)


def _read_value_type(cursor: Cursor, what: str) -> ValueType:
    (number,) = cursor.numbers("I", what)
    if number > max(ValueType):
        raise cursor.fail(f"{what} has value type {number}, which is unknown; the last is {max(ValueType):d}")
    return ValueType(number)


def _read_items(cursor: Cursor, what: str, kind: ValueType, count: int) -> list:
    if kind is ValueType.STRING:
        cursor.need(8 * count, what)
        return [_read_string(cursor, what) for _ in range(count)]
    code = STRUCT_CODES[kind]
    data = cursor.take(count * struct.calcsize("<" + code), what)
    if kind is ValueType.BOOL and data.strip(b"\0\1"):
        raise cursor.fail(f"{what} has a boolean that is neither 0 nor 1")
    return list(struct.unpack(f"<{count}{code}", data))


def _read_string(cursor: Cursor, what: str) -> str | bytes:
    raw = cursor.take(int.from_bytes(cursor.take(8, what), "little"), what)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _read_name(cursor: Cursor, what: str) -> str:
    name = _read_string(cursor, what)
    if isinstance(name, bytes):
        raise cursor.fail(f"{what} {shown(name)} is not valid UTF-8")
    return name


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32:
        raise cursor.fail(f"general.alignment is a {value.type.name}; it must be a UINT32")
    try:
        check_alignment(value.value)
    except GGUFError as error:
        raise cursor.fail(str(error)) from None
    return value.value


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[dict[str, StoredTensor], int]:
    """The tensors by name, and the byte at which their data begins."""
    cursor.need(count * SMALLEST_TENSOR, f"table of {count} tensors")
    listed: dict[str, StoredTensor] = {}
    for _ in range(count):
        tensor = _read_tensor(cursor, alignment)
        if tensor.name in listed:
            raise cursor.fail(f"tensor {shown(tensor.name)} appears twice")
        listed[tensor.name] = tensor
    start = padded(cursor.at, alignment)
    tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in listed.items()}
    _check_ranges(cursor, tensors)
    return tensors, start


def _read_tensor(cursor: Cursor, alignment: int) -> StoredTensor:
    """The next tensor of the table, its offset still counted from the start of the data section."""
    name = _read_name(cursor, "tensor name")
    what = f"tensor {shown(name)}"
    (dimensions,) = cursor.numbers("I", what)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.fail(f"{what} has {dimensions} dimensions; ggml holds at most {MAX_DIMENSIONS}")
    *sizes, kind, offset = cursor.numbers(f"{dimensions}QIQ", what)
    shape = tuple(reversed(sizes))  # the file counts the fastest axis first
    if kind not in BY_ID:
        raise cursor.fail(f"{what} has type id {kind}, which is unknown (the last known is {max(BY_ID)})")
    if offset % alignment:
        raise cursor.fail(f"{what} has offset {offset}, which is no multiple of {alignment}")
    try:
        return StoredTensor(name, shape, BY_ID[kind], offset, tensor_bytes(BY_ID[kind], shape))
    except GGUFError as error:
        raise cursor.fail(f"{what}: {error}") from None


def _check_ranges(cursor: Cursor, tensors: dict[str, StoredTensor]) -> None:
    """Raises GGUFError where a tensor ends beyond the file or inside another."""
    placed = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for tensor in placed:
        if (end := tensor.offset + tensor.nbytes) > cursor.size:
            lack = f"the file has {cursor.size}; it is cut short or damaged"
            raise cursor.fail(f"tensor {shown(tensor.name)} ends at byte {end}, but {lack}")
    for before, after in pairwise(placed):
        if before.offset + before.nbytes > after.offset:
            where = f"one ends at byte {before.offset + before.nbytes}, the next starts at {after.offset}"
            raise cursor.fail(f"tensors {shown(before.name)} and {shown(after.name)} overlap: {where}")
