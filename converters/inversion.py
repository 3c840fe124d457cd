"""Which rows of a GGUF file are which of the checkpoint it was made from: the tables, walked backwards.

The forward steps say which piece of a checkpoint's tensor became which rows of a GGUF tensor. Sorted by the
checkpoint's tensors they say where each of these is found again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmcompress.converters.architecture import Architecture, steps_of, told_keys, told_names
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture
from llmcompress.converters.shapes import shape_text
from llmcompress.converters.tokenizer import read_vocabulary

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import GGUFError, nearest, shown
from llmcompress.gguf.reader import GGUFFile, StoredTensor
from llmcompress.gguf.value import Metadata
from llmcompress.grids import GRIDS
from llmcompress.step import Piece, Step
from llmcompress.tensor_info import TensorInfo

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# The order of rows and the number of tensors follow from these: another value means another model.
DECIDING = ("block_count", "attention.head_count", "attention.head_count_kv")
REMEDY = "give the checkpoint that the file was made from"


@dataclass(frozen=True)
class Part:
    """A piece of a checkpoint's tensor that is the rows from `start` on of the GGUF tensor `step` makes."""

    piece: Piece
    step: Step
    start: int


@dataclass(frozen=True)
class DecodedTensor:
    """A tensor of the checkpoint, described as TensorInfo describes it, and where a GGUF file has its values; without
    parts, one whose values are in the metadata, and read from the checkpoint."""

    source: TensorInfo
    parts: tuple[Part, ...]
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def columns(self) -> int:
        return self.source.columns

    @property
    def stored_rows(self) -> int:
        """Rows that the file has: all, but for embeddings it was given without the rows that no token uses."""
        if any(part.step.operation.transposed for part in self.parts):
            return self.rows
        pieces = [part.piece for part in self.parts]
        return max((piece.first + (piece.rows - 1) * piece.stride + 1 for piece in pieces), default=0)


def match(files: Sequence[GGUFFile], reference: Checkpoint) -> tuple[dict[str, DecodedTensor], list[str]]:
    """Every tensor of `reference` that is in the GGUF `files`, by name, and notes on what differs.

    Raises GGUFError for files of another architecture, and for a tensor that is missing, of another shape than
    the reference makes, or of a type that cannot be decoded; PlanError or CheckpointError for a reference that
    no GGUF can be made from.
    """
    reference.require_plain()
    architecture = find_architecture(Config(reference.config))
    config = architecture.config(reference.config)
    holders = {name: file for file in files for name in file.tensors}
    made = architecture.metadata(config) | told_keys(architecture, config, reference)
    notes = _differences(files[0], architecture, made)
    tokens = _tokens(architecture, config, reference, holders)
    steps, _ = steps_of(architecture, reference, tokens)
    head = _head(architecture, reference, steps)
    steps = [step for step in steps if step.name != HEAD]
    if head and HEAD not in holders:  # llama.cpp takes the embedding, too
        if not config.tied:
            notes.append(f"{_source(head)}: the GGUF has no {HEAD}, so it is read from {EMBEDDING}")
        head = replace(head, name=EMBEDDING)
    steps += [head] if head else []
    used = [step for step in steps if step.pieces]
    for step in used:
        _check(step, holders, files[0], reference)
    notes += _left_out(steps, holders)
    index = _inverted(used)
    notes += [
        f"{tensor.name}: {tensor.rows - tensor.stored_rows} rows of {tensor.rows} belong to no token and are not in "
        "the GGUF; they are the checkpoint's own"
        for tensor in index.values()
        if tensor.stored_rows < tensor.rows
    ]
    told = told_names(architecture, config)
    return index | {name: DecodedTensor(reference.index[name], ()) for name in told}, notes


