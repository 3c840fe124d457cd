"""The adapter that is trained: peft's configuration for each method, and its form when it is saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import LlmcompressError, nearest
from llmcompress.tuning_options import Chosen, TuningOptions

# Which layers peft refuses where mixers are fused kernels that read these weights themselves, past any adapter.
READ_BY_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def with_adapter(
    model: Any, options: TuningOptions, figures: Chosen, other_senses: Sequence[str] = ()
) -> peft.PeftModel:
    """The model with an adapter on every linear layer but the output, or on `options.targets`, trained in float32.
    `other_senses`: names of modules that stay as they are with all that is in them, such as vision_tower.

    lora: Hu et al. 2021; rslora: Kalajdzievski 2023; dora: Liu et al. 2024; adalora: Zhang et al. 2023, half as much
    again of the rank to begin with, the rank on average in the end. Raises LlmcompressError for a target that the
    model has not.
    """
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for word in (*options.targets, *options.train_also):
        if word not in last:
            flag = "--target" if word in options.targets else "--train-also"
            raise LlmcompressError(f"{flag} {word}: the model has no such module{nearest(word, last)}")
    given = {
        "task_type": "CAUSAL_LM", "lora_alpha": figures.alpha, "lora_dropout": options.dropout,
        "target_modules": list(options.targets) or "all-linear",
        "modules_to_save": list(options.train_also) or None, "exclude_modules": _excluded(model, options, other_senses),
    }  # fmt: skip
    if options.method == "adalora":
        if figures.steps < 2:
            raise LlmcompressError("--steps 1: adalora chooses ranks by what it saw before; give at least 2")
        config = peft.AdaLoraConfig(
            init_r=round(1.5 * options.rank), target_r=options.rank, total_step=figures.steps,
            tinit=figures.steps // 10, tfinal=figures.steps // 3, **given,
        )  # fmt: skip
    else:
        config = peft.LoraConfig(
            r=options.rank,
            use_rslora=options.method == "rslora",
            use_dora=options.method == "dora",
            **given,
        )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise LlmcompressError(
            f"peft cannot adapt this model so: {' '.join(str(error).split())[:300]}; give other layers by --target"
        ) from None


def _excluded(model: Any, options: TuningOptions, other_senses: Sequence[str]) -> str | None:
    """A pattern of modules that no adapter goes on, or None."""
    patterns = [_of_other_senses(other_senses)] if other_senses else []
    if model.config.model_type in READ_BY_KERNELS and not options.targets:
        patterns.append(r".*\.out_proj")
    pattern = "|".join(patterns)
    found = pattern and any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    return pattern if found else None


def _of_other_senses(other_senses: Sequence[str]) -> str:
    return rf"(.*\.)?({'|'.join(map(re.escape, other_senses))})(\..*)?"


def unadapted(model: peft.PeftModel, other_senses: Sequence[str] = ()) -> list[str]:
    """Notes on what stays as it is beside other senses: linear layers but the output, stacked matrices of experts."""
    base = model.get_base_model()
    modules = dict(base.named_modules())
    adapted = {
        f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"
        for name, module in modules.items() if hasattr(module, "lora_A")
    }  # fmt: skip
    output = {f"{name}.weight" for name, module in modules.items() if module is base.get_output_embeddings()}
    linears, stacked = [], []
    for name, parameter in base.named_parameters():
        owner, _, last = name.rpartition(".")
        plain, module = f"{_plain(owner)}.{last}", modules[owner]
        if parameter.requires_grad or plain in adapted or re.fullmatch(_of_other_senses(other_senses), plain):
            continue
        if parameter.ndim == 3 and "conv" not in name:
            stacked.append(plain)
        elif last == "weight" and isinstance(module, (nn.Linear, Conv1D)) and plain not in output:
            linears.append(plain)
    kinds = (("linear layers", linears), ("stacked matrices (experts)", stacked))
    return [f"{len(names)} {what} have no adapter, such as {names[0]}" for what, names in kinds if names]


def _plain(name: str) -> str:
    return re.sub(r"\.(base_layer|original_module)\b", "", name)
