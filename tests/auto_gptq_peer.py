"""The real auto-gptq 0.7.1, in a process of its own, which patches it. It is archived and knows CUDA alone to quantize on.

    python auto_gptq_peer.py logits LOGITS.npy TOKEN,TOKEN... FOLDER...
    python auto_gptq_peer.py quantize MODEL OUT ROWS.json QUANTIZE_CONFIG.json

It imports four names that transformers and peft no longer have; all of them serve downloads and adapters. Under
transformers 5 it cannot load a model with tied embeddings, whatever wrote it: the output matrix stays as it was drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

# Where tools/fresh.py puts it: its wheel has a top-level package `tests`, which no other process should see.
FOLDER = Path(sys.prefix) / "auto-gptq"

DTYPES = ("float16", "float32")


def missing() -> str:
    """Why it cannot run here, or nothing."""
    if not FOLDER.is_dir() and not importlib.util.find_spec("auto_gptq"):
        return f"auto-gptq is neither installed nor in {FOLDER}"
    return "" if importlib.util.find_spec("peft") else "auto-gptq imports peft, which is not installed"


def run(job: str, *arguments: object) -> None:
    """The job in another process. Raises CalledProcessError."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "BUILD_CUDA_EXT": "0"}
    command = [sys.executable, __file__, job, *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)


def patch() -> None:
    import peft.peft_model
    import torch
    import transformers.modeling_utils
    import transformers.utils.hub

    for module, name, value in (
        (transformers.modeling_utils, "no_init_weights", contextlib.nullcontext),
        (transformers.utils.hub, "create_commit", None),
        (transformers.utils.hub, "create_repo", None),
        (peft.peft_model, "PEFT_TYPE_TO_MODEL_MAPPING", {}),
    ):
        if not hasattr(module, name):
            setattr(module, name, value)
    if not importlib.util.find_spec("gekko"):  # 38 MB for one kernel's tuning that does not run here
        sys.modules["gekko"] = types.ModuleType("gekko")
        sys.modules["gekko"].GEKKO = None
    torch.cuda.synchronize = lambda *device: None
    import auto_gptq.modeling._base
    import auto_gptq.modeling._utils

    for module in (auto_gptq.modeling._base, auto_gptq.modeling._utils):
        if hasattr(module, "CUDA_0"):
            module.CUDA_0 = torch.device("cpu")


def logits(out: str, tokens: str, *folders: str) -> None:
    """Those of one row of tokens, float32 (2, folders, tokens, vocabulary): in each of DTYPES, by the model in each
    folder."""
    import numpy as np
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    row, found = torch.tensor([[int(token) for token in tokens.split(",")]]), []
    for dtype in DTYPES:
        for folder in folders:
            model = AutoGPTQForCausalLM.from_quantized(
                folder, device="cpu", use_safetensors=True, disable_exllama=True, disable_exllamav2=True,
                inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=getattr(torch, dtype),
            )  # fmt: skip
            kinds = {type(module).__name__ for module in model.modules()}
            assert "QuantLinear" in kinds, kinds
            with torch.no_grad():
                found.append(model(input_ids=row).logits[0].float().numpy())
    np.save(out, np.stack(found).reshape(len(DTYPES), len(folders), *found[0].shape))


def quantize(source: str, out: str, rows: str, config: str) -> None:
    """A model whose modules are called as Llama's, calibrated on rows of tokens, a JSON list of lists."""
    import torch
    import transformers
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    row_tensors = [torch.tensor([row]) for row in json.loads(Path(rows).read_text())]
    _give_each_layer_its_own_arguments(model, row_tensors)
    settings = BaseQuantizeConfig(**json.loads(Path(config).read_text()))
    wrapped = LlamaGPTQForCausalLM(model, False, settings)
    wrapped.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in row_tensors])
    wrapped.save_quantized(out, use_safetensors=True)


def _give_each_layer_its_own_arguments(model, rows) -> None:
    """auto-gptq calls every layer with the first one's arguments, and expects tuples back; here a layer keeps the mask
    and the rotation that the model gives it for rows of that length."""
    import torch

    layers, kept = model.model.layers, {}

    def keep(layer, arguments, named):
        kept[layer, arguments[0].shape[1]] = named

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        for row in {row.shape[1]: row for row in rows}.values():
            model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    for hook in hooks:
        hook.remove()

    def give(layer, arguments, named):
        return arguments, named | kept[layer, arguments[0].shape[1]]

    for layer in layers:
        layer.register_forward_pre_hook(give, with_kwargs=True)
        layer.register_forward_hook(lambda layer, arguments, output: (output,))


if __name__ == "__main__":
    patch()
    {"logits": logits, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
