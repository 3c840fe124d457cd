"""Cores within the control group, on files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmcompress import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty control-group file system, on a machine of eight cores."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "limit, cores",
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("1600000 100000", 8),
    ],
)
def test_the_quota_of_version_2(limit: str, cores: int, group: Path) -> None:
    (group / "cpu.max").write_text(limit + "\n")
    assert machine.cores() == cores


@pytest.mark.parametrize("quota, cores", [("-1", 8), ("300000", 3)])
def test_the_quota_of_version_1(quota: str, cores: int, group: Path) -> None:
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert machine.cores() == cores


def test_no_limit_is_all_cores_of_the_affinity(group: Path) -> None:
    assert machine.cores() == 8


@pytest.mark.parametrize(
    ("device", "seen", "called", "sees"),
    [
        ("cuda:2", None, "cuda", "2"), ("cuda:1", "3,5", "cuda", "5"), ("cuda:0", "GPU-8a,GPU-9b", "cuda", "GPU-8a"),
        ("cuda:2", "3,5", "cuda:2", "3,5"), ("cuda", "3,5", "cuda", "3,5"), ("cpu", None, "cpu", None),
    ],
)  # fmt: skip
def test_a_gpu_by_its_number_is_the_only_one_seen(device, seen, called, sees, monkeypatch) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": seen} if seen else {}
    monkeypatch.setattr(os, "environ", environment)
    assert machine.see_one_gpu(device) == called and environment.get("CUDA_VISIBLE_DEVICES") == sees
    environment["LOCAL_RANK"] = "1"
    assert machine.see_one_gpu("cuda:1") == "cuda:1"
