"""Kernels are compiled by their first call on a machine, which takes seconds, and kept on disk.

Numba compiles one kernel at a time, so that a job that needs several shares them with processes of its own kind, one
for each core. What those have compiled is read from the disk.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable

import numpy as np
from numba.core.event import Event, Listener, install_listener

from llmcompress.grids import GRIDS
from llmcompress.grids.grid import Grid
from llmcompress.machine import cores

Use = tuple[Grid, bool]  # with importance or without


class _Announcer(Listener):
    """Calls `announce` when the first kernel is compiled; one that is found on disk does not count."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self.announce, self.done = announce, False

    def on_start(self, event: Event) -> None:
        if not self.done:
            self.done = True
            self.announce()

    def on_end(self, event: Event) -> None:
        pass


def prepare_kernels(uses: Iterable[Use], effort: str, say: Callable[[str], None]) -> None:
    """Load or compile what a job needs: each grid with importance or without, and its decoder.

    Says one line if there is something to compile.
    """
    uses = sorted(uses, key=lambda use: (use[0].ggml_type, use[1]))
    names = " ".join(dict.fromkeys(grid.name for grid, _ in uses))
    others: list[subprocess.Popen] = []

    count = min(cores(), len(uses)) or 1

    def begin() -> None:
        say(f"compiling kernels for this CPU, once: {names}")
        others.extend(_another(uses[first::count], effort) for first in range(1, count))

    with install_listener("numba:compile", _Announcer(begin)):
        _compile(uses[::count], effort)
        for other in others:
            other.wait()
        _compile(uses, effort)  # read from the disk; what failed there is compiled here, and says why


def _compile(uses: Iterable[Use], effort: str) -> None:
    for grid, with_importance in uses:
        weights = np.ones((1, grid.block), np.float32)
        grid.dequantize(grid.quantize(weights, weights[0] if with_importance else None, effort))


def _another(uses: Iterable[Use], effort: str) -> subprocess.Popen:
    """A process that compiles `uses`."""
    words = [f"{grid.name}:{int(given)}" for grid, given in uses if grid.name in GRIDS]
    command = [sys.executable, "-m", "llmcompress.grids.compiling", effort, *words]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


if __name__ == "__main__":
    effort, *words = sys.argv[1:]
    _compile(((GRIDS[name], given == "1") for name, given in (word.split(":") for word in words)), effort)
