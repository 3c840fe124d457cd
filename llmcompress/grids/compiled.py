"""Functions compiled for the CPU at hand, and kept on the disk where there is room for them."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.bytecode import FunctionIdentity

# Numba numbers functions from 1 on in every process, and nothing but the number tells the symbols of two closures of the same
# lines apart. Of kernels that two processes kept on the disk, a third would call one with the closure of the other: wrong
# codes, or a crash. So every process begins elsewhere.
FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


def compiled(name: str = "", **options: Any) -> Callable[[Callable], Callable]:
    """Numba's `njit` with `options`, without the GIL, and cached if Numba finds a folder it can write to.

    It looks beside the source, which another user may own, and in the user's cache, which a container may lack.
    Kernels made by the same lines need a `name` each: Numba numbers the kernels of one name in one list, and of two
    processes that add to a list at once, each can be left with the other's kernel.
    """

    def decorate(function: Callable) -> Callable:
        function.__qualname__ = name or function.__qualname__
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder: compiled anew in every process
            return njit(nogil=True, **options)(function)

    return decorate
