"""Narrower models: against the whole one with zeros where something went, least squares by hand, llama.cpp, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters import narrowing
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.narrowing import narrow
from llmcompress.converters.widths import widths_of
from test_architectures import assert_same_logits, ids_of
from test_dropping import load

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RunError
from llmcompress.methods import width
from llmcompress.progress import Progress
from llmcompress.structure_options import StructureOptions

Tiny = Callable[[str], Path]


def problem(
    outputs: int = 6, inputs: int = 8, rows: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, inputs that depend on each other, and their products."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(rows, inputs, generator=chance) @ torch.randn(inputs, inputs, generator=chance)
    return torch.randn(outputs, inputs, generator=chance), x, x.T @ x


def least_error(weights: torch.Tensor, x: torch.Tensor, kept: list[int]) -> float:
    """What plain least squares on damped inputs leaves."""
    damping = width.DAMPING * (x.T @ x).diagonal().double().mean()
    x = torch.cat([x.double(), damping.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted = x @ weights.double().T
    solved = torch.linalg.lstsq(x[:, kept], wanted).solution
    return (wanted - x[:, kept] @ solved).square().sum().item()


@pytest.mark.parametrize("group", [1, 2])
def test_groups_go_one_after_the_other_by_what_least_squares_leaves(group: int) -> None:
    weights, x, products = problem()
    left = list(range(8 // group))
    for count in range(1, len(left)):
        without = {gone: [at for at in left if at != gone] for gone in left}
        errors = {
            gone: least_error(weights, x, [at * group + i for at in rest for i in range(group)])
            for gone, rest in without.items()
        }
        left = without[min(errors, key=errors.get)]
        assert width.kept_by_reconstruction(weights, products, group, count).tolist() == left


def test_heads_of_a_large_model_on_two_threads() -> None:
    """torch's LU of several such matrices fails there."""
    weights, _, products = problem(outputs=4, inputs=5 * 512, rows=64)
    weights[:, 512:1024] *= 1e-3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert width.kept_by_reconstruction(weights, products, 512, 1).tolist() == [0, 2, 3, 4]
    finally:
        torch.set_num_threads(before)


def test_what_stays_makes_up_for_what_is_gone_as_least_squares_would() -> None:
    weights, x, products = problem()
    kept = torch.tensor([0, 2, 3, 7])
    found = width.reconstructed(weights, products, kept)
    damping = width.DAMPING * products.diagonal().mean()
    longer = torch.cat([x, damping.sqrt() * torch.eye(8)]).double()
    wanted = torch.linalg.lstsq(longer[:, kept], longer @ weights.double().T).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_norm_is_that_of_what_each_group_adds() -> None:
    weights, x, products = problem()
    scores = [
        sum((x[:, j, None] * weights[None, :, j]).square().sum() for j in (at, at + 1))
        for at in range(0, 8, 2)
    ]
    kept = width.kept_by_norm(weights, products, 2, 2)
    assert kept.tolist() == sorted(np.argsort(scores)[2:].tolist())


@pytest.mark.parametrize("products", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_inputs_that_say_nothing_are_refused(products: torch.Tensor) -> None:
    with pytest.raises(RunError, match="give other --data"):
        width.reconstructed(torch.ones(2, 4), products, torch.arange(2))


def given(root: Path, **values) -> StructureOptions:
    text = str(root / "tests" / "data" / "richard-iii.txt")
    return StructureOptions("width", data=(text,), tokens=1024, chunk=128, dtype="f32", **values)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mistral", "gemma2", "gemma3", "llama-bias", "qwen2")
        ),
    ],
)
def test_a_narrower_model_is_the_whole_one_with_zeros(
    name: str, tiny: Tiny, root: Path, tmp_path: Path
) -> None:
    parts = ("ffn",) if name == "qwen2" else ("ffn", "attention")
    report = narrow(tiny(name), tmp_path / "narrow", given(root, ratio=0.5, by="norm", parts=parts))
    assert report.went["kept"] == {"ffn": 256} | ({"attention": 1} if "attention" in parts else {})
    narrower, whole, ids = load(tmp_path / "narrow"), load(tiny(name)), ids_of(tiny(name))
    size = narrower.config.head_dim if name != "qwen2" else 64
    for layer, (small, large) in enumerate(zip(narrower.model.layers, whole.model.layers)):
        if "attention" in parts:  # one of two groups of two heads
            assert (
                narrower.config.head_dim == large.self_attn.head_dim
                and narrower.config.num_attention_heads == 2
            )
            same = torch.equal(small.self_attn.k_proj.weight, large.self_attn.k_proj.weight[:size])
            large.self_attn.o_proj.weight[:, slice(2 * size, None) if same else slice(2 * size)] = 0
        rows = {row.numpy().tobytes() for row in small.mlp.up_proj.weight}
        gone = [row.numpy().tobytes() not in rows for row in large.mlp.up_proj.weight]
        assert sum(gone) == 256, layer
        large.mlp.down_proj.weight[:, gone] = 0
    wanted = whole(torch.tensor([ids])).logits[0].numpy()
    found = narrower(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)
    result = llmcompress.quantize(tmp_path / "narrow", tmp_path / "{type}.gguf", type=["F32", "Q4_K_M"])
    with Model(result.paths[0]) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
    with Model(result.paths[1]) as model:
        assert np.abs(model.logits(ids) - wanted).mean() < 0.1 * np.ptp(wanted)


