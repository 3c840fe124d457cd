"""NF4, FP4: bitsandbytes' four bits a weight, codes into sixteen levels from -1 to 1, 64 weights under one float32.

NF4's levels are quantiles of a normal distribution (Dettmers et al., QLoRA, arXiv:2305.14314). Without importance the
bytes are those of bitsandbytes 0.50, `quantize_4bit` on a CPU: the scale is the largest size, each code the nearest
level, of two that are as near the lower one. With importance, scales are searched for the least weighted error;
any float32 is allowed. Here a block is bytes, its levels numbered in ascending order:

    bytes 0-3     scale, float32
    bytes 4-35    codes 2 i (bits 4-7) and 2 i + 1 (bits 0-3)

Double quantization stores the scales of a tensor, less their mean, in eight bits, 256 of them under one float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.grid import Grid

BLOCK, HEAD, NESTED_BLOCK = 64, 4, 256

NF4_LEVELS = np.array(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1],
    np.float32,
)  # fmt: skip
FP4_MAP = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)
FP4_ORDER = np.array(
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8
)  # 0 comes twice, as in bitsandbytes

LEAST = np.float32(1e-38)  # what bitsandbytes divides by at least

# Scales tried, as factors on the largest size; found by trial on weights of trained models.
TRIED = {"fast": 5, "normal": 13, "best": 41}
NARROWEST, WIDEST = 0.72, 1.06
REFITS = 4  # at most


@dataclass(frozen=True)
class FourBitGrid(Grid):
    """`stored`: bitsandbytes' code for each level, in ascending order of the levels. `map`: its table."""

    levels: np.ndarray = field(default=None, compare=False, repr=False)
    stored: np.ndarray = field(default=None, compare=False, repr=False)

    @property
    def map(self) -> np.ndarray:
        """float32 (16,): what each of bitsandbytes' codes stands for."""
        return self.levels[np.argsort(self.stored)]

    def quantize_flat(self, values: np.ndarray) -> np.ndarray:
        """Round float32 (n,), the last block of which may be short, as bitsandbytes does: (1, blocks * 36).

        The rest of a short block counts as zeros."""
        whole = len(values) // BLOCK * BLOCK
        data = [self.quantize(values[None, :whole])] if whole else []
        if whole < len(values):
            tail = np.zeros(BLOCK, np.float32)
            tail[: len(values) - whole] = values[whole:]
            scale = max(np.abs(tail).max(), LEAST)
            codes = np.searchsorted(_middles(self.levels), np.clip(tail / scale, -1, 1)).astype(np.uint8)
            nibbles = codes[::2] << 4 | codes[1::2]
            data.append(np.concatenate([scale[None].view(np.uint8), nibbles])[None])
        return np.concatenate(data, axis=1)

    def parts(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of encoded rows: scales, float32 (rows, blocks), and bitsandbytes' bytes of codes, uint8 (rows, columns / 2)."""
        blocks = data.reshape(len(data), -1, self.block_bytes)
        scales = np.ascontiguousarray(blocks[:, :, :HEAD]).view("<f4")[:, :, 0]
        codes = np.ascontiguousarray(blocks[:, :, HEAD:]).reshape(len(data), -1)
        pairs = np.arange(256)
        table = self.stored[pairs >> 4] << 4 | self.stored[pairs & 15]
        return scales, codes if (table == pairs).all() else table[codes]


def double_quantize(scales: np.ndarray, mean: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Eight-bit codes, uint8 (blocks,), of scales less their mean, and their own scales, float32 (blocks / 256,).

    bitsandbytes' CPU code takes the level nearest to the nearest of 65536 even steps from -1 to 1."""
    left = np.zeros(-(-len(scales) // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    left[: len(scales)] = scales - mean
    runs = left.reshape(-1, NESTED_BLOCK)
    largest = np.abs(runs).max(1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        at = (runs * (np.float32(1) / largest)[:, None] + np.float32(1)) * np.float32(32767.5) + np.float32(
            0.5
        )
    codes = _steps()[np.nan_to_num(np.clip(at, 0, 65535), nan=0).astype(np.int64)]
    codes[largest == 0] = 0
    return codes.reshape(-1)[: len(scales)], largest


@functools.cache
def dynamic_map() -> np.ndarray:
    """float32 (256,): bitsandbytes' signed dynamic levels, `create_dynamic_map` (arXiv:1511.04561)."""
    found = [0.0, 1.0]
    for i in range(7):
        last = 2**i
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(last))
        up, k = float(np.float32(0.1)), np.arange(last + 1)
        ends = np.where(k < (last + 1) // 2, up + step * k, 1 - step * (last - k)).astype(np.float32)
        means = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(found, np.float32))


@functools.cache
def _steps() -> np.ndarray:
    """uint8 (65536,): the nearest of the dynamic levels for each even step."""
    return np.searchsorted(_middles(dynamic_map()), np.arange(65536) / 32767.5 - 1).astype(np.uint8)


def _middles(levels: np.ndarray) -> np.ndarray:
    return (levels[:-1] + levels[1:]) / np.float32(2)


def _quantize(levels, tried, weights, importance, out) -> None:
    if importance is None:
        _round(weights, _middles(levels), out)
        return
    scales = np.empty((len(weights), weights.shape[1] // BLOCK), np.float32)
    _fit(weights, _weighing(importance), levels, _middles(levels), tried, scales)
    _encode(weights, scales, _middles(levels), out)
    out.reshape(len(out), -1, HEAD + BLOCK // 2)[:, :, :HEAD] = scales[:, :, None].view(np.uint8)


def _weighing(importance: np.ndarray) -> np.ndarray:
    """The importance over its largest in each block, so that no product underflows; ones for blocks without any."""
    blocks = importance.reshape(-1, BLOCK)
    largest = blocks.max(1, keepdims=True)
    return np.divide(blocks, largest, out=np.ones_like(blocks), where=largest > 0).reshape(-1)


def _dequantize(levels, data, out) -> None:
    scales = np.ascontiguousarray(data.reshape(len(data), -1, HEAD + BLOCK // 2)[:, :, :HEAD]).view("<f4")[
        :, :, 0
    ]
    _decode(data, scales, levels, out)


@compiled(inline="always")
def _largest(x):
    largest = np.float32(0)
    for j in range(BLOCK):
        largest = max(largest, abs(x[j]))
    return largest


@compiled()
def _codes(x, inverse, middles, codes):
    """The nearest level's code, as float32, of each of 64 values times `inverse`."""
    codes[:] = np.float32(0)
    for middle in middles:  # all values at once
        for j in range(BLOCK):
            value = min(max(x[j] * inverse, np.float32(-1)), np.float32(1))
            codes[j] += np.float32(1) if value > middle else np.float32(0)


@compiled()
def _pack(codes, out, at):
    for j in range(BLOCK // 2):
        out[at + j] = np.uint8(codes[2 * j] * np.float32(16) + codes[2 * j + 1])


@compiled()
def _round(weights, middles, out):
    """Scales and codes as bitsandbytes has them."""
    codes, scale = np.empty(BLOCK, np.float32), np.empty(1, np.float32)
    for row in range(weights.shape[0]):
        for block in range(weights.shape[1] // BLOCK):
            x, at = weights[row, block * BLOCK : (block + 1) * BLOCK], block * (HEAD + BLOCK // 2)
            largest = _largest(x)
            _codes(x, np.float32(1) / max(largest, LEAST), middles, codes)
            _pack(codes, out[row], at + HEAD)
            scale[0] = largest
            out[row, at : at + HEAD] = scale.view(np.uint8)


@compiled()
def _encode(weights, scales, middles, out):
    """The nearest code of every weight on given scales; a scale of zero has the code of zero."""
    codes = np.empty(BLOCK, np.float32)
    for row in range(weights.shape[0]):
        for block in range(scales.shape[1]):
            x, at = weights[row, block * BLOCK : (block + 1) * BLOCK], block * (HEAD + BLOCK // 2)
            scale = scales[row, block]
            _codes(x, np.float32(1) / scale if scale > np.float32(0) else np.float32(0), middles, codes)
            _pack(codes, out[row], at + HEAD)


@compiled()
def _decode(data, scales, levels, out):
    for row in range(out.shape[0]):
        for block in range(scales.shape[1]):
            at = block * (HEAD + BLOCK // 2) + HEAD
            for j in range(BLOCK // 2):
                byte = data[row, at + j]
                out[row, block * BLOCK + 2 * j] = levels[byte >> 4] * scales[row, block]
                out[row, block * BLOCK + 2 * j + 1] = levels[byte & 15] * scales[row, block]


@compiled(fastmath=True)
def _gain(x, w, inverse, levels, middles, near):
    """What rounding to levels takes off the error Σ w x², with the best scale for them; and that scale."""
    near[:] = levels[0]
    for i in range(len(middles)):
        step = levels[i + 1] - levels[i]
        for j in range(BLOCK):
            near[j] += step if x[j] * inverse > middles[i] else np.float32(0)
    product, square = np.float32(0), np.float32(0)
    for j in range(BLOCK):
        product += w[j] * x[j] * near[j]
        square += w[j] * near[j] * near[j]
    if square <= np.float32(0):
        return np.float32(0), np.float32(0)
    return product * product / square, product / square


@compiled(fastmath=True)
def _fit(weights, importance, levels, middles, tried, scales):
    """Scales with the least squared error, each column's times its importance."""
    near = np.empty(BLOCK, np.float32)
    for row in range(weights.shape[0]):
        for block in range(scales.shape[1]):
            run = slice(block * BLOCK, (block + 1) * BLOCK)
            x, w = weights[row, run], importance[run]
            largest, best, scale = _largest(x), np.float32(0), np.float32(0)
            if largest > LEAST:
                for factor in tried:
                    gain, fitted = _gain(x, w, np.float32(1) / (factor * largest), levels, middles, near)
                    if gain > best:
                        best, scale = gain, fitted
                for _ in range(REFITS):
                    if scale <= LEAST:
                        break
                    gain, fitted = _gain(x, w, np.float32(1) / scale, levels, middles, near)
                    if gain <= best:
                        break
                    best, scale = gain, fitted
            scales[row, block] = scale


def _grid(name: str, levels: np.ndarray, stored: np.ndarray) -> FourBitGrid:
    by_effort = {
        effort: functools.partial(_quantize, levels, np.linspace(NARROWEST, WIDEST, count, dtype=np.float32))
        for effort, count in TRIED.items()
    }
    return FourBitGrid(
        name, -1, BLOCK, HEAD + BLOCK // 2, by_effort["normal"], functools.partial(_dequantize, levels), by_effort,
        levels, stored,
    )  # fmt: skip


NF4 = _grid("NF4", NF4_LEVELS, np.arange(16, dtype=np.uint8))
FP4 = _grid("FP4", FP4_MAP[FP4_ORDER], FP4_ORDER)
