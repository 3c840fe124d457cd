"""Kernels are compiled by their first call on a machine, which takes seconds, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numba.core.event import Event, Listener, install_listener

from llmcompress.grids.grid import Grid


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


def prepare_kernels(uses: Iterable[tuple[Grid, bool]], effort: str, say: Callable[[str], None]) -> None:
    """Load or compile what a job needs: each grid with importance or without, and its decoder.

    Says one line if there is something to compile.
    """
    uses = sorted(uses, key=lambda use: (use[0].ggml_type, use[1]))
    names = " ".join(dict.fromkeys(grid.name for grid, _ in uses))
    announcer = _Announcer(lambda: say(f"compiling kernels for this CPU, once: {names}"))
    with install_listener("numba:compile", announcer):
        for grid, with_importance in uses:
            weights = np.ones((1, grid.block), np.float32)
            grid.dequantize(grid.quantize(weights, weights[0] if with_importance else None, effort))
