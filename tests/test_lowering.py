"""`prune --method svd` of models with low-rank pairs of their own: against plain least squares, llama.cpp, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters.lowering import lower_ranks
from safetensors.torch import load_file, save_file
from test_architectures import assert_same_logits, ids_of
from test_dropping import load
from typer.testing import CliRunner

import llmcompress
from llmcompress.cli import app
from llmcompress.methods import latent
from llmcompress.structure_options import StructureOptions

Tiny = Callable[[str], Path]
RANK = 16


def given(root: Path, **values) -> StructureOptions:
    text = str(root / "tests" / "data" / "richard-iii.txt")
    return StructureOptions("svd", data=(text,), tokens=2048, chunk=128, dtype="f32", **values)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def problem(rank: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B (outputs, 8), the norm's weight, and latents of that rank, which depend on each other."""
    chance = torch.Generator().manual_seed(5)
    made = torch.randn(500, rank, generator=chance) @ torch.randn(rank, 8, generator=chance)
    return torch.randn(12, 8, generator=chance), 1 + 0.3 * torch.randn(8, generator=chance), made


def lowered(b: torch.Tensor, gain: torch.Tensor, c: torch.Tensor, rank: int) -> torch.Tensor:
    """What the new pair gives for the latents `c`."""
    x = norm(c) * gain
    projection, guess = latent.projection(b, gain, x.T @ x, rank)
    both = torch.cat([x, latent.projected(x, gain, projection)], 1)
    return norm(c @ projection.T) @ latent.refitted(b, both.T @ both, guess).T


def test_latents_of_a_lower_rank_lose_nothing() -> None:
    b, gain, c = problem(rank=4)
    wanted = (norm(c) * gain) @ b.T
    assert (lowered(b, gain, c, 4) - wanted).norm() < 0.02 * wanted.norm()  # damping is 1 % of the mean
    assert (lowered(b, gain, c, 3) - wanted).norm() > 0.05 * wanted.norm()


def test_what_is_left_is_the_least_squares_of_what_the_norm_gives() -> None:
    """And better than any choice of latents as they are."""
    b, gain, c = problem()
    wanted = (norm(c) * gain) @ b.T
    x = norm(c) * gain
    projection, _ = latent.projection(b, gain, x.T @ x, 5)
    new = norm(c @ projection.T)
    left = (lowered(b, gain, c, 5) - wanted).norm()
    least = (new @ torch.linalg.lstsq(new, wanted).solution - wanted).norm()
    assert least <= left < 1.02 * least
    plain = []
    for kept in torch.combinations(torch.arange(8), 5):
        some = norm(c[:, kept])
        plain.append((some @ torch.linalg.lstsq(some, wanted).solution - wanted).norm())
    assert left < 0.9 * min(plain)


@pytest.fixture(scope="module")
def of_half_the_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek V3 whose latents lie in half as many dimensions as they have."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(tiny("deepseek3"), folder)
    state, chance = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, rank in (("q_a_proj", 64), ("kv_a_proj_with_mqa", 32)):
        for key in (key for key in state if name in key):
            rows = state[key][:rank]
            state[key][:rank] = torch.randn(rank, rank // 2, generator=chance) @ rows[: rank // 2] / rank**0.5
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_ranks_that_say_nothing_go_for_nothing(of_half_the_ranks: Path, root: Path, tmp_path: Path) -> None:
    model, out = of_half_the_ranks, tmp_path / "low"
    text = str(root / "tests" / "data" / "richard-iii.txt")
    command = ["prune", str(model), "-o", str(out), "--method", "svd", "--rank", str(RANK)]
    done = CliRunner().invoke(app, [*command, "--data", text, "--tokens", "2k"])
    assert done.exit_code == 0, done.output
    config = json.loads((out / "config.json").read_text())
    assert (config["q_lora_rank"], config["kv_lora_rank"]) == (RANK, RANK)
    assert "stay as they are" in " ".join(done.output.split())
    report = lower_ranks(model, tmp_path / "kv", given(root, rank=32))
    assert report.went == {"ranks": {"q_lora_rank": 32}, "ranks_before": {"q_lora_rank": 64}}
    ids, networks = ids_of(model), [load(folder) for folder in (model, tmp_path / "kv", out)]
    wanted, half, less = (network(torch.tensor([ids])).logits[0].numpy() for network in networks)
    assert np.abs(half - wanted).mean() < 0.01 * np.ptp(wanted) < np.abs(less - wanted).mean()
    result = llmcompress.quantize(out, tmp_path / "{type}.gguf", type=["F32", "Q4_K_M"])
    with Model(result.paths[0]) as engine:
        assert_same_logits(engine.logits(ids), less, 1e-3)
    with Model(result.paths[1]) as engine:
        assert np.abs(engine.logits(ids) - less).mean() < 0.1 * np.ptp(less)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("deepseek2", 24), ("glm4-lite", 24)])
def test_llama_cpp_computes_what_transformers_does(
    name: str, rank: int, tiny: Tiny, root: Path, tmp_path: Path
) -> None:
    report = lower_ranks(tiny(name), tmp_path / "low", given(root, rank=rank))
    assert set(report.went["ranks"].values()) == {rank} and report.weights[1] < report.weights[0]
    ids, low = ids_of(tiny(name)), tmp_path / "low"
    wanted = load(low)(torch.tensor([ids])).logits[0].numpy()
    (path,) = llmcompress.quantize(low, tmp_path / "low.gguf", type="F32").paths
    with Model(path) as engine:
        assert_same_logits(engine.logits(ids), wanted, 1e-3)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("deepseek3", ["--rank", "64"], "q_lora_rank is 64, kv_lora_rank is 32; none would become less"),
        ("deepseek3", ["--rank", "16", "--max-ram", "1GiB"], "--max-ram: not for a model with ranks"),
        ("deepseek3", [], "say how much goes, by --rank or --ratio"),
    ],
)
def test_what_is_refused(name: str, flags: list[str], message: str, tiny: Tiny, tmp_path: Path) -> None:
    command = ["prune", str(tiny(name)), "-o", str(tmp_path / "out"), "--method", "svd", *flags]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
