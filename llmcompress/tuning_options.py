"""What a fine-tuning is asked to do, and what is chosen where nothing is asked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmcompress.errors import LlmcompressError, nearest

METHODS = ("lora", "rslora", "dora", "adalora")
INITS = ("default", "pissa", "loftq")
DTYPES = ("auto", "f32", "bf16")

FEWEST_STEPS, MOST_EPOCHS = 300, 10  # small data is shown more often, until there are so many steps
LARGE = 1000  # steps in an epoch from which one epoch is enough
ALPHA = {"rslora": 4.0}  # rsLoRA divides by the root of the rank: at rank 64 the same as 32 of the others
MICRO_TOKENS = (
    4096  # tokens of the longest examples that are run at once: their logits are the largest thing there is
)
CHECKPOINTED = 500_000_000  # weights from which activations are computed twice rather than kept


@dataclass(frozen=True)
class TuningOptions:
    """Fields that are None are chosen by the model and the data; `Chosen` has the result.

    `load`: bits of the frozen weights, 4bit, 8bit or 16bit; as the checkpoint has them by default. `batch`: examples in a step of the optimizer, over all
    devices; `micro_batch` of them at once on each. `validation`: a source, or a fraction to hold out. `patience`:
    evaluations without progress after which it stops; 0 never.
    """

    load: str | None = None
    method: str = "lora"
    init: str = "default"
    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    train_also: tuple[str, ...] = ()  # modules trained whole, such as embeddings
    loss: str = "answers"
    plain: bool = False
    pack: bool = True
    max_length: int | None = None
    validation: str = "0.05"
    epochs: float | None = None
    steps: int | None = None
    batch: int = 16
    micro_batch: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    optimizer: str = "auto"
    gradient_checkpointing: bool | None = None
    evaluations: int = 10
    patience: int = 3
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raises LlmcompressError for what is none of the known, out of range, or does not go together."""
        for flag, value, known in (
            ("--method", self.method, METHODS), ("--init", self.init, INITS), ("--dtype", self.dtype, DTYPES),
        ):  # fmt: skip
            if value not in known:
                raise LlmcompressError(
                    f"{flag} {value}: is none of {', '.join(known)}{nearest(value, known)}"
                )
        for flag, value in (
            ("--rank", self.rank), ("--alpha", self.alpha), ("--epochs", self.epochs), ("--steps", self.steps),
            ("--batch", self.batch), ("--micro-batch", self.micro_batch), ("--lr", self.learning_rate),
            ("--evaluations", self.evaluations),
        ):  # fmt: skip
            if value is not None and not 0 < value < math.inf:
                raise LlmcompressError(f"{flag} {value}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise LlmcompressError(f"--dropout {self.dropout}: give a share from 0 to 1")
        if self.epochs and self.steps:
            raise LlmcompressError(f"--epochs {self.epochs} and --steps {self.steps}: give one of the two")
        if self.init != "default" and self.method not in ("lora", "rslora"):
            raise LlmcompressError(f"--init {self.init}: with --method lora or rslora, not {self.method}")


def parse_options(given: dict[str, Any]) -> TuningOptions:
    """Options by name. Raises LlmcompressError for a name that is none."""
    known = [field.name for field in fields(TuningOptions)]
    for name in given:
        if name not in known:
            raise LlmcompressError(f"finetune(): {name} is none of {', '.join(known)}{nearest(name, known)}")
    return TuningOptions(**given)


@dataclass(frozen=True)
class Chosen:
    """Every figure that a run depends on."""

    alpha: float
    learning_rate: float
    steps: int
    epochs: float
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    optimizer: str
    warmup: int
    every: int  # steps between evaluations, each with a checkpoint

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def chosen(
    options: TuningOptions, examples: int, longest: int, hidden: int, weights: int, devices: int, cuda: bool
) -> Chosen:
    """The figures for a model of `weights` weights and `hidden` units, on `examples` examples of at most `longest`
    tokens.

    The learning rate falls with the width as (2000 / hidden)^0.78 from 5e-4, with an alpha of 32, for any rank: what
    Thinking Machines found over 14 Llama and Qwen models ("LoRA Without Regret", 2025).
    """
    micro = options.micro_batch or max(1, min(options.batch // devices, MICRO_TOKENS // longest))
    accumulation = max(1, round(options.batch / (micro * devices)))
    in_epoch = max(1, math.ceil(examples / (micro * accumulation * devices)))
    if options.steps:
        steps = options.steps
    else:
        wanted = options.epochs or _epochs(in_epoch)
        steps = max(1, math.ceil(wanted * in_epoch))
    return Chosen(
        alpha=options.alpha or ALPHA.get(options.method, 32.0),
        learning_rate=options.learning_rate or 5e-4 * (2000 / hidden) ** 0.78,
        steps=steps,
        epochs=steps / in_epoch,
        micro_batch=micro,
        accumulation=accumulation,
        gradient_checkpointing=(
            weights >= CHECKPOINTED if options.gradient_checkpointing is None else options.gradient_checkpointing
        ),
        optimizer=options.optimizer
        if options.optimizer != "auto"
        else ("paged_adamw_8bit" if cuda else "adamw_torch"),
        warmup=math.ceil(0.05 * steps),
        every=max(1, math.ceil(steps / options.evaluations)),
    )  # fmt: skip


def _epochs(in_epoch: int) -> int:
    if in_epoch >= LARGE:
        return 1
    return min(MOST_EPOCHS, max(3, math.ceil(FEWEST_STEPS / in_epoch)))
