"""Merging, against peft's own merge_and_unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
import transformers
from llama_cpp import Model
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.merge import plan_merge, run_merge
from peft_adapters import KINDS, draw, load, save_adapter, tuned_logits
from safetensors.torch import load_file
from test_architectures import assert_same_logits, ids_of

import llmcompress
from llmcompress.errors import PlanError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe


def merge(
    base: Path, adapter: Path, out: Path, dtype: str = "auto", onto: str | None = None, **options: Any
) -> Path:
    run_merge(plan_merge(base, adapter, out, Recipe(**options), dtype, onto))
    return out


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return load(folder)(torch.tensor([ids])).logits[0].numpy()


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()


def assert_same_weights(found: Path, wanted: dict[str, torch.Tensor]) -> None:
    """The same tensors as a merged model has, to a few last places of float32."""
    state = load(found).state_dict()
    assert state.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(state[name], values, rtol=1e-5, atol=1e-5, msg=name)


TEXT = "<|think|>Once upon a time<|done|> there was"
SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [*KINDS, "adalora"])
@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "phi3", "qwen3moe", "qwen3moe-fused"))],
)
def test_weights_are_those_of_merge_and_unload(
    name: str, kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny(name)
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    assert_same_weights(merge(base, adapter, tmp_path / "merged"), by_peft(base, adapter))


TRAINED = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [5, 0, 17]},
    "embedding by LoRA": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding by DoRA": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "head by LoRA": {"target_modules": ["lm_head", "v_proj"]},
    "biases": {"bias": "all"},
    "biases by LoRA": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["llama-tied", pytest.param("llama-bias", marks=SLOW)])
def test_a_merged_model_computes_what_the_adapted_one_did(
    name: str, trained: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where embedding and head were one matrix and one of them was trained, merge_and_unload changes the other, too."""
    if name == "llama-tied" and "biases" in trained:
        pytest.skip("it has none")
    base = tiny(name)
    adapter = save_adapter(base, tmp_path / "adapter", **TRAINED[trained])
    ids = ids_of(base)
    wanted = tuned_logits(base, adapter, ids)
    assert abs(logits(base, ids) - wanted).max() > 0.03 * np.ptp(wanted)
    merged = merge(base, adapter, tmp_path / "merged")
    assert abs(logits(merged, ids) - wanted).max() < 1e-4 * np.ptp(wanted)


