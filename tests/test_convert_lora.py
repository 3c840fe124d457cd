"""Adapters as GGUF: llama.cpp with ours on our GGUF of the base, against peft on the same two folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llama_cpp import Model
from llmcompress.converters.lora_to_gguf import plan_lora, run_lora
from peft_adapters import save_adapter, tuned_logits
from test_architectures import NAMES, assert_same_logits, ids_of

import llmcompress


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_with_an_adapter_are_pefts(name: str, kind: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny(name)
    adapter = save_adapter(folder, tmp_path / "adapter", kind)
    ids = ids_of(folder)
    wanted = tuned_logits(folder, adapter, ids)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    converted = run_lora(plan_lora(adapter, folder, tmp_path / "adapter.gguf"))
    with Model(base) as model:
        plain = model.logits(ids)
        assert abs(plain - wanted).max() > 0.05 * abs(wanted).max(), "an adapter this weak would prove nothing"
        model.use_adapter(converted)
        assert_same_logits(model.logits(ids), wanted, 1e-3)
