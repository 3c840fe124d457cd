"""What goes into the weights of each block of a model, the blocks before it changed already.

For each block in turn: every batch goes through it as it was, for the inputs of its matrices; the caller changes what
the checkpoint gives for it; every batch goes through it again, and on to the next.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from llmcompress.converters.calibration import CalibrationOptions, rows_and_model

from llmcompress.block_weights import Target
from llmcompress.calibrate import batch_tokens_of, batches_of, inputs_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.gguf.imatrix import mean_squares
from llmcompress.importance import SOLVERS_KEPT
from llmcompress.linear_inputs import InputSums, LinearInputs
from llmcompress.methods.solver import Solver


class SequentialInputs:
    """A model and its batches, on the way through its blocks. Everything happens in the thread that called `start`."""

    def __init__(self, checkpoint: Checkpoint, options: CalibrationOptions, products: bool) -> None:
        self.rows, self.lockstep = rows_and_model(checkpoint, options)
        self.products, self._hidden_ram = products, options.hidden_ram
        self._batch_tokens = options.batch_tokens or batch_tokens_of(self.lockstep)
        self._targets = self.lockstep.weights.targets
        self._block_of = {
            name: block for block in range(self.blocks) for name in self.lockstep.parameters_of(block)
        }
        self.complaints: list[str] = []

    @property
    def blocks(self) -> int:
        return len(self.lockstep.blocks)

    @property
    def about(self) -> tuple:
        """Equal for two that will see the same inputs of the same weights."""
        return self.rows.sha256, self.lockstep.precision, self._batch_tokens

    @property
    def ram(self) -> int:
        """Bytes of the largest block's weights, what it multiplies XᵀX of, and waiting hidden states."""
        held = 0
        for block in range(self.blocks):
            values = self.lockstep.parameters_of(block).values()
            sums = sum(
                (4 * value.shape[-1] ** 2 if self.products else 8 * value.shape[-1])
                * (len(value) if value.ndim == 3 else 1)
                for value in values
                if value.ndim in (2, 3)
            )
            held = max(held, sum(value.nbytes for value in values) + (1 + self.lockstep.workers) * sums)
        return held + self._hidden_ram

    def block_of(self, tensor: str) -> int | None:
        """The block that a tensor of the checkpoint belongs to; None for what the model does not run there."""
        target = self._targets.get(tensor)
        return target and self._block_of.get(target.parameter)

    @torch.no_grad()
    def start(self) -> None:
        self.lockstep.start(batches_of(self.rows.rows, self._batch_tokens))

    def inputs(self, block: int) -> BlockInputs:
        """Of the weights that the checkpoint gives now."""
        with torch.no_grad(), self.lockstep.loaded(block) as parameters:
            found = inputs_of(partial(self.lockstep.visit, block), parameters, self.products)
        if found.nonfinite:
            name, _, tokens = found.nonfinite[0]
            self.complaints.append(
                f"{name}: inputs of {tokens} tokens held a NaN or infinity and were left out, and so in "
                f"{len(found.nonfinite) - 1} more places of the block"
            )
        return BlockInputs(found, self._targets)

    def go_on(self, block: int) -> None:
        """Through the block, with the weights that the checkpoint gives now."""
        with torch.no_grad(), self.lockstep.loaded(block):
            self.lockstep.through(block)


class BlockInputs:
    """The sums of one block's inputs, by tensor of the checkpoint and matrix among those stacked in it.

    Safe from any number of threads."""

    def __init__(self, found: LinearInputs, targets: Mapping[str, Target]) -> None:
        self._sums, self._targets = found.sums, targets
        self._solvers: dict[tuple[bytes, int], Solver] = {}
        self._solving = threading.Lock()

    def tokens(self, tensor: str, matrix: int) -> int:
        sums, at = self._of(tensor, matrix)
        return int(sums.tokens[at]) if sums else 0

    def squares(self, tensor: str, matrix: int) -> np.ndarray | None:
        """Mean squared inputs, float32 (inputs,), as an importance matrix has them; None where the tensor got none."""
        sums, at = self._of(tensor, matrix)
        return mean_squares(sums.tokens.numpy(), sums.squares.cpu().numpy())[at] if sums else None

    def products(self, tensor: str, matrix: int) -> np.ndarray | None:
        """XᵀX, float32 (inputs, inputs); None where none was asked for."""
        sums, at = self._of(tensor, matrix)
        return sums.products[at].cpu().numpy() if sums and sums.products is not None else None

    def solver(self, tensor: str, matrix: int) -> Solver:
        """What GPTQ and SparseGPT need, from XᵀX; computed once for all that share their inputs, the latest kept."""
        sums, at = self._of(tensor, matrix)
        key = sums.squares[at].cpu().numpy().tobytes(), int(sums.tokens[at])
        with self._solving:
            if key not in self._solvers:
                while len(self._solvers) >= SOLVERS_KEPT:
                    del self._solvers[next(iter(self._solvers))]
                self._solvers[key] = Solver.of(self.products(tensor, matrix))
            return self._solvers[key]

    def release(self) -> None:
        """Free the sums and solvers, before those of the next block take as much."""
        self._sums, self._solvers = {}, {}

    def _of(self, tensor: str, matrix: int) -> tuple[InputSums | None, int]:
        target = self._targets[tensor]
        return self._sums.get(target.parameter), target.matrix + matrix