@pytest.mark.slow
def test_reconstruction_is_nearer_to_a_trained_model(root: Path, tmp_path: Path) -> None:
    sample, text = root / "examples" / "sample-llama-6m", str(root / "tests" / "data" / "richard-iii.txt")
    options, found = EvaluationOptions(data=(text,), tokens=2048), {}
    for by in ("reconstruction", "norm"):
        narrow(sample, tmp_path / by, StructureOptions("width", ratio=0.25, tokens=4096, by=by))
        report = evaluate_model(str(tmp_path / by), str(sample), options, Progress())
        found[by] = report.evaluation.figures["mean_kl"].value
    assert found["reconstruction"] < 0.85 * found["norm"]  # 0.76 measured


@pytest.mark.slow
def test_a_killed_job_goes_on_behind_its_last_block(
    tiny: Tiny, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(tiny("llama"), tmp_path / "undisturbed", given(root, ratio=0.5))
    chosen, choose = [], narrowing._Blocks._choose

    def killed(self, block: int) -> dict[str, torch.Tensor]:
        if block == 1 and len(chosen) < 2:
            chosen.append("killed")
            raise KeyboardInterrupt
        chosen.append(block)
        return choose(self, block)

    monkeypatch.setattr(narrowing._Blocks, "_choose", killed)
    with pytest.raises(KeyboardInterrupt):
        narrow(tiny("llama"), tmp_path / "killed", given(root, ratio=0.5))
    narrow(tiny("llama"), tmp_path / "killed", given(root, ratio=0.5))
    assert chosen == [0, "killed", 1]
    for name in ("model.safetensors", "config.json", "prune.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not list(tmp_path.glob("*.blocks"))


REFUSED = {
    ("mixtral", "ffn"): "belongs to experts; use --method experts",
    ("gpt2", "ffn"): "several matrices are one here, or it lies transposed",
    ("phi3", "ffn"): "has 1024 rows, by config.json 512; is it fused",
    ("qwen2", "attention"): "the narrower model could not become a GGUF: .* not the hidden size",
}


@pytest.mark.parametrize(("name", "part"), REFUSED)
def test_models_that_cannot_be_made_narrower(
    name: str, part: str, tiny: Tiny, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=REFUSED[name, part]):
        narrow(tiny(name), tmp_path / "narrow", given(root, ratio=0.5, parts=(part,)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ratio", "left"), [(0.25, 384), (0.5, 256), (0.1, 448), (0.99, 32)])
def test_channels_that_stay_are_a_multiple_that_quantizers_like(ratio: float, left: int, tiny: Tiny) -> None:
    """Of 512: the nearest of the largest of 256, 128, 64, 32 that misses by less than a twentieth."""
    with Checkpoint.open(tiny("llama")) as checkpoint:
        assert widths_of(checkpoint, ("ffn",)).kept("ffn", ratio) == left


def test_a_ratio_too_small_for_a_group_of_heads_is_noted(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    report = narrow(tiny("llama"), tmp_path / "narrow", given(root, ratio=0.2, by="norm"))
    assert report.went["kept"] == {"ffn": 416} and "attention: too few groups" in report.notes[-1]
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (416, 2)
