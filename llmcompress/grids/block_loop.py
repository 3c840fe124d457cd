"""The loops that all block formats share.

Quantizing with a search takes sixteen blocks at a time, one to a lane. A format brings
`encode(x, w, unit, parts, packed)` and says how errors are weighed. In there `x` and `w` are float32
`(block, 16)`: weight j of the block in each lane, and what its squared error counts. A block comes divided
by a power of two, its `unit`, so that its largest weight lies in [1, 2): squares neither overflow nor
vanish, and nothing is rounded. `parts`, float32 `(3, 16, 16)`, is room for what a format keeps for its
sub-blocks; `packed`, uint8 `(block_bytes, 16)`, takes byte i of every block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba.extending import register_jitable

from llmcompress.grids.compiled import compiled
from llmcompress.grids.effort import EFFORTS, search_at
from llmcompress.grids.grid import Grid, Quantizer
from llmcompress.grids.lanes import (
    WIDTH,
    absolute,
    fma,
    load,
    maximum,
    minimum,
    power_of_two,
    splat,
    store,
)
from llmcompress.grids.transpose import from_lanes, to_lanes

# Numba's disk cache looks for changes only in the file a kernel stands in. Held in the closure of every
# kernel, this makes it look at the files of the functions called from there as well.
_FILES = sorted(Path(__file__).parent.glob("*.py"))
SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).digest()


def searched_grid(
    name: str,
    ggml_type: int,
    block: int,
    block_bytes: int,
    weigh: Callable,
    weigh_plain: Callable,
    encode: Callable,
    decode: Callable,
    candidates: tuple[np.ndarray, ...] = (),
    plain_candidates: tuple[np.ndarray, ...] = (),
    plain: Quantizer | None = None,
) -> Grid:
    """The grid made of these functions; see `compile_quantizer` and `compile_dequantizer`.

    With `candidates` there is a kernel for each effort, and `encode` takes what `search_at` makes of them as
    one more argument. For weights without importance, unless effort is "best", there may be other candidates,
    `plain_candidates`, or another kernel, `plain`.
    """
    quantizers = {}
    for effort in EFFORTS if candidates else ("normal",):
        few = candidates if effort == "best" else plain_candidates or candidates
        searches = [(search_at(effort, tops),) if tops else () for tops in (candidates, few)]
        kernel = compile_quantizer(
            f"{name}_{effort}", block, block_bytes, weigh, weigh_plain, encode, *searches
        )
        quantizers[effort] = by_importance(plain, kernel) if plain and effort != "best" else kernel
    dequantize = compile_dequantizer(name, block, block_bytes, decode)
    return Grid(name, ggml_type, block, block_bytes, quantizers["normal"], dequantize, quantizers)


def by_importance(without: Quantizer, given: Quantizer) -> Quantizer:
    """The kernel that uses one of two, of which only those used are compiled."""

    def quantize(weights: np.ndarray, importance: np.ndarray | None, out: np.ndarray) -> None:
        kernel = without if importance is None else given
        kernel(weights, importance, out)

    return quantize


def compile_quantizer(
    name: str,
    block: int,
    block_bytes: int,
    weigh: Callable,
    weigh_plain: Callable,
    encode: Callable,
    search: tuple,
    plain_search: tuple,
) -> Quantizer:
    """The quantize kernel of a format, as `Grid` wants it; compiled when first called, then kept on disk.

    `weigh(x, w, row_energy)` finds the importance of each weight in `w`, its mean over the row being
    1, and makes it the weight of its error; `row_energy` is the mean square of the whole row, in units
    of x^2. `weigh_plain(x, w)` does without importance. `search` and `plain_search`
    hold what else `encode` takes.
    """
    sources = SOURCES

    @compiled(f"quantize_{name}", error_model="numpy")
    def quantize(weights, importance, out):
        sources  # noqa: B018
        columns, blocks = weights.shape[1], weights.size // block
        flat, flat_out = weights.reshape(-1), out.reshape(-1)
        x, w = np.empty((block, WIDTH), np.float32), np.empty((block, WIDTH), np.float32)
        parts, packed = np.empty((3, 16, WIDTH), np.float32), np.empty((block_bytes, WIDTH), np.uint8)
        source, target = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
        if importance is not None:
            relative, energies = relative_importance(importance), row_energies(weights)
        for first in range(0, blocks, WIDTH):
            for lane in range(WIDTH):
                number = min(first + lane, blocks - 1)  # lanes too many repeat the last block
                source[lane], target[lane] = number * block, number * block_bytes
            gather(flat, source, x, block)
            unit = normalize(x, block)
            if importance is None:
                weigh_plain(x, w)
                encode(x, w, unit, parts, packed, *plain_search)
            else:
                energy = minimum(lane_energies(energies, source, columns, w) / unit / unit, 1e30)
                gather(relative, source, w, block)
                weigh(x, w, energy)
                encode(x, w, unit, parts, packed, *search)
            scatter(flat_out, target, packed, block_bytes)

    return quantize


def compile_plain_quantizer(name: str, block_bytes: int, encode: Callable) -> Quantizer:
    """The quantize kernel of a format without a search: `encode(weights, number, data)`.

    It writes block `number` of flat float32 `weights` as `block_bytes` bytes of uint8 `data`.
    """
    sources = SOURCES

    @compiled(f"quantize_{name}", error_model="numpy")
    def quantize(weights, importance, out):
        sources  # noqa: B018
        flat, blocks = weights.reshape(-1), out.reshape(-1, block_bytes)
        for number in range(len(blocks)):
            encode(flat, number, blocks[number])

    return quantize


def compile_dequantizer(name: str, block: int, block_bytes: int, decode: Callable) -> Callable:
    """The dequantize kernel of a format: `decode(data, values)` for uint8 and float32 of one block."""
    sources = SOURCES

    @compiled(f"dequantize_{name}", error_model="numpy")
    def dequantize(data, out):
        sources  # noqa: B018
        blocks, values = data.reshape(-1, block_bytes), out.reshape(-1, block)
        for number in range(len(blocks)):
            decode(blocks[number], values[number])

    return dequantize


@register_jitable
def gather(flat, offsets, rows, block):
    for j in range(0, block, WIDTH):
        to_lanes(flat, offsets, rows, j)


@register_jitable
def scatter(flat, offsets, packed, block_bytes):
    """The last sixteen bytes of a block may overlap those before."""
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
    """Importance over its mean; never below a millionth, so that dead columns still get their best fit."""
    total = 0.0
    for value in importance:
        total += value
    mean = total / importance.size
    relative = np.ones(importance.size, np.float32)
    if 0.0 < mean < np.inf:
        for j in range(importance.size):
            relative[j] = max(importance[j] / mean, 1e-6)
    return relative


@register_jitable
def row_energies(weights):
    """The mean square of each row."""
    rows, columns = weights.shape
    flat, sums = weights.reshape(-1), np.empty((1, WIDTH), np.float32)
    energies = np.empty(rows, np.float32)
    for row in range(rows):
        total, more = splat(0.0), splat(0.0)  # two sums, neither of which waits for the other
        for j in range(row * columns // WIDTH, (row + 1) * columns // WIDTH, 2):
            total = fma(load(flat, j), load(flat, j), total)
            more = fma(load(flat, j + 1), load(flat, j + 1), more)
        store(sums, 0, total + more)
        energies[row] = sums.sum() / np.float32(columns)
    return energies


@register_jitable
def lane_energies(energies, source, columns, scratch):
    """The energy of each lane's row; `source` becomes the place in it. Rows rise with lanes, so none is divided."""
    row = source[0] // columns
    for lane in range(WIDTH):
        while source[lane] >= (row + 1) * columns:
            row += 1
        source[lane] -= row * columns
        scratch[0, lane] = energies[row]
    return load(scratch, 0)
