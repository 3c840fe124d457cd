"""Learning from larger models: their next tokens' probabilities, hidden states and attention maps.

The loss is (1 - soft) * L + soft * T² KL(p || q) + hidden * H + attention * A, each of the positions that predict a
learned token, summed over them and divided by their number: L the tokens' own loss; p and q the teacher's and the
student's probabilities at temperature T (Hinton et al. 2015, https://arxiv.org/abs/1503.02531); H the squared error of
hidden states over the teacher's square, where the widths differ after a matrix that is learned along (FitNets,
https://arxiv.org/abs/1412.6550); A the KL divergence of attention maps (TinyBERT's pairs of layers,
https://arxiv.org/abs/1909.10351). Of several teachers the weighted mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from llmcompress.errors import LlmcompressError
from llmcompress.row_packing import IGNORED
from llmcompress.tuning_options import TuningOptions

PROJECTIONS = "to_teacher"  # what the student calls the matrices that are learned along


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ T² KL(p || q) over rows, in nats: logits (n, vocabulary), of the tokens that both have.

    T² keeps the gradients as large as those of the tokens' own loss.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    log_q = functional.log_softmax(student[:, :size].float() / temperature, -1)
    log_p = functional.log_softmax(teacher[:, :size].float() / temperature, -1)
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ |s - t|² / |t|² over rows: hidden states (n, width). A few positions are far larger than all others (the first of
    a text), and would be all there is without the division."""
    wanted = teacher.float()
    return ((student.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).sum()


def attention_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ KL(p || q) over rows, in nats: attention maps (n, heads, keys), the mean over heads; where there are other
    numbers of heads, of their mean."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    log_q = student.float().clamp_min(1e-9).log()
    return functional.kl_div(log_q, teacher.float(), reduction="sum") / student.shape[1]


@dataclass(frozen=True)
class Teacher:
    """A model to learn from, its share of 1 among all, and which of its blocks each of the student's is held against."""

    model: Any
    share: float
    pairs: tuple[tuple[int, int], ...]  # (student, teacher), from 0


def pairs_of(layer_map: str | None, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Blocks of the student and of the teacher, given how many they have: as `layer_map` says, else each with the one as
    far up, the last with the last. Raises LlmcompressError."""
    if layer_map is None:
        return tuple((at, max(0, round((at + 1) * teacher / student) - 1)) for at in range(student))
    pairs = []
    for text in layer_map.split(","):
        found = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
        if not found:
            raise LlmcompressError(
                f"--layer-map {layer_map}: write it as STUDENT:TEACHER,..., such as 0:0,1:3"
            )
        pair = int(found[1]), int(found[2])
        for at, blocks, whose in ((pair[0], student, "student"), (pair[1], teacher, "teacher")):
            if at >= blocks:
                raise LlmcompressError(f"--layer-map {layer_map}: the {whose} has blocks 0 to {blocks - 1}")
        pairs.append(pair)
    return tuple(pairs)


def teachers_of(
    student: Any, models: Sequence[Any], weights: Sequence[float], options: TuningOptions
) -> list[Teacher]:
    """The teachers as `Distiller` takes them, none of them trained. Where hidden states differ in width, `student` gets
    a matrix for each pair. Raises LlmcompressError."""
    size = student.config.get_text_config()
    found, matrices = [], nn.ModuleDict()
    for number, (model, weight) in enumerate(zip(models, weights, strict=True)):
        own = model.config.get_text_config()
        pairs = pairs_of(options.layer_map, size.num_hidden_layers, own.num_hidden_layers)
        if options.hidden and own.hidden_size != size.hidden_size:
            for pair in pairs:
                matrices[_key(number, *pair)] = nn.Linear(size.hidden_size, own.hidden_size, bias=False)
        found.append(Teacher(model.eval().requires_grad_(False), weight / sum(weights), pairs))
    if matrices and options.method != "full":
        raise LlmcompressError(
            f"--hidden: the student is {size.hidden_size} wide and a teacher is not, which takes --method full"
        )
    if matrices:
        student.add_module(PROJECTIONS, matrices.to(student.device))
    return found


def drop_projections(student: Any) -> None:
    """Take away what only the training needed."""
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)


def _key(teacher: int, block: int, theirs: int) -> str:
    return f"{teacher}-{block}-{theirs}"


class Distiller(transformers.Trainer):
    """A Trainer whose loss has teachers in it. Evaluations measure that loss, too: a model may come nearer to its teacher
    while the text itself becomes less likely."""

    def __init__(
        self, *args: Any, teachers: Sequence[Teacher], options: TuningOptions, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teachers, self.options = teachers, options
        self.asked = {"output_hidden_states": options.hidden > 0, "output_attentions": options.attention > 0}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        """As the Trainer's: the mean over `num_items_in_batch` learned tokens, or over those of this batch."""
        loss, outputs = super().compute_loss(model, {**inputs, **self.asked}, True, num_items_in_batch)
        learned = inputs["labels"][:, 1:] != IGNORED
        given = {name: value for name, value in inputs.items() if name != "labels"}
        distance = torch.zeros((), device=loss.device)
        for number, teacher in enumerate(self.teachers):
            with torch.no_grad():
                wanted = teacher.model(**given, **self.asked)
            distance = distance + teacher.share * self._distance(number, teacher, outputs, wanted, learned)
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            distance = distance * self.accelerator.num_processes  # gradients are averaged over them
        loss = (1 - self.options.soft) * loss + distance / count
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """In place of a batch's logits the sum of its loss and the number of its learned tokens, float64 (1, 2)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        return loss, torch.stack([loss.double() * count, count.double()])[None], inputs["labels"]

    def _distance(
        self, number: int, teacher: Teacher, student: Any, wanted: Any, learned: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the positions before those `learned`, (rows, tokens - 1)."""
        options = self.options
        total = torch.zeros((), device=learned.device)
        if options.soft:
            logits = (each.logits[:, :-1][learned] for each in (student, wanted))
            total = total + options.soft * soft_loss(*logits, options.temperature)
        projections = getattr(self.accelerator.unwrap_model(self.model), PROJECTIONS, {})
        for block, theirs in teacher.pairs if options.hidden else ():
            own = student.hidden_states[block + 1][:, :-1][learned]
            if (key := _key(number, block, theirs)) in projections:
                own = projections[key](own)
            loss = hidden_loss(own, wanted.hidden_states[theirs + 1][:, :-1][learned])
            total = total + options.hidden / len(teacher.pairs) * loss
        for block, theirs in teacher.pairs if options.attention else ():
            maps = (
                each.attentions[at].transpose(1, 2)[:, :-1][learned]
                for each, at in ((student, block), (wanted, theirs))
            )
            total = total + options.attention / len(teacher.pairs) * attention_loss(*maps)
        return total
