"""The one loop that carries plans out: workers that read, quantize and write slabs, and a journal.

Each worker takes a slab from the source to its places in the outputs; reading, computing and writing
overlap because there is one worker more than there are cores. All offsets are known, so slabs are written in
place, in any order. A file is `NAME.part` until it is whole, checked, and on the disk.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmcompress.errors import GGUFError, RunError
from llmcompress.grids.compiling import prepare_kernels
from llmcompress.grids.grid import Grid
from llmcompress.journal import Journal, Sums, cannot_be_written, open_locked, sync
from llmcompress.output import OutputFile, Placement, part_path
from llmcompress.parallel import in_parallel
from llmcompress.plan import Plan, check_disk
from llmcompress.progress import Progress
from llmcompress.report import Result, make_result
from llmcompress.slab import read_slab
from llmcompress.step import Slab, Step
from llmcompress.verify import Fidelity, verify

if TYPE_CHECKING:
    from llmcompress.methods.solver import Solver

COMMIT_SECONDS = 2.0  # a kill loses at most the slabs of this long


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Carry out `plan`; the files have their real names when it returns.

    Raises RunError for data that cannot be written faithfully (the partial files are removed), InterruptedRun
    for a disk that cannot be written to, and lets KeyboardInterrupt through; after both, the same command goes on.
    """
    progress = progress or Progress()
    started = time.monotonic()
    prepare_kernels(kernel_uses(plan), plan.recipe.effort, progress.say)
    first = plan.files[0].path
    with Journal(first.with_name(first.name + ".journal"), plan.fingerprint()) as journal:
        if journal.checked is None or not all(_is_whole(file) for file in plan.files):
            kept = _write_and_check(plan, journal, progress)
        else:
            kept = sum(1 for _ in plan.slabs())
            _rename(plan)
        journal.remove()
        measured = {(output, step): Fidelity(*sums) for output, step, *sums in journal.checked or ()}
    return make_result(plan, measured, seconds=time.monotonic() - started, slabs_kept=kept)


def _write_and_check(plan: Plan, journal: Journal, progress: Progress) -> int:
    """From headers to renamed files; returns how many slabs an earlier run had written."""
    check_disk(plan)
    with Parts(plan, fresh=not journal.done) as parts:
        try:
            made = [part_path(file.path) for file in plan.files]
            pieces = Counter(plan.steps[slab.step].name for slab in plan.slabs())
            with plan.importance.running(made, pieces):
                kept = _write_slabs(plan, parts, journal, progress)
            measured = verify(plan, progress)
        except (RunError, GGUFError):
            parts.remove()
            journal.remove()
            raise
        journal.finish([(*place, *astuple(fidelity)) for place, fidelity in measured.items()])
        _rename(plan)
    return kept


def kernel_uses(plan: Plan) -> set[tuple[Grid, bool]]:
    """The grids of a plan, each with importance or without."""
    pairs = ((place.grid, step.name in plan.importance)
             for output in plan.outputs for step, place in zip(plan.steps, output.placements))  # fmt: skip
    return set(pairs)


class Parts:
    """The outputs while they are being written: `NAME.part` of the final size, header in place, locked.

    `fresh` empties them first: what an earlier job left would show between the tensors.
    """

    def __init__(self, plan: Plan, fresh: bool) -> None:
        self.plan = plan
        self.fresh = fresh
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Parts:
        try:
            for file in self.plan.files:
                self._open(file)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, output: int, placement: Placement, position: int, data: np.ndarray) -> int:
        """Write at byte `position` of a tensor; returns the CRC-32 of `data`."""
        view = memoryview(np.ascontiguousarray(data)).cast("B")
        try:
            _write(self._descriptor(output, placement), view, placement.offset + position)
        except OSError as error:
            raise cannot_be_written(self.plan.outputs[output].files[placement.file].path, error) from error
        return zlib.crc32(view)

    def crc(self, output: int, placement: Placement, position: int, size: int) -> int:
        """CRC-32 of what stands at byte `position` of a tensor."""
        return zlib.crc32(os.pread(self._descriptor(output, placement), size, placement.offset + position))

    def sync(self) -> None:
        for path, descriptor in self._descriptors.items():
            try:
                sync(descriptor)
            except OSError as error:
                raise cannot_be_written(path, error) from error

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def remove(self) -> None:
        self.close()
        for file in self.plan.files:
            part_path(file.path).unlink(missing_ok=True)

    def _open(self, file: OutputFile) -> None:
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._descriptors[file.path] = open_locked(part_path(file.path))
            if self.fresh:
                os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, file.size)
            _write(descriptor, memoryview(file.header), 0)
        except OSError as error:
            raise cannot_be_written(file.path, error) from error

    def _descriptor(self, output: int, placement: Placement) -> int:
        return self._descriptors[self.plan.outputs[output].files[placement.file].path]


