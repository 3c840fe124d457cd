"""What the journal remembers, and what it does not believe."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.errors import InterruptedRun
from llmcompress.journal import Journal, cannot_be_written, open_locked

JOB = "f" * 64


def written(path: Path) -> Path:
    with Journal(path, JOB) as journal:
        journal.add({0: (11, 12)})
        journal.add({2: (31, 32), 1: (21, 22)})
    return path


def loaded(path: Path, job: str = JOB) -> Journal:
    with Journal(path, job) as journal:
        return journal


def test_what_was_added_is_found_again(tmp_path):
    found = loaded(written(tmp_path / "j"))
    assert found.done == {0: (11, 12), 1: (21, 22), 2: (31, 32)}
    assert found.checked is None


def test_what_the_check_measured_comes_back_exactly(tmp_path):
    measured = [(0, 0, 5, 0.1, 1 / 3), (0, 1, 2, 0.0, 1e-300)]
    with Journal(written(tmp_path / "j"), JOB) as journal:
        journal.finish(measured)
    assert [tuple(row) for row in loaded(tmp_path / "j").checked] == measured


def test_lines_stay_readable_json(tmp_path):
    lines = written(tmp_path / "j").read_text().split("\n")
    assert [json.loads(line) for line in lines] == [
        {"job": JOB},
        {"done": {"0": [11, 12]}},
        {"done": {"2": [31, 32], "1": [21, 22]}},
    ]


@pytest.mark.parametrize("kept", range(0, 200, 7))
def test_a_journal_cut_anywhere_is_survived(tmp_path, kept):
    path = written(tmp_path / "j")
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with Journal(path, JOB) as journal:
        before = dict(journal.done)
        assert before.items() <= {0: (11, 12), 1: (21, 22), 2: (31, 32)}.items()
        journal.add({9: (91, 92)})
    assert loaded(path).done == before | {9: (91, 92)}


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[]", b"7", b'{"done": 5}', b'{"done": {"x": [1]}}', b'{"done": {"1": 4}}',
             b'{"checked": 3}', b'{"checked": [1]}', b'{"checked": [[1, 2]]}', b'{"other": 1}', b""]
)  # fmt: skip
def test_a_line_that_makes_no_sense_counts_for_nothing(tmp_path, line):
    path = written(tmp_path / "j")
    path.write_bytes(path.read_bytes() + b"\n" + line)
    found = loaded(path)
    assert found.done.keys() == {0, 1, 2} and found.checked is None


def test_a_journal_of_another_job_is_ignored_and_replaced_when_something_is_finished(tmp_path):
    path = written(tmp_path / "j")
    before = path.read_bytes()
    other = "0" * 64
    assert loaded(path, other).done == {}
    assert path.read_bytes() == before
    with Journal(path, other) as journal:
        journal.add({5: (1,)})
    assert loaded(path, other).done == {5: (1,)}
    assert loaded(path).done == {}


def test_nothing_recorded_leaves_no_file(tmp_path):
    with Journal(tmp_path / "new" / "j", JOB):
        assert (tmp_path / "new" / "j").exists()
    assert not (tmp_path / "new" / "j").exists()


def test_a_second_process_is_refused_while_the_first_has_it(tmp_path):
    path = tmp_path / "j"
    again = f"from pathlib import Path; from llmcompress.journal import Journal\nwith Journal(Path({str(path)!r}), {JOB!r}): pass"
    with Journal(path, JOB) as journal:
        journal.add({0: (1,)})
        refused = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
        assert "InterruptedRun" in refused.stderr and "another process is writing it" in refused.stderr
    subprocess.run([sys.executable, "-c", again], check=True)
    assert loaded(path).done == {0: (1,)}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InterruptedRun, match=r"file.*cannot be written: .*give the same command again$"):
        loaded(tmp_path / "file" / "j")


def test_no_room_says_so():
    error = cannot_be_written(Path("x"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert (
        str(error)
        == "x: cannot be written: No space left on device; make room and give the same command again"
    )


def test_a_file_renamed_before_we_had_its_lock_is_not_ours(tmp_path, monkeypatch):
    part, whole = tmp_path / "x.gguf.part", tmp_path / "x.gguf"
    part.write_bytes(b"finished")
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if not whole.exists():
            part.rename(whole)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    descriptor = open_locked(part)
    os.ftruncate(descriptor, 0)
    os.close(descriptor)
    assert whole.read_bytes() == b"finished" and part.read_bytes() == b""