def _differences(file: GGUFFile, architecture: Architecture, made_keys: Metadata) -> list[str]:
    """Notes on metadata that the checkpoint's config would make otherwise. Raises GGUFError for another model's."""
    found = {key: value.value for key, value in file.metadata.items()}
    name = found.get("general.architecture")
    if name != architecture.name:
        raise GGUFError(
            f"{file.path}: general.architecture is {shown(name)}, a {architecture.classes[0]} makes it "
            f"{architecture.name!r}; {REMEDY}"
        )
    notes = []
    for key, made in made_keys.items():
        if key in found and not _same(found[key], made.value):
            says = f"{key} is {shown(found[key])} in the GGUF, {shown(made.value)} by config.json"
            if key.removeprefix(f"{architecture.name}.") in DECIDING:
                raise GGUFError(f"{file.path}: {says}; {REMEDY}")
            notes.append(f"{says}, which is taken")
    return notes


def _same(found: object, made: object) -> bool:
    numbers = isinstance(found, (int, float)) and isinstance(made, (int, float))
    return math.isclose(found, made, rel_tol=1e-6) if numbers else found == made


def _tokens(
    architecture: Architecture, config: Config, reference: Checkpoint, holders: dict[str, GGUFFile]
) -> int:
    """The vocabulary's size: config.json's, to which tokens are padded, or where they decide how many rows the
    embedding keeps and the file does not have all, the tokenizer's."""
    rows = config.need("vocab_size")
    stored = _stored(EMBEDDING, holders)
    if not architecture.tokens_decide_rows or stored is None or stored.shape[:1] == (rows,):
        return rows
    return len(read_vocabulary(reference.directory, reference.config, pad=False).tokens)


def _head(architecture: Architecture, reference: Checkpoint, steps: Iterable[Step]) -> Step | None:
    """The step that makes the head, also of one that was left out because it is the embedding again."""
    by_name = {step.name: step for step in steps}
    if HEAD in by_name:
        return by_name[HEAD]
    names = [f"{module}.weight" for module, rule in architecture.tensors.items()
             if rule and f"{rule.targets[0]}.weight" == HEAD]  # fmt: skip
    heads = [reference.index[name] for name in names if name in reference.index]
    embedding = by_name[EMBEDDING]
    pieces = tuple(replace(piece, tensor=head) for piece in embedding.pieces for head in heads)
    return replace(embedding, name=HEAD, pieces=pieces) if heads else None


def _check(step: Step, holders: dict[str, GGUFFile], first: GGUFFile, reference: Checkpoint) -> None:
    """Raises GGUFError unless the file has the tensor `step` makes, in its shape and a type that can be decoded."""
    stored, made = _stored(step.name, holders), shape_text(step.stored_shape)
    if stored is None:
        raise GGUFError(
            f"{first.path}: no tensor {step.name} ({made}), which {_source(step)} becomes"
            f"{nearest(step.name, holders) or f'; {REMEDY}'}"
        )
    where = f"{holders[step.name].path}: tensor {step.name}"
    if stored.shape != step.stored_shape:
        raise GGUFError(
            f"{where} is {shape_text(stored.shape)}, {_source(step)} of {reference.directory} makes it "
            f"{made}; {REMEDY}"
        )
    if stored.type.name not in GRIDS:
        raise GGUFError(
            f"{where} is {stored.type.name}, which cannot be decoded (known: {', '.join(GRIDS)}); quantize it anew"
        )


def _stored(name: str, holders: dict[str, GGUFFile]) -> StoredTensor | None:
    return holders[name].tensors[name] if name in holders else None


def _source(step: Step) -> str:
    return step.pieces[0].tensor.name


def _left_out(steps: Iterable[Step], holders: dict[str, GGUFFile]) -> list[str]:
    names = holders.keys() - {step.name for step in steps}
    if not names:
        return []
    listed = ", ".join(map(shown, sorted(names)[:4])) + (", ..." if len(names) > 4 else "")
    return [
        f"tensors of the GGUF that nothing in the checkpoint becomes are left out, {len(names)}: {listed}"
    ]


def _inverted(steps: Iterable[Step]) -> dict[str, DecodedTensor]:
    sources: dict[str, TensorInfo] = {}
    parts: dict[str, list[Part]] = {}
    for step in steps:
        start = 0
        for piece in step.pieces:
            sources[piece.tensor.name] = piece.tensor
            parts.setdefault(piece.tensor.name, []).append(Part(piece, step, start))
            start += piece.rows
    return {name: DecodedTensor(source, tuple(parts[name])) for name, source in sources.items()}
