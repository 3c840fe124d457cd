"""Adapters that make up for an error: the best of their rank, in peft and in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from gguf import GGUFReader
from llama_cpp import Model
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.compensation import CompensationOptions, compensate
from llmcompress.converters.from_gguf import DecodedGGUF
from test_architectures import assert_same_logits, ids_of
from typer.testing import CliRunner

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.cli import app
from llmcompress.errors import LlmcompressError, PlanError
from llmcompress.hessians import HessianFolder
from llmcompress.methods import low_rank
from llmcompress.methods.low_rank import factorize
from llmcompress.progress import Progress

CALIBRATION = CalibrationOptions(data=("prose",), tokens=2048)


def matrices(outputs: int, inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An error, and the inputs it meets, some of which are far larger than others."""
    rng = np.random.default_rng(seed)
    inputs_seen = rng.standard_normal((4 * inputs, inputs)) * np.exp(rng.standard_normal(inputs))
    return rng.standard_normal((outputs, inputs)).astype(np.float32), inputs_seen @ rng.standard_normal((inputs, inputs)) / 9  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_it_is_the_truncated_svd_of_what_the_inputs_show(shape: tuple[int, int]) -> None:
    """Against SVD-LLM's way: a Cholesky factor of the damped H, and its inverse."""
    error, seen = matrices(*shape)
    hessian = (seen.T @ seen).astype(np.float32)
    found = factorize(error, hessian, 5)
    scaled = hessian.astype(np.float64) / hessian.diagonal().mean()
    root = np.linalg.cholesky(scaled + low_rank.DAMPING * np.eye(len(scaled)))
    u, s, v = np.linalg.svd(error @ root)
    wanted = (u[:, :5] * s[:5]) @ v[:5] @ np.linalg.inv(root)
    assert np.allclose(found.b @ found.a, wanted, atol=1e-4)
    assert np.allclose(found.taken, s[:5] ** 2, rtol=1e-6) and np.isclose(found.before, (s**2).sum())
    left = np.linalg.norm((error - found.b @ found.a) @ root) ** 2
    assert np.isclose(found.after, left, rtol=1e-4)
    for other in (factorize(error, None, 5), factorize(error, np.diag(hessian.diagonal()), 5)):
        assert np.linalg.norm((error - other.b @ other.a) @ root) ** 2 > 1.2 * left


def test_factors_are_even_and_of_no_more_rank_than_there_is() -> None:
    error, seen = matrices(12, 30)
    found = factorize(error, (seen.T @ seen).astype(np.float32), 99)
    assert found.b.shape == (12, 12) and found.a.shape == (12, 30)
    assert np.allclose(found.b @ found.a, error, atol=1e-4) and found.after < 1e-6 * found.before
    assert np.allclose(np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1), rtol=1e-5)


def test_inputs_that_no_token_reached() -> None:
    """H is singular, or zero; and no error is none."""
    error, seen = matrices(12, 30)
    seen[:, 10:] = 0
    found = factorize(error, (seen.T @ seen).astype(np.float32), 4)
    assert np.isfinite(found.a).all() and found.after < found.before
    for hessian in (np.zeros((30, 30), np.float32), np.eye(30, dtype=np.float32)):
        same = factorize(error, hessian, 4)
        assert np.allclose(same.b @ same.a, (lambda f: f.b @ f.a)(factorize(error, None, 4)), atol=1e-4)
    nothing = factorize(np.zeros((12, 30), np.float32), None, 4)
    assert not (nothing.b @ nothing.a).any() and nothing.after == 0


def test_many_outputs_are_solved_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    error, seen = matrices(200, 64)
    hessian = (seen.T @ seen).astype(np.float32)
    exact = factorize(error, hessian, 8)
    monkeypatch.setattr(low_rank, "EXACT", 100)
    near = factorize(error, hessian, 8)
    assert exact.taken.sum() * 0.999 < near.taken.sum() <= exact.taken.sum() * 1.0001
    again = factorize(error, hessian, 8)
    assert np.array_equal(near.a, again.a) and np.array_equal(near.b, again.b)


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model's Q2_K, and XᵀX of it, by the model's name."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        calibrate_model(tiny(name), folder / "i.gguf", CALIBRATION, Progress(), folder / "hessian")
        llmcompress.quantize(
            tiny(name), folder / "q.gguf", type="Q2_K", token_embedding_type="F32", verify="off"
        )
        return folder

    return make


