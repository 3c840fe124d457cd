"""What a job will do to every tensor, decided from headers alone.

A plan is data: no weight has been read when it is complete, and everything that can be refused has been.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.errors import PlanError
from llmcompress.filetypes import FileType, TypeChoice, choose_types, find_file_type
from llmcompress.grids import GRIDS
from llmcompress.grids.grid import Grid
from llmcompress.gguf.imatrix import ImportanceMatrix
from llmcompress.gguf.layout import TensorEntry, lay_out, shard_names, split, split_metadata
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, string, u32
from llmcompress.machine import cores, free_disk
from llmcompress.mix import NEVER_QUANTIZED, NEVER_QUANTIZED_NAMES, ModelTraits
from llmcompress.recipe import Recipe
from llmcompress.sizes import format_size

SLAB_WEIGHTS = 2**19  # large enough to hide Python's cost, small enough to stay in a core's cache
BYTES_PER_SLAB_WEIGHT = 16  # raw, rearranged, float32 and encoded copies of a weight that are alive at once
FIXED_RAM = 160 * 2**20  # vocabulary, headers, plan and compiled kernels


@dataclass(frozen=True)
class Operation:
    """What happens to rows between the checkpoint and the grid.

    `arrange` reorders raw rows `(rows, columns)` of any dtype within runs of `group` rows; `compute`
    maps float32 rows to float32 rows. `transposed` means that the rows are the source's columns.
    """

    name: str
    group: int = 1
    arrange: Callable[[np.ndarray], np.ndarray] | None = None
    compute: Callable[[np.ndarray], np.ndarray] | None = None
    transposed: bool = False


COPY = Operation("copy")


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a source tensor from row `first` on; of its transpose under a transposed operation."""

    tensor: TensorInfo
    first: int
    rows: int


@dataclass(frozen=True)
class Step:
    """One tensor of the result. `shape` is in NumPy's order; `pieces` follow each other row by row."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    operation: Operation = COPY
    computed: np.ndarray | None = None  # float32 values made from the config, where there is no source

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def dtype(self) -> str:
        return self.pieces[0].tensor.dtype if self.pieces else "F32"

    def source_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows in the checkpoint."""
        return rows * self.columns * (4 if self.dtype == "F32" else 2)


@dataclass(frozen=True)
class Slab:
    """Rows `first` to `first + rows` of a step: the unit of reading, quantizing, writing and resuming."""

    step: int
    first: int
    rows: int


@dataclass(frozen=True)
class Placement:
    """Where one tensor goes in one output, in which type, and which rule decided it."""

    grid: Grid
    reason: str
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    path: Path
    header: bytes = field(repr=False)
    size: int


@dataclass(frozen=True)
class Output:
    """One file type's result: one file, or the shards of one."""

    file_type: FileType
    files: tuple[OutputFile, ...]
    placements: tuple[Placement, ...]  # one for each step

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Plan:
    """Everything a run needs."""

    name: str
    checkpoint: Checkpoint
    recipe: Recipe
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    importance: Mapping[str, np.ndarray]  # GGUF name -> float32 (matrices, columns)
    notes: tuple[str, ...]
    workers: int
    slab_weights: int
    ram: int  # bytes above the interpreter and its libraries

    def slabs(self) -> Iterator[Slab]:
        for index, step in enumerate(self.steps):
            yield from _slabs(index, step, self.slab_weights)

    @property
    def weights(self) -> int:
        return sum(step.weights for step in self.steps)

    @property
    def files(self) -> tuple[OutputFile, ...]:
        return tuple(file for output in self.outputs for file in output.files)

    def fingerprint(self) -> str:
        """Equal for two plans exactly if they write the same bytes to the same places, slab by slab."""
        digest = hashlib.sha256(f"{__version__} {self.slab_weights} {self.checkpoint.fingerprint()}".encode())
        for file in self.files:
            digest.update(f"{file.path.resolve()} {file.size}".encode())
            digest.update(file.header)
        for name in sorted(self.importance):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.importance[name]).tobytes())
        return digest.hexdigest()


