"""Kernels where no cache of them can be kept."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.grids import GRIDS
from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid


def test_a_kernel_that_cannot_be_cached_still_runs() -> None:
    names: dict = {}
    exec("def double(x):\n    return 2 * x", names)  # of no file, so that Numba finds no folder beside it
    double = compiled(error_model="numpy")(names["double"])
    assert double(21) == 42 and double.nopython_signatures


def test_kernels_are_cached_where_they_can_be() -> None:
    def double(x):
        return 2 * x

    assert "NullCache" not in repr(compiled()(double)._cache)


def test_kernels_made_by_the_same_lines_are_kept_apart() -> None:
    """Numba keeps kernels of one name in one numbered list, which two processes can mix up."""
    kernels = {
        id(kernel): kernel
        for grid in GRIDS.values()
        for kernel in (grid.kernel_quantize, grid.kernel_dequantize, *grid.kernels_by_effort.values())
        if hasattr(kernel, "_cache")
    }
    names = [kernel._cache._impl.filename_base for kernel in kernels.values()]
    assert len(names) > 2 * len(GRIDS) and len(set(names)) == len(names)


@pytest.mark.parametrize("grid", [GRIDS["Q4_0"], GRIDS["F32"]], ids=lambda grid: grid.name)
def test_read_only_arrays_need_no_kernel_of_their_own(grid: Grid) -> None:
    weights = np.ones((1, grid.block), np.float32)
    weights.flags.writeable = False
    data = grid.quantize(weights)
    data.flags.writeable = False
    assert (grid.dequantize(data) == 1).all()
    for kernel in (grid.kernel_quantize, grid.kernel_dequantize):
        for signature in getattr(kernel, "signatures", ()):
            assert all(getattr(array, "mutable", True) for array in signature)
