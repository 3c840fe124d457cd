"""Adapters of every kind, made by peft on tiny models: matrices drawn at random, wide enough to change the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ATTENTION_AND_MLP = (
    r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj|c_attn|c_proj|c_fc)"
)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "r": 6, "lora_alpha": 9,
        "rank_pattern": {r"layers\.1\.self_attn\..*_proj": 10, "c_proj": 3, "experts.down_proj": 4},
        "alpha_pattern": {"o_proj": 5, r"h\.0\.attn\.c_attn": 20, "qkv_proj": 7, "experts.gate_up_proj": 11},
    },
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
}  # fmt: skip


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def save_adapter(base: Path, folder: Path, kind: str = "lora", spread: float = 0.1, **values: Any) -> Path:
    """An adapter of `base` in `folder`. `values` are the config's, in place of those of the kind."""
    model = load(base)
    if kind == "adalora":
        ada = {
            "init_r": 6,
            "target_r": 4,
            "lora_alpha": 12,
            "total_step": 10,
            "target_modules": ATTENTION_AND_MLP,
        }
        config = peft.AdaLoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=is_conv1d(model), **ada | values)
    else:
        settings = {"target_modules": ATTENTION_AND_MLP} | KINDS[kind] | values
        if "target_modules" not in values and has_experts(model):
            settings["target_modules"] = r".*\.(q_proj|k_proj|v_proj|o_proj)"
            if kind != "dora":
                settings["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=is_conv1d(model), **settings)
    tuned = peft.get_peft_model(model, config)
    draw(tuned, spread)
    if kind == "adalora":
        keep_few_ranks(tuned)
    tuned.save_pretrained(folder)
    return folder


def is_conv1d(model: transformers.PreTrainedModel) -> bool:
    return hasattr(model, "transformer")


def has_experts(model: transformers.PreTrainedModel) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())


def keep_few_ranks(tuned: peft.PeftModel) -> None:
    """What AdaLoRA's allocator leaves: some ranks of each matrix, of one matrix none."""
    names = [name for name, _ in tuned.base_model.model.named_parameters() if "lora_E" in name]
    kept = [[(rank + number) % 3 != 0 for rank in range(6)] for number, _ in enumerate(names)]
    kept[1] = [False] * 6
    tuned.peft_config["default"].rank_pattern = dict(zip(names, kept))


def draw(tuned: torch.nn.Module, spread: float) -> None:
    """Random numbers for all that was trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(spread * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(spread * torch.randn_like(parameter))


def tuned_logits(base: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    """peft's own, float32 (tokens, vocabulary)."""
    model = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
