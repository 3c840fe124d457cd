"""Hidden states of the batches that wait for a block: in memory up to a bound, beyond it in a file."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np
import torch


class HiddenStates:
    """One tensor for each batch, replaced as the batch moves on.

    A tensor that does not fit in `bound` bytes gets its storage replaced by a mapped file, in place: whoever holds
    the tensor (the model's own suspended forward does) goes on as if nothing had happened, and its pages leave
    memory. The files have no name, so that a killed run leaves nothing behind.
    """

    def __init__(self, bound: int, folder: Path | None = None) -> None:
        self._bound, self._folder = bound, folder
        self._in_memory: dict[int, int] = {}  # bytes by batch
        self._files: dict[int, np.memmap] = {}

    @property
    def spilled(self) -> int:
        """Bytes in files."""
        return sum(file.nbytes for file in self._files.values())

    def keep(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` itself, after moving its values to a file if memory is full."""
        others = sum(size for other, size in self._in_memory.items() if other != batch)
        if others + hidden.nbytes <= self._bound:
            self._in_memory[batch] = hidden.nbytes
            return hidden
        self._in_memory.pop(batch, None)
        bytes_of = hidden.contiguous().cpu().view(torch.uint8).numpy()
        file = self._file(batch, bytes_of.shape)
        file[...] = bytes_of
        file.flush()
        file._mmap.madvise(mmap.MADV_DONTNEED)  # the file keeps them, memory need not
        mapped = torch.from_numpy(file).view(hidden.dtype)
        hidden.data = mapped if hidden.device.type == "cpu" else mapped.to(hidden.device)
        return hidden

    def release(self, batch: int) -> None:
        """The batch is through: its memory is free for others."""
        self._in_memory.pop(batch, None)
        self._files.pop(batch, None)

    def _file(self, batch: int, shape: tuple[int, ...]) -> np.memmap:
        held = self._files.get(batch)
        if held is None or held.shape != shape:
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                held = self._files[batch] = np.memmap(stream, np.uint8, "w+", shape=shape)
        return held
