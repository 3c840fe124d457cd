"""Runs that are killed, starved, disturbed and fed bad weights, held against the undisturbed run, byte for byte."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.numpy import load_file, save_file
from synthetic_checkpoint import Llama, poke, write_checkpoint

import llmcompress
from llmcompress import machine, run
from llmcompress.errors import InterruptedRun, PlanError, RunError
from llmcompress.journal import Journal
from llmcompress.output import part_path
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe

TYPES = ("Q8_0", "Q4_K_M")
OUT = "out/{type}.gguf"
ODD = Llama(layers=2, hidden=288, feed_forward=544, heads=6, kv_heads=2)  # rows whose bytes need padding
BIG = Llama(layers=12, hidden=512, feed_forward=1408, heads=8, kv_heads=2)  # about 34 million weights


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "model", ODD)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("big") / "model", BIG)


class Kill(Progress):
    """Dies by `signal` when `count` slabs of `phase` are done."""

    def __init__(self, phase: str, count: int, signal: int = signal.SIGKILL) -> None:
        self.phase, self.count, self.signal, self.now = phase, count, signal, ""

    def start(self, phase: str, total: int, unit: str = "bytes") -> None:
        self.now = phase

    def advance(self, count: int) -> None:
        if self.now == self.phase:
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), self.signal)


def child(job) -> int:
    """Do `job` in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        status = 70
        try:
            job()
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException as error:
            (Path.cwd() / "child-error").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def quantized(model: Path, folder: Path, types=TYPES, **options) -> llmcompress.report.Result:
    return llmcompress.quantize(model, folder / OUT, types, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


@pytest.fixture(scope="module")
def undisturbed(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Also compiles the kernels, which children of a fork then have."""
    folder = tmp_path_factory.mktemp("undisturbed")
    quantized(odd, folder)
    return contents(folder)


@pytest.fixture
def killed(odd: Path, undisturbed, tmp_path, monkeypatch) -> Path:
    """A folder with what a run leaves that was killed after most of its slabs, each of them committed."""
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    progress = Kill("writing", 18)
    assert child(lambda: quantized(odd, tmp_path, progress=progress)) == -signal.SIGKILL
    assert sorted(os.listdir("out")) == ["Q4_K_M.gguf.part", "Q8_0.gguf.journal", "Q8_0.gguf.part"]
    return tmp_path


def test_the_rest_of_a_killed_run_gives_the_same_bytes(killed, odd, undisturbed):
    result = quantized(odd, killed)
    assert contents(killed) == undisturbed
    assert 17 <= result.slabs_kept < result.slabs
    assert all(tensor.rows_checked for output in result.outputs for tensor in output.tensors)


def test_without_a_journal_nothing_is_kept(killed, odd, undisturbed):
    (killed / "out/Q8_0.gguf.journal").unlink()
    assert quantized(odd, killed).slabs_kept == 0
    assert contents(killed) == undisturbed


def test_a_journal_with_a_torn_end_is_used(killed, odd, undisturbed):
    journal = killed / "out/Q8_0.gguf.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert quantized(odd, killed).slabs_kept >= 16
    assert contents(killed) == undisturbed


def test_damaged_slabs_are_done_again(killed, odd, undisturbed):
    plan = plan_gguf(odd, killed / OUT, Recipe(types=TYPES))
    recorded = len(journal_of(plan).done)
    slab = list(plan.slabs())[min(journal_of(plan).done)]
    with open(killed / "out/Q4_K_M.gguf.part", "r+b") as file:
        file.seek(plan.outputs[1].placements[slab.step].offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert quantized(odd, killed).slabs_kept == recorded - 1
    assert contents(killed) == undisturbed


def test_a_lost_part_is_written_again(killed, odd, undisturbed):
    (killed / "out/Q4_K_M.gguf.part").unlink()
    assert quantized(odd, killed).slabs_kept == 0
    assert contents(killed) == undisturbed


def journal_of(plan) -> Journal:
    first = plan.files[0].path
    with Journal(first.with_name(first.name + ".journal"), plan.fingerprint()) as journal:
        return journal


def test_a_changed_source_starts_afresh(killed, odd, tmp_path):
    other = shutil.copytree(odd, tmp_path / "other" / "model")
    weights = load_bf16(other)
    os.utime(other / "model.safetensors", ns=(1, 1))
    assert quantized(other, killed).slabs_kept == 0
    assert weights


def load_bf16(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_nothing_of_another_job_shows_between_the_tensors(odd, undisturbed, tmp_path):
    (tmp_path / "out").mkdir()
    for name, data in undisturbed.items():
        (tmp_path / "out" / (name + ".part")).write_bytes(b"\xff" * (len(data) + 1000))
    (tmp_path / "out/Q8_0.gguf.journal").write_text('{"job":"another"}\n{"done":{"0":[1,2]}}')
    assert quantized(odd, tmp_path).slabs_kept == 0
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_among_the_renames(renamed, odd, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def job() -> None:
        real, left = os.replace, [renamed]

        def replace(source, target):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            real(source, target)

        os.replace = replace
        Path.unlink = lambda self, missing_ok=False: os.kill(os.getpid(), signal.SIGKILL)  # the journal's
        quantized(odd, tmp_path)

    assert child(job) == -signal.SIGKILL
    parts = [name for name in contents(tmp_path) if name.endswith(".part")]
    assert len(parts) == 2 - renamed
    stamps = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "out").glob("*.gguf*")
        if path.suffix != ".journal"
    }
    result = quantized(odd, tmp_path)
    assert contents(tmp_path) == undisturbed
    assert result.slabs_kept == result.slabs
    assert all(tensor.rows_checked for output in result.outputs for tensor in output.tensors)
    found = {path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert found == set(stamps.values()), "files that were checked already are not written again"


def test_a_finished_file_that_was_deleted_is_made_again(odd, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def job() -> None:
        Path.unlink = lambda self, missing_ok=False: os.kill(os.getpid(), signal.SIGKILL)
        quantized(odd, tmp_path)

    assert child(job) == -signal.SIGKILL
    (tmp_path / "out/Q4_K_M.gguf").unlink()
    quantized(odd, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_killed_while_it_checks(odd, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert child(lambda: quantized(odd, tmp_path, progress=Kill("checking", 3))) == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("*.gguf"))
    result = quantized(odd, tmp_path)
    assert result.slabs_kept == result.slabs
    assert contents(tmp_path) == undisturbed


def test_ctrl_c_leaves_what_is_finished(odd, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert child(lambda: quantized(odd, tmp_path, progress=Kill("writing", 10, signal.SIGINT))) == 130
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert quantized(odd, tmp_path).slabs_kept >= 10
    assert contents(tmp_path) == undisturbed


DRIVER = """
import sys
from llmcompress import cli, run
run.COMMIT_SECONDS = 0.05
sys.argv[1:] = {arguments!r}
cli.main()
"""


def start(big: Path, folder: Path) -> subprocess.Popen:
    arguments = ["quantize", str(big), "-o", str(folder / OUT), "--json"] + [
        w for t in TYPES for w in ("--type", t)
    ]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(arguments=arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.slow
def test_five_kills_at_random_moments_end_in_the_same_bytes(big, undisturbed, tmp_path):
    began = time.monotonic()
    whole = start(big, tmp_path / "whole")
    whole.communicate(timeout=120)  # the report is longer than a pipe holds
    assert whole.returncode == 0
    took = time.monotonic() - began
    kills, moments = 0, random.Random(5)
    for _ in range(40):
        process = start(big, tmp_path / "killed")
        time.sleep(moments.uniform(0.2, 0.9) * took)
        process.kill()
        process.communicate()
        left = list((tmp_path / "killed/out").glob("*"))
        if left and not [path for path in left if path.suffix in (".part", ".journal")]:
            for path in left:  # too late: it had finished
                path.unlink()
            continue
        kills += 1
        if kills == 5:
            break
    assert kills == 5
    last = start(big, tmp_path / "killed")
    _, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(big, undisturbed, tmp_path):
    process = start(big, tmp_path)
    wait_for(tmp_path / "out/Q8_0.gguf.journal", process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().splitlines()[-1] == "stopped: the same command goes on from here"
    assert "Traceback" not in error.decode()
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_two_runs_of_one_output_at_once(odd, undisturbed, tmp_path):
    class Second(Progress):
        """Starts the same command, and one that shares an output, in the middle of the first."""

        said: list[str] = []

        def advance(self, count: int) -> None:
            for types in (TYPES, TYPES[1:]) if not self.said else ():
                with pytest.raises(InterruptedRun) as refused:
                    quantized(odd, tmp_path, types)
                self.said.append(str(refused.value))

    quantized(odd, tmp_path, progress=Second())
    assert contents(tmp_path) == undisturbed
    assert [said.split(": ")[1] for said in Second.said] == [
        "another process is writing it; wait for that one or stop it"
    ] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_not_finite_is_named_and_nothing_is_left(value, dtype, tmp_path):
    model = write_checkpoint(tmp_path / "model", Llama(layers=1), dtype)
    poke(model, "model.layers.0.mlp.down_proj.weight", 7 * 512 + 33, value)
    with pytest.raises(
        RunError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight'.*row 7, column 33"
    ) as error:
        quantized(model, tmp_path, "BF16")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "out") == []


def test_the_place_of_a_nan_is_that_in_the_source_whatever_happens_to_the_rows(tmp_path):
    model = write_checkpoint(tmp_path / "model", Llama(layers=1), "F32")
    poke(
        model, "model.layers.0.self_attn.q_proj.weight", 130 * 256 + 5, float("nan")
    )  # inside a rotated head
    with pytest.raises(RunError, match="row 130, column 5"):
        quantized(model, tmp_path, "F32")


def test_the_place_of_a_nan_in_a_transposed_tensor(gpt2, tmp_path):
    tensors = load_file(gpt2 / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
    tensors[name][3, 200] = float("nan")
    save_file(tensors, gpt2 / "model.safetensors")
    with pytest.raises(RunError, match="row 3, column 200"):
        quantized(gpt2, tmp_path, "F32")


@pytest.fixture
def gpt2(root: Path, tmp_path: Path) -> Path:
    from tiny_models import BYTE_BPE, build

    return build("gpt2", tmp_path / "gpt2", {BYTE_BPE: root / "examples/sample-llama-6m"})


def test_what_f16_cannot_hold_is_named_with_its_size(tmp_path):
    model = write_checkpoint(tmp_path / "model", Llama(layers=1), "F32")
    poke(model, "model.layers.0.mlp.up_proj.weight", 3, -70000.0)
    with pytest.raises(
        RunError,
        match=r"^blk\.0\.ffn_up\.weight: 1 weights, up to 70000, are beyond the largest F16, 65504; use BF16",
    ):
        quantized(model, tmp_path, "F16")
    assert os.listdir(tmp_path / "out") == []
    assert quantized(model, tmp_path, "BF16").paths[0].exists()


def test_a_source_cut_short_in_the_middle_is_an_error_of_one_line(big, undisturbed, tmp_path):
    model = shutil.copytree(big, tmp_path / "model")

    class Cut(Progress):
        def advance(self, count: int) -> None:
            os.truncate(model / "model.safetensors", 2**20)

    with pytest.raises(llmcompress.errors.CheckpointError, match="bytes missing"):
        quantized(model, tmp_path, progress=Cut())
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_too_little_disk_is_found_before_the_start(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("llmcompress.plan.free_disk", lambda folder: 100_000)
    with pytest.raises(PlanError, match=r"MiB are needed and 97\.7 KiB are free; make room"):
        quantized(odd, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_disk_is_measured_really(tmp_path):
    assert machine.free_disk(tmp_path) == os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_disk_that_takes_no_more(when, odd, undisturbed, tmp_path, monkeypatch):
    """The kernel's limit on the size of a file stands in for a full disk: writes fail, with another number."""
    monkeypatch.chdir(tmp_path)

    class Full(Progress):
        def start(self, phase: str, total: int, unit: str = "bytes") -> None:
            limit()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    def job() -> None:
        if when == "at once":
            limit()
        quantized(odd, tmp_path, progress=Full())

    assert child(job) == 70
    said = (tmp_path / "child-error").read_text()
    assert (
        said.startswith("InterruptedRun: ")
        and "File too large; make room and give the same command again" in said
    )
    assert "\n" not in said
    assert not list((tmp_path / "out").glob("*.gguf"))
    quantized(odd, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_folder_without_write_permission(odd, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(InterruptedRun, match=r"out.*: cannot be written: .*; see to that and give"):
        quantized(odd, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("slab_weights", [1, 5_000, 40_000, 2**30])
def test_slabs_and_threads_change_no_byte(threads, slab_weights, odd, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("llmcompress.plan.SLAB_WEIGHTS", slab_weights)
    monkeypatch.setattr("llmcompress.plan.BYTES_PER_SLAB_WEIGHT", 0)
    quantized(odd, tmp_path, threads=threads)
    assert {n: d for n, d in contents(tmp_path).items()} == undisturbed


def test_several_types_from_one_read_are_what_each_alone_is(odd, tmp_path):
    types = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q2_K")
    quantized(odd, tmp_path / "together", types)
    for name in types:
        quantized(odd, tmp_path / "alone", (name,))
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_the_parts_have_their_own_names_until_the_end(odd, tmp_path):
    seen: list[set[str]] = []

    class Look(Progress):
        def advance(self, count: int) -> None:
            seen.append(set(os.listdir(tmp_path / "out")))

    quantized(odd, tmp_path, progress=Look())
    assert set.union(*seen) == {"Q4_K_M.gguf.part", "Q8_0.gguf.part", "Q8_0.gguf.journal"}
    assert part_path(Path("a/b.gguf")) == Path("a/b.gguf.part")


def test_effort_decides_bytes_and_stands_in_the_file(odd, tmp_path):
    result = quantized(odd, tmp_path, ["Q4_0"], effort="best")
    usual = quantized(odd, tmp_path / "usual", ["Q4_0"])
    best, normal = (done.paths[0].read_bytes() for done in (result, usual))
    assert best != normal and b'"effort": "best"' in best and b"effort" not in normal
