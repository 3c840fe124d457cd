"""`quantize --calibrate`: one read of the weights, and the same bytes as calibrating first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.to_gguf import plan_gguf
from tiny_models import BYTE_BPE, SENTENCEPIECE, build

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError, PlanError, RecipeError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.importance import Importance
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.run import run

TOKENS = 6000
TYPE = "Q3_K_M"


@pytest.fixture(scope="module")
def tokenizers(root: Path) -> dict[str, Path]:
    return {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }


def tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile.open(path) as file:
        return {name: file.read(name).copy() for name in file.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "llama", "qwen3moe", "phi3", "gpt2"])
def test_bytes_are_those_of_calibrating_first(name: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    model = build(name, tmp_path / "tiny", tokenizers)
    stats = tmp_path / "stats.gguf"
    options = CalibrationOptions(data=("prose",), tokens=TOKENS)
    calibrate_model(model, stats, options, Progress())
    llmcompress.quantize(model, tmp_path / "two.gguf", type=TYPE, imatrix=str(stats))
    result = llmcompress.quantize(
        model, tmp_path / "one.gguf", type=TYPE, calibrate=True, data=["prose"], tokens=TOKENS
    )
    one, two = tensors(tmp_path / "one.gguf"), tensors(tmp_path / "two.gguf")
    assert one.keys() == two.keys()
    assert [key for key in one if not np.array_equal(one[key], two[key])] == []
    plain = tmp_path / "plain.gguf"
    llmcompress.quantize(model, plain, type=TYPE)
    changed = [key for key, data in tensors(plain).items() if not np.array_equal(data, one[key])]
    assert len(changed) > 4, "importance made no difference"
    assert any("calibrating takes up to" in note for note in result.notes)


def test_weights_of_the_blocks_are_read_once(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", tmp_path / "tiny", tokenizers)
    rows: Counter[str] = Counter()
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, name: str, first: int, out: np.ndarray) -> None:
        rows[name] += len(out)
        read_into(self, name, first, out)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    plan = plan_gguf(
        model,
        tmp_path / "out.gguf",
        Recipe(types=(TYPE,), calibrate=True, data=("prose",), tokens=TOKENS, verify="off"),
    )
    run(plan)
    linears = [step for step in plan.steps if step.name in plan.importance and step.name.startswith("blk.")]
    matrices = {step.pieces[0].tensor.name: step.rows for step in linears}
    assert len(matrices) == 14
    assert {name: rows[name] for name in matrices} == matrices


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_in_the_same_bytes(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    model = build("llama", tmp_path / "tiny", tokenizers)
    recipe = Recipe(types=(TYPE,), calibrate=True, data=("prose",), tokens=TOKENS)

    class Kill(Progress):
        """Ctrl-C somewhere in the middle."""

        done = 0

        def advance(self, count: int) -> None:
            self.done += count
            if self.done > 3_000_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_gguf(model, tmp_path / "killed.gguf", recipe), Kill())
    assert not (tmp_path / "killed.gguf").exists()
    result = run(plan_gguf(model, tmp_path / "killed.gguf", recipe))
    assert result.slabs_kept > 0
    run(plan_gguf(model, tmp_path / "whole.gguf", recipe))
    killed, whole = tensors(tmp_path / "killed.gguf"), tensors(tmp_path / "whole.gguf")
    assert [key for key in whole if not np.array_equal(killed[key], whole[key])] == []


def test_an_error_of_the_calibration_ends_the_job(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", tmp_path / "tiny", tokenizers)
    plan = plan_gguf(
        model,
        tmp_path / "out.gguf",
        Recipe(types=(TYPE,), calibrate=True, data=("prose",), tokens=TOKENS),
    )
    weights = plan.importance.live._lockstep.weights

    def broken(parameters: set[str]) -> None:
        raise LlmcompressError("the disk fell off")

    monkeypatch.setattr(weights, "load", broken)
    with pytest.raises(LlmcompressError, match="the disk fell off"):
        run(plan)
    assert not (tmp_path / "out.gguf").exists()


def test_iq_types_need_no_file(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "iq.gguf"
    model = root / "examples" / "sample-llama-6m"
    llmcompress.quantize(model, out, type="IQ4_XS", calibrate=True, data=["prose"], tokens=2000)
    with GGUFFile.open(out) as file:
        assert file.metadata["quantize.imatrix.entries_count"].value > 40


def test_contradictions_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave one out"):
        Recipe(calibrate=True, imatrix="some.gguf")
    with pytest.raises(PlanError, match="calibrate first"):
        plan_gguf(
            root / "examples" / "sample-llama-6m",
            tmp_path / "out.gguf",
            Recipe(calibrate=True, fallback="best", tokens=2000),
        )


def test_nothing_is_live_without_a_source() -> None:
    empty = Importance()
    assert len(empty) == 0 and empty.live is None and not empty.complaints
    assert list(empty.in_order(enumerate([]), [])) == []
