"""Adapters as GGUF: llama.cpp with ours on our GGUF of the base, against peft on the same two folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from llama_cpp import Model
from llmcompress.converters.lora_to_gguf import plan_lora, run_lora
from peft_adapters import save_adapter, tuned_logits
from test_architectures import NAMES, assert_same_logits, ids_of

import llmcompress
from llmcompress.adapter import Adapter
from llmcompress.errors import CheckpointError, PlanError

QUICK = ("llama", "gpt2", "qwen3moe-fused")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_logits_with_an_adapter_are_pefts(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny(name)
    ids = ids_of(folder)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    with Model(base) as model:
        plain = model.logits(ids)
        for kind in ("lora", "rslora", "patterns"):
            adapter = save_adapter(folder, tmp_path / kind, kind)
            wanted = tuned_logits(folder, adapter, ids)
            assert abs(plain - wanted).max() > 0.05 * abs(wanted).max(), (
                "an adapter this weak would prove nothing"
            )
            model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / f"{kind}.gguf")))
            assert_same_logits(model.logits(ids), wanted, 1e-3)


def test_embedding_and_head_of_their_own_are_adapted(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Also AdaLoRA, whose matrices may have lost all ranks, and ranks that no pattern of llama.cpp's would give."""
    folder = tiny("llama")
    ids = ids_of(folder)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    with Model(base) as model:
        targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
        for kind, values in (("lora", {"target_modules": targets}), ("adalora", {})):
            adapter = save_adapter(folder, tmp_path / kind, kind, **values)
            model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / f"{kind}.gguf")))
            assert_same_logits(model.logits(ids), tuned_logits(folder, adapter, ids), 1e-3)


def test_plain_matrices_are_the_adapters_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Nothing is folded in where llama.cpp scales as peft does."""
    folder = tiny("qwen3")
    adapter = save_adapter(folder, tmp_path / "adapter")
    path = run_lora(plan_lora(adapter, folder, tmp_path / "adapter.gguf"))
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    opened = Adapter.open(adapter)
    for update in opened.low_rank:
        if update.name == "model.layers.1.mlp.up_proj.weight":
            assert np.array_equal(found["blk.1.ffn_up.weight.lora_a"], update.a())
            assert np.array_equal(found["blk.1.ffn_up.weight.lora_b"], update.b())
    assert len(found) == 2 * len(opened.low_rank) == 28


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("dora", {}, "a DoRA; .* merge it instead: llmcompress merge"),
        (
            "lora",
            {"modules_to_save": ["lm_head"]},
            "holds whole tensors, such as 'lm_head.weight', .* merge it",
        ),
        (
            "lora",
            {"trainable_token_indices": [3, 4]},
            "holds rows of 'model.embed_tokens.weight', .* merge it",
        ),
        ("lora", {"target_modules": ["embed_tokens"]}, "which llama.cpp takes for the head, too; merge it"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(kind, values, message, tiny, tmp_path: Path) -> None:
    folder = tiny("llama-tied")
    adapter = save_adapter(folder, tmp_path / "adapter", kind, **values)
    with pytest.raises(PlanError, match=message):
        plan_lora(adapter, folder, tmp_path / "adapter.gguf")


def test_an_adapter_of_another_model_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(PlanError, match="k_proj.weight' is changed by matrices of 128x256, .* is 256x256"):
        plan_lora(adapter, tiny("qwen3"), tmp_path / "adapter.gguf")
    with pytest.raises(PlanError, match="no tensor of this name.*give the model it was trained on"):
        plan_lora(adapter, tiny("gpt2"), tmp_path / "adapter.gguf")
    with pytest.raises(CheckpointError, match="no adapter_config.json; give the folder of a peft adapter"):
        plan_lora(tiny("llama"), tiny("llama"), tmp_path / "adapter.gguf")
