"""What is in a model's files, from their headers alone: GGUF, safetensors, or a model directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress.checkpoint import Checkpoint, read_index
from llmcompress.errors import CheckpointError, GGUFError, nearest, shown
from llmcompress.gguf.layout import MAGIC, MAX_NAME_BYTES, padded
from llmcompress.gguf.reader import GGUFFile, StoredTensor, open_shards
from llmcompress.gguf.value import Value, ValueType
from llmcompress.safetensors_header import read_header
from llmcompress.sources.stored import DecodedTensor
from llmcompress.tensor_info import TensorInfo

KINDS = {".safetensors": "safetensors", ".bin": "pytorch", ".pt": "pytorch", ".pth": "pytorch"}
LONGEST_TEXT = 160  # letters of a metadata value that are kept
LONGEST_LIST = 6  # items of an array that are kept


@dataclass(frozen=True)
class MetadataItem:
    """One key, in types JSON has. `type` is the GGUF type; JSON's own types go without saying.

    A long text or list is cut short; `length` is then its whole length.
    """

    key: str
    value: Any
    length: int | None = None
    type: str | None = None


@dataclass(frozen=True)
class TensorRow:
    """One tensor; `shape` slowest axis first."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type."""

    type: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """The contents of one model. `kind` is "gguf", "safetensors", "pytorch" or "model directory"."""

    path: Path
    kind: str
    files: tuple[Path, ...]
    file_bytes: int
    metadata: tuple[MetadataItem, ...]
    tensors: tuple[TensorRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[TypeTotal, ...]:
        """Totals of each type, the one with the most bytes first."""
        rows: dict[str, list[TensorRow]] = {}
        for tensor in self.tensors:
            rows.setdefault(tensor.type, []).append(tensor)
        totals = [
            TypeTotal(type, len(group), sum(t.parameters for t in group), sum(t.nbytes for t in group))
            for type, group in rows.items()
        ]
        return tuple(sorted(totals, key=lambda total: (-total.nbytes, total.type)))

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per parameter; 0 where there are no tensors."""
        return 8 * self.tensor_bytes / self.parameters if self.parameters else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "files": [str(file) for file in self.files],
            "file_bytes": self.file_bytes,
            "tensor_bytes": self.tensor_bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "types": [asdict(total) for total in self.types],
            "metadata": [asdict(item) for item in self.metadata],
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
            "warnings": list(self.warnings),
        }


def inspect(path: str | Path) -> Inspection:
    """Read the headers of a GGUF (all shards where it is one of several), a weight file or a model directory.

    Raises GGUFError or CheckpointError where they are damaged or of an unknown kind.
    """
    path = Path(path)
    if not path.exists():
        siblings = (sibling.name for sibling in path.parent.glob("*"))
        raise CheckpointError(f"{path}: no such file or directory{nearest(path.name, siblings)}")
    try:
        return _directory(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _file(path: Path) -> Inspection:
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic == MAGIC:
        return _gguf(path)
    if path.suffix in KINDS:
        return _weights(path)
    kinds = f"give a GGUF, a model directory or one of {', '.join(KINDS)}"
    raise CheckpointError(f"{path}: starts with {shown(magic)}, which is no GGUF; {kinds}")


def _directory(path: Path) -> Inspection:
    with Checkpoint.open(path) as checkpoint:
        items = tuple(_item(key, value) for key, value in checkpoint.config.items())
        rows = _rows(checkpoint.index.values())
        return Inspection(path, "model directory", checkpoint.files, _size(checkpoint.files), items, rows)


def _weights(path: Path) -> Inspection:
    rows = _rows(read_index(path).values())
    kind = KINDS[path.suffix]
    texts = read_header(path).metadata if kind == "safetensors" else {}
    items = tuple(_item(key, text) for key, text in texts.items())
    return Inspection(path, kind, (path,), _size([path]), items, rows)


def _rows(tensors: Iterable[TensorInfo]) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(tensor.name, tensor.shape, tensor.form, tensor.stored_bytes)
        if isinstance(tensor, DecodedTensor)
        else TensorRow(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)
        for tensor in tensors
    )


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _gguf(path: Path) -> Inspection:
    files, warnings = _shards(path)
    for file in files:
        file.close()
        warnings += _warnings(file)
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    return Inspection(
        path,
        "gguf",
        tuple(file.path for file in files),
        sum(file.size for file in files),
        tuple(_gguf_item(key, value) for key, value in files[0].metadata.items()),
        tuple(TensorRow(tensor.name, tensor.shape, tensor.type.name, tensor.nbytes) for tensor in tensors),
        tuple(warnings),
    )


def _shards(path: Path) -> tuple[list[GGUFFile], list[str]]:
    """The whole set, or this file alone with the reason in a warning."""
    try:
        return open_shards(path), []
    except GGUFError as error:
        return [GGUFFile.open(path)], [f"{error}; only {path.name} is shown"]


def _warnings(file: GGUFFile) -> list[str]:
    """Why llama.cpp would not load a file that is sound otherwise."""
    warnings = []
    if stray := _first_stray(file):
        warnings.append(f"tensor {shown(stray.name)} does not follow the one before; llama.cpp refuses that")
    if long := [name for name in file.tensors if len(name.encode()) > MAX_NAME_BYTES]:
        names = f"{len(long)} tensor names are longer than {MAX_NAME_BYTES} bytes"
        warnings.append(f"{names}, the first is {shown(long[0])}; llama.cpp refuses that")
    return [f"{file.path}: {warning}" for warning in warnings]


def _first_stray(file: GGUFFile) -> StoredTensor | None:
    """The first tensor that does not lie right behind the one before it in the table."""
    position = file.data_offset
    for tensor in file.tensors.values():
        if tensor.offset != position:
            return tensor
        position += padded(tensor.nbytes, file.alignment)
    return None


def _gguf_item(key: str, value: Value) -> MetadataItem:
    short, length = _cut(value.value)
    if (value.item or value.type) is ValueType.FLOAT32:
        short = [_shortest(item) for item in short] if isinstance(short, list) else _shortest(short)
    is_array = value.type is ValueType.ARRAY
    return MetadataItem(key, short, length, f"ARRAY of {value.item.name}" if is_array else value.type.name)


def _shortest(value: float | str) -> float | str:
    """The shortest number that float32 rounds to `value`: 1e-05 and not 9.999999747378752e-06."""
    return value if isinstance(value, str) else float(str(np.float32(value)))


def _item(key: str, value: Any) -> MetadataItem:
    return MetadataItem(key, *_cut(value))


def _cut(value: Any) -> tuple[Any, int | None]:
    """A short `value` in types JSON has, and its whole length where more was there."""
    if isinstance(value, list):
        short = [_cut(_flat(item))[0] for item in value[:LONGEST_LIST]]
        return short, len(value) if len(value) > LONGEST_LIST else None
    value = _flat(value)
    if isinstance(value, str):
        return value[:LONGEST_TEXT], len(value) if len(value) > LONGEST_TEXT else None
    return value, None


def _flat(value: Any) -> Any:
    """`value` as a text where JSON cannot hold it or it is a structure of its own."""
    if isinstance(value, (dict, list)):
        try:
            return json.dumps(value, ensure_ascii=False)
        except RecursionError:
            return "(nested too deeply to show)"
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
