"""Where an adapter starts from the weights: PiSSA and LoftQ, as factors of each matrix, and back to plain LoRA.

PiSSA (Meng et al. 2024): the adapter starts as the matrix's largest singular vectors, the frozen part is the rest.
LoftQ (Li et al. 2023), its first step: the frozen part stays the quantized matrix, the adapter starts as the largest
singular vectors of what quantizing lost. In both the adapter that was trained, A and B, fits only the frozen part it
was trained on; B A - B0 A0 is the change alone, twice the rank, and fits the model that the user named.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from llmcompress.errors import LlmcompressError
from llmcompress.whole_file import whole_file

POWER_ITERATIONS = 8  # of the randomized SVD
EXACT = 1024  # rows or columns up to which the SVD is exact

Factors = dict[str, torch.Tensor]  # "LAYER.lora_A" (rank, in) and "LAYER.lora_B" (out, rank), float32


def start_factors(model: Any, init: str, source: Any) -> Factors:
    """The factors that every adapted layer of `model` (peft) starts with, by the weights of `source`: the unquantized
    model, the same modules. Raises LlmcompressError where the rank is larger than a matrix."""
    matrices = {name: module for name, module in source.named_modules()}
    factors: Factors = {}
    for name, layer in adapted_layers(model):
        weight = oriented(layer, matrices[name].weight.detach().to(torch.float32).cpu())
        frozen = oriented(layer, dequantized(layer.get_base_layer()).cpu())
        rank, scaling = layer.r["default"], layer.scaling["default"]
        if rank > min(weight.shape):
            raise LlmcompressError(
                f"--rank {rank}: {name} is {weight.shape[0]} x {weight.shape[1]}; --init {init} needs a rank of at "
                f"most {min(weight.shape)}"
            )
        factors |= {
            f"{name}.{part}": value
            for part, value in _split(weight if init == "pissa" else weight - frozen, rank, scaling).items()
        }
    return factors


def _split(matrix: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The best A, B of `rank` for scaling B A = matrix, float32."""
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, min(matrix.shape)), niter=POWER_ITERATIONS)
        vh = v.T
    root = (s[:rank] / scaling).sqrt()
    return {"lora_A": (root[:, None] * vh[:rank]).contiguous(), "lora_B": (u[:, :rank] * root).contiguous()}


def install(model: Any, init: str, factors: Factors, source: Any) -> None:
    """Put the factors into the adapter; for PiSSA take them out of the frozen weights, quantized anew where they are."""
    matrices = {name: module for name, module in source.named_modules()}
    for name, layer in adapted_layers(model):
        a, b = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        if init == "pissa":
            weight = oriented(layer, matrices[name].weight.detach().to(torch.float32).cpu())
            rest = weight - layer.scaling["default"] * b @ a
            _replace_weight(layer.get_base_layer(), oriented(layer, rest))
        for part, value in ((layer.lora_A, a), (layer.lora_B, b)):
            part["default"].weight.data.copy_(value)


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers of a peft model that have an adapter, by their name in the model itself."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield name, module


def oriented(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """(out, in): GPT-2's layers keep their weights transposed. Its own inverse."""
    return weight.T.contiguous() if getattr(layer, "fan_in_fan_out", False) else weight


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer multiplies with, float32."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().to(torch.float32)


def _replace_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    old = layer.weight
    device = old.device
    if (state := getattr(old, "quant_state", None)) is not None:
        import bitsandbytes

        layer.weight = bitsandbytes.nn.Params4bit(
            weight.to(state.dtype), requires_grad=False, blocksize=state.blocksize, quant_type=state.quant_type,
            compress_statistics=state.nested, quant_storage=old.quant_storage, module=layer,
        ).to(device)  # fmt: skip
    else:
        old.data.copy_(weight)


def save_factors(path: Path, factors: Factors) -> None:
    """Keep them for a run that goes on: an SVD need not come out the same twice."""
    with whole_file(path) as file:
        file.write(save(factors))


def load_factors(path: Path) -> Factors:
    """What `save_factors` kept."""
    return load_file(path)


def fit_original(folder: Path, factors: Factors) -> None:
    """Turn the adapter saved in `folder`, trained from `factors`, into the change alone: B A - B0 A0 of twice the rank,
    which fits the model itself."""
    from peft import LoraConfig

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        name, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if rest == "A.weight":
            tensors[key] = torch.cat([value, factors[f"{name}.lora_A"].to(value)])
        elif rest == "B.weight":
            tensors[key] = torch.cat([value, -factors[f"{name}.lora_B"].to(value)], dim=1)
    save_file(tensors, path, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(folder)
    growth = 2**0.5 if config.use_rslora else 2.0  # the scaling stays what it was
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.save_pretrained(folder)
