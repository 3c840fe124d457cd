"""Quantized checkpoints as the plain ones they stand for: each weight is decoded as its rows are read.

A format is a module with one function, `weights(stored)`, that yields the weights it finds among the stored tensors and
takes their parts. All that it leaves is plain.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmcompress.json_object import read_object
from llmcompress.sources.stored import DecodedTensor, Read, Stored
from llmcompress.tensor_info import TensorInfo

FORMATS = {  # quant_method to the module that reads it
    "gptq": "gptq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
    "awq": "awq",
    "modelopt": "nvfp4",
    "hqq": "hqq",
    "torchao": "torchao",
    "bitnet": "bitnet",
}
# Where writers put the settings that config.json lacks, and what quant_method they go without saying.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Classes that keep linears as (inputs, outputs) but whose codes are those of (outputs, inputs): Conv1D of transformers.
CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}


def settings_of(
    directory: Path, config: Mapping[str, Any], index: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """What says how the weights are quantized; empty if they are plain. Raises CheckpointError."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings:
            return settings if isinstance(settings, dict) else {"quant_method": settings}
    if config.get("weight_bits") == 1:  # the first BitNets
        return {"quant_method": "bitnet", "quantization_mode": "online"}
    if any(name.endswith(".qweight") for name in index):
        for name, method in BESIDE.items():
            if (directory / name).is_file():
                return {"quant_method": method} | read_object(directory / name)
    return {}


def decoded(
    settings: Mapping[str, Any], config: Mapping[str, Any], index: Mapping[str, TensorInfo], read: Read
) -> dict[str, TensorInfo]:
    """The tensors of the plain model, those that are decoded as DecodedTensor. Raises CheckpointError for a weight
    with a part that is missing or does not fit the others."""
    stored = Stored(index, read, settings, config)
    module = importlib.import_module(f"llmcompress.sources.{FORMATS[str(settings['quant_method'])]}")
    found = {tensor.name: _in_place(tensor, config) for tensor in module.weights(stored)}
    return {name: tensor for name, tensor in stored.left.items() if name not in found} | found


def forms(index: Mapping[str, TensorInfo]) -> list[str]:
    """A line that says what weights were decoded from, if any were."""
    counts = Counter(tensor.form for tensor in index.values() if isinstance(tensor, DecodedTensor))
    listed = ", ".join(f"{form} ({count} weights)" for form, count in counts.items())
    return [f"decoded from {listed}"] if counts else []


def _in_place(tensor: DecodedTensor, config: Mapping[str, Any]) -> DecodedTensor:
    """The tensor in the shape that its class keeps it in."""
    last = tensor.name.removesuffix(".weight").rpartition(".")[2]
    if last in CONV1D.get(str(config.get("model_type")), ()):
        return replace(tensor, shape=tensor.shape[::-1], transposed=True)
    return tensor