def make_plan(
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    recipe: Recipe,
    out: str | Path,
    traits: ModelTraits,
    metadata: Metadata,
    imatrix: ImportanceMatrix | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Decide type, bytes and offset of every tensor for every file type of the recipe.

    `steps` come in the file's order; `metadata` is all that does not depend on the file type. Raises
    PlanError for types without a kernel, missing importance, clashing outputs or too little memory.
    """
    importance, more_notes = _importance(steps, imatrix)
    file_types = list(dict.fromkeys(_file_type(name, steps) for name in recipe.types))
    tensors = [(step.name, step.shape, stored_type(step)) for step in steps]
    choices = {file_type: choose_types(file_type, tensors, traits, recipe.overrides) for file_type in file_types}
    for file_type, chosen in choices.items():
        _check_importance(file_type, steps, chosen, importance)
    paths = output_paths(out, checkpoint.name, file_types)
    outputs = [
        _place(file_type, path, steps, choices[file_type], _typed(metadata, file_type, recipe, imatrix), recipe)
        for file_type, path in zip(file_types, paths)
    ]
    headers = sum(len(file.header) for output in outputs for file in output.files)
    workers, slab_weights, ram = _fit_memory(steps, recipe, headers)
    plan = Plan(
        checkpoint.name, checkpoint, recipe, tuple(steps), tuple(outputs), importance,
        (*notes, *more_notes), workers, slab_weights, ram,
    )  # fmt: skip
    _check_paths(plan)
    return plan


def stored_type(step: Step) -> str:
    """The type an unquantized GGUF holds the tensor in: float32 for what is never quantized, such as norms and
    routers, and the checkpoint's own for matrices."""
    kept = step.name in NEVER_QUANTIZED_NAMES or any(part in step.name for part in NEVER_QUANTIZED)
    return "F32" if kept or len(step.shape) == 1 or step.computed is not None else step.dtype


@dataclass(frozen=True)
class DiskNeed:
    """Bytes still to be written to one file system, and those free there."""

    folder: Path
    needed: int
    free: int


def disk_needs(plan: Plan) -> list[DiskNeed]:
    """What each file system must take, without what stands in the partial files already."""
    folders: dict[int, Path] = {}
    needed: Counter[int] = Counter()
    for file in plan.files:
        part = part_path(file.path)
        there = part.stat().st_blocks * 512 if part.exists() else 0
        folder = _existing_parent(file.path)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        needed[device] += max(0, file.size - there)
    return [DiskNeed(folder, needed[device], free_disk(folder)) for device, folder in folders.items()]


def check_disk(plan: Plan) -> None:
    """Raise PlanError unless the outputs' file systems have room for what is still missing of them."""
    for disk in disk_needs(plan):
        if disk.needed > disk.free:
            raise PlanError(
                f"{disk.folder}: {format_size(disk.needed)} are needed and {format_size(disk.free)} are free; "
                "make room or choose another place with -o"
            )


def part_path(path: Path) -> Path:
    """The name a file has until it is complete and checked."""
    return path.with_name(path.name + ".part")


def _existing_parent(path: Path) -> Path:
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def _slabs(index: int, step: Step, slab_weights: int) -> Iterator[Slab]:
    """Runs of rows that stay inside one piece and one matrix and never cut a group."""
    size = _slab_rows(step, slab_weights)
    matrix = step.shape[-2] if len(step.shape) > 2 else step.rows
    first = 0
    for piece in step.pieces or (None,):
        end = first + (piece.rows if piece else step.rows)
        while first < end:
            rows = min(size, end - first, matrix - first % matrix)
            yield Slab(index, first, rows)
            first += rows


def _slab_rows(step: Step, slab_weights: int) -> int:
    rows = max(1, slab_weights // step.columns)
    return max(rows // step.operation.group, 1) * step.operation.group


def _file_type(name: str, steps: Sequence[Step]) -> FileType:
    """The file type of that name; `auto` is the float type most of the checkpoint's weights have."""
    if name.lower() == "auto":
        totals: dict[str, int] = {}
        for step in steps:
            totals[step.dtype] = totals.get(step.dtype, 0) + step.weights
        name = max(totals, key=totals.__getitem__)
    return find_file_type(name)


def _importance(steps: Sequence[Step], imatrix: ImportanceMatrix | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The importance of each tensor that has one, its size checked, and what is worth saying about it."""
    if imatrix is None:
        return {}, []
    used: dict[str, np.ndarray] = {}
    for step in steps:
        if step.name in imatrix.entries:
            used[step.name] = imatrix.weights(step.name, step.shape[0] if len(step.shape) > 2 else 1, step.columns)
    if not used:
        raise PlanError(f"{imatrix.source}: none of its {len(imatrix.entries)} entries names a tensor of this model")
    notes = list(imatrix.notes)
    unused = len(imatrix.entries) - len(used)
    if unused:
        notes.append(f"{imatrix.source}: {unused} of {len(imatrix.entries)} entries name no tensor of this model")
    bare = [s.name for s in steps if len(s.shape) > 1 and s.name.startswith("blk.") and s.name not in used
            and s.name.endswith(".weight") and not s.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))]  # fmt: skip
    if bare:
        notes.append(f"{imatrix.source}: no importance for {len(bare)} tensors, the first is {bare[0]}")
    return used, notes


def _check_importance(
    file_type: FileType, steps: Sequence[Step], chosen: Sequence[TypeChoice], importance: Mapping[str, np.ndarray]
) -> None:
    for step, choice in zip(steps, chosen):
        if choice.type not in GRIDS:
            raise PlanError(
                f"{file_type.name}: {step.name} would be {choice.type}, which cannot be written yet; "
                f"there are {', '.join(GRIDS)}"
            )
        if choice.imatrix_required and step.name not in importance:
            raise PlanError(
                f"{file_type.name}: {step.name} as {choice.type} needs an importance matrix that covers it; "
                "give one with --imatrix"
            )


def _typed(
    metadata: Metadata, file_type: FileType, recipe: Recipe, imatrix: ImportanceMatrix | None
) -> Metadata:
    """The metadata with the recipe of this one file, and the keys llama-quantize appends for a file type and
    its importance matrix."""
    typed = dict(metadata)
    typed["llmcompress.recipe"] = string(replace(recipe, types=(file_type.name,)).as_json())
    typed["general.quantization_version"] = u32(2)
    typed["general.file_type"] = u32(file_type.id)
    if imatrix is not None:
        typed["quantize.imatrix.file"] = string(imatrix.source.name)
        if imatrix.datasets:
            typed["quantize.imatrix.dataset"] = string(imatrix.datasets[0][:127])  # llama.cpp keeps no more
        typed["quantize.imatrix.entries_count"] = u32(len(imatrix.entries))
        if imatrix.chunks is not None:
            typed["quantize.imatrix.chunks_count"] = u32(imatrix.chunks)
    return typed


def _place(
    file_type: FileType,
    path: Path,
    steps: Sequence[Step],
    chosen: Sequence[TypeChoice],
    metadata: Metadata,
    recipe: Recipe,
) -> Output:
    """Lay one file type's tensors out in one file, or in shards of at most `recipe.split_max_size` bytes."""
    entries = [TensorEntry(step.name, step.shape, TYPES[choice.type]) for step, choice in zip(steps, chosen)]
    sizes = [GRIDS[choice.type].row_bytes(step.columns) * step.rows for step, choice in zip(steps, chosen)]
    groups = split(sizes, recipe.split_max_size) if recipe.split_max_size else [list(range(len(entries)))]
    paths = shard_names(path, len(groups)) if len(groups) > 1 else [path]
    files: list[OutputFile] = []
    placements: dict[int, Placement] = {}
    for number, (shard, group) in enumerate(zip(paths, groups)):
        keys = metadata if len(groups) == 1 else split_metadata(metadata, number, len(groups), len(entries))
        layout = lay_out(keys, [entries[i] for i in group])
        files.append(OutputFile(shard, layout.header, layout.size))
        for i, offset in zip(group, layout.offsets):
            placements[i] = Placement(GRIDS[chosen[i].type], chosen[i].reason, number, offset, sizes[i])
    return Output(file_type, tuple(files), tuple(placements[i] for i in range(len(steps))))


def output_paths(out: str | Path, name: str, file_types: Sequence[FileType]) -> list[Path]:
    """One path for each file type from a file name, a template with {name} and {type}, or a folder."""
    template = str(out)
    if template.endswith(("/", "\\")) or Path(template).is_dir():
        template = str(Path(template) / "{name}-{type}.gguf")
    paths = []
    for file_type in file_types:
        try:
            paths.append(Path(template.format(name=name, type=file_type.name)))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise PlanError(f"-o {out}: only {{name}} and {{type}} can stand in braces ({error})") from error
    if len(set(paths)) < len(paths):
        raise PlanError(f"-o {out}: {len(paths)} types would go to the same file; put {{type}} into the name")
    return paths


def _check_paths(plan: Plan) -> None:
    inputs = [path for path in plan.checkpoint.directory.iterdir() if path.suffix != ".gguf"]
    inputs += [*plan.checkpoint.files, *([Path(plan.recipe.imatrix)] if plan.recipe.imatrix else [])]
    read = {path.resolve() for path in inputs}
    for file in plan.files:
        if file.path.is_dir():
            raise PlanError(f"{file.path}: is a folder; give a file name")
        if file.path.resolve() in read:
            raise PlanError(f"{file.path}: is read by this job; choose another name for the result")


def _fit_memory(steps: Sequence[Step], recipe: Recipe, headers: int) -> tuple[int, int, int]:
    """Workers, weights per slab and expected bytes so that the job stays within `recipe.max_ram`.

    One worker more than there are cores keeps them busy while a worker waits for the disk.
    """
    fixed = FIXED_RAM + 2 * headers
    slab_weights = SLAB_WEIGHTS
    for workers in range(recipe.threads or cores() + 1, 0, -1):
        largest = max(_slab_rows(step, slab_weights) * step.columns for step in steps)
        ram = fixed + workers * largest * BYTES_PER_SLAB_WEIGHT
        if ram <= recipe.max_ram:
            return workers, slab_weights, ram
    smallest = max(step.operation.group * step.columns for step in steps)
    ram = fixed + max(smallest, slab_weights // 8) * BYTES_PER_SLAB_WEIGHT
    if ram <= recipe.max_ram:
        return 1, slab_weights // 8, ram
    raise PlanError(
        f"--max-ram {format_size(recipe.max_ram)} is too little: this model needs at least {format_size(ram)}"
    )
