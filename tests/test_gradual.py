"""Pruning in steps: what is allowed goes on, what is not goes back, and a killed job comes to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompress.converters import gradual
from llmcompress.converters.gradual import GradualReport, healing_options, prune_gradually
from safetensors.torch import load_file
from test_finetuning import Killed, examples

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError, RunError
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions

QUICK = {"steps": 6, "evaluations": 2, "batch": 8, "validation": "0.2", "dtype": "f32", "learning_rate": 0.001}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return examples(tmp_path_factory.mktemp("data") / "train.jsonl")


def descend(
    model: Path, out: Path, data: str, shares: tuple[float, ...], progress: Progress | None = None, **given: object
) -> GradualReport:
    with Checkpoint.open(model) as checkpoint:
        healing = healing_options(checkpoint, **QUICK)
    steps = [PruningOptions(method="magnitude", sparsity=share) for share in shares]
    return prune_gradually(model, out, steps, [data], healing, progress=progress or Progress(), **given)


def zeros(folder: Path) -> float:
    """The share of zeros in the blocks' matrices."""
    found = [t for name, t in load_file(folder / "model.safetensors").items() if t.ndim > 1 and ".layers." in name]
    return sum(int((t == 0).sum()) for t in found) / sum(t.numel() for t in found)


def test_every_step_is_pruned_healed_and_measured(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    report = descend(tiny("llama"), tmp_path / "out", data, (0.3, 0.5))
    names = [state.folder for state in report.states]
    assert names == ["1-pruned", "1-healed-1", "2-pruned", "2-healed-1"]
    by_name = {state.folder: state for state in report.states}
    for number in (1, 2):
        assert by_name[f"{number}-healed-1"].loss < by_name[f"{number}-pruned"].loss
    assert report.kept == by_name["2-healed-1"] and zeros(tmp_path / "out") == pytest.approx(0.5, abs=1e-3)
    told = json.loads((tmp_path / "out" / "gradual.json").read_text())
    assert told == json.loads(json.dumps(report.as_dict()))
    assert not (tmp_path / "out.part").exists()
    for beside in ("prune.json", "finetune.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / beside).exists()


def test_a_step_that_loses_too_much_is_given_up(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    """Its rounds of healing used up, the last good state is the result; where there is none, an error says so."""
    first = descend(tiny("llama"), tmp_path / "first", data, (0.1,)).kept.loss
    report = descend(
        tiny("llama"), tmp_path / "out", data, (0.1, 0.95, 0.97), max_loss=max(2 * first, first + 0.01), patience=2
    )
    names = [state.folder for state in report.states]
    assert names[:2] == ["1-pruned", "1-healed-1"][: len(names)] and names[-1] == "2-healed-2"
    assert report.kept.sparsity == 0.1 and zeros(tmp_path / "out") == pytest.approx(0.1, abs=1e-3)
    assert any("sparsity 0.95 was given up" in note for note in report.notes)
    with pytest.raises(RunError, match="sparsity 0.95 loses .* after 1 rounds .*--max-loss is 1e-05"):
        descend(tiny("llama"), tmp_path / "none", data, (0.95,), max_loss=1e-5)
    assert not (tmp_path / "none").exists()


def test_a_descent_that_was_stopped_goes_on_to_the_same_weights(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = descend(tiny("llama"), tmp_path / "whole", data, (0.3, 0.5))
    made, finetune, prune = [], gradual.finetune_model, gradual.prune_model

    def stops(source, out, sources, options, progress):
        made.append(out.name)
        return finetune(source, out, sources, options, Killed(4) if out.name == "2-healed-1" else progress)

    monkeypatch.setattr(gradual, "finetune_model", stops)
    with pytest.raises(KeyboardInterrupt):
        descend(tiny("llama"), tmp_path / "again", data, (0.3, 0.5))
    assert not (tmp_path / "again").exists()
    with pytest.raises(LlmcompressError, match="unfinished run with other steps"):
        descend(tiny("llama"), tmp_path / "again", data, (0.3, 0.6))
    monkeypatch.setattr(gradual, "finetune_model", lambda source, out, *rest: made.append(out.name) or finetune(source, out, *rest))
    monkeypatch.setattr(gradual, "prune_model", lambda source, out, *rest: made.append(out.name) or prune(source, out, *rest))
    report = descend(tiny("llama"), tmp_path / "again", data, (0.3, 0.5))
    assert made == ["1-healed-1", "2-healed-1", "2-healed-1"]  # nothing that was done is done again
    assert any("went on behind 2-pruned" in note for note in report.notes)
    assert [state.loss for state in report.states] == [state.loss for state in whole.states]
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_what_makes_no_sense_is_one_line(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    for shares, given, message in (
        ((0.5, 0.3), {}, "--schedule 0.5,0.3: give rising sparsities"),
        ((0.5,), {"max_loss": 0.0}, "--max-loss 0.0"),
        ((0.5,), {"patience": 0}, "--patience 0"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            descend(tiny("llama"), tmp_path / "out", data, shares, **given)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("a user's")
    with pytest.raises(LlmcompressError, match="is there already"):
        descend(tiny("llama"), tmp_path / "out", data, (0.5,))


def test_the_command_says_what_it_did(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    command = [sys.executable, "-m", "llmcompress", "prune", tiny("llama"), "--method", "magnitude", "-o", tmp_path / "out"]
    flags = ["--heal", data, "--schedule", "0.3,0.5", "--heal-steps", "4", "--max-loss", "9", "--heal-lr", "0.001"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "2-healed-1 *" in done.stdout and "sparsity 0.5, the state with the star, 9 nats allowed" in done.stdout
    for wrong, message in (
        (["--schedule", "0.1,0.2"], "--schedule: is for healing; give --heal"),
        (["--max-loss", "1"], "--max-loss: is for healing; give --heal"),
        (["--heal", data, "--schedule", "0.1,0.2", "--sparsity", "0.5"], "--schedule: has the sparsities"),
        (["--heal", data, "--schedule", "0.1;0.2"], "--schedule 0.1;0.2: write it as"),
    ):
        done = subprocess.run([*command, *wrong], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2 and message in done.stderr, done.stderr
