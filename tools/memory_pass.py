"""How fast memory lets one core go through weights: the bound of every quantizer, whatever it computes."""

from __future__ import annotations

import numba
import numpy as np

from llmcompress.grids.lanes import WIDTH, largest_lane, load, maximum, splat

WEIGHTS = 1 << 24  # 64 MiB of float32, more than the caches hold
CHUNK = 4096  # weights read before their bytes are written


@numba.njit(nogil=True)
def touch(values: np.ndarray, out: np.ndarray) -> None:
    """Read flat float32 `values` and write flat uint8 `out`, a share for each chunk; do next to nothing else.

    What is left of both after whole chunks is passed over.
    """
    chunks = values.size // CHUNK
    share = out.size // chunks
    for chunk in range(chunks):
        a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        first = chunk * (CHUNK // WIDTH)
        for j in range(first, first + CHUNK // WIDTH, 4):
            a, b = maximum(load(values, j), a), maximum(load(values, j + 1), b)
            c, d = maximum(load(values, j + 2), c), maximum(load(values, j + 3), d)
        largest = largest_lane(maximum(maximum(a, b), maximum(c, d)))
        out[chunk * share : (chunk + 1) * share] = np.uint8(min(largest, np.float32(255.0)))