def error_left(reference: Path, artefact: Path, adapter: Path, hessian: Path) -> dict[str, float]:
    """|(W - W' - B A) X|² / |(W - W') X|² of each layer, from the files alone."""
    from llmcompress.adapter import Adapter

    left = {}
    with Checkpoint.open(reference) as model, DecodedGGUF.open(artefact, model) as held:
        for update in Adapter.open(adapter).low_rank:
            error = model.read(update.name).astype(np.float64) - held.read(update.name)
            part = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                    "mlp.down_proj": "ffn_down"}  # fmt: skip
            if "layers" not in update.name:
                continue
            layer, module = update.name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            h = HessianFolder(hessian).products(f"blk.{layer}.{part[module]}.weight", 0).astype(np.float64)
            rest = error - update.scale * update.b() @ update.a()
            left[update.name] = float((rest @ h * rest).sum() / (error @ h * error).sum())
    return left


@pytest.mark.slow
def test_of_a_gguf_in_llama_cpp_and_in_peft(
    made: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = made("llama"), tiny("llama")
    options = CompensationOptions(8, str(folder / "hessian"))
    report = compensate(str(folder / "q.gguf"), model, tmp_path / "adapter", options)
    compensate(str(folder / "q.gguf"), model, tmp_path / "adapter.gguf", options)
    left = error_left(model, folder / "q.gguf", tmp_path / "adapter", folder / "hessian")
    assert len(left) == 14 and max(left.values()) < 0.95
    assert {linear.name for linear in report.linears} == {name.removesuffix(".weight") for name in left} | {
        "lm_head"
    }
    for linear in report.linears[:3]:
        assert linear.left == pytest.approx(left[f"{linear.name}.weight"], abs=0.02) and linear.weighed

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with Checkpoint.open(model) as reference, DecodedGGUF.open(folder / "q.gguf", reference) as held:
        state = {name: torch.from_numpy(held.read(name)).view(held.index[name].shape) for name in held.index}
    network.load_state_dict(state, strict=False)
    ids = torch.tensor([ids_of(model)])
    with torch.no_grad():
        plain = network(ids).logits[0].numpy()
        fitted = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")(ids).logits[0].numpy()
    rounded = llmcompress.quantize(folder / "q.gguf", tmp_path / "f32.gguf", type="F32", verify="off").paths[
        0
    ]
    with Model(rounded) as engine:  # the artefact's weights, without llama.cpp's rounding of activations
        assert_same_logits(engine.logits(ids[0].tolist()), plain, 1e-3)
        engine.use_adapter(tmp_path / "adapter.gguf")
        assert_same_logits(engine.logits(ids[0].tolist()), fitted, 1e-3)
    assert abs(fitted - plain).max() > 0.02 * np.ptp(plain)
    manifest = json.loads((tmp_path / "adapter" / "compensate.json").read_text())
    assert manifest["rank"] == 8 and manifest["linears"].keys() == {linear.name for linear in report.linears}


@pytest.mark.slow
def test_a_real_model_is_nearer_to_itself_with_it(root: Path, tmp_path: Path) -> None:
    model = root / "examples" / "sample-llama-6m"
    artefact = llmcompress.quantize(model, tmp_path / "q.gguf", type="Q2_K", verify="off").paths[0]
    whole = llmcompress.quantize(model, tmp_path / "w.gguf", type="F32", verify="off").paths[0]
    compensate(
        str(artefact), model, tmp_path / "a.gguf", CompensationOptions(16, data=("prose",), tokens=4096)
    )
    text = (root / "calibration_data" / "mathematics.txt").read_text()[3000:6000]
    with Model(whole) as reference, Model(artefact) as small:
        ids = reference.tokenize(text)[:384]

        def kl() -> float:
            p, q = (
                torch.from_numpy(engine.logits(ids)).double().log_softmax(-1) for engine in (reference, small)
            )
            return float((p.exp() * (p - q)).sum(-1).mean())

        before = kl()
        small.use_adapter(tmp_path / "a.gguf")
        assert kl() < 0.8 * before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen3moe", "gemma2"])
def test_families(
    name: str, made: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Transposed and fused weights, tied heads: with all of the rank the artefact is the model again, but for experts."""
    folder, model = made(name), tiny(name)
    report = compensate(
        str(folder / "q.gguf"), model, tmp_path / "a.gguf", CompensationOptions(512, str(folder / "hessian"))
    )
    assert report.left < 1e-3
    ids = ids_of(model)
    rounded = llmcompress.quantize(folder / "q.gguf", tmp_path / "f.gguf", type="F32", verify="off").paths[0]
    whole = llmcompress.quantize(model, tmp_path / "w.gguf", type="F32", verify="off").paths[0]
    with Model(rounded) as engine, Model(whole) as wanted:
        before = abs(engine.logits(ids) - wanted.logits(ids)).max()
        engine.use_adapter(tmp_path / "a.gguf")
        after = abs(engine.logits(ids) - wanted.logits(ids)).max()
    assert after < (0.9 if name == "qwen3moe" else 0.02) * before
    assert any("of experts stay as they are" in note for note in report.notes) == (name == "qwen3moe")
    assert len(GGUFReader(tmp_path / "a.gguf").tensors) == 2 * len(report.linears)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "nf4"])
def test_of_a_quantized_checkpoint_in_peft(
    format: str, made: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from llmcompress.converters.coded_linears import run_coded
    from llmcompress.converters.to_checkpoint import plan_checkpoint

    from llmcompress.recipe import Recipe

    folder, model = made("qwen3"), tiny("qwen3")
    run_coded(plan_checkpoint(model, tmp_path / "coded", Recipe(format=format)))
    report = compensate(
        str(tmp_path / "coded"), model, tmp_path / "adapter", CompensationOptions(8, str(folder / "hessian"))
    )
    assert 0 < report.left < 0.98 and len(report.linears) == 14
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"] == str(tmp_path / "coded")
        and config["r"] == config["lora_alpha"] == 8
    )
    if format == "nf4":
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32)
        fitted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        ids = torch.tensor([ids_of(model)])
        whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            wanted, found = whole(ids).logits, fitted(ids).logits
            with fitted.disable_adapter():
                plain = fitted(ids).logits
        assert (found - wanted).square().mean() < 0.97 * (plain - wanted).square().mean()


def test_what_is_refused(made: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, model = made("llama"), tiny("llama")
    artefact, options = str(folder / "q.gguf"), CompensationOptions(4, str(folder / "hessian"))
    with pytest.raises(PlanError, match="there is nothing to make up for"):
        compensate(str(model), model, tmp_path / "a", options)
    with pytest.raises(LlmcompressError, match="give the (checkpoint that the file|model it) was made from"):
        compensate(artefact, tiny("qwen3"), tmp_path / "a", options)
    with pytest.raises(PlanError, match="in .* the artefact has"):
        compensate(str(tiny("qwen3")), model, tmp_path / "a", options)
    with pytest.raises(PlanError, match="--rank 0: must be at least 1"):
        compensate(artefact, model, tmp_path / "a", CompensationOptions(0))
    with pytest.raises(PlanError, match="--type Q4_0: none of F32"):
        compensate(
            artefact, model, tmp_path / "a.gguf", CompensationOptions(4, str(folder / "hessian"), type="Q4_0")
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(LlmcompressError, match="is there already"):
        compensate(artefact, model, tmp_path / "full", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    done = CliRunner().invoke(app, ["compensate", artefact, "--reference", str(model), "-o", str(tmp_path / "a"),
                                    "--rank", "4", "--hessian", str(folder / "hessian")])  # fmt: skip
    assert done.exit_code == 0 and "rank 4, 15 linears" in done.output and "fits" in done.output
