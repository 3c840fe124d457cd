"""Reading the sums in an importance matrix: the GGUF and the older `.dat` of llama.cpp's llama-imatrix.

Source: llama.cpp `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`. A GGUF holds for each weight
sums of x² and the number of tokens they were summed over, both for each expert of a stacked weight. A `.dat`
holds one row for a weight, its experts' side by side, of (sum / tokens) x calls, and the calls. It says neither
tokens nor experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.cursor import Cursor
from llmcompress.gguf.layout import MAGIC
from llmcompress.gguf.reader import GGUFFile, StoredTensor
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import ValueType

SUMS, COUNTS = ".in_sum2", ".counts"
NOTES = "llmcompress."  # metadata keys that begin so are ours
SMALLEST_ENTRY = 12  # bytes of a legacy entry: length of an empty name, calls, number of values
MOST_TOKENS = 2.0**53  # all whole numbers up to here are float64s


@dataclass(frozen=True)
class Sums:
    """Sums of squared inputs of one weight.

    tokens: int64 (matrices,), how many were summed up, matrices being the experts of a stacked weight, else 1.
    squares: float (matrices, inputs).
    """

    tokens: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a weight's squares lie, float32 (matrices, inputs) from byte `offset` on, and their tokens."""

    offset: int
    inputs: int
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class ImatrixFile(Mapping[str, Sums]):
    """An importance matrix on disk: `file[name]` reads one weight's sums, so a file may be larger than memory.

    chunks, chunk_size: pieces of text and the tokens of one. A `.dat` has no chunk_size (None), and its `Sums`
    are in calls, where a weight has tokens: their quotient is the mean square all the same.
    notes: what llmcompress wrote beside the sums. unused: tensors that are neither sums nor their counts.
    """

    path: Path
    places: Mapping[str, Place]
    datasets: tuple[str, ...]
    chunks: int | None
    chunk_size: int | None
    notes: Mapping[str, str]
    unused: tuple[str, ...]
    stamp: tuple[int, int, int]

    @classmethod
    def open(cls, path: str | os.PathLike) -> ImatrixFile:
        """Find every weight of a GGUF or `.dat`, told apart by their first bytes, and read their counts.

        Raises GGUFError where the file is damaged.
        """
        cursor = Cursor.open(path)
        with cursor.file as file:
            stamp = _stamp(file.fileno())
            if file.peek(4)[:4] != MAGIC:
                return cls(cursor.path, *_find_legacy(cursor), None, {}, (), stamp)
        with GGUFFile.open(path) as gguf:
            return cls(gguf.path, *_find_gguf(gguf), stamp)

    def __getitem__(self, name: str) -> Sums:
        """Raises KeyError for an unknown weight, GGUFError for values that are negative or not finite."""
        place = self.places[name]
        count = len(place.tokens) * place.inputs
        try:
            with open(self.path, "rb", buffering=0) as file:
                stamp = _stamp(file.fileno())
                values = np.fromfile(file, "<f4", count, offset=place.offset)
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot be read: {error.strerror}") from None
        if stamp != self.stamp or len(values) != count:
            raise GGUFError(f"{self.path}: has changed since it was opened; run the command again")
        _check_values(self.path, name, values)
        return Sums(place.tokens, values.reshape(len(place.tokens), place.inputs))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


