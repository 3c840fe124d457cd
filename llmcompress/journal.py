"""What a job has finished, so that the same command goes on after a kill at any moment.

JSON lines beside the output: the job's fingerprint, then batches of finished slabs with the CRC-32s of what
was written, at last what the check of the finished files measured. A batch is appended only
after its data has reached the disk. A torn last line, a line that makes no sense, a slab whose bytes do not
have their sum, or a journal of another job counts for nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompress.errors import InterruptedRun

Sums = tuple[float, ...]  # CRC-32s of what was written; what else a job notes of a slab
sync = getattr(os, "fdatasync", os.fsync)  # macOS has only the slower one

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Journal:
    """The journal of one job, locked while it is open: one job, one process.

    `done` maps a slab's index to its sums; `checked` is None until the files are whole and checked, then the
    rows of five numbers given to `finish`. Raises InterruptedRun where the file cannot be written or is locked.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: dict[int, Sums] = {}
        self.checked: list[list[float]] | None = None
        self._begun = False  # what the file holds is this job's

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(
                open_locked(self.path, os.O_APPEND), "a+b", buffering=0
            )  # nothing is left for closing
            self._file.seek(0)
            self._load(self._file.read())
        except OSError as error:
            raise cannot_be_written(self.path, error) from error
        return self

    def __exit__(self, *exception: object) -> None:
        state = os.fstat(self._file.fileno())
        if state.st_nlink and not state.st_size:
            self.remove()
        self._file.close()

    def add(self, finished: Mapping[int, Sums]) -> None:
        """Note slabs whose data is on the disk."""
        self._append({"done": finished})
        self.done.update(finished)

    def finish(self, measured: Sequence[Sequence[float]]) -> None:
        """Note that the files are whole and checked; from here on they are only renamed."""
        self._append({"checked": measured})
        self.checked = [list(row) for row in measured]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _load(self, data: bytes) -> None:
        """Take in what an earlier run of the same job left."""
        lines = data.split(b"\n")
        self._begun = _parsed(lines[0]) == {"job": self.fingerprint}
        for line in lines[1:] if self._begun else ():
            match _parsed(line):
                case {"done": dict(done)} if _are_sums(done):
                    self.done.update((int(slab), tuple(sums)) for slab, sums in done.items())
                case {"checked": list(rows)} if all(isinstance(row, list) and len(row) == 5 for row in rows):
                    self.checked = rows

    def _append(self, record: Mapping[str, Any]) -> None:
        line = b"\n" + _packed(record)  # after what a kill may have torn
        if not self._begun:
            line = _packed({"job": self.fingerprint}) + line
        try:
            if not self._begun:
                self._file.truncate(0)
            while line:
                line = line[self._file.write(line) :]
            sync(self._file.fileno())
        except OSError as error:
            raise cannot_be_written(self.path, error) from error
        self._begun = True


def cannot_be_written(path: Path, error: OSError) -> InterruptedRun:
    """A failed write as the user reads of it: what is finished stays."""
    remedy = "make room" if error.errno in _NO_ROOM else "see to that"
    where = error.filename or path
    return InterruptedRun(
        f"{where}: cannot be written: {error.strerror}; {remedy} and give the same command again"
    )


def open_locked(path: Path, flags: int = 0) -> int:
    """A descriptor of `path`, made if need be, that keeps other processes from it until it is closed.

    A file that its owner removed or renamed before we had the lock does not count. Raises InterruptedRun if
    another process has it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        try:
            _lock(descriptor, path)
            if _has_its_name(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InterruptedRun(f"{path}: another process is writing it; wait for that one or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some network file systems have none
            raise


def _has_its_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _packed(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _are_sums(done: Mapping[str, Any]) -> bool:
    return all(slab.isdecimal() and isinstance(sums, list) for slab, sums in done.items())
