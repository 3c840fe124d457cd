"""`prune --method svd`: linears of low rank, in ordinary checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from typer.testing import CliRunner

from llmcompress.checkpoint import Checkpoint
from llmcompress.cli import app
from llmcompress.hessians import HessianFolder
from llmcompress.progress import Progress


@pytest.fixture
def hessian_of(tmp_path: Path) -> Callable[[Path], Path]:
    def make(model: Path) -> Path:
        options = CalibrationOptions(data=("prose",), tokens=2048)
        calibrate_model(model, tmp_path / "i.gguf", options, Progress(), tmp_path / "hessian")
        return tmp_path / "hessian"

    return make


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3", "qwen3moe"))]
)
def test_matrices_are_of_that_rank_and_the_model_runs(
    name: str, tiny: Callable[[str], Path], hessian_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    model, out = tiny(name), tmp_path / "out"
    hessian = hessian_of(model)
    command = [
        "prune",
        str(model),
        "-o",
        str(out),
        "--method",
        "svd",
        "--rank",
        "24",
        "--hessian",
        str(hessian),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "the folder is not smaller" in " ".join(done.output.split())
    assert "by svd" in done.output and "by gptq" not in done.output
    told = json.loads((out / "prune.json").read_text())
    assert told["method"] == "svd" and told["weights_of_factors"] < told["weights"]
    with Checkpoint.open(model) as before, Checkpoint.open(out) as after:
        assert after.index.keys() == before.index.keys()
        for linear, figures in told["linears"].items():
            weights = after.read(f"{linear}.weight").astype(np.float64)
            assert figures["rank"] == 24 == np.linalg.matrix_rank(weights, tol=1e-4 * np.linalg.norm(weights))
        for kept in told["left"]:
            assert np.array_equal(after.read(kept), before.read(kept))
    if name == "llama":  # nearer, as its inputs see it, than the plain SVD
        h = HessianFolder(hessian).products("blk.1.ffn_down.weight", 0).astype(np.float64)
        weight = "model.layers.1.mlp.down_proj.weight"
        with Checkpoint.open(model) as before, Checkpoint.open(out) as after:
            was, now = before.read(weight).astype(np.float64), after.read(weight)
        u, s, v = np.linalg.svd(was, full_matrices=False)
        plain = (u[:, :24] * s[:24]) @ v[:24]
        lost = [float(((was - other) @ h * (was - other)).sum()) for other in (now, plain)]
        assert lost[0] < 0.95 * lost[1]
    with torch.no_grad():
        network = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.isfinite(network(torch.tensor([[3, 4, 5]])).logits).all()


def test_a_ratio_is_of_what_the_factors_would_save(
    tiny: Callable[[str], Path], hessian_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = tiny("llama")
    command = ["prune", str(model), "-o", str(tmp_path / "out"), "--method", "svd", "--ratio", "0.4"]
    done = CliRunner().invoke(app, [*command, "--hessian", str(hessian_of(model))])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert told["weights_of_factors"] / told["weights"] == pytest.approx(0.6, abs=0.01)
    assert told["linears"]["model.layers.0.mlp.up_proj"]["rank"] == int(0.6 * 256 * 512 / 768)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say how much goes, by --rank or --ratio"),
        (["--rank", "8", "--ratio", "0.5"], "say how much goes"),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--ratio", "1.5"], "--ratio 1.5: is no share"),
        (["--rank", "5000"], "no linear is of a higher rank"),
        (["--rank", "8", "--sparsity", "0.5"], "--sparsity: means nothing to --method svd"),
    ],
)
def test_what_is_refused(flags: list[str], message: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["prune", str(tiny("llama")), "-o", str(tmp_path / "out"), "--method", "svd", "--tokens", "1k"]
    done = CliRunner().invoke(app, [*command, *flags])
    assert done.exit_code == 2 and message in done.output
    assert not (tmp_path / "out").exists()
