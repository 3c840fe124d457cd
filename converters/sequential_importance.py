"""A live calibration in which each block is calibrated on what the quantized blocks before it put out.

Every batch goes through a block as the checkpoint has it, for the sums; its tensors are quantized and written; then the
batches go through it again, its weights read back from the file that is being made, and on to the next block. A killed
job goes on at the block it was in: those that are written are only run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.live_calibration import LiveImportance

from llmcompress.block_weights import PartWeights, Readable
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RunError
from llmcompress.gguf.reader import GGUFFile


class SequentialImportance(LiveImportance):
    """As LiveImportance; it has to hear of every piece of a tensor that is written, and where."""

    def __init__(self, *arguments: object, **more: object) -> None:
        super().__init__(*arguments, **more)
        self.fingerprint = hashlib.sha256(f"sequential {self.fingerprint}".encode()).hexdigest()
        self._made: Sequence[Path] = ()
        self._unwritten: Counter[int] = Counter()  # pieces of each stage
        self._asked: set[int] = set()  # stages of which anyone wanted sums
        self._rewritten = self

    @contextlib.contextmanager
    def running(self, made: Sequence[Path] = (), pieces: Mapping[str, int] = {}) -> Iterator[None]:
        self._made = made
        for name, count in pieces.items():
            self._unwritten[self.stage(name)] += count
        with super().running(made, pieces):
            yield

    def weights(self, name, matrices, inputs):  # as LiveImportance's
        with self._changed:
            self._asked.add(self.stage(name))
            self._changed.notify_all()
        return super().weights(name, matrices, inputs)

    def finished(self, name: str) -> None:
        with self._changed:
            self._unwritten[self.stage(name)] -= 1
            self._changed.notify_all()

    def is_wanted(self, block: int) -> bool:
        """As calibrate.Rewritten's: whether a tensor of the block is not written yet."""
        self._wait(lambda: block in self._asked or self._is_written(block))
        return not self._is_written(block)

    @contextlib.contextmanager
    def loaded(self, block: int) -> Iterator[None]:
        """As calibrate.Rewritten's: once the block is written, its weights from there."""
        self._wait(lambda: self._is_written(block))
        lockstep = self._lockstep
        with self._read_back() as written:
            weights = PartWeights(lockstep.model, written, lockstep.device)
            with weights.loaded(set(lockstep.parameters_of(block))):
                yield

    def _wait(self, condition) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._stopped)
        if self._stopped:
            raise RunError("the calibration was stopped")

    def _is_written(self, block: int) -> bool:
        return all(count == 0 for stage, count in self._unwritten.items() if stage <= block)

    @contextlib.contextmanager
    def _read_back(self) -> Iterator[Readable]:
        """What is being made, as the checkpoint it is made from."""
        first, *_ = self._made
        if first.is_dir():
            with Checkpoint.open(first) as checkpoint:
                yield checkpoint
        else:
            with contextlib.ExitStack() as opened:
                files = [opened.enter_context(GGUFFile.open(path)) for path in self._made]
                yield DecodedGGUF(files, self._checkpoint)
