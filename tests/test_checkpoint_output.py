"""The writer of checkpoint folders: runs that are killed, starved and damaged, held against the undisturbed run."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from synthetic_checkpoint import Llama, write_checkpoint
from test_run import Kill, child

import llmcompress
from llmcompress import checkpoint_output
from llmcompress.checkpoint_output import CheckpointOutput, Files, Place, Work, check_room
from llmcompress.errors import InterruptedRun, PlanError, RunError
from llmcompress.journal import Journal
from llmcompress.progress import Progress
from llmcompress.safetensors_files import Entry, lay_out

ROWS, COLUMNS = 48, 40
VALUES = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
ENTRIES = [
    [Entry("a.text", "U8", (100,), at_most=True), Entry("a", "F32", (ROWS, COLUMNS))],
    [Entry("b", "F32", (COLUMNS, ROWS)), Entry("b.sum", "F32", (ROWS,))],
    [Entry("none", "F32", (0, 3))],
]


def output(folder: Path, workers: int = 2) -> CheckpointOutput:
    source = folder.parent / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "tokenizer.json").write_text("{}")
    return CheckpointOutput(
        folder, tuple(lay_out(ENTRIES, 8192)), "a job", source, {"config.json": "{}\n"}, workers,
        (Entry("sums", "F64", (ROWS,)),),
    )  # fmt: skip


def works(made: list[int] | None = None) -> Iterator[Work]:
    """`a` row by row, its transpose `b` column by column, and the sum of each row in the scratch."""
    for row in range(ROWS):

        def make(row=row):
            if made is not None:
                made.append(row)
            total = VALUES[row].astype(np.float64).sum(keepdims=True)
            return [VALUES[row], VALUES[row : row + 1].T, total], (float(row), 0.1 * row)

        places = (
            Place("a", row * COLUMNS * 4, COLUMNS * 4),
            Place("b", row * 4, 4, COLUMNS, ROWS * 4),
            Place("sums", row * 8, 8),
        )
        yield Work(row, places, make, COLUMNS * 4)


def finish(files: Files) -> Iterable[tuple[str, np.ndarray | bytes]]:
    sums = np.frombuffer(files.read(Place("sums", 0, 8 * ROWS)))
    yield "b.sum", sums.astype(np.float32)
    yield "a.text", b"%.9f" % sums.sum()


def write(folder: Path, progress: Progress = Progress(), made: list[int] | None = None):
    return checkpoint_output.write_checkpoint(output(folder), works(made), VALUES.nbytes, progress, finish)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    written = write(folder)
    assert written.kept == 0 and written.noted == {row: (float(row), 0.1 * row) for row in range(ROWS)}
    return contents(folder)


@pytest.fixture
def killed(undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that was killed after half of its work, each piece of it committed."""
    monkeypatch.setattr(checkpoint_output, "COMMIT_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    assert child(lambda: write(tmp_path / "out", Kill("writing", ROWS // 2))) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["out.journal", "out.part", "source"]
    return tmp_path


def test_safetensors_reads_what_was_written(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    assert set(undisturbed) == {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    found = {}
    for name, data in undisturbed.items():
        (tmp_path / name).write_bytes(data)
        if name.endswith(".safetensors"):
            with safe_open(tmp_path / name, "np") as file:
                found |= {key: (file.get_tensor(key), name) for key in file.keys()}
    index = json.loads(undisturbed["model.safetensors.index.json"])
    assert index["weight_map"] == {key: name for key, (_, name) in found.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value, _ in found.values())
    sums = VALUES.astype(np.float64).sum(1)
    expected = {"a": VALUES, "b": VALUES.T, "b.sum": sums.astype(np.float32), "none": np.empty((0, 3))}
    for key, value in expected.items():
        assert np.array_equal(found[key][0], value)
    assert bytes(found["a.text"][0]) == b"%.9f" % sums.sum()


def test_the_rest_of_a_killed_run_gives_the_same_bytes(killed: Path, undisturbed: dict[str, bytes]) -> None:
    made: list[int] = []
    written = write(killed / "out", made=made)
    assert contents(killed / "out") == undisturbed
    assert ROWS // 2 - 1 <= written.kept < ROWS and len(made) == ROWS - written.kept
    assert written.noted == {row: (float(row), 0.1 * row) for row in range(ROWS)}
    assert sorted(os.listdir(killed)) == ["out", "source"]


@pytest.mark.parametrize("tensor", ["a", "b", "sums"])
def test_a_damaged_piece_is_made_again(tensor: str, killed: Path, undisturbed: dict[str, bytes]) -> None:
    with Journal(killed / "out.journal", "a job") as journal, Files(output(killed / "out"), journal) as files:
        files.write(Place(tensor, 0, 1), b"\xa5")
    made: list[int] = []
    write(killed / "out", made=made)
    assert 0 in made and contents(killed / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["out.journal", "out.part/scratch", "out.part/model-00001-of-00002.safetensors"]
)
def test_what_is_lost_is_made_again(lost: str, killed: Path, undisturbed: dict[str, bytes]) -> None:
    (killed / lost).unlink()
    assert write(killed / "out").kept == 0
    assert contents(killed / "out") == undisturbed


@pytest.mark.slow
def test_a_kill_at_any_write_of_the_end(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """From the tensors made last to the folder's name: the n-th system call that changes a file is the last one."""
    real, names = (
        (os.pwrite, os.ftruncate, os.replace, os.unlink),
        ("pwrite", "ftruncate", "replace", "unlink"),
    )
    outcomes = set()
    for last in range(40):
        folder = tmp_path / str(last) / "out"
        folder.parent.mkdir()

        def job() -> None:
            left = [last]

            def until(function):
                def call(*arguments, **options):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return function(*arguments, **options)

                return call

            def ending(files: Files):
                for name, function in zip(names, real):
                    setattr(os, name, until(function))
                yield from finish(files)

            checkpoint_output.write_checkpoint(output(folder, 1), works(), 1, Progress(), ending)

        outcomes.add(child(job))
        if not folder.exists():
            assert write(folder).kept in (0, ROWS)
        assert contents(folder) == undisturbed
    assert outcomes == {0, -signal.SIGKILL}


def test_data_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def bad() -> Iterator[Work]:
        for work in works():
            yield work

        def make():
            raise RunError("a NaN")

        yield Work(ROWS, (), make, 0)

    with pytest.raises(RunError, match="a NaN"):
        checkpoint_output.write_checkpoint(output(tmp_path / "out"), bad(), 1, Progress(), finish)
    assert os.listdir(tmp_path) == ["source"]


def test_a_disk_that_takes_no_more(undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        write(tmp_path / "out")

    assert child(job) == 70
    said = (tmp_path / "child-error").read_text()
    assert said.startswith("InterruptedRun: ") and "make room and give the same command again" in said
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    class Second(Progress):
        refused = 0

        def advance(self, count: int) -> None:
            if not self.refused:
                with pytest.raises(InterruptedRun, match="another process is writing it"):
                    write(tmp_path / "out")
                Second.refused = 1

    write(tmp_path / "out", Second())
    assert Second.refused


def test_room_is_measured_before_the_start(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_output, "free_disk", lambda folder: 1000)
    with pytest.raises(PlanError, match=r"KiB are needed and 1000 bytes are free; make room"):
        check_room(output(tmp_path / "elsewhere/out"))
    check_room(output(killed / "out"))  # its room is taken already


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model", Llama(layers=3, hidden=512))


FORMATS = [{"format": "gptq"}, {"format": "nf4", "double_quant": True}, {"format": "int8"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: options["format"])
def test_a_killed_job_goes_on_whatever_the_format(
    options: dict, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_output, "COMMIT_SECONDS", 0.0)
    whole = llmcompress.quantize(model, tmp_path / "whole", **options)
    job = lambda: llmcompress.quantize(model, tmp_path / "out", progress=Kill("writing", 20), **options)  # noqa: E731
    assert child(job) == -signal.SIGKILL
    result = llmcompress.quantize(model, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert 18 <= result.slabs_kept < result.slabs == whole.slabs
    errors = [[tensor.relative_error for tensor in done.outputs[0].tensors] for done in (whole, result)]
    assert errors[0] == errors[1]


def test_memory_is_kept_or_the_job_refused(model: Path, tmp_path: Path) -> None:
    for options in FORMATS[:1]:
        with pytest.raises(PlanError, match=r"--max-ram 100.0 MiB is too little: this model needs at least"):
            llmcompress.quantize(model, tmp_path / "out", max_ram="100MiB", **options)
        usual = llmcompress.quantize(model, tmp_path / "usual", **options)
        less = llmcompress.quantize(model, tmp_path / "less", max_ram="240MiB", **options)
        assert less.slabs >= usual.slabs and contents(tmp_path / "less") == contents(tmp_path / "usual")
