"""The job of `convert-lora`: a peft adapter to a GGUF that llama.cpp adds to a model with `--lora`.

A file holds a pair of matrices for each weight it changes, `NAME.lora_a` (rank, inputs) and `NAME.lora_b` (outputs,
rank), and one number, `adapter.lora.alpha`; llama.cpp adds alpha / rank · lora_b · lora_a, the rank being that of the
pair. Whatever else multiplies is folded into lora_b. The weights' own steps say which rows go where: what a step does
to rows is done to lora_b, what it does to columns to lora_a.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llmcompress.converters.adapter_places import place
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps

from llmcompress import __version__
from llmcompress.adapter import Adapter, LowRank
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RunError, nearest, shown
from llmcompress.gguf.layout import TensorEntry, lay_out
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, f32, string
from llmcompress.grids import GRIDS
from llmcompress.grids.floats import count_saturated
from llmcompress.merged import HEAD, Patch
from llmcompress.progress import Progress
from llmcompress.slab import LARGEST
from llmcompress.step import Piece, Step
from llmcompress.whole_file import whole_file

FLOAT_TYPES = ("F32", "F16", "BF16")
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Tensors that llama.cpp does not multiply with through its adapters, and so would silently leave as they are, of any
# architecture and of single ones: tried out, tensor by tensor, on a model of each.
_LATENT = r"output|blk\.\d+\.(attn_(q|q_a|q_b|kv_a_mqa)|indexer\..*)"
UNADAPTED = {
    "*": r"position_embd|blk\.\d+\.(attn_[kv]_b|attn_kv_b|.*conv1d|.*_norm)",
    **dict.fromkeys(("deepseek2", "deepseek32", "glm-dsa"), _LATENT),
    "gemma3n": r"altup_(proj|unembd_proj)|per_layer_(model_proj|token_embd)|blk\.\d+\.altup_router",
    "gemma4": r"per_layer_(model_proj|token_embd)",
    "nemotron_h_moe": r"blk\.\d+\.ffn_latent_(down|up)",
    "rwkv7": r"blk\.\d+\.time_mix_[wavg][12]",
}
MERGE = "merge it instead: llmcompress merge MODEL ADAPTER"


@dataclass(frozen=True)
class Pair:
    """What is added to one tensor of the GGUF: the patches of each of its matrices, by the piece they fall on.

    ranks: of each matrix, all updates that share it together; the file's rank is the largest."""

    step: Step
    ranks: tuple[int, ...]
    patches: Mapping[str, Sequence[Patch]]

    @property
    def entries(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, slowest axis first."""
        rank, (*stack, rows, columns) = max(self.ranks), _shape(self.step)
        if self.step.name == EMBEDDING:  # llama.cpp looks rows of lora_a up, and multiplies them with lora_b
            return [(f"{EMBEDDING}.lora_a", (rows, rank)), (f"{EMBEDDING}.lora_b", (columns, rank))]
        name = self.step.name
        return [(f"{name}.lora_a", (*stack, rank, columns)), (f"{name}.lora_b", (*stack, rows, rank))]


@dataclass(frozen=True)
class LoraPlan:
    """What is written, from headers alone."""

    adapter: Adapter
    architecture: str
    pairs: tuple[Pair, ...]
    alpha: float
    path: Path
    type: str

    @property
    def metadata(self) -> Metadata:
        name = self.adapter.directory.resolve().name
        return {
            "general.architecture": string(self.architecture),
            "general.type": string("adapter"),
            "general.name": string(name),
            "adapter.type": string("lora"),
            "adapter.lora.alpha": f32(self.alpha),
            "llmcompress.version": string(__version__),
        }


def plan_lora(adapter: str | Path, base: str | Path, out: str | Path, type: str = "F32") -> LoraPlan:
    """Which tensors the adapter's GGUF will have. Raises LlmcompressError for what the format cannot hold, and for an
    adapter of another model than `base`."""
    require_float(type)
    with Checkpoint.open(base) as checkpoint:
        opened, patches = place(Adapter.open(adapter), checkpoint)
        _check_kind(opened)
        architecture = find_architecture(Config(checkpoint.config))
        architecture.check_config(architecture.config(checkpoint.config))
        steps = weight_steps(checkpoint)
    used = {piece.tensor.name for step in steps for piece in step.pieces}
    for name in patches:
        if name not in used:
            reason = (
                "llama.cpp takes the embedding for it"
                if name == HEAD
                else "no tensor of the GGUF is made of it"
            )
            raise PlanError(f"{opened.directory}: changes {name}, but {reason}; {MERGE}")
    pairs = [
        _pair(step, patches) for step in steps if any(piece.tensor.name in patches for piece in step.pieces)
    ]
    pairs = [pair for pair in pairs if max(pair.ranks)]
    tied = OUTPUT not in {step.name for step in steps}
    for pair in pairs:
        if pair.step.name == EMBEDDING and tied:
            raise PlanError(
                f"{opened.directory}: changes the embedding, which llama.cpp takes for the head, too; {MERGE}"
            )
        if not is_adapted(architecture.name, pair.step.name):
            raise PlanError(
                f"{opened.directory}: changes {_source(pair)}; llama.cpp adapts no {pair.step.name}; {MERGE}"
            )
        if pair.step.operation.compute:
            raise PlanError(
                f"{opened.directory}: changes {_source(pair)}, which {pair.step.operation.name} makes {pair.step.name}; {MERGE}"
            )
    return LoraPlan(
        opened, architecture.name, tuple(pairs), float(opened.config["lora_alpha"]), Path(out), type.upper()
    )


def run_lora(plan: LoraPlan, progress: Progress = Progress()) -> Path:
    """Write the file; it has its name when it is whole. Raises LlmcompressError."""
    entries = [
        TensorEntry(name, shape, TYPES[plan.type]) for pair in plan.pairs for name, shape in pair.entries
    ]
    layout = lay_out(plan.metadata, entries)
    progress.start("writing", layout.size)
    with whole_file(plan.path) as file, plan.adapter.weights:
        file.write(layout.header)
        tensors = (tensor for pair in plan.pairs for tensor in _matrices(plan, pair))
        for entry, offset, values in zip(entries, layout.offsets, tensors, strict=True):
            assert values.shape == entry.shape, (entry, values.shape)
            file.write(b"\0" * (offset - file.tell()))
            data = _rounded(entry.name, values, plan.type)
            file.write(data)
            progress.advance(data.nbytes)
        file.write(b"\0" * (layout.size - file.tell()))
    return plan.path


def require_float(type: str) -> None:
    """Raise PlanError for a type that an adapter's tensors cannot have."""
    if type.upper() not in FLOAT_TYPES:
        raise PlanError(f"--type {type}: none of {', '.join(FLOAT_TYPES)}{nearest(type, FLOAT_TYPES)}")


def is_adapted(architecture: str, name: str) -> bool:
    """Whether llama.cpp multiplies with a tensor of the GGUF through its adapters."""
    ignored = "|".join(filter(None, (UNADAPTED["*"], UNADAPTED.get(architecture))))
    return not re.fullmatch(rf"({ignored})(\.weight)?", name)


def _check_kind(adapter: Adapter) -> None:
    """Raise PlanError for what an adapter GGUF has no place for."""
    where = adapter.directory
    if adapter.config.get("use_dora"):
        raise PlanError(f"{where}: a DoRA; the format has no place for its lengths; {MERGE}")
    if adapter.full:
        raise PlanError(
            f"{where}: holds whole tensors, such as {shown(min(adapter.full))}, which the format has no place for; {MERGE}"
        )
    if adapter.tokens:
        raise PlanError(
            f"{where}: holds rows of {shown(adapter.tokens[0].name)}, which the format has no place for; {MERGE}"
        )
    if adapter.biases:
        raise PlanError(f"{where}: adds to biases, which the format has no place for; {MERGE}")


def _shape(step: Step) -> tuple[int, ...]:
    """That of the matrices; one of a single row, such as the gate of shared experts, is a vector in the file."""
    return step.shape if len(step.shape) > 1 else (1, *step.shape)


def _source(pair: Pair) -> str:
    return next(piece.tensor.name for piece in pair.step.pieces if piece.tensor.name in pair.patches)


def _pair(step: Step, patches: Mapping[str, Sequence[Patch]]) -> Pair:
    own = {
        piece.tensor.name: patches[piece.tensor.name] for piece in step.pieces if piece.tensor.name in patches
    }
    ranks = tuple(
        sum({_shared(part): part.patch.update.rank for part in parts}.values())
        for parts in _by_matrix(step, own)
    )
    return Pair(step, ranks, own)


@dataclass(frozen=True)
class _Part:
    """What a patch adds to a matrix of a step: to `rows` rows from `start` on, `first` being the first of them in the
    piece; to `columns` columns from `left` on where the step is transposed, else to all."""

    patch: Patch
    piece: Piece
    start: int
    first: int
    rows: int
    left: int
    columns: int


def _by_matrix(step: Step, patches: Mapping[str, Sequence[Patch]]) -> Iterator[list[_Part]]:
    """The parts of each stacked matrix of a step."""
    height, width = _shape(step)[-2:]
    parts: list[_Part] = []
    start = 0
    for piece in step.pieces:
        for patch in patches.get(piece.tensor.name, ()):
            if step.operation.transposed:  # the source's rows are columns
                left, right = _overlap(patch, piece.top, width, 1)
                first, end = 0, piece.rows
            else:
                left, right = 0, width
                first, end = _overlap(patch, piece.first, piece.rows, piece.stride)
            if first < end and left < right:
                parts.append(
                    _Part(patch, piece, start % height + first, first, end - first, left, right - left)
                )
        start += piece.rows
        if start % height == 0:
            yield parts
            parts = []


def _overlap(patch: Patch, first: int, rows: int, stride: int) -> tuple[int, int]:
    """Which of `rows` rows of the source, each `stride`th from `first` on, lie on a patch: from the one to the other."""
    begin, end = ((row - first + stride - 1) // stride for row in (patch.first, patch.first + patch.rows))
    return max(0, begin), min(rows, end)


def _matrices(plan: LoraPlan, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b as the file has them, float32."""
    step, rank = pair.step, max(pair.ranks)
    *stack, rows, columns = _shape(step)
    arrange, by_value = step.operation.arrange, step.operation.group == 1
    b = np.zeros((len(pair.ranks), rows, rank), np.float32)
    a = np.zeros((len(pair.ranks), rank, columns), np.float32)
    for matrix, parts in enumerate(_by_matrix(step, pair.patches)):
        places: dict[tuple[int, int], slice] = {}
        for part in parts:
            update: LowRank = part.patch.update
            used = sum(place.stop - place.start for place in places.values())
            place = places.setdefault(_shared(part), slice(used, used + update.rank))
            left, right = _factors(step, part)
            factor = update.scale * rank / plan.alpha
            b[matrix, part.start : part.start + part.rows, place] = left * np.float32(factor)
            a[matrix, place, part.left : part.left + part.columns] = (
                arrange(np.ascontiguousarray(right)) if arrange and by_value else right
            )
        if arrange and not by_value:
            b[matrix] = arrange(b[matrix])
    if step.operation.factors is not None:  # of rows, which are lora_b's
        b *= step.operation.factors.reshape(-1, rows, 1)
    if step.name == EMBEDDING:
        return b[0], np.ascontiguousarray(a[0].T)
    return a.reshape(*stack, rank, columns), b.reshape(*stack, rows, rank)


def _shared(part: _Part) -> tuple[int, int]:
    """Parts of one matrix of one update have their ranks in common."""
    return id(part.patch.update), part.patch.matrix


def _factors(step: Step, part: _Part) -> tuple[np.ndarray, np.ndarray]:
    """float32 (rows, rank) and (rank, columns) of a part."""
    patch, piece = part.patch, part.piece
    first, stride = piece.first + part.first * piece.stride, piece.stride
    end = first + (part.rows - 1) * stride + 1
    if step.operation.transposed:
        return patch.right().T[first:end:stride], patch.left(piece.top + part.left, part.columns).T
    return patch.left(first, end - first)[::stride], patch.right()


def _rounded(name: str, values: np.ndarray, type: str) -> np.ndarray:
    matrix = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    if type in LARGEST and count_saturated(matrix, type):
        raise RunError(
            f"{name}: values up to {np.abs(matrix).max():.6g} are beyond the largest {type}; use --type F32"
        )
    return GRIDS[type].quantize(matrix)