def _write_slabs(plan: Plan, parts: Parts, journal: Journal, progress: Progress) -> int:
    """Write every slab the journal does not vouch for, noting progress every COMMIT_SECONDS; returns the
    number of those it does."""
    finished: dict[int, Sums] = {}
    kept = 0
    progress.start("writing", sum(plan.steps[slab.step].source_bytes(slab.rows) for slab in plan.slabs()))
    last = time.monotonic()
    try:
        with closing(
            in_parallel(
                plan.workers,
                plan.importance.in_order(enumerate(plan.slabs()), plan.steps),
                partial(_do_slab, plan, parts, journal),
                plan.importance.stop,
            )
        ) as slabs:
            for slab, written in slabs:
                plan.importance.finished(plan.steps[slab.step].name)
                finished |= written
                kept += not written
                progress.advance(plan.steps[slab.step].source_bytes(slab.rows))
                if time.monotonic() - last > COMMIT_SECONDS:
                    finished = _commit(parts, journal, finished)
                    last = time.monotonic()
    finally:
        _commit(parts, journal, finished)
    return kept


def _commit(parts: Parts, journal: Journal, finished: dict[int, Sums]) -> dict[int, Sums]:
    parts.sync()
    if finished:
        journal.add(finished)
    return {}


def _do_slab(
    plan: Plan, parts: Parts, journal: Journal, numbered: tuple[int, Slab]
) -> tuple[Slab, dict[int, Sums]]:
    """Write one slab to every output, unless an earlier run did and its bytes are still there.

    Returns the sums of what was written by the slab's number: nothing where nothing was."""
    index, slab = numbered
    step = plan.steps[slab.step]
    places = [(number, output.placements[slab.step]) for number, output in enumerate(plan.outputs)]
    if index in journal.done and journal.done[index] == _sums_there(parts, places, step, slab):
        return slab, {}
    importance, effort = _importance(plan, step, slab), plan.recipe.effort  # may wait for its calibration
    solver = _solver(plan, step, slab, [place.grid for _, place in places])
    weights = read_slab(plan.checkpoint, step, slab)
    sums = tuple(
        parts.write(
            number,
            place,
            _position(step, slab, place),
            weights.encoded(place.grid, importance, effort, solver, plan.pruning(step)),
        )
        for number, place in places
    )
    return slab, {index: sums}


def _sums_there(parts: Parts, places: list[tuple[int, Placement]], step: Step, slab: Slab) -> Sums:
    return tuple(
        parts.crc(number, place, _position(step, slab, place), slab.rows * place.grid.row_bytes(step.columns))
        for number, place in places
    )


def _position(step: Step, slab: Slab, place: Placement) -> int:
    return slab.first * place.grid.row_bytes(step.columns)


def _importance(plan: Plan, step: Step, slab: Slab) -> np.ndarray | None:
    """Importance `(columns,)` of the matrix a slab lies in."""
    entry = plan.importance.get(step.name)
    return None if entry is None else entry[_matrix(step, slab)]


def _solver(plan: Plan, step: Step, slab: Slab, grids: list[Grid]) -> Solver | None:
    """What GPTQ needs for a slab; None where it neither quantizes nor prunes any output of it, or has too little data."""
    pruned = plan.pruning(step) and step.name in plan.importance
    if not pruned and all(plan.method(step, grid) != "gptq" for grid in grids):
        return None
    return plan.importance.solver(step.name, _matrix(step, slab))


def _matrix(step: Step, slab: Slab) -> int:
    """Which of a step's stacked matrices a slab lies in."""
    return slab.first // step.shape[-2] if len(step.shape) > 2 else 0


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _is_whole(file: OutputFile) -> bool:
    """Whether a checked file is still there, under one of its two names."""
    return any(
        path.is_file() and path.stat().st_size == file.size for path in (part_path(file.path), file.path)
    )


def _rename(plan: Plan) -> None:
    """Give the finished files their names; one that an interrupted run already renamed is left alone."""
    for file in plan.files:
        part = part_path(file.path)
        if part.exists():
            try:
                os.replace(part, file.path)
            except OSError as error:
                raise cannot_be_written(file.path, error) from error