def _stamp(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _find_gguf(file: GGUFFile) -> tuple:
    """The fields of ImatrixFile between path and stamp."""
    kind = file.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        raise GGUFError(f"{file.path}: is a GGUF, but no importance matrix (general.type is not 'imatrix')")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        raise GGUFError(f"{file.path}: holds no importance matrix: none of its tensors ends in {SUMS}")
    used = {name + suffix for name in names for suffix in (SUMS, COUNTS)}
    return (
        {name: _find_sums(file, name) for name in names},
        tuple(map(_text, _metadata(file, "imatrix.datasets", ValueType.ARRAY, ValueType.STRING))),
        _metadata(file, "imatrix.chunk_count", ValueType.UINT32),
        _metadata(file, "imatrix.chunk_size", ValueType.UINT32),
        {
            key.removeprefix(NOTES): _text(value.value)
            for key, value in file.metadata.items()
            if key.startswith(NOTES) and value.type is ValueType.STRING
        },
        tuple(name for name in file.tensors if name not in used),
    )


def _metadata(file: GGUFFile, key: str, type: ValueType, item: ValueType | None = None) -> list | int:
    value = file.metadata.get(key)
    if value is None or (value.type, value.item) != (type, item):
        raise GGUFError(f"{file.path}: {key} is missing or damaged; was the file made by llama-imatrix?")
    return value.value


def _find_sums(file: GGUFFile, name: str) -> Place:
    if name + COUNTS not in file.tensors:
        raise GGUFError(f"{file.path}: {shown(name)} has {SUMS}, but no {COUNTS}")
    sums, counts = _float_tensor(file, name + SUMS), _float_tensor(file, name + COUNTS)
    inputs = sums.shape[-1] if sums.shape else 1
    matrices, counted = sums.nbytes // 4 // inputs, counts.nbytes // 4
    if matrices != counted:
        sizes = f"sums of {matrices} matrices and counts of {counted}"
        raise GGUFError(f"{file.path}: {shown(name)} has {sizes}; the file is damaged")
    tokens = file.read(counts.name).view("<f4").reshape(-1)
    _check_values(file.path, counts.name, tokens)
    if tokens.max() > MOST_TOKENS:
        raise GGUFError(
            f"{file.path}: {shown(counts.name)} is {tokens.max():.3g}; so many tokens there cannot be"
        )
    return Place(sums.offset, inputs, np.rint(tokens).astype(np.int64))


def _float_tensor(file: GGUFFile, name: str) -> StoredTensor:
    tensor = file.tensors[name]
    if tensor.type is not TYPES["F32"]:
        raise GGUFError(f"{file.path}: {shown(name)} is {tensor.type.name}; an importance matrix holds F32")
    return tensor


def _find_legacy(cursor: Cursor) -> tuple[dict[str, Place], tuple[str, ...], int | None]:
    """Places, data sets and chunks."""
    (count,) = cursor.numbers("i", "number of entries")
    if count < 1:
        raise cursor.fail(f"is no importance matrix: its number of entries would be {count}")
    cursor.need(count * SMALLEST_ENTRY, f"importance matrix of {count} entries")
    places: dict[str, Place] = {}
    for _ in range(count):
        name, place = _find_legacy_entry(cursor)
        if name in places:
            raise cursor.fail(f"{shown(name)} appears twice")
        places[name] = place
    return places, *_read_legacy_trailer(cursor)


def _find_legacy_entry(cursor: Cursor) -> tuple[str, Place]:
    name = _read_legacy_text(cursor, "name of an entry")
    calls, size = cursor.numbers("ii", f"entry {shown(name)}")
    if calls < 0 or size < 1:
        raise cursor.fail(f"{shown(name)} has {calls} calls and {size} values; the file is damaged")
    # Of no calls the values are means already.
    place = Place(cursor.at, size, np.array([max(calls, 1)]))
    cursor.skip(4 * size, f"entry {shown(name)}")
    return name, place


def _read_legacy_trailer(cursor: Cursor) -> tuple[tuple[str, ...], int | None]:
    """Data set and chunks; the first versions of the format end without them."""
    if cursor.at == cursor.size:
        return (), None
    (chunks,) = cursor.numbers("i", "number of chunks")
    if chunks < 0:
        raise cursor.fail(f"says it was made of {chunks} chunks; the file is damaged")
    dataset = _read_legacy_text(cursor, "name of the data set")
    return (dataset,) if dataset else (), chunks


def _read_legacy_text(cursor: Cursor, what: str) -> str:
    (length,) = cursor.numbers("i", what)
    if length < 0:
        raise cursor.fail(f"{what} at byte {cursor.at} has {length} bytes; this is no importance matrix")
    return _text(cursor.take(length, what))


def _text(value: str | bytes) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        found = f"{np.count_nonzero(wrong)} of {values.size} values are negative or not finite"
        first = f"the first is {values[wrong][0]}"
        raise GGUFError(f"{path}: {shown(name)}: {found}, {first}; make the matrix again")
