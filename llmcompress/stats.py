"""Statistics of a calibration: for each weight the tokens it saw and the sums of their squared inputs.

Sums merge over files, runs and ranks by addition, and their means are the importance matrix of llama.cpp and the norms
of Wanda (arXiv:2306.11695). On disk they are llama-imatrix's files, see `llmcompress.gguf.imatrix_file`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.imatrix import ImportanceMatrix, MeanSquares, scarce_notes
from llmcompress.gguf.imatrix_file import ImatrixFile
from llmcompress.gguf.imatrix_writer import write_gguf, write_legacy

LEGACY_CHUNK = 512  # tokens of a chunk where llama-imatrix is not told otherwise, and a .dat does not say


@dataclass
class TensorStats:
    """What went into one weight, or into each expert of a stacked one.

    tokens: int64 (matrices,). squares: float64 (matrices, inputs), the sums of x² over those tokens.
    """

    tokens: np.ndarray
    squares: np.ndarray

    @classmethod
    def zeros(cls, matrices: int, inputs: int) -> TensorStats:
        return cls(np.zeros(matrices, np.int64), np.zeros((matrices, inputs)))

    def add(self, matrix: int, tokens: int, squares: np.ndarray) -> None:
        """Count `tokens` more of a matrix, whose squared inputs add up to `squares` (inputs,)."""
        self.tokens[matrix] += tokens
        self.squares[matrix] += squares

    def fits(self, other: TensorStats) -> bool:
        """Whether they can be of the same weight: of one size, experts lying side by side or not."""
        same = self.squares.shape == other.squares.shape
        return same or (
            self.squares.size == other.squares.size and 1 in (len(self.tokens), len(other.tokens))
        )

    def merge(self, other: TensorStats) -> None:
        """Add the sums of another calibration. Raises GGUFError where they do not fit.

        From a legacy file all experts of a weight come in one row; they are put apart, each with its count.
        """
        if not self.fits(other):
            raise GGUFError(f"sums of {_size(self)} inputs and of {_size(other)} are not of one weight")
        matrices = max(len(self.tokens), len(other.tokens))
        mine, theirs = self._of(matrices), other._of(matrices)
        self.tokens, self.squares = mine.tokens + theirs.tokens, mine.squares + theirs.squares

    def copy(self) -> TensorStats:
        return TensorStats(self.tokens.copy(), self.squares.copy())

    def _of(self, matrices: int) -> TensorStats:
        if len(self.tokens) == matrices:
            return self
        return TensorStats(self.tokens.repeat(matrices), self.squares.reshape(matrices, -1))


@dataclass
class Statistics:
    """Sums by the GGUF names of the weights, and what they were taken from.

    chunks: pieces of text. chunk_size: tokens of the longest. notes: text by key, which a GGUF keeps as
    metadata `llmcompress.<key>`.
    """

    entries: dict[str, TensorStats] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike, chunk_size: int = LEGACY_CHUNK) -> Statistics:
        """Read a GGUF or `.dat` whole, told apart by content.

        A `.dat` counts calls, not tokens: `chunk_size` tokens are taken for each. Raises GGUFError where the file is
        damaged.
        """
        file = ImatrixFile.open(path)
        tokens_each = chunk_size if file.chunk_size is None else 1
        entries = {
            name: TensorStats(sums.tokens * tokens_each, sums.squares.astype(np.float64) * tokens_each)
            for name, sums in file.items()
        }
        size = chunk_size if file.chunk_size is None else file.chunk_size
        return cls(entries, file.datasets, file.chunks or 0, size, dict(file.notes))

    def save(self, path: str | os.PathLike) -> None:
        """Write a GGUF or a `.dat`, by the name's ending; it replaces `path` only when it is whole.

        Sums become float32. A `.dat` holds less: see `write_legacy`. Raises GGUFError for another ending and for
        sums beyond float32, LlmcompressError where the disk refuses.
        """
        if statistics_suffix(path) == ".gguf":
            write_gguf(path, self.entries, self.datasets, self.chunks, self.chunk_size, self.notes)
        else:
            write_legacy(path, self.entries, self.datasets, self.chunks, self.chunk_size)

    def merge(self, other: Statistics) -> None:
        """Add another calibration of the same model; weights that only one of them has are kept.

        Raises GGUFError, nothing being changed, where a weight has two sizes.
        """
        for name in self.entries.keys() & other.entries.keys():
            mine, theirs = self.entries[name], other.entries[name]
            if not mine.fits(theirs):
                sizes = f"{_size(mine)} inputs in one and {_size(theirs)} in the other"
                raise GGUFError(f"{shown(name)} has {sizes}; merge statistics of one model only")
        for name, theirs in other.entries.items():
            if name in self.entries:
                self.entries[name].merge(theirs)
            else:
                self.entries[name] = theirs.copy()
        self.datasets = tuple(dict.fromkeys(self.datasets + other.datasets))
        self.chunks += other.chunks
        self.chunk_size = max(self.chunk_size, other.chunk_size)
        self.notes = {
            key: _union(self.notes.get(key), other.notes.get(key)) for key in {**self.notes, **other.notes}
        }

    def importance(self, source: str | os.PathLike = "calibration") -> ImportanceMatrix:
        """The importance matrix a file of these sums would be read as; `source` is what it says it was read from.

        Its entries are computed from these sums when they are asked for.
        """
        notes = scarce_notes({name: stats.tokens for name, stats in self.entries.items()})
        means = MeanSquares(self.entries)
        return ImportanceMatrix(
            means, self.datasets, self.chunks, self.chunk_size, Path(source), tuple(notes)
        )


def statistics_suffix(path: str | os.PathLike) -> str:
    """The ending of a statistics file's name, which decides its format: `.gguf` or `.dat`. Raises GGUFError."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gguf", ".dat"):
        raise GGUFError(f"{path}: statistics go into a file that ends in .gguf or .dat; name it so")
    return suffix


def _size(stats: TensorStats) -> str:
    return " x ".join(map(str, stats.squares.shape))


def _union(*texts: str | None) -> str:
    """The lines of all texts, each once and in order, so that merging in any order says the same."""
    return "\n".join(sorted({line for text in texts if text is not None for line in text.split("\n")}))
