"""Functions compiled for the CPU at hand, and kept on the disk where there is room for them."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import IndexDataCacheFile


def number_from_elsewhere() -> None:
    """Begin to number functions where no other process does.

    Numba begins at 1, and nothing but the number tells the symbols of two closures of the same lines apart. Of kernels that
    two processes kept on the disk, a third would call one with the closure of the other: wrong codes, or a crash.
    """
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


number_from_elsewhere()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=number_from_elsewhere)


class KernelFile(IndexDataCacheFile):
    """A kernel's index on the disk and the files of its code, one for each signature.

    Numba counts the files. Two processes that each add a signature at once would both take the next number, and what is
    left is one signature with the other's code: a crash. Here a signature's file is named by a hash of the signature.
    """

    def save(self, key: Any, data: Any) -> None:
        digest = hashlib.sha256(self._dump((self._source_stamp, key))).digest()
        name = self._data_name(int.from_bytes(digest[:8], "big"))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def compiled(name: str = "", **options: Any) -> Callable[[Callable], Callable]:
    """Numba's `njit` with `options`, without the GIL, and cached if Numba finds a folder it can write to.

    It looks beside the source, which another user may own, and in the user's cache, which a container may lack.
    Kernels made by the same lines get a `name` each, and so an index each: of two processes that add to one at once, the
    slower one's entry is kept and the other compiled again.
    """

    def decorate(function: Callable) -> Callable:
        function.__qualname__ = name or function.__qualname__
        try:
            kernel = njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder: compiled anew in every process
            return njit(nogil=True, **options)(function)
        kernel._cache._cache_file.__class__ = KernelFile
        return kernel

    return decorate
