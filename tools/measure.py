"""What a command costs: wall seconds, CPU seconds, peak resident memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

from llmcompress.machine import cores

# ru_maxrss counts KiB on Linux and bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Cost:
    """`cpu` is user and system time with that of the command's own children; `peak` is in bytes, of the
    largest single process; `written` is the bytes of the files it left behind."""

    seconds: float
    cpu: float
    peak: int
    written: int = 0

    def then(self, other: Cost) -> Cost:
        """The cost of this command and then the other one."""
        return Cost(
            self.seconds + other.seconds, self.cpu + other.cpu, max(self.peak, other.peak), self.written + other.written
        )  # fmt: skip


def measure(command: Sequence[str | Path], env: Mapping[str, str] | None = None, out: Path | None = None) -> Cost:
    """Run a command and wait for it. `env` is added to the environment; `out` is the file it writes.

    A child's peak counts from that of the process that starts it, so the caller has to be small itself.
    Raises RuntimeError with the end of the command's output where it fails.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | (env or {}))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not see it end
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{_end_of(log)}")
    cost = Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _MAXRSS_UNIT)
    return replace(cost, written=out.stat().st_size) if out else cost


def _end_of(log) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return log.read().decode(errors="replace")


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself."""
    return Cost(
        median(cost.seconds for cost in costs), median(cost.cpu for cost in costs),
        int(median(cost.peak for cost in costs)), int(median(cost.written for cost in costs)),
    )  # fmt: skip


def machine() -> str:
    """Processor, cores this process may use, system, Python and date, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say
        model = platform.processor() or platform.machine()
    return f"{model}, {cores()} cores, {platform.system()}, Python {platform.python_version()}, {date.today()}"
