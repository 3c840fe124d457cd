"""Hidden states of the batches that wait for a block: in memory up to a bound, beyond it in a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from llmcompress.errors import RunError
from llmcompress.sizes import format_size


class HiddenStates:
    """Keeps one waiting tensor for each batch within a bound of memory.

    A tensor that does not fit in `bound` bytes gets its storage replaced by a mapped file, in place: whoever holds
    the tensor (the model's own suspended forward does) goes on as if nothing had happened. On a GPU it waits there,
    too, and has to be brought back by `fetch`. Each tensor has a file of its own, which lives as long as the tensor
    and has no name, so that a killed run leaves nothing behind.
    """

    def __init__(self, bound: int, folder: Path | None = None) -> None:
        self._bound, self._folder = bound, folder
        self._in_memory: dict[int, int] = {}  # bytes by batch
        self._in_files: dict[int, int] = {}

    @property
    def spilled(self) -> int:
        """Bytes in files."""
        return sum(self._in_files.values())

    def keep(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` itself, after moving its values to a file if memory is full. Raises RunError if the disk is."""
        self.release(batch)
        if sum(self._in_memory.values()) + hidden.nbytes <= self._bound:
            self._in_memory[batch] = hidden.nbytes
        else:
            self._in_files[batch] = hidden.nbytes
            hidden.data = self._in_file(hidden.contiguous().cpu())
        return hidden

    def fetch(self, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        """`hidden` itself, with its values on `device`."""
        hidden.data = hidden.to(device)
        return hidden

    def release(self, batch: int) -> None:
        """The batch no longer waits: its memory is free for others."""
        self._in_memory.pop(batch, None)
        self._in_files.pop(batch, None)

    def _in_file(self, values: torch.Tensor) -> torch.Tensor:
        bytes_of = values.view(torch.uint8).numpy()
        try:
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                stream.write(
                    bytes_of
                )  # a full disk is an error here; written to through a map, it is a signal
                stream.flush()
                mapped = np.memmap(stream, np.uint8, "r+", shape=bytes_of.shape)
        except OSError as error:
            raise RunError(
                f"{self._folder or tempfile.gettempdir()}: {format_size(bytes_of.nbytes)} of hidden states cannot be "
                f"written ({error.strerror or error}); name a folder with room in TMPDIR, or allow more --hidden-ram"
            ) from None
        return torch.from_numpy(mapped).view(values.dtype)
