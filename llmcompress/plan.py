"""What a job will do to every tensor, decided from headers alone.

A plan is data: no weight has been read when it is complete (but for the rows that --fallback best measures),
and everything that can be refused has been.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.filetypes import FileType, TypeChoice, choose_types, find_file_type
from llmcompress.gguf.value import Metadata
from llmcompress.grids import GRIDS
from llmcompress.grids.code_bits import layout_of
from llmcompress.grids.grid import Grid
from llmcompress.importance import SOLVERS_KEPT, Importance, Source
from llmcompress.machine import cores, free_disk
from llmcompress.mix import NEVER_QUANTIZED, ModelTraits
from llmcompress.output import Output, OutputFile, output_paths, part_path, place, typed_metadata
from llmcompress.pruning_report import notes_on_filling
from llmcompress.recipe import DEFAULT_MAX_RAM, SOURCE_TYPES, Recipe
from llmcompress.sizes import format_size
from llmcompress.step import Slab, Step, is_linear, slab_rows, slabs_of, stored_type

if TYPE_CHECKING:
    from llmcompress.methods.joint import Pruning

SLAB_WEIGHTS = 2**19  # large enough to hide Python's cost, small enough to stay in a core's cache
# Measured as peak resident memory above that after the imports: 10 bytes for each weight of each worker's slab;
# 200 MiB where ten formats are compiled (40 with all kernels cached); 7 bytes for each of a header with 151,000
# tokens, held as bytes and, read back, as Python's strings.
BYTES_PER_SLAB_WEIGHT = 16
BYTES_PER_HEADER_BYTE = 8
FIXED_RAM = 224 * 2**20
MATRICES_OF_A_SOLVER = 6  # of H's size, while it is made and used
Refine = Callable[[Step, TypeChoice, "np.ndarray | None"], TypeChoice]


class Target(Protocol):
    """Decides all types at once: see target.py."""

    notes: Sequence[str]  # there once it was called

    @property
    def file_type(self) -> FileType: ...

    def __call__(
        self,
        steps: Sequence[Step],
        choices: Sequence[TypeChoice],
        importance: Importance,
        lay_out: Callable[[Sequence[TypeChoice]], Output],
    ) -> tuple[FileType, list[TypeChoice]]: ...


@dataclass(frozen=True)
class Plan:
    """Everything a run needs."""

    name: str
    checkpoint: Checkpoint
    recipe: Recipe
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    importance: Importance
    notes: tuple[str, ...]
    workers: int
    slab_weights: int
    ram: int  # bytes above the interpreter and its libraries

    def slabs(self) -> Iterator[Slab]:
        for index, step in enumerate(self.steps):
            yield from slabs_of(index, step, self.slab_weights)

    def method(self, step: Step, grid: Grid) -> str:
        """What chooses a tensor's codes: the recipe's method where it can, else rounding to nearest."""
        possible = step.name in self.importance and layout_of(grid) is not None
        return self.recipe.method if possible else "nearest"

    def pruning(self, step: Step) -> Pruning | None:
        """What goes of a tensor in the sweep that quantizes it."""
        return self.recipe.pruning if is_linear(step) else None

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
        digest.update(repr([step.operation.name for step in self.steps]).encode())
        digest.update(self.importance.fingerprint().encode())
        return digest.hexdigest()


def make_plan(
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    recipe: Recipe,
    out: str | Path,
    traits: ModelTraits,
    metadata: Metadata,
    imatrix: Source | None = None,
    notes: Sequence[str] = (),
    refine: Refine | None = None,
    target: Target | None = None,
) -> Plan:
    """Decide type, bytes and offset of every tensor for every file type of the recipe.

    `steps` come in the file's order; `metadata` is all that does not depend on the file type; `refine`
    may change a choice, and get a tensor's importance `(matrices, columns)` to do so; `target` may change all, and
    takes the place of the recipe's file types. Raises
    PlanError for types without a kernel, missing importance, clashing outputs or too little memory.
    """
    importance, more_notes = _importance(steps, imatrix)
    names = [] if target else recipe.types
    file_types = list(dict.fromkeys(_file_type(name, steps, metadata) for name in names)) or [
        target.file_type
    ]
    tensors = [(step.name, step.stored_shape, stored_type(step)) for step in steps]
    choices = {
        file_type: choose_types(file_type, tensors, traits, recipe.overrides) for file_type in file_types
    }
    if refine and importance.live:
        raise PlanError(
            "--fallback best measures before the calibration runs; calibrate first, and give --imatrix"
        )
    outputs = []
    for path, (file_type, chosen) in zip(output_paths(out, checkpoint.name, file_types), choices.items()):
        if refine:
            chosen = [refine(step, choice, importance.get(step.name)) for step, choice in zip(steps, chosen)]

        def lay_out(types: Sequence[TypeChoice]) -> Output:
            typed = typed_metadata(metadata, file_type, recipe, imatrix)
            return place(file_type, path, steps, types, typed, recipe)

        if target:
            file_type, chosen = target(steps, chosen, importance, lay_out)
        _check_importance(file_type, steps, chosen, importance)
        outputs.append(lay_out(chosen))
    notes = (*notes, *more_notes, *(target.notes if target else ()))
    plan = plan_of(checkpoint, steps, outputs, recipe, importance, notes)
    _check_paths(plan)
    return replace(plan, notes=(*plan.notes, *_notes_on_methods(plan)))


def plan_of(
    checkpoint: Checkpoint, steps: Sequence[Step], outputs: Sequence[Output], recipe: Recipe, importance: Importance,
    notes: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """The plan of outputs that are laid out. Raises PlanError where memory does not suffice."""
    headers = sum(len(file.header) for output in outputs for file in output.files)
    workers, slab_weights, ram = fit_memory(steps, recipe, headers, BYTES_PER_SLAB_WEIGHT)
    return Plan(
        checkpoint.name, checkpoint, recipe, tuple(steps), tuple(outputs), importance, tuple(notes), workers,
        slab_weights, ram,
    )  # fmt: skip


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


def _existing_parent(path: Path) -> Path:
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def _file_type(name: str, steps: Sequence[Step], metadata: Metadata) -> FileType:
    """The file type of that name; `auto` is the float type most of the checkpoint's weights have, `COPY` goes by its
    number and leaves every tensor as it is."""
    if name.upper() not in SOURCE_TYPES:
        return find_file_type(name)
    totals: Counter[str] = Counter()
    for step in steps:
        totals[step.dtype] += step.weights
    found = find_file_type(totals.most_common(1)[0][0])
    if name.upper() != "COPY":
        return found
    was = metadata.get("general.file_type")  # of a GGUF that is copied
    return replace(found, name="COPY", id=was.value if was else found.id)


def _importance(steps: Sequence[Step], imatrix: Source | None) -> tuple[Importance, list[str]]:
    """The importance of each tensor that has one, its size checked, and what is worth saying about it."""
    used = Importance(steps, imatrix)
    if imatrix is None:
        return used, []
    used.check()
    notes = list(imatrix.notes)
    unused = len(imatrix.entries) - len(used)
    if unused:
        notes.append(
            f"{imatrix.source}: {unused} of {len(imatrix.entries)} entries name no tensor of this model"
        )
    bare = [s.name for s in steps if len(s.stored_shape) > 1 and s.name.startswith("blk.") and s.name not in used
            and s.name.endswith(".weight") and not any(part in s.name for part in NEVER_QUANTIZED)]  # fmt: skip
    if bare:
        notes.append(f"{imatrix.source}: no importance for {len(bare)} tensors, the first is {bare[0]}")
    return used, notes


def _notes_on_methods(plan: Plan) -> list[str]:
    """A line for the types of matrices that the recipe's method passes over."""
    counts = Counter(
        place.grid.name
        for output in plan.outputs
        for step, place in zip(plan.steps, output.placements)
        if step.name in plan.importance and plan.method(step, place.grid) != plan.recipe.method
    )
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    notes = [f"{plan.recipe.method} passes over, and rounds to nearest: {listed}"] if counts else []
    return [*notes, *_notes_on_zeros(plan)]


