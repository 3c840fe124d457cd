"""Number formats that hold an exact zero: in them what was pruned can stay zero."""

from __future__ import annotations

import functools

import numpy as np

from llmcompress.grids.code_bits import book_of, get_codes, layout_of, levels_of, put_codes
from llmcompress.grids.grid import Grid


@functools.cache
def zero_code(grid: Grid) -> int | None:
    """The code that stands for zero whatever the scales are; None where no code does, or codes are not of single weights.

    Found by decoding: some rows, with all codes the same."""
    if layout_of(grid) is None or book_of(grid) is not None:
        return None
    weights = np.random.default_rng(0).standard_normal((4, 4 * grid.block)).astype(np.float32) + np.float32(
        0.5
    )
    data = grid.quantize(weights, None, "fast")
    codes = get_codes(grid, data)
    for code in range(len(levels_of(grid))):
        if not grid.dequantize(put_codes(grid, data, np.full_like(codes, code))).any():
            return code
    return None


@functools.cache
def keeps_zeros(grid: Grid) -> bool:
    """Whether what was pruned is zero in this format: it has a code for it, or, where GPTQ chooses no codes, rounds zeros
    to zeros."""
    if layout_of(grid) is not None:
        return zero_code(grid) is not None
    weights = np.random.default_rng(0).standard_normal((4, 4 * grid.block)).astype(np.float32) + np.float32(
        0.5
    )
    weights[:, ::2] = 0
    return not grid.dequantize(grid.quantize(weights, None, "fast"))[:, ::2].any()
