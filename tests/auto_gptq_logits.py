"""Logits of a GPTQ checkpoint by the real auto-gptq, in a process of its own, which it patches.

    python auto_gptq_logits.py FOLDER DTYPE LOGITS.npy TOKEN...

auto-gptq 0.7.1 imports four names that transformers and peft no longer have; all of them serve downloads and adapters.
Under transformers 5 it cannot load a model with tied embeddings, whatever wrote it: the output matrix stays as it was drawn.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np
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

from auto_gptq import AutoGPTQForCausalLM  # noqa: E402

folder, dtype, out, *tokens = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(
    folder, device="cpu", use_safetensors=True, disable_exllama=True, disable_exllamav2=True,
    inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=getattr(torch, dtype),
)  # fmt: skip
kinds = {type(module).__name__ for module in model.modules()}
assert "QuantLinear" in kinds, kinds
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[int(token) for token in tokens]])).logits
np.save(out, logits.float().numpy())
