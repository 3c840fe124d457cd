"""A checkpoint with an adapter on it, which reads like any other: weights are merged row by row as they are read.

Tensors that the adapter changes are float32. What a row becomes does not depend on which rows are read with it, so
merging on the way and merging first give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmcompress.adapter import Adapter, LowRank, Tokens, finite
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, nearest, shown
from llmcompress.grids.compiled import compiled
from llmcompress.grids.floats import to_float32
from llmcompress.tensor_info import TensorInfo
from llmcompress.wrapped import WrappedCheckpoint, folder_of_links

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
CHUNK = 2**20  # weights of a tensor read at a time where its columns are measured
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json")  # fmt: skip


@dataclass(frozen=True)
class Patch:
    """`rows` rows of a checkpoint's tensor, from `first` on, that a matrix of an update is added to, from its output
    `start` on. flipped: the tensor is (inputs, outputs), as GPT-2 keeps it."""

    update: LowRank
    first: int
    rows: int
    matrix: int = 0
    start: int = 0
    flipped: bool = False

    def left(self, first: int, rows: int) -> np.ndarray:
        """float32 (rows, rank), of the tensor's rows from `first` on."""
        if self.flipped:
            first -= self.first
            return np.ascontiguousarray(self.update.a(self.matrix)[:, first : first + rows].T)
        return self.update.b(self.start + first - self.first, rows, self.matrix)

    def right(self) -> np.ndarray:
        """float32 (rank, columns)."""
        if self.flipped:
            return np.ascontiguousarray(self.update.b(matrix=self.matrix).T)
        return self.update.a(self.matrix)

    @property
    def by_column(self) -> bool:
        """Whether DoRA's lengths are those of columns."""
        return self.flipped or self.update.embedding


@dataclass(frozen=True)
class Change:
    """All that happens to one tensor: another source, then what is added, then single rows."""

    source: TensorInfo | None = None  # of the adapter, in place of the checkpoint's
    patches: tuple[Patch, ...] = ()
    tokens: Tokens | None = None
    bias: tuple[float, TensorInfo] | None = None


def bind(
    adapter: Adapter, index: Mapping[str, TensorInfo], patches: Mapping[str, Sequence[Patch]]
) -> dict[str, Change]:
    """What an adapter does to the tensors of `index`, by name, `patches` being where its matrices go.

    Raises PlanError for what the checkpoint has no tensor for, and for tensors of other shapes."""
    changes = {name: Change(patches=tuple(found)) for name, found in patches.items()}
    for name, tensor in adapter.full.items():
        own = found_name(adapter, index, name)
        was = index.get(own) or index[embedding_name(adapter, index)]
        grown = own == HEAD or own.endswith(EMBEDDINGS)
        if tensor.shape[grown:] != was.shape[grown:] or len(tensor.shape) != len(was.shape):
            raise _misfit(adapter, tensor.name, tensor.shape, was)
        changes[own] = replace(changes.get(own, Change()), source=tensor)
    for rows in adapter.tokens:
        own = found_name(adapter, index, rows.name)
        was = changes[own].source if own in changes and changes[own].source else index[own]
        if rows.tensor.columns != was.columns or max(rows.indices, default=0) >= was.rows:
            raise _misfit(adapter, rows.tensor.name, (max(rows.indices) + 1, rows.tensor.columns), was)
        changes[own] = replace(changes.get(own, Change()), tokens=rows)
    for name, (scale, tensor) in adapter.biases.items():
        own = found_name(adapter, index, name)
        if index[own].shape != tensor.shape:
            raise _misfit(adapter, tensor.name, tensor.shape, index[own])
        changes[own] = replace(changes.get(own, Change()), bias=(scale, tensor))
    return changes


