"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmcompress.errors import LlmcompressError
from llmcompress.whole_file import whole_file


def test_the_name_appears_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_after_a_fault_the_old_file_is_there(tmp_path: Path, fault: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(fault), whole_file(path) as file:
        file.write(b"new")
        raise fault
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder"), ("none/a", "No such file"), ("pipe", "or a device")]
)
def test_places_where_no_file_can_be(tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LlmcompressError, match=message), whole_file(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match="a: cannot be written: No space left"):
        with whole_file(tmp_path / "a"):
            raise OSError(28, "No space left on device")
    assert not os.listdir(tmp_path)
