"""Importance matrices in use: mean squared inputs of each linear layer, from sums over tokens.

What llama-quantize makes of the same sums (llama.cpp `tools/quantize/quantize.cpp`, load_imatrix) is sum / tokens,
and ones for an expert no token reached. Here the experts of a stacked weight lean on each other where they saw
few tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.imatrix_file import ImatrixFile, Sums

# As many tokens of the layer's mean are added to each expert's own. A mean of squares over c tokens is off by
# about sqrt(2 / c) of itself, and 32 tokens make that a quarter.
SHRINKAGE_TOKENS = 32
LISTED = 8  # experts named in a note


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs, by the GGUF name of the weight they go into.

    entries: float32 (matrices, inputs) as `mean_squares` makes them, matrices being the experts of a stacked
    weight, else 1; read and computed when asked for. In a legacy file the experts of a weight lie in one row, since it
    does not say how many there are: `weights` puts them apart. Nor does it say how many tokens an expert
    saw: nothing in it is shrunk, and experts that none reached have ones, as llama-imatrix wrote them.
    chunks, chunk_size: how many pieces of text it was made from, and their tokens, where the file says so.
    notes: what a user should know about it.
    """

    entries: Mapping[str, np.ndarray]
    datasets: tuple[str, ...]
    chunks: int | None
    chunk_size: int | None
    source: Path
    notes: tuple[str, ...] = ()

    def weights(self, name: str, matrices: int, inputs: int) -> np.ndarray | None:
        """The entry of a weight of that size as float32 (matrices, inputs); None where there is none.

        Raises GGUFError where the entry has another size, or has values that are negative or not finite.
        """
        if name not in self.entries:
            return None
        entry = self.entries[name]
        if entry.shape == (matrices, inputs):
            return entry
        if entry.shape == (1, matrices * inputs):
            return entry.reshape(matrices, inputs)
        held = f"is for {entry.shape[0]} x {entry.shape[1]} inputs, the weight has {matrices} x {inputs}"
        raise GGUFError(f"{self.source}: {shown(name)} {held}; it was made from another model")


class MeanSquares(Mapping[str, np.ndarray]):
    """`mean_squares` of every entry of a mapping of sums, when asked for."""

    def __init__(self, sums: Mapping[str, Sums]):
        self._sums = sums

    def __getitem__(self, name: str) -> np.ndarray:
        sums = self._sums[name]
        return mean_squares(sums.tokens, sums.squares)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums


def mean_squares(tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Means as float32 (matrices, inputs) of sums `squares` of that shape over int64 `tokens` (matrices,).

    A single matrix gets the float32 quotient that llama-quantize computes. Of several, each gets
    (sum + k x mean of all) / (tokens + k), k being SHRINKAGE_TOKENS. Ones where no matrix saw a token.
    """
    squares = squares.astype(np.float32, copy=False)  # what a file holds, so that a file makes no difference
    total = int(tokens.sum())
    if not total:
        return np.ones_like(squares)
    if len(tokens) == 1:
        return squares / np.float32(total)
    everywhere = squares.sum(0, dtype=np.float64) / total  # (inputs,)
    means = (squares + SHRINKAGE_TOKENS * everywhere) / (tokens[:, None] + SHRINKAGE_TOKENS)
    return means.astype(np.float32)


def scarce_notes(tokens: Mapping[str, np.ndarray]) -> list[str]:
    """A line for each weight no token reached, and for each with experts of fewer than SHRINKAGE_TOKENS tokens.

    `tokens` are int64 (matrices,) by weight.
    """
    notes = []
    for name, counts in tokens.items():
        few = np.flatnonzero(counts < SHRINKAGE_TOKENS)
        if not counts.any():
            notes.append(f"{shown(name)}: no token reached it; all its inputs count alike")
        elif len(counts) > 1 and len(few):
            listed = ", ".join(f"{expert} ({counts[expert]})" for expert in few[:LISTED])
            more = ", ..." if len(few) > LISTED else ""
            who = f"{len(few)} of {len(counts)} experts saw fewer than {SHRINKAGE_TOKENS} tokens"
            notes.append(f"{shown(name)}: {who} and lean on the mean of all: {listed}{more}")
    return notes


def read_imatrix(path: str | os.PathLike) -> ImportanceMatrix:
    """Open a GGUF or legacy importance matrix, told apart by their first bytes.

    Raises GGUFError where the file is damaged; an entry's values are looked at when it is asked for.
    """
    file = ImatrixFile.open(path)
    notes = scarce_notes({name: place.tokens for name, place in file.places.items()})
    if file.unused:
        notes.insert(
            0, f"{len(file.unused)} of its tensors are not used, the first is {shown(file.unused[0])}"
        )
    return ImportanceMatrix(
        MeanSquares(file), file.datasets, file.chunks, file.chunk_size, file.path, tuple(notes)
    )