def _notes_on_zeros(plan: Plan) -> list[str]:
    """Which types will not keep the zeros of pruning, or that its method will not."""
    if not plan.recipe.prunes:
        return notes_on_filling(plan.checkpoint.directory, plan.recipe.method)
    from llmcompress.methods.joint import zeros_notes

    places = (
        (step, place.grid) for output in plan.outputs for step, place in zip(plan.steps, output.placements)
    )
    pruned = [(step.name, step.columns, grid) for step, grid in places if plan.pruning(step)]
    return zeros_notes(pruned, plan.recipe.pruning)


def _check_importance(
    file_type: FileType,
    steps: Sequence[Step],
    chosen: Sequence[TypeChoice],
    importance: Mapping[str, np.ndarray],
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
                "give one with --imatrix, or --calibrate"
            )


def _check_paths(plan: Plan) -> None:
    inputs = [path for path in plan.checkpoint.directory.iterdir() if path.suffix != ".gguf"]
    inputs += [*plan.checkpoint.files, *([Path(plan.recipe.imatrix)] if plan.recipe.imatrix else [])]
    read = {path.resolve() for path in inputs}
    for file in plan.files:
        if file.path.is_dir():
            raise PlanError(f"{file.path}: is a folder; give a file name")
        if file.path.exists() and not file.path.is_file():  # a rename would put a file in a device's place
            raise PlanError(f"{file.path}: is a device or a pipe; give a file name")
        if file.path.resolve() in read:
            raise PlanError(f"{file.path}: is read by this job; choose another name for the result")


def solver_bytes(steps: Sequence[Step]) -> int:
    """Of the latest solvers kept, each of H and its factor, of one that is being made, and of what its experts share."""
    widest = max((step.columns for step in steps if len(step.shape) > 1), default=0)
    return (2 * SOLVERS_KEPT + MATRICES_OF_A_SOLVER) * 4 * widest**2


def fit_memory(
    steps: Sequence[Step], recipe: Recipe, headers: int, bytes_per_weight: int
) -> tuple[int, int, int]:
    """Workers, weights per slab and expected bytes so that the job stays within `recipe.max_ram`.

    `bytes_per_weight`: of each worker's slab. What GPTQ needs for H comes on top, and raises a limit that is the default:
    where the user set one, it has to fit in. One worker more than there are cores keeps them busy while a worker
    waits for the disk. Raises PlanError where it is too little.
    """
    solvers = solver_bytes(steps) if recipe.method == "gptq" else 0
    fixed = FIXED_RAM + BYTES_PER_HEADER_BYTE * headers + solvers
    limit = recipe.max_ram + (solvers if recipe.max_ram == DEFAULT_MAX_RAM else 0)
    slab_weights = SLAB_WEIGHTS
    for workers in range(recipe.threads or cores() + 1, 0, -1):
        largest = max(slab_rows(step, slab_weights) * step.columns for step in steps)
        ram = fixed + workers * largest * bytes_per_weight
        if ram <= limit:
            return workers, slab_weights, ram
    smallest = max(step.operation.group * step.columns for step in steps)
    ram = fixed + max(smallest, slab_weights // 8) * bytes_per_weight
    if ram <= limit:
        return 1, slab_weights // 8, ram
    raise PlanError(
        f"--max-ram {format_size(recipe.max_ram)} is too little: this model needs at least {format_size(ram)}"
    )
