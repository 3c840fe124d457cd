"""Checkpoint folders of safetensors, written piece by piece on all cores, by a job that goes on after a kill.

A job is a layout, made from headers, and a sequence of pieces of work: each makes some bytes of some tensors, as a
rule from a slab of rows, and knows where they go before it has them. So pieces are written in place, in any order.
The folder is `NAME.part` until it is whole, checked and on the disk; `NAME.journal` beside it knows the pieces that
are, each by the CRC-32 of its bytes, and the same command goes on from there.

Memory is that of the pieces under way: `plan.fit_memory` says how many, and of how many weights.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmcompress.checkpoint import READABLE, Checkpoint
from llmcompress.companions import copy_companions
from llmcompress.errors import PlanError, RunError
from llmcompress.grids.floats import first_nonfinite
from llmcompress.journal import Journal, cannot_be_written, sync
from llmcompress.machine import free_disk
from llmcompress.output import part_path
from llmcompress.parallel import in_parallel
from llmcompress.progress import Progress
from llmcompress.safetensors_files import INDEX, Entry, Shard, index_of
from llmcompress.sizes import format_size
from llmcompress.tensor_info import DTYPE_BITS, TensorInfo

SHARD_BYTES = 5 * 10**9  # of a file where nothing is asked for, as transformers has it
COMMIT_SECONDS = 2.0  # a kill loses at most the pieces of this long
COPY_BYTES = 2**22  # at a time
SCRATCH = "scratch"  # a file of the folder while it is being made

Data = np.ndarray | bytes


@dataclass(frozen=True)
class Place:
    """Bytes of a tensor: `runs` of `size` bytes, the first from byte `position` on, each `stride` behind the last."""

    tensor: str
    position: int
    size: int
    runs: int = 1
    stride: int = 0


@dataclass(frozen=True)
class Work:
    """A piece of the job, made from `source_bytes` of the checkpoint.

    `make` returns the bytes of each of `places`, in order, and numbers that the journal keeps for the report. It is
    called from any thread, and not at all where an earlier run made them: pieces of one job have a `number` each, the
    same in every run. `of`: what it is a piece of, for whoever counts them.
    """

    number: int
    places: tuple[Place, ...]
    make: Callable[[], tuple[Sequence[Data], tuple[float, ...]]]
    source_bytes: int
    of: str = ""


@dataclass(frozen=True)
class CheckpointOutput:
    """A folder to make.

    fingerprint: equal for two jobs exactly if they write the same bytes. companions: the folder whose tokenizer and
    the like are copied. texts: files by name, such as config.json. scratch: tensors that are not part of the result;
    `Files.read` has them for `finish`, and they are gone at the end.
    """

    folder: Path
    shards: tuple[Shard, ...]
    fingerprint: str
    companions: Path
    texts: Mapping[str, str]
    workers: int
    scratch: tuple[Entry, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard.file for shard in self.shards)


@dataclass
class Written:
    """`noted`: the numbers of each piece of work. `kept`: how many pieces an earlier run had written."""

    noted: dict[int, tuple[float, ...]] = field(default_factory=dict)
    kept: int = 0


Finish = Callable[["Files"], Iterable[tuple[str, Data]]]
Stages = Callable[["Files"], Iterable[Sequence[Work]]]


def write_checkpoint(
    output: CheckpointOutput,
    works: Iterable[Work],
    source_bytes: int,
    progress: Progress,
    finish: Finish = lambda files: (),
    stopping: Callable[[], None] = lambda: None,
    then: Stages = lambda files: (),
    finished: Callable[[str], None] = lambda of: None,
) -> Written:
    """Do all `works`, then those of `then`, then write what `finish` yields, and give the folder its name.

    `source_bytes`: of all works. `then` yields stages of works, each drawn, in this thread, when all before it are
    written, so that it may read them. `finish` runs when all works are done, and again in a run that goes on: it
    yields whole tensors, of which those that depend on others are made, and files of other names. `stopping` is called
    when workers are to end, and wakes those that wait; `finished` gets the `of` of each work that is in its places.
    Raises RunError for data that cannot be written faithfully (nothing is left of the folder), InterruptedRun for a
    disk that cannot be written to, and lets KeyboardInterrupt through; after both, the same command goes on.
    """
    with Journal(_beside(output.folder, ".journal"), output.fingerprint) as journal:
        try:
            with Files(output, journal) as files:
                progress.start("writing", source_bytes)
                for stage in itertools.chain((works,), then(files)):
                    _write_works(files, stage, progress, stopping, finished)
                _finish(files, finish)
            _check(output)
        except RunError:
            shutil.rmtree(part_path(output.folder), ignore_errors=True)
            journal.remove()
            raise
        try:
            os.replace(part_path(output.folder), output.folder)
        except OSError as error:
            raise cannot_be_written(output.folder, error) from error
        journal.remove()
    return files.written


def copies(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], first_number: int = 0
) -> Iterator[Work]:
    """The works that copy tensors byte for byte, by their names in the result."""
    number = first_number
    for name, tensor in tensors.items():
        for position in range(0, tensor.nbytes, COPY_BYTES):
            size = min(COPY_BYTES, tensor.nbytes - position)

            def make(tensor=tensor, position=position, size=size):
                return [_read_finite(checkpoint, tensor, position, size)], ()

            yield Work(number, (Place(name, position, size),), make, size)
            number += 1


def check_room(output: CheckpointOutput) -> None:
    """Raise PlanError unless the disk has room for what is still missing of the folder."""
    part = part_path(output.folder).resolve()
    there = sum(file.stat().st_blocks * 512 for file in part.glob("*")) if part.is_dir() else 0
    needed = output.nbytes + sum(entry.nbytes for entry in output.scratch) - there
    parent = next(folder for folder in part.parents if folder.exists())
    if needed > free_disk(parent):
        raise PlanError(
            f"{parent}: {format_size(needed)} are needed and {format_size(free_disk(parent))} are free; "
            "make room or choose another place with -o"
        )


class Files:
    """The files of a folder that is being made, each of its final size. Where the journal knows of none that is done,
    what is there is thrown away.

    Writing and reading is safe from any number of threads.
    """

    def __init__(self, output: CheckpointOutput, journal: Journal) -> None:
        self.output, self.journal, self.written = output, journal, Written()
        self.folder = part_path(output.folder)
        self._open = ExitStack()
        self._places: dict[str, tuple[int, int]] = {}  # descriptor, and where the tensor begins
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Files:
        try:
            if not self.journal.done and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for shard in self.output.shards:
                descriptor = self._opened(shard.file, shard.size)
                _write(descriptor, memoryview(shard.header), 0)
                self._places |= {name: (descriptor, at) for name, at in shard.offsets.items()}
            if len(self.output.shards) > 1:  # so that what is written can be read
                (self.folder / INDEX).write_text(index_of(self.output.shards))
            self._open_scratch()
            copy_companions(self.output.companions, self.folder)
            for name, text in self.output.texts.items():
                (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            self._open.close()
            raise cannot_be_written(self.folder, error) from error
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def write(self, place: Place, data: Data, sum_so_far: int = 0) -> int:
        """Write the bytes of a place; returns their CRC-32, behind that of the bytes before them."""
        view = memoryview(np.ascontiguousarray(data)).cast("B") if isinstance(data, np.ndarray) else memoryview(data)  # fmt: skip
        if len(view) != place.size * place.runs:
            raise ValueError(f"{place.tensor}: {len(view)} bytes for {place}")
        descriptor, begin = self._places[place.tensor]
        try:
            for run in range(place.runs):
                position = begin + place.position + run * place.stride
                _write(descriptor, view[run * place.size : (run + 1) * place.size], position)
        except OSError as error:
            raise cannot_be_written(self.folder, error) from error
        return zlib.crc32(view, sum_so_far)

    def write_file(self, name: str, data: bytes) -> None:
        try:
            (self.folder / name).write_bytes(data)
        except OSError as error:
            raise cannot_be_written(self.folder, error) from error

    def read(self, place: Place) -> bytes:
        """What stands at a place; shorter where the file was cut."""
        descriptor, begin = self._places[place.tensor]
        starts = (begin + place.position + run * place.stride for run in range(place.runs))
        return b"".join(os.pread(descriptor, place.size, start) for start in starts)

    def crc(self, places: Sequence[Place]) -> int:
        """CRC-32 of what stands at several places."""
        found = 0
        for place in places:
            found = zlib.crc32(self.read(place), found)
        return found

    def kept(self, work: Work) -> tuple[float, ...] | None:
        """The CRC-32 and the numbers of a work that an earlier run did and whose bytes are still there."""
        known = self.journal.done.get(work.number)
        return known if known and known[0] == self.crc(work.places) else None

    def seal(self, ends: Mapping[str, bytes]) -> None:
        """Write the tensors whose sizes were not known, the headers that tell them, and the index."""
        shards = [
            shard.with_lengths({name: len(data) for name, data in ends.items() if name in shard.offsets})
            for shard in self.output.shards
        ]
        try:
            for shard in shards:
                descriptor = self._descriptors[self.folder / shard.file]
                for name in ends.keys() & shard.offsets.keys():
                    _write(descriptor, memoryview(ends[name]), shard.offsets[name])
                _write(descriptor, memoryview(shard.header), 0)
                os.ftruncate(descriptor, shard.size)
            if len(shards) > 1:
                (self.folder / INDEX).write_text(index_of(shards))
            (self.folder / SCRATCH).unlink(missing_ok=True)
            for file in self.folder.iterdir():
                with open(file, "rb") as small:
                    os.fsync(small.fileno())
        except OSError as error:
            raise cannot_be_written(self.folder, error) from error

    def sync(self) -> None:
        for path, descriptor in self._descriptors.items():
            try:
                sync(descriptor)
            except OSError as error:
                raise cannot_be_written(path, error) from error

    def _opened(self, name: str, size: int) -> int:
        path = self.folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._open.callback(os.close, descriptor)
        os.ftruncate(descriptor, size)
        self._descriptors[path] = descriptor
        return descriptor

    def _open_scratch(self) -> None:
        if self.output.scratch:
            descriptor = self._opened(SCRATCH, sum(entry.nbytes for entry in self.output.scratch))
            end = 0
            for entry in self.output.scratch:
                self._places[entry.name] = descriptor, end
                end += entry.nbytes


def _write_works(
    files: Files, works: Iterable[Work], progress: Progress, stopping: Callable[[], None],
    is_done: Callable[[str], None],
) -> None:  # fmt: skip
    """Do every work the journal does not vouch for, noting what is done every COMMIT_SECONDS."""
    written, finished = files.written, {}
    last = time.monotonic()

    def commit() -> None:
        files.sync()
        if finished:
            files.journal.add(finished)
            finished.clear()

    def do(work: Work) -> tuple[Work, tuple[float, ...], bool]:
        if known := files.kept(work):
            return work, known, True
        made, noted = work.make()
        found = 0
        for place, data in zip(work.places, made, strict=True):
            found = files.write(place, data, found)
        return work, (found, *noted), False

    try:
        with closing(in_parallel(files.output.workers, works, do, stopping)) as done:
            for work, sums, kept in done:
                is_done(work.of)
                if not kept:
                    finished[work.number] = sums
                written.noted[work.number] = tuple(sums[1:])
                written.kept += kept
                progress.advance(work.source_bytes)
                if time.monotonic() - last > COMMIT_SECONDS:
                    commit()
                    last = time.monotonic()
    finally:
        commit()


def _finish(files: Files, finish: Finish) -> None:
    entries = {entry.name: entry for shard in files.output.shards for entry in shard.entries}
    ends: dict[str, bytes] = {}
    for name, data in finish(files):
        if name not in entries:
            files.write_file(name, data)
        elif entries[name].at_most:
            ends[name] = bytes(data)
        else:
            files.write(Place(name, 0, entries[name].nbytes), data)
    files.seal(ends)


def _check(output: CheckpointOutput) -> None:
    """Reopen what was written and hold its table against the plan."""
    folder = part_path(output.folder)
    with Checkpoint.open(folder) as written:
        found = written.stored
    entries = [entry for shard in output.shards for entry in shard.entries]
    wrong = found.keys() ^ {entry.name for entry in entries}
    wrong |= {entry.name for entry in entries if entry.name in found and not _is(found[entry.name], entry)}
    if wrong:
        raise RunError(
            f"{folder}: {len(wrong)} tensors are not those of the plan, the first is {min(wrong)}; run it again"
        )


def _is(tensor: TensorInfo, entry: Entry) -> bool:
    shorter = entry.at_most and len(tensor.shape) == 1 and tensor.shape <= entry.shape
    return tensor.dtype == entry.dtype and (shorter or tensor.shape == entry.shape)


def _read_finite(checkpoint: Checkpoint, tensor: TensorInfo, position: int, size: int) -> bytes:
    """Bytes of a tensor. Raises RunError where weights among them are no finite numbers."""
    data = checkpoint.read_bytes(tensor.name, position, size)
    if tensor.dtype in READABLE:
        bad = first_nonfinite(np.frombuffer(data, READABLE[tensor.dtype]).copy(), tensor.dtype)
        if bad >= 0:
            row, column = divmod(position * 8 // DTYPE_BITS[tensor.dtype] + bad, tensor.columns)
            raise RunError(
                f"{tensor.file}: tensor {tensor.name!r} holds a NaN or infinity (row {row}, column {column}); "
                "the checkpoint is damaged: fetch or train it again"
            )
    return data


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
