"""The formats of checkpoints, by the word the user types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmcompress.converters.coded_linears import CodedPlan, Format, plan_coded
from llmcompress.converters.to_bitsandbytes import EightBit, FourBit
from llmcompress.converters.to_gptq import GptqFormat

from llmcompress.recipe import Recipe

FORMATS: dict[str, Callable[[Recipe], Format]] = {
    "gptq": GptqFormat, "nf4": FourBit, "fp4": FourBit, "int8": EightBit,
}  # fmt: skip


def plan_checkpoint(model: str | Path, out: str | Path, recipe: Recipe) -> CodedPlan:
    """What `recipe` will do to `model`. Raises LlmcompressError as `plan_coded` does."""
    return plan_coded(model, out, recipe, FORMATS[recipe.format](recipe))
