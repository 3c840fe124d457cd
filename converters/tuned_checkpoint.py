"""A tuned model as an ordinary checkpoint: one that was trained whole, or an adapter merged with zeros held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from llmcompress.converters.merge import plan_merge, run_merge

from llmcompress.checkpoint import Checkpoint
from llmcompress.companions import copy_companions
from llmcompress.distillation import drop_projections
from llmcompress.errors import LlmcompressError, RunError, nearest
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def train_whole(model: Any, targets: Sequence[str]) -> None:
    """Train all weights of a model, or those of the modules whose names end as `targets`. Raises LlmcompressError for
    one that the model has not."""
    words = {word for name, _ in model.named_modules() for word in name.split(".")}
    for target in targets:
        if target not in words:
            raise LlmcompressError(f"--target {target}: the model has no such module{nearest(target, words)}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not targets or not set(targets).isdisjoint(name.split(".")))


def save_whole(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a model that was trained whole as `checkpoint` is: the type that most of its weights have, its tokenizer.

    Raises RunError for a weight that is no finite number in that type.
    """
    drop_projections(model)
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.index.values():
        sizes[tensor.dtype] += tensor.nbytes
    model.to(TYPES[sizes.most_common(1)[0][0]])
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise RunError(f"{name}: holds what is no finite number in {weight.dtype}; give a smaller --lr")
    transformers.utils.logging.disable_progress_bar()
    model.config.use_cache = checkpoint.config.get("use_cache", True)
    model.save_pretrained(folder)
    copy_companions(checkpoint.directory, folder)


def save_merged(checkpoint: Checkpoint, adapter: Path, folder: Path, progress: Progress) -> None:
    """Write `checkpoint` with an adapter in it, as `llmcompress merge` does: `adapter` says that zeros are held."""
    run_merge(plan_merge(checkpoint.directory, adapter, folder, Recipe()), progress)
