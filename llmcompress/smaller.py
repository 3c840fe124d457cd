"""A checkpoint of which layers, heads, channels or experts are left out: a view that every job reads as it reads a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress.checkpoint import Checkpoint
from llmcompress.tensor_info import DTYPE_BITS, TensorInfo
from llmcompress.wrapped import WrappedCheckpoint, folder_of_links


@dataclass(frozen=True)
class Kept:
    """What stays of the base's tensor `source`: by axis the indices that do, int64 and rising; of other axes, all."""

    source: str
    axes: tuple[tuple[int, np.ndarray], ...] = ()

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        kept = dict(self.axes)
        return tuple(len(kept[axis]) if axis in kept else size for axis, size in enumerate(whole))


class SmallerCheckpoint(WrappedCheckpoint):
    """The tensors `kept` of `base`, by their new names, under another config.json.

    replaced: tensors, by their new names, that are read as they are from there, such as weights that make up for what is
    gone. Raises ValueError for indices that the base's tensors do not have.
    """

    def __init__(
        self, base: Checkpoint, kept: Mapping[str, Kept], config: dict[str, Any],
        replaced: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base)
        self.config, self._kept, self._replaced = config, dict(kept), replaced
        self.index = {name: self._info(name, of) for name, of in kept.items()}
        self.stored = self.index
        self.rewritten = set(self.index)
        self._folder = folder_of_links(base, config)
        self.directory = Path(self._folder.name)

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if self._replaced and name in self._replaced.index:
            self._replaced.read_into(name, first, out)
            return
        of = self._kept[name]
        tensor = self.base.index[of.source]
        axes = dict(of.axes)
        columns = axes.pop(len(tensor.shape) - 1, None)
        if self._is_whole(name):
            self.base.read_into(of.source, first, out)
            return
        rows = _rows(tensor.shape[:-1], axes)[first : first + len(out)]
        for start, stop in _runs(rows):
            if columns is None:
                self.base.read_into(of.source, int(rows[start]), out[start:stop])
            else:
                out[start:stop] = self.base.read(of.source, int(rows[start]), stop - start)[:, columns]

    def read_bytes(self, name: str, position: int, size: int) -> bytes:
        if self._is_whole(name):
            return self.base.read_bytes(self._kept[name].source, position, size)
        return super().read_bytes(name, position, size)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            f"{self.base.fingerprint()} {json.dumps(self.config, sort_keys=True)}".encode()
        )
        for name, of in sorted(self._kept.items()):
            digest.update(repr((name, of.source, [(axis, kept.tolist()) for axis, kept in of.axes])).encode())
        if self._replaced:
            digest.update(self._replaced.fingerprint().encode())
        return digest.hexdigest()

    def close(self) -> None:
        super().close()
        if self._replaced:
            self._replaced.close()

    def _is_whole(self, name: str) -> bool:
        """Whether a tensor is one of the base's as it is."""
        return not self._kept[name].axes and not (self._replaced and name in self._replaced.index)

    def _info(self, name: str, of: Kept) -> TensorInfo:
        tensor = self.base.readable(of.source) if of.axes else self.base.index[of.source]
        for axis, kept in of.axes:
            if axis >= len(tensor.shape) or not len(kept) or kept[0] < 0 or kept[-1] >= tensor.shape[axis]:
                raise ValueError(f"{of.source}: {tensor.shape} has not all that is kept of axis {axis}")
            if (np.diff(kept) <= 0).any():
                raise ValueError(f"{of.source}: what is kept of axis {axis} does not rise")
        shape = of.shape(tensor.shape)
        nbytes = math.prod(shape) * DTYPE_BITS[tensor.dtype] // 8
        return TensorInfo(name, shape, tensor.dtype, tensor.file, tensor.offset, nbytes)


def _rows(shape: tuple[int, ...], kept: Mapping[int, np.ndarray]) -> np.ndarray:
    """int64: the rows of a tensor, seen as a matrix, that stay, where `shape` is that of all axes but the last."""
    rows = np.zeros(1, np.int64)
    for axis, size in enumerate(shape):
        rows = (rows[:, None] * size + kept.get(axis, np.arange(size))).ravel()
    return rows


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin and end."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    yield from zip([0, *ends.tolist()], [*ends.tolist(), len(rows)])
