"""Pruning in steps, each healed and measured, as far as the loss that the user allows; and in one step, with healing.

A step prunes the last good model further, measures it, and heals it with its zeros held, a round at a time, learning
from the unpruned model. The step's best state goes on if it loses no more than allowed; else another round follows, while
rounds help and up to `patience`, and then the last good state is the result. Losses are those of held-out examples that no round trains
on: nats for each token above the unpruned model's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmcompress.converters.finetuning import examples_of, finetune_model
from llmcompress.converters.model import lockstep_of
from llmcompress.converters.pruning import prune_model

from llmcompress import __version__
from llmcompress.calibrate import batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError, RunError
from llmcompress.evaluate import evaluate
from llmcompress.json_object import read_object
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions
from llmcompress.tuning_options import TuningOptions
from llmcompress.whole_file import require_free_place, whole_file

REPORT = "gradual.json"
LENGTH = 512  # tokens of an example, as calibration has them


@dataclass(frozen=True)
class State:
    """A model on the way, as measured: `loss` is the logarithm of its perplexity over the unpruned model's, with its
    standard error; `healed`: how many rounds of healing it has behind it in this step."""

    folder: str
    sparsity: float
    healed: int
    perplexity: float
    loss: float
    loss_error: float
    mean_kl: float


@dataclass(frozen=True)
class GradualReport:
    """What was reached: all states in order, and which of them is the result. `reference`: the unpruned model's
    perplexity on the held-out examples."""

    path: Path
    states: tuple[State, ...]
    kept: State
    reference: float
    max_loss: float | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": __version__, "reference_perplexity": self.reference, "max_loss": self.max_loss,
            "kept": asdict(self.kept), "states": [asdict(state) for state in self.states], "notes": list(self.notes),
        }  # fmt: skip


def healing_options(dense: Checkpoint, **given: Any) -> TuningOptions:
    """How a pruned model is healed: by what the unpruned one, `dense`, predicts at every token of the texts."""
    length = min(LENGTH, dense.config.get("max_position_embeddings") or LENGTH)
    return TuningOptions(**{"method": "full", "loss": "all", "max_length": length} | given)


def prune_gradually(
    model: str | Path,
    out: str | Path,
    steps: Sequence[PruningOptions],
    data: Sequence[str],
    healing: TuningOptions,
    max_loss: float | None = None,
    patience: int = 1,
    progress: Progress = Progress(),
) -> GradualReport:
    """Prune `model` by each of `steps` in turn into the folder `out`, healing on the sources `data`, with gradual.json
    beside the weights. Without `max_loss` every step is taken after one round.

    Killed, the same call goes on where it stopped. Raises LlmcompressError, among others where not even the first step
    stays within `max_loss`.
    """
    shares = [step.share for step in steps]
    if not steps or any(later <= earlier for earlier, later in zip(shares, shares[1:])):
        raise LlmcompressError(
            f"--schedule {','.join(f'{share:g}' for share in shares)}: give rising sparsities"
        )
    if max_loss is not None and not 0 < max_loss:
        raise LlmcompressError(f"--max-loss {max_loss}: give nats above 0")
    if patience < 1:
        raise LlmcompressError(f"--patience {patience}: give at least 1 round of healing")
    out = Path(out)
    require_free_place(out)
    healing = replace(healing, keep_zeros=True, teachers=(str(model),))
    healing.check()
    with Checkpoint.open(model) as dense:
        return _Descent(dense, out, data, healing, max_loss, patience, progress).take(steps)


class _Descent:
    """The steps of one job, in a folder that remembers every measured state."""

    def __init__(
        self, dense: Checkpoint, out: Path, data: Sequence[str], healing: TuningOptions, max_loss: float | None,
        patience: int, progress: Progress,
    ) -> None:  # fmt: skip
        self.dense, self.out, self.data, self.healing = dense, out, list(data), healing
        self.max_loss, self.patience, self.progress = max_loss, patience, progress
        self.part = out.with_name(out.name + ".part")
        examples, _ = examples_of(dense, data, healing)
        if not examples.validation:
            raise LlmcompressError(
                "--validation 0: steps are measured on examples that are held out; give a share"
            )
        self.rows = [example.ids for example in examples.validation]
        self.sha256 = examples.sha256
        self.states: dict[str, State] = {}
        self.reference = 0.0
        self.notes = list(examples.notes)

    def take(self, steps: Sequence[PruningOptions]) -> GradualReport:
        self._open(steps)
        good: State | None = None
        for number, step in enumerate(steps, 1):
            best = self._step(number, step, good)
            if not self._allowed(best):
                self.notes.append(
                    f"sparsity {step.share:g} was given up: it loses {best.loss:.4f} nats for each token, {self.max_loss:g} "
                    "are allowed"
                )
                break
            good = best
            self._forget(number, good)
        if good is None:
            raise RunError(
                f"{self.dense.directory}: sparsity {steps[0].share:g} loses {best.loss:.4f} nats for each token after "
                f"{best.healed} rounds of healing, --max-loss is {self.max_loss:g}; begin lower, heal longer or allow more "
                f"(its states are in {self.part})"
            )
        return self._deliver(good)

    def _step(self, number: int, options: PruningOptions, good: State | None) -> State:
        """The best state at a sparsity, pruned or after a round of healing: among those allowed, if there are any, the
        one that diverges least from the unpruned model."""
        pruned = f"{number}-pruned"
        source = self.part / good.folder if good else self.dense.directory
        self._make(pruned, lambda out: prune_model(source, out, options, self.progress))
        best = self._measured(pruned, options.share, 0)
        for healed in range(1, self.patience + 1):
            name = f"{number}-healed-{healed}"
            source = self.part / best.folder
            self._make(name, lambda out: finetune_model(source, out, self.data, self.healing, self.progress))
            last = self._measured(name, options.share, healed)
            best = min(best, last, key=lambda state: (not self._allowed(state), state.mean_kl))
            if self._allowed(best) or best != last:  # another round of what did not help is the same again
                break
        return best

    def _allowed(self, state: State) -> bool:
        return self.max_loss is None or state.loss <= self.max_loss

    def _make(self, name: str, make: Any) -> None:
        """A folder of this job's, unless it is there; a state that was measured was there."""
        if name not in self.states and not (self.part / name).exists():
            self.progress.say(name)
            make(self.part / name)

    def _measured(self, name: str, sparsity: float, healed: int) -> State:
        """A folder beside the unpruned model, on the held-out examples."""
        if name not in self.states:
            with Checkpoint.open(self.part / name) as checkpoint:
                models = [lockstep_of(each, "f32", self.healing.device) for each in (checkpoint, self.dense)]
                figures = evaluate(*models, batches_of(self.rows), "transformers", self.progress).figures
            loss = figures["ln_perplexity_ratio"]
            self.reference = figures["reference_perplexity"].value
            self.states[name] = State(
                name, sparsity, healed, figures["perplexity"].value, loss.value, loss.error or 0.0,
                figures["mean_kl"].value,
            )  # fmt: skip
            self._remember()
        found = self.states[name]
        self.progress.say(
            f"{name}: perplexity {found.perplexity:.4f}, {found.loss:+.4f} ± {found.loss_error:.4f} nats, KL {found.mean_kl:.4f}"
        )
        return found

    def _open(self, steps: Sequence[PruningOptions]) -> None:
        """Take up an earlier run of the same job. Raises LlmcompressError where the folder is of another one."""
        job = {
            "model": self.dense.fingerprint(), "steps": [step.as_dict() for step in steps], "data": self.sha256,
            "healing": asdict(self.healing), "max_loss": self.max_loss, "patience": self.patience,
        }  # fmt: skip
        self.job = json.loads(json.dumps(job))
        record = self.part / REPORT
        if record.is_file():
            known = read_object(record)
            other = [key for key, value in self.job.items() if known["job"].get(key) != value]
            if other:
                raise LlmcompressError(
                    f"{self.part}: holds an unfinished run with other {' and '.join(other)}; repeat its command to "
                    "finish it, or remove the folder"
                )
            self.reference = known["reference"]
            self.states = {each["folder"]: State(**each) for each in known["states"]}
            if self.states:
                self.notes.append(f"went on behind {list(self.states)[-1]} of an earlier run")
            return
        require_free_place(self.part)
        self.part.mkdir(parents=True, exist_ok=True)
        self._remember()

    def _remember(self) -> None:
        states = [asdict(state) for state in self.states.values()]
        with whole_file(self.part / REPORT) as file:
            text = json.dumps({"job": self.job, "reference": self.reference, "states": states}, indent=1)
            file.write(text.encode())

    def _forget(self, number: int, good: State) -> None:
        """Throw away the folders that are no longer needed: those before the good state of step `number`."""
        for state in self.states.values():
            if int(state.folder.partition("-")[0]) <= number and state != good:
                shutil.rmtree(self.part / state.folder, ignore_errors=True)

    def _deliver(self, good: State) -> GradualReport:
        report = GradualReport(
            self.out, tuple(self.states.values()), good, self.reference, self.max_loss, tuple(self.notes)
        )
        (self.part / good.folder / REPORT).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        try:
            os.replace(self.part / good.folder, self.out)
        except OSError as error:
            raise RunError(
                f"{self.out}: cannot be written: {error.strerror}; the result is in {self.part / good.folder}"
            ) from None
        shutil.rmtree(self.part, ignore_errors=True)
        return report
