"""Kernels where no cache of them can be kept."""

from __future__ import annotations

from llmcompress.grids.compiled import compiled


def test_a_kernel_that_cannot_be_cached_still_runs() -> None:
    names: dict = {}
    exec("def double(x):\n    return 2 * x", names)  # of no file, so that Numba finds no folder beside it
    double = compiled(error_model="numpy")(names["double"])
    assert double(21) == 42 and double.nopython_signatures


def test_kernels_are_cached_where_they_can_be() -> None:
    def double(x):
        return 2 * x

    assert "NullCache" not in repr(compiled()(double)._cache)
