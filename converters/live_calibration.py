"""A calibration that runs while the tensors are quantized, block by block, on one read of the weights.

The model goes through its blocks in a thread of its own. As soon as a block's sums are whole, the tensors made from
it can be quantized, from the bytes that were read to run it. The calibration stays at most one block ahead.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from llmcompress.converters.calibration import CalibrationOptions, entries_of, places_of, rows_and_model

from llmcompress.calibrate import Calibration, Rewritten, batch_tokens_of, batches_of, calibrate, expected_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RunError
from llmcompress.gguf.imatrix import mean_squares, scarce_notes
from llmcompress.hessians import Leaning
from llmcompress.linear_inputs import InputSums
from llmcompress.progress import Progress
from llmcompress.sizes import format_size
from llmcompress.step import Step

AHEAD = 1  # blocks that may be calibrated before the tensors of the one before are asked for


class HeldCheckpoint(Checkpoint):
    """A checkpoint that keeps whole tensors as it reads them, until they are let go, and serves rows from them."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._held: dict[str, np.ndarray] = {}

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """As a checkpoint does; a tensor that is read whole, by leaving out `rows`, is kept."""
        values = super().read(name, first, rows)
        if rows is None and first == 0:
            self._held[name] = values
        return values

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        held = self._held.get(name)
        if held is None:
            super().read_into(name, first, out)
        else:
            out[...] = held[first : first + len(out)]

    def read_columns(self, name: str, columns: range, top: int, height: int) -> np.ndarray:
        held = self._held.get(name)
        if held is None:
            return super().read_columns(name, columns, top, height)
        return np.ascontiguousarray(held[top : top + height, columns.start : columns.stop : columns.step].T)

    def let_go(self, names: set[str]) -> None:
        for name in names:
            self._held.pop(name, None)


