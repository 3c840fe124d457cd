"""One file type's result: its paths, its header, and the place of every tensor in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter

from llmcompress.errors import PlanError
from llmcompress.filetypes import FileType, TypeChoice
from llmcompress.gguf.layout import TensorEntry, lay_out, shard_names, split, split_metadata
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, string, u32
from llmcompress.grids import GRIDS
from llmcompress.grids.grid import Grid
from llmcompress.importance import Source
from llmcompress.recipe import Recipe
from llmcompress.step import Step


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


def place(
    file_type: FileType,
    path: Path,
    steps: Sequence[Step],
    chosen: Sequence[TypeChoice],
    metadata: Metadata,
    recipe: Recipe,
) -> Output:
    """Lay one file type's tensors out in one file, or in shards of at most `recipe.split_max_size` bytes."""
    entries = [
        TensorEntry(step.name, step.stored_shape, TYPES[choice.type]) for step, choice in zip(steps, chosen)
    ]
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


def typed_metadata(
    metadata: Metadata, file_type: FileType, recipe: Recipe, imatrix: Source | None
) -> Metadata:
    """The metadata with the recipe of this one file, and the keys llama-quantize appends for a file type and
    its importance matrix. The copy of a GGUF says what the GGUF did."""
    typed = dict(metadata)
    if file_type.name == "COPY" and "general.file_type" in typed:
        return typed
    names = {  # where they lay is nobody's business
        field: Path(given).name
        for field in ("adapter", "imatrix", "hessian", "sensitivity")
        if (given := getattr(recipe, field))
    }
    types = recipe.types if recipe.has_target else (file_type.name,)
    typed["llmcompress.recipe"] = string(replace(recipe, types=types, **names).as_json())
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


def output_paths(out: str | Path, name: str, file_types: Sequence[FileType]) -> list[Path]:
    """One path for each file type from a file name, a template with {name} and {type}, or a folder."""
    template = str(out)
    if template.endswith(("/", "\\")) or Path(template).expanduser().is_dir():
        template = str(Path(template) / "{name}-{type}.gguf")
    paths = [filled_path(template, name, file_type.name) for file_type in file_types]
    if len(set(paths)) < len(paths):
        raise PlanError(f"-o {out}: {len(paths)} types would go to the same file; put {{type}} into the name")
    return paths


def filled_path(template: str | Path, name: str, type: str) -> Path:
    """A path with `{name}` and `{type}` replaced. Raises PlanError for other words in braces."""
    try:
        return Path(_filled(str(template), name=name, type=type)).expanduser()
    except (KeyError, ValueError) as error:
        raise PlanError(f"-o {template}: only {{name}} and {{type}} can stand in braces ({error})") from error


def _filled(template: str, **values: str) -> str:
    """The template with its fields replaced. Raises KeyError for another field, ValueError for a lone brace."""
    parts = Formatter().parse(template)
    filled = ""
    for text, key, form, conversion in parts:
        if form or conversion:
            raise ValueError(f"{key} has a format")
        filled += text + (values[key] if key is not None else "")
    return filled


def part_path(path: Path) -> Path:
    """The name a file has until it is complete and checked."""
    return path.with_name(path.name + ".part")
