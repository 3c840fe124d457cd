"""The model under an adapter: 4-bit codes that stay what they are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers

from llmcompress.errors import CheckpointError, LlmcompressError
from llmcompress.frozen_model import keep_codes, load_frozen, stored_bits

IDS = torch.arange(2, 34)[None]
CPU = torch.device("cpu")
REPACKS = bitsandbytes.functional.has_avx512bf16()  # the CPU on which bitsandbytes repacks


def codes(model: torch.nn.Module) -> dict[str, bytes]:
    """All that a checkpoint of a 4-bit model holds of its layers, as it lies in memory."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            found[name] = module.weight.data.numpy().tobytes() + state.absmax.float().numpy().tobytes()
    return found


def test_a_forward_in_eval_mode_leaves_the_codes_as_they_are(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_frozen(tiny("llama"), "4bit", CPU, torch.float32).eval()
    before = codes(model)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert before and codes(model) == before
    model.save_pretrained(tmp_path / "saved")
    again = load_frozen(tmp_path / "saved", "4bit", CPU, torch.float32).eval()
    assert codes(again) == before
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, logits)


@pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone")
def test_without_the_guard_the_codes_are_changed(tiny: Callable[[str], Path]) -> None:
    """Should a bitsandbytes mend this, the guard can go."""
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=quantization)
    before = codes(model.eval())
    with torch.no_grad():
        model(input_ids=IDS)
    assert codes(model) != before


def test_shapes_that_the_packed_kernels_refuse_run() -> None:
    layer = bitsandbytes.nn.Linear4bit(96, 40, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) / 10
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer = layer.to("cpu").eval()
    assert keep_codes(layer) == 1
    with torch.no_grad():
        found = layer(torch.eye(96)).T
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(found, expected) and (found - weight).abs().max() < 0.3


def test_eight_bits_and_sixteen(tiny: Callable[[str], Path]) -> None:
    whole = load_frozen(tiny("llama"), "16bit", CPU, torch.float32)
    eight = load_frozen(tiny("llama"), "8bit", CPU, torch.float32)
    with torch.no_grad():
        logits, near = (model(input_ids=IDS).logits for model in (whole, eight))
    error = (near - logits).norm() / logits.norm()
    assert 0 < error < 0.1 and not whole.config.use_cache


def test_what_a_config_says_of_its_quantization() -> None:
    assert stored_bits({}, "here") is None
    four = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert stored_bits(four, "here") == "4bit"
    assert stored_bits({"quantization_config": {"quant_method": "bitsandbytes"}}, "here") == "8bit"
    for other in ({"quant_method": "gptq"}, "odd"):
        with pytest.raises(CheckpointError, match="here: the weights are quantized by"):
            stored_bits({"quantization_config": other}, "here")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match="--load 5bit: is none of"):
        load_frozen(tmp_path, "5bit", CPU, torch.float32)
    with pytest.raises(CheckpointError, match="transformers cannot load it in 16bit"):
        load_frozen(tmp_path, "16bit", CPU, torch.float32)
