"""Pruning in steps: what is allowed goes on, what is not goes back, and a killed job comes to the same end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress.converters import gradual
from llmcompress.converters.gradual import GradualReport, healing_options, prune_gradually
from safetensors.torch import load_file
from test_finetuning import Killed, examples, run
from typer.testing import CliRunner

from llmcompress.checkpoint import Checkpoint
from llmcompress.cli import app
from llmcompress.errors import LlmcompressError, RunError
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions

QUICK = {
    "steps": 6,
    "evaluations": 2,
    "batch": 8,
    "validation": "0.2",
    "dtype": "f32",
    "learning_rate": 0.0005,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return examples(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows the examples, and so has something to lose."""
    out = tmp_path_factory.mktemp("model") / "model"
    run(tiny("llama"), out, data, method="full", loss="all", learning_rate=0.002)
    return out


def descend(
    model: Path,
    out: Path,
    data: str,
    shares: tuple[float, ...],
    progress: Progress | None = None,
    **given: object,
) -> GradualReport:
    with Checkpoint.open(model) as checkpoint:
        healing = healing_options(checkpoint, **QUICK)
    steps = [PruningOptions(method="magnitude", sparsity=share) for share in shares]
    return prune_gradually(model, out, steps, [data], healing, progress=progress or Progress(), **given)


def zeros(folder: Path) -> float:
    """The share of zeros in the blocks' matrices."""
    found = [
        t for name, t in load_file(folder / "model.safetensors").items() if t.ndim > 1 and ".layers." in name
    ]
    return sum(int((t == 0).sum()) for t in found) / sum(t.numel() for t in found)


def test_every_step_is_pruned_healed_and_measured(model: Path, tmp_path: Path, data: str) -> None:
    report = descend(model, tmp_path / "out", data, (0.5, 0.7))
    names = [state.folder for state in report.states]
    assert names == ["1-pruned", "1-healed-1", "2-pruned", "2-healed-1"]
    by_name = {state.folder: state for state in report.states}
    for number in (1, 2):
        assert by_name[f"{number}-healed-1"].loss < by_name[f"{number}-pruned"].loss
    assert report.kept == by_name["2-healed-1"] and zeros(tmp_path / "out") == pytest.approx(0.7, abs=1e-3)
    told = json.loads((tmp_path / "out" / "gradual.json").read_text())
    assert told == json.loads(json.dumps(report.as_dict()))
    assert not (tmp_path / "out.part").exists()
    for beside in ("prune.json", "finetune.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / beside).exists()


def test_a_step_that_loses_too_much_is_given_up(model: Path, tmp_path: Path, data: str) -> None:
    """Its rounds of healing used up, the last good state is the result; where there is none, an error says so."""
    report = descend(model, tmp_path / "out", data, (0.1, 0.95, 0.97), max_loss=0.3, patience=2)
    names = [state.folder for state in report.states]
    assert names[:2] == ["1-pruned", "1-healed-1"][: len(names)] and names[-1] == "2-healed-2"
    assert report.kept.sparsity == 0.1 and zeros(tmp_path / "out") == pytest.approx(0.1, abs=1e-3)
    assert any("sparsity 0.95 was given up" in note for note in report.notes)
    with pytest.raises(RunError, match="sparsity 0.95 loses .* after 1 rounds .*--max-loss is 1e-05"):
        descend(model, tmp_path / "none", data, (0.95,), max_loss=1e-5)
    assert not (tmp_path / "none").exists()


def test_a_descent_that_was_stopped_goes_on_to_the_same_weights(
    model: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = descend(model, tmp_path / "whole", data, (0.5, 0.7))
    made, finetune, prune = [], gradual.finetune_model, gradual.prune_model

    def stops(source, out, sources, options, progress):
        made.append(out.name)
        return finetune(source, out, sources, options, Killed(4) if out.name == "2-healed-1" else progress)

    monkeypatch.setattr(gradual, "finetune_model", stops)
    with pytest.raises(KeyboardInterrupt):
        descend(model, tmp_path / "again", data, (0.5, 0.7))
    assert not (tmp_path / "again").exists()
    with pytest.raises(LlmcompressError, match="unfinished run with other steps"):
        descend(model, tmp_path / "again", data, (0.5, 0.8))
    monkeypatch.setattr(
        gradual,
        "finetune_model",
        lambda source, out, *rest: made.append(out.name) or finetune(source, out, *rest),
    )
    monkeypatch.setattr(
        gradual, "prune_model", lambda source, out, *rest: made.append(out.name) or prune(source, out, *rest)
    )
    report = descend(model, tmp_path / "again", data, (0.5, 0.7))
    assert made == ["1-healed-1", "2-healed-1", "2-healed-1"]  # nothing that was done is done again
    assert any("went on behind 2-pruned" in note for note in report.notes)
    assert [state.loss for state in report.states] == [state.loss for state in whole.states]
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_what_makes_no_sense_is_one_line(model: Path, tmp_path: Path, data: str) -> None:
    for shares, given, message in (
        ((0.5, 0.3), {}, "--schedule 0.5,0.3: give rising sparsities"),
        ((0.5,), {"max_loss": 0.0}, "--max-loss 0.0"),
        ((0.5,), {"patience": 0}, "--patience 0"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            descend(model, tmp_path / "out", data, shares, **given)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("a user's")
    with pytest.raises(LlmcompressError, match="is there already"):
        descend(model, tmp_path / "out", data, (0.5,))


def test_the_command_says_what_it_did(model: Path, tmp_path: Path, data: str) -> None:
    def prune(*flags: str) -> Any:
        given = ["prune", str(model), "--method", "magnitude", "-o", str(tmp_path / "out"), *flags]
        return CliRunner().invoke(app, given, env={"COLUMNS": "150"})

    for wrong, message in (
        (["--schedule", "0.1,0.2"], "--schedule: is for healing; give --heal"),
        (["--max-loss", "1"], "--max-loss: is for healing; give --heal"),
        (["--heal", data, "--schedule", "0.1,0.2", "--sparsity", "0.5"], "--schedule: has the sparsities"),
        (["--heal", data, "--schedule", "0.1;0.2"], "--schedule 0.1;0.2: write it as"),
    ):
        done = prune(*wrong)
        assert done.exit_code == 2 and message in done.output
    flags = [
        "--schedule",
        "0.5,0.7",
        "--heal-steps",
        "4",
        "--max-loss",
        "9",
        "--heal-lr",
        "0.0005",
        "--device",
        "cpu",
    ]
    done = prune("--heal", data, *flags, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "gradual.json").read_text())
    assert told["kept"]["folder"] == "2-healed-1" and told["max_loss"] == 9 and len(told["states"]) == 4
    assert json.loads(done.stdout) == told
