"""The program as people and machines meet it: exit codes, one-line errors, output, progress."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAMPLE = "examples/sample-llama-6m"


def llmcompress(*arguments: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llmcompress", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(root / "examples")
    return tmp_path


BAD = {
    "no such directory": (["quantize", "examples/sample-llama-6n"], "sample-llama-6m"),
    "no such type": (["quantize", SAMPLE, "--type", "Q4_K_X"], "'Q4_K_X'; did you mean"),
    "no pair": (
        ["quantize", SAMPLE, "--tensor-type", "attn_v"],
        "--tensor-type attn_v: write it as PATTERN=TYPE",
    ),
    "no size": (["quantize", SAMPLE, "--max-ram", "lots"], "--max-ram: 'lots' is not a size"),
    "little memory": (["quantize", SAMPLE, "--max-ram", "1k"], "is too little"),
    "two types, one name": (
        ["quantize", SAMPLE, "-o", "x.gguf", "-t", "Q8_0,F16"],
        "put {type} into the name",
    ),
    "no float type": (["convert", SAMPLE, "--type", "Q4_K_M"], "convert writes auto, F32, F16, BF16, Q8_0"),
    "no importance file": (["quantize", SAMPLE, "--imatrix", "nowhere.dat"], "nowhere.dat"),
    "no recipe": (["quantize", SAMPLE, "--recipe", "nowhere.yaml"], "nowhere.yaml"),
    "no output folder": (["quantize", SAMPLE, "-o", "/dev/null/x.gguf"], "/dev/null"),
    "no file to inspect": (["inspect", "nowhere.gguf"], "nowhere.gguf"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, place: Path) -> None:
    done = llmcompress(*arguments, cwd=place)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["examples"]


@pytest.mark.parametrize("arguments", [["quantise"], ["quantize"], ["quantize", SAMPLE, "--typ", "Q8_0"]])
def test_usage_errors_are_exit_code_2(arguments: list[str], place: Path) -> None:
    assert llmcompress(*arguments, cwd=place).returncode == 2


def test_json_tells_what_was_done_to_every_tensor(place: Path) -> None:
    done = llmcompress("quantize", SAMPLE, "-o", "x.gguf", "-t", "Q4_K_M", "--json", cwd=place)
    assert done.returncode == 0
    (output,) = json.loads(done.stdout)["outputs"]
    assert output["paths"] == ["x.gguf"] and output["nbytes"] == (place / "x.gguf").stat().st_size
    assert sum(output["type_counts"].values()) == len(output["tensors"]) == 56
    for tensor in output["tensors"]:
        assert {"name", "shape", "source", "type", "operation", "reason", "relative_error"} <= set(tensor)


def test_the_plan_names_every_tensor_its_type_and_why(place: Path) -> None:
    as_json = json.loads(llmcompress("plan", SAMPLE, "-t", "Q4_K_M", "--json", cwd=place).stdout)
    done = llmcompress("plan", SAMPLE, "-t", "Q4_K_M", cwd=place)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    for tensor in as_json["outputs"][0]["tensors"]:
        line = lines[tensor["name"]]
        assert f" {tensor['type']} " in line and line.rstrip().endswith(tensor["reason"])
    assert "memory:" in done.stdout and "disk:" in done.stdout
    assert [path.name for path in place.iterdir()] == ["examples"]
    dry = llmcompress("quantize", SAMPLE, "-t", "Q4_K_M", "--dry-run", cwd=place).stdout
    tables = (
        [line for line in out.splitlines() if not line.startswith("disk:")] for out in (dry, done.stdout)
    )
    assert next(tables) == next(tables)  # what is free on the disk may change any time


def test_a_recipe_file_is_the_same_as_flags_and_flags_win(place: Path) -> None:
    (place / "r.yaml").write_text("types: [Q8_0]\ntensor_types: {attn_v: Q6_K}\n")
    by_file = llmcompress("quantize", SAMPLE, "-o", "a.gguf", "--recipe", "r.yaml", "--json", cwd=place)
    by_flags = llmcompress(
        "quantize", SAMPLE, "-o", "b.gguf", "-t", "q8_0", "--tensor-type", "attn_v=q6_k", "--json", cwd=place
    )
    assert by_file.returncode == by_flags.returncode == 0
    types = [
        [tensor["type"] for tensor in json.loads(done.stdout)["outputs"][0]["tensors"]]
        for done in (by_file, by_flags)
    ]
    assert types[0] == types[1] and {"Q6_K", "Q8_0", "F32"} == set(types[0])
    both = llmcompress("plan", SAMPLE, "--recipe", "r.yaml", "-t", "F16", "--json", cwd=place)
    assert json.loads(both.stdout)["outputs"][0]["type"] == "F16"


def test_a_log_gets_plain_lines(place: Path) -> None:
    done = llmcompress("quantize", SAMPLE, "-o", "x.gguf", cwd=place)
    lines = done.stderr.splitlines()
    assert any(line.startswith("writing: ") and "/s" in line for line in lines) and "\x1b" not in done.stderr
    assert "x.gguf" in done.stdout and "bits per weight" in done.stdout and "\x1b" not in done.stdout


def test_a_terminal_gets_a_bar(place: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmcompress", "quantize", SAMPLE, "-o", "x.gguf", "-t", "Q2_K"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # how a terminal says that its last writer has gone
        pass
    assert process.wait(60) == 0
    text = seen.decode()
    assert "\x1b[" in text and "writing" in text and " MiB" in text and "MiB/s" in text
    process.stdout.close()
    os.close(ours)


def test_output_cut_off_by_its_reader_is_no_error(place: Path) -> None:
    command = f"{sys.executable} -m llmcompress plan {SAMPLE} --json | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=place, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout == '{\n "name": '[:10]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_standard_output_is_one_line(place: Path, more: list[str]) -> None:
    command = [sys.executable, "-m", "llmcompress", "plan", SAMPLE, *more]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_inspect_shows_files_and_directories(place: Path) -> None:
    assert llmcompress("quantize", SAMPLE, "-o", "x.gguf", "-t", "Q8_0", cwd=place).returncode == 0
    shown = llmcompress("inspect", "x.gguf", cwd=place).stdout
    assert (
        "general.architecture" in shown
        and "blk.0.attn_q.weight" in shown
        and "8.5136 bits per weight" in shown
    )
    short = llmcompress("inspect", "x.gguf", "--no-tensors", cwd=place).stdout
    assert "blk.0.attn_q.weight" not in short and "Q8_0" in short
    assert "16.0000 bits per weight" in llmcompress("inspect", SAMPLE, cwd=place).stdout
    data = json.loads(llmcompress("inspect", f"{SAMPLE}/model.safetensors", "--json", cwd=place).stdout)
    assert data["kind"] == "safetensors" and data["parameters"] == 5770496


def test_version_and_help(place: Path) -> None:
    assert llmcompress("--version", cwd=place).stdout.startswith("llmcompress ")
    overview = llmcompress("--help", cwd=place).stdout
    assert all(word in overview for word in ("quantize", "convert", "plan", "inspect"))
    flags = llmcompress("quantize", "--help", cwd=place).stdout
    for flag in (
        "--type",
        "--tensor-type",
        "--imatrix",
        "--max-ram",
        "--split-max-size",
        "--verify",
        "--pre",
        "--json",
    ):
        assert flag in flags
