"""XᵀX of a model's weights, by their GGUF names: a folder that `calibrate --hessian` fills and GPTQ reads.

`index.json` says for each weight which file has the sums of each of its matrices, and of how many tokens they are;
`index.safetensors` has Σx² of every file, in float64, so that importance is had without reading the rest.
Weights with the same inputs (q, k and v; gate and up) share a file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from llmcompress.errors import LlmcompressError, shown
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS, mean_squares, scarce_notes
from llmcompress.json_object import read_object
from llmcompress.stats import TensorStats
from llmcompress.whole_file import whole_file

INDEX, SQUARES = "index.json", "index.safetensors"
Places = list[tuple[str, int]]  # of each matrix of a weight: a parameter of the model, and a matrix of it


def write_index(
    folder: Path, places: Mapping[str, Places], sums: Mapping[str, TensorStats], about: Mapping[str, Any]
) -> None:
    """Describe the files `<parameter>.safetensors` of a folder, and remove those that are copies of others.

    places: by GGUF name. sums: Σx² and tokens by parameter, for those that got any.
    """
    files: dict[bytes, str] = {}
    file_of = {}
    for name in sorted(sums):
        same_inputs = sums[name].tokens.tobytes() + sums[name].squares.tobytes()
        file_of[name] = files.setdefault(same_inputs, name)
    weights = {
        name: [
            {"file": f"{file_of[parameter]}.safetensors", "matrix": matrix, "tokens": int(sums[parameter].tokens[matrix])}
            for parameter, matrix in where
        ]
        for name, where in places.items()
        if all(parameter in sums for parameter, _ in where)
    }  # fmt: skip
    squares = {f"{name}.safetensors": sums[name].squares for name in set(file_of.values())}
    with whole_file(folder / SQUARES) as file:
        file.write(safetensors.numpy.save(squares))
    with whole_file(folder / INDEX) as file:
        file.write(json.dumps({**about, "weights": weights}, indent=1).encode())
    for name, kept in file_of.items():
        if name != kept:
            (folder / f"{name}.safetensors").unlink(missing_ok=True)


class Leaning:
    """XᵀX of matrices of which some saw few tokens: experts lean on the mean of all, as `mean_squares` has it.

    To each of several XᵀX as many tokens of their mean are added as SHRINKAGE_TOKENS says: with few of its own, all that an
    expert gets is that mean; with many, it makes no difference. The latest mean is kept."""

    def __init__(self) -> None:
        self._name, self._mean, self._adding = "", None, threading.Lock()

    def products(
        self, name: str, tokens: np.ndarray, read: Callable[[int], np.ndarray], matrix: int
    ) -> np.ndarray | None:
        """float32 (inputs, inputs). tokens: int64 (matrices,); read: XᵀX by the number of a matrix."""
        if not tokens.any():
            return None
        if len(tokens) == 1:
            return read(matrix)
        with self._adding:
            if self._name != name:
                first, *others = np.flatnonzero(tokens)
                total = read(first).copy()
                for n in others:
                    total += read(n)
                self._name, self._mean = name, total / np.float32(tokens.sum())
            leant = np.float32(SHRINKAGE_TOKENS) * self._mean
            return leant + read(matrix) if tokens[matrix] else leant


class HessianFolder:
    """A folder of XᵀX as a source of importance (see importance.py) that has `products` too.

    Raises LlmcompressError for a folder that is none, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.source = Path(folder)
        if not (self.source / INDEX).is_file():
            raise LlmcompressError(
                f"{folder}: has no {INDEX}; make the folder with `llmcompress calibrate MODEL --hessian {folder}`"
            )
        held = read_object(self.source / INDEX)
        self.entries: dict[str, list[dict[str, Any]]] = held.get("weights")
        self.datasets, self.chunks = held.get("datasets", []), held.get("chunks")
        if not (
            isinstance(self.entries, dict)
            and all(map(_is_places, self.entries.values()))
            and isinstance(self.datasets, list)
            and all(isinstance(name, str) for name in self.datasets)
            and (self.chunks is None or _is_count(self.chunks))
        ):
            raise LlmcompressError(f"{self.source / INDEX}: is damaged; calibrate again")
        self.datasets = tuple(self.datasets)
        self._leaning = Leaning()
        self.notes = tuple(scarce_notes({name: _tokens(places) for name, places in self.entries.items()}))

    def weights(self, name: str, matrices: int, inputs: int) -> np.ndarray:
        """Mean squared inputs, float32 (matrices, inputs)."""
        places = self.entries[name]
        squares = np.stack([self._slice(SQUARES, place["file"], place["matrix"]) for place in places])
        if squares.ndim != 2 or squares.dtype != np.float64 or not np.isfinite(squares).all():
            raise LlmcompressError(f"{self.source / SQUARES}: holds no sums of squares; calibrate again")
        if squares.shape != (matrices, inputs):
            held = (
                f"is for {squares.shape[0]} x {squares.shape[1]} inputs, the weight has {matrices} x {inputs}"
            )
            raise LlmcompressError(f"{self.source}: {shown(name)} {held}; it was made from another model")
        return mean_squares(_tokens(places), squares)

    def products(self, name: str, matrix: int) -> np.ndarray | None:
        """XᵀX, float32 (inputs, inputs), of one matrix of a weight, as `Leaning` has it; None where no token reached any."""
        places = self.entries[name]
        return self._leaning.products(name, _tokens(places), lambda n: self._read(places[n]), matrix)

    def shared(self, name: str, matrix: int) -> tuple[str, int]:
        """Equal for two matrices that have the same inputs."""
        place = self.entries[name][matrix]
        return place["file"], place["matrix"]

    def _read(self, place: Mapping[str, Any]) -> np.ndarray:
        sums = self._slice(place["file"], "products", place["matrix"])
        square = sums.ndim == 2 and sums.shape[0] == sums.shape[1]
        if not square or sums.dtype != np.float32 or not np.isfinite(sums).all():
            raise LlmcompressError(
                f"{self.source / place['file']}: holds no sums of products; calibrate again"
            )
        return sums

    def _slice(self, file_name: str, key: str, matrix: int) -> np.ndarray:
        path = self.source / file_name
        try:
            with safe_open(path, "np") as file:
                return file.get_slice(key)[matrix]
        except (SafetensorError, OSError, IndexError) as error:
            raise LlmcompressError(f"{path}: cannot be read ({error}); calibrate again") from None


def _is_places(places: object) -> bool:
    return isinstance(places, list) and bool(places) and all(
        isinstance(place, dict) and isinstance(place.get("file"), str) and Path(place["file"]).name == place["file"]
        and _is_count(place.get("matrix")) and _is_count(place.get("tokens"))
        for place in places
    )  # fmt: skip


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tokens(places: list[dict[str, Any]]) -> np.ndarray:
    """int64 (matrices,)."""
    return np.array([place["tokens"] for place in places], np.int64)
