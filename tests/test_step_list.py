"""Lists of steps: what is refused before anything runs, what the words of commands become, and a run that goes on."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from llmcompress import run_command
from llmcompress.cli import app


def listed(tmp_path: Path, text: str) -> Path:
    (tmp_path / "steps.yaml").write_text(text)
    return tmp_path / "steps.yaml"


def run(path: Path, *words: str):
    return CliRunner().invoke(app, ["run", str(path), *words])


STEPS = """
folder: {folder}
steps:
  - prune: {{model: {model}, method: layers, layers: [1, 2]}}
    name: shallow
  - quantize: {{type: Q8_0, tensor-type: [attn_v=Q6_K, ffn_down=Q6_K], pure: true}}
  - quantize: {{model: "${{shallow}}", type: F16, verify: full, output: {folder}/half.gguf}}
  - evaluate: {{artefact: "${{previous}}", reference: "{model}"}}
"""


@pytest.fixture
def steps(tmp_path: Path, root: Path) -> Path:
    return listed(
        tmp_path, STEPS.format(folder=tmp_path / "out", model=root / "examples" / "sample-llama-6m")
    )


def test_steps_become_commands_that_feed_each_other(steps: Path, tmp_path: Path, root: Path) -> None:
    out, model = tmp_path / "out", root / "examples" / "sample-llama-6m"
    found = run(steps, "--dry-run")
    assert found.exit_code == 0, found.output
    assert [" ".join(line.split()) for line in found.output.splitlines()] == [
        f"shallow: llmcompress prune {model} --method layers --layers 1,2 --output {out}/shallow --json",
        f"quantize: llmcompress quantize {out}/shallow --type Q8_0 --tensor-type attn_v=Q6_K --tensor-type "
        f"ffn_down=Q6_K --pure --output {out}/quantize.gguf --json",
        f"quantize-2: llmcompress quantize {out}/shallow --type F16 --verify full --output {out}/half.gguf --json",
        f"evaluate: llmcompress evaluate {out}/half.gguf --reference {model} --json",
    ]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "has no list of steps"),
        ("- prune", "has no list of steps"),
        ("steps: [", "cannot be read as YAML"),
        ("step: 1\nsteps: [quantize: {}]", "'step' is none of folder, steps; did you mean 'steps'"),
        ("steps: [prun: {}]", "step 1: has to be one of prune, .*; did you mean 'prune'"),
        ("steps: [{prune: {}, quantize: {}}]", "step 1: has to be one of"),
        (
            "steps: [quantize: {model: m, tipe: Q8_0}]",
            "step 1: quantize has no option 'tipe'; did you mean 'type'",
        ),
        (
            "steps: [quantize: {model: m, threads: many}]",
            r"step quantize \(quantize\): Invalid value for '--threads'",
        ),
        ("steps: [evaluate: {}]", r"step evaluate \(evaluate\): Missing argument"),
        ("steps: [quantize: {model: m, pure: 3}]", "pure is 3, it must be true or false"),
        ("steps: [quantize: {model: '${prune}'}]", r"\$\{prune\} is nothing that a step before it made"),
        ("steps: [{quantize: {model: m}, name: a/b}]", "its name 'a/b' is taken, or not of letters"),
        (
            "steps: [{quantize: {model: m}, name: a}, {quantize: {}, name: a}]",
            "step 2: its name 'a' is taken",
        ),
        ("steps: [quantize: [1]]", "the options of quantize are"),
        ("steps: [quantize: {model: {a: 1}}]", "is no text or number"),
        ("folder: 3\nsteps: [quantize: {model: m}]", "folder is 3"),
    ],
)
def test_a_list_is_checked_whole(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # nothing begins
    found = run(listed(tmp_path, text))
    assert found.exit_code == 2
    assert re.search(message, found.output), found.output


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were run, each of which makes an empty folder."""
    names: list[str] = []

    def make(words, **_):
        output = Path(words[words.index("--output") + 1]) if "--output" in words else None
        names.append(words[3] + (f" {output.name}" if output else ""))
        if "fails.gguf" in names[-1]:
            return SimpleNamespace(returncode=2, stdout=b"")
        if output:
            output.mkdir(parents=True)
        return SimpleNamespace(
            returncode=0, stdout=json.dumps({"figures": {"mean_kl": {"value": 0.5}}}).encode()
        )

    monkeypatch.setattr(run_command.subprocess, "run", make)
    return names


ALL = ["prune shallow", "quantize quantize.gguf", "quantize half.gguf", "evaluate"]


def test_what_is_finished_is_not_done_again(steps: Path, ran: list[str], tmp_path: Path) -> None:
    first = run(steps)
    assert first.exit_code == 0, first.output
    assert ran == ALL and "mean_kl 0.5000" in first.output
    assert run(steps, "--json").exit_code == 0 and ran == ALL
    changed = steps.read_text().replace("verify: full", "verify: sample")
    steps.write_text(changed)
    refused = run(steps)
    assert refused.exit_code == 2 and "half.gguf is there already, not by these steps" in refused.output
    (tmp_path / "out" / "half.gguf").rmdir()
    assert run(steps).exit_code == 0 and ran == [*ALL, "quantize half.gguf", "evaluate"]  # which builds on it


def test_a_step_that_fails_stops_the_run_and_the_rest_goes_on_from_there(steps: Path, ran: list[str]) -> None:
    steps.write_text(steps.read_text().replace("half.gguf", "fails.gguf"))
    found = run(steps)
    assert found.exit_code == 2 and "step quantize-2 (quantize) ended with exit code 2" in found.output
    assert run(steps).exit_code == 2
    assert ran == [*ALL[:2], "quantize fails.gguf", "quantize fails.gguf"]


def test_a_step_that_was_whole_before_it_was_noted_is_not_done_again(
    steps: Path, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = run_command.subprocess.run

    def killed_behind(words, **options):
        make(words, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_command.subprocess, "run", killed_behind)
        assert run(steps).exit_code == 130
    assert run(steps).exit_code == 0 and ran == ALL


@pytest.mark.slow
def test_a_real_list_makes_a_smaller_gguf(tmp_path: Path, root: Path) -> None:
    model = root / "examples" / "sample-llama-6m"
    text = f"steps:\n  - prune: {{model: {model}, method: layers, layers: 1}}\n  - quantize: {{type: Q8_0}}\n"
    found = run(listed(tmp_path, text), "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.output)["steps"]
    assert report["prune"]["report"]["layers_dropped"] == [1]
    assert (tmp_path / "steps" / "quantize.gguf").stat().st_size < 0.6 * (
        model / "model.safetensors"
    ).stat().st_size
