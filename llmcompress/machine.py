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
    """Cores' worth of time the tightest control group around us grants; None without a limit."""
    limits = [_words(folder / "cpu.max") for folder in _groups()]
    limits.append(_words(_CGROUP / "cpu/cpu.cfs_quota_us") + _words(_CGROUP / "cpu/cpu.cfs_period_us"))
    quotas = [int(limit[0]) / int(limit[1]) for limit in limits if len(limit) == 2 and limit[0].isdigit()]
    return min((quota for quota in quotas if quota > 0), default=None)


def _groups() -> list[Path]:
    """The directories of our version-2 control group and of those around it."""
    for line in _words(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            own = _CGROUP / line[3:].lstrip("/")
            return [own, *(folder for folder in own.parents if folder.is_relative_to(_CGROUP))]
    return [_CGROUP]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # not Linux, or no such controller: no limit to respect
        return []


def see_one_gpu(device: str) -> str:
    """What to call `device` for a library that takes the first GPU in sight, or all: of a cuda:N this process, before
    it asks CUDA for anything, is made to see no other."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdigit() or "LOCAL_RANK" in os.environ:
        return device
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(at) for at in range(int(number) + 1)]
    if int(number) >= len(names):
        return device
    os.environ["CUDA_VISIBLE_DEVICES"] = names[int(number)]
    return kind


def free_disk(directory: Path) -> int:
    """Bytes a user without privileges can still write to the file system `directory` is on."""
    return shutil.disk_usage(directory).free
