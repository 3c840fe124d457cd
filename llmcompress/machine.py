"""What this machine lets us use: cores and memory within the control group, room on a disk."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores this process may use: its affinity, cut to the control group's CPU quota (versions 1 and 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(count, math.ceil(quota))) if quota else count


def _cpu_quota() -> float | None:
    limits = _words(_group_directory() / "cpu.max")
    if not limits:
        limits = _words(_CGROUP / "cpu/cpu.cfs_quota_us") + _words(_CGROUP / "cpu/cpu.cfs_period_us")
    if len(limits) == 2 and limits[0].isdigit() and int(limits[0]) > 0:
        return int(limits[0]) / int(limits[1])
    return None


def _group_directory() -> Path:
    """The directory of our version-2 control group; its root where there is none of our own."""
    for line in _words(Path("/proc/self/cgroup")):
        if line.startswith("0::") and (_CGROUP / line[3:].lstrip("/") / "cpu.max").exists():
            return _CGROUP / line[3:].lstrip("/")
    return _CGROUP


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # not Linux, or no such controller: no limit to respect
        return []


def free_disk(directory: Path) -> int:
    """Bytes a user without privileges can still write to the file system `directory` is on."""
    return shutil.disk_usage(directory).free
