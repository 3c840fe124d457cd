"""Importance matrices made by llama.cpp's llama-imatrix: mean squared inputs of each linear layer.

Sources: llama.cpp `tools/imatrix/imatrix.cpp` (both files it writes) and `tools/quantize` (what it
makes of them). A GGUF holds, for each weight, sums of x² and the number of tokens they were summed
over; the older `.dat` holds their quotient, scaled by a number of calls.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.cursor import Cursor
from llmcompress.gguf.layout import MAGIC
from llmcompress.gguf.reader import GGUFFile, StoredTensor
from llmcompress.gguf.types import TYPES

SUMS, COUNTS = ".in_sum2", ".counts"
SMALLEST_ENTRY = 12  # bytes of a legacy entry: length of an empty name, calls, number of values


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs, by the GGUF name of the weight they go into.

    entries: float32 (matrices, inputs), matrices being the experts of a stacked weight, else 1. An expert
    no token reached has ones. In a legacy file the experts of a weight lie in one row, since it does not
    say how many there are: `weights` puts them apart.
    chunks, chunk_size: how many pieces of text it was made from, and their tokens, where the file says so.
    notes: what a user should know about it.
    """

    entries: dict[str, np.ndarray]
    datasets: tuple[str, ...]
    chunks: int | None
    chunk_size: int | None
    source: Path
    notes: tuple[str, ...] = ()

    def weights(self, name: str, matrices: int, inputs: int) -> np.ndarray | None:
        """The entry of a weight of that size as float32 (matrices, inputs); None where there is none.

        Raises GGUFError where the entry has another size.
        """
        entry = self.entries.get(name)
        if entry is None or entry.shape == (matrices, inputs):
            return entry
        if entry.shape == (1, matrices * inputs):
            return entry.reshape(matrices, inputs)
        held = f"is for {entry.shape[0]} x {entry.shape[1]} inputs, the weight has {matrices} x {inputs}"
        raise GGUFError(f"{self.source}: {shown(name)} {held}; it was made from another model")


def read_imatrix(path: str | os.PathLike) -> ImportanceMatrix:
    """Read a GGUF or legacy importance matrix, told apart by their first bytes.

    Raises GGUFError where the file is damaged or an entry is negative or not finite.
    """
    cursor = Cursor.open(path)
    with cursor.file as file:
        if file.peek(4)[:4] != MAGIC:
            return _read_legacy(cursor)
    with GGUFFile.open(path) as file:
        return _read_gguf(file)


def _read_gguf(file: GGUFFile) -> ImportanceMatrix:
    kind = file.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        raise GGUFError(f"{file.path}: is a GGUF, but no importance matrix (general.type is not 'imatrix')")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        raise GGUFError(f"{file.path}: holds no importance matrix: none of its tensors ends in {SUMS}")
    entries, notes = {}, _ignored(file)
    for name in names:
        entries[name], unreached = _mean(file, name)
        if unreached:
            notes.append(f"{shown(name)}: no token reached {unreached} of its {len(entries[name])} matrices")
    return ImportanceMatrix(
        entries,
        tuple(_text(name) for name in _metadata(file, "imatrix.datasets", list)),
        _metadata(file, "imatrix.chunk_count", int),
        _metadata(file, "imatrix.chunk_size", int),
        file.path,
        tuple(notes),
    )


def _metadata(file: GGUFFile, key: str, type: type) -> list | int:
    value = file.metadata.get(key)
    if value is None or not isinstance(value.value, type):
        raise GGUFError(f"{file.path}: {key} is missing or damaged; was the file made by llama-imatrix?")
    return value.value


def _ignored(file: GGUFFile) -> list[str]:
    """A note for tensors that are neither sums nor counts of sums."""
    known = {name for name in file.tensors if name.endswith(SUMS)}
    known |= {name.removesuffix(SUMS) + COUNTS for name in known}
    alone = [name for name in file.tensors if name not in known]
    return [f"{len(alone)} of its tensors are not used, the first is {shown(alone[0])}"] if alone else []


def _mean(file: GGUFFile, name: str) -> tuple[np.ndarray, int]:
    """Sums over counts as float32 (matrices, inputs), and how many matrices no token reached."""
    if name + COUNTS not in file.tensors:
        raise GGUFError(f"{file.path}: {shown(name)} has {SUMS}, but no {COUNTS}")
    sums, counts = _read_float(file, name + SUMS), _read_float(file, name + COUNTS).reshape(-1, 1)
    if len(sums) != len(counts):
        sizes = f"sums of {len(sums)} matrices and counts of {len(counts)}"
        raise GGUFError(f"{file.path}: {shown(name)} has {sizes}; the file is damaged")
    reached = counts > 0
    with np.errstate(over="ignore"):
        mean = np.where(reached, sums / np.where(reached, counts, np.float32(1)), np.float32(1))
    _check_finite(file.path, name, mean)
    return mean, int(np.count_nonzero(~reached))


def _read_float(file: GGUFFile, name: str) -> np.ndarray:
    tensor: StoredTensor = file.tensors[name]
    if tensor.type is not TYPES["F32"]:
        raise GGUFError(f"{file.path}: {shown(name)} is {tensor.type.name}; an importance matrix holds F32")
    values = file.read(name).view("<f4")
    _check_finite(file.path, name, values)
    return values


def _read_legacy(cursor: Cursor) -> ImportanceMatrix:
    (count,) = cursor.numbers("i", "number of entries")
    if count < 1:
        raise cursor.fail(f"is no importance matrix: its number of entries would be {count}")
    cursor.need(count * SMALLEST_ENTRY, f"importance matrix of {count} entries")
    entries: dict[str, np.ndarray] = {}
    for _ in range(count):
        name, values = _read_legacy_entry(cursor)
        if name in entries:
            raise cursor.fail(f"{shown(name)} appears twice")
        entries[name] = values
    chunks, datasets = _read_legacy_trailer(cursor)
    return ImportanceMatrix(entries, datasets, chunks, None, cursor.path)


def _read_legacy_entry(cursor: Cursor) -> tuple[str, np.ndarray]:
    name = _read_legacy_text(cursor, "name of an entry")
    calls, size = cursor.numbers("ii", f"entry {shown(name)}")
    if calls < 0 or size < 1:
        raise cursor.fail(f"{shown(name)} has {calls} calls and {size} values; the file is damaged")
    values = np.frombuffer(cursor.take(4 * size, f"entry {shown(name)}"), "<f4") / np.float32(max(calls, 1))
    _check_finite(cursor.path, name, values)
    return name, values.reshape(1, size)


def _read_legacy_trailer(cursor: Cursor) -> tuple[int | None, tuple[str, ...]]:
    """Chunks and data set; the first versions of the format end without them."""
    if cursor.at == cursor.size:
        return None, ()
    (chunks,) = cursor.numbers("i", "number of chunks")
    return chunks, (_read_legacy_text(cursor, "name of the data set"),)


def _read_legacy_text(cursor: Cursor, what: str) -> str:
    (length,) = cursor.numbers("i", what)
    if length < 0:
        raise cursor.fail(f"{what} at byte {cursor.at} has {length} bytes; this is no importance matrix")
    return _text(cursor.take(length, what))


def _text(value: str | bytes) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _check_finite(path: Path, name: str, values: np.ndarray) -> None:
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        found = f"{np.count_nonzero(wrong)} of {values.size} values are negative or not finite"
        first = f"the first is {values[wrong][0]}"
        raise GGUFError(f"{path}: {shown(name)}: {found}, {first}; make the matrix again")
