"""An independent reader of GPTQ checkpoints, written from the format's description."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors; bfloat16 as the bits it has."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                found[name] = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    return found


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis, (n, m), of int32 words, (n * bits / 32, m): each column is one stream of bits."""
    columns = np.ascontiguousarray(words.T).astype("<i4").view(np.uint8)
    stream = np.unpackbits(columns, axis=1, bitorder="little")
    codes = stream.reshape(len(columns), -1, bits)
    return (codes * (1 << np.arange(bits))).sum(-1).T


def decoded(tensors: dict[str, np.ndarray], module: str, bits: int, version: str) -> np.ndarray:
    """The weight (outputs, inputs) of a module, float64."""
    codes = fields(tensors[f"{module}.qweight"], bits)  # (inputs, outputs)
    zeros = fields(np.ascontiguousarray(tensors[f"{module}.qzeros"].T), bits).T  # (groups, outputs)
    zeros = zeros + 1 if version == "gptq" else zeros
    group = tensors[f"{module}.g_idx"]
    scales = tensors[f"{module}.scales"].astype(np.float64)
    return (scales[group] * (codes - zeros[group].astype(np.float64))).T


def modules_of(tensors: dict[str, np.ndarray]) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def write_dequantized(folder: Path, source: Path, out: Path) -> None:
    """`source`, in float32, with the weights that `folder` has in GPTQ's format in their place."""
    tensors = tensors_of(folder)
    config = json.loads((folder / "quantize_config.json").read_text())
    weights = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            weights.update({name: held.get_tensor(name).float() for name in held.keys()})
    modules = modules_of(tensors)
    for module in modules:
        values = decoded(tensors, module, config["bits"], config.get("checkpoint_format", "gptq"))
        name = f"{module}.weight"
        assert weights[name].shape == values.shape
        weights[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    assert modules
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
