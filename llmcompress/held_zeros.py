"""Fine-tuning that leaves zeros alone: what pruning took away stays away, and training sees it so.

A weight of a matrix that is exactly zero in the checkpoint is held. Weights that are trained themselves get no
gradient there and are set to zero again after every step. A LoRA's product is masked where it is used, in every
forward: W + M * (s B A), M being 1 where W is not zero, so that the sum that is trained is the one that is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional

from llmcompress.adapter_start import adapted_layers, oriented
from llmcompress.errors import LlmcompressError


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights of two or more dimensions by name, before there is an adapter on it."""
    named = model.named_parameters(remove_duplicate=False)  # a tied head by its own name, too
    return {name: weight.detach() for name, weight in named if weight.ndim > 1}


class HeldZeros:
    """The zeros of the matrices that a training changes: `zeros` of their `weights` weights."""

    def __init__(self, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
        """Hold the zeros of `weights` (see `matrices`) in `model`: the model they are of, or a peft model with LoRA on
        it. Raises LlmcompressError where there are none."""
        self.kept: list[tuple[nn.Parameter, torch.Tensor]] = []  # bool, where the weight is free
        self.zeros = self.weights = 0
        for name, layer in _adapted(model):
            self._mask_product(name, layer, weights)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for name, weight in base.named_parameters():
            if weight.requires_grad and weight.ndim > 1 and _plain(name) in weights:
                self._mask_gradient(weight, weights[_plain(name)])
        if not self.zeros:
            raise LlmcompressError(
                "--keep-zeros: no trained matrix of the model has a zero; prune it first, or leave the flag out"
            )

    def _mask_product(self, name: str, layer: Any, weights: Mapping[str, torch.Tensor]) -> None:
        kept = self._counted(weights[f"{name}.weight"])
        layer.register_buffer("kept", kept.to(layer.get_base_layer().weight.device), persistent=False)
        layer.lora_variant["default"] = MaskedProduct()

    def _mask_gradient(self, weight: nn.Parameter, source: torch.Tensor) -> None:
        kept = self._counted(source).to(weight.device)
        if kept.all():
            return
        weight.register_hook(lambda gradient: gradient * kept)
        self.kept.append((weight, kept))

    def _counted(self, weight: torch.Tensor) -> torch.Tensor:
        kept = weight != 0
        self.weights += kept.numel()
        self.zeros += kept.numel() - int(kept.sum())
        return kept

    @torch.no_grad()
    def restore(self) -> None:
        """Set the held weights to zero, whatever an optimizer made of them."""
        for weight, kept in self.kept:
            weight.mul_(kept)


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    return adapted_layers(model) if hasattr(model, "get_base_model") else iter(())


def _plain(name: str) -> str:
    """What the unadapted model calls a weight that peft trains whole."""
    return name.replace("modules_to_save.default.", "")


class MaskedProduct(LoraVariant):
    """peft's place for another LoRA: the product B A counts only where the layer's `kept` is true."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing is added to the adapter."""

    @staticmethod
    def masked(module: Any, adapter: str) -> torch.Tensor:
        """The change of the weight, as the layer keeps it: (out, in), GPT-2's (in, out)."""
        return module.get_delta_weight(adapter) * module.kept

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + cls.masked(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += cls.masked(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - cls.masked(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        change = oriented(module, cls.masked(module, active_adapter))
        return result + functional.linear(module.lora_dropout[active_adapter](x), change)


class Restore(transformers.TrainerCallback):
    """Holds zeros after every step of the optimizer."""

    def __init__(self, zeros: HeldZeros) -> None:
        self.zeros = zeros

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.zeros.restore()
