"""The one loop that carries plans out: workers that read, quantize and write slabs, and a journal.

Each worker takes a slab from the source to its places in the outputs; reading, computing and writing
overlap because there is one worker more than there are cores. All offsets are known, so slabs are written in
place, in any order. A file is `NAME.part` until it is whole, checked, and on the disk.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from pathlib import Path

import numpy as np

from llmcompress.errors import InterruptedRun, RunError
from llmcompress.journal import Journal, Sums, sync
from llmcompress.parallel import in_parallel
from llmcompress.plan import Placement, Plan, Slab, Step, check_disk, part_path
from llmcompress.progress import Progress
from llmcompress.report import Result, make_result
from llmcompress.slab import read_slab
from llmcompress.verify import verify

COMMIT_SECONDS = 2.0  # a kill loses at most the slabs of this long


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Carry out `plan`; the files have their real names when it returns.

    Raises RunError for data that cannot be written faithfully (the partial files are removed), and lets
    KeyboardInterrupt through with a state the same command goes on from.
    """
    progress = progress or Progress()
    started = time.monotonic()
    journal = Journal(plan.files[0].path.with_name(plan.files[0].path.name + ".journal"), plan.fingerprint())
    resumed = journal.load()
    if not journal.complete:
        check_disk(plan)
        with Parts(plan) as parts:
            journal.start()
            try:
                _write_slabs(plan, parts, journal, progress)
            except RunError:
                parts.remove()
                journal.remove()
                raise
            finally:
                journal.close()
    errors = verify(plan, progress) if not journal.complete else {}
    journal.start()
    if not journal.complete:
        journal.finish()
    for file in plan.files:
        _rename(part_path(file.path), file.path)
    journal.remove()
    return make_result(plan, errors, seconds=time.monotonic() - started, resumed=resumed)


class Parts:
    """The outputs while they are being written: `NAME.part` of the final size, header in place."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Parts:
        try:
            for file in self.plan.files:
                file.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(part_path(file.path), os.O_RDWR | os.O_CREAT, 0o666)
                self._descriptors[file.path] = descriptor
                os.ftruncate(descriptor, file.size)
                _write(descriptor, memoryview(file.header), 0)
        except OSError as error:
            self.close()
            raise RunError(f"{error.filename or file.path}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, output: int, placement: Placement, position: int, data: np.ndarray) -> int:
        """Write at byte `position` of a tensor; returns the CRC-32 of `data`."""
        view = memoryview(np.ascontiguousarray(data)).cast("B")
        try:
            _write(self._descriptor(output, placement), view, placement.offset + position)
        except OSError as error:
            path = self.plan.outputs[output].files[placement.file].path
            remedy = "make room and run the same command again" if error.errno == errno.ENOSPC else "see the disk"
            raise InterruptedRun(f"{path}: cannot be written: {error.strerror}; {remedy}") from error
        return zlib.crc32(view)

    def crc(self, output: int, placement: Placement, position: int, size: int) -> int:
        """CRC-32 of what stands at byte `position` of a tensor."""
        return zlib.crc32(os.pread(self._descriptor(output, placement), size, placement.offset + position))

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            sync(descriptor)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def remove(self) -> None:
        self.close()
        for file in self.plan.files:
            part_path(file.path).unlink(missing_ok=True)

    def _descriptor(self, output: int, placement: Placement) -> int:
        return self._descriptors[self.plan.outputs[output].files[placement.file].path]


def _write_slabs(plan: Plan, parts: Parts, journal: Journal, progress: Progress) -> None:
    """Write every slab the journal does not vouch for, noting progress every COMMIT_SECONDS."""
    finished: dict[int, Sums] = {}
    progress.start("writing", sum(_source_bytes(plan.steps[slab.step], slab) for slab in plan.slabs()))
    tasks = ((index, slab) for index, slab in enumerate(plan.slabs()))
    last = time.monotonic()
    try:
        for index, slab, sums in in_parallel(plan.workers, tasks, lambda task: _do_slab(plan, parts, journal, *task)):
            if index not in journal.done or journal.done[index] != sums:
                finished[index] = sums
            progress.advance(_source_bytes(plan.steps[slab.step], slab))
            if time.monotonic() - last > COMMIT_SECONDS:
                finished = _commit(parts, journal, finished)
                last = time.monotonic()
    finally:
        _commit(parts, journal, finished)


def _commit(parts: Parts, journal: Journal, finished: dict[int, Sums]) -> dict[int, Sums]:
    parts.sync()
    if finished:
        journal.add(finished)
    return {}


def _do_slab(plan: Plan, parts: Parts, journal: Journal, index: int, slab: Slab) -> tuple[int, Slab, Sums]:
    """Write one slab to every output, unless an earlier run did and its bytes are still there."""
    step = plan.steps[slab.step]
    places = [(number, output.placements[slab.step]) for number, output in enumerate(plan.outputs)]
    known = journal.done.get(index)
    if known is not None:
        sizes = [slab.rows * place.grid.row_bytes(step.columns) for _, place in places]
        found = (parts.crc(number, place, _position(step, slab, place), size)
                 for (number, place), size in zip(places, sizes))  # fmt: skip
        if known == tuple(found):
            return index, slab, known
    weights = read_slab(plan.checkpoint, step, slab)
    importance = _importance(plan, step, slab)
    sums = tuple(
        parts.write(number, place, _position(step, slab, place), weights.encoded(place.grid, importance))
        for number, place in places
    )
    return index, slab, sums


def _position(step: Step, slab: Slab, place: Placement) -> int:
    return slab.first * place.grid.row_bytes(step.columns)


def _importance(plan: Plan, step: Step, slab: Slab) -> np.ndarray | None:
    """Importance `(columns,)` of the matrix a slab lies in."""
    entry = plan.importance.get(step.name)
    return None if entry is None else entry[slab.first // step.shape[-2] if len(step.shape) > 2 else 0]


def _source_bytes(step: Step, slab: Slab) -> int:
    return slab.rows * step.columns * (4 if step.dtype == "F32" else 2)


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _rename(part: Path, path: Path) -> None:
    """Give a finished file its name; one that an interrupted run already renamed is left alone."""
    if part.exists():
        os.replace(part, path)
