"""PiSSA and LoftQ: the start leaves the model as it is or nearer to it, and what is saved fits the named model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llmcompress.adapter_method import unadapted, with_adapter
from llmcompress.adapter_start import (
    adapted_layers,
    dequantized,
    fit_original,
    install,
    load_factors,
    oriented,
    save_factors,
    start_factors,
)
from llmcompress.errors import LlmcompressError
from llmcompress.frozen_model import load_frozen
from llmcompress.tuning_options import TuningOptions, chosen

IDS = torch.arange(2, 34)[None]
CPU = torch.device("cpu")


def adapted(folder: Path, load: str, options: TuningOptions) -> peft.PeftModel:
    figures = chosen(options, 100, 64, 256, 10**6, 1, False)
    return with_adapter(load_frozen(folder, load, CPU, torch.float32), options, figures).eval()


def started(
    folder: Path, load: str, options: TuningOptions
) -> tuple[peft.PeftModel, dict[str, torch.Tensor]]:
    model = adapted(folder, load, options)
    source = load_frozen(folder, "16bit", CPU, torch.float32)
    factors = start_factors(model, options.init, source)
    install(model, options.init, factors, source)
    return model, factors


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What each adapted layer multiplies by, adapter and all, (out, in)."""
    return {
        name: oriented(layer, dequantized(layer.get_base_layer())) + oriented(layer, layer.get_delta_weight("default"))
        for name, layer in adapted_layers(model)
    }  # fmt: skip


def moved(model: peft.PeftModel) -> None:
    """As if trained."""
    chance = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight.data
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=chance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_pissa_starts_as_the_model_and_is_saved_for_it(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, method: str
) -> None:
    options = TuningOptions(init="pissa", rank=16, method=method)
    plain = load_frozen(tiny(name), "16bit", CPU, torch.float32).eval()
    model, factors = started(tiny(name), "16bit", options)
    assert torch.allclose(logits(model), logits(plain), atol=1e-3)
    for layer_name, layer in adapted_layers(model):  # the largest singular values are in the adapter
        rest = torch.linalg.matrix_norm(oriented(layer, dequantized(layer.get_base_layer())), 2)
        sixteen = torch.linalg.svdvals(weights(model)[layer_name])[16]
        assert rest == pytest.approx(sixteen.item(), rel=1e-2)
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    fit_original(tmp_path / "adapter", factors)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.allclose(logits(again), logits(model), atol=2e-3)
    assert (
        logits(model) - logits(load_frozen(tiny(name), "16bit", CPU, torch.float32).eval())
    ).abs().max() > 0.1


def test_loftq_makes_up_for_what_quantizing_lost(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = TuningOptions(init="loftq", rank=32)
    exact = weights(adapted(tiny("llama"), "16bit", options))
    rounded = weights(adapted(tiny("llama"), "4bit", options))
    model, factors = started(tiny("llama"), "4bit", options)
    for name, weight in weights(model).items():
        assert (weight - exact[name]).norm() < 0.95 * (rounded[name] - exact[name]).norm()
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    quantized = load_frozen(tiny("llama"), "4bit", CPU, torch.float32)
    assert torch.allclose(
        logits(peft.PeftModel.from_pretrained(quantized, tmp_path / "adapter").eval()),
        logits(model),
        atol=1e-4,
    )
    change = {name: weight - rounded[name] for name, weight in weights(model).items()}
    started_with = {
        name: weight - rounded[name]
        for name, weight in weights(started(tiny("llama"), "4bit", options)[0]).items()
    }
    fit_original(tmp_path / "adapter", factors)
    plain = load_frozen(tiny("llama"), "16bit", CPU, torch.float32)
    again = weights(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    for name in change:
        assert torch.allclose(again[name] - exact[name], change[name] - started_with[name], atol=1e-4)


def test_pissa_on_four_bits_quantizes_the_rest(tiny: Callable[[str], Path]) -> None:
    """The point of it: what is left after the largest directions is rounded with a smaller error."""
    options = TuningOptions(init="pissa", rank=32)
    exact = weights(adapted(tiny("llama"), "16bit", options))
    rounded = weights(adapted(tiny("llama"), "4bit", options))
    model, _ = started(tiny("llama"), "4bit", options)
    found = weights(model)
    errors = [(found[name] - exact[name]).norm() / (rounded[name] - exact[name]).norm() for name in exact]
    assert max(errors) < 1
    assert all(layer.get_base_layer().weight.dtype == torch.uint8 for _, layer in adapted_layers(model))


def test_factors_are_kept_bit_for_bit(tmp_path: Path) -> None:
    factors = {"a.lora_A": torch.randn(4, 8), "a.lora_B": torch.randn(8, 4)}
    save_factors(tmp_path / "start.safetensors", factors)
    again = load_factors(tmp_path / "start.safetensors")
    assert set(again) == set(factors) and all(torch.equal(again[name], factors[name]) for name in factors)


def test_a_rank_above_the_matrix_s_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(LlmcompressError, match="--rank 200: .* is 128 x 256; --init pissa"):
        started(tiny("llama"), "16bit", TuningOptions(init="pissa", rank=200))


def test_what_has_no_adapter_is_named(tiny: Callable[[str], Path]) -> None:
    for name in ("llama", "qwen3moe"):
        assert not unadapted(adapted(tiny(name), "16bit", TuningOptions()))
    notes = unadapted(adapted(tiny("qwen3moe"), "16bit", TuningOptions(targets=("q_proj",))))
    assert any("experts" in note for note in notes) and any("k_proj" in note for note in notes)


def test_targets_and_modules_trained_whole(tiny: Callable[[str], Path]) -> None:
    model = adapted(tiny("llama"), "16bit", TuningOptions(targets=("q_proj",), train_also=("embed_tokens",)))
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"q_proj"}
    assert any("embed_tokens" in name and p.requires_grad for name, p in model.named_parameters())
    with pytest.raises(LlmcompressError, match="--target q_prj: .*did you mean 'q_proj'"):
        adapted(tiny("llama"), "16bit", TuningOptions(targets=("q_prj",)))
    with pytest.raises(LlmcompressError, match="--train-also embed:"):
        adapted(tiny("llama"), "16bit", TuningOptions(train_also=("embed",)))
