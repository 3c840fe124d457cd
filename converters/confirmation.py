"""What `--confirm` measures by: the KL divergence of a model whose tensors have the types of a trial.

Every tensor is quantized to a type once, by the loop that makes the result, into a small GGUF in a temporary folder, and
the model runs with its tensors from whichever of these the trial names.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llmcompress.converters.evaluation import EvaluationOptions, windows_of
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.model import lockstep_of, read_tokenizer, require_fit

from llmcompress.calibrate import batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.evaluate import evaluate, evaluate_against, vocabulary
from llmcompress.filetypes import FILE_TYPES, TypeChoice
from llmcompress.gguf.reader import GGUFFile
from llmcompress.gguf.value import Metadata
from llmcompress.importance import Importance
from llmcompress.logits_file import LogitsReader, LogitsWriter
from llmcompress.output import place
from llmcompress.plan import plan_of
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.run import run
from llmcompress.step import Step

TOKENS = 8192  # read; predictions of every window's second half count


@contextlib.contextmanager
def measured_divergence(
    checkpoint: Checkpoint, recipe: Recipe, metadata: Metadata, progress: Progress, steps: Sequence[Step],
    importance: Importance,
) -> Iterator[Callable[[Sequence[TypeChoice]], float]]:  # fmt: skip
    """A function that gives the mean KL divergence, in nats a token, of a choice for each of `steps`.

    The text is the recipe's data. Raises LlmcompressError as `run` and `evaluate` do.
    """
    options = EvaluationOptions(data=recipe.data, tokens=TOKENS, windows="llama.cpp")
    windows = windows_of(read_tokenizer(checkpoint.directory), options)
    batches = batches_of(windows.rows)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-confirm-")))
        reference = lockstep_of(checkpoint, "f32", options.device)
        require_fit(reference.model, windows.rows)
        progress.say(f"confirming swaps on {len(windows.rows)} windows of {options.chunk} tokens")
        base = folder / "reference.kld"
        with LogitsWriter(base, windows.rows, vocabulary(reference), options.chunk) as save:
            evaluate(reference, None, batches, options.windows, progress, save)
        made = _Made(checkpoint, replace(recipe, verify="off", split_max_size=None), metadata, steps, importance, folder, stack)  # fmt: skip
        logits = stack.enter_context(LogitsReader(base))
        lockstep = None

        def divergence(choices: Sequence[TypeChoice]) -> float:
            nonlocal lockstep
            made.take(choices)
            lockstep = lockstep or lockstep_of(made.decoded, "f32", options.device)
            return evaluate_against(lockstep, logits, batches, progress).figures["mean_kl"].value

        yield divergence


class _Made:
    """GGUF files of the tensors in all types that were asked for so far."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, metadata: Metadata, steps: Sequence[Step],
        importance: Importance, folder: Path, stack: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self._checkpoint, self._recipe, self._metadata = checkpoint, recipe, metadata
        self._steps, self._importance, self._folder, self._stack = steps, importance, folder, stack
        self._holders: dict[tuple[str, str], GGUFFile] = {}
        self._files = 0

    def take(self, choices: Sequence[TypeChoice]) -> None:
        """Let `decoded` have the tensors in these types. Those not there yet are quantized."""
        missing = [
            (step, choice)
            for step, choice in zip(self._steps, choices)
            if (step.name, choice.type) not in self._holders
        ]
        if missing:
            file = self._stack.enter_context(GGUFFile.open(self._quantized(*zip(*missing))))
            self._holders |= {(step.name, choice.type): file for step, choice in missing}
            if self._files == 1:
                self.decoded = DecodedGGUF([file], self._checkpoint)
        self.decoded.replace(
            {step.name: self._holders[step.name, choice.type] for step, choice in zip(self._steps, choices)}
        )

    def _quantized(self, steps: Sequence[Step], choices: Sequence[TypeChoice]) -> Path:
        self._files += 1
        path = self._folder / f"{self._files}.gguf"
        output = place(FILE_TYPES["Q4_K_M"], path, steps, choices, self._metadata, self._recipe)
        run(plan_of(self._checkpoint, steps, [output], self._recipe, self._importance))
        return path
