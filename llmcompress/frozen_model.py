"""The model under an adapter: its own weights in 4, 8 or 16 bits, none of which training changes. A model that is
trained whole, and one that is learned from, are loaded the same way.

Four bits are NF4 with double quantization (QLoRA, Dettmers et al. 2023), eight LLM.int8, both by bitsandbytes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from llmcompress.errors import CheckpointError, LlmcompressError, nearest, shown

LOADS = ("4bit", "8bit", "16bit")


def stored_bits(config: dict[str, Any], where: str) -> str | None:
    """How a checkpoint's config says that its weights are quantized, one of LOADS, or None.

    Raises CheckpointError for a quantization other than bitsandbytes's: peft trains few of them.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "bitsandbytes":
        return "4bit" if quantization.get("load_in_4bit") else "8bit"
    raise CheckpointError(
        f"{where}: the weights are quantized by {shown(method)}; fine-tune the unquantized model (--qlora loads it in "
        "4 bits) or one by bitsandbytes"
    )


def load_of(asked: str | None, stored: str | None) -> str:
    """In how many bits the frozen weights are, one of LOADS. Raises LlmcompressError for others than they are stored in."""
    if stored and asked not in (None, stored):
        raise LlmcompressError(f"--load {asked}: the model's weights are stored in {stored}; leave it out")
    return stored or asked or "16bit"


def load_frozen(
    directory: Path, bits: str, device: torch.device, dtype: torch.dtype, attention_maps: bool = False
) -> Any:
    """The model of a directory on `device`, `bits` one of LOADS, computing in `dtype`; a checkpoint in bitsandbytes's
    own form keeps its codes. Attention caches nothing, which packed rows need, and with `attention_maps` is computed in
    the one way that can give them. Raises LlmcompressError."""
    if bits not in LOADS:
        raise LlmcompressError(f"--load {bits}: is none of {', '.join(LOADS)}{nearest(bits, LOADS)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already has a `quantization_config`.*")
            model = _class_of(directory).from_pretrained(
                directory,
                dtype=dtype,
                device_map={"": device},
                quantization_config=_quantization(bits, dtype),
                **({"attn_implementation": "eager"} if attention_maps else {}),
            )
    except (ImportError, ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: transformers cannot load it in {bits}: {' '.join(str(error).split())[:300]}"
        ) from error
    keep_codes(model)
    model.config.use_cache = False
    return model


def unquantized(model: Any) -> list[str]:
    """A note on matrices of a model in 4 or 8 bits that are not, where there are any beside embedding and output."""
    stacked = [
        name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "conv" not in name
    ]
    return [
        f"{len(stacked)} stacked matrices (experts) are not quantized: bitsandbytes takes linear layers alone"
    ] * bool(stacked)


def _class_of(directory: Path) -> Any:
    """What loads the model: some that also see are no causal language model to transformers."""
    config = transformers.AutoConfig.from_pretrained(directory)
    text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    if bits == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return transformers.BitsAndBytesConfig(load_in_8bit=True) if bits == "8bit" else None


def keep_codes(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights in place; how many layers it was told.

    Its CPU path with AVX512-BF16 (0.50.2) turns a layer's codes and scales into another layout in the first forward
    in eval mode, rounds the scales to bfloat16, and refuses shapes it has no kernel for. What is saved, dequantized
    or trained on afterwards is then not the model that was loaded.
    """
    told = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            told += 1
    return told
