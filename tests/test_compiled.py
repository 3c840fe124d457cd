"""Kernels where no cache of them can be kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmcompress.grids import GRIDS
from llmcompress.grids.compiled import KernelFile, compiled
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


def test_kernels_are_kept_by_kernel_file() -> None:
    for kernel in (GRIDS["Q4_0"].kernel_dequantize, GRIDS["IQ4_NL"].kernels_by_effort["normal"]):
        assert type(kernel._cache._cache_file) is KernelFile


@pytest.mark.parametrize("between", ["_save_index", "_save_data"])
def test_processes_that_add_to_a_kernel_at_once_keep_their_own_code(between: str, tmp_path: Path) -> None:
    """One entry may be lost; in Numba's own file each signature can be left with the code of the other, and crash."""
    one, other = (KernelFile(str(tmp_path), "kernel", "stamp") for _ in range(2))
    other._load_index = dict  # as it was before either began
    save = getattr(one, between)

    def interrupted(*arguments) -> None:
        other.save("with importance", "code with importance")
        save(*arguments)

    setattr(one, between, interrupted)
    one.save("without", "code without")
    found = [KernelFile(str(tmp_path), "kernel", "stamp").load(key) for key in ("without", "with importance")]
    assert found[0] == "code without" and found[1] in (None, "code with importance")


def test_kernels_made_by_the_same_lines_are_kept_apart() -> None:
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