@pytest.mark.parametrize(
    "how",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [4096, 4097]},
    ],
)
def test_new_tokens_are_in_the_merged_model_and_in_its_gguf(
    how, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny("llama-tied")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>", "<|done|>"]})
    model = load(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.name_or_path = model.config._name_or_path = str(base)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **how)
    )
    draw(tuned, 0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert max(ids) == len(tokenizer) - 1
    with torch.no_grad():
        wanted = tuned.eval()(torch.tensor([ids])).logits[0].numpy()
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == len(tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(merged).encode(TEXT, add_special_tokens=False) == ids
    assert abs(logits(merged, ids) - wanted).max() < 1e-4 * np.ptp(wanted)
    path = llmcompress.quantize(
        base, tmp_path / "out.gguf", type="F32", adapter=str(tmp_path / "adapter")
    ).paths[0]
    with Model(path) as found:
        assert found.tokenize(TEXT) == ids
        assert_same_logits(found.logits(ids), wanted, 1e-3)


def test_a_merged_weight_is_rounded_once_to_the_bases_type(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "bf16"
    model = load(tiny("llama"))
    model.to(torch.bfloat16).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    exact = load_file(merge(base, adapter, tmp_path / "f32", "F32") / "model.safetensors")
    found = load_file(merge(base, adapter, tmp_path / "merged") / "model.safetensors")
    assert {values.dtype for values in found.values()} == {torch.bfloat16}
    for name, values in found.items():
        assert torch.equal(values, exact[name].to(torch.bfloat16)), name


def test_a_killed_merge_goes_on_with_the_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny("llama")
    adapter = save_adapter(base, tmp_path / "adapter", "dora")
    whole = merge(base, adapter, tmp_path / "whole", split_max_size=2**20)

    class Stop(Progress):
        left = 2**21

        def advance(self, count: int) -> None:
            self.left -= count
            if self.left < 0:
                raise KeyboardInterrupt

    plan = plan_merge(base, adapter, tmp_path / "merged", Recipe(split_max_size=2**20))
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, Stop())
    result = run_merge(plan_merge(base, adapter, tmp_path / "merged", Recipe(split_max_size=2**20)))
    assert result.slabs_kept > 0
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "merged").iterdir()) and len(files) > 5
    for name in files:
        assert (whole / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantizing_with_an_adapter_is_merging_and_then_quantizing(
    name: str, kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same bytes, whatever slabs the rows are read in."""
    base = tiny(name)
    adapter = save_adapter(base, tmp_path / "adapter", kind)
    merged = merge(base, adapter, tmp_path / "merged", "F32", threads=1)
    types = ["Q4_K_M", "F16"]
    first = llmcompress.quantize(merged, tmp_path / "first" / "{type}.gguf", type=types)
    second = llmcompress.quantize(base, tmp_path / "second" / "{type}.gguf", type=types, adapter=str(adapter))
    for one, other in zip(first.paths, second.paths):
        with GGUFFile.open(one) as one, GGUFFile.open(other) as other:
            assert one.tensors.keys() == other.tensors.keys()
            for tensor in one.tensors:
                assert np.array_equal(one.read(tensor), other.read(tensor)), tensor


@pytest.mark.slow
def test_calibrating_and_evaluating_see_the_adapter(root: Path, tmp_path: Path) -> None:
    """On the way, by itself, and of the merged model: the same bytes. And the result is what it is measured against."""
    base = tmp_path / "f32"  # of float32 in all: what products are rounded to follows the checkpoint's type
    shutil.copytree(root / "examples" / "sample-llama-6m", base)
    load(base).save_pretrained(base)
    adapter = str(save_adapter(base, tmp_path / "adapter", "rslora", spread=0.02))
    merged = merge(base, Path(adapter), tmp_path / "merged", "F32")
    live = {"calibrate": True, "tokens": 1024, "method": "gptq"}
    first = llmcompress.quantize(merged, tmp_path / "first.gguf", **live).paths[0]
    second = llmcompress.quantize(base, tmp_path / "second.gguf", adapter=adapter, **live).paths[0]
    with GGUFFile.open(first) as one, GGUFFile.open(second) as other:
        assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)
    options = CalibrationOptions(tokens=1024)
    of_merged = calibrate_model(merged, tmp_path / "one.gguf", options, Progress()).statistics.entries
    of_both = calibrate_model(base, tmp_path / "two.gguf", replace(options, adapter=adapter), Progress())
    for name, entry in of_both.statistics.entries.items():
        assert np.array_equal(entry.squares, of_merged[name].squares), name
    exact = llmcompress.quantize(base, tmp_path / "f32.gguf", type="F32", adapter=adapter).paths[0]
    texts = EvaluationOptions(data=("dialogue",), tokens=1024, chunk=256, adapter=adapter)
    apart = evaluate_model(str(exact), str(base), replace(texts, adapter=None), Progress()).evaluation.figures
    found = evaluate_model(str(exact), str(base), texts, Progress()).evaluation.figures
    assert abs(found["mean_kl"].value) < 1e-6 < 1e-3 < apart["mean_kl"].value


def four_bits(base: Path) -> transformers.PreTrainedModel:
    """The model as QLoRA loads it, by bitsandbytes."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        ),
    )  # fmt: skip


def in_four_bits(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """bitsandbytes' decoded weights, and peft's delta on those it adapts."""
    tuned = peft.PeftModel.from_pretrained(four_bits(base), adapter).base_model.model
    state = {}
    for name, module in tuned.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, bitsandbytes.nn.Linear4bit) and not name.endswith("base_layer"):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            state[f"{name}.weight"] = (
                weight + module.get_delta_weight("default") if layer is not module else weight
            )
    return state


def test_an_adapter_trained_in_four_bits_is_merged_onto_them(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """By what finetune wrote, by --onto, and onto a checkpoint that holds NF4; never onto both."""
    base = tiny("qwen3")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    wanted = in_four_bits(base, adapter)
    assert len(wanted) == 14
    plain = merge(base, adapter, tmp_path / "plain")
    found = merge(base, adapter, tmp_path / "onto", onto="nf4")
    (adapter / "finetune.json").write_text(json.dumps({"load": "4bit", "options": {"init": "default"}}))
    own = merge(base, adapter, tmp_path / "own")
    coded = llmcompress.quantize(base, tmp_path / "nf4", format="nf4", double_quant=True).paths[0].parent
    decoded = merge(coded, adapter, tmp_path / "decoded")
    for folder in (found, own, decoded):
        state = load_file(folder / "model.safetensors")
        for name, values in wanted.items():
            torch.testing.assert_close(state[name], values, rtol=1e-6, atol=1e-6, msg=name)
    assert "quantization_config" not in json.loads((decoded / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(
        load_file(plain / "model.safetensors")[name], load_file(base / "model.safetensors")[name]
    )
    with pytest.raises(PlanError, match="is quantized; give the unquantized model"):
        merge(coded, adapter, tmp_path / "other", onto="16bit")
    with pytest.raises(PlanError, match="which experts a model has in 4 bits"):
        experts = save_adapter(tiny("qwen3moe"), tmp_path / "experts", target_modules=["q_proj"])
        merge(tiny("qwen3moe"), experts, tmp_path / "other", onto="nf4")
    with pytest.raises(PlanError, match=r"lies as \(in, out\), .* give --onto 16bit"):
        merge(tiny("gpt2"), save_adapter(tiny("gpt2"), tmp_path / "gpt2"), tmp_path / "other", onto="nf4")
