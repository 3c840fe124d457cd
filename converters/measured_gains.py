"""How much the error of each tensor moves the model's predictions, measured by a little noise in one tensor at a time.

For small errors the KL divergence is proportional to the squared error of what a tensor puts out, and errors of different
tensors, which know nothing of each other, add up. So white noise of one known size says what the error of any type costs.
Where gains.py only has sizes to go by, here norms behind a matrix, scaled embeddings and weights that are used twice
count as the model has them. One run measures all of a block's tensors: behind each block copies of the batches branch off
that went through it with one tensor disturbed, and take all blocks that follow undisturbed. So with n tensors a run costs
about as much as calibrating on n/2 times the tokens.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llmcompress.converters.calibration import CalibrationOptions, rows_and_model
from llmcompress.converters.model import lockstep_of

from llmcompress.blocks import Lockstep
from llmcompress.calibrate import batch_tokens_of, batches_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.divergence import Divergence
from llmcompress.evaluate import evaluate, scored
from llmcompress.grids.floats import to_float32
from llmcompress.importance import Importance
from llmcompress.progress import Progress
from llmcompress.step import Step
from llmcompress.wrapped import WrappedCheckpoint

NOISE = 0.003  # of a tensor's squared output, as Q3_K has; 0.0005 and 0.02 lead to the same types but for few
TOKENS = 2048
SAMPLE_ROWS = 1024  # that tell the size of weights whose inputs are not known


class NoisyCheckpoint(WrappedCheckpoint):
    """A checkpoint that adds noise to the tensors in `noisy`. spreads: its standard deviation in each that may be."""

    def __init__(self, base: Checkpoint, spreads: Mapping[str, float]) -> None:
        super().__init__(base)
        self.spreads, self.rewritten = spreads, set(spreads)
        self.noisy: frozenset[str] = frozenset()
        for name in spreads:
            self.index[name] = base.index[name].rewritten(name, "F32")

    @contextlib.contextmanager
    def disturbed(self, tensors: Sequence[str]) -> Iterator[None]:
        self.noisy = frozenset(tensors)
        try:
            yield
        finally:
            self.noisy = frozenset()

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name not in self.rewritten:
            self.base.read_into(name, first, out)
            return
        out[...] = to_float32(self.base.read(name, first, len(out)), self.base.index[name].dtype)
        if name in self.noisy:
            noise = np.random.default_rng([zlib.crc32(name.encode()), first])
            out += np.float32(self.spreads[name]) * noise.standard_normal(out.shape, np.float32)


@dataclass(frozen=True)
class Part:
    """Tensors that are disturbed together, since they are made of the same ones of the checkpoint."""

    steps: tuple[str, ...]
    tensors: tuple[str, ...]


def parts_of(steps: Sequence[Step]) -> list[Part]:
    """The steps in parts, in order."""
    parts: list[Part] = []
    for step in steps:
        tensors = {piece.tensor.name for piece in step.pieces}
        sharing = [part for part in parts if tensors & set(part.tensors)]
        names = [name for part in sharing for name in part.steps] + [step.name]
        tensors = tensors.union(*(part.tensors for part in sharing))
        place = parts.index(sharing[0]) if sharing else len(parts)
        parts = [part for part in parts if part not in sharing]
        parts.insert(place, Part(tuple(names), tuple(sorted(tensors))))
    return parts


@torch.no_grad()
def measure_gains(
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    importance: Importance,
    energies: Mapping[str, float],
    data: Sequence[str],
    progress: Progress,
) -> dict[str, float]:
    """The KL divergence, in nats a token, for each unit of relative squared error in what a tensor puts out, by GGUF name.

    energies: as `Sensitivity` has them. data: texts, of which TOKENS tokens are run. Tensors that the model does not run
    are left out. Raises LlmcompressError for a model that cannot be built, or run block by block.
    """
    options = CalibrationOptions(data=tuple(data), tokens=TOKENS)
    rows, plain = rows_and_model(checkpoint, options)
    noisy = NoisyCheckpoint(checkpoint, _spreads(checkpoint, steps, importance, energies))
    model = lockstep_of(noisy, plain.precision, options.device)
    batches = batches_of(rows.rows, batch_tokens_of(model))
    inside, outside = _placed(parts_of(steps), model)
    found = _measured_inside(model, noisy, inside, batches, progress)
    for part in outside:
        with noisy.disturbed(part.tensors):
            beside = evaluate(model, plain, batches, "transformers", progress)
        found[part] = beside.figures["mean_kl"].value
    return {name: kl / NOISE / len(part.steps) for part, kl in found.items() for name in part.steps}


def _spreads(
    checkpoint: Checkpoint, steps: Sequence[Step], importance: Importance, energies: Mapping[str, float]
) -> dict[str, float]:
    """The standard deviation of noise that is NOISE of each tensor's squared output; where its inputs are not known,
    of its own squares. Where several tensors share one of the checkpoint, the least."""
    spreads: dict[str, float] = {}
    for step in steps:
        for name in {piece.tensor.name for piece in step.pieces}:
            if step.name in energies:  # white noise puts out its variance times the sum of the squared inputs
                inputs = float(importance[step.name].sum(-1, dtype=np.float64).mean())
                variance = energies[step.name] / (step.shape[-2] * inputs) if inputs else 0.0
            else:
                variance = _mean_square(checkpoint, name)
            spread = float(np.sqrt(NOISE * variance))
            spreads[name] = min(spread, spreads.get(name, spread))
    return spreads


def _mean_square(checkpoint: Checkpoint, name: str) -> float:
    tensor = checkpoint.index[name]
    rows = checkpoint.read(name, 0, min(tensor.rows, SAMPLE_ROWS))
    return float(np.square(to_float32(rows, tensor.dtype), dtype=np.float64).mean())


def _placed(parts: Sequence[Part], model: Lockstep) -> tuple[list[list[Part]], list[Part]]:
    """The parts of every block, and those outside; without what the model does not run."""
    block_of = {name: block for block in range(len(model.blocks)) for name in model.parameters_of(block)}
    inside: list[list[Part]] = [[] for _ in model.blocks]
    outside = []
    for part in parts:
        targets = [model.weights.targets.get(name) for name in part.tensors]
        blocks = {block_of.get(target.parameter) for target in targets if target}
        if None not in targets and len(blocks) == 1:
            block = blocks.pop()
            (outside if block is None else inside[block]).append(part)
    return inside, outside


def _measured_inside(
    model: Lockstep,
    noisy: NoisyCheckpoint,
    inside: Sequence[Sequence[Part]],
    batches: Sequence[torch.Tensor],
    progress: Progress,
) -> dict[Part, float]:
    """The mean divergence by each part of the blocks, in nats a token."""
    runs, tokens = len(batches), sum(batch.numel() for batch in batches)
    first = {part: runs * place for place, part in enumerate((part for parts in inside for part in parts), 1)}
    through = sum(1 + len(parts) * (len(inside) - block) for block, parts in enumerate(inside))
    progress.start("measuring gains", tokens * through, "tokens x blocks")
    model.start(batches, copies=len(first))
    for block, parts in enumerate(inside):
        outputs: dict[int, torch.Tensor] = {}
        for part in parts:
            with noisy.disturbed(part.tensors), model.loaded(block):
                model.visit(
                    block,
                    lambda batch, output: outputs.__setitem__(first[part] + batch, output),
                    among=range(runs),
                )
            progress.advance(tokens)
        with model.loaded(block):
            model.through(block, lambda batch, _: progress.advance(batches[batch % runs].numel()))
        for copy, output in outputs.items():
            model.branch(block, copy, output)
    return _compared(model, batches, first)


def _compared(
    model: Lockstep, batches: Sequence[torch.Tensor], first: Mapping[Part, int]
) -> dict[Part, float]:
    """The mean divergence of the copies that begin at each part's number, from the batches themselves."""
    found = {part: Divergence() for part in first}
    order = [begin + batch for batch in range(len(batches)) for begin in (0, *first.values())]
    logits = model.finish(order)
    for batch in batches:
        at = scored(batch.shape[1], "transformers")
        targets = batch[:, at.start + 1 : at.stop + 1]
        reference = next(logits)
        for divergence in found.values():
            disturbed = next(logits)
            for row, wanted in enumerate(targets):
                divergence.add(reference[row, at], disturbed[row, at], wanted.to(reference.device))
            del disturbed
        del reference
    return {part: divergence.summary()["mean_kl"].value for part, divergence in found.items()}
