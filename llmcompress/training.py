"""transformers' Trainer over a model or a peft model: what is passed to it, and how it tells where it is.

Through accelerate, so that `accelerate launch -m llmcompress finetune ...` spreads it over devices and machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.utils.data import Dataset

from llmcompress.adalora import Allocation
from llmcompress.distillation import Distiller, Teacher
from llmcompress.errors import LlmcompressError, RunError
from llmcompress.held_zeros import HeldZeros, Restore
from llmcompress.progress import Progress
from llmcompress.row_packing import IGNORED, Collator, rows_of
from llmcompress.tuning_data import Example, TuningData
from llmcompress.tuning_options import MICRO_TOKENS, Chosen, TuningOptions

HELD_OUT = "eval_held_out"  # the Trainer's name of the held-out loss: nats for each learned token


@dataclass
class Curve:
    """Losses in nats for each learned token, by step of the optimizer; `held_out` begins with the untuned model's."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, history: Sequence[dict[str, float]]) -> Curve:
        """From the Trainer's log."""
        return cls(
            [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry],
            [(int(entry["step"]), entry[HELD_OUT]) for entry in history if HELD_OUT in entry],
        )

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest held-out loss."""
        return min(self.held_out, key=lambda point: point[1], default=None)


class Items(Dataset):
    """A list as torch wants it."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> Any:
        return self.items[at]


def trainer_of(
    model: Any,
    data: TuningData,
    options: TuningOptions,
    figures: Chosen,
    folder: Path,
    length: int,
    pack: bool,
    bf16: bool,
    resumes: bool,
    progress: Progress,
    zeros: HeldZeros | None = None,
    teachers: Sequence[Teacher] = (),
) -> transformers.Trainer:
    """A Trainer that keeps its checkpoints in `folder`; bf16: products in bfloat16, what is trained and the optimizer in
    float32. It holds `zeros`, and learns from `teachers`."""
    measured = bool(data.validation)
    arguments = _arguments(options, figures, folder, length, bf16, measured, resumes, model.device.type)
    callbacks: list[transformers.TrainerCallback] = [Told(progress)]
    if measured and options.patience:
        callbacks.append(transformers.EarlyStoppingCallback(options.patience))
    if options.method == "adalora":
        callbacks.append(Allocation())
    if zeros:
        callbacks.append(Restore(zeros))
    kind = partial(Distiller, teachers=teachers, options=options) if teachers else transformers.Trainer
    trainer = kind(
        model, arguments, data_collator=Collator(length, pack), train_dataset=Items(data.train),
        eval_dataset=Items(_measured_rows(data.validation, length, pack)) if measured else None,
        callbacks=callbacks, compute_metrics=_mean_loss,
        preprocess_logits_for_metrics=None if teachers else _row_losses,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _arguments(
    options: TuningOptions, figures: Chosen, folder: Path, length: int, bf16: bool, measured: bool, resumes: bool, device: str,
) -> transformers.TrainingArguments:  # fmt: skip
    settings = dict(
        output_dir=str(folder), max_steps=figures.steps, per_device_train_batch_size=figures.micro_batch,
        gradient_accumulation_steps=figures.accumulation, learning_rate=figures.learning_rate,
        lr_scheduler_type=options.schedule, warmup_steps=figures.warmup, optim=figures.optimizer, bf16=bf16,
        per_device_eval_batch_size=max(1, MICRO_TOKENS // length), eval_strategy="steps" if measured else "no", eval_steps=figures.every,
        eval_on_start=measured and not resumes, save_steps=figures.every, save_total_limit=1,
        load_best_model_at_end=measured,
        metric_for_best_model=HELD_OUT if measured else None, greater_is_better=False if measured else None,
        logging_steps=max(1, figures.every // 5), label_names=["labels"], remove_unused_columns=False,
        report_to="none", disable_tqdm=True, seed=options.seed, use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda", ddp_find_unused_parameters=False,
        **_recomputing(figures.gradient_checkpointing),
    )  # fmt: skip
    try:
        return transformers.TrainingArguments(**settings)
    except (ValueError, ImportError) as error:
        raise LlmcompressError(
            f"--schedule {options.schedule}, --optimizer {figures.optimizer}: {' '.join(str(error).split())[:300]}"
        ) from None


def _recomputing(asked: bool) -> dict[str, Any]:
    """The Trainer's arguments for keeping few activations; transformers 5 has renamed them."""
    if not asked:
        return {}
    known = {field.name for field in fields(transformers.TrainingArguments)}
    word = "activation" if "activation_checkpointing" in known else "gradient"
    return {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": False}}


def _measured_rows(examples: Sequence[Example], length: int, pack: bool) -> list[list[Example]]:
    """Rows made once, so that one of them is one sample of the Trainer's, on however many devices."""
    return rows_of(examples, length) if pack else [[example] for example in examples]


def _row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the losses and number of the targets of each row, float64 `(rows, 2)`."""
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.double().sum(1), (targets != IGNORED).double().sum(1)], 1)


def _mean_loss(found: transformers.EvalPrediction) -> dict[str, float]:
    total, count = np.asarray(found.predictions, np.float64).reshape(-1, 2).sum(0)
    return {HELD_OUT.removeprefix("eval_"): float(total / count)}


class Told(transformers.TrainerCallback):
    """Tells a Progress of steps and losses. A loss that is no number ends the run."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.train = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start("training", state.max_steps, "steps")
            self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        for name in ("loss", HELD_OUT):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RunError(
                    f"step {state.global_step}: the loss is {logs[name]}; give a smaller --lr, or --dtype f32"
                )
        self.train = logs.get("loss", self.train)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and HELD_OUT in metrics:
            trained = "" if math.isnan(self.train) else f", training {self.train:.4f}"
            self.progress.say(f"step {state.global_step}: held-out loss {metrics[HELD_OUT]:.4f}{trained}")
