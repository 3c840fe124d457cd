"""`llmcompress evaluate` as people and machines meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import llmcompress
from llmcompress.cli import app
from llmcompress.divergence import Estimate
from llmcompress.model_display import FIGURES


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


@pytest.fixture(scope="module")
def quantized(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q4.gguf"
    return llmcompress.quantize(sample, out, type="Q4_0", verify="off").paths[0]


@pytest.fixture(scope="module")
def short(root: Path) -> list[str]:
    """Options that keep it short."""
    return ["--data", str(root / "tests" / "data" / "richard-iii.txt"), "--tokens", "1k", "--chunk", "128"]


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def output(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def not_a_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


@pytest.fixture(scope="module")
def report(quantized: Path, sample: Path, short: list[str]) -> dict:
    found = output(evaluate(quantized, "--reference", sample, "--json", *short))
    return json.loads(found, parse_constant=not_a_number)


def test_json_holds_every_figure_with_its_error(report, quantized, sample, short) -> None:
    assert (report["artefact"], report["reference"]) == (str(quantized), str(sample))
    assert (report["windows"], report["chunk"], report["tokens"]) == ("transformers", 128, 1024)
    assert (report["dtype"], report["data"], report["tasks"]) == ("f32", [short[1]], {})
    figures = dict(report["figures"])
    assert figures.keys() == {"tokens"} | {key for key, *_ in FIGURES}
    assert figures.pop("tokens") == {"value": 8 * 127, "error": None}
    assert figures.pop("max_kl")["error"] is None
    for name, figure in figures.items():
        assert figure.keys() == {"value", "error"}
        assert isinstance(figure["value"], float) and figure["error"] > 0, name
    assert list(report["hidden_errors"]) == [f"model.layers.{block}" for block in range(6)]


def test_the_table_shows_the_same_in_its_units(report, quantized, sample, short) -> None:
    shown = output(evaluate(quantized, "--reference", sample, *short))
    assert f"{quantized} against {sample}, in f32" in shown
    assert "1016 predicted tokens, windows of 128 in the style of transformers" in shown
    for key, label, factor, unit in FIGURES:
        figure = Estimate(**report["figures"][key])
        (row,) = [line for line in shown.splitlines() if re.match(rf"{re.escape(label)} +[-\d]", line)]
        value, *rest = row.removeprefix(label).split()
        assert float(value) == pytest.approx(figure.value * factor, rel=1e-5, abs=1e-9)
        if figure.error is not None:
            assert float(rest.pop(0)) == pytest.approx(figure.error * factor, rel=0.06)
        assert rest == unit.split()
    share = report["figures"]["top1_agreement"]["value"]
    assert 0.5 < share < 1 and f"{100 * share:.6g}" in shown  # percent
    (line,) = [line for line in shown.splitlines() if line.startswith("0: ")]
    found = [float(error) for error in re.findall(r"\d: (\S+)", line)]
    assert found == pytest.approx(list(report["hidden_errors"].values()), rel=0.06)


def test_a_checkpoint_alone(report, sample: Path, short: list[str]) -> None:
    lines = output(evaluate(sample, *short)).splitlines()
    assert lines[0] == f"{sample}, in f32"
    (row,) = [line for line in lines if line.startswith("perplexity")]
    assert float(row.split()[1]) == pytest.approx(
        report["figures"]["reference_perplexity"]["value"], rel=1e-5
    )
    assert not any(word in "\n".join(lines) for word in ("KL", "hidden", "against"))


@pytest.mark.slow
def test_logits_saved_and_used(quantized, sample, short, tmp_path: Path) -> None:
    path = tmp_path / "sample.logits"
    windows = ("--windows", "llama.cpp")
    beside = output(
        evaluate(quantized, "--reference", sample, *short, *windows, "--save-logits", path, "--json")
    )
    against = output(evaluate(quantized, "--reference", sample, "--kl-divergence-base", path, "--json"))
    first, second = (json.loads(found)["figures"]["mean_kl"]["value"] for found in (beside, against))
    assert second == pytest.approx(first, rel=0.01)
    shown = output(evaluate(quantized, "--reference", sample, "--kl-divergence-base", path))
    assert f"{quantized} against {path}" in shown and f"text and windows are those of {path}" in shown


def test_the_bundled_text_is_named(sample: Path) -> None:
    assert "note: no --data" in output(evaluate(sample, "--tokens", "256"))


@pytest.mark.slow
def test_tasks(sample: Path, quantized: Path, short: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "task.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    questions = [("My lord, I", [" will", " cat"]), ("The king is", [" dead", " seven"])]
    (tmp_path / "questions.jsonl").write_text(
        "\n".join(
            json.dumps({"question": question, "choices": choices, "answer": 0})
            for question, choices in questions
        )
    )
    given = (quantized, "--reference", sample, *short, "--tasks", "tiny", "--tasks-path", tmp_path)
    report = json.loads(output(evaluate(*given, "--json")))
    score, own = (report[key]["tiny"]["acc,none"] for key in ("tasks", "reference_tasks"))
    (row,) = [line.split() for line in output(evaluate(*given)).splitlines() if line.startswith("tiny ")]
    assert row[3] == "acc" and (float(row[1]), float(row[4])) == pytest.approx((score, own), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "none"], "--tokens"),
        (["--hidden-ram", "big"], "--hidden-ram"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--windows", "lama"], "--windows lama"),
        (["--kl-divergence-base", "nowhere.logits"], "nowhere.logits"),
        (
            ["--windows", "llama.cpp", "--tokens", "512", "--save-logits", "nowhere/x.logits"],
            "nowhere/x.logits",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, sample: Path) -> None:
    result = evaluate(sample, *arguments)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