def found_name(adapter: Adapter, index: Mapping[str, TensorInfo], name: str) -> str:
    """What the checkpoint calls a tensor of transformers' model: the same, but for the model's own prefix. The head has
    its name even where it is the embedding. Raises PlanError."""
    found = find_name(index, name)
    if found is None:
        raise PlanError(
            f"{adapter.directory}: changes {shown(name)}, the checkpoint has no tensor of this name{nearest(name, index)}; "
            f"give the model it was trained on{f', {shown(adapter.base)}' if adapter.base else ''}"
        )
    return found


def without_copies(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """The adapter without the tensors that are the checkpoint's own: peft saves an embedding that it adapts."""
    full = {
        name: tensor
        for name, tensor in adapter.full.items()
        if not _is_copy(adapter, checkpoint, name, tensor)
    }
    return replace(adapter, full=full)


def _is_copy(adapter: Adapter, checkpoint: Checkpoint, name: str, tensor: TensorInfo) -> bool:
    was = checkpoint.index.get(find_name(checkpoint.index, name) or "")
    if was is None or was.shape != tensor.shape:
        return False
    height = max(1, CHUNK // was.columns)
    for top in range(0, was.rows, height):
        rows = min(height, was.rows - top)
        read = (
            (checkpoint.read(was.name, top, rows), was.dtype),
            (adapter.weights.read(tensor.name, top, rows), tensor.dtype),
        )
        if not np.array_equal(*(to_float32(raw, dtype) for raw, dtype in read)):
            return False
    return True


def find_name(index: Mapping[str, TensorInfo], name: str) -> str | None:
    """As `found_name`, None where there is none."""
    if name in index or name == HEAD:
        return name
    near = [other for other in index if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return near[0] if len(near) == 1 else None


def embedding_name(adapter: Adapter, index: Mapping[str, TensorInfo]) -> str:
    found = [name for name in index if name.endswith(EMBEDDINGS)]
    if len(found) != 1:
        raise PlanError(f"{adapter.directory}: changes {HEAD}, which the checkpoint lacks; {_OTHER_BASE}")
    return found[0]


_OTHER_BASE = "give the model it was trained on"


def _misfit(adapter: Adapter, name: str, shape: Sequence[int], was: TensorInfo) -> PlanError:
    return PlanError(
        f"{adapter.directory}: {shown(name)} is for a tensor of {'x'.join(map(str, shape))}, {was.name} is "
        f"{'x'.join(map(str, was.shape))}; {_OTHER_BASE}"
    )


class MergedCheckpoint(WrappedCheckpoint):
    """`base` with `changes` made to it; zeros of `unrounded`, of its matrices, stay zeros where the adapter was trained
    so. Reading is safe from any number of threads."""

    def __init__(
        self, base: Checkpoint, adapter: Adapter, changes: Mapping[str, Change], unrounded: Checkpoint
    ) -> None:
        super().__init__(base)
        self.adapter = adapter
        self._held = unrounded if adapter.keeps_zeros else None
        self.files = (*base.files, *adapter.weights.files)
        self._changes = dict(changes)
        self._sources: dict[str, str] = {}  # tensors that are read from another one of the base
        self._lengths: dict[str, np.ndarray] = {}
        self._measuring = threading.Lock()
        for name, change in changes.items():
            if name not in base.index:  # a head of its own, where the base had the embedding's
                self._sources[name] = embedding_name(adapter, base.index)
            was = change.source or base.readable(self._sources.get(name, name))
            plain = change == Change(source=change.source)
            self.index[name] = was.rewritten(name, was.dtype if plain else "F32")
        self._untie()
        self._resize()
        self.rewritten = self._changes.keys() | self._sources.keys()
        self._folder: tempfile.TemporaryDirectory | None = None
        self.directory = self._directory()

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        change = self._changes.get(name, Change())
        if change == Change(source=change.source):
            holder = self.adapter.weights if change.source else self.base
            holder.read_into(change.source.name if change.source else self.source_name(name), first, out)
            return
        self._source_into(name, first, out)
        for patch in change.patches:
            self._patch(name, patch, first, out)
        if change.tokens:
            self._replace(change.tokens, first, out)
        if change.bias:
            scale, tensor = change.bias
            out += np.float32(scale) * finite(self.adapter.weights.read(tensor.name), tensor)
        if self._held and len(self.index[name].shape) > 1:
            own = self.source_name(name)
            was = self._held.read(own, first, len(out))
            out[to_float32(was, self._held.index[own].dtype) == 0] = 0

    def fingerprint(self) -> str:
        parts = (self.base.fingerprint(), self.adapter.weights.fingerprint(), str(bool(self._held)))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def let_go(self, names: set[str]) -> None:
        self.base.let_go({self.source_name(name) for name in names})

    def close(self) -> None:
        self.base.close()
        self.adapter.weights.close()

    def source_name(self, name: str) -> str:
        """The base's tensor that one of ours is read from, or stands in the place of."""
        return self._sources.get(name, name)

    @property
    def notes(self) -> list[str]:
        """What a user of the weights should know."""
        found = [
            *self.base.notes,
            f"{self.adapter.kind} of {self.adapter.directory}: changes {len(self._changes)} tensors of {len(self.index)}",
        ]
        if self._held:
            found.append("zeros of the model stay zeros, as the adapter was trained")
        if self.config.get("tie_word_embeddings") != self.base.config.get("tie_word_embeddings"):
            found.append(
                f"{HEAD}: a tensor of its own, since the adapter changes only one of embedding and head"
            )
        if (size := self.config.get("vocab_size")) != (was := self.base.config.get("vocab_size")):
            found.append(f"vocabulary: {size} tokens, the base has {was}")
        return found

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self._changes)

    def _source_into(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill `out`, float32, with the rows that are changed."""
        source = self._changes[name].source
        if source:
            out[...] = finite(self.adapter.weights.read(source.name, first, len(out)), source)
        else:
            own = self.source_name(name)
            out[...] = to_float32(self.base.read(own, first, len(out)), self.base.index[own].dtype)

    def _patch(self, name: str, patch: Patch, first: int, out: np.ndarray, scaled: bool = True) -> None:
        """Add to the rows from `first` on what falls on them, and give them DoRA's lengths."""
        begin, end = max(first, patch.first), min(first + len(out), patch.first + patch.rows)
        if begin >= end:
            return
        rows = out[begin - first : end - first]
        add_product(patch.left(begin, end - begin), patch.right(), np.float32(patch.update.scale), rows)
        magnitude = patch.update.magnitude
        if magnitude is None or not scaled:
            return
        if patch.by_column:
            rows *= _ratio(magnitude, self._column_lengths(name, patch))
        else:
            outputs = slice(patch.start + begin - patch.first, patch.start + end - patch.first)
            rows *= _ratio(magnitude[outputs], np.sqrt(np.square(rows, dtype=np.float64).sum(1)))[:, None]

    def _column_lengths(self, name: str, patch: Patch) -> np.ndarray:
        """float64 (columns,): the lengths of a whole tensor's columns before DoRA sets them."""
        with self._measuring:
            if name not in self._lengths:
                tensor = self.index[name]
                height = max(1, CHUNK // tensor.columns)
                squares = np.zeros(tensor.columns)
                for top in range(0, tensor.rows, height):
                    part = np.empty((min(height, tensor.rows - top), tensor.columns), np.float32)
                    self._source_into(name, top, part)
                    self._patch(name, patch, top, part, scaled=False)
                    squares += np.square(part, dtype=np.float64).sum(0)
                self._lengths[name] = np.sqrt(squares)
            return self._lengths[name]

    def _replace(self, tokens: Tokens, first: int, out: np.ndarray) -> None:
        values = finite(self.adapter.weights.read(tokens.tensor.name), tokens.tensor)
        for row, value in zip(tokens.indices, values):
            if first <= row < first + len(out):
                out[row - first] = value

    def _untie(self) -> None:
        """A head that is no longer the embedding gets a tensor of its own, and one that still is has none."""
        name = next((name for name in self.base.index if name.endswith(EMBEDDINGS)), None)
        embedding, head = self._changes.get(name), self._changes.get(HEAD)
        tied = HEAD not in self.base.index or self.config.get("tie_word_embeddings")
        if not tied or not (embedding or head):
            return
        if self._stay_tied(self.base.index[name], embedding, head):
            for known in (self._changes, self.index, self._sources):
                known.pop(HEAD, None)
            return
        if HEAD not in self.index:
            self._sources[HEAD] = name
            self.index[HEAD] = self.base.index[name].rewritten(HEAD, self.base.index[name].dtype)
        self.config["tie_word_embeddings"] = False

    def _stay_tied(self, was: TensorInfo, embedding: Change | None, head: Change | None) -> bool:
        """An adapter of one of the two leaves the other as it was. But tokens that are added or trained by themselves
        are in both, and peft can be told to keep them tied."""
        if head:
            both = embedding and embedding.source and head.source
            return bool(both) and self._same(embedding.source, head.source)
        grown = embedding.source is not None and embedding.source.rows != was.rows
        alone = embedding == Change(tokens=embedding.tokens)
        return grown or alone or bool(self.adapter.config.get("ensure_weight_tying"))

    def _same(self, first: TensorInfo, second: TensorInfo) -> bool:
        """Whether two tensors of the adapter are the same."""
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        read = self.adapter.weights.read_bytes
        return all(
            read(first.name, at, min(CHUNK, first.nbytes - at))
            == read(second.name, at, min(CHUNK, first.nbytes - at))
            for at in range(0, first.nbytes, CHUNK)
        )

    def _resize(self) -> None:
        """config.json counts the tokens that were added. Raises PlanError where only one of embedding and head got them."""
        name = next((name for name in self.index if name.endswith(EMBEDDINGS)), None)
        if name is None or not {name, HEAD} & self._changes.keys():
            return
        rows = self.index[name].rows
        if HEAD in self.index and self.index[HEAD].rows != rows:
            raise PlanError(
                f"{self.adapter.directory}: {name} has {rows} rows, {HEAD} {self.index[HEAD].rows}; save the adapter "
                "with save_embedding_layers=True"
            )
        if rows != self.base.index[name].rows:
            self.config["vocab_size"] = rows

    def _directory(self) -> Path:
        """The base's folder, or where the config or the tokenizer are others, a folder of links in its place."""
        own = {name for name in TOKENIZER_FILES if (self.adapter.directory / name).is_file()}
        new = bool(own.intersection(VOCABULARIES))
        if self.config == self.base.config and not own:
            return self.base.directory
        self._folder = folder_of_links(self.base, self.config, TOKENIZER_FILES if new else own)
        folder = Path(self._folder.name)
        for name in own:
            os.symlink((self.adapter.directory / name).resolve(), folder / name)
        return folder


def _ratio(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """float32: what rows or columns of lengths `found` are multiplied by; zeros stay zeros."""
    return np.divide(wanted, found, out=np.zeros(len(wanted)), where=found > 0).astype(np.float32)


@compiled(fastmath={"contract"})
def add_product(left, right, scale, out):
    """out += scale * left @ right: float32 (rows, rank), (rank, columns), (rows, columns). Each row by itself."""
    rank, columns = right.shape
    sums = np.empty(columns, np.float32)
    for row in range(left.shape[0]):
        sums[:] = 0
        for k in range(0, rank - rank % 4, 4):
            a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
            for j in range(columns):
                sums[j] += a * right[k, j] + b * right[k + 1, j] + c * right[k + 2, j] + d * right[k + 3, j]
        for k in range(rank - rank % 4, rank):
            a = left[row, k]
            for j in range(columns):
                sums[j] += a * right[k, j]
        for j in range(columns):
            out[row, j] += scale * sums[j]
