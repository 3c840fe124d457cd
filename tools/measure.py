"""What a command costs: wall seconds, CPU seconds, peak resident memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import IO

from llmcompress.machine import cores

# ru_maxrss counts KiB on Linux and bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


SAMPLED_EVERY = 0.02  # seconds between two looks at a command's own memory


@dataclass(frozen=True)
class Cost:
    """`cpu` is user and system time with that of the command's own children; `written` the bytes of the file
    it left. `peak` is the most bytes resident in any one process, with the pages of files it maps; `own`
    is the most seen without those, 0 where the system does not say (all but Linux)."""

    seconds: float
    cpu: float
    peak: int
    own: int
    written: int = 0

    def then(self, other: Cost) -> Cost:
        """The cost of this command and then the other one."""
        return Cost(
            self.seconds + other.seconds, self.cpu + other.cpu, max(self.peak, other.peak),
            max(self.own, other.own), self.written + other.written,
        )  # fmt: skip


def measure(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    out: Path | None = None,
    printed: Path | None = None,
) -> Cost:
    """Run a command and wait for it. `env` is added to the environment; `out` is the file it writes.

    What it prints, on standard output and error, stays in the file `printed` where one is given. A child's peak counts from that of the process that starts it, so the caller has to be small itself.
    Raises RuntimeError with the end of the command's output where it fails.
    """
    with open(printed, "w+b") if printed else tempfile.TemporaryFile() as log:
        environment, started = os.environ | (env or {}), time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        with _Sampler(process.pid) as sampler:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not see it end
        if process.returncode:
            words = " ".join(map(str, command))
            raise RuntimeError(f"{words}: exit code {process.returncode}\n{end_of(log)}")
    cost = Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _MAXRSS_UNIT, sampler.peak)
    return replace(cost, written=out.stat().st_size) if out else cost


class _Sampler:
    """Watches a process's memory that is no file's, from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY):
            self.peak = max(self.peak, self._anonymous())

    def _anonymous(self) -> int:
        try:
            found = re.search(r"RssAnon:\s*(\d+) kB", self._status.read_text())
        except OSError:  # it has just ended, or this is not Linux
            return 0
        return int(found[1]) * 1024 if found else 0


def end_of(log: IO[bytes]) -> str:
    """The last 2000 bytes of what a command printed."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return log.read().decode(errors="replace")


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself."""
    return Cost(
        median(cost.seconds for cost in costs), median(cost.cpu for cost in costs),
        int(median(cost.peak for cost in costs)), int(median(cost.own for cost in costs)),
        int(median(cost.written for cost in costs)),
    )  # fmt: skip


def machine() -> str:
    """Processor, cores this process may use, system, Python and date, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say
        model = platform.processor() or platform.machine()
    python = platform.python_version()
    return f"{model}, {cores()} cores, {platform.system()}, Python {python}, {date.today()}"