class LiveImportance:
    """The importance of a model's weights, block by block, from a calibration in a thread of its own.

    Has what `llmcompress.importance.Live` asks for. Tensors of block b are of stage b, the output matrix is of the
    stage behind the last block.
    """

    source = Path("calibration")

    def __init__(
        self,
        checkpoint: HeldCheckpoint,
        steps: list[Step],
        options: CalibrationOptions,
        products: bool = False,
    ) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._rows, self._lockstep = rows_and_model(checkpoint, options)
        self._block_of = {
            name: block
            for block in range(len(self._lockstep.blocks))
            for name in self._lockstep.parameters_of(block)
        }
        self._source_stages = {name: self._source_stage(name) for name in checkpoint.index}
        self._steps = steps
        blank = Calibration(expected=expected_of(self._lockstep))
        self.entries: dict[str, np.ndarray | None] = dict.fromkeys(entries_of(steps, self._lockstep, blank))
        self._stages = {
            step.name: self._source_stages[step.pieces[0].tensor.name] for step in steps if step.pieces
        }
        self.datasets, self.chunks = self._rows.sources, len(self._rows.rows)
        self._kept = _Kept() if products else None
        self._leaning = Leaning()
        self.notes = (*self._rows.notes, *self._memory_note())
        self.complaints: list[str] = []
        self._places = places_of(steps, self._lockstep, blank.expected)
        self._batch_tokens = options.batch_tokens or batch_tokens_of(self._lockstep)
        self.fingerprint = hashlib.sha256(
            f"{self._rows.sha256} {self._lockstep.precision} {self._batch_tokens}".encode()
        ).hexdigest()
        self._rewritten: Rewritten | None = None  # where blocks run with other weights once these are made
        self._changed = threading.Condition()
        self._reached, self._stopped, self._error = -1, False, None

    def stage(self, name: str) -> int:
        return self._stages.get(name, -1)

    def weights(self, name: str, matrices: int, inputs: int) -> np.ndarray:
        """float32 (matrices, inputs), as soon as the calibration has them. Raises what ended the calibration."""
        with self._changed:
            self._changed.wait_for(lambda: self.entries[name] is not None or self._error or self._stopped)
        if self._error:
            raise self._error
        if self.entries[name] is None:
            raise RunError(f"{name}: the calibration was stopped")
        return self.entries[name]

    def products(self, name: str, matrix: int) -> np.ndarray | None:
        """XᵀX, float32 (inputs, inputs), of a matrix whose `weights` are there, as `Leaning` has it; None where no token
        reached any."""
        places = self._places[name]
        tokens = np.array([self._kept.tokens(*place) for place in places], np.int64)
        return self._leaning.products(name, tokens, lambda n: self._kept.of(*places[n]), matrix)

    def shared(self, name: str, matrix: int) -> tuple[str, int]:
        """Equal for two matrices that have the same inputs."""
        parameter, index = self._places[name][matrix]
        return self._kept.first_of(parameter), index

    def reached(self, stage: int) -> None:
        with self._changed:
            self._reached = max(self._reached, stage)
            self._changed.notify_all()
        over = {name for name in self._checkpoint.index if self._source_stages[name] < stage - AHEAD}
        self._checkpoint.let_go(over)
        if self._kept:
            targets = self._lockstep.weights.targets
            self._kept.let_go({targets[name].parameter for name in over if name in targets})

    @contextlib.contextmanager
    def running(self, made: Sequence[Path] = (), pieces: Mapping[str, int] = {}) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stop()
            thread.join()

    def finished(self, name: str) -> None:
        """Nothing here waits for what is written."""

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            batches = batches_of(self._rows.rows, self._batch_tokens)
            found = calibrate(
                self._lockstep,
                batches,
                _Stoppable(self),
                self._kept,
                self._rows.tokens,
                self._block_is_through,
                self._rewritten,
            )
            self._publish(len(self._lockstep.blocks), found)
            self.complaints = [*found.complaints, *self._scarce(found)]
        except BaseException as error:  # handed to whoever waits for an entry
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _block_is_through(self, block: int, found: Calibration) -> None:
        self._publish(block, found)
        with self._changed:
            self._changed.wait_for(lambda: self._reached >= block - AHEAD or self._stopped)

    def _publish(self, stage: int, found: Calibration) -> None:
        steps = [step for step in self._steps if self._stages.get(step.name) == stage]
        entries = entries_of(steps, self._lockstep, found)
        with self._changed:
            self.entries |= {name: mean_squares(sums.tokens, sums.squares) for name, sums in entries.items()}
            self._changed.notify_all()

    def _scarce(self, found: Calibration) -> list[str]:
        entries = entries_of(self._steps, self._lockstep, found)
        return scarce_notes({name: sums.tokens for name, sums in entries.items()})

    def _source_stage(self, name: str) -> int:
        """The block that a tensor of the checkpoint is read for; the output matrix comes last, all else first."""
        target = self._lockstep.weights.targets.get(name)
        if target is None:
            return -1
        if target.parameter == self._lockstep.head:
            return len(self._lockstep.blocks)
        return self._block_of.get(target.parameter, -1)

    def _memory_note(self) -> list[str]:
        block = max(
            sum(value.nbytes for value in self._lockstep.parameters_of(index).values())
            for index in range(len(self._lockstep.blocks))
        )
        sums = max(map(self._products_bytes, range(len(self._lockstep.blocks)))) if self._kept else 0
        needed = format_size((2 + AHEAD) * (block + sums) + self._options.hidden_ram)
        what = (
            "blocks of the model, their XᵀX, and hidden states"
            if sums
            else "blocks of the model, and hidden states"
        )
        return [f"calibrating takes up to {needed} of memory beside --max-ram: {what}"]

    def _products_bytes(self, block: int) -> int:
        """Of the XᵀX of a block's matrices; those with the same inputs are counted each, as they are added up."""
        values = self._lockstep.parameters_of(block).values()
        return sum(4 * (len(v) if v.ndim == 3 else 1) * v.shape[-1] ** 2 for v in values if v.ndim in (2, 3))


class _Kept:
    """Takes the part of a CalibrationState: keeps XᵀX in memory until it is let go."""

    products = True

    def __init__(self) -> None:
        self._sums: dict[str, InputSums] = {}
        self._first: dict[str, str] = {}  # of the parameters with the same inputs, for each

    def load(self) -> None:
        """There is nothing to go on with."""

    def save(self, *sums: object) -> None:
        """There is nowhere to save to."""

    def add_products(self, group: int, sums: Mapping[str, InputSums]) -> None:
        first_with: dict[bytes, str] = {}
        for name, found in sums.items():
            inputs = found.tokens.numpy().tobytes() + found.squares.cpu().numpy().tobytes()
            first = self._first[name] = first_with.setdefault(inputs, name)
            self._sums[name] = sums[first]  # q, k and v share their sums, as they will their factor

    def first_of(self, parameter: str) -> str:
        return self._first.get(parameter, parameter)

    def tokens(self, parameter: str, matrix: int) -> int:
        sums = self._sums.get(parameter)
        return int(sums.tokens[matrix]) if sums else 0

    def of(self, parameter: str, matrix: int) -> np.ndarray:
        return self._sums[parameter].products[matrix].cpu().numpy()

    def let_go(self, parameters: set[str]) -> None:
        for name in parameters:
            self._sums.pop(name, None)


class _Stoppable(Progress):
    """Ends a calibration that nobody waits for."""

    def __init__(self, live: LiveImportance) -> None:
        self._live = live

    def advance(self, count: int) -> None:
        if self._live._stopped:
            raise RunError("the calibration was stopped")
