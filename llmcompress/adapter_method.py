"""The adapter that is trained: peft's configuration for each method, and its form when it is saved."""

from __future__ import annotations

from typing import Any

import peft

from llmcompress.errors import LlmcompressError, nearest
from llmcompress.tuning_options import Chosen, TuningOptions


def with_adapter(model: Any, options: TuningOptions, figures: Chosen) -> peft.PeftModel:
    """The model with an adapter on every linear layer but the output, or on `options.targets`, trained in float32.

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
        "modules_to_save": list(options.train_also) or None,
    }  # fmt: skip
    if options.method == "adalora":
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
    return peft.get_peft_model(model, config)


def unadapted(model: peft.PeftModel) -> list[str]:
    """Stacked matrices, such as fused experts, which are no linear layers and so stay as they are."""
    return [
        name
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.ndim == 3 and not parameter.requires_grad and "conv" not in name
    ]
