"""Where the matrices of an adapter go in a checkpoint: mostly to tensors of the same name.

Where a checkpoint has other names than the model that transformers makes of it, the tables say which is which; and of
experts, which are single linears in the one and one stacked tensor in the other, which rows are which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from llmcompress.converters.architecture import pieces_of
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps

from llmcompress.adapter import Adapter, LowRank
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, nearest, shown
from llmcompress.merged import (
    MergedCheckpoint,
    Patch,
    bind,
    embedding_name,
    find_name,
    found_name,
    without_copies,
)
from llmcompress.step import Piece
from llmcompress.tensor_info import TensorInfo

ONTO = ("16bit", "nf4")


def open_with(model: str | Path, adapter: str | Path | None) -> Checkpoint:
    """A checkpoint, with an adapter in it where one is given. Raises LlmcompressError."""
    checkpoint = Checkpoint.open(model)
    return with_adapter(checkpoint, adapter) if adapter else checkpoint


def with_adapter(checkpoint: Checkpoint, adapter: str | Path, onto: str | None = None) -> MergedCheckpoint:
    """The checkpoint with an adapter, a folder or a hub id, merged into it as it is read.

    onto: "16bit", the weights as they are, or "nf4", rounded as QLoRA has them in training; by default what the adapter
    says of itself. Raises LlmcompressError.
    """
    opened = Adapter.open(adapter)
    base = _base(checkpoint, opened, onto)
    opened, patches = place(opened, base)
    return MergedCheckpoint(base, opened, bind(opened, base.index, patches), unrounded=checkpoint)


def place(adapter: Adapter, checkpoint: Checkpoint) -> tuple[Adapter, dict[str, list[Patch]]]:
    """The adapter by the checkpoint's names, without what is a copy of the checkpoint's, and what its matrices add to
    each tensor. Raises PlanError for a matrix that fits none, or one of another shape."""
    places = Places(adapter, checkpoint)
    return without_copies(places.renamed(), checkpoint), places.patches()


def _base(checkpoint: Checkpoint, adapter: Adapter, onto: str | None) -> Checkpoint:
    """What the adapter is merged into. A checkpoint that is quantized already is decoded, and taken as it is."""
    if onto not in (None, *ONTO):
        raise PlanError(f"--onto {onto}: none of {', '.join(ONTO)}{nearest(onto, ONTO)}")
    if checkpoint.notes:
        if onto == "16bit":
            raise PlanError(f"--onto 16bit: {checkpoint.directory} is quantized; give the unquantized model")
        return checkpoint
    if (onto or ("nf4" if adapter.trained_in_nf4 else "16bit")) == "16bit":
        return checkpoint
    from llmcompress.converters.onto_nf4 import RoundedCheckpoint

    own = "as its finetune.json says it was trained; --onto 16bit takes them as they are"
    return RoundedCheckpoint(checkpoint, own if onto is None else "as asked")


class Places:
    """The places of an adapter's matrices in a checkpoint."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint) -> None:
        self.adapter, self.checkpoint = adapter, checkpoint

    def patches(self) -> dict[str, list[Patch]]:
        """What is added to each tensor. Raises PlanError for a matrix that fits none, or one of another shape."""
        found: dict[str, list[Patch]] = {}
        for update in self.adapter.low_rank:
            for name, patch in self._patches(update):
                taken = found.setdefault(name, [])
                if any(
                    patch.first < other.first + other.rows and other.first < patch.first + patch.rows
                    for other in taken
                ):
                    raise PlanError(
                        f"{self.adapter.directory}: changes {shown(name)} twice; save the adapter again"
                    )
                taken.append(patch)
        return found

    def renamed(self) -> Adapter:
        """The adapter, its whole tensors, rows and biases by the checkpoint's names."""
        shapes = {name: tensor.shape for name, tensor in self.adapter.full.items()}
        shapes |= {name: tensor.shape for name, (_, tensor) in self.adapter.biases.items()}
        shapes |= {tokens.name: tokens.tensor.shape for tokens in self.adapter.tokens}
        names = {name: self._found(name, shape) or name for name, shape in shapes.items()}
        return replace(
            self.adapter,
            full={names[name]: tensor for name, tensor in self.adapter.full.items()},
            tokens=tuple(replace(tokens, name=names[tokens.name]) for tokens in self.adapter.tokens),
            biases={names[name]: bias for name, bias in self.adapter.biases.items()},
        )

    def _found(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The checkpoint's tensor of this name, or which becomes the same of the GGUF; None where there is none."""
        own = find_name(self.checkpoint.index, name)
        if own in self.checkpoint.index:
            return own
        made = self._pieces_of(self._named(name, shape))
        return self._names.get(tuple(place for place, _ in made), own)

    def _named(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """A tensor as the checkpoint might have it."""
        return TensorInfo(name, shape, "F32", self.adapter.directory, 0, 0)

    def _patches(self, update: LowRank) -> list[tuple[str, Patch]]:
        index = self.checkpoint.index
        stack = (update.matrices,) if update.matrices > 1 else ()
        name = self._found(update.name, (*stack, update.outputs, update.inputs))
        if name is None:
            return self._among_experts(update)
        tensor = index.get(name) or index[embedding_name(self.adapter, index)]
        self._check(update, tensor)
        flipped = tensor.shape[-2:] != (update.outputs, update.inputs)
        if update.outputs == update.inputs and not update.embedding:
            flipped = self._is_flipped(name)
        rows = tensor.shape[-2]
        return [
            (name, Patch(update, matrix * rows, rows, matrix, 0, flipped))
            for matrix in range(update.matrices)
        ]

    def _check(self, update: LowRank, tensor: TensorInfo) -> None:
        stack = (update.matrices,) if len(tensor.shape) == 3 or update.matrices > 1 else ()
        fits = ((*stack, update.outputs, update.inputs), (*stack, update.inputs, update.outputs))
        if tensor.shape not in fits[: 1 if update.embedding else 2]:
            raise PlanError(
                f"{self.adapter.directory}: {shown(update.name)} is changed by matrices of "
                f"{'x'.join(map(str, fits[0]))}, {tensor.name} is {'x'.join(map(str, tensor.shape))}; "
                "give the model it was trained on"
            )

    def _is_flipped(self, name: str) -> bool:
        """Whether a square weight is (inputs, outputs): by the model's table, else as the adapter says."""
        uses = [step.operation.transposed for step in self._steps or ()
                for piece in step.pieces if piece.tensor.name == name]  # fmt: skip
        return all(uses) if uses else bool(self.adapter.config.get("fan_in_fan_out"))

    def _among_experts(self, update: LowRank) -> list[tuple[str, Patch]]:
        """The parts of single or stacked experts that go where the update's go."""
        shape = (update.outputs, update.inputs)
        stack = (update.matrices,) if update.matrices > 1 else ()
        pieces, found = self._pieces_of(self._named(update.name, (*stack, *shape))), []
        for place, own in pieces:
            there = self._pieces.get(place)
            sizes = (own.rows, update.inputs, 1)
            if there is None or (there.rows, there.tensor.columns, there.stride) != sizes:
                pieces = []
                break
            matrix, start = divmod(own.first, update.outputs)
            found.append((there.tensor.name, Patch(update, there.first, own.rows, matrix, start)))
        if not pieces:
            found_name(self.adapter, self.checkpoint.index, update.name)  # raises
        return found

    @cached_property
    def _table(self):
        config = Config(self.checkpoint.config)
        try:
            architecture = find_architecture(config)
        except PlanError:
            return None
        return architecture, architecture.config(self.checkpoint.config)

    @cached_property
    def _steps(self):
        return weight_steps(self.checkpoint) if self._table else None

    @cached_property
    def _names(self) -> Mapping[tuple[tuple[str, int], ...], str]:
        """The checkpoint's tensors by what they become, those that become nothing left out."""
        made = {tuple(place for place, _ in self._pieces_of(tensor)): name
                for name, tensor in self.checkpoint.index.items()}  # fmt: skip
        return {places: name for places, name in made.items() if places}

    @cached_property
    def _pieces(self) -> Mapping[tuple[str, int], Piece]:
        """The checkpoint's rows by what they become: matrices of tensors of the GGUF."""
        return {
            place: piece
            for tensor in self.checkpoint.index.values()
            for place, piece in self._pieces_of(tensor)
        }

    def _pieces_of(self, tensor: TensorInfo) -> list[tuple[tuple[str, int], Piece]]:
        try:
            return pieces_of(*self._table, tensor) if self._table else []
        except PlanError:  # a tensor beside the model
            return []
