"""Models with zeros in them, made without the tool."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pruned(model: Path, out: Path, share: float = 0.5) -> Path:
    """A copy of a tiny model without the smallest `share` of the weights of each matrix in its blocks."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and (".layers." in name or ".h." in name):
            least = tensor.abs().flatten().kthvalue(round(share * tensor.numel())).values
            tensor[tensor.abs() <= least] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def zeros_are_held(source: Path, healed: Path) -> bool:
    """Whether two checkpoints have the same tensors of the same types, the same zeros, and other weights beside them."""
    was, now = (load_file(folder / "model.safetensors") for folder in (source, healed))
    assert was.keys() == now.keys() and all(was[name].dtype == now[name].dtype for name in was)
    matrices = [name for name in was if was[name].ndim > 1 and bool((was[name] == 0).any())]
    assert matrices and any(not torch.equal(was[name], now[name]) for name in matrices)
    return all(torch.equal(was[name] == 0, now[name] == 0) for name in matrices)
