"""What a job has finished, so that the same command goes on after a kill at any moment.

JSON lines beside the output: the job's fingerprint, then batches of finished slabs with the CRC-32 of what
was written for each output. A batch is appended only after its data has reached the disk. A torn last line,
a slab whose bytes do not have their sum, or a journal of another job counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from llmcompress.errors import RunError

Sums = tuple[int, ...]  # one CRC-32 for each output
sync = getattr(os, "fdatasync", os.fsync)  # macOS has only the slower one


class Journal:
    """The journal of one job. `done` maps a slab's index to its sums, `complete` says the files were checked."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: dict[int, Sums] = {}
        self.complete = False
        self._file = None

    def load(self) -> bool:
        """Read what an earlier run of the same job left; False where there is none."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return False
        records = list(_records(lines[:-1]))  # what follows the last newline was being written when it stopped
        if not records or records[0].get("job") != self.fingerprint:
            return False
        for record in records[1:]:
            self.done.update((int(slab), tuple(sums)) for slab, sums in record.get("done", {}).items())
            self.complete = self.complete or bool(record.get("complete"))
        return True

    def start(self) -> None:
        """Open for appending; a journal of another job is replaced."""
        fresh = not self.done and not self.complete
        self._file = open(self.path, "wb" if fresh else "ab")
        if fresh:
            self._append({"job": self.fingerprint})
        else:
            self._file.write(b"\n")  # ends a torn line

    def add(self, finished: Mapping[int, Sums]) -> None:
        """Note slabs whose data is on the disk."""
        self._append({"done": finished})
        self.done.update(finished)

    def finish(self) -> None:
        """Note that the files are whole and checked; from here on they are only renamed."""
        self._append({"complete": True})
        self.complete = True

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, record: Mapping) -> None:
        if self._file is None:
            raise RunError(f"{self.path}: the journal is not open")
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        sync(self._file.fileno())


def _records(lines: list[bytes]):
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
