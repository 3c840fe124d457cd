"""AdaLoRA's ranks while it trains (https://arxiv.org/abs/2303.10512): after every step peft's allocator sets the least
important entries of each layer's diagonal E to zero, fewer and fewer entries staying, and at last always the same ones.

A checkpoint keeps all matrices whole, E with its zeros, so that it can be taken up in any step; which ranks are left is
read off E, and the others are dropped when the adapter is saved for good.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save

from llmcompress.whole_file import whole_file

STATE = (
    "allocator.safetensors"  # in each checkpoint: sums that importance is made of, and the ranks that stay
)
SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's RankAllocator
DIAGONAL = ".lora_E."


class Allocation(transformers.TrainerCallback):
    """Moves ranks between the layers after every step, by gradients that are still there."""

    def __init__(self) -> None:
        self.ranks: dict[str, list[bool]] | None = None  # of each E, as peft last chose them

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step:
            self._restore(_folder(args, state) / STATE, model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        config = model.peft_config["default"]
        config.rank_pattern = self.ranks
        model.base_model.update_and_allocate(state.global_step + 1)
        # With ranks in its config, peft saves matrices without the others, which it then cannot load.
        self.ranks, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        allocator = model.base_model.rankallocator
        tensors = {
            f"{sum}/{name}": value.contiguous()
            for sum in SUMS
            for name, value in getattr(allocator, sum).items()
        }
        tensors |= {f"ranks/{name}": torch.tensor(ranks) for name, ranks in (self.ranks or {}).items()}
        with whole_file(_folder(args, state) / STATE) as file:
            file.write(save(tensors))

    def _restore(self, path: Path, model: Any) -> None:
        found: dict[str, dict[str, Any]] = {sum: {} for sum in (*SUMS, "ranks")}
        for key, value in load_file(path).items():
            sum, _, name = key.partition("/")
            found[sum][name] = value.tolist() if sum == "ranks" else value.to(model.device)
        self.ranks = found.pop("ranks") or None
        for sum, values in found.items():
            setattr(model.base_model.rankallocator, sum, values)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def drop_ranks(model: Any) -> float:
    """Have peft save `model` without the ranks whose entry in E is zero; how many a matrix is left with on average."""
    left = {
        name: (values != 0).view(-1).tolist()
        for name, values in model.get_base_model().named_parameters()
        if DIAGONAL in name
    }
    model.peft_config["default"].rank_pattern = left
    return sum(map(sum, left.values())) / len(left)
