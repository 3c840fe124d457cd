"""The models that another one learns from: opened, loaded, and held against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llmcompress.converters.model import read_tokenizer

from llmcompress.checkpoint import Checkpoint
from llmcompress.distillation import Teacher, teachers_of
from llmcompress.errors import LlmcompressError
from llmcompress.frozen_model import load_frozen, stored_bits
from llmcompress.json_object import read_object
from llmcompress.text_sources import weighed_sources
from llmcompress.tuning_options import TuningOptions


def open_teachers(options: TuningOptions, student: Checkpoint) -> list[tuple[Checkpoint, float]]:
    """The checkpoints of `options` and their weights. Raises LlmcompressError where one is of other tokens than the
    `student`: probabilities of other tokens teach nothing."""
    if not options.teachers:
        return []
    found = []
    own = read_tokenizer(student.directory).get_vocab()
    for name, weight in weighed_sources(options.teachers, share=False).items():
        checkpoint = Checkpoint.open(name)
        theirs = read_tokenizer(checkpoint.directory).get_vocab()
        if theirs != own:
            other = sum(own.get(token) != number for token, number in theirs.items())
            raise LlmcompressError(
                f"--teacher {name}: its tokenizer has {len(theirs)} tokens, {other} of which are not among the "
                f"student's {len(own)} or have another number; both must be of one tokenizer"
            )
        found.append((checkpoint, weight))
    return found


def load_teachers(
    opened: Sequence[tuple[Checkpoint, float]], student: Any, options: TuningOptions, device: torch.device,
    dtype: torch.dtype,
) -> list[Teacher]:  # fmt: skip
    """The models on `device`, in `dtype` or as bitsandbytes stored them. Raises LlmcompressError."""
    models = []
    for checkpoint, _ in opened:
        where = checkpoint.directory / "config.json"
        bits = stored_bits(read_object(where), str(where)) or "16bit"
        models.append(load_frozen(checkpoint.directory, bits, device, dtype, options.attention > 0))
    return teachers_of(student, models, [weight for _, weight in opened], options)
