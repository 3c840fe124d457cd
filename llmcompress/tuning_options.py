"""What a fine-tuning is asked to do, and what is chosen where nothing is asked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmcompress.errors import LlmcompressError, nearest

METHODS = ("lora", "rslora", "dora", "adalora", "full")
INITS = ("default", "pissa", "loftq")
DTYPES = ("auto", "f32", "bf16")

FEWEST_STEPS, MOST_EPOCHS = 300, 10  # small data is shown more often, until there are so many steps
LARGE = 1000  # steps in an epoch from which one epoch is enough
ALPHA = {"rslora": 4.0}  # rsLoRA divides by the root of the rank: at rank 64 the same as 32 of the others
MICRO_TOKENS = (
    4096  # tokens of the longest examples that are run at once: their logits are the largest thing there is
)
FULL_RATE = 0.1  # learning rate of whole weights, over an adapter's
CHECKPOINTED = 500_000_000  # weights from which activations are computed twice rather than kept


@dataclass(frozen=True)
class TuningOptions:
    """Fields that are None are chosen by the model and the data; `Chosen` has the result.

    `load`: bits of the frozen weights, 4bit, 8bit or 16bit; as the checkpoint has them by default. `batch`: examples in a step of the optimizer, over all
    devices; `micro_batch` of them at once on each. `validation`: a source, or a fraction to hold out. `patience`:
    evaluations without progress after which it stops; 0 never.

    `keep_zeros`: zeros of the model's matrices stay zeros. `teachers`: models to learn from, each MODEL or
    MODEL=WEIGHT; what of them, see distillation.py: `soft` is the share of their logits in the loss, at `temperature`,
    `hidden` and `attention` weigh hidden states and attention maps, of the blocks that `layer_map` pairs.
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
    keep_zeros: bool = False
    teachers: tuple[str, ...] = ()
    soft: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    layer_map: str | None = None  # STUDENT:TEACHER blocks, such as 0:0,1:3; by default evenly

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
            ("--evaluations", self.evaluations), ("--temperature", self.temperature),
        ):  # fmt: skip
            if value is not None and not 0 < value < math.inf:
                raise LlmcompressError(f"{flag} {value}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise LlmcompressError(f"--dropout {self.dropout}: give a share from 0 to 1")
        if self.epochs and self.steps:
            raise LlmcompressError(f"--epochs {self.epochs} and --steps {self.steps}: give one of the two")
        if self.init != "default" and self.method not in ("lora", "rslora"):
            raise LlmcompressError(f"--init {self.init}: with --method lora or rslora, not {self.method}")
        if self.method == "full" and self.load not in (None, "16bit"):
            raise LlmcompressError(f"--method full: trains the weights themselves, not those in {self.load}")
        if self.keep_zeros and (self.method not in ("lora", "rslora", "full") or self.init != "default"):
            how = f"--method {self.method}" if self.init == "default" else f"--init {self.init}"
            raise LlmcompressError(f"--keep-zeros: with --method lora, rslora or full, not with {how}")
        self._check_distillation()

    def _check_distillation(self) -> None:
        if not 0 <= self.soft <= 1:
            raise LlmcompressError(f"--soft {self.soft}: give a share from 0 to 1")
        for flag, value in (("--hidden", self.hidden), ("--attention", self.attention)):
            if not 0 <= value < math.inf:
                raise LlmcompressError(f"{flag} {value}: give a weight of 0 or more")
        if not self.teachers and (self.hidden or self.attention or self.layer_map):
            raise LlmcompressError(
                "--hidden, --attention and --layer-map: what is learned of a --teacher; name one"
            )
        if self.teachers and not (self.soft or self.hidden or self.attention):
            raise LlmcompressError(
                "--soft 0: nothing of the teacher is learned; give --hidden or --attention"
            )


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
    Thinking Machines found over 14 Llama and Qwen models ("LoRA Without Regret", 2025); of whole weights, a tenth.
    """
    micro = options.micro_batch or max(1, min(options.batch // devices, MICRO_TOKENS // longest))
    accumulation = max(1, round(options.batch / (micro * devices)))
    in_epoch = max(1, math.ceil(examples / (micro * accumulation * devices)))
    if options.steps:
        steps = options.steps
    else:
        wanted = options.epochs or _epochs(in_epoch)
        steps = max(1, math.ceil(wanted * in_epoch))
    rate = 5e-4 * (2000 / hidden) ** 0.78 * (FULL_RATE if options.method == "full" else 1)
    return Chosen(
        alpha=options.alpha or ALPHA.get(options.method, 32.0),
        learning_rate=options.learning_rate or rate,
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
