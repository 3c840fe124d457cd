"""Functions compiled for the CPU at hand, and kept on the disk where there is room for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Numba's `njit` with `options`, without the GIL, and cached if Numba finds a folder it can write to.

    It looks beside the source, which another user may own, and in the user's cache, which a container may lack.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder: compiled anew in every process
            return njit(nogil=True, **options)(function)

    return decorate
