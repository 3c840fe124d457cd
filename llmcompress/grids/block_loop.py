"""The loop that all block formats share: sixteen blocks in, sixteen blocks out.

A format brings how it weighs errors and `encode(x, w, unit, packed)`; `compile_quantizer` makes the
kernel. In there, `x` and `w` are float32 `(block, 16)`: weight j of the block in each lane, and what its
squared error counts. A block comes divided by a power of two, its `unit`, so that its largest weight lies
in [1, 2): squares neither overflow nor vanish, and nothing is rounded. `packed`, uint8
`(block_bytes, 16)`, takes byte i of every block.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numba import njit
from numba.extending import register_jitable

from llmcompress.grids.lanes import (
    WIDTH,
    absolute,
    fma,
    from_lanes,
    half_bits,
    load,
    maximum,
    minimum,
    power_of_two,
    rint,
    select,
    splat,
    store,
    store_bytes,
    to_lanes,
)

HALF_MAX = 65504.0

# Numba's disk cache looks for changes only in the file a kernel stands in. Held in the closure of every
# kernel, this hash makes it look at the files of the functions called from there as well.
_SOURCES = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def compile_quantizer(block: int, block_bytes: int, weigh, weigh_plain, encode):
    """The quantize kernel of a format, as `Grid` wants it; compiled when first called, then kept on disk.

    `weigh(x, w, row_mean_square)` finds each weight's importance in `w` (mean 1 over the row) and
    makes it the error's weight; `weigh_plain(x, w)` does without.
    """
    sources = _SOURCES

    @njit(cache=True, nogil=True, error_model="numpy")
    def quantize(weights, importance, out):
        sources  # noqa: B018
        columns, blocks = weights.shape[1], weights.size // block
        flat, flat_out = weights.reshape(-1), out.reshape(-1)
        x, w = np.empty((block, WIDTH), np.float32), np.empty((block, WIDTH), np.float32)
        packed = np.empty((block_bytes, WIDTH), np.uint8)
        source, target = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
        if importance is not None:
            relative, energies = relative_importance(importance), row_mean_squares(weights)
        for first in range(0, blocks, WIDTH):
            for lane in range(WIDTH):
                number = min(first + lane, blocks - 1)
                source[lane], target[lane] = number * block, number * block_bytes
            gather(flat, source, x, block)
            unit = normalize(x, block)
            if importance is None:
                weigh_plain(x, w)
            else:
                energy = lane_energies(energies, source, columns, w) / unit / unit
                for lane in range(WIDTH):
                    source[lane] %= columns
                gather(relative, source, w, block)
                weigh(x, w, minimum(energy, 1e30))
            encode(x, w, unit, packed)
            scatter(flat_out, target, packed, block_bytes)

    return quantize


@register_jitable
def gather(flat, offsets, rows, block):
    for j in range(0, block, WIDTH):
        to_lanes(flat, offsets, rows, j)


@register_jitable
def scatter(flat, offsets, packed, block_bytes):
    for i in range(0, block_bytes - WIDTH, WIDTH):
        from_lanes(flat, offsets, packed, i)
    from_lanes(flat, offsets, packed, block_bytes - WIDTH)


@register_jitable
def normalize(x, block):
    """Divide each block by its unit, and return the units."""
    largest = splat(2.0**-126)
    for j in range(block):
        largest = maximum(absolute(load(x, j)), largest)
    unit = power_of_two(minimum(largest, 2.0**126))
    inverse = 1.0 / unit
    for j in range(block):
        store(x, j, load(x, j) * inverse)
    return unit


@register_jitable
def relative_importance(importance):
    """Importance over its mean, none below a millionth: a block of dead columns still gets its best fit."""
    total = 0.0
    for value in importance:
        total += value
    mean = total / importance.size
    relative = np.ones(importance.size, np.float32)
    if mean > 0.0:
        for j in range(importance.size):
            relative[j] = max(importance[j] / mean, 1e-6)
    return relative


@register_jitable
def row_mean_squares(weights):
    """float32 `(rows,)`; computed in float64."""
    rows, columns = weights.shape
    result = np.empty(rows, np.float32)
    for row in range(rows):
        total = 0.0
        for j in range(columns):
            total += np.float64(weights[row, j]) * np.float64(weights[row, j])
        result[row] = min(total / columns, 3e38)
    return result


@register_jitable
def lane_energies(energies, source, columns, scratch):
    for lane in range(WIDTH):
        scratch[0, lane] = energies[source[lane] // columns]
    return load(scratch, 0)


@register_jitable
def clamped_rint(value, low, high):
    return minimum(maximum(rint(value), low), high)


@register_jitable
def divide(a, b):
    """a / b, or 0 where b is not positive."""
    return select(b > 0.0, a / b, 0.0)


@register_jitable
def round_to_half(value):
    """The nearest float16, as float32: saturated where it would be infinite, ties to even."""
    value = minimum(maximum(value, -HALF_MAX), HALF_MAX)
    # Adding 2^13 times the leading bit and taking it away again leaves float16's 11 bits, and steps
    # of 2^-24 where it is subnormal.
    shift = power_of_two(maximum(absolute(value), 2.0**-14)) * 8192.0
    return (value + shift) - shift


@register_jitable
def store_half(packed, i, half):
    """Write float16 values as bytes i and i + 1, low byte first."""
    bits = half_bits(half)
    high = rint(fma(bits, 1 / 256, -0.498046875))
    store_bytes(packed, i, fma(high, -256.0, bits))
    store_bytes(packed, i + 1, high)
