"""Building a smaller model block by block, each on what the smaller ones before it give; resumable.

What a block's matrices became is a file in a folder beside the result, so that a killed run goes on behind it. While the
model runs on, it has its old shapes, with zeros for what is gone.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from llmcompress.converters.calibration import rows_and_model
from llmcompress.converters.smaller_folder import calibration_options

from llmcompress import __version__
from llmcompress.calibrate import batch_tokens_of, batches_of
from llmcompress.checkpoint import Checkpoint, read_index
from llmcompress.errors import RunError
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS
from llmcompress.grids.floats import to_float32
from llmcompress.linear_inputs import InputSums
from llmcompress.progress import Progress
from llmcompress.structure_options import StructureOptions
from llmcompress.whole_file import whole_file
from llmcompress.wrapped import WrappedCheckpoint

JOB = "job.txt"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Rebuilding:
    """The model on its way, and what its blocks became. Whoever derives from it says what that is, by `_choose` and `_run_on`."""

    def __init__(self, checkpoint: Checkpoint, options: StructureOptions, folder: Path, tokens: int) -> None:
        self.checkpoint, self.options = _InPlace(checkpoint), options
        self.folder = folder.with_name(f"{folder.name}.blocks")
        self.rows, self.lockstep = rows_and_model(self.checkpoint, calibration_options(options, tokens))
        said = (
            __version__,
            checkpoint.fingerprint(),
            self.rows.sha256,
            self.lockstep.precision,
            options.as_dict(),
        )
        self.job = hashlib.sha256(repr(said).encode()).hexdigest()

    def _choose(self, block: int) -> dict[str, torch.Tensor]:
        """What becomes of the block's matrices, by name, and whatever else is to be kept of it."""
        raise NotImplementedError

    def _run_on(self, block: int, made: Checkpoint) -> dict[str, np.ndarray]:
        """Tensors of the old shapes, raw rows as they are read, that give what the new ones in `made` will."""
        raise NotImplementedError

    @torch.no_grad()
    def run(self, progress: Progress) -> None:
        """Through all blocks. Raises RunError."""
        self._open()
        batches = batches_of(self.rows.rows, self.options.batch_tokens or batch_tokens_of(self.lockstep))
        progress.start("measure", 2 * len(self.lockstep.blocks) * self.rows.tokens, "tokens x blocks")
        self.lockstep.start(batches)
        for block in range(len(self.lockstep.blocks)):
            if not self._file(block).is_file():
                data = self._choose(block)
                with whole_file(self._file(block)) as file:
                    file.write(safetensors.torch.save(data))
            progress.advance(self.rows.tokens)
            if block + 1 < len(self.lockstep.blocks):
                with Checkpoint(self.folder, {}, read_index(self._file(block))) as made:
                    self.checkpoint.put(self._run_on(block, made))
                with self.lockstep.loaded(block):
                    self.lockstep.through(block)
            progress.advance(self.rows.tokens)
        self.checkpoint.put({})

    def made(self) -> Checkpoint:
        """What the blocks became."""
        index = {}
        for block in range(len(self.lockstep.blocks)):
            index |= read_index(self._file(block))
        return Checkpoint(self.folder, {}, index)

    def forget(self) -> None:
        shutil.rmtree(self.folder)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the model as it was, float32, where the model runs."""
        dtype = self.checkpoint.base.index[name].dtype
        return torch.from_numpy(to_float32(self.checkpoint.base.read(name), dtype)).to(self.lockstep.device)

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The values of the new tensor `name` in the type of the old. Raises RunError for what is not finite."""
        if not torch.isfinite(values).all():
            raise RunError(f"{name}: its new weights are not finite; give more --tokens")
        return values.to(DTYPES[self.checkpoint.index[name].dtype]).cpu().contiguous()

    def raw(self, name: str, values: torch.Tensor) -> np.ndarray:
        """As `stored`, raw rows as they are read."""
        data = self.stored(name, values)
        return data.numpy() if data.dtype != torch.bfloat16 else data.view(torch.uint16).numpy()

    def _open(self) -> None:
        """The folder of this job; what another left there goes."""
        job = self.folder / JOB
        if not job.is_file() or job.read_text() != self.job:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with whole_file(job) as file:
                file.write(self.job.encode())

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:04}.safetensors"


def require_tokens(name: str, sums: InputSums | None) -> torch.Tensor:
    """XᵀX of the inputs of the matrix `name`. Raises RunError where they are too few."""
    tokens = int(sums.tokens[0]) if sums else 0
    if tokens < SHRINKAGE_TOKENS:
        raise RunError(f"{name}: got {tokens} tokens; give more --tokens")
    return sums.products[0]


class _InPlace(WrappedCheckpoint):
    """A checkpoint with other tensors in the place of some of its own."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        self._others: dict[str, np.ndarray] = {}

    def put(self, others: dict[str, np.ndarray]) -> None:
        """From now on these, raw rows as they are read, and no longer those before."""
        self._others = others

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name in self._others:
            out[...] = self._others[name][first : first + len(out)]
        else:
            super().read_into(name, first, out)

    def fingerprint(self) -> str:
        return self.base.fingerprint()
